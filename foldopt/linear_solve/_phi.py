"""The matrix Phi, computed and factored once for any number of right-hand sides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from foldopt.batched import lu_factor, matvec
from foldopt.linear_solve._sparse import SHIFT, SparsePhi

__all__ = ["Inverse", "Phi"]

Inverse = Callable[[Tensor, bool], Tensor | None]


@dataclass(eq=False)
class Phi:
    """The Jacobian Phi = dU/dx of a step at one point, (B, N, N), computed and factored on first use.

    Args:
        make: function without arguments that returns the matrix, dense or sparse; a sparse one may be (N, N) for all
            samples.
        products: number of products with Phi^T that `make` takes per sample; default 0, a closed form.
        inverse: solution in closed form, ``inverse(g, transposed)``: it returns v with v = Phi^T v + g, or v = Phi v +
            g if `transposed`, or None; default None.
        nbytes: size of the matrix in bytes, if it has to be assembled; default 0.
        weights: (B, N), weights of the residual of `inverse`; None, the default, for all 1.

    Examples:
        >>> phi = foldopt.linear_solve.Phi(lambda: torch.tensor([[[0.5, 0.0], [1.0, 0.0]]]))
        >>> phi.solve(torch.ones(1, 2))  # v = Phi^T v + g
        tensor([[4., 1.]])
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
        """Return the Phi of a map v -> Phi^T v, assembled from N products.

        Args:
            vjp: the map, (B, N) to (B, N).
            like: tensor (B, N) of the size, dtype and device of its arguments.
            inverse: solution in closed form, if there is one; default None.

        Returns:
            Phi, not computed yet.
        """
        n = like.shape[1]

        def make() -> Tensor:
            eye = torch.eye(n, dtype=like.dtype, device=like.device)
            return torch.stack([vjp(e.expand_as(like)) for e in eye], dim=1)

        return cls(make, n, inverse, len(like) * n * n * like.element_size())

    @property
    def closed_form(self) -> bool:
        """Whether computing the matrix needs no products."""
        return self.products == 0

    @property
    def made(self) -> bool:
        """Whether the matrix has been computed."""
        return "matrix" in self._kept

    def transposed(self) -> Phi:
        """Return Phi transposed; matrix and factors are shared."""
        weights = None if self.weights is None else 1 / self.weights
        return replace(self, weights=weights, _transposed=not self._transposed)

    @property
    def sparse(self) -> SparsePhi | None:
        """The sparse matrices of a closed form, not transposed; None if it is dense or not a closed form."""
        made = self._matrix() if self.closed_form else None
        return made if isinstance(made, SparsePhi) else None

    def matrix(self) -> Tensor:
        """Return Phi as a dense tensor, (B, N, N), or (1, N, N) if all samples share a sparse one."""
        phi = self._matrix()
        phi = phi.dense() if isinstance(phi, SparsePhi) else phi
        return phi.mT if self._transposed else phi

    def at(self, rows: Tensor) -> Phi:
        """Return the Phi of some samples; factors of a sparse one are kept."""
        part = self._matrix().at(rows) if self.sparse else self._matrix()[rows]
        return Phi(lambda: part, _transposed=self._transposed)

    def product(self, v: Tensor) -> Tensor:
        """Return Phi^T v, (B, N), computed with the matrix."""
        phi = self._matrix()
        if isinstance(phi, SparsePhi):
            return phi.product(v, not self._transposed)
        return matvec(phi if self._transposed else phi.mT, v)

    def solve(self, g: Tensor) -> Tensor:
        """Return v with v = Phi^T v + g, (B, N), by LU factorization; not finite or wrong where I - Phi is singular."""
        if self.sparse:
            return self.sparse.solve(g, not self._transposed)
        lu, pivots = self._keep("lu", self._factor)
        return torch.linalg.lu_solve(lu, pivots, g[:, :, None], adjoint=not self._transposed)[:, :, 0]

    def inverted(self, g: Tensor) -> Tensor | None:
        """Return v with v = Phi^T v + g, (B, N), by the closed form `inverse`; None if there is none."""
        return None if self.inverse is None else self.inverse(g, self._transposed)

    def shifted(self, g: Tensor) -> Tensor:
        """Return what `solve` returns, for a sparse I - Phi made regular by adding a small multiple of the identity."""
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
