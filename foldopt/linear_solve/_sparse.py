"""Sparse matrices Phi: I - Phi is factored by SuperLU, sample by sample, on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foldopt.errors import InputError, MissingDependencyError

__all__ = ["SHIFT", "SparsePhi"]

SHIFT = 1e-8  # added to the diagonal of a singular matrix, relative to its largest entry


class SparsePhi:
    """Sparse matrices Phi, (N, N), one per sample or one for all, with their factors. It computes in float64.

    Args:
        equations: the matrices I - Phi, scipy csc.
        like: tensor of the dtype and device of Phi.

    Source: Li, An overview of SuperLU, ACM Trans. Math. Softw. 31(3), 2005.
    """

    def __init__(self, equations: list[Any], like: Tensor) -> None:
        self._equations = equations  # I - Phi, scipy csc
        self._like = like  # has the dtype and device of Phi
        self._factors: dict[float, list[Any]] = {}

    @classmethod
    def of(cls, phi: Tensor) -> SparsePhi:
        """Convert Phi, a sparse tensor (B, N, N) or (N, N) of any layout.

        Raises:
            InputError: it has another shape, or dense dimensions.
            MissingDependencyError: scipy is not installed.
        """
        if phi.dim() not in (2, 3) or phi.shape[-1] != phi.shape[-2]:
            raise InputError(
                f"jacobian of the update returned a sparse tensor of shape {tuple(phi.shape)}, expected (B, N, N), or "
                "(N, N) for all samples."
            )
        sparse = _scipy_sparse()
        coo = phi.detach().to_sparse_coo().cpu().coalesce()
        if coo.dense_dim():
            raise InputError(
                "jacobian of the update returned a sparse tensor with dense dimensions; every dimension of Phi has to "
                "be sparse."
            )
        places, values = coo.indices(), coo.values().double()
        n = phi.shape[-1]
        sizes = [len(values)]
        if phi.dim() == 3:
            sizes = torch.bincount(places[0], minlength=len(phi)).tolist()
        eye = sparse.identity(n, format="csc")
        return cls(
            [
                eye - sparse.csc_matrix((entries.numpy(), (at[-2].numpy(), at[-1].numpy())), shape=(n, n))
                for at, entries in zip(places.split(sizes, 1), values.split(sizes), strict=True)
            ],
            phi.new_empty(0, layout=torch.strided),
        )

    def at(self, rows: Tensor) -> SparsePhi:
        """Return the matrices of some samples."""
        if len(self._equations) == 1:
            return self
        part = SparsePhi([self._equations[i] for i in rows.tolist()], self._like)
        part._factors = {shift: [all_[i] for i in rows.tolist()] for shift, all_ in self._factors.items()}
        return part

    def dense(self) -> Tensor:
        """Return the matrices as a dense tensor, (B, N, N), or (1, N, N) for a shared one."""
        found = torch.stack([torch.from_numpy(matrix.toarray()) for matrix in self._equations])
        return (torch.eye(found.shape[1], dtype=found.dtype) - found).to(self._like)

    def product(self, v: Tensor, transposed: bool) -> Tensor:
        """Return Phi v, or Phi^T v if `transposed`, for v (B, N)."""
        return v - self._mapped(v, lambda i, part: (self._equations[i].T if transposed else self._equations[i]) @ part)

    def solve(self, g: Tensor, transposed: bool, shift: float = 0.0) -> Tensor:
        """Return v with v = Phi v + g, or v = Phi^T v + g if `transposed`, (B, N); NaN where I - Phi is singular.

        Args:
            g: right-hand side, (B, N).
            transposed: whether to solve with Phi^T.
            shift: added to the diagonal of I - Phi, relative to its largest entry; default 0, and v is then refined
                once.

        Returns:
            v, (B, N).
        """
        if shift not in self._factors:
            self._factors[shift] = [_factored(matrix, shift) for matrix in self._equations]
        factors, trans = self._factors[shift], "T" if transposed else "N"

        def solved(i: int, part: Any) -> Any:
            return part * float("nan") if factors[i] is None else factors[i].solve(part, trans)

        v = self._mapped(g, solved)
        return v if shift else v + self._mapped(g + self.product(v, transposed) - v, solved)

    def _mapped(self, v: Tensor, function: Any) -> Tensor:
        """Return function(i, column) of each sample's v, i numbering the matrices; a shared one gets all columns."""
        self._require(v)
        rows = v.detach().double().cpu().numpy()
        if len(self._equations) == 1:
            out = torch.from_numpy(function(0, rows.T)).T.contiguous()
        else:
            out = torch.stack([torch.from_numpy(function(i, row)) for i, row in enumerate(rows)])
        return out.to(v)

    def _require(self, v: Tensor) -> None:
        """Raise InputError unless the matrices fit v."""
        count, n = len(self._equations), self._equations[0].shape[0]
        if v.shape[1] != n or count not in (1, len(v)):
            raise InputError(
                f"jacobian of the update returned sparse matrices {n} x {n} for {count} samples, but the state has "
                f"{v.shape[1]} numbers in each of {len(v)} samples; return ({len(v)}, {v.shape[1]}, {v.shape[1]}), or "
                f"({v.shape[1]}, {v.shape[1]}) for all samples."
            )


def _scipy_sparse() -> Any:
    """Return scipy.sparse, or raise MissingDependencyError."""
    try:
        import scipy.sparse
        import scipy.sparse.linalg
    except ImportError as error:
        raise MissingDependencyError("a sparse Phi needs scipy: pip install 'foldopt[qp]'.") from error
    return scipy.sparse


def _factored(matrix: Any, shift: float) -> Any:
    """Return the factors of a matrix, or None where it is singular or not finite."""
    sparse = _scipy_sparse()
    total = abs(matrix.data).sum()
    if not total < float("inf"):
        return None
    if shift:
        matrix = matrix + shift * abs(matrix.data).max() * sparse.identity(matrix.shape[0], format="csc")
    try:
        return sparse.linalg.splu(matrix.tocsc(), permc_spec="COLAMD")
    except RuntimeError:  # exactly singular
        return None
