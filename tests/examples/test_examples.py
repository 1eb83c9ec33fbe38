"""The examples print and draw what their pages show, and what the pages claim holds against truth without foldopt."""

import ast
import re
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch

from scripts.examples import FIGURES, SCRIPTS
from tests.docs.pages import DOCS, links
from tests.examples.pages import labels, run, text

for package in ("cvxpy", "matplotlib", "qpsolvers", "scipy"):
    pytest.importorskip(package)


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_example_is_a_page(name):
    source = SCRIPTS[name].read_text()
    assert len(source.splitlines()) < 400
    title, _, sentence = ast.get_docstring(ast.parse(source)).partition("\n\n")
    assert 5 < len(title) < 50
    assert 50 < len(sentence) < 300
    assert source.count("\n# %%\n") >= 4
    assert source.count("\n# %% [markdown]\n") >= 4
    assert (FIGURES / f"{name}.png").is_file()
    targets = links(text(name))
    assert f"../docs/assets/examples/{name}.png" in targets
    for target in targets:
        assert (SCRIPTS[name].parent / target).is_file(), f"examples/{name}.py links to {target}"


def test_the_gallery_names_each_example_once():
    named = re.findall(
        r"\w+", " ".join(re.findall("<!-- gallery: (.*?) -->", (DOCS / "examples/index.md").read_text()))
    )
    assert len(named) == len(set(named))
    assert set(named) - {"the", "others"} <= set(SCRIPTS)


@pytest.mark.slow
def test_a_script_runs_from_any_folder(tmp_path):
    command = [sys.executable, SCRIPTS["own_solver"]]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "at best" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_own_solver_finds_the_best_tolls(capsys, tmp_path):
    found, panels = run("own_solver", capsys, tmp_path)
    assert found["best"] < found["totals"][0] - 10
    assert abs(found["totals"][-1] - found["best"]) < 1e-3
    h, demand, free = 1e-6, found["busy"], found["free"]
    up, down = (found["equilibrium"](demand + side * h, free)[0] for side in (1, -1))
    assert torch.allclose(found["share"], (up - down) / (2 * h), atol=1e-7)
    assert labels(panels) == [["10", "12", "15", "20"], []]
    assert [len(panel.lines) for panel in panels] == [4 + 5 * 4, 2]


@pytest.mark.slow
def test_diagnosis_finds_each_mistake(capsys, tmp_path):
    found, panels = run("diagnose_layer", capsys, tmp_path)
    assert found["answered"] == [residual < 1e-6 for residual in found["residuals"]]
    derivatives = found["derivatives"]
    right, wrong = (np.array(derivatives(found[name]))[1::4] for name in ("right", "wrong"))
    assert np.allclose(right, found["differences"], rtol=1e-4)
    assert (wrong[1:] < 1.1 * right[1:]).all()
    assert labels(panels) == [["right layer", "detached tensor", "differences of the solver"], ["refused", "answered"]]


@pytest.mark.slow
def test_the_second_fold_predicts_how_the_penalty_moves(capsys, tmp_path):
    found, panels = run("tune_penalty", capsys, tmp_path)
    (up, down), h = found["moved"], found["h"]
    assert np.isclose(float(found["influence"] @ found["direction"][0]), (up - down) / (2 * h), rtol=1e-5)
    assert abs(float(found["influence"].sum())) < 1e-7  # weights of another total have the same best penalty
    predicted, actual = found["predicted"], found["actual"]
    small = actual.abs() < 0.1
    assert small.sum() > 20
    assert torch.allclose(predicted[small], actual[small], atol=0.01)
    losses = [found["validation_loss"](found["log_penalty"] + shift, found["even"][0]) for shift in (-0.01, 0, 0.01)]
    assert losses[1] < min(losses[0], losses[2])
    assert labels(panels) == [["all samples", "without one sample"], []]


@pytest.mark.slow
def test_decision_focused_learning_loses_less_on_every_seed(capsys, tmp_path):
    found, panels = run("decision_focused", capsys, tmp_path)
    assert np.isclose(found["slope"], found["truth"], rtol=2e-5)
    assert (found["regrets"][:, 1] < found["regrets"][:, 0]).all()
    assert (found["regrets"] > 0).all()
    assert found["less"].mean() > 2 * found["less"].std() / len(found["less"]) ** 0.5
    assert (found["errors"][:, 1] > found["errors"][:, 0]).all()
    assert (found["slopes"][:, 1] < found["slopes"][:, 0]).all()
    assert 0.5 < found["less"].min() < found["less"].max() < 3.5
    too_much = (found["sold"] - found["sold"][:, 2:])[:, :2].mean(0)
    assert too_much[0] > 0.3
    assert too_much[1].abs() < too_much[0] / 3
    assert labels(panels) == [[], ["true", "least squares", "trained on regret"]]
    assert len(panels[0].lines) == 5


@pytest.mark.slow
def test_mpc_learns_the_chain(capsys, tmp_path):
    found, panels = run("mpc", capsys, tmp_path)
    assert found["limits"] > 0
    assert found["law_error"] < 1e-9
    assert found["gradient_error"] < 1e-7
    assert np.allclose(found["learned"], [1.0, 0.2], atol=2e-3)
    assert labels(panels) == [["mass 1", "mass 2", "mass 4", "mass 6"], ["stiffness", "damping"]]


@pytest.mark.slow
def test_min_cost_flow_has_no_derivative_where_highs_finds_two_flows(capsys, tmp_path):
    found, panels = run("min_cost_flow", capsys, tmp_path)
    said = [(found["said"], True)]
    for size in ((6, 9), (10, 20)):
        generator = np.random.default_rng(0)
        N, capacity, features = found["streets"](*size, generator)
        city = (N, found["demand"](size[0] * size[1], generator), capacity)
        tie = torch.as_tensor(0.1 * generator.random(len(capacity)))
        said.append((found["answers"](features @ found["WEIGHTS"], tie, found["RIDGE"], city), False))
    for one, ties in said:
        assert (one["differ"] > 0) == ties
        assert one["costs"][0] == one["costs"][1]
        assert one["integer"]["verdict"] == ("not unique" if ties else "differentiable")
        assert one["no ties"]["verdict"] == "differentiable"
        assert one["no ties"]["gradient"] < 1e-15
        assert one["moved"] == 0
        assert one["ridge"]["verdict"] == "differentiable"
        assert one["ridge"]["gradient"] > 1e-3
    assert found["gradient_error"] < 1e-6
    assert sum(found["dearer"]["after"]) < 0.7 * sum(found["dearer"]["before"])
    assert labels(panels) == [["sends", "receives"], ["length / risk", "toll / risk"]]
    assert len(panels[0].collections[0].get_segments()) == int((found["observed"] > 0).sum())


@pytest.mark.slow
def test_lasso_path_is_optimal_at_every_knot(capsys, tmp_path):
    found, panels = run("lasso_path", capsys, tmp_path)
    assert len(found["knots"]) > 10
    for s, w in found["knots"]:
        correlation = found["X"].T @ (found["y"] - found["X"] @ w)
        assert np.abs(correlation).max() <= s * (1 + 1e-9)
        held = np.abs(w) > 1e-9
        assert np.allclose(correlation[held], s * np.sign(w[held]), rtol=1e-9)
    assert found["gap"] < 1e-10
    assert found["slope_error"] < 1e-10
    assert found["verdicts"] == {"at a knot": "kink", "inside a segment": "differentiable"}
    assert found["best"] <= found["found"] < 1.02 * found["best"]
    assert len(panels[0].lines) == found["FEATURES"]
    assert labels(panels)[1] == ["path", "every fifth step of the search", "best on the path"]


@pytest.mark.slow
def test_factor_portfolio_pays_off_on_unseen_days(capsys, tmp_path):
    found, panels = run("factor_portfolio", capsys, tmp_path)
    assert found["error"] < 1e-7
    assert np.isclose(found["slope"], found["truth"], rtol=2e-5)
    results = found["results"]
    assert results["trained"]["mse"] > results["two stages"]["mse"]
    for part in ("seen", "unseen"):
        assert 0 < results["trained"][part] < results["two stages"][part] / 7
    features, returns = (part[0] for part in found["unseen"])
    misses = [(features @ weights - returns).abs() for weights in (found["two_stage"], found["weights"])]
    top = returns.argsort(descending=True)[:20]
    assert misses[1][top].mean() < 0.6 * misses[0][top].mean()
    assert labels(panels)[0] == ["least squares", "trained on regret"]
    assert len(panels[1].patches) == 4


@pytest.mark.slow
def test_optnet_layers_are_their_closed_forms_to_second_order(capsys, tmp_path):
    found, panels = run("optnet_layers", capsys, tmp_path)
    assert (found["c"] > 0).any()
    assert (found["c"] < 0).any()
    for name in ("relu", "sigmoid", "softmax", "sparsemax"):
        assert len(found["errors"][name]) == 3
        assert max(found["errors"][name]) < 1e-12
    assert "kink" in found["raised"]
    assert found["one_sided"].last.verdict[0] == "kink"
    assert found["slopes"].tolist() in ([0, 0, 1], [0, 1, 1])
    assert [panel.get_title() for panel in panels] == ["relu", "sigmoid", "softmax", "sparsemax"]
    t = found["t"]
    for panel, exact in zip(panels[:3], (t.relu(), t.sigmoid(), (t - 1).sigmoid()), strict=False):
        assert np.allclose(panel.lines[0].get_ydata(), exact, atol=1e-9)


@pytest.mark.slow
def test_data_poisoning_raises_the_loss_as_the_gradient_predicts(capsys, tmp_path):
    found, panels = run("data_poisoning", capsys, tmp_path)
    assert found["fit_error"] < 1e-12
    assert found["gradient_error"] < 1e-7
    assert min(found["rises"]) > 0
    assert np.allclose(found["rises"], found["predicted"], rtol=0.15)
    losses, beside = found["losses"], found["beside"]
    assert losses[-1] - losses[0] > 10 * abs(beside[-1] - beside[0])
    assert labels(panels)[1] == ["along the gradient", "in random directions"]
    assert len(panels[0].collections) == 2


@pytest.mark.slow
def test_constrained_regression_gains_from_training_through_the_projection(capsys, tmp_path):
    found, panels = run("constrained_regression", capsys, tmp_path)
    assert found["error"] < 1e-12
    assert found["gradient_error"] < 1e-7
    errors = found["errors"]
    for part in (0, 1):
        assert errors["trained through P"][part] < errors["least squares, then P"][part] / 3
        assert errors["least squares, then P"][part] < errors["least squares"][part]
    assert errors["hidden W, with P"][1] < errors["trained through P"][1]
    assert len(panels[0].patches) == 8
    assert labels(panels) == [["seen", "unseen"], ["least squares", "trained through P", "true"]]


@pytest.mark.slow
def test_control_policy_learns_what_it_does_under_bounds(capsys, tmp_path):
    found, panels = run("control_policy", capsys, tmp_path)
    assert found["bounded"] > 0.3
    assert found["error"] < 1e-10
    assert np.isclose(found["slope"], found["truth"], rtol=1e-6)
    assert found["costs"][-1] < 0.95 * found["costs"][0]
    assert found["after"] < 0.95 * found["before"]
    assert labels(panels) == [[], ["Riccati matrix", "learned"]]


@pytest.mark.slow
def test_resource_allocation_converges_quadratically_to_the_best_capacities(capsys, tmp_path):
    found, panels = run("resource_allocation", capsys, tmp_path)
    assert found["error"] < 1e-12
    assert found["envelope"] < 1e-12
    assert found["hessian_error"] < 1e-7
    assert found["gaps"][0] > 1e-2
    assert any(1e-12 < later < 10 * gap**2 < 1e-3 for gap, later in pairwise(found["gaps"]))
    assert found["distance"] < 1e-9
    assert labels(panels) == [["resource 1", "resource 2", "resource 3"], []]


@pytest.mark.slow
def test_own_returns_are_judged_against_the_best_portfolios_of_cvxpy(capsys, tmp_path):
    pytest.importorskip("sklearn")
    found, panels = run("own_returns", capsys, tmp_path)
    assert len(found["returns"]) == 389
    assert not found["returns"].isna().any(axis=None)
    assert found["error"] < 1e-6
    for values in found["regret"].values():
        assert len(values) == 3
        assert all(0 < value < 0.1 for value in values)
    assert labels(panels) == [["equal weights", "two stages", "folding"], ["two stages", "folding"]]
