"""The forms in which QPLayer takes its arguments, and the errors that name a wrong one."""

import numpy as np
import pytest
import torch

import foldopt
from foldopt import errors
from tests.foldopt.qp.programs import F32, Program, close, tensor, truth
from tests.foldopt.qp.sparse import arguments, asked

inf = torch.inf


def mixed(dtype=F32):
    return torch.eye(3, dtype=dtype), torch.tensor([[1.0, -2.0, 0.5]], dtype=dtype), torch.zeros(3, dtype=dtype)


E, P, Z = mixed()
BOXED = torch.cat([-E, E]), torch.ones(6)
FORMS = {
    "integer Q": ((torch.diag(torch.tensor([1, 1, 1])), P, *BOXED), [-1, 1, -0.5]),
    "integer Q of another scale": ((torch.diag(torch.tensor([4, 4, 4])), P, *BOXED), [-0.25, 0.5, -0.125]),
    "integer A and b": ((E, P, -E, Z, torch.ones(1, 3, dtype=torch.long), torch.ones(1, dtype=torch.long)), [0, 1, 0]),
    "integer p": ((4 * E, torch.tensor([[1, -2, 3]]), *BOXED), [-0.25, 0.5, -0.75]),
    "integer h": ((E, P, BOXED[0], torch.tensor([1, 1, 1, 1, 1, 1])), [-1, 1, -0.5]),
    "G and h None": ((E, P, None, None, torch.ones(1, 3), torch.ones(1)), [-5 / 6, 13 / 6, -1 / 3]),
    "G and h as qpth has them": (
        (E, P, torch.Tensor(), torch.Tensor(), torch.ones(1, 3), torch.ones(1)),
        [-5 / 6, 13 / 6, -1 / 3],
    ),
    "G and h of no rows": (
        (E, P, torch.zeros(0, 3), torch.zeros(0), torch.ones(1, 3), torch.ones(1)),
        [-5 / 6, 13 / 6, -1 / 3],
    ),
    "A and b as qpth has them": ((E, P, -E, Z, torch.Tensor(), torch.Tensor()), [0, 2, 0]),
    "A and b of no rows": ((E, P, -E, Z, torch.zeros(0, 3), torch.zeros(0)), [0, 2, 0]),
    "A and b None": ((E, P, -E, Z, None, None), [0, 2, 0]),
    "infinite h": ((E, P, torch.cat([-E, E]), torch.tensor([0, 0, 0, inf, 1, inf])), [0, 1, 0]),
    "all h infinite": ((E, P, -E, torch.full((3,), inf)), [-1, 2, -0.5]),
    "p without a batch": ((E, P[0], -E, Z), [0, 2, 0]),
    "float64 p": ((E, P.double(), -E, Z), [0, 2, 0]),
    "float64 rows": ((E, P, -E.double(), Z.double()), [0, 2, 0]),
}
CLEAR = {
    "sparse G": (E, P, (-E).to_sparse(), Z),
    "numpy": (E.numpy(), P.numpy(), -E.numpy(), Z.numpy()),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_of_the_arguments(name):
    args, x = FORMS[name]
    found = foldopt.QPLayer()(*args)
    assert found.is_floating_point()
    close(found.double(), x, rtol=2e-7)


@pytest.mark.parametrize("name", CLEAR)
def test_forms_that_may_be_refused_by_name(name):
    try:
        found = foldopt.QPLayer()(*CLEAR[name])
    except errors.InputError as error:
        assert any(word in str(error) for word in ("Q", "G")), error  # noqa: PT017 - either answer is right
    else:
        close(found.double(), [0, 2, 0], rtol=2e-7)


@pytest.mark.parametrize(
    ("args", "kwargs", "word"),
    [
        ((E.to(torch.complex64), P, -E, Z), {}, "Q"),
        ((torch.eye(3), P, torch.full((1, 3), torch.nan), torch.ones(1)), {}, "G"),
        ((torch.full((3, 3), inf), P), {}, "Q"),
        ((E, torch.tensor([[0, inf, 0]]), -E, Z), {}, "p"),
        ((E, P, -E, torch.tensor([0, torch.nan, 0])), {}, "h"),
        ((E, P, -E, Z, torch.ones(1, 3), torch.tensor([inf])), {}, "b"),
        ((E, P, -E, torch.zeros(2)), {}, "h"),
        ((E, P, torch.eye(2), torch.zeros(2)), {}, "G"),
        ((torch.eye(2), P, -E, Z), {}, "Q"),
        ((torch.eye(3)[:2], P, -E, Z), {}, "Q"),
        ((E, P, -E, None), {}, "h"),
        ((E, P, None, Z), {}, "G"),
        ((E, P, -E, Z, torch.ones(1, 3), None), {}, "b"),
        ((E.expand(2, 3, 3), P.expand(5, 3), -E, Z), {}, "Q has shape"),
        ((E, P), {"lower": torch.zeros(2)}, "lower"),
        ((E, P), {"upper": torch.tensor([1, torch.nan, 1])}, "upper"),
        ((E, P.expand(2, 3)), {"lower": torch.zeros(3, 3)}, "has shape"),
    ],
)
def test_what_is_wrong_is_named(args, kwargs, word):
    with pytest.raises(errors.InputError, match=word):
        foldopt.QPLayer()(*args, **kwargs)


@pytest.mark.parametrize("name", ["on_failure", "degenerate", "closest_feasible"])
def test_an_unknown_policy_is_refused_when_the_layer_is_made(name):
    with pytest.raises(errors.InputError, match=name):
        foldopt.QPLayer(**{name: "ignore"})


def test_bounds_are_rows_of_their_own():
    """x does not depend on whether a bound is a row of G, a lower or an upper bound, nor does its gradient."""
    draws = np.random.default_rng(3)
    R, p = draws.normal(size=(6, 6)), 2 * draws.normal(size=6)
    A, b, weight = draws.normal(size=(1, 6)), draws.normal(size=1) / 4, draws.normal(size=6)
    Q, eye = R @ R.T / 6 + 0.1 * np.eye(6), np.eye(6)
    lower, upper = -draws.random(6), np.where(draws.random(6) < 0.5, draws.random(6), np.inf)
    some = np.isfinite(upper)
    rows = np.concatenate([-eye, eye[some]]), np.concatenate([-lower, upper[some]])
    expected = truth(Program(Q, p, A=A, b=b, lower=lower, upper=upper))
    for program in (
        Program(Q, p, A=A, b=b, lower=lower, upper=upper),
        Program(Q, p, *rows, A, b),
        Program(Q, p, eye, upper, A, b, lower=lower),
        Program(Q, p, -eye, -lower, A, b, upper=upper),
        Program(Q, p, A=np.concatenate([A, np.zeros((1, 6))]), b=np.r_[b, 0], lower=lower, upper=upper),
    ):
        _, x, gradients = asked(arguments(program), weight)
        close(x, expected.x)
        close(gradients["p"], expected.gradient(weight))
    batch = {"lower": lower, "upper": upper}
    for name, bound in batch.items():
        _, _, gradients = asked(arguments(Program(Q, p, A=A, b=b, lower=lower, upper=upper)), weight, wrt=(name,))
        finite = np.flatnonzero(np.isfinite(bound))
        assert (gradients[name][~torch.isfinite(tensor(bound))] == 0).all()
        for j in finite:
            ends = [
                truth(Program(Q, p, A=A, b=b, **{**batch, name: bound + s * 1e-5 * eye[j]})).x @ weight for s in (1, -1)
            ]
            assert gradients[name][j].item() == pytest.approx((ends[0] - ends[1]) / 2e-5, abs=1e-8)
