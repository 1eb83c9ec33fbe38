"""The layers that are measured, their sizes, and the contenders that compute them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor

from experiments.across_studies.linear_solvers import MULTILABEL, parameters_in_training
from experiments.bilinear.problem import BilinearProblem
from experiments.run import components
from experiments.run.configuration import compose
from foldopt import QPLayer
from foldopt.solvers.cvxpylayers import ConeLayer
from foldopt.solvers.qpth import solve_qpth

F64 = torch.float64
Leaves = tuple[Tensor, ...]
Solve = Callable[[Leaves], Tensor]
OURS, REFERENCE = "fold", "direct"
LARGEST = 60_000_000  # most entries of a batch of n x n matrices, of which several are in memory at a time


@dataclass(frozen=True)
class Contender:
    """A method that computes a layer.

    Attributes:
        title: Its title in tables.
        overrides: The overrides of a run that select its backend and solvers.
        peer: Whether it is another library.
        needs: The packages that it needs; it is left out without them.
        most: Largest number of samples that it gets of a batch; None for all.
        gpu: Whether it can compute on a GPU.
    """

    title: str
    overrides: tuple[str, ...] = ()
    peer: bool = False
    needs: tuple[str, ...] = ()
    most: int | None = None
    gpu: bool = True

    def installed(self) -> bool:
        """Whether all packages that it needs are installed."""
        return all(importlib.util.find_spec(name) is not None for name in self.needs)


@dataclass(frozen=True)
class Place:
    """The variant, size n and batch size at which a layer is measured."""

    variant: str
    n: int
    batch: int


@dataclass(frozen=True)
class Layer:
    """A layer and its contenders.

    The contender `OURS` is the default of foldopt. Errors are relative to the contender `REFERENCE`, if there is one.

    Attributes:
        title: Its title in tables.
        overrides: The overrides of its runs.
        key: The configuration key of n; None if the data fix n.
        n: The study's n.
        batch: The study's batch size.
        contenders: The contenders by name.
        variants: Further overrides by name.
        system: The size of the linear system of the backward pass as a function of n.
        fast: The contenders that also get very large batches.
    """

    title: str
    overrides: tuple[str, ...]
    key: str | None
    n: int
    batch: int
    contenders: Mapping[str, Contender]
    variants: Mapping[str, tuple[str, ...]]
    system: Callable[[int], int]
    fast: tuple[str, ...] = (OURS,)

    def places(self, factors: Sequence[int], many: int = 0) -> list[Place]:
        """Return all variants at the study's size, and the first variant at multiples of its batch size and of its n.

        Args:
            factors: The multiples. Sizes whose batch of n x n matrices exceeds `LARGEST` entries are left out.
            many: A very large batch size that is measured as well; 0 for none.
        """
        first = next(iter(self.variants))
        grown = [Place(first, self.n, factor * self.batch) for factor in factors if factor > 1]
        if self.key:
            sizes = [factor * self.n for factor in factors if factor > 1]
            grown += [Place(first, n, self.batch) for n in sizes if self.batch * n * n <= LARGEST]
        grown += [Place(first, self.n, many)] if many else []
        return [*(Place(variant, self.n, self.batch) for variant in self.variants), *grown]

    def identity(self) -> dict[str, object]:
        """Return the settings on which the numbers depend, except for the sizes."""
        contenders = {name: (c.overrides, c.most) for name, c in self.contenders.items()}
        given = {"overrides": self.overrides, "variants": self.variants, "contenders": contenders}
        return {**given, "fast": self.fast}

    def problem(self, place: Place, names: Collection[str], seed: int) -> tuple[Leaves, Mapping[str, Solve]]:
        """Return the layer's parameters at `place`, and a function that solves it for each contender in `names`."""
        built = {name: self.built(place, self.contenders[name].overrides) for name in (REFERENCE, *names)}
        leaves = parameters_in_training(built[REFERENCE].task, 0.3, torch.Generator().manual_seed(seed))
        return leaves, {name: partial(_solved, parts) for name, parts in built.items()}

    def built(self, place: Place, overrides: Sequence[str]) -> components.Components:
        """Build the components of a run at `place`."""
        size = [f"task.n_train={place.batch}", "task.n_val=1", "task.n_test=1"]
        size += [f"{self.key}={place.n}"] if self.key else []
        return components.build(compose([*self.overrides, *self.variants[place.variant], *size, *overrides]))


def _solved(parts: components.Components, leaves: Leaves) -> Tensor:
    parts.backend.take_failures()
    return parts.backend(leaves if len(leaves) > 1 else leaves[0])


class Vertices(Layer):
    """The optimal vertex of a bilinear program; only forward passes, as it has no derivative."""

    def problem(self, place: Place, names: Collection[str], seed: int) -> tuple[Leaves, Mapping[str, Solve]]:
        """Return the parameters, and the solves by enumeration and by Gurobi."""
        task = self.built(place, self.contenders[OURS].overrides).task
        leaves = parameters_in_training(task, 0.3, torch.Generator().manual_seed(seed))
        problem = cast(BilinearProblem, task.problem)
        return leaves, {
            OURS: partial(_vertex, problem),
            "gurobi": lambda cd: problem.gurobi(cd[0], cd[1], smoothed=False).x,
        }


def _vertex(problem: BilinearProblem, leaves: Leaves) -> Tensor:
    found = problem.vertex(*leaves)
    return torch.cat([found.x, found.y], 1)


class QuadraticProgram(Layer):
    """min 1/2 x'Qx + p'x subject to Gx <= h with n variables and n / 2 inequalities; no data are shared in a batch."""

    def problem(self, place: Place, names: Collection[str], seed: int) -> tuple[Leaves, Mapping[str, Solve]]:
        """Return (Q, p, G, h) of random programs, about half of whose inequalities are active, and the solves."""
        generator = torch.Generator().manual_seed(seed)
        B, n, m = place.batch, place.n, place.n // 2

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=F64)

        root = normal(B, n, n) / n**0.5
        G, feasible = normal(B, m, n), 0.1 * normal(B, n, 1)
        h = (G @ feasible)[:, :, 0] + torch.rand(B, m, generator=generator, dtype=F64)
        leaves = root @ root.mT + 0.1 * torch.eye(n, dtype=F64), normal(B, n), G, h
        makers: Mapping[str, Callable[[int, int], Solve]] = {
            "fold": lambda *_: _qp_layer("auto"),
            "direct": lambda *_: _qp_layer("direct"),
            "gmres": lambda *_: _qp_layer("gmres"),
            "qpth": lambda *_: _with_qpth,
            "cvxpylayers": _cone_layer,
            "proxsuite": lambda *_: _with_proxsuite,
        }
        return leaves, {name: makers[name](n, m) for name in (REFERENCE, *names)}


def _qp_layer(linear_solver: str) -> Solve:
    layer = QPLayer(linear_solver=linear_solver)
    return lambda leaves: layer(*leaves)


def _with_qpth(leaves: Leaves) -> Tensor:
    Q, p, G, h = leaves
    return solve_qpth(Q, p, G, h, p.new_zeros(len(p), 0, p.shape[1]), p.new_zeros(len(p), 0), eps=1e-12, max_iter=50)


def _with_proxsuite(leaves: Leaves) -> Tensor:
    from proxsuite.torch.qplayer import QPFunction

    Q, p, G, h = leaves
    no_rows, no_values = p.new_zeros(len(p), 0, p.shape[1]), p.new_zeros(len(p), 0)
    return QPFunction(omp_parallel=torch.get_num_threads() > 1)(
        Q, p, no_rows, no_values, G, torch.full_like(h, -1e20), h
    )[0]


def _cone_layer(n: int, m: int) -> Solve:
    import cvxpy as cp

    x, root, p, G, h = cp.Variable(n), cp.Parameter((n, n)), cp.Parameter(n), cp.Parameter((m, n)), cp.Parameter(m)
    program = cp.Problem(cp.Minimize(cp.sum_squares(root @ x) / 2 + p @ x), [G @ x <= h])
    layer = ConeLayer(program, [root, p, G, h], [x], "CLARABEL", {})

    def solve(leaves: Leaves) -> Tensor:
        Q, *others = leaves
        return layer(torch.linalg.cholesky(Q).mT, *others)

    return solve


def _folds(*more: str) -> dict[str, Contender]:
    """Return folding with the automatic choice, and with each solver of the adjoint equation."""
    titles = {
        "direct": "folded, direct",
        "lfpi": "folded, LFPI",
        "anderson": "folded, Anderson",
        "gmres": "folded, GMRES",
        "bicgstab": "folded, BiCGSTAB",
    }
    contenders = {OURS: Contender("folded", ("backend=fold", *more))}
    for name, title in titles.items():
        contenders[name] = Contender(title, ("backend=fold", *more, f"linear_solver={name}"))
    return contenders


def _unrolled(*kinds: str) -> dict[str, Contender]:
    titles = {"unroll": "unrolled", "unfold": "unfolded"}
    return {kind: Contender(titles[kind], (f"backend={kind}", "backend.tol=1e6")) for kind in kinds}


def _cone(name: str, *more: str) -> Contender:
    solver = name.split(",")[0].upper()
    overrides = ("backend=cvxpylayers", f"backend.solver={solver}", *more)
    return Contender(f"cvxpylayers ({name})", overrides, peer=True, needs=("cvxpylayers",), gpu=False)


GUROBI = Contender(
    "folded, Gurobi one by one", ("backend=fold", "backend.forward=gurobi"), needs=("gurobipy",), gpu=False
)
QPTH = Contender("qpth", ("backend=qpth",), peer=True, needs=("qpth",))
TIGHT = "+backend.solver_args={eps: 1e-9, max_iters: 100000}"

LAYERS: Mapping[str, Layer] = {
    "portfolio": Layer(
        "portfolio, f-SQP",
        ("task=portfolio",),
        "task.n_assets",
        20,
        32,
        {
            **_folds(),
            "gurobi": GUROBI,
            **_unrolled("unroll", "unfold"),
            "clarabel": _cone("Clarabel", "backend.scaling=normalized"),
            "scs": _cone("SCS", "backend.scaling=normalized"),
            "scs_tight": _cone("SCS, eps 1e-9", "backend.scaling=normalized", TIGHT),
        },
        {"": ()},
        lambda n: 2 * n + 2,
    ),
    "denoising": Layer(
        "denoising, f-FDPG",
        ("task=denoising", "model=operator", "task.low=-3", "task.high=3", "task.noise=1"),
        "task.length",
        100,
        32,
        {**_folds(), **_unrolled("unroll", "unfold"), "qpth": QPTH, "clarabel": _cone("Clarabel")},
        {
            **{f"λ = {weight:g}": (f"task.weight={weight:g}",) for weight in (2, 0.5, 1, 4)},
            **{
                f"λ = {weight}, heights to 100": (
                    f"task.weight={weight}",
                    "task.low=10",
                    "task.high=100",
                    "task.noise=10",
                )
                for weight in (5, 10, 20, 40)
            },
        },
        lambda n: n - 1,
    ),
    "multilabel": Layer(
        "multilabel, f-PGD",
        tuple(MULTILABEL),
        None,
        100,
        64,
        {
            **_folds(),
            "exact": Contender("closed form", ("backend=exact",)),
            "sqp": Contender("f-SQP", ("backend=fold", "backend.optimizer=sqp")),
            **_unrolled("unfold"),
            "clarabel": _cone("Clarabel"),
            "scs": _cone("SCS"),
        },
        {"τ = 1": ("task.temperature=1",), "τ = 0.05": ("task.temperature=0.05",)},
        lambda n: n,
        (OURS, "exact", "sqp"),
    ),
    "bilinear": Layer(
        "bilinear, f-PGD",
        ("task=bilinear", "task.kappa=0.9", "task.time_limit=10"),
        "task.n_variables",
        50,
        32,
        {
            **_folds(),
            "block": Contender("folded block step", ("backend=fold", "backend.optimizer=block")),
            **_unrolled("unfold"),
            "gurobi": Contender(
                "Gurobi one by one",
                ("backend=fold", "backend.forward=gurobi"),
                peer=True,
                needs=("gurobipy",),
                most=2,
                gpu=False,
            ),
        },
        {"": ()},
        lambda n: n,
    ),
    "vertex": Vertices(
        "bilinear, not smoothed",
        ("task=bilinear", "task.kappa=0"),
        "task.n_variables",
        50,
        32,
        {
            OURS: Contender("enumeration", ("backend=two_stage",)),
            "gurobi": Contender("Gurobi one by one", peer=True, needs=("gurobipy",), most=8, gpu=False),
        },
        {"": ()},
        lambda n: n,
    ),
    "qp": QuadraticProgram(
        "QPLayer",
        (),
        "n",
        100,
        64,
        {
            "fold": Contender("folded Newton step"),
            "direct": Contender("folded Newton step, direct"),
            "gmres": Contender("folded Newton step, GMRES"),
            "qpth": QPTH,
            "cvxpylayers": Contender("cvxpylayers (Clarabel)", peer=True, needs=("cvxpylayers",), most=8, gpu=False),
            "proxsuite": Contender("proxsuite's QPLayer", peer=True, needs=("proxsuite",), gpu=False),
        },
        {"": ()},
        lambda n: n + n // 2,
    ),
}
