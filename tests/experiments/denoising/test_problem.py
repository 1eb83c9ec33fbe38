"""The denoising problem: its exact and iterative solvers, its folded gradient, and its QP form with qpth."""

import pytest
import torch

import foldopt
from data.denoising import generate
from experiments.denoising.dual import DualSystem, stepsize
from experiments.denoising.problem import DenoisingProblem, DenoisingStep, differencing
from foldopt.errors import InputError
from foldopt.solvers.qp import solve_qp
from foldopt.solvers.qpth import solve_qpth

F64 = torch.float64
SCALES = [(10, 100, 10, 20.0), (10, 100, 10, 1.0), (10, 100, 1, 1.0), (-3, 3, 1, 2.0), (-3, 3, 1, 0.05)]


def operator(learned=0.05, n=100, seed=0):
    """The differencing operator plus noise, like operators that are learned from it."""
    gen = torch.Generator().manual_seed(seed)
    return differencing(n) + learned * torch.randn(n - 1, n, generator=gen, dtype=F64)


def signals(batch, n=100, low=10, high=100, noise=10):
    return generate(0, batch, 1, 1, length=n, max_segments=min(9, n), low=low, high=high, noise=noise).noisy["train"]


def layer_of(**options):
    return foldopt.fold(
        lambda D, d, weight: DenoisingProblem(float(weight), D.shape[1]).exact(D, d).w, DenoisingStep(), **options
    )


def denoised(layer, D, d, weight):
    return DenoisingStep.primal(layer(D, d, weight), D, d)


@pytest.mark.parametrize("learned", [0.0, 0.05, 0.5])
@pytest.mark.parametrize(("low", "high", "noise", "weight"), SCALES)
def test_the_optimality_conditions_hold_to_machine_precision(low, high, noise, weight, learned):
    """x = d + D'w, and w is in -weight times the subdifferential of |Dx|, for 200 signals of each scale."""
    D, d = operator(learned), signals(200, low=low, high=high, noise=noise)
    found = DenoisingProblem(weight, D.shape[1]).exact(D, d)
    assert found.ok.all()
    assert float(found.residual.max()) < 1e-13
    size = float((d @ D.mT).abs().max())
    torch.testing.assert_close(found.x, d + found.w @ D, rtol=0, atol=1e-12 * size)
    assert float(found.w.abs().max()) <= weight * (1 + 1e-12)
    Dx = found.x @ D.mT
    free = found.w.abs() < weight * (1 - 1e-9)
    assert float(Dx[free].abs().max()) < 1e-11 * size
    assert float((Dx * found.w)[~free].max()) < 1e-11 * size * weight


def test_a_general_solver_agrees():
    D, d, weight = operator(n=20), signals(200, n=20, low=-3, high=3, noise=1), torch.tensor(0.7, dtype=F64)
    Q, p, G, h = box_dual(D, d, weight)
    found = solve_qp(Q, p, p.new_zeros(200, 0, 19), p.new_zeros(200, 0), G, h)
    torch.testing.assert_close(DenoisingProblem(0.7, 20).exact(D, d).w, found.x, rtol=0, atol=1e-8)


def test_warm_starts_end_at_the_same_solution_sooner():
    problem, d = DenoisingProblem(20.0, 100), signals(64)
    before = problem.exact(operator(0.05), d)
    moved = operator(0.05) + 1e-3 * torch.randn(99, 100, generator=torch.Generator().manual_seed(1), dtype=F64)
    cold, warm = problem.exact(moved, d), problem.exact(moved, d, warm=before.w)
    torch.testing.assert_close(warm.w, cold.w, rtol=0, atol=1e-11)
    wrong = problem.exact(moved, d, warm=-before.w)
    torch.testing.assert_close(wrong.w, cold.w, rtol=0, atol=1e-11)
    again = problem.exact(moved, d, warm=cold.w)
    assert int(again.iterations.max()) == 1
    assert torch.equal(before.w, problem.exact(operator(0.05), d).w), "the warm start was not written to"


@pytest.mark.parametrize("learned", [0.0, 0.3])
def test_fdpg_agrees_whatever_the_norm_of_d(learned):
    """Learned operators have |D|^2 above 4, for which the paper's step of 1/4 diverges."""
    problem, D, d = DenoisingProblem(1.0, 100), operator(learned), signals(32, low=-3, high=3, noise=1)
    found, exact = problem.fdpg(D, d, tol=1e-10), problem.exact(D, d)
    assert found.ok.all()
    torch.testing.assert_close(found.x, exact.x, rtol=0, atol=1e-6)
    stopped = problem.fdpg(D, d, iterations=5)
    assert not stopped.ok.any()
    assert stopped.iterations.tolist() == [5] * 32


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_block_systems_of_every_size(share):
    D = operator(0.1, n=30)
    gen = torch.Generator().manual_seed(0)
    free = torch.rand(20, 29, generator=gen) < share
    r = torch.randn(20, 29, generator=gen, dtype=F64)
    z = DualSystem(D).solve(r, free)
    M = D @ D.mT
    for row, chosen, rhs in zip(z, free, r, strict=True):
        expected = torch.zeros(29, dtype=F64)
        expected[chosen] = torch.linalg.solve(M[chosen][:, chosen], rhs[chosen])
        torch.testing.assert_close(row, expected, rtol=1e-9, atol=1e-10)


def test_the_closed_form_of_the_adjoint_is_that_of_the_step():
    D, d, weight = operator(n=12), signals(20, n=12, low=-3, high=3, noise=1), torch.tensor(0.6, dtype=F64)
    step = DenoisingStep()
    w = DenoisingProblem(0.6, 12).exact(D, d).w
    phi = torch.func.vmap(torch.func.jacrev(lambda w, d: step(w[None], D, d[None], weight)[0]))(w, d)
    g = torch.randn(20, 11, generator=torch.Generator().manual_seed(0), dtype=F64)
    for transposed in (False, True):
        A = torch.eye(11, dtype=F64) - (phi if transposed else phi.mT)
        expected = torch.linalg.solve(A, g[:, :, None])[:, :, 0]
        found = step.inverse(g, transposed, step(w, D, d, weight), w, D, d, weight)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def box_dual(D, d, weight):
    """The dual of each signal as a quadratic program (Q, p, G, h): |w| <= weight."""
    B, m = len(d), len(D)
    eye = torch.eye(m, dtype=F64)
    return (D @ D.mT).expand(B, m, m), d @ D.mT, torch.cat([eye, -eye]).expand(B, 2 * m, m), weight.expand(B, 2 * m)


@pytest.mark.parametrize("linear_solver", ["auto", "gmres", "direct"])
@pytest.mark.parametrize(("low", "high", "noise", "weight"), [(10, 100, 10, 20.0), (-3, 3, 1, 0.7)])
def test_gradients_against_differences_and_the_dual_as_a_qp(low, high, noise, weight, linear_solver):
    """Gradients with respect to the operator, the signals and the weight agree for 200 signals."""
    n, B = 20, 200
    D, d = operator(n=n).requires_grad_(), signals(B, n=n, low=low, high=high, noise=noise).requires_grad_()
    weight = torch.tensor(weight, dtype=F64, requires_grad=True)
    g = torch.randn(B, n, generator=torch.Generator().manual_seed(1), dtype=F64)
    layer = layer_of(linear_solver=linear_solver)
    params = D, d, weight
    mine = torch.autograd.grad((denoised(layer, *params) * g).sum(), params)
    assert layer.last.backward.ok.all()

    Q, p, G, h = box_dual(*params)
    w = solve_qp(Q, p, p.new_zeros(B, 0, n - 1), p.new_zeros(B, 0), G, h).x
    for a, b in zip(mine, torch.autograd.grad(((d + w @ D) * g).sum(), params), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * float(b.abs().max()))

    for i in range(3):
        assert_differences(layer, params, i, g)


def assert_differences(layer, params, i, g):
    """Compare the vjp of parameter i with 4th-order central differences along a direction, to 1e-6.

    Over the signals whose active set does not change between the ends, most of them.
    """
    size = params[i].detach().abs().mean() if i else 5 / params[1].detach().abs().max()
    direction = size * torch.randn(params[i].shape, generator=torch.Generator().manual_seed(2), dtype=F64)

    def difference(h):
        ends = {}
        for t in (-2, -1, 1, 2):
            moved = [p + t * h * direction if i == j else p for j, p in enumerate(params)]
            ends[t] = denoised(layer, *moved)
        return (8 * (ends[1] - ends[-1]) - (ends[2] - ends[-2])) / (12 * h)

    with torch.no_grad():
        wide, narrow = difference(2e-5), difference(1e-5)
    smooth = (wide - narrow).norm(dim=1) < 1e-6 * narrow.norm(dim=1).clamp(min=1e-6 * float(narrow.norm()))
    assert smooth.double().mean() > 0.8
    weighted = g * smooth[:, None]
    (mine,) = torch.autograd.grad((denoised(layer, *params) * weighted).sum(), params[i])
    assert float((mine * direction).sum()) == pytest.approx(float((weighted * narrow).sum()), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("low", "high", "noise", "weight"), SCALES)
def test_gradients_of_signals_of_the_study_against_differences_and_qpth(low, high, noise, weight):
    """For length 100 and every scale qpth solves the dual, which is strictly convex, so that no ridge is needed."""
    pytest.importorskip("qpth")
    params = operator(0.02), signals(32, low=low, high=high, noise=noise), torch.tensor(weight, dtype=F64)
    D, d, weight = (p.requires_grad_() for p in params)
    layer = layer_of()
    g = torch.randn(d.shape, generator=torch.Generator().manual_seed(1), dtype=F64)
    for i in range(3):
        assert_differences(layer, params, i, g)

    Q, p, G, h = box_dual(D, d, weight)
    scale = weight.detach()  # in units of the weight, to which qpth's tolerance refers
    none = p.new_zeros(len(d), 0, len(D)), p.new_zeros(len(d), 0)
    theirs = scale * solve_qpth(Q, p / scale, G, h / scale, *none, eps=1e-14, max_iter=60)
    ours = layer(D, d, weight)
    # nondegenerate signals: free coordinates are not at their bounds, others have a nonzero multiplier
    x = DenoisingStep.primal(ours, D, d).detach()
    slack = torch.where(ours.abs() < weight * (1 - 1e-9), 1 - ours.abs() / weight, (x @ D.mT).abs() / noise)
    clear = (slack.amin(1) > 1e-2).nonzero()[:, 0].tolist()
    assert len(clear) >= 8

    def gradients(w):
        """Gradients in D and d of all signals, and in the weight for each signal, as different signals would cancel."""
        terms = ((d + w @ D) * g).sum(1)
        shared = torch.autograd.grad(terms[clear].sum(), (D, d), retain_graph=True)
        return *shared, torch.stack([torch.autograd.grad(terms[k], weight, retain_graph=True)[0] for k in clear])

    for mine, qpths in zip(gradients(ours), gradients(theirs), strict=True):
        assert float((mine - qpths).norm() / qpths.norm()) < 1e-6


@pytest.mark.parametrize("learned", [0.0, 0.02, 0.5, 5.0])
def test_the_stepsize_is_safe_and_close_to_the_largest_safe_one(learned):
    D = operator(learned)
    largest = 1 / float(torch.linalg.matrix_norm(D, 2)) ** 2
    assert 0.7 * largest < float(stepsize(D)) <= largest
    assert float(stepsize(1e-3 * D)) == pytest.approx(1e6 * float(stepsize(D)))
    if not learned:
        assert float(stepsize(D)) == pytest.approx(0.25, rel=0.2), "that of the paper"


def test_second_order_and_forward_mode():
    D, d = operator(n=8), signals(3, n=8, low=-3, high=3, noise=1)
    weight = torch.tensor(0.5, dtype=F64)
    layer = layer_of()
    inputs = tuple(t.requires_grad_() for t in (D, d, weight))
    assert torch.autograd.gradcheck(lambda *p: denoised(layer, *p), inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda *p: denoised(layer, *p), inputs)


def test_qpth_on_the_quadratic_program_of_the_paper():
    """Eq. (33) with a ridge on t, which qpth needs; qpth averages gradients of shared arguments."""
    qpth = pytest.importorskip("qpth.qp")
    problem, D, d = DenoisingProblem(1.0, 100), operator().requires_grad_(), signals(4, low=-3, high=3, noise=1)
    empty = torch.zeros(0, dtype=F64)
    x = qpth.QPFunction(verbose=-1, maxIter=40)(
        *problem.qp(D, d, torch.tensor(1.0, dtype=F64), 1e-6)[:4], empty, empty
    )[:, :100]
    folded = denoised(layer_of(), D, d, torch.tensor(1.0, dtype=F64))
    torch.testing.assert_close(x, folded, rtol=0, atol=1e-3)
    theirs, mine = (torch.autograd.grad(y.square().sum(), D)[0] for y in (x, folded))
    assert float((4 * theirs - mine).norm() / mine.norm()) < 1e-2


@pytest.mark.parametrize("weight", [0, -1.0, float("nan"), float("inf")])
def test_a_weight_that_is_none_is_refused(weight):
    with pytest.raises(InputError, match="weight="):
        DenoisingProblem(weight, 100)


def test_bad_signals_and_operators_are_named():
    problem, D, d = DenoisingProblem(1.0, 100), operator(), signals(3)
    with pytest.raises(InputError, match=r"D has shape \(99, 100\) and d \(3, 99\)"):
        problem.exact(D, d[:, :99])
    d[1, 5] = torch.nan
    with pytest.raises(InputError, match=r"NaN or inf in 1 of 3 signals, first \[1\]"):
        problem.exact(D, d)
    with pytest.raises(InputError, match=r"D of shape \(99, 100\) holds NaN or inf; lower train.lr"):
        problem.exact(D * torch.inf, signals(3))
    D[1] = D[0]
    with pytest.raises(InputError, match="dependent rows"):
        problem.exact(D, signals(3))
    with pytest.raises(InputError, match="warm has shape"):
        problem.exact(operator(), signals(3), warm=torch.zeros(3, 98))


def test_a_step_alone_takes_dependent_rows():
    """Dependent rows have no unique dual, but only exact solves and gradients need one."""
    D, d = operator(), signals(4)
    D[1] = D[0]
    problem = DenoisingProblem(2.0, 100)
    layer = foldopt.fold(lambda D, d, _: problem.fdpg(D, d, iterations=20_000).w, DenoisingStep(), tol=1e-5)
    with torch.no_grad():
        assert layer(D, d, torch.tensor(2.0, dtype=F64)).isfinite().all()


@pytest.mark.parametrize("share", [0.2, 0.8])
@pytest.mark.parametrize("learned", ["independent", "nearly dependent"])
def test_systems_that_are_kept_are_those_of_their_free_sets(share, learned):
    """From call to call, the free sets of some or all samples change, or the size of the batch does."""
    D = operator(0.1, n=40)
    if learned == "nearly dependent":  # factored by LU
        D[1] = D[0] + 3e-6 * operator(1.0, n=40, seed=1)[1]
    gen = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.rand(*shape, generator=gen, dtype=F64)

    kept, free = DualSystem(D), drawn(12, 39) < share
    few = free.clone()
    few[[2, 7]] = few[[7, 2]]
    most = few.clone()
    most[3] = drawn(39) < (0.1 if share < 0.5 else 0.9)
    for chosen in (free, free, few, few[:4], most, drawn(12, 39) < share, ~free, drawn(5, 39) < share, free):
        r = drawn(len(chosen), 39) - 0.5
        found = kept.solve(r, chosen)
        residual = torch.where(chosen, found @ kept.M - r, found)
        rounding = 1e-13 * kept.inverse.abs().max()
        assert residual.abs().max() < rounding, "z solves the system on its free set, and is zero elsewhere"
        if learned != "nearly dependent":
            torch.testing.assert_close(found, DualSystem(D).solve(r, chosen), rtol=1e-9, atol=1e-10)


def test_the_system_of_another_operator_is_not_taken_for_this_one():
    D = operator()
    kept = DualSystem.of(D)
    assert DualSystem.of(D.clone()) is kept, "equal values"
    D[0, 0] += 1e-13
    assert DualSystem.of(D) is not kept, "changed in place"
    assert DualSystem.of(D.float()).M.dtype == torch.float32
