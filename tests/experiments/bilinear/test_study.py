"""The bilinear program in the harness: backends, columns, SPO+, errors, figure and tables."""

import json

import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf

from experiments.bilinear.figures import figure_4a
from experiments.bilinear.figures import stepsize as bilinear_stepsize
from experiments.bilinear.tables import certificates as bilinear_certificates
from experiments.bilinear.tables import regret as bilinear_regret
from experiments.bilinear.tables import smoothing_strength
from experiments.report.artifacts import Artifacts
from experiments.report.outputs import StudyOutputs
from experiments.run import components, configuration, folders
from experiments.run.components import CombinationError
from experiments.run.execution import execute
from experiments.sweep import studies
from experiments.sweep.metrics import MissingRunsError
from experiments.sweep.studies import StudyRun
from foldopt.errors import InputError

pytestmark = pytest.mark.slow

SMALL = ["task=bilinear", "task.n_variables=8", "task.n_train=40", "task.n_val=8", "task.n_test=8"]


def built(*overrides):
    torch.manual_seed(0)
    return components.build(configuration.compose([*SMALL, *overrides]))


def decisions_and_gradient(parts):
    samples = parts.task.splits["train"]
    leaf = samples["targets"].clone().requires_grad_()
    z = parts.backend(parts.task.parameters(leaf, samples))
    cotangent = torch.randn(z.shape, generator=torch.Generator().manual_seed(1), dtype=z.dtype)
    return z.detach(), torch.autograd.grad(z, leaf, cotangent)[0], parts.backend.take_failures()


@pytest.mark.parametrize(
    "backend",
    [
        ["backend=fold", "backend.optimizer=pgd_b"],
        ["backend=fold", "linear_solver=lfpi"],
        ["backend=unfold", "backend.iterations=1000"],
        ["backend=unroll", "backend.iterations=3000"],
    ],
    ids=["pgd_b", "lfpi", "unfold", "unroll"],
)
def test_every_backend_has_the_gradient_of_the_folded_solver(backend):
    """The program is convex, so that projected gradient from the centre reaches the same optimum."""
    z, gradient, failures = decisions_and_gradient(built("backend=fold", "task.kappa=1.5"))
    mine, my_gradient, my_failures = decisions_and_gradient(built(*backend, "task.kappa=1.5"))
    assert failures == my_failures == 0
    torch.testing.assert_close(mine, z, rtol=0, atol=1e-6)
    assert float((my_gradient - gradient).norm() / gradient.norm()) < 1e-6


def test_unfolding_works_for_the_other_tasks():
    for task in (["task=portfolio"], ["task=denoising", "model=operator", "task.low=-3", "task.high=3"]):
        cfg = [*task, "task.n_train=8", "task.n_val=2", "task.n_test=2", "backend=unfold", "backend.iterations=2"]
        parts = components.build(configuration.compose(cfg))
        samples = parts.task.splits["train"]
        assert parts.backend(parts.task.parameters(parts.model(samples["inputs"]), samples)).isfinite().all()


def test_spo_plus_is_its_definition_bounds_the_regret_and_has_its_subgradient():
    """Convexity, the bound and the subgradient inequality hold on 40 samples with random predictions."""
    parts = built("backend=spo_plus")
    task, samples = parts.task, parts.task.splits["train"]
    truth, gen = task.truth(samples), torch.Generator().manual_seed(0)
    t = samples["targets"]
    first, second = (t + 3 * torch.randn(t.shape, generator=gen, dtype=t.dtype) for _ in range(2))
    leaf = first.clone().requires_grad_()
    losses = parts.backend.losses(leaf.chunk(2, 1), truth)
    (subgradient,) = torch.autograd.grad(losses.sum(), leaf)
    problem = task.problem
    vertices = problem.decide(*(2 * first - t).chunk(2, 1)), problem.decide(*truth)
    torch.testing.assert_close(subgradient, 2 * (vertices[0] - vertices[1]))
    regret = samples["optimal"] - problem.value(problem.decide(*first.chunk(2, 1)), *truth)
    assert (losses >= regret - 1e-9).all()
    other = parts.backend.losses(second.chunk(2, 1), truth)
    assert (other >= losses.detach() + (subgradient * (second - first)).sum(1) - 1e-9).all()
    assert float(parts.backend.losses(truth, truth).abs().max()) < 1e-9


def test_a_portfolio_learns_through_spo_plus(tiny, console):
    cfg = tiny("backend=spo_plus")
    assert execute(cfg, console) == 0
    frame = folders.load_metrics(folders.of(cfg))
    test = frame[frame["split"] == "test"]["regret"]
    assert test.iloc[-1] < test.iloc[0]


@pytest.mark.parametrize("smoothing", ["quadratic", "entropy"])
def test_a_run_learns_and_records_what_is_tracked(tiny, console, smoothing):
    cfg = tiny("task=bilinear", "task.n_train=320", f"task.smoothing={smoothing}", "task.kappa=0.9")
    assert execute(cfg, console) == 0
    frame = folders.load_metrics(folders.of(cfg))
    test, train = frame[frame["split"] == "test"], frame[frame["split"] == "train"]
    assert test["regret"].iloc[-1] < 0.9 * test["regret"].iloc[0]
    assert (test["prediction_scale"] > 0).all()
    assert train["spectral_radius"].between(0, 1, inclusive="neither").all()
    assert train["global_fraction"].between(0, 1).all()
    assert (train["adjoint_products"] == 1).all()
    assert (train["solver_timeouts"] == 0).all()
    assert (train["solver_failures"] == 0).all()


def test_without_smoothing_nothing_is_learned(tiny, console):
    cfg = tiny("task=bilinear", "task.kappa=0")
    assert execute(cfg, console) == 0
    frame = folders.load_metrics(folders.of(cfg))
    assert (frame[frame["split"] == "train"]["zero_gradient_fraction"] == 1).all()
    assert frame[frame["split"] == "test"]["regret"].nunique() == 1


def test_cvxpylayers_and_qpth_refuse_with_the_reason():
    for backend, reason in (
        ("cvxpylayers", "cvxpy takes convex programs only"),
        ("qpth", "quadratic program nonconvex"),
    ):
        with pytest.raises(CombinationError, match=reason) as caught:
            built(f"backend={backend}")
        assert "fold, pyepo, spo_plus, two_stage, unfold, unroll" in str(caught.value)


@pytest.mark.parametrize(
    ("override", "match"),
    [
        ("task.interaction=15", "interaction=15: there are 15 matrices Q; choose one of 0..14"),
        ("task.n_variables=1", "n_variables=1"),
        ("task.p=8", "p=8 leaves no choice"),
        ("backend.optimizer=sqp", r"choose auto or one of \['pgd', 'pgd_b', 'block'\]"),
        ("backend.forward=fdpg", r"choose one of \['exact', 'gurobi'\]"),
    ],
)
def test_mistakes_are_named(override, match):
    with pytest.raises(InputError, match=match):
        built(override)


def test_data_and_matrix_have_seeds_of_their_own():
    a, b, c = built(), built("task.interaction=1"), built("seed=1")
    assert torch.equal(a.task.splits["train"]["targets"], b.task.splits["train"]["targets"])
    assert not torch.equal(a.task.problem.Q, b.task.problem.Q)
    assert torch.equal(a.task.problem.Q, c.task.problem.Q)


def run_of(folder, series, n, q, seed, regret, kappa=0.9):
    config = OmegaConf.create(
        {
            "task": {"n_train": 8, "n_val": 4, "n_test": 4, "p": 1, "q": 2},
            "train": {"lr": 0.01, "batch_size": 32, "epochs": 2},
        }
    )
    point = {"task.n_variables": n, "task.interaction": q, "task.kappa": kappa}
    path = folder / f"{series}-{n}-{q}-{seed}-{kappa}"
    path.mkdir(parents=True)
    rows = [
        {
            "epoch": epoch,
            "split": split,
            "regret": regret + 2 - epoch,
            "zero_gradient_fraction": 0.0,
            "spectral_radius": 0.5,
            "global_fraction": 1.0,
            "solver_failures": 0,
            "prediction_scale": 2.0,
            "seconds_epoch": 0.1,
        }
        for epoch in (1, 2)
        for split in ("train", "val", "test")
    ]
    pd.DataFrame(rows).to_csv(path / "metrics.csv", index=False)
    (path / "summary.json").write_text(json.dumps({"status": "finished"}))
    return StudyRun("figure_4a", series, path.name, point, seed, (), config, path)


def test_figure_and_table_of_known_runs(tmp_path):
    study = studies.load("figure_4a")
    planned = [
        run_of(tmp_path / "runs", series, 20, q, seed, regret + q + seed)
        for series, regret in (("two_stage", 3.0), ("fold", 1.0))
        for q in (0, 1)
        for seed in (0, 1)
    ]
    outputs = StudyOutputs(study, planned, "default", Artifacts(tmp_path))
    for maker in (figure_4a.make, bilinear_regret.make):
        maker(outputs)
    lines = (tmp_path / "tables" / "figure_4a.md").read_text().splitlines()
    assert lines[2].startswith("| 20 | two-stage, as in the paper | 4.00 ± 0.71 | 1.00 |  |")
    assert lines[3].startswith("| 20 | f-PGD, nonconvex, κ = 0.9 | 2.00 ± 0.71 | 0.49 | 2 of 2 |")
    assert len(pd.read_csv(tmp_path / "figures" / "figure_4a.csv")) == 4
    (planned[0].folder / "summary.json").unlink()
    with pytest.raises(MissingRunsError, match="two_stage-20-0-0"):
        figure_4a.make(outputs)


def test_kappa_is_chosen_on_validation_within_each_kind(tmp_path):
    study = studies.load("bilinear_kappa")
    planned = [
        run_of(tmp_path / "runs", series, 20, 0, 0, abs(kappa - best), kappa)
        for series, best in (("fold", 0.9), ("fold_entropy", 1.25))
        for kappa in (0.5, 0.9, 1.25, 2.0)
    ]
    smoothing_strength.make(StudyOutputs(study, planned, "default", Artifacts(tmp_path)))
    table = pd.read_csv(tmp_path / "tables" / "bilinear_kappa.csv")
    chosen = table[table["chosen"]].set_index("kind")["kappa"].to_dict()
    assert chosen == {"quadratic, nonconvex": 0.9, "quadratic, convex": 1.25, "entropy": 1.25}


def test_the_figures_kappas_are_those_chosen_in_the_committed_table():
    table = pd.read_csv(configuration.ROOT / "results" / "tables" / "bilinear_kappa.csv")
    chosen = table[table["chosen"]].set_index(["n_variables", "kind"])["kappa"].to_dict()
    used = {}
    for run in studies.expand(studies.load("figure_4a")):
        task = run.config.task
        if run.config.backend.name == "fold" and task.kappa:
            kind = "entropy" if task.smoothing == "entropy" else f"quadratic, {'' if task.kappa >= 1 else 'non'}convex"
            used.setdefault((task.n_variables, kind), set()).add(task.kappa)
    assert used == {place: {kappa} for place, kappa in chosen.items()}


@pytest.mark.parametrize("profile", ["default", "paper"])
def test_the_study_is_the_papers_protocol(profile):
    """All matrices at n = 50; at n = 20, which is not in the paper, only some in the default profile."""
    expanded = studies.expand(studies.load("figure_4a"), profile)
    main = [run for run in expanded if run.series in figure_4a.PAIR]
    for n in (20, 50):
        for series in figure_4a.PAIR:
            matrices = {
                run.point["task.interaction"]
                for run in main
                if (run.series, run.point["task.n_variables"]) == (series, n)
            }
            assert matrices == (set(range(15)) if n == 50 or profile == "paper" else {3, 4, 5, 6})
    for run in main:
        train, task = run.config.train, run.config.task
        assert (train.epochs, train.lr, train.batch_size, task.p, task.q) == (5, 0.01, 32, 1, 2)
        assert (task.n_train + task.n_val, task.n_test, task.n_features) == (900, 100, 10)


def test_the_stepsize_changes_the_work_and_lfpi_diverges_where_the_radius_is_above_one():
    table = bilinear_stepsize.measure((0.25, 1.0, 10.0))
    assert (table["residual"] < 1e-9).all()
    assert (table["lfpi_solved"] == 1).tolist() == (table["spectral_radius"] < 1).tolist() == [True, True, False]
    assert table["lfpi_products"][0] > 3 * table["lfpi_products"][1]
    assert (table["gmres_products"] <= 40).all()
    assert len(bilinear_stepsize.draw(table, "make figure-4a").axes) == 2


def test_certificates_judge_by_the_bound_and_by_the_better_value():
    columns = ["n", "kappa", "ours", "gurobi", "bound", "timed_out", "seconds_ours", "seconds_gurobi"]
    values = [(2.0, 2.0, 2.0), (2.0, 1.5, 3.0), (2.0, 2.5, 2.5), (2.0, 2.0, 2.0001)]
    rows = pd.DataFrame([(6, 0.5, *v, False, 0.001, 0.1) for v in values], columns=columns)
    (found,) = bilinear_certificates.summarize(rows).to_dict("records")
    assert found["proven"] == 0.5
    assert found["gurobi_better"] == 0.25
    assert found["ours_better"] == 0.25


def test_certificates_of_instances_of_the_study():
    pytest.importorskip("gurobipy")
    settings = bilinear_certificates.Settings(((6, 0.5), (20, 2.0)), instances=3, time_limit=20.0)
    table = bilinear_certificates.summarize(bilinear_certificates.measure(settings))
    assert (table["proven"] == 1).all()
    assert (table["timed_out"] == 0).all()
