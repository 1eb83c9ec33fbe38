"""What the solvers of the adjoint equation share: the protocol, the certificate, the settings of iterative ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from foldopt.errors import InputError
from foldopt.linear_solve._phi import Phi

VJP = Callable[[Tensor], Tensor]


class Product(ABC):
    """A product v -> Phi^T v that may be told that a v is expected to be the answer; a plain function will do too."""

    @abstractmethod
    def __call__(self, v: Tensor) -> Tensor:
        """Return Phi^T v, (B, N)."""

    def answer(self, v: Tensor) -> Tensor:
        """Return Phi^T v for a v that a closed form gives; what else the pass computes may be kept for its use."""
        return self(v)


class LinearSolveInfo(NamedTuple):
    """What a linear solver did, per sample (all tensors of shape (B,)).

    method: its name. iterations: products with Phi^T. residual: ||g + Phi^T v - v|| / ||g|| measured at the returned v.
    ok: whether v can be trusted. fallback: samples that took more than the method's first means, because I - Phi is
    singular there or the first one failed. remedy: what to do about samples that are not ok, where the method knows.
    """

    method: str
    iterations: Tensor
    residual: Tensor
    ok: Tensor
    fallback: Tensor
    remedy: str = ""

    @classmethod
    def of(cls, method: str, iterations: Tensor, residual: Tensor, tol: float) -> LinearSolveInfo:
        """Return the certificate of an answer whose residual counts as solved up to `tol`."""
        return cls(method, iterations, residual, residual <= tol, torch.zeros_like(residual, dtype=torch.bool))

    @classmethod
    def joined(cls, parts: Sequence[LinearSolveInfo]) -> LinearSolveInfo:
        """Return the certificates of several calls in a row."""
        return cls(
            parts[0].method,
            torch.cat([p.iterations for p in parts]),
            torch.cat([p.residual for p in parts]),
            torch.cat([p.ok for p in parts]),
            torch.cat([p.fallback for p in parts]),
            next((p.remedy for p in parts if p.remedy), ""),
        )

    def at(self, rows: Tensor) -> LinearSolveInfo:
        """Return the certificates of some samples."""
        return self._replace(
            iterations=self.iterations[rows],
            residual=self.residual[rows],
            ok=self.ok[rows],
            fallback=self.fallback[rows],
        )

    def put(self, rows: Tensor, part: LinearSolveInfo) -> LinearSolveInfo:
        """Return these certificates with `part` in the place of some samples; the longer name of a method holds."""
        return LinearSolveInfo(
            max(self.method, part.method, key=len),
            self.iterations.index_copy(0, rows, part.iterations),
            self.residual.index_copy(0, rows, part.residual),
            self.ok.index_copy(0, rows, part.ok),
            self.fallback.index_copy(0, rows, part.fallback),
            self.remedy or part.remedy,
        )


class LinearSolver(Protocol):
    """The protocol of a solver of v = Phi^T v + g."""

    def __call__(self, vjp: VJP, g: Tensor, phi: Phi | None = None) -> tuple[Tensor, LinearSolveInfo]:
        """Solve for v; see the docstring of `foldopt.linear_solve`."""
        ...


def norm(a: Tensor) -> Tensor:
    """Return the Euclidean norm of every row, (B,)."""
    return torch.linalg.vector_norm(a, dim=-1)


def relative(r: Tensor, g: Tensor) -> Tensor:
    """Return ||r|| / ||g|| of every row, (B,); ||r|| where g is zero."""
    scale = norm(g)
    return norm(r) / torch.where(scale > 0, scale, torch.ones_like(scale))


def safe_ratio(a: Tensor, b: Tensor) -> Tensor:
    """Return a / b where b is not zero, else 0: the sample is then left where it is and its residual tells."""
    return torch.where(b != 0, a / torch.where(b != 0, b, torch.ones_like(b)), torch.zeros_like(a))


def require_relative(owner: object, name: str, value: float | None) -> None:
    """Refuse a relative tolerance that is none."""
    if value is not None and not 0 < value < 1:
        raise InputError(f"{type(owner).__name__}({name}={value}): {name} is relative, take a number in (0, 1).")


@dataclass(frozen=True)
class Iterative:
    """Shared settings: relative tolerance (None: 1e-10 in float64, 1e-5 in float32) and cap of products with Phi^T.

    Called with ``guess`` (B, N), an iterative solver starts there instead of at v = g; see `WarmStart`.
    """

    tol: float | None = None
    max_iter: int = 1000

    def __post_init__(self) -> None:
        require_relative(self, "tol", self.tol)
        if self.max_iter < 1:
            raise InputError(f"{type(self).__name__}(max_iter={self.max_iter}): at least one iteration is needed.")

    def tolerance(self, dtype: torch.dtype) -> float:
        """Return the relative tolerance that holds for `dtype`."""
        if self.tol is not None:
            return self.tol
        return 1e-10 if dtype == torch.float64 else 1e-5

    @staticmethod
    def start(vjp: VJP, g: Tensor, guess: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the first v and its residual g + Phi^T v - v, for one product; not a guess worse than zero."""
        if guess is None:
            return g, vjp(g)
        r = g + vjp(guess) - guess
        take = (relative(r, g) < 1)[:, None]
        return torch.where(take, guess, 0), torch.where(take, r, g)
