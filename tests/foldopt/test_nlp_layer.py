"""`NLPLayer`: bounds, the number of samples, and values where there is no derivative."""

import pytest
import torch

from foldopt import NLPLayer
from foldopt.errors import InputError, SingularHessianError

F64 = torch.float64
INF = float("inf")


def distance(x, c):
    return (x - c).square().sum(1)


def test_bounds_with_infinite_entries_and_a_fixed_variable():
    """x in [0, 1] x R x {1}: the projection of c, whose derivative is 1 where no bound holds."""
    layer = NLPLayer(
        distance,
        lower=torch.tensor([0.0, -INF, 1.0]),
        upper=lambda c: torch.tensor([1.0, INF, 1.0], dtype=F64),
        start=torch.zeros(3),
    )
    c = torch.tensor([[2.0, 5.0, 3.0], [0.5, -1.0, -1.0], [-1.0, 0.0, 1.5]], dtype=F64, requires_grad=True)
    x = layer(c)
    torch.testing.assert_close(x, torch.tensor([[1.0, 5.0, 1.0], [0.5, -1.0, 1.0], [0.0, 0.0, 1.0]], dtype=F64))
    (gradient,) = torch.autograd.grad(x.sum(), c)
    torch.testing.assert_close(gradient, torch.tensor([[0.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 1.0, 0.0]], dtype=F64))
    torch.testing.assert_close(layer.multipliers[0], 2 * (c.detach()[:, 2:] - 1))
    with pytest.raises(InputError, match=r"lower has shape \(2,\)"):
        NLPLayer(distance, lower=torch.zeros(2), start=torch.zeros(3))(c)


def test_a_bound_that_moves_with_the_parameters_has_their_derivative():
    layer = NLPLayer(lambda x, c: (x + 1).square().sum(1), lower=lambda c: c, start=torch.ones(2))
    c = torch.tensor([[0.5, -3.0]], dtype=F64, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(c).sum(), c)
    torch.testing.assert_close(gradient, torch.tensor([[1.0, 0.0]], dtype=F64))


def test_the_number_of_samples_follows_the_rule():
    c, A = torch.arange(3.0, dtype=F64), torch.eye(3, dtype=F64)
    plain = NLPLayer(lambda x, *c: (x - c[-1]).square().sum(1), start=torch.zeros(3))
    assert plain(c).shape == (1, 3)  # 1-D: shared
    assert plain(c, torch.ones(4, 3, dtype=F64)).shape == (4, 3)
    weighted = NLPLayer(lambda x, A, c: (x @ A - c).square().sum(1), start=torch.zeros(3))
    with pytest.raises(InputError, match=r"\[3, 4\] rows.*start= of shape \(B, n\)"):
        weighted(A, torch.ones(4, 3, dtype=F64))
    told = NLPLayer(lambda x, A, c: (x @ A - c).square().sum(1), start=torch.zeros(4, 3))
    assert told(A, torch.ones(4, 3, dtype=F64)).shape == (4, 3)
    alone = NLPLayer(lambda x, A: (x @ A - 1).square().sum(1), start=torch.zeros(1, 3))
    assert alone(A).shape == (1, 3)


def quartic(**options):
    """Hock and Schittkowski's problem 26, tilted: its Hessian is singular at the solution (1, 1, 1) for c = 0."""
    return NLPLayer(
        lambda x, c: (x[:, 0] - x[:, 1]) ** 2 + (x[:, 1] - x[:, 2]) ** 4 + (c * x).sum(1),
        equalities=lambda x, c: (1 + x[:, 1:2] ** 2) * x[:, :1] + x[:, 2:] ** 4 - 3,
        start=torch.tensor([-2.6, 2.0, 2.0]),
        **options,
    )


@pytest.mark.parametrize("policy", ["raise", "one_sided", "nan", "zero"])
def test_a_singular_hessian_has_a_value_and_no_derivative(policy):
    c = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.5, 0.5]], dtype=F64, requires_grad=True)
    layer = quartic(degenerate=policy)
    x = layer(c)
    assert layer.last.status == ("solved", "solved")
    torch.testing.assert_close(x[0], torch.ones(3, dtype=F64), rtol=0, atol=1e-2)
    if policy in ("raise", "one_sided"):
        with pytest.raises(SingularHessianError) as error:
            x.sum().backward()
        assert error.value.indices == (0,)
        return
    (gradient,) = torch.autograd.grad(x.sum(), c)
    assert gradient[0].isnan().all() if policy == "nan" else (gradient[0] == 0).all()
    h = 1e-5 * torch.eye(3, dtype=F64)
    ends = [layer(c.detach()[1] + sign * h).sum(1) for sign in (1, -1)]
    torch.testing.assert_close(gradient[1], (ends[0] - ends[1]) / 2e-5, rtol=1e-5, atol=1e-6)
    assert layer.last.solved.all()
