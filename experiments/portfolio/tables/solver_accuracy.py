"""Accuracy and speed of the portfolio solvers: errors of solutions and gradients, and time per instance.

The solvers get true returns ("targets") and predictions of an untrained network, for all degrees. The reference is the
exact solver with the folded SQP gradient at its solution. All numbers except the times are deterministic.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import pandas as pd
import torch

from experiments.portfolio.problem import PortfolioProblem
from experiments.portfolio.task import PortfolioTask
from experiments.report.measurements import measured_once, seconds
from experiments.report.outputs import Measurement
from experiments.run import components
from experiments.run.configuration import compose

Layer = Callable[[torch.Tensor], torch.Tensor]
REFERENCE = "exact"
TITLES = {
    "exact": "exact (f-SQP)",
    "gurobi": "Gurobi (f-SQP)",
    "scs_paper": "cvxpylayers, SCS, as in the paper",
    "scs_paper_tight": "cvxpylayers, SCS with eps 1e-9, as in the paper",
    "scs_normalized": "cvxpylayers, SCS, normalized",
    "clarabel_paper": "cvxpylayers, Clarabel, as in the paper",
    "clarabel_normalized": "cvxpylayers, Clarabel, normalized",
}
OVERRIDES: Mapping[str, list[str]] = {
    "exact": ["backend=fold", "backend.forward=exact"],
    "gurobi": ["backend=fold", "backend.forward=gurobi"],
    "scs_paper": ["backend=cvxpylayers", "backend.scaling=paper", "backend.solver=SCS"],
    "scs_paper_tight": [
        "backend=cvxpylayers",
        "backend.scaling=paper",
        "backend.solver=SCS",
        "+backend.solver_args={eps: 1e-9, max_iters: 100000}",
    ],
    "scs_normalized": ["backend=cvxpylayers", "backend.scaling=normalized", "backend.solver=SCS"],
    "clarabel_paper": ["backend=cvxpylayers", "backend.scaling=paper", "backend.solver=CLARABEL"],
    "clarabel_normalized": ["backend=cvxpylayers", "backend.scaling=normalized", "backend.solver=CLARABEL"],
}
KINDS = {"targets": "true returns", "predictions": "untrained network"}
HEADER = (
    "Input",
    "Solver",
    "Instances",
    "Objective gap (%), mean / max",
    "Risk limit exceeded by (%), max",
    "Exceeded by > 1%",
    "Gradient error, median / max",
    "Forward (ms)",
    "Backward (ms)",
    "Failures",
)


@dataclass(frozen=True)
class Settings:
    """Size of the measurement: `batches` batches of `batch_size` instances for each degree and kind of input."""

    degrees: tuple[int, ...] = (1, 2, 3)
    batches: int = 2
    batch_size: int = 32
    seed: int = 0


PROFILES = {"smoke": Settings(batches=1), "default": Settings(), "paper": Settings(batches=8)}


def compare(
    problem: PortfolioProblem,
    layers: Mapping[str, Layer],
    batches: list[torch.Tensor],
    cotangents: list[torch.Tensor],
) -> pd.DataFrame:
    """Compare layers with the reference `layers[REFERENCE]`, instance by instance.

    Args:
        problem: The problem, for values and violations.
        layers: Layers from returns (B, n) to portfolios (B, n), by name.
        batches: Returns, (B, n) each.
        cotangents: The cotangent of the vjp of each batch, (B, n).

    Returns:
        One row per layer and instance with the columns solver; instance; gap, |value - exact value| / |exact value|;
        violation, (x'Vx / gamma - 1)+; gradient_error, |vjp - exact vjp| / |exact vjp|, NaN where the exact vjp is zero
        (a vertex); failed; seconds_forward and seconds_backward, those of the batch divided by its size.
    """
    frames, exact = [], {}
    for name in sorted(layers, key=lambda key: key != REFERENCE):
        _timed(layers[name], batches[0], cotangents[0])
        for number, (c, cotangent) in enumerate(zip(batches, cotangents, strict=True)):
            x, vjp, forward, backward = _timed(layers[name], c, cotangent)
            if name == REFERENCE:
                exact[number] = (x, vjp)
            x_exact, vjp_exact = exact[number]
            value, scale = problem.value(x_exact, c), vjp_exact.norm(dim=1)
            error = (vjp - vjp_exact).norm(dim=1) / scale
            frames.append(
                pd.DataFrame(
                    {
                        "solver": name,
                        "instance": range(number * len(c), (number + 1) * len(c)),
                        "gap": ((problem.value(x, c) - value).abs() / value.abs()).numpy(),
                        "violation": problem.violation(x)["risk"].numpy(),
                        "gradient_error": error.where(scale > 1e-9 * scale.max(), torch.nan).numpy(),
                        "failed": (~x.isfinite().all(dim=1)).numpy(),
                        "seconds_forward": forward / len(c),
                        "seconds_backward": backward / len(c),
                    }
                )
            )
    return pd.concat(frames, ignore_index=True)


def _timed(layer: Layer, c: torch.Tensor, cotangent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    leaf = c.clone().requires_grad_()
    x, forward = seconds(lambda: layer(leaf))
    (vjp,), backward = seconds(lambda: torch.autograd.grad(x, leaf, cotangent))
    return x.detach(), vjp, forward, backward


def measure(settings: Settings) -> pd.DataFrame:
    """Return the rows of `compare` for every degree and kind of input, on one thread."""
    torch.set_num_threads(1)
    frames = []
    for degree in settings.degrees:
        overrides = ["task=portfolio", f"task.degree={degree}", f"seed={settings.seed}"]
        problem, inputs = _inputs(overrides, settings)
        layers = {
            name: components.build(compose([*overrides, *backend])).backend for name, backend in OVERRIDES.items()
        }
        for kind, c in inputs.items():
            generator = torch.Generator().manual_seed(settings.seed)
            cotangents = torch.randn(c.shape, generator=generator, dtype=c.dtype)
            split = (list(c.split(settings.batch_size)), list(cotangents.split(settings.batch_size)))
            frames.append(compare(problem, layers, *split).assign(degree=degree, kind=kind))
    return pd.concat(frames, ignore_index=True)


def _inputs(overrides: list[str], settings: Settings) -> tuple[PortfolioProblem, dict[str, torch.Tensor]]:
    """Return the problem, and the returns of each kind in `KINDS` for the same training samples."""
    torch.manual_seed(settings.seed)
    parts = components.build(compose(overrides))
    samples = parts.task.splits["train"]
    with torch.no_grad():
        predictions = parts.task.parameters(parts.model(samples["inputs"]), samples)
    count = settings.batches * settings.batch_size
    return cast(PortfolioTask, parts.task).problem, {
        "targets": samples["returns"][:count],
        "predictions": predictions[:count],
    }


def summarize(rows: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Aggregate the rows of `compare` by the columns `by`; gaps are in percent, times in milliseconds per instance."""
    table = rows.groupby(by, sort=False).agg(
        instances=("instance", "size"),
        gap_percent_mean=("gap", lambda gap: 100 * gap.mean()),
        gap_percent_max=("gap", lambda gap: 100 * gap.max()),
        violation_percent_max=("violation", lambda violation: 100 * violation.max()),
        violated_share_percent=("violation", lambda violation: 100 * (violation > 0.01).mean()),
        gradient_error_median=("gradient_error", "median"),
        gradient_error_max=("gradient_error", "max"),
        forward_milliseconds=("seconds_forward", lambda seconds: 1e3 * seconds.median()),
        backward_milliseconds=("seconds_backward", lambda seconds: 1e3 * seconds.median()),
        failures=("failed", "sum"),
    )
    return table.reset_index()


def make(measurement: Measurement) -> None:
    """Write tables/solver_accuracy.csv and .md; the measurement is kept, so that a second call does not repeat it."""
    settings = measurement.settings(PROFILES)
    rows = measured_once("portfolio/solver_accuracy", settings, measure, OVERRIDES)
    measurement.artifacts.csv("tables/solver_accuracy", summarize(rows, ["solver", "kind", "degree"]))
    measurement.artifacts.markdown(
        "tables/solver_accuracy",
        HEADER,
        [_markdown_row(row) for row in summarize(rows, ["kind", "solver"]).to_dict("records")],
        f"Degrees {', '.join(map(str, settings.degrees))}, batches of {settings.batch_size}, one thread, "
        f"milliseconds per instance. Errors are relative to the exact solver. Made by: `{measurement.command}`",
    )


def _markdown_row(row: Mapping[Hashable, Any]) -> list[str]:
    return [
        KINDS[row["kind"]],
        TITLES[row["solver"]],
        str(row["instances"]),
        f"{row['gap_percent_mean']:.2g} / {row['gap_percent_max']:.2g}",
        f"{row['violation_percent_max']:.2g}",
        f"{row['violated_share_percent']:.0f}%",
        f"{row['gradient_error_median']:.1g} / {row['gradient_error_max']:.1g}",
        f"{row['forward_milliseconds']:.3f}",
        f"{row['backward_milliseconds']:.3f}",
        str(row["failures"]),
    ]
