"""The examples at a small size; their numbers are compared with truth that foldopt has no part in."""

import importlib
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow

pytest.importorskip("qpsolvers")
pytest.importorskip("scipy")
pytest.importorskip("cvxpy")
ROOT = Path(__file__).resolve().parents[2]
NAMES = (
    "constrained_regression",
    "control_policy",
    "data_poisoning",
    "factor_portfolio",
    "lasso_path",
    "min_cost_flow",
    "mpc",
    "optnet_layers",
    "own_returns",
    "resource_allocation",
)


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_short_and_found_from_any_folder(name, tmp_path):
    path = ROOT / "examples" / f"{name}.py"
    assert len(path.read_text().splitlines()) <= 120
    done = subprocess.run([sys.executable, path, "--help"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "usage" in done.stdout


def run(name, *size, **options):
    return importlib.import_module(f"examples.{name}").main(*size, **options)


def test_mpc_learns_the_chain():
    found = run("mpc", horizon=15)
    assert found["limits"] > 0
    assert found["law_error"] < 1e-8
    assert found["gradient_error"] < 1e-7
    assert np.allclose(found["learned"], [1.0, 0.2], atol=2e-3)


@pytest.mark.parametrize(("size", "ties"), [((6, 9), False), ((10, 20), False), ((20, 20), True)])
def test_min_cost_flow_has_no_derivative_where_highs_finds_two_flows(size, ties):
    found = run("min_cost_flow", *size, steps=25 if ties else 1)
    assert (found["differ"] > 0) == ties
    assert found["costs"][0] == found["costs"][1]
    assert found["integer"]["verdict"] == ("not unique" if ties else "differentiable")
    assert found["no ties"]["verdict"] == "differentiable"
    assert found["no ties"]["gradient"] < 1e-15
    assert found["moved"] == 0
    assert found["ridge"]["verdict"] == "differentiable"
    assert found["ridge"]["gradient"] > 1e-3
    assert found["gradient_error"] < 1e-6
    assert not ties or sum(found["after"]) < 0.7 * sum(found["before"])


def test_lasso_path_is_optimal_at_every_knot():
    found = run("lasso_path", features=120)
    assert len(found["knots"]) > 10
    for s, w in found["knots"]:
        correlation = found["X"].T @ (found["y"] - found["X"] @ w)
        assert np.abs(correlation).max() <= s * (1 + 1e-9)
        held = np.abs(w) > 1e-9
        assert np.allclose(correlation[held], s * np.sign(w[held]), rtol=1e-9)
    assert found["gap"] < 1e-10
    assert found["slope_error"] < 1e-10
    assert found["verdicts"] == {"knot": "kink", "inside": "differentiable"}
    assert found["best"] <= found["found"] < 1.02 * found["best"]


def test_factor_portfolio_pays_off_on_unseen_days():
    found = run("factor_portfolio", assets=200, days=4)
    assert found["error"] < 1e-7
    assert found["gradient_error"] < 1e-5
    assert found["trained"]["mse"] > found["two stages"]["mse"]
    for part in ("seen", "unseen"):
        assert 0 < found["trained"][part] < 0.8 * found["two stages"][part]


def test_optnet_layers_are_their_closed_forms_to_second_order():
    found = run("optnet_layers", n=5)
    assert (found["c"] > 0).any()
    assert (found["c"] < 0).any()
    for name in ("relu", "sigmoid", "softmax", "sparsemax"):
        assert len(found[name]) == 3
        assert max(found[name]) < 1e-12
    assert found["kink"]["raises"]
    assert found["kink"]["verdict"] == "kink"
    assert found["kink"]["slopes"] in ([0, 0, 1], [0, 1, 1])


def test_data_poisoning_raises_the_loss_as_the_gradient_predicts():
    found = run("data_poisoning", n=12, steps=6)
    assert found["fit_error"] < 1e-10
    assert found["gradient_error"] < 1e-6
    assert min(found["rises"]) > 0
    assert np.allclose(found["rises"], found["predicted"], rtol=0.15)
    assert found["poisoned"] - found["clean"] > 3 * abs(found["control"] - found["clean"])


def test_constrained_regression_gains_from_training_through_the_projection():
    found = run("constrained_regression", outputs=5, inputs=8, steps=30)
    assert found["error"] < 1e-10
    assert found["gradient_error"] < 1e-6
    hidden, trained = found["the hidden W, with P"], found["trained through P"]
    for part in ("seen", "unseen"):
        assert trained[part] < 0.8 * found["least squares, then P"][part]
        assert found["least squares, then P"][part] < found["least squares"][part]
    assert hidden["unseen"] < trained["unseen"]


def test_control_policy_learns_what_it_does_under_bounds():
    found = run("control_policy", horizon=10, batch=8, steps=12)
    assert found["bounded"] > 0.3
    assert found["error"] < 1e-10
    assert np.isclose(found["slope"], found["truth"], rtol=1e-6)
    assert found["costs"][-1] < 0.98 * found["costs"][0]
    assert found["after"] < found["before"]


def test_resource_allocation_converges_quadratically_to_the_best_capacities():
    found = run("resource_allocation", activities=4)
    assert found["error"] < 1e-10
    assert found["envelope"] < 1e-10
    assert found["hessian_error"] < 1e-7
    assert found["gaps"][0] > 1e-2
    assert any(1e-12 < later < 10 * gap**2 < 1e-3 for gap, later in pairwise(found["gaps"]))
    assert found["distance"] < 1e-9


def test_own_returns_are_judged_against_the_best_portfolios_of_cvxpy():
    pytest.importorskip("sklearn")
    found = run("own_returns", folds=2, epochs=2)
    assert len(found["returns"]) == 389
    assert not found["returns"].isna().any(axis=None)
    assert found["error"] < 1e-6
    for values in found["regret"].values():
        assert len(values) == 2
        assert all(0 < value < 0.1 for value in values)
