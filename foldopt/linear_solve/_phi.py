"""Phi as a matrix, assembled and factored once for any number of right-hand sides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from foldopt.batched import lu_factor, matvec
from foldopt.linear_solve._sparse import SHIFT, SparsePhi

Inverse = Callable[[Tensor, bool], Tensor | None]


@dataclass(eq=False)
class Phi:
    """The Jacobian dU/dx of a step at one point, (B, N, N), which is made, and I - Phi factored, on first use.

    make: returns the matrix, dense or sparse; a sparse one may be (N, N) for all samples. products: how many products
    with Phi^T that takes per sample; 0 for a closed form. inverse: the solution in closed form, if there is one:
    inverse(g, transposed) returns v = Phi^T v + g, or v = Phi v + g if `transposed`, or None. nbytes: of the matrix,
    where it has to be assembled. weights: (B, N), in which the residual of `inverse` is measured; None for all 1.
    """

    make: Callable[[], Tensor | SparsePhi]
    products: int = 0
    inverse: Inverse | None = None
    nbytes: int = 0
    weights: Tensor | None = None
    _kept: dict[str, Any] = field(default_factory=dict)
    _transposed: bool = False

    @classmethod
    def assembled(
        cls,
        vjp: Callable[[Tensor], Tensor],
        like: Tensor,
        inverse: Inverse | None = None,
    ) -> Phi:
        """Return the Phi of a map v -> Phi^T v on tensors like `like`, (B, N), from N products."""
        n = like.shape[1]

        def make() -> Tensor:
            eye = torch.eye(n, dtype=like.dtype, device=like.device)
            return torch.stack([vjp(e.expand_as(like)) for e in eye], dim=1)

        return cls(make, n, inverse, len(like) * n * n * like.element_size())

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
        weights = None if self.weights is None else 1 / self.weights
        return replace(self, weights=weights, _transposed=not self._transposed)

    @property
    def sparse(self) -> SparsePhi | None:
        """Phi as sparse matrices, not transposed, if the closed form is sparse; makes the closed form."""
        made = self._matrix() if self.closed_form else None
        return made if isinstance(made, SparsePhi) else None

    def matrix(self) -> Tensor:
        """Return Phi as a dense tensor, (B, N, N); of a sparse one that all samples share, (1, N, N)."""
        phi = self._matrix()
        phi = phi.dense() if isinstance(phi, SparsePhi) else phi
        return phi.mT if self._transposed else phi

    def at(self, rows: Tensor) -> Phi:
        """Return the Phi of some samples, with what has been factored of a sparse one."""
        part = self._matrix().at(rows) if self.sparse else self._matrix()[rows]
        return Phi(lambda: part, _transposed=self._transposed)

    def product(self, v: Tensor) -> Tensor:
        """Return Phi^T v, (B, N), by the matrix."""
        phi = self._matrix()
        if isinstance(phi, SparsePhi):
            return phi.product(v, not self._transposed)
        return matvec(phi if self._transposed else phi.mT, v)

    def solve(self, g: Tensor) -> Tensor:
        """Return v = Phi^T v + g, (B, N), by LU factorization; not finite, or wrong, where I - Phi is singular."""
        if self.sparse:
            return self.sparse.solve(g, not self._transposed)
        lu, pivots = self._keep("lu", self._factor)
        return torch.linalg.lu_solve(lu, pivots, g[:, :, None], adjoint=not self._transposed)[:, :, 0]

    def inverted(self, g: Tensor) -> Tensor | None:
        """Return v = Phi^T v + g, (B, N), by the closed form `inverse`; None where there is none."""
        return None if self.inverse is None else self.inverse(g, self._transposed)

    def shifted(self, g: Tensor) -> Tensor:
        """Return what `solve` does, of a sparse I - Phi that a small multiple of the identity has made regular."""
        return self._matrix().solve(g, not self._transposed, SHIFT)

    def _matrix(self) -> Any:
        return self._keep("matrix", self._made)

    def _made(self) -> Tensor | SparsePhi:
        phi = self.make()
        return SparsePhi.of(phi) if isinstance(phi, Tensor) and phi.layout != torch.strided else phi

    def _factor(self) -> tuple[Tensor, Tensor]:
        phi = self._matrix()
        lu, pivots, _ = lu_factor(torch.eye(phi.shape[1], dtype=phi.dtype, device=phi.device) - phi)
        return lu, pivots

    def _keep(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]
