import pytest
import torch

from experiments.portfolio.problem import PortfolioProblem
from experiments.portfolio.tables import solver_accuracy
from experiments.portfolio.tables.solver_accuracy import Settings, compare, summarize
from experiments.report.artifacts import Artifacts
from experiments.report.outputs import Measurement
from foldopt.errors import InputError

pytestmark = pytest.mark.slow


def test_errors_are_relative_to_the_exact_layer():
    problem = PortfolioProblem(torch.eye(2), 0.9)
    c = torch.tensor([[1.0, 0.0], [1.0, 2.0]], dtype=torch.float64)
    layers = {
        "rough": lambda c: torch.stack([1.0 + 0.1 * c[:, 0], 0 * c[:, 0]], 1),
        "exact": lambda c: torch.stack([0.5 + 0.2 * c[:, 0], 0.5 - 0.2 * c[:, 0]], 1),
    }
    rows = compare(problem, layers, [c], [torch.ones_like(c) * torch.tensor([2.0, 1.0], dtype=c.dtype)])
    rough = rows[rows["solver"] == "rough"]
    assert rough["gap"].tolist() == pytest.approx([abs(1.1 - 0.7) / 0.7, abs(1.1 - 1.3) / 1.3])
    assert rough["violation"].tolist() == pytest.approx([1.1**2 / 0.9 - 1] * 2)
    assert rough["gradient_error"].tolist() == pytest.approx([0.0, 0.0]), "2 * 0.1 = 2 * 0.2 - 0.2"
    exact = rows[rows["solver"] == "exact"]
    assert (exact[["gap", "gradient_error"]] == 0).all(axis=None)
    assert (rows[["seconds_forward", "seconds_backward"]] > 0).all(axis=None)


def test_the_measurement_shows_what_scaling_does():
    rows = solver_accuracy.measure(Settings(degrees=(3,), batches=1, batch_size=6))
    table = summarize(rows, ["solver"]).set_index("solver")
    assert set(table.index) == set(solver_accuracy.TITLES)
    assert (table["failures"] == 0).all()
    assert table.loc["scs_paper", "violation_percent_max"] > 50
    assert table.loc["scs_normalized", "violation_percent_max"] < 1
    assert table.loc["scs_paper_tight", "violation_percent_max"] < 1
    assert table.loc["clarabel_normalized", "gradient_error_median"] < 1e-2
    assert table.loc["gurobi", "gradient_error_median"] < 1e-2


def test_an_unknown_profile_lists_the_choices(tmp_path):
    with pytest.raises(InputError, match="profile='huge' does not exist; choose one of smoke, default, paper"):
        solver_accuracy.make(Measurement("solver-table", "huge", Artifacts(tmp_path)))
