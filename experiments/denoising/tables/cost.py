"""What a layer of the denoising study costs and how exact it is: time, peak memory and errors of every backend.

Measured on one batch of training signals for each lambda and reading of the study, with a D as it is after some
training: differences plus noise. Errors are relative, of the worst signal for x, and of the gradient of the training
loss with respect to D, against the exact solver and its folded gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count

import pandas as pd
import torch
from torch import Tensor

from experiments.contracts.task import Samples
from experiments.denoising.problem import DenoisingStep
from experiments.denoising.tables.mse import READINGS
from experiments.report.artifacts import Artifacts, output_root
from experiments.report.measurements import LAST_BITS, measured_once, peak_memory, seconds, settings_of
from experiments.run import components, configuration
from experiments.run.components import Components
from experiments.sweep import studies
from foldopt import fold

Layer = Callable[[Tensor], Tensor]
STUDY = "figure_4b"
REFERENCE = "fold"
TITLES = {
    "fold": "f-FDPG, exact forward",
    "fold_warm": "f-FDPG, exact forward, warm started",
    "fold_fdpg": "f-FDPG, FDPG forward",
    "unroll": "FDPG unrolled, 300 iterations",
    "qpth": "qpth",
    "qpth_float32": "qpth in float32",
    "cvxpylayers": "cvxpylayers (Clarabel)",
}
OVERRIDES: Mapping[str, list[str]] = {
    "fold": ["backend=fold"],
    "fold_fdpg": ["backend=fold", "backend.forward=fdpg"],
    "unroll": ["backend=unroll", "backend.iterations=300", "backend.tol=1e6"],
    "qpth": ["backend=qpth"],
    "qpth_float32": ["backend=qpth", "backend.dtype=float32", "backend.ridge=1e-4", "backend.eps=1e-6"],
    "cvxpylayers": ["backend=cvxpylayers"],
}
SLOW = ("cvxpylayers",)


@dataclass(frozen=True)
class Settings:
    """How much is measured; profile: whose readings and lambdas. learned: deviation of the noise on D."""

    profile: str
    repeats: int = 2
    batch_size: int = 32
    learned: float = 0.02
    seed: int = 0


PROFILES = {"smoke": Settings("smoke", repeats=1), "default": Settings("default"), "paper": Settings("paper", 9)}


class Bench:
    """One batch of a data set, a D, and the layers to measure on them."""

    def __init__(self, overrides: list[str], settings: Settings) -> None:
        self.place = [part for part in overrides if not part.startswith("backend")]
        parts = self.built("fold")
        self.task = parts.task
        self.samples: Samples = {k: v[: settings.batch_size] for k, v in parts.task.splits["train"].items()}
        start = parts.model(self.samples["inputs"]).detach()
        generator = torch.Generator().manual_seed(settings.seed)
        noise = torch.randn(start.shape, generator=generator, dtype=start.dtype)
        self.D = start + settings.learned * noise
        self.before = start
        self.turn = count()

    def built(self, name: str) -> Components:
        """Build the parts of a run with the backend that OVERRIDES names."""
        return components.build(configuration.compose([*self.place, *OVERRIDES[name]]))

    def layer(self, name: str) -> Layer:
        """Return the layer from D to the denoised signals."""
        if name == "fold_warm":
            return self._warm()
        parts = self.built(name)
        return lambda D: parts.backend(parts.task.parameters(D, self.samples))

    def _warm(self) -> Layer:
        """Return folding around the exact solver, started at the duals of the D before the noise."""
        problem, d = self.task.problem, self.samples["noisy"]
        memory = problem.exact(self.before, d).w
        folded = fold(lambda D, d, _: problem.exact(D, d, warm=memory).w, DenoisingStep(), dtype=torch.float64)

        def layer(D: Tensor) -> Tensor:
            params = problem.params((D, d))
            return problem.decisions(folded(*params), *params)

        return layer

    def loss(self, x: Tensor) -> Tensor:
        """Return the training loss of denoised signals."""
        return self.task.decision_losses(x, self.samples).mean()

    def call(self, layer: Layer) -> tuple[Tensor, Tensor, float, float]:
        """Return x, the gradient with respect to D, and the seconds of forward and backward."""
        leaf = (self.D * (1 + next(self.turn) * LAST_BITS)).requires_grad_()
        x, forward = seconds(lambda: layer(leaf))
        loss = self.loss(x)
        (gradient,), backward = seconds(lambda: torch.autograd.grad(loss, leaf))
        return x.detach(), gradient, forward, backward

    def errors(self, x: Tensor, gradient: Tensor, exact: tuple[Tensor, Tensor]) -> dict[str, float]:
        """Return the relative errors of x and of the gradient against the exact ones."""
        x_exact, g_exact = exact
        return {
            "error_x": float(((x - x_exact).norm(dim=1) / x_exact.norm(dim=1)).max()),
            "error_gradient": float((gradient - g_exact).norm() / g_exact.norm()),
        }


def measure(settings: Settings) -> pd.DataFrame:
    """Return one row per reading, lambda, backend and repetition, the backends taking turns."""
    rows = []
    for run in _places(settings):
        bench = Bench(list(run.overrides), settings)
        layers = {name: bench.layer(name) for name in TITLES}
        exact = bench.call(layers[REFERENCE])[:2]
        for layer in layers.values():
            bench.call(layer)
        memory: dict[str, int] = {}
        for repeat in range(settings.repeats):
            for name, layer in layers.items():
                if repeat and name in SLOW:
                    continue
                if not repeat:
                    (x, gradient, forward, backward), memory[name] = peak_memory(partial(bench.call, layer))
                else:
                    x, gradient, forward, backward = bench.call(layer)
                rows.append(
                    {
                        "reading": run.series,
                        "weight": run.point["task.weight"],
                        "backend": name,
                        "seconds_forward": forward,
                        "seconds_backward": backward,
                        "peak_bytes": memory[name],
                        **bench.errors(x, gradient, exact),
                    }
                )
    return pd.DataFrame(rows)


def _places(settings: Settings) -> list[studies.StudyRun]:
    """Return one run per reading and lambda of the study."""
    planned = studies.expand(studies.load(STUDY), settings.profile, set(READINGS))
    return [run for run in planned if run.seed == settings.seed]


def summarize(rows: pd.DataFrame) -> pd.DataFrame:
    """Return medians over repetitions, one row per reading, lambda and backend.

    ratio: how many times as long as folding around the exact solver, forward and backward together.
    """
    keys = ["reading", "weight", "backend"]
    table = rows.groupby(keys, sort=False).median().reset_index()
    total = table["seconds_forward"] + table["seconds_backward"]
    reference = table[table["backend"] == REFERENCE].assign(reference=total)[[*keys[:2], "reference"]]
    table["ratio"] = (total / table.merge(reference, on=keys[:2])["reference"]).to_numpy()
    return table


def make(profile: str, command: str) -> Artifacts:
    """Write tables/denoising_cost.csv and .md and denoising_ratios.md, measuring once per profile."""
    settings = settings_of(PROFILES, profile)
    places = [run.overrides for run in _places(settings)]
    table = summarize(measured_once("denoising/cost", settings, measure, OVERRIDES, places))
    artifacts = Artifacts(output_root(profile))
    artifacts.csv("tables/denoising_cost", table)
    note = (
        f"One batch of {settings.batch_size} signals, one thread, float64 but where it says float32, medians of "
        f"{settings.repeats} (cvxpylayers: 1) with the backends taking turns; D is the differencing operator plus "
        f"noise of {settings.learned}. Errors are relative, against the exact solver. Made by: `{command}`"
    )
    artifacts.markdown(
        "tables/denoising_cost",
        ("Backend", "Forward (ms)", "Backward (ms)", "Peak memory (MB)", "Error of x*", "Error of the gradient"),
        _cost_rows(table),
        f"Smallest and largest over the readings and λ of Figure 4(b). {note}",
    )
    artifacts.markdown(
        "tables/denoising_ratios",
        ("Data", "λ", "f-FDPG (ms)", "qpth (ms)", "Ratio", "Ratio, float32", "Ratio, cvxpylayers"),
        _ratio_rows(table),
        f"Forward and backward together; ratios to f-FDPG around the exact solver. {note}",
    )
    return artifacts


def _cost_rows(table: pd.DataFrame) -> Iterator[list[str]]:
    for name, title in TITLES.items():
        part = table[table["backend"] == name]
        yield [
            title,
            _range(1e3 * part["seconds_forward"]),
            _range(1e3 * part["seconds_backward"]),
            _range(part["peak_bytes"] / 1e6),
            _range(part["error_x"], ".0e"),
            _range(part["error_gradient"], ".0e"),
        ]


def _range(values: pd.Series, form: str = ".3g") -> str:
    low, high = f"{values.min():{form}}", f"{values.max():{form}}"
    return low if low == high else f"{low} – {high}"


def _ratio_rows(table: pd.DataFrame) -> Iterator[list[str]]:
    titles = studies.load(STUDY).titles
    for reading in READINGS:
        for weight, part in table[table["reading"] == reading].groupby("weight"):
            rows = part.set_index("backend")
            total = 1e3 * (rows["seconds_forward"] + rows["seconds_backward"])
            ratios = (f"{rows.loc[name, 'ratio']:.0f}" for name in ("qpth", "qpth_float32", "cvxpylayers"))
            yield [titles[reading], f"{weight:g}", f"{total[REFERENCE]:.1f}", f"{total['qpth']:.0f}", *ratios]
