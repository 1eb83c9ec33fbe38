"""The protocol of linear solvers, their report, and the settings that iterative ones share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from foldopt.errors import InputError
from foldopt.linear_solve._phi import Phi

__all__ = [
    "VJP",
    "Iterative",
    "LinearSolveInfo",
    "LinearSolver",
    "Product",
    "norm",
    "relative",
    "require_relative",
    "safe_ratio",
]

VJP = Callable[[Tensor], Tensor]


class Product(ABC):
    """A product v -> Phi^T v that can be told which v is expected to be the solution; a plain function will do."""

    @abstractmethod
    def __call__(self, v: Tensor) -> Tensor:
        """Return Phi^T v, (B, N)."""

    def answer(self, v: Tensor) -> Tensor:
        """Return Phi^T v for a v from a closed form; a subclass may keep other results of the same pass for later."""
        return self(v)


class LinearSolveInfo(NamedTuple):
    """Report of a linear solver, per sample.

    Attributes:
        method: name of the solver.
        iterations: (B,) int, products with Phi^T.
        residual: (B,), ||g + Phi^T v - v|| / ||g|| at the returned v.
        ok: (B,) bool, whether v can be trusted.
        fallback: (B,) bool, samples that needed more than the first method, because I - Phi is singular there or
            because that method failed.
        remedy: what to do about samples that are not ok, if the solver knows; otherwise empty.

    Examples:
        >>> v, info = foldopt.linear_solve.GMRES()(lambda v: 0.5 * v, torch.ones(1, 2))
        >>> info.ok, info.iterations
        (tensor([True]), tensor([3]))
    """

    method: str
    iterations: Tensor
    residual: Tensor
    ok: Tensor
    fallback: Tensor
    remedy: str = ""

    @classmethod
    def of(cls, method: str, iterations: Tensor, residual: Tensor, tol: float) -> LinearSolveInfo:
        """Return the report of an answer that counts as solved where its residual is at most `tol`."""
        return cls(method, iterations, residual, residual <= tol, torch.zeros_like(residual, dtype=torch.bool))

    @classmethod
    def joined(cls, parts: Sequence[LinearSolveInfo]) -> LinearSolveInfo:
        """Return the reports of consecutive calls as one."""
        return cls(
            parts[0].method,
            torch.cat([p.iterations for p in parts]),
            torch.cat([p.residual for p in parts]),
            torch.cat([p.ok for p in parts]),
            torch.cat([p.fallback for p in parts]),
            next((p.remedy for p in parts if p.remedy), ""),
        )

    def at(self, rows: Tensor) -> LinearSolveInfo:
        """Return the report on some samples."""
        return self._replace(
            iterations=self.iterations[rows],
            residual=self.residual[rows],
            ok=self.ok[rows],
            fallback=self.fallback[rows],
        )

    def put(self, rows: Tensor, part: LinearSolveInfo) -> LinearSolveInfo:
        """Return this report with `part` in place of some samples, under the longer of the two names."""
        return LinearSolveInfo(
            max(self.method, part.method, key=len),
            self.iterations.index_copy(0, rows, part.iterations),
            self.residual.index_copy(0, rows, part.residual),
            self.ok.index_copy(0, rows, part.ok),
            self.fallback.index_copy(0, rows, part.fallback),
            self.remedy or part.remedy,
        )


class LinearSolver(Protocol):
    """The protocol of a solver of v = Phi^T v + g.

    Any object that is called like this may be the `linear_solver` of a layer.

    Examples:
        >>> def twenty_steps(vjp, g, phi=None):
        ...     v = g
        ...     for _ in range(20):
        ...         v = vjp(v) + g
        ...     residual = (g + vjp(v) - v).norm(dim=1) / g.norm(dim=1)
        ...     products = torch.full((len(g),), 21)
        ...     return v, foldopt.linear_solve.LinearSolveInfo.of("twenty steps", products, residual, tol=1e-5)
        >>> layer = foldopt.fold(torch.sqrt, lambda x, c: 0.5 * (x + c / x), linear_solver=twenty_steps)
        >>> c = torch.tensor([[4.0]], requires_grad=True)
        >>> layer(c).sum().backward()
        >>> c.grad
        tensor([[0.2500]])
    """

    def __call__(self, vjp: VJP, g: Tensor, phi: Phi | None = None) -> tuple[Tensor, LinearSolveInfo]:
        """Solve for v.

        Args:
            vjp: product v -> Phi^T v, (B, N) to (B, N).
            g: right-hand side (B, N).
            phi: the matrix Phi, if it is known; default None.

        Returns:
            v, (B, N), and the report.
        """
        ...


def norm(a: Tensor) -> Tensor:
    """Return the Euclidean norm of every row, (B,)."""
    return torch.linalg.vector_norm(a, dim=-1)


def relative(r: Tensor, g: Tensor) -> Tensor:
    """Return ||r|| / ||g|| of every row, (B,); ||r|| where g is zero."""
    scale = norm(g)
    return norm(r) / torch.where(scale > 0, scale, torch.ones_like(scale))


def safe_ratio(a: Tensor, b: Tensor) -> Tensor:
    """Return a / b, and 0 where b is zero: that sample then stays where it is, and its residual tells."""
    return torch.where(b != 0, a / torch.where(b != 0, b, torch.ones_like(b)), torch.zeros_like(a))


def require_relative(owner: object, name: str, value: float | None) -> None:
    """Raise InputError unless a relative tolerance is None or in (0, 1)."""
    if value is not None and not 0 < value < 1:
        raise InputError(f"{type(owner).__name__}({name}={value}): {name} is relative, take a number in (0, 1).")


@dataclass(frozen=True)
class Iterative:
    """Settings of iterative solvers.

    Called with ``guess``, (B, N), they start there instead of at v = g; see `WarmStart`.

    Args:
        tol: relative residual at which a sample is solved, in (0, 1); None, the default: 1e-10 in float64, otherwise
            1e-5.
        max_iter: largest number of products with Phi^T; default 1000.

    Raises:
        InputError: a setting is out of range.
    """

    tol: float | None = None
    max_iter: int = 1000

    def __post_init__(self) -> None:
        require_relative(self, "tol", self.tol)
        if self.max_iter < 1:
            raise InputError(f"{type(self).__name__}(max_iter={self.max_iter}): at least one iteration is needed.")

    def tolerance(self, dtype: torch.dtype) -> float:
        """Return the relative tolerance for a dtype."""
        if self.tol is not None:
            return self.tol
        return 1e-10 if dtype == torch.float64 else 1e-5

    @staticmethod
    def start(vjp: VJP, g: Tensor, guess: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the first v and its residual g + Phi^T v - v, for one product; a guess worse than 0 is not used."""
        if guess is None:
            return g, vjp(g)
        r = g + vjp(guess) - guess
        take = (relative(r, g) < 1)[:, None]
        return torch.where(take, guess, 0), torch.where(take, r, g)
