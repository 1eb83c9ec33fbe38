"""Evaluation of a benchmark: medians, targets, growth with the size, and the GPU compared with the CPU."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd

from experiments.benchmark.layers import LAYERS, OURS
from experiments.benchmark.measure import FLOOR, NETWORK

KEYS = ["layer", "device", "threads", "variant", "n", "batch", "contender"]
CONES = ("clarabel", "scs", "scs_tight")
EXACT = 1e-7  # errors below this count as equally good
FASTER = 50  # target for the throughput of a GPU relative to all cores of the CPU, in a very large batch


@dataclass(frozen=True)
class Target:
    """A target for the ratio of the times of contenders, in every variant at the study's size.

    Attributes:
        layer: Name of the layer.
        against: The other contenders.
        factor: The time of each of them must be at least this many times ours.
        part: The time that is compared: "total", "forward" or "backward".
        ours: Our contender.
        at_most: If set, our time must instead be at most `factor` times that of the others.
    """

    layer: str
    against: tuple[str, ...]
    factor: float
    part: str = "total"
    ours: str = OURS
    at_most: bool = False


TARGETS = (
    Target("portfolio", CONES, 20),
    Target("denoising", ("qpth",), 100),
    Target("multilabel", CONES, 1000, ours="exact"),
    Target("multilabel", CONES, 1000),
    Target("multilabel", CONES, 50, "backward"),
    Target("multilabel", CONES, 50, "backward", ours="sqp"),
    Target("vertex", ("gurobi",), 5000, "forward"),
    Target("bilinear", ("gurobi",), 500, "forward"),
    Target("qp", ("qpth",), 5),
    Target("qp", ("cvxpylayers",), 50),
    *(Target(name, (FLOOR,), 3, "backward", at_most=True) for name in LAYERS if name != "vertex"),
    *(Target(name, (NETWORK,), 5, at_most=True) for name in ("portfolio", "denoising", "bilinear")),
)


def medians(rows: pd.DataFrame) -> pd.DataFrame:
    """Return medians over the rounds, one row per place and contender.

    Further columns: forward, backward and total, seconds per sample; fastest and slowest, the total of a round; ratio
    of the total to that of `OURS`.
    """
    measured = rows.dropna(subset=["seconds_forward"]).drop(columns="why")
    measured["round"] = (measured["seconds_forward"] + measured["seconds_backward"]) / measured["samples"]
    groups = measured.groupby(KEYS, sort=False, dropna=False)
    table = groups.median().drop(columns="round").reset_index()
    table["fastest"], table["slowest"] = groups["round"].min().to_numpy(), groups["round"].max().to_numpy()
    for part in ("forward", "backward"):
        table[part] = table.pop(f"seconds_{part}") / table["samples"]
    table["total"] = table["forward"] + table["backward"]
    ours = table[table["contender"] == OURS].set_index(KEYS[:-1])["total"].rename("ours")
    table = table.join(ours, on=KEYS[:-1])
    table["ratio"] = table["total"] / table.pop("ours")
    return table


def judged(table: pd.DataFrame, threads: int) -> pd.DataFrame:
    """Return one row per target that was measured on the CPU: the ratio, whether it holds, and both errors.

    A target does not hold if our errors exceed those of the other contender and `EXACT`, unless it is `at_most`.
    """
    rows = []
    for number, target in enumerate(TARGETS):
        layer = LAYERS[target.layer]
        part = table[(table["layer"] == target.layer) & (table["device"] == "cpu") & (table["threads"] == threads)]
        part = part[(part["n"] == layer.n) & (part["batch"] == layer.batch)]
        ours = part[part["contender"] == target.ours].set_index("variant")
        theirs = part[part["contender"].isin(target.against)]
        if ours.empty or theirs.empty:
            continue
        own = ours[target.part].reindex(theirs["variant"]).to_numpy()
        ratios = own / theirs[target.part] if target.at_most else theirs[target.part] / own
        place = ratios.idxmax() if target.at_most else ratios.idxmin()
        worst, peer = ratios[place], theirs.loc[place]
        best = ours.loc[peer["variant"]]
        accurate = all(best[error] <= max(peer[error], EXACT) for error in ("error_x", "error_vjp"))
        holds = worst <= target.factor if target.at_most else bool(worst >= target.factor and accurate)
        rows.append(
            {
                **asdict(target),
                "number": number,
                "against": peer["contender"],
                "variant": peer["variant"],
                "measured": worst,
                "holds": bool(holds),
                **{
                    f"{error}_{side}": row[error]
                    for error in ("error_x", "error_vjp")
                    for side, row in (("ours", best), ("theirs", peer))
                },
            }
        )
    return pd.DataFrame(rows) if rows else pd.DataFrame(columns=["number"])


def exponents(table: pd.DataFrame) -> dict[tuple[str, str], float]:
    """Return the exponents of the time of a batch of `OURS` on one thread, by layer and axis ("batch" or "n")."""
    found = {}
    ours = table[(table["contender"] == OURS) & (table["device"] == "cpu")]
    ours = ours[ours["threads"] == ours["threads"].min()]
    for name, layer in LAYERS.items():
        part = ours[(ours["layer"] == name) & (ours["variant"] == next(iter(layer.variants)))]
        for axis, other, usual in (("batch", "n", layer.n), ("n", "batch", layer.batch)):
            line = part[part[other] == usual].sort_values(axis)
            if len(line) > 1:
                seconds = line["total"] * line["batch"]
                found[name, axis] = float(np.polyfit(np.log(line[axis].astype(float)), np.log(seconds), 1)[0])
    return found


def throughput(table: pd.DataFrame) -> pd.DataFrame:
    """Compare the GPU with all cores of the CPU in a very large batch.

    Returns:
        One row per layer and fast contender with the columns layer; contender; many, the batch size; cpu and cuda,
        seconds per sample at the study's batch size; cpu_many and cuda_many, those at `many`; peak_bytes, error_x and
        error_vjp, those on the GPU at `many`. Empty if no GPU was measured.
    """
    on = table["device"] == "cuda"
    cores = ~on & (table["threads"] == table.loc[~on, "threads"].max())
    rows = []
    for name, layer in LAYERS.items():
        first = next(iter(layer.variants))
        here = (table["layer"] == name) & (table["n"] == layer.n) & (table["variant"] == first)
        for who in layer.fast:
            own = here & (table["contender"] == who)
            cpu, cuda = (table[own & where].set_index("batch") for where in (cores, on))
            if cpu.empty or cuda.empty:
                continue
            many = max(cuda.index)
            rows.append(
                {
                    **{"layer": name, "contender": who, "many": many},
                    **{"cpu": cpu["total"][layer.batch], "cuda": cuda["total"][layer.batch]},
                    **{"cpu_many": cpu["total"].get(many, np.nan), "cuda_many": cuda["total"][many]},
                    **cuda.loc[many, ["peak_bytes", "error_x", "error_vjp"]].to_dict(),
                }
            )
    columns = ["layer", "contender", "many", "cpu", "cuda", "cpu_many", "cuda_many"]
    return pd.DataFrame(rows, columns=[*columns, "peak_bytes", "error_x", "error_vjp"])
