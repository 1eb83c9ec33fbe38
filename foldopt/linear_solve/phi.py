"""Phi as a matrix, assembled and factored once for any number of right-hand sides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from foldopt.batched import lu_factor


class Phi:
    """The Jacobian dU/dx of a step at one point, (B, N, N), which is made, and I - Phi factored, on first use.

    make: returns the matrix. products: how many products with Phi^T that takes per sample; 0 for a closed form.
    inverse: the solution in closed form, if there is one: inverse(g, transposed) returns v = Phi^T v + g, or
    v = Phi v + g if `transposed`, or None.
    """

    def __init__(
        self,
        make: Callable[[], Tensor],
        products: int = 0,
        inverse: Callable[[Tensor, bool], Tensor | None] | None = None,
    ) -> None:
        self.make, self.products, self.inverse = make, products, inverse
        self.nbytes = 0  # of the matrix, where it has to be assembled
        self.weights: Tensor | None = None  # (B, N), in which the residual of the closed form is measured; None: 1
        self._kept: dict[str, Any] = {}
        self._transposed = False

    @classmethod
    def assembled(
        cls,
        vjp: Callable[[Tensor], Tensor],
        like: Tensor,
        inverse: Callable[[Tensor, bool], Tensor | None] | None = None,
    ) -> Phi:
        """Return the Phi of a map v -> Phi^T v on tensors like `like`, (B, N), from N products."""
        n = like.shape[1]

        def make() -> Tensor:
            eye = torch.eye(n, dtype=like.dtype, device=like.device)
            return torch.stack([vjp(e.expand_as(like)) for e in eye], dim=1)

        phi = cls(make, n, inverse)
        phi.nbytes = len(like) * n * n * like.element_size()
        return phi

    @property
    def closed_form(self) -> bool:
        """Whether the matrix costs no products."""
        return self.products == 0

    @property
    def made(self) -> bool:
        """Whether the matrix is there already."""
        return "matrix" in self._kept

    def transposed(self) -> Phi:
        """Return Phi transposed, sharing what has been made and factored."""
        other = Phi(self.make, self.products, self.inverse)
        other._kept, other._transposed = self._kept, not self._transposed
        other.nbytes = self.nbytes
        other.weights = None if self.weights is None else 1 / self.weights
        return other

    def matrix(self) -> Tensor:
        """Return Phi, (B, N, N)."""
        phi = self._keep("matrix", self.make)
        return phi.mT if self._transposed else phi

    def solve(self, g: Tensor) -> Tensor:
        """Return v = Phi^T v + g, (B, N), by LU factorization; not finite, or wrong, where I - Phi is singular."""
        lu, pivots = self._keep("lu", self._factor)
        return torch.linalg.lu_solve(lu, pivots, g[:, :, None], adjoint=not self._transposed)[:, :, 0]

    def inverted(self, g: Tensor) -> Tensor | None:
        """Return v = Phi^T v + g, (B, N), by the closed form `inverse`; None where there is none."""
        return None if self.inverse is None else self.inverse(g, self._transposed)

    def _factor(self) -> tuple[Tensor, Tensor]:
        phi = self._keep("matrix", self.make)
        lu, pivots, _ = lu_factor(torch.eye(phi.shape[1], dtype=phi.dtype, device=phi.device) - phi)
        return lu, pivots

    def _keep(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]
