"""Every bad value of a configuration stops with an error that names it and the remedy, before anything is written."""

import functools
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from experiments.run import configuration
from experiments.run.execution import execute
from experiments.run.spelling import misspelt

ROOT = Path(__file__).resolve().parents[3]
NAN, INF = float("nan"), float("inf")
SMALL = {
    "portfolio": "task.n_train=8 task.n_val=2 task.n_test=2",
    "bilinear": "task=bilinear task.n_train=8 task.n_val=2 task.n_test=2 task.n_variables=4",
    "denoising": "task=denoising model=operator task.n_train=8 task.n_val=2 task.n_test=2 task.length=8 "
    "task.max_segments=3",
    "multilabel": "task=multilabel task.data=stand_in model=densenet model.depth=10 model.growth=2 optimizer=sgd "
    "task.n_train=8 task.n_val=2 task.n_test=2",
}
WHOLE, NUMBER, ABOVE, BOOLEAN = (
    "expected a whole number",
    "expected a number",
    "expected a number above 0",
    "expected true or false",
)


def rows():
    """(task, further choices, key, value, what the error says)."""
    say = []

    def add(task, choices, key, *values_and_message):
        *values, message = values_and_message
        say.extend((task, choices, key, value, message) for value in values)

    add("portfolio", "", "seed", -1, 1.5, "one", True, None, WHOLE)
    add("portfolio", "", "seed", 2**70, "take one below")
    add("portfolio", "", "threads", 0, 2.5, "all", WHOLE)
    add("portfolio", "", "device", "tpu9", "meta", "cuda:x", "choose auto, cpu, cuda or cuda:<number>")
    add("portfolio", "", "device", "cuda:99", "use device=auto")
    add("portfolio", "", "device", 0, "expected text")
    add("portfolio", "", "progress", "yes", 1, BOOLEAN)
    add("portfolio", "", "paths.runs", None, "expected text")
    for key in ("epochs", "batch_size"):
        add("portfolio", "", f"train.{key}", 0, -3, 2.5, "many", WHOLE)
    add("portfolio", "", "train.mse_epochs", -1, "two", WHOLE)
    for key in ("lr", "loss_scale"):
        add("portfolio", "", f"train.{key}", 0, -1.0, NAN, INF, "fast", ABOVE)
    add("portfolio", "", "train.schedule", "linear", None, "choose one of ('constant', 'cosine')")
    add("portfolio", "", "tracking.mode", "sometimes", "choose one of ('offline', 'online', 'disabled')")
    for key in ("init_timeout", "finish_timeout"):
        add("portfolio", "", f"tracking.{key}", 0, -5, "long", ABOVE)
    add("portfolio", "", "tracking.project", 5, None, "expected text")
    for key in ("entity", "group", "job_type"):
        add("portfolio", "", f"tracking.{key}", 5, "expected text or null")
    add("portfolio", "", "tracking.tags", "one", "expected a list of texts")
    add("portfolio", "", "tracking.tags", [""], ["x" * 65], "takes tags of 1 to 64 characters")
    for key in ("degree", "n_train", "n_val", "n_test", "n_assets", "n_features"):
        add("portfolio", "", f"task.{key}", 0, 2.5, f"{key}=")
    add("portfolio", "", "task.tau", 0, NAN, "small", "tau=")
    add("portfolio", "", "task.standardize", "no", 1, BOOLEAN)
    add("portfolio", "", "task.colour", "red", "its keys are: degree")
    add("portfolio", "", "task.degre", 2, "degre: did you mean degree?")
    add("portfolio", "", "task._target_", "experiments.nowhere.Task", "cannot be imported")
    add("portfolio", "", "task._target_", "", "has no _target_")
    add("portfolio", "", "model.layers", 0, "deep", WHOLE)
    add("portfolio", "", "model.width", 0, WHOLE)
    add("portfolio", "", "model.batch_norm", "maybe", BOOLEAN)
    add("portfolio", "", "model.depth", 4, "its keys are: layers, width, batch_norm")
    add("portfolio", "", "backend.optimizer", "pgd_a", "choose auto or one of ['sqp']")
    add("portfolio", "", "backend.forward", "mosek", "choose one of ['exact', 'gurobi']")
    add("portfolio", "", "backend.tol", 0, -1.0, "expected a number above 0")
    add("portfolio", "", "backend.tol", NAN, "tight", NUMBER)
    add("portfolio", "", "backend.on_failure", "explode", "choose one of")
    add("portfolio", "backend=unroll", "backend.iterations", 0, 1.5, WHOLE)
    add("portfolio", "backend=unfold", "backend.iterations", -1, WHOLE)
    add("portfolio", "backend=unroll", "backend.tol", 0, "expected a number above 0")
    add("portfolio", "backend=cvxpylayers", "backend.solver", "ECOS", "is unknown")
    add("portfolio", "backend=cvxpylayers", "backend.scaling", "big", "scaling='big' is unknown")
    for solver in ("gmres", "bicgstab", "lfpi", "anderson"):
        add("portfolio", f"linear_solver={solver}", "linear_solver.max_iter", 0, "at least one iteration")
    add("portfolio", "linear_solver=gmres", "linear_solver.tol", 0, 1, -1e-3, "take a number in (0, 1)")
    add("portfolio", "linear_solver=anderson", "linear_solver.memory", 0, "at least one earlier iterate")
    add("portfolio", "linear_solver=least_squares", "linear_solver.cutoff", 2.0, "take a number in (0, 1)")
    add("portfolio", "linear_solver=gmres", "linear_solver.restarts", 5, "restarts: did you mean restart?")
    add("portfolio", "optimizer=sgd", "optimizer.momentum", -1.0, "Invalid momentum value")
    add("portfolio", "optimizer=sgd", "optimizer.weight_decay", -1.0, "Invalid weight_decay value")
    add("portfolio", "optimizer=sgd", "optimizer.momentum", 0.0, "Nesterov momentum requires")
    add("portfolio", "model=mlp_bn", "train.batch_size", 1, "take at least 2")
    add("bilinear", "", "task.interaction", 15, -1, "interaction=")
    add("bilinear", "", "task.n_variables", 1, WHOLE)
    add("bilinear", "", "task.p", 0, 4, "p=")
    add("bilinear", "", "task.q", 9, "choose a smaller q")
    add("bilinear", "", "task.kappa", -1.0, "at least 0")
    add("bilinear", "", "task.kappa", NAN, INF, NUMBER)
    add("bilinear", "", "task.smoothing", "cubic", "choose one of")
    add("bilinear", "", "task.stepsize", 0, 2.0, "stepsize=")
    add("bilinear", "", "task.starts", 0, WHOLE)
    add("bilinear", "", "task.time_limit", 0, ABOVE)
    add("bilinear", "", "task.hidden", 0, WHOLE)
    add("denoising", "", "task.weight", 0, -1.0, "positive number")
    add("denoising", "", "task.length", 1, "length=")
    add("denoising", "", "task.max_segments", 0, 20, "max_segments=")
    add("denoising", "", "task.low", 200.0, "take low below high")
    add("denoising", "", "task.high", INF, NUMBER)
    add("denoising", "", "task.noise", -1.0, ABOVE)
    add("denoising", "", "model.structure", "dense", "choose one of")
    add("denoising", "", "model.half_width", -1, WHOLE)
    add("denoising", "", "train.mse_epochs", 1, "no prediction error to train on; take 0")
    add("denoising", "backend=qpth", "backend.dtype", "float16", "choose one of")
    add("denoising", "backend=qpth", "backend.ridge", 0, "take a number above 0")
    add("denoising", "backend=qpth", "backend.eps", -1.0, ABOVE)
    add("denoising", "backend=qpth", "backend.max_iter", 0, WHOLE)
    add("multilabel", "", "task.data", "imagenet", "choose one of")
    add("multilabel", "", "task.noise", 1.5, "take a number in [0, 1]")
    add("multilabel", "", "task.groups", "colours", "choose one of")
    add("multilabel", "", "task.k", 0, 100, "k=")
    add("multilabel", "", "task.temperature", 0, ABOVE)
    add("multilabel", "", "task.augment", "some", BOOLEAN)
    add("multilabel", "", "task.stepsize", -1.0, ABOVE)
    add("multilabel", "", "model.depth", 11, "22, 40 or 100")
    add("multilabel", "", "model.growth", 0, WHOLE)
    add("multilabel", "", "model.amp", 2, BOOLEAN)
    add("multilabel", "", "model.perturbation", -1.0, "at least 0")
    return say


COMBINATIONS = [
    ("bilinear", "backend=cvxpylayers", "cvxpy takes convex programs only. Backends that can"),
    ("bilinear", "backend=qpth", "cannot do task=bilinear"),
    ("bilinear", "backend=exact", "cannot do task=bilinear"),
    ("denoising", "backend=two_stage", "predicts nothing that could be compared with data"),
    ("denoising", "backend=spo_plus", "cannot do task=denoising"),
    ("denoising", "model=mlp", "choose model=operator"),
    ("portfolio", "backend=qpth", "cannot do task=portfolio"),
    ("portfolio", "backend=exact", "cannot do task=portfolio"),
    ("portfolio", "model=operator", "choose model=mlp"),
    ("portfolio", "model=densenet", "model=densenet does not fit task=portfolio"),
    ("multilabel", "backend=qpth", "backend=fold backend.optimizer=pgd_a"),
    ("multilabel", "model=operator", "choose model=mlp"),
]


@functools.cache
def composed(task, choices):
    return configuration.compose([*SMALL[task].split(), "tracking.mode=disabled", "device=cpu", *choices.split()])


def refused(cfg, console, tmp_path):
    """Execute, and return what was said by a run that left nothing behind."""
    if cfg.paths.runs is not None:
        cfg.paths.runs = str(tmp_path)
    assert execute(cfg, console) == 1
    assert list(tmp_path.iterdir()) == [], "stopped before any work"
    said = console.file.getvalue()
    assert said.startswith("error: ")
    assert "Traceback" not in said
    return said


@pytest.mark.parametrize(("task", "choices", "key", "value", "message"), rows())
def test_a_bad_value_is_named_with_the_remedy(tmp_path, console, task, choices, key, value, message):
    cfg = composed(task, choices).copy()
    OmegaConf.update(cfg, key, value, force_add=True)
    said = refused(cfg, console, tmp_path)
    assert message in said
    assert key.rpartition(".")[2] in said


def test_the_table_is_long_enough():
    assert len(rows()) + len(COMBINATIONS) >= 100


@pytest.mark.parametrize(("task", "choices", "message"), COMBINATIONS)
def test_an_impossible_combination_is_named_with_what_is_possible(tmp_path, console, task, choices, message):
    kept = [part for part in SMALL[task].split() if not ("model=" in choices and part.startswith("model"))]
    cfg = configuration.compose([*kept, "tracking.mode=disabled", "device=cpu", *choices.split()])
    assert message in refused(cfg, console, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("seeed=1", "seeed: the configuration has no key 'seeed'; did you mean seed?"),
        ("bakend=fold", "did you mean backend?"),
        ("task.degre=2", "task=portfolio has no key 'degre'; did you mean degree?"),
        ("task=denoising task.degree=2", "task=denoising has no key 'degree'; there are"),
        ("train.learning_rate=0.1", "train has no key 'learning_rate'"),
        ("train.epoch=3", "did you mean epochs?"),
        ("trian.epochs=3", "trian.epochs: there is no such key; did you mean train.epochs?"),
        ("backend=unroll,unfold backend.iteration=3", "did you mean iterations?"),
        ("linear_solver=gmres linear_solver.maxiter=3", "did you mean max_iter?"),
        ("traking.mode=disabled", "did you mean tracking.mode?"),
        ("path.runs=here", "did you mean paths.runs?"),
        ("optimizer=sgd optimizer.moment=0.5", "did you mean momentum?"),
    ],
)
def test_a_misspelt_key_gets_a_suggestion(arguments, message):
    assert message in misspelt(arguments.split())


@pytest.mark.parametrize(
    "arguments",
    [
        "task=denoising task.weight=2 -m seed=0,1",
        "+task.new=1 ~tracking",
        "hydra.sweep.dir=here hydra/launcher=basic",
        "backend=cvxpylayers backend.solver_args.eps=1e-8",
        "backend=nonsense backend.optimizer=sqp",
        "--config-dir elsewhere task=mine task.samples=3",
        "--help",
    ],
)
def test_what_is_spelt_well_or_hydras_to_judge_passes(arguments):
    assert misspelt(arguments.split()) is None


def test_run_py_refuses_a_misspelt_key(tmp_path):
    command = [sys.executable, str(ROOT / "run.py"), "train.epoch=3", f"paths.runs={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: train.epoch: train has no key 'epoch'; did you mean epochs?\n"
    assert list(tmp_path.iterdir()) == []
