"""First and second derivatives of the projections on cones, and points without a derivative."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import hessian, jacfwd, jacrev, vmap

from foldopt.cones import Dual, Exponential, Power, ProductCone, SecondOrder, Semidefinite, svec
from foldopt.errors import FoldoptError
from tests.drawn import F64, normal
from tests.foldopt.cones.truth import CONES, differences, exponential_by_mpmath, kinds_of_points

MIXED = {"zero": 1, "nonneg": 2, "soc": [3, 1, 3], "psd": [2], "exp": 1, "pow": [0.3]}


def smooth(name, distance):
    """Random and integer points that are `distance` from any kink, (N, d)."""
    cone, d = CONES[name]
    v = torch.cat([3 * normal(6, 400, d), kinds_of_points(d)])
    if name in ("power 0.7", "dual power"):
        v = v[v[:, 2].abs() > 0.1]  # at z = 0 a second derivative need not exist, and differences converge slowly
    return v[~cone.kinks(v, distance)]


@pytest.mark.parametrize("name", CONES)
def test_derivatives_are_those_of_differences(name):
    cone, d = CONES[name]
    v = smooth(name, 0.1)
    assert len(v) > 100
    D = cone.derivative(v)
    columns = [differences(cone.project, v, e) for e in torch.eye(d, dtype=F64)]
    torch.testing.assert_close(D, torch.stack(columns, -1), rtol=0, atol=1e-8)
    torch.testing.assert_close(D, D.mT, rtol=0, atol=1e-15)
    w = torch.linalg.eigvalsh(D)
    assert w.min() > -1e-14
    assert w.max() < 1 + 1e-14
    g = normal(7, *v.shape)
    torch.testing.assert_close(cone.pushed(v, g), (D @ g[..., None])[..., 0], rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", CONES)
def test_second_derivatives_are_those_of_differences(name):
    cone, _ = CONES[name]
    v = smooth(name, 0.2)
    g, h = normal(8, *v.shape), normal(9, *v.shape)
    found = cone.curvature(v, g, h)
    torch.testing.assert_close(found, differences(lambda v: cone.pushed(v, g), v, h), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(found, cone.curvature(v, h, g), rtol=1e-9, atol=1e-7)


@pytest.mark.parametrize(
    "v", [(1e-30, 0, 1), (1e-12, -1e-13, 1), (1, -20, 2), (-20, 1, -1), (0.01, -1, 3), (0, 1e-9, -1)]
)
def test_the_exponential_cone_near_its_edges(v):
    mp = pytest.importorskip("mpmath").mp.clone()
    mp.dps = 200
    h = mp.mpf(10) ** -60
    columns = []
    for j in range(3):
        ends = [[mp.mpf(t) + sign * h * (i == j) for i, t in enumerate(v)] for sign in (1, -1)]
        above, below = (exponential_by_mpmath(mp, end) for end in ends)
        columns.append([float((a - b) / (2 * h)) for a, b in zip(above, below, strict=True)])
    truth = torch.tensor(columns, dtype=F64).T
    torch.testing.assert_close(Exponential().derivative(torch.tensor(v, dtype=F64)), truth, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("alpha", [0.02, 0.4, 0.5, 0.6, 0.98])
def test_the_power_cone_between_its_halves(alpha):
    v = torch.tensor([[-3.0, 2, 0], [2, -3, 0], [-0.1, 5, 0], [5, -0.1, 0]], dtype=F64)
    z = torch.tensor([0.0, 0, 1e-30], dtype=F64)
    truth = torch.diag_embed((v > 0).to(F64))
    truth[:, 2, 2] = Power(alpha).project(v + z)[:, 2] / 1e-30
    torch.testing.assert_close(Power(alpha).derivative(v), truth, rtol=0, atol=2e-2 if alpha in (0.4, 0.6) else 1e-12)


def test_repeated_eigenvalues_do_not_matter():
    cone = Semidefinite()
    Q = torch.linalg.qr(normal(1, 4, 4))[0]
    for w in ([1.0, 1.0, -1.0, -1.0], [2.0, 2.0, 2.0, -1.0], [-3.0, -3.0, -3.0, -3.0], [1.0, -1.0, -1.0, -1.0]):
        v = svec(Q @ torch.diag(torch.tensor(w, dtype=F64)) @ Q.T)
        g, h = normal(2, 10), normal(3, 10)
        columns = [differences(cone.project, v, e) for e in torch.eye(10, dtype=F64)]
        torch.testing.assert_close(cone.derivative(v), torch.stack(columns, -1), rtol=0, atol=1e-9)
        second = differences(lambda v, g=g: cone.pushed(v, g), v, h)
        torch.testing.assert_close(cone.curvature(v, g, h), second, rtol=0, atol=1e-8)
        assert gradgradcheck(cone.project, v.requires_grad_())


@pytest.mark.slow
@pytest.mark.parametrize("dual", [False, True])
def test_autograd_and_torch_func_to_second_order(dual):
    cone = ProductCone(MIXED).dual() if dual else ProductCone(MIXED)
    v = 2 * normal(11, 2, cone.size)
    assert not cone.kinks(v, 1e-2).any()
    leaf = v.clone().requires_grad_()
    assert gradcheck(cone.project, leaf, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(cone.project, leaf, check_fwd_over_rev=True, check_batched_grad=True)
    D = cone.derivative(v).dense()
    weights = normal(12, cone.size)

    def cost(v):
        return (cone.project(v) ** 2 * weights).sum()

    for jac in (jacrev, jacfwd):
        torch.testing.assert_close(vmap(jac(cone.project))(v), D, rtol=0, atol=1e-14)
    reference = vmap(hessian(cost))(v)
    for outer in (jacrev, jacfwd):
        for inner in (jacrev, jacfwd):
            torch.testing.assert_close(vmap(outer(inner(cost)))(v), reference, rtol=0, atol=1e-13)
    with pytest.raises(FoldoptError, match="first and second order only"):
        jacrev(hessian(cost))(v[0])


def test_linear_projections_have_all_derivatives():
    for cone in (ProductCone({"zero": 2, "nonneg": 3}), ProductCone({"zero": 2, "nonneg": 3}).dual()):
        third = jacrev(hessian(lambda v, cone=cone: cone.project(v).pow(3).sum()))(torch.ones(5, dtype=F64))
        assert third.sum() == 6 * cone.project(torch.ones(5, dtype=F64)).sum()


def test_kinks_are_where_both_sides_differ():
    for name, (cone, d) in CONES.items():
        v = torch.cat([normal(13, 300, d), kinds_of_points(d)])
        s, p = cone.split(v)
        at_kinks = torch.cat([s[p.norm(dim=1) > 0.1], p[s.norm(dim=1) > 0.1], torch.zeros(1, d, dtype=F64)])
        assert cone.kinks(at_kinks, 1e-13).all(), name
        e = 1e-7 * cone.centre(d)
        jump = (cone.derivative(at_kinks + e) - cone.derivative(at_kinks - e)).abs().amax((1, 2))
        assert jump.min() > 0.01, name
        calm = smooth(name, 0.1)
        assert (cone.derivative(calm + e) - cone.derivative(calm - e)).abs().max() < 1e-4, name
        assert cone.kinks(calm, 1e3).all(), name


def test_distances_to_kinks():
    v = torch.tensor([[2.0, 1, 0], [-2, 0, 1.5], [0, 1, 0], [1, 3, 4]], dtype=F64)
    for at, distance in enumerate([0.5**0.5, 0.5 * 0.5**0.5, 0.5**0.5, 4 * 0.5**0.5]):
        assert not SecondOrder().kinks(v[at], distance - 1e-9)
        assert SecondOrder().kinks(v[at], distance + 1e-9)
    edges = torch.tensor(
        [[0.0, -1, 1], [0, -1, -1], [-1, 0, 1], [-1, 0, -1], [-1, -1, 0], [0, 1, 1], [0, 0, 0]], dtype=F64
    )
    for cone, sign in ((Exponential(), 1), (Dual(Exponential()), -1)):
        assert cone.kinks(sign * edges, 1e-13).all()
        for step in (1e-3 * torch.eye(3, dtype=F64)).repeat(2, 1) * torch.tensor([1.0, 1, 1, -1, -1, -1])[:, None]:
            assert cone.kinks(sign * (edges + step), 2e-3).all()
        assert not cone.kinks(sign * torch.tensor([[-1.0, -1, 1], [-1, 1, 3], [1, 1, -3]], dtype=F64), 0.1).any()
    assert Exponential().kinks(torch.tensor([[-1.0, -1, 1]], dtype=F64), torch.tensor([1.5])).all()


def test_a_boundary_point_counts_as_inside():
    for cone, v in (
        (ProductCone({"nonneg": 3}), torch.zeros(3, dtype=F64)),
        (SecondOrder(), torch.tensor([5.0, 3, 4], dtype=F64)),
        (Semidefinite(), torch.tensor([1.0, 0, 0], dtype=F64)),
        (Exponential(), torch.tensor([0.0, 1, 1], dtype=F64)),
        (CONES["power 1/2"][0], torch.tensor([4.0, 9, 6], dtype=F64)),
    ):
        D = cone.derivative(v)
        D = D.dense() if isinstance(cone, ProductCone) else D
        torch.testing.assert_close(D, torch.eye(3, dtype=F64), rtol=0, atol=1e-15)
