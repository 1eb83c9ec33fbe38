"""PyEPO's losses on the problems of the harness: the same numbers as PyEPO's own models, and runs that resume."""

import pytest
import torch

from experiments.backends.pyepo import LOSSES
from experiments.run import components, execution, folders
from experiments.run.configuration import compose
from experiments.run.execution import execute
from foldopt.errors import InputError

pyepo = pytest.importorskip("pyepo", reason="needs the package pyepo")

SMALL = ["task.n_train=12", "task.n_val=2", "task.n_test=2"]
SHORTEST = ["task=linear_program", "model=linear", "task.rows=3", "task.columns=3", *SMALL]


def own_model():
    """PyEPO's own class for a program, with a solver of its own: dynamic programming on the grid of SHORTEST."""
    import numpy as np
    from pyepo import EPO
    from pyepo.model.opt import optModel

    from experiments.linear_program import polytope

    A, b = (t.numpy() for t in (polytope.shortest_path(3, 3).A, polytope.shortest_path(3, 3).b))
    corners = [x for x in np.array(np.meshgrid(*[[0.0, 1.0]] * 12)).reshape(12, -1).T if np.allclose(A @ x, b)]

    class Paths(optModel):
        modelSense = EPO.MINIMIZE  # noqa: N815

        def _getModel(self):  # noqa: N802
            return None, range(12)

        def setObj(self, c):  # noqa: N802
            self.costs = np.asarray(c)

        def solve(self):
            best = min(corners, key=lambda x: x @ self.costs)
            return best, float(best @ self.costs)

    return Paths()


@pytest.mark.parametrize("loss", [name for name in LOSSES if name not in ("rfyl", "rfwo")])
def test_losses_and_gradients_are_those_of_pyepos_own_model(loss):
    parts = components.build(compose([*SHORTEST, "backend=pyepo", f"backend.loss={loss}", "backend.lambd=2"]))
    task, samples, backend = parts.task, parts.task.splits["train"], parts.backend
    truth = task.truth(samples)
    predicted = truth + 0.5 * torch.randn(truth.shape, generator=torch.Generator().manual_seed(3), dtype=truth.dtype)
    kind, model = LOSSES[loss], own_model()
    given = {"n_samples": 10, "sigma": 1.0, "lambd": 2.0}
    options = {name: given[name] for name in kind.settings}
    dataset = pyepo.data.dataset.optDataset(model, samples["inputs"].numpy(), truth.numpy())
    if kind.pooled:
        options["dataset"] = dataset
    if kind.takes:
        options["reduction"] = "none"
    own = getattr(pyepo.func, kind.name)(model, **options)
    generators = {"cpu": torch.Generator().manual_seed(135 * 1_000_003)}
    for owner in (own, getattr(own, "distribution", None)):
        if hasattr(owner, "_gen_cache"):
            owner._gen_cache = generators
    w = torch.randn(truth.shape, generator=torch.Generator().manual_seed(4), dtype=truth.dtype)

    def answer(call):
        leaf = predicted.clone().requires_grad_()
        value = call(leaf)
        (gradient,) = torch.autograd.grad((value if value.dim() == 1 else value * w).sum(), leaf)
        return value.detach(), gradient

    known = {"costs": truth, "solution": dataset.sols.double(), "value": dataset.objs.double()}
    if kind.takes:
        expected = answer(lambda c: own(c, *(known[name] for name in kind.takes)))
        found = answer(lambda c: backend.losses(c, truth))
    else:
        expected, found = answer(own), answer(backend)
    assert float(expected[1].abs().max()) > 0
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_the_part_of_the_value_that_is_not_predicted_has_a_known_cost():
    """A bilinear program: the coordinate of x'Qy, whose cost is 1 whatever is predicted."""
    parts = components.build(compose(["task=bilinear", "task.n_variables=4", *SMALL, "backend=pyepo"]))
    oracle, task = parts.backend.oracle, parts.task
    truth = task.truth(task.splits["train"])
    solution = oracle.of_decisions(task.problem.decide(*truth))
    x, y, rest = solution[:, :4], solution[:, 4:8], solution[:, 8]
    torch.testing.assert_close(rest, torch.einsum("bi,ij,bj->b", x, task.problem.Q, y))
    torch.testing.assert_close(torch.cat([x, y], 1), task.problem.decide(*truth))
    assert oracle.has_rest
    assert list(oracle.c_pred_index) == list(range(8))


@pytest.mark.parametrize("loss", ["pfyl", "nce", "aimle"])
def test_a_run_that_was_stopped_goes_on_with_the_same_numbers(tiny, console, untimed, tmp_path, monkeypatch, loss):
    """Stopped in the second epoch: random numbers, the pool and adapted numbers are those of the whole run."""
    settings = [*SHORTEST, "backend=pyepo", f"backend.loss={loss}", "train.batch_size=4", "backend.solve_ratio=0.7"]
    whole = tiny(*settings, f"paths.runs={tmp_path / 'whole'}")
    assert execute(whole, console) == 0
    stopped = tiny(*settings, f"paths.runs={tmp_path / 'stopped'}")
    calls, step = [0], execution.Trainer._step

    def counted(self, *args):
        calls[0] += 1
        if calls[0] == 5:
            raise KeyboardInterrupt
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(execution.Trainer, "_step", counted)
        with pytest.raises(KeyboardInterrupt):
            execute(stopped, console)
    assert execute(stopped, console) == 0
    assert untimed(folders.of(stopped)).equals(untimed(folders.of(whole)))


@pytest.mark.parametrize(
    ("override", "match"),
    [
        ("backend.loss=spo", "choose one of spo_plus, pg"),
        ("backend.n_samples=0", "backend.n_samples=0"),
        ("backend.sigma=0", "backend.sigma=0"),
        ("backend.lambd=-1", "backend.lambd=-1"),
        ("backend.solve_ratio=2", "a number from 0 to 1"),
    ],
)
def test_bad_settings_are_named(override, match):
    with pytest.raises(InputError, match=match):
        components.build(compose([*SHORTEST, "backend=pyepo", override]))
