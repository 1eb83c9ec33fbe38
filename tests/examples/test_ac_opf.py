"""AC optimal power flow, against published optima, the solver of pypower and differences."""

import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.slow

pytest.importorskip("cyipopt", reason="the extra ipopt is not installed")
pytest.importorskip("pypower", reason="the extra power is not installed")
pyplot = pytest.importorskip("matplotlib.pyplot")
SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "ac_opf.py"
PUBLISHED = {"case57": 41737.79, "case118": 129660.69}  # $/h, by MATPOWER


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """The variables of the script at its end, after a small run, and the folder of its tables."""
    import runpy

    folder = tmp_path_factory.mktemp("tables")
    options = ["--cases", "case57", "case118", "--days", "6", "--steps", "2", "--tables"]
    arguments, sys.argv = sys.argv, [str(SCRIPT), *options, str(folder)]
    pyplot.switch_backend("agg")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = runpy.run_path(str(SCRIPT), run_name="__main__")
    finally:
        sys.argv = arguments
    return found | {"folder": folder, "figure": pyplot.gcf()}


def test_costs_are_the_published_ones_and_derivatives_those_of_differences(example):
    for row in example["compared_rows"]:
        assert row["cost"] == pytest.approx(PUBLISHED[row["case"]], abs=0.01)
        assert row["pypower"] == pytest.approx(row["cost"], rel=1e-8)
        assert row["error: price"] < 1e-6
        assert row["error: dispatch"] < 1e-6
        assert row["error: cost"] < 1e-6
        assert row["backward (s)"] < row["forward (s)"]
    assert example["slope_error"] < 1e-6


def test_a_limit_of_a_branch_moves_the_prices_apart_as_pypower_says(example):
    import pypower.api

    grid, load = example["small"], example["small"].load.clone().requires_grad_()
    tight = {f"PDIPM_{key}": 1e-9 for key in ("FEASTOL", "GRADTOL", "COMPTOL", "COSTTOL")}
    peer = pypower.api.runopf(grid.case, pypower.api.ppoption(VERBOSE=0, OUT_ALL=0, **tight))
    x = grid.layer(start=grid.flat_start, solver="ipopt", sparsity=True)(load)
    (price,) = torch.autograd.grad(grid.objective(x, load).sum(), load)
    price = price[0, : grid.buses].numpy() / grid.base
    assert np.ptp(price) > 5
    np.testing.assert_allclose(price, peer["bus"][:, 13], rtol=1e-6)
    p_f, q_f, p_t, q_t = (grid.base * flow[0, 0] for flow in grid.flows(x.detach()))
    assert max(p_f.hypot(q_f).item(), p_t.hypot(q_t).item()) == pytest.approx(100, abs=1e-6)


def test_the_gradient_of_the_cost_of_redispatch_is_that_of_differences(example):
    features, load = example["draw"](4, torch.ones(len(example["served"])).double(), torch.Generator().manual_seed(5))
    forecast = (1.03 * load.roll(1, 0)).requires_grad_()
    (gradient,) = torch.autograd.grad(example["cost"](forecast, load).sum(), forecast)
    change = torch.randn(load.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64) * 0.1
    ahead, behind = (example["cost"](forecast.detach() + h * change, load).sum() for h in (1e-5, -1e-5))
    assert float((gradient * change).sum()) == pytest.approx(float(ahead - behind) / 2e-5, rel=1e-5)
    assert features.shape == (4, 3)


def test_a_perfect_forecast_has_no_regret_and_training_lowers_it(example):
    load = example["active"][example["served"]].expand(2, -1) * torch.tensor([[0.9], [1.1]])
    least = example["small"].objective(example["dispatch"](example["everywhere"](load)), None)
    torch.testing.assert_close(example["cost"](load, load), least, rtol=1e-9, atol=1e-6)
    assert (example["cost"](1.1 * load, load) > least + 1).all()
    (row,) = example["seeds"]
    assert 0 < row["trained on the regret"] < row["least squares"]


def test_the_figure_and_the_tables_are_complete(example):
    left, right = example["figure"].axes
    assert len(left.lines) == 5 + 4 * 5
    np.testing.assert_allclose(right.lines[0].get_ydata(), right.lines[1].get_ydata(), rtol=1e-6)
    assert len(right.lines[0].get_ydata()) == 118
    text = (example["folder"] / "ac_opf.md").read_text()
    assert "| case118 | 344 | 129660.69 | 129660.69 |" in text
    assert "against least squares" in (example["folder"] / "ac_opf_forecasts.md").read_text()
