"""The paper's claims: verdicts that follow from the numbers, and the report that shows them."""

import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from rich.console import Console

from experiments.across_studies import linear_solvers
from experiments.report import page as report
from experiments.report import reproduction, verification
from experiments.report.claims import CONDITIONAL, CONFIRMED, REFUTED, UNTESTED, VERDICTS, Results, claims
from experiments.sweep import studies

CLAIMS = claims()
COMMITTED = Path(__file__).resolve().parents[3] / "results"
NEVER_RUN = "Time limits of 10 s and 120 s"


def claim(start):
    (found,) = [claim for claim in CLAIMS if claim.statement.startswith(start)]
    return found


@pytest.fixture
def copied(tmp_path):
    """A copy of the committed tables that a test can change."""
    for folder in ("tables", "figures"):
        (tmp_path / folder).mkdir()
        for path in (COMMITTED / folder).glob("*.csv"):
            shutil.copy(path, tmp_path / folder)
    return tmp_path


def change(root, name, function):
    path = root / f"{name}.csv"
    function(pd.read_csv(path)).to_csv(path, index=False)


@pytest.mark.parametrize("claim", CLAIMS, ids=[claim.statement[:40] for claim in CLAIMS])
def test_every_claim_is_judged_by_the_committed_results(claim):
    finding = claim.finding(Results(COMMITTED))
    assert finding.verdict in VERDICTS
    assert (finding.verdict == UNTESTED) == claim.statement.startswith(NEVER_RUN)
    assert finding.why.endswith(".")
    assert "nan" not in finding.measured
    targets = {*reproduction.measurements(), *(studies.load(name).target for name in studies.names()), "bench"}
    assert {command.removeprefix("make ") for command in claim.commands} <= targets


def setting(column, value, **where):
    def changed(table):
        rows = pd.Series(True, index=table.index)
        for key, wanted in where.items():
            rows &= table[key] == wanted
        assert rows.any()
        table[column] = table[column].astype(object)
        table.loc[rows, column] = value
        return table.infer_objects()

    return changed


@pytest.mark.parametrize(
    ("start", "table", "changed", "verdict"),
    [
        ("Unfolding from", "figures/figure_3", setting("high", 1e-3, start="solution"), REFUTED),
        ("The backward pass converges", "figures/figure_3", setting("mean", 1.0, start="solution"), REFUTED),
        ("The backward pass of unfolding", "tables/figure_3", setting("rate", 0.1), REFUTED),
        ("Krylov", "figures/bilinear_stepsize", setting("gmres_products", 10_000), REFUTED),
        ("Larger stepsizes", "figures/bilinear_stepsize", setting("lfpi_solved", 1.0), REFUTED),
        ("The fixed point stays", "figures/bilinear_stepsize", setting("residual", 1.0), REFUTED),
        ("Unrolling many", "figures/unrolling_cost", setting("peak_bytes", 1e6), REFUTED),
        ("f-PGDb achieves", "tables/figure_4a", setting("wins", 14, series="fold"), REFUTED),
        (
            "f-PGDb achieves",
            "tables/figure_4a",
            setting("ratio_mean", 1.5, series="two_stage_standardized"),
            CONFIRMED,
        ),
        ("Gurobi finds", "tables/bilinear_certificates", setting("gurobi_better", 0.5), REFUTED),
        ("f-FDPG computes", "tables/denoising_cost", setting("seconds_forward", 0.01), REFUTED),
        ("f-FDPG learns", "figures/figure_4b", setting("mean", 1.0), REFUTED),
        ("qpth and f-FDPG", "figures/figure_6", setting("mean", 9.0, series="qpth"), REFUTED),
        ("fold-opt is more accurate", "tables/figure_4c", setting("regret_mean", 1.0), REFUTED),
        (
            "fold-opt is more accurate",
            "tables/figure_4c_paired",
            setting("p_adjusted", 0.001, against="cvxpylayers_normalized"),
            CONFIRMED,
        ),
        (
            "cvxpy makes",
            "tables/solver_accuracy",
            setting("violated_share_percent", 0.0, solver="scs_paper"),
            REFUTED,
        ),
        ("Gurobi agrees", "tables/solver_accuracy", setting("gap_percent_max", 0.0), CONFIRMED),
        ("Gurobi solves", "tables/solver_accuracy", setting("forward_milliseconds", 1.0), REFUTED),
        (
            "The integrated approach",
            "tables/figure_4c_paired",
            lambda table: setting("difference", -1.0, against="two_stage_tuned")(
                setting("p_adjusted", 0.001, against="two_stage_tuned")(table)
            ),
            CONDITIONAL,
        ),
    ],
)
def test_verdicts_follow_from_the_numbers(copied, start, table, changed, verdict):
    assert claim(start).finding(Results(copied)).verdict != verdict
    change(copied, table, changed)
    assert claim(start).finding(Results(copied)).verdict == verdict


def test_accuracies_are_judged_against_the_noise_floor_and_stand_in_is_a_condition(copied):
    name = "figures/figure_7_stand_in"
    assert claim("Training accuracies").finding(Results(copied)).verdict == CONDITIONAL
    shutil.copy(copied / f"{name}.csv", copied / "figures/figure_7.csv")
    assert claim("Training accuracies").finding(Results(copied)).verdict == CONFIRMED, "on CIFAR-100"
    change(copied, "figures/figure_7", setting("mean", 90.0, series="sqp"))
    assert claim("Training accuracies").finding(Results(copied)).verdict == REFUTED


def test_what_was_not_made_is_untested_and_names_its_command(tmp_path):
    finding = claim("f-FDPG computes").finding(Results(tmp_path))
    assert finding.verdict == UNTESTED
    assert finding.why == "tables/denoising_cost.csv does not exist; `make denoising-cost` makes it."


def test_the_report_is_the_committed_one_and_holds_everything():
    text = report.write(Results(COMMITTED))
    assert text == (COMMITTED / "REPORT.md").read_text(), "make report"
    page = report.render(text, COMMITTED)
    sources = re.findall(r'src="([^"]{0,30})', page)
    assert len(sources) >= 9
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    for shown in CLAIMS:
        assert f"| {shown.statement} |" in text
    assert page.count('<span class="verdict') == len(CLAIMS)
    assert page.count("App. E.1") == 2, "the errata"


def test_verification_finds_a_changed_number(monkeypatch, tmp_path, capsys):
    def make(outputs):
        outputs.artifacts.csv("tables/some", pd.DataFrame({"a": [1.5]}))

    monkeypatch.setitem(sys.modules, "some_table", SimpleNamespace(make=make))
    study = dataclasses.replace(studies.load("figure_6"), outputs=("some_table",))
    monkeypatch.setattr(studies, "load", lambda name: study)
    monkeypatch.setattr(verification, "output_root", lambda profile: tmp_path)
    monkeypatch.setattr(verification.folders, "status", lambda folder: "finished")
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables/some.csv").write_text("a\n1.5\n")
    assert verification.verify(["figure_6"], "smoke", Console()) == 0
    (tmp_path / "tables/some.csv").write_text("a\n1.6\n")
    assert verification.verify(["figure_6"], "smoke", Console()) == 1
    assert "differs in tables/some.csv" in capsys.readouterr().out
    monkeypatch.setattr(verification.folders, "status", lambda folder: "missing")
    assert verification.verify(["figure_6"], "smoke", Console()) == 1
    assert "not checked, 0 of" in capsys.readouterr().out


def test_every_linear_solver_is_measured_on_a_layer_of_every_study(monkeypatch):
    monkeypatch.setattr(linear_solvers, "SOLVERS", ("direct", "lfpi", "auto"))
    rows = linear_solvers.measure(linear_solvers.PROFILES["smoke"]).set_index(["layer", "solver"])
    assert (rows.xs("auto", level="solver")["error"] < 1e-8).all()
    assert (rows.xs("auto", level="solver")["solved"] == 1).all()
    assert rows.loc[("multilabel_saturated", "lfpi"), "solved"] == 0
    assert rows.loc[("multilabel", "lfpi"), "solved"] == 1


def test_provenance_names_every_value_once(monkeypatch):
    summary = {
        **{"seconds_wall": 1800, "identity": "abcdef" * 4, "git": {"commit": "1234"}, "device": "cpu (x86_64)"},
        **{"threads": 1, "python": "3.11", "versions": {"torch": "2.15", "qpth": None}},
    }
    monkeypatch.setattr(reproduction.folders, "load_summary", lambda folder: summary)
    planned = studies.expand(studies.load("figure_6"), "smoke")
    content = json.loads(reproduction.provenance(planned))
    assert (content["runs"], content["seeds"], content["hours"]) == (8, 2, 4.0)
    assert content["commits"] == ["1234"]
    assert content["versions"] == {"qpth": ["not installed"], "torch": ["2.15"]}


def test_a_profile_without_the_runs_of_a_claim_leaves_it_untested(copied):
    change(copied, "tables/figure_4a", lambda table: table[table["series"] != "two_stage_standardized"])
    finding = claim("f-PGDb achieves").finding(Results(copied))
    assert finding.verdict == UNTESTED
    assert "two_stage_standardized" in finding.why
