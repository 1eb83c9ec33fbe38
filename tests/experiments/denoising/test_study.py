"""Denoising in the harness: every backend has the same gradient, and errors name the mistake."""

import math
import sys

import pytest
import torch

from experiments.denoising.operator import STRUCTURES
from experiments.denoising.problem import differencing
from experiments.run import components, configuration, folders
from experiments.run.components import CombinationError
from experiments.run.execution import execute
from foldopt.errors import InputError, MissingDependencyError

CENTRED = ["task=denoising", "model=operator", "task.low=-3", "task.high=3", "task.noise=1"]
SMALL = [*CENTRED, "task.length=30", "task.weight=0.7", "task.n_train=64", "task.n_val=16", "task.n_test=32"]


def built(*overrides):
    torch.manual_seed(0)
    return components.build(configuration.compose([*SMALL, *overrides]))


def decisions_and_gradient(parts):
    """The gradient of a random functional of the denoised training signals with respect to a learned operator."""
    samples = parts.task.splits["train"]
    gen = torch.Generator().manual_seed(1)
    D = parts.model(samples["inputs"]).detach()
    D = (D + 0.1 * torch.randn(D.shape, generator=gen, dtype=D.dtype)).requires_grad_()
    x = parts.backend(parts.task.parameters(D, samples))
    cotangent = torch.randn(x.shape, generator=gen, dtype=x.dtype)
    (gradient,) = torch.autograd.grad(x, D, cotangent)
    return x.detach(), gradient, parts.backend.take_failures()


@pytest.mark.parametrize(
    ("backend", "error", "gradient_error"),
    [
        (["backend=fold", "backend.forward=fdpg"], 1e-4, 1e-2),
        (["backend=fold", "linear_solver=gmres"], 1e-12, 1e-7),
        (["backend=unroll", "backend.iterations=3000", "backend.tol=0.001"], 1e-7, 1e-4),
        (["backend=qpth", "backend.ridge=1e-7"], 1e-4, 1e-2),
        (["backend=cvxpylayers", "backend.solver=SCS", "+backend.solver_args={eps: 1e-10}"], 1e-6, 1e-3),
    ],
    ids=["fdpg", "gmres", "unroll", "qpth", "cvxpylayers"],
)
def test_every_backend_has_the_gradient_of_the_folded_exact_solver(backend, error, gradient_error):
    """The gradient in the shared operator is the sum over the signals; qpth without the wrapper gives the mean."""
    x, gradient, failures = decisions_and_gradient(built("backend=fold"))
    assert failures == 0
    mine, my_gradient, failures = decisions_and_gradient(built(*backend))
    assert failures == 0
    assert float((mine - x).abs().max()) < error
    assert float((my_gradient - gradient).norm() / gradient.norm()) < gradient_error


def test_a_run_lowers_the_error_of_the_classical_denoiser(tiny, console):
    """Centred signals of OptNet's length with the paper's noise, on which learning helps."""
    training = ["task.weight=0.5", "task.n_train=640", "task.n_test=200", "train.epochs=4", "train.lr=0.001"]
    cfg = tiny(*CENTRED, *training)
    assert execute(cfg, console) == 0
    frame = folders.load_metrics(folders.of(cfg))
    test = frame[frame["split"] == "test"]["mse"]
    assert test.iloc[-1] < 0.95 * test.iloc[0]
    assert "regret" not in frame, "the task has no column of that name"
    train = frame[frame["split"] == "train"]
    assert (train["solver_failures"] == 0).all()
    assert (train["zero_gradient_fraction"] == 0).all()
    assert train["samples"].tolist() == [640] * 4
    validation = frame[(frame["split"] == "val") & (frame["epoch"] > 0)]
    best = folders.load_summary(folders.of(cfg))["final"]["test_at_best_val"]
    assert best["epoch"] == validation.loc[validation["mse"].idxmin(), "epoch"]
    assert "test mse" in console.file.getvalue()


@pytest.mark.parametrize("structure", STRUCTURES)
def test_structures_start_as_the_differencing_operator_and_keep_their_shape(structure):
    model = built(f"model.structure={structure}", "model.half_width=2").model
    x = torch.zeros(1, 30)
    torch.testing.assert_close(model(x), differencing(30), rtol=0, atol=1e-15)
    gen = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.rand(parameter.shape, generator=gen, dtype=parameter.dtype))
        D = model(x)
    assert (float(D.sum(1).abs().max()) < 1e-12) == (structure != "free")
    if structure == "filter":
        count = sum(p.numel() for p in model.parameters())
        assert count == 29 + 5
        rows = D / model.log_weights.detach().exp()[:, None]
        torch.testing.assert_close(rows[10, 8:14], rows[20, 18:24])
        assert torch.equal(D[10].nonzero()[:, 0], torch.arange(8, 14)), "five taps on differences reach six entries"


def test_the_norm_of_the_operator_is_recorded(tiny, console):
    cfg = tiny(*CENTRED, "task.weight=0.5", "train.lr=0.05", "train.epochs=2")
    assert execute(cfg, console) == 0
    frame = folders.load_metrics(folders.of(cfg))
    norms = frame.loc[frame["split"] == "test", "operator_norm"].tolist()
    assert norms[0] == pytest.approx(2, rel=1e-3), "the differencing operator"
    trained = components.trained(folders.of(cfg))
    D = trained.model(trained.task.splits["test"]["inputs"]).detach()
    assert norms[-1] == pytest.approx(float(torch.linalg.matrix_norm(D, 2)))
    assert norms[-1] > norms[0] + 0.1


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(InputError, match="holds no trained model"):
        components.trained(tmp_path)


def test_backends_that_cannot_are_named():
    with pytest.raises(CombinationError, match="Backends that can: cvxpy, cvxpylayers, fold, qpth, unfold, unroll"):
        built("backend=two_stage")
    with pytest.raises(CombinationError, match="its problem is no quadratic program"):
        components.build(configuration.compose(["backend=qpth"]))


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (["task.weight=0"], "weight=0"),
        (["backend=qpth", "backend.dtype=half"], "backend.dtype='half' is unknown"),
        (["backend=qpth", "backend.ridge=0"], "backend.ridge=0: qpth needs a positive definite Q"),
        (["backend.forward=gurobi"], r"choose one of \['exact', 'fdpg'\]"),
        (["model.structure=banded"], r"choose one of \('free', 'zero_sum', 'filter'\)"),
        (["model.structure=filter", "model.half_width=-1"], "model.half_width=-1"),
        (["backend.optimizer=sqp"], r"choose auto or one of \['fdpg'\]"),
    ],
)
def test_mistakes_are_named(overrides, match):
    with pytest.raises(InputError, match=match):
        built(*overrides)


def test_missing_qpth_is_named_before_any_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "qpth.qp", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'foldopt\[qpth\]'"):
        built("backend=qpth")


def test_the_operator_is_refused_where_it_does_not_fit():
    with pytest.raises(InputError, match=r"model=operator is an operator of shape \(4, 5\)"):
        components.build(configuration.compose(["model=operator"]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=mlp"], "choose model=operator"),
        (["model=operator", "train.mse_epochs=2"], "train.mse_epochs=2"),
    ],
)
def test_what_the_task_cannot_train_is_refused(tiny, console, overrides, message):
    assert execute(tiny("task=denoising", *overrides), console) == 1
    assert message in console.file.getvalue()


def test_divergence_is_stopped_with_advice_and_keeps_what_was_measured(tiny, console):
    cfg = tiny(*CENTRED, "train.lr=1e200", "train.epochs=4")
    assert execute(cfg, console) == 1
    said = console.file.getvalue()
    for words in ("diverged in epoch 1", "and norm", "Lower train.lr", "checkpoint of epoch 0 are kept"):
        assert words in said
    assert math.isfinite(folders.load_metrics(folders.of(cfg))["mse"].dropna().iloc[0])
    assert (folders.of(cfg) / "checkpoint.pt").is_file()
