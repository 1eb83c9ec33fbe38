"""Each backend's decisions and gradients against the folded exact solver, and combinations that cannot be."""

import sys

import pytest
import torch

from experiments.run import components, configuration
from experiments.run.components import CombinationError
from foldopt.errors import InputError, MissingDependencyError

SMALL = ["task.n_train=96", "task.n_val=8", "task.n_test=8"]


def built(*overrides):
    torch.manual_seed(0)
    return components.build(configuration.compose([*SMALL, *overrides]))


def decisions_and_gradient(parts, c, cotangent):
    leaf = c.clone().requires_grad_()
    x = parts.backend(leaf)
    return x.detach(), torch.autograd.grad(x, leaf, cotangent)[0], parts.backend.take_failures()


@pytest.fixture(scope="module", params=["targets", "predictions"])
def reference(request):
    """Instances with a clearly determined active set, and what folding the exact solver gives for them."""
    parts = built("backend=fold")
    samples = parts.task.splits["train"]
    with torch.no_grad():
        c = (
            samples["returns"]
            if request.param == "targets"
            else parts.task.parameters(parts.model(samples["inputs"]), samples)
        )
    s = parts.task.problem.exact(c)
    margin = torch.where(s.x > 0, s.x, s.lam[:, 1:] / c.std(1, keepdim=True)).amin(1)
    c = c[(margin > 3e-3) & (s.lam[:, 0] > 0.03 * c.std(1)) & ((s.x > 0).sum(1) > 2)]
    assert len(c) >= 20
    cotangent = torch.randn(c.shape, generator=torch.Generator().manual_seed(0), dtype=c.dtype)
    x, gradient, _ = decisions_and_gradient(parts, c, cotangent)
    return c, cotangent, x, gradient


def compared(reference, *overrides):
    c, cotangent, x, gradient = reference
    mine, my_gradient, failures = decisions_and_gradient(built(*overrides), c, cotangent)
    assert failures == 0
    return (mine - x).abs().amax(1), (my_gradient - gradient).norm(dim=1) / gradient.norm(dim=1), mine


def test_cvxpylayers_normalized_with_clarabel_agrees(reference):
    errors, gradient_errors, _ = compared(reference, "backend=cvxpylayers")
    assert errors.max() < 1e-3
    assert gradient_errors.median() < 1e-3
    assert gradient_errors.quantile(0.95) < 1e-2, "single samples whose active set it misjudges may be far off"


def test_cvxpylayers_normalized_with_a_tight_clarabel_agrees_everywhere(reference):
    tight = "+backend.solver_args={tol_gap_rel: 1e-12, tol_gap_abs: 1e-12, tol_feas: 1e-12}"
    errors, gradient_errors, _ = compared(reference, "backend=cvxpylayers", tight)
    assert errors.max() < 1e-4
    assert gradient_errors.max() < 5e-3


def test_cvxpylayers_normalized_with_a_tight_scs_has_the_same_gradient(reference):
    tight = "+backend.solver_args={eps: 1e-9, max_iters: 100000}"
    errors, gradient_errors, _ = compared(reference, "backend=cvxpylayers", "backend.solver=SCS", tight)
    assert errors.max() < 1e-5
    assert gradient_errors.max() < 1e-3


def test_cvxpylayers_as_in_the_paper_violates_the_risk_limit_and_its_gradient_is_wrong(reference):
    """V is about 1e-6, and SCS takes a violation of that size for solved."""
    errors, gradient_errors, x = compared(
        reference, "backend=cvxpylayers", "backend.scaling=paper", "backend.solver=SCS"
    )
    assert built("backend=fold").task.problem.violation(x)["risk"].median() > 0.5
    assert errors.median() > 0.1
    assert gradient_errors.median() > 0.5


@pytest.mark.parametrize("solver", ["CLARABEL", "SCS"])
def test_cvxpy_agrees_to_rounding(reference, solver):
    errors, gradient_errors, _ = compared(reference, "backend=cvxpy", f"backend.solver={solver}")
    assert errors.max() < 1e-9
    assert gradient_errors.max() < 1e-8


def test_cvxpy_solves_the_portfolio_as_the_paper_writes_it_and_says_that_its_gradient_is_no_good(reference):
    """The cone of a risk limit of 1e-6 is so thin that the derivative depends on the last digits."""
    c, cotangent, x, _ = reference
    backend, leaf = built("backend=cvxpy", "backend.scaling=paper").backend, c.clone().requires_grad_()
    mine = backend(leaf)
    torch.autograd.grad(mine, leaf, cotangent)
    solved = backend.layer.last.solved
    assert solved.float().mean() > 0.5
    assert (mine - x)[solved].abs().max() < 1e-6
    assert "differentiable" not in backend.layer.last.verdict


def test_folding_gurobi_agrees(reference):
    errors, gradient_errors, _ = compared(reference, "backend=fold", "backend.forward=gurobi")
    assert errors.max() < 1e-3
    assert gradient_errors.median() < 1e-3
    assert gradient_errors.max() < 2e-2


def test_unrolling_enough_iterations_agrees(reference):
    errors, gradient_errors, _ = compared(reference, "backend=unroll", "backend.iterations=40")
    assert errors.max() < 1e-9
    assert gradient_errors.max() < 1e-6


def test_unrolling_too_few_iterations_counts_as_failed():
    parts = built("backend=unroll", "backend.iterations=2")
    c = parts.task.splits["train"]["returns"]
    _, gradient, failures = decisions_and_gradient(parts, c, torch.ones_like(c))
    assert failures == len(c)
    assert (gradient == 0).all()


def test_failures_of_cvxpylayers_are_counted_and_leave_the_rest():
    parts = built("backend=cvxpylayers", "backend.solver=SCS")
    import diffcp

    c = parts.task.splits["train"]["returns"][:4]
    solve, calls = parts.backend._layer._solve, []

    def failing(rows):
        calls.append(len(rows))
        if any(torch.equal(row, c[2]) for row in rows.detach()):
            raise diffcp.SolverError("deliberate")
        return solve(rows)

    parts.backend._layer._solve = failing
    x, gradient, failures = decisions_and_gradient(parts, c, torch.randn_like(c))
    assert calls == [4, 1, 1, 1, 1]
    assert failures == 1
    assert x[2].isnan().all()
    assert x[[0, 1, 3]].isfinite().all()
    assert (gradient[2] == 0).all()
    assert gradient[0].any()


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "cvxpylayers.torch", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'foldopt\[cvxpylayers\]'"):
        built("backend=cvxpylayers")


NO_CONVEX_FORM = """
import torch

from experiments.contracts.problem import Problem
from experiments.contracts.task import Task

class NonconvexTask(Task):
    n_inputs, n_outputs = 2, 3
    objective, columns = "regret", ("regret",)

    def __init__(self, seed):
        self.problem = Problem()
        self.splits = {split: {"inputs": torch.zeros(1, 2)} for split in ("train", "val", "test")}

    def parameters(self, outputs, samples):
        return outputs

    def decision_losses(self, decisions, samples):
        return decisions

    def metrics(self, outputs, samples):
        return {"regret": 0.0}
"""


def test_an_impossible_combination_says_why_and_what_is_possible(tmp_path, monkeypatch):
    (tmp_path / "nonconvex_task.py").write_text(NO_CONVEX_FORM)
    monkeypatch.syspath_prepend(tmp_path)
    cfg = configuration.compose(["backend=cvxpylayers"])
    cfg.task = {"_target_": "nonconvex_task.NonconvexTask", "name": "nonconvex"}
    with pytest.raises(CombinationError) as caught:
        components.build(cfg)
    assert str(caught.value) == (
        "backend=cvxpylayers cannot do task=nonconvex: its problem has no convex form that cvxpy could take. "
        "Backends that can: none."
    )
    monkeypatch.setattr(sys.modules["nonconvex_task"].NonconvexTask, "prediction_losses", None, raising=False)
    with pytest.raises(CombinationError, match="Backends that can: two_stage"):
        components.build(cfg)


def test_a_configuration_without_a_target_is_named():
    cfg = configuration.compose([])
    cfg.model = {"name": "mine"}
    with pytest.raises(InputError, match="model: its configuration has no _target_"):
        components.build(cfg)


CENTRED = ["task=denoising", "model=operator", "task.weight=2", "task.low=-3", "task.high=3", "task.noise=1"]


@pytest.mark.parametrize(
    ("task", "backend"),
    [
        (CENTRED, ["backend=fold", "backend.forward=fdpg", "backend.tol=1e9"]),
        (["task=portfolio"], ["backend=cvxpylayers", "backend.solver=SCS"]),
        (["task=portfolio"], ["backend=cvxpylayers", "backend.solver=CLARABEL"]),
    ],
    ids=["fdpg", "scs", "clarabel"],
)
def test_the_looser_the_forward_solver_the_further_is_it_from_the_solution(task, backend):
    exact = built(*task, "backend=fold")
    samples = exact.task.splits["train"]
    given = exact.task.parameters(exact.model(samples["inputs"]).detach(), samples)
    errors = []
    for tol in (1e-1, 1e-3, 1e-8):
        with torch.no_grad():
            x = built(*task, *backend, f"backend.forward_tol={tol}").backend(given)
        errors.append(float((x - exact.backend(given)).norm()))
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["backend=fold", "backend.forward_tol=1e-3"], "backend.forward='exact' takes no tolerance"),
        (["backend=fold", "backend.forward=gurobi", "backend.forward_tol=1e-3"], "takes no tolerance for this task"),
        (["backend=unfold", "backend.forward_tol=-1"], "backend.forward_tol"),
        (["backend=cvxpylayers", "backend.forward_tol=0"], "backend.forward_tol"),
        (["backend=cvxpylayers", "backend.forward_tol=small"], "backend.forward_tol"),
    ],
)
def test_a_tolerance_that_cannot_be_is_refused(overrides, message):
    with pytest.raises(InputError, match=message):
        built(*overrides)
