"""Every projection against a generic solver of its argmin, and its derivatives against finite differences."""

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import hessian, jacfwd, jacrev, vmap

from foldopt import projections
from foldopt.errors import InfeasibleError, InputError
from foldopt.projections import capped_simplex
from foldopt.solvers.interior_point import solve_qcqp

F64 = torch.float64
N = 7


def points(B=40, n=N, seed=0, scale=1.0):
    return scale * torch.randn(B, n, generator=torch.Generator().manual_seed(seed), dtype=F64)


def nearest(x, **constraints):
    """The projection as a program for the interior point."""
    n = x.shape[1]
    found = solve_qcqp(torch.eye(n, dtype=F64), -x, **constraints, tol=1e-12)
    assert found.ok.all()
    return found.x


def bounds(n, upper):
    G = torch.cat([-torch.eye(n, dtype=F64), torch.eye(n, dtype=F64)])
    return {"G": G, "h": torch.cat([torch.zeros(n, dtype=F64), torch.full((n,), upper, dtype=F64)])}


ONES = {"A": torch.ones(1, N, dtype=F64)}
A = points(2, N, seed=1)
B2 = torch.tensor([0.3, -0.5], dtype=F64)
A_HALF = points(1, N, seed=2)[0]
G = points(5, N, seed=3)
H = torch.full((5,), 0.4, dtype=F64)
CASES = {
    "box": (lambda x: projections.box(x, 0.0, 1.0), bounds(N, 1.0)),
    "simplex": (projections.simplex, {**ONES, "b": torch.ones(1, dtype=F64), "G": -torch.eye(N), "h": torch.zeros(N)}),
    "simplex of 2.5": (
        lambda x: projections.simplex(x, 2.5),
        {**ONES, "b": torch.tensor([2.5]), "G": -torch.eye(N), "h": torch.zeros(N)},
    ),
    "capped simplex": (
        lambda x: projections.capped_simplex(x, 3),
        {**ONES, "b": torch.tensor([3.0]), **bounds(N, 1.0)},
    ),
    "affine": (lambda x: projections.affine(x, A, B2), {"A": A, "b": B2}),
    "half space": (lambda x: projections.half_space(x, A_HALF, 0.2), {"G": A_HALF[None], "h": torch.tensor([0.2])}),
    "polyhedron": (
        lambda x: projections.polyhedron(x, A, B2, G, H),
        {"A": A, "b": B2, "G": G, "h": H},
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("scale", [0.3, 1.0, 10.0])
def test_values_are_those_of_the_argmin(name, scale):
    project, constraints = CASES[name]
    x = points(seed=4, scale=scale)
    torch.testing.assert_close(project(x), nearest(x, **constraints), atol=1e-6 * scale, rtol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_projecting_twice_changes_nothing(name):
    project, _ = CASES[name]
    y = project(points(seed=5))
    torch.testing.assert_close(project(y), y, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_derivatives_of_first_and_second_order(name):
    project, _ = CASES[name]
    x = points(B=6, seed=6).requires_grad_()
    assert gradcheck(project, x)
    assert gradgradcheck(project, x)


def test_second_order_cone():
    x, t = points(60, seed=7), points(60, 1, seed=8, scale=2.0)[:, 0]
    y, s = projections.second_order_cone(x, t)
    norm = x.norm(dim=1)
    assert (norm <= t).any() and (norm <= -t).any() and (norm > t.abs()).any(), "all three cases occur"  # noqa: PT018
    assert (y.norm(dim=1) <= s + 1e-12).all()
    normal, height = x - y, t - s
    assert ((normal * y).sum(1) + height * s).abs().max() < 1e-12, "the residual is orthogonal to the projection"
    assert (normal.norm(dim=1) <= -height + 1e-12).all(), "and in the polar cone"
    data = x.requires_grad_(), t.requires_grad_()
    assert gradcheck(projections.second_order_cone, data)
    assert gradgradcheck(projections.second_order_cone, data)
    origin = torch.zeros(1, 3, dtype=F64, requires_grad=True)
    for height in (1.0, 0.0, -1.0):
        moved = projections.second_order_cone(origin, torch.tensor([height], dtype=F64))[0]
        assert torch.autograd.grad(moved.sum(), origin)[0].isfinite().all()


def test_derivatives_in_the_other_arguments():
    x = points(B=4, seed=9)
    total = torch.tensor([0.5, 1.1, 2.3, 3.2], dtype=F64, requires_grad=True)
    assert gradcheck(lambda total: projections.capped_simplex(x, total), total)
    lower = points(4, seed=10, scale=0.1).requires_grad_()
    assert gradcheck(lambda lower: projections.box(x, lower, lower + 1), lower)
    matrices = A.clone().requires_grad_(), B2.clone().requires_grad_()
    assert gradcheck(lambda A, b: projections.affine(x, A, b), matrices)
    assert gradcheck(lambda a: projections.half_space(x, a, 0.1), A_HALF.clone().requires_grad_())
    set_data = [v.clone().requires_grad_() for v in (A, B2, G, H)]
    assert gradcheck(lambda *data: projections.polyhedron(x, *data), set_data, atol=1e-6)


def test_ends_of_the_capped_simplex():
    x = points(seed=11)
    assert (projections.capped_simplex(x, 0) == 0).all()
    torch.testing.assert_close(projections.capped_simplex(x, N), torch.ones_like(x))
    single = projections.simplex(torch.zeros(2, 1, dtype=F64), 3)
    assert single.tolist() == [[3.0], [3.0]]
    tied = projections.capped_simplex(torch.zeros(1, 4, dtype=F64), 2)
    assert tied.tolist() == [[0.5] * 4]


def test_bad_input_is_named():
    x = points(3)
    with pytest.raises(InputError, match="lower exceeds upper"):
        projections.box(x, 1.0, 0.0)
    with pytest.raises(InputError, match=r"total is outside of \[0, 7.0\] for the samples \[1\]"):
        projections.capped_simplex(x, torch.tensor([1.0, 8.0, 2.0]))
    with pytest.raises(InputError, match=r"x has shape \(7,\)"):
        projections.simplex(x[0])
    with pytest.raises(InputError, match="linearly dependent rows"):
        projections.affine(x, torch.ones(2, N, dtype=F64), torch.ones(2, dtype=F64))
    with pytest.raises(InputError, match=r"A has shape \(2, 3\)"):
        projections.affine(x, A[:, :3], B2)
    with pytest.raises(InfeasibleError, match=r"for the samples \[0, 1, 2\]") as caught:
        projections.polyhedron(x, A, B2, torch.cat([A[:1], -A[:1]]), torch.tensor([0.0, -1.0], dtype=F64))
    assert caught.value.indices == (0, 1, 2)


@pytest.mark.parametrize("upper", [1.0, 0.5, torch.inf])
def test_a_guess_of_the_projection_saves_work_and_changes_nothing(monkeypatch, upper):
    """A right guess, its active set at other numbers, guesses that are wrong, infeasible or of one sample's vertex."""
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(50, 8, generator=gen, dtype=F64)
    exact = capped_simplex(x, 2.0, upper)
    right = torch.where(exact > 1e-12, exact, 0)  # at a vertex rounding may leave what is no free entry
    free = (right > 0) & (right < upper)
    assert (~free).any(1).all()
    elsewhere = torch.where(free, right / 2, right)
    wrong = [torch.zeros_like(x), torch.full_like(x, 0.1), exact.flip(0), exact.flip(1), torch.where(x > 0, 1.0, 0.0)]
    leaf = x.clone().requires_grad_()
    g = torch.randn(x.shape, generator=gen, dtype=F64)
    total = torch.full((50,), 2.0, dtype=F64, requires_grad=True)
    slopes = torch.autograd.grad(capped_simplex(leaf, total, upper), (leaf, total), g)
    assert slopes[1].abs().max() > 0.1
    sorts = []
    threshold = projections._threshold
    monkeypatch.setattr(projections, "_threshold", lambda *args: sorts.append(1) or threshold(*args))
    for near in (right, elsewhere, *wrong):
        y = capped_simplex(leaf, total, upper, near=near)
        torch.testing.assert_close(y, exact, rtol=0, atol=1e-15)
        torch.testing.assert_close(torch.autograd.grad(y, (leaf, total), g), slopes, rtol=0, atol=2e-15)
    assert len(sorts) == len(wrong), "the first two do without"


def test_a_guess_at_a_vertex():
    x = torch.tensor([[3.0, 2.5, 0.0, -1.0], [0.3, 0.2, 0.1, 0.0]], dtype=F64)
    exact = capped_simplex(x, 2)
    assert exact[0].tolist() == [1, 1, 0, 0]
    assert torch.equal(capped_simplex(x, 2, near=exact), exact)
    short = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]], dtype=F64)
    torch.testing.assert_close(capped_simplex(x, 2, near=short), exact, rtol=0, atol=1e-15)


@pytest.mark.parametrize("near", [[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.9, 0.1, 0.0], [0.4, 0.3, 0.3]])
def test_at_a_tie_the_derivative_does_not_depend_on_the_guess(near):
    """x is a vertex itself, where entries between the bounds in the guess end at a bound."""
    x = torch.tensor([[1.0, 0.0, 0.0]], dtype=F64, requires_grad=True)
    g = torch.tensor([[1.0, -2.0, 0.5]], dtype=F64)
    plain = capped_simplex(x, 1.0)
    guessed = capped_simplex(x, 1.0, near=torch.tensor([near], dtype=F64))
    assert torch.equal(guessed, plain)
    assert torch.equal(*(torch.autograd.grad(y, x, g)[0] for y in (guessed, plain)))


def test_a_total_may_be_whatever_a_tensor_can_be_made_of():
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    for total in (1, 1.0, [1.0, 1.0], torch.ones(2), torch.ones(2, dtype=F64).numpy()):
        torch.testing.assert_close(capped_simplex(x, total).sum(1), torch.ones(2, dtype=F64))


@pytest.mark.parametrize("total", [-1.0, 4.5, torch.nan, torch.inf])
@pytest.mark.parametrize("guess", [0.0, 0.5, 1.0])
def test_a_guess_of_a_projection_that_does_not_exist(total, guess):
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=F64)
    totals = torch.tensor([2.0, total, 0.0], dtype=F64)
    with pytest.raises(InputError, match=r"outside of \[0, 4.0\] for the samples \[1\]"):
        capped_simplex(x, totals, near=torch.full_like(x, guess))


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_a_guess_at_any_scale(scale):
    x = scale * torch.randn(50, 8, generator=torch.Generator().manual_seed(1), dtype=F64)
    exact = capped_simplex(x, 1.0)
    torch.testing.assert_close(capped_simplex(x, 1.0, near=exact), exact, rtol=0, atol=1e-15)


X3 = points(3, seed=20)
MAPPED = {  # a projection of one row, as a function of the row and of something else; and values of both to map over
    "simplex": (lambda x, total: projections.simplex(x[None], total)[0], [0.5, 1.0, 2.0]),
    "simplex, total of shape (1,)": (lambda x, total: projections.simplex(x[None], total[None])[0], [0.5, 1.0, 2.0]),
    "capped simplex": (lambda x, total: projections.capped_simplex(x[None], total)[0], [0.5, 2.5, 6.5]),
    "capped simplex, near": (
        lambda x, total: projections.capped_simplex(x[None], total, 0.9, near=x[None])[0],
        [0.5, 2.5, 6.2],
    ),
    "box": (lambda x, bound: projections.box(x[None], -bound, 2 * bound)[0], [0.2, 0.5, 1.0]),
    "box, bounds in a list": (
        lambda x, bound: projections.box(x[None, :2], [-1.0, -bound], [bound, 1.0])[0],
        [0.2, 0.5, 1.0],
    ),
    "box, bound by bound": (lambda x, lower: projections.box(x[None], lower, 2.0)[0], -points(3, seed=21).abs()),
    "affine, b": (lambda x, b: projections.affine(x[None], A, b)[0], points(3, 2, seed=22)),
    "affine, A": (lambda x, A: projections.affine(x[None], A, B2)[0], points(6, seed=23).view(3, 2, N)),
    "half space, b": (lambda x, b: projections.half_space(x[None], A_HALF, b)[0], [-3.0, 0.0, 3.0]),
    "half space, a": (lambda x, a: projections.half_space(x[None], a, 0.1)[0], points(3, seed=24)),
    "cone": (lambda x, t: torch.cat([p.view(-1) for p in projections.second_order_cone(x[None], t[None])]), [-1, 1, 9]),
    "polyhedron, h": (lambda x, h: projections.polyhedron(x[None], A, B2, G, h)[0], points(3, 5, seed=25).abs()),
    "polyhedron, A": (
        lambda x, A: projections.polyhedron(x[None], A, B2[:1], G, H)[0],
        points(3, seed=26).view(3, 1, N),
    ),
}


def mapped(name):
    project, values = MAPPED[name]
    return project, (X3, torch.as_tensor(values, dtype=F64))


def each_sample(function, args):
    """Map `function` over the samples without torch.func."""
    results = [function(*sample) for sample in zip(*args, strict=True)]
    if isinstance(results[0], tuple):
        return tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    return torch.stack(results)


def same(a, b, tol=1e-12):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


@pytest.mark.parametrize("name", MAPPED)
def test_vmap_is_a_loop_and_so_are_derivatives_in_every_argument(name):
    project, args = mapped(name)
    same(vmap(project)(*args), each_sample(project, args), 1e-14)
    jacobians = each_sample(lambda *a: torch.autograd.functional.jacobian(project, a), args)
    assert all(J.abs().max() > 0.01 for J in jacobians)
    assert gradcheck(project, tuple(a[0].clone().requires_grad_() for a in args))
    same(vmap(jacrev(project, (0, 1)))(*args), jacobians)
    same(vmap(jacfwd(project, (0, 1)))(*args), jacobians)
    own = jacobians[1]  # (3, n, ...), of each sample in its own argument; that of the others is zero
    whole = torch.stack([torch.stack([own[i] if i == j else 0 * own[i] for j in range(3)], 1) for i in range(3)])
    same(jacrev(vmap(project), 1)(*args), whole)
    same(jacfwd(vmap(project), 1)(*args), whole)


@pytest.mark.parametrize("name", MAPPED)
def test_second_derivatives_under_vmap(name):
    project, args = mapped(name)
    loss = lambda *a: project(*a).pow(3).sum()  # noqa: E731
    expected = each_sample(lambda *a: torch.autograd.functional.hessian(loss, a)[1][1], args)
    assert expected.abs().max() > 0.01
    same(vmap(hessian(loss, 1))(*args), expected, 1e-9)
    if not name.startswith("polyhedron"):  # a second each
        same(vmap(jacrev(jacrev(loss, 1), 1))(*args), expected, 1e-9)
        same(vmap(jacrev(jacfwd(loss, 1), 1))(*args), expected, 1e-9)


@pytest.mark.parametrize("name", MAPPED)
def test_what_is_mapped_may_be_any_of_the_arguments_and_by_two_vmaps(name):
    project, (x, other) = mapped(name)
    table = torch.stack([torch.stack([project(row, o) for o in other]) for row in x])
    same(vmap(project, (None, 0))(x[0], other), table[0], 1e-14)
    same(vmap(project, (0, None))(x, other[0]), table[:, 0], 1e-14)
    same(vmap(vmap(project, (None, 0)), (0, None))(x, other), table, 1e-14)
    same(vmap(project, (1, other.dim() - 1))(x.mT, other.movedim(0, -1)), each_sample(project, (x, other)), 1e-14)


def test_derivatives_in_the_total_are_shared_by_the_entries_between_the_bounds():
    totals = torch.tensor([0.5, 2.5, 6.5], dtype=F64)
    y = projections.capped_simplex(X3, totals)
    free = (y > 0) & (y < 1)
    expected = torch.where(free, 1 / free.sum(1, keepdim=True).to(F64), 0)
    assert len(set(free.sum(1).tolist())) > 1
    one = lambda x, total: projections.capped_simplex(x[None], total)[0]  # noqa: E731
    for derivative in (jacrev, jacfwd):
        same(vmap(derivative(one, 1))(X3, totals), expected, 1e-14)
        whole = derivative(lambda totals: projections.capped_simplex(X3, totals))(totals)
        same(whole, torch.diag_embed(expected.mT, dim1=0), 1e-14)
    slope = vmap(jacrev(lambda x, b: projections.half_space(x[None], A_HALF, b)[0], 1))(X3, totals - 3)
    outside = (X3 * A_HALF).sum(1, keepdim=True) > (totals - 3)[:, None]
    same(slope, torch.where(outside, A_HALF / A_HALF.square().sum(), 0), 1e-14)


@pytest.mark.parametrize("name", MAPPED)
def test_forward_mode_and_batched_gradients_in_every_argument(name):
    project, args = mapped(name)
    with forward_ad.dual_level():
        dual = vmap(project)(*(forward_ad.make_dual(a, torch.ones_like(a)) for a in args))
        tangent = forward_ad.unpack_dual(dual).tangent
    jacobians = each_sample(lambda *a: torch.autograd.functional.jacobian(project, a), args)
    same(tangent, sum(J.reshape(*J.shape[:2], -1).sum(2) for J in jacobians))
    leaves = tuple(a[0].clone().requires_grad_() for a in args)
    if not name.startswith("polyhedron"):  # its own derivative cannot be batched by the older vmap
        assert gradcheck(project, leaves, check_forward_ad=True, check_batched_grad=True)


@pytest.mark.parametrize(
    ("call", "args", "message"),
    [
        (
            lambda x, total: projections.capped_simplex(x[None], total),
            (X3, torch.tensor([1.0, 7.5, -1.0], dtype=F64)),
            r"total is outside of \[0, 7.0\] for the samples \[\(1, 0\), \(2, 0\)\]",
        ),
        (
            lambda x, total: projections.simplex(x[None], total),
            (X3, torch.tensor([1.0, torch.nan, torch.inf], dtype=F64)),
            r"total is outside of \[0, inf\] for the samples \[\(1, 0\), \(2, 0\)\]",
        ),
        (lambda x, u: projections.box(x[None], 0.0, u), (X3, points(3, seed=27)), "lower exceeds upper"),
        (lambda x, a: projections.half_space(x[None], a, 1.0), (X3, 0 * X3), "a is 0 in some samples"),
        (
            lambda x, A: projections.affine(x[None], A, B2),
            (X3, torch.ones(3, 2, N, dtype=F64)),
            "linearly dependent rows",
        ),
        (
            lambda x, upper: projections.capped_simplex(x[None], 1.0, upper),
            (X3, torch.ones(3, dtype=F64)),
            "upper is a tensor; expected a number",
        ),
    ],
)
def test_bad_input_is_named_under_vmap_and_inside_of_derivatives(call, args, message):
    summed = lambda *a: sum(part.sum() for part in call(*a))  # noqa: E731
    for transformed in (vmap(call), vmap(jacrev(summed, 1)), vmap(jacfwd(summed, 1)), jacrev(vmap(summed), 1)):
        with pytest.raises(InputError, match=message):
            transformed(*args)


def test_a_sample_of_two_vmaps_is_named_by_the_indices_of_both_and_its_row():
    totals = torch.tensor([[1.0, 1.0, -1.0], [1.0, 1.0, 1.0]], dtype=F64)
    twice = vmap(vmap(projections.simplex, (None, 0)), (None, 0))
    for project in (twice, jacrev(twice, 1), jacfwd(twice, 1)):
        with pytest.raises(InputError, match=r"for the samples \[\(0, 2, 0\), \(0, 2, 1\)\]"):
            project(X3[:2], totals)


def test_an_empty_polyhedron_is_found_under_vmap():
    contrary = torch.cat([A[:1], -A[:1]])
    h = torch.tensor([[1.0, 1.0], [0.0, -1.0]], dtype=F64)
    with pytest.raises(InfeasibleError, match="no point satisfies"):
        vmap(lambda x, h: projections.polyhedron(x[None], A, B2, contrary, h))(X3[:2], h)


def test_bounds_may_be_whatever_a_tensor_can_be_made_of():
    inside = torch.where(X3 < -0.5, -0.5, torch.where(X3 > 1, 1.0, X3))
    low, high = torch.full((N,), -0.5, dtype=F64), torch.ones(N)
    for lower, upper in ((-0.5, 1), (low, high), (low.numpy(), high.numpy()), ([-0.5] * N, [1] * N), (low, 1.0)):
        same(projections.box(X3, lower, upper), inside, 0)
    limit = X3 @ A_HALF - 1
    for b in (limit, limit.numpy(), limit.tolist()):
        same(projections.half_space(X3, A_HALF, b) @ A_HALF, limit)


def test_lists_may_hold_tensors_and_keep_their_gradients():
    total = torch.tensor(2.0, dtype=F64, requires_grad=True)
    y = projections.simplex(X3[:2], [1.0, total])
    slope = torch.autograd.grad(y[1, y[1].argmax()], total)[0]
    same(slope, 1 / (y[1] > 0).sum().to(F64))
    low = torch.tensor(0.3, dtype=F64, requires_grad=True)
    y = projections.box(torch.zeros(1, 2, dtype=F64), [low, -1.0], 2.0)
    assert y.tolist() == [[0.3, 0.0]]
    assert torch.autograd.grad(y.sum(), low)[0] == 1


def test_the_upper_bound_of_a_capped_simplex_is_a_number():
    same(projections.capped_simplex(X3, 1.0, torch.tensor(0.5)), projections.capped_simplex(X3, 1.0, 0.5), 0)
    for upper in (torch.tensor(0.5, requires_grad=True), torch.full((3,), 0.5)):
        with pytest.raises(InputError, match="upper is a tensor; expected a number"):
            projections.capped_simplex(X3, 1.0, upper)
