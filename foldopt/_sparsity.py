"""The places where the derivatives of a smooth program have entries, and its quadratic model with sparse matrices."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foldopt._decompression import Decompression, Derivative, Derivatives, Product, on_cpu
from foldopt.errors import InputError
from foldopt.qp._kkt import probe
from foldopt.qp._structure import sparse_argument
from foldopt.qp.matrix import Pattern, SparseMatrix
from foldopt.updates.programs import SmoothProgram

__all__ = ["Model", "SparseDerivatives", "Sparsity"]


class Model(NamedTuple):
    """The quadratic model of a program at (x, y), eq. (31), for a batch, with sparse matrices; float64, on the CPU.

    Attributes:
        gradient: gradient of f, (B, n).
        H: Hessian of the Lagrangian, (B, n, n).
        c: constraints (h, g), (B, r).
        C: their Jacobian, (B, r, n).
    """

    gradient: Tensor
    H: SparseMatrix
    c: Tensor
    C: SparseMatrix


class Sparsity:
    """The places where the derivatives of a smooth program may have entries other than zero.

    Give the matrices of the places, or let `Sparsity.detected` find them. Only the places of their entries matter, not
    the values; a stored zero counts as an entry. Matrices may be of SciPy, torch (sparse or dense) or NumPy.

    Args:
        hessian: the Hessian of the Lagrangian, (n, n), one triangle or both.
        inequalities: the Jacobian of the inequalities, (m, n); None, the default, if there are none.
        equalities: the Jacobian of the equalities, (p, n); None, the default, if there are none.

    Raises:
        InputError: an argument is no matrix, or the sizes do not fit.

    Examples:
        >>> sparsity = foldopt.Sparsity(torch.eye(3), equalities=torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))
        >>> sparsity.products  # one for the Hessian, one for the constraints
        (1, 1)
    """

    def __init__(self, hessian: Any, inequalities: Any = None, equalities: Any = None) -> None:
        H = _pattern("hessian", hessian)
        n = H.shape[1]
        rows = [
            Pattern.none((0, n), H.rows.device) if part is None else _pattern(name, part)
            for name, part in (("equalities", equalities), ("inequalities", inequalities))
        ]
        for name, part, shape in (
            ("hessian", H, (n, n)),
            ("equalities", rows[0], (rows[0].shape[0], n)),
            ("inequalities", rows[1], (rows[1].shape[0], n)),
        ):
            if part.shape != shape:
                raise InputError(
                    f"{name} of shape {part.shape} does not fit a Hessian of {n} columns: expected {shape}."
                )
        top = rows[0].shape[0]
        C = Pattern(
            torch.cat([rows[0].rows, rows[1].rows + top]),
            torch.cat([rows[0].columns, rows[1].columns]),
            (top + rows[1].shape[0], n),
        )
        self._store(H, C, top)

    def _store(self, H: Pattern, C: Pattern, n_equalities: int) -> None:
        """Store the places of the Hessian, made symmetric and with its diagonal, and those of the constraints."""
        eye = torch.arange(H.shape[1])
        self.H = _united(torch.cat([H.rows, H.columns, eye]), torch.cat([H.columns, H.rows, eye]), H.shape)
        self.C = _united(C.rows, C.columns, C.shape)
        self.n_equalities = n_equalities
        self._decompressions = Decompression(self.H), Decompression(self.C)

    @classmethod
    def detected(cls, program: SmoothProgram, x: Tensor, *params: Tensor) -> Sparsity:
        """Find the places by one product for every variable and every constraint, at a point near x.

        An entry that is zero in all samples at that point but not elsewhere is missed. Code that uses the places
        compares the matrices with a product and does not go on if they differ.

        Args:
            program: the program.
            x: points (B, n).
            *params: parameters of the program.

        Returns:
            The places.
        """
        near = x + 1e-3 * (1 + x.abs()) * probe(x.shape[1], x)
        _, h, g = program.values(near, *params)
        p, r = h.shape[1], h.shape[1] + g.shape[1]
        at = Derivatives(program, near, params)
        hessian = at.hessian(1 + 0.5 * probe(r, x).expand(len(x), r))
        found = cls.__new__(cls)
        found._store(_detected(hessian.pull, x.shape[1], near), _detected(at.jacobian.pull, r, near), p)
        return found

    def united(self, other: Sparsity) -> Sparsity:
        """Return the union of the places of both; the programs must have the same size."""
        H, C = (
            Pattern(torch.cat([a.rows, b.rows]), torch.cat([a.columns, b.columns]), a.shape)
            for a, b in ((self.H, other.H), (self.C, other.C))
        )
        found = copy.copy(self)
        found._store(H, C, self.n_equalities)
        return found

    def __len__(self) -> int:
        return len(self.H.rows) + len(self.C.rows)

    @property
    def products(self) -> tuple[int, int]:
        """The numbers of products from which the Hessian and the Jacobian of the constraints are computed."""
        return self._decompressions[0].products, self._decompressions[1].products

    def model(self, program: SmoothProgram, x: Tensor, y: Tensor, params: Sequence[Tensor]) -> tuple[Model, bool]:
        """Return the quadratic model of a program at a point, and whether the places cover all its entries.

        Args:
            program: the program.
            x: points (B, n).
            y: multipliers (nu, lam), (B, r).
            params: parameters of the program.

        Returns:
            The model, and True if the matrices agree with a product of the derivatives.

        Raises:
            InputError: the program has another size than the places.
        """
        shapes = self.H.shape[1], self.C.shape[0], self.n_equalities
        p = program.values(x, *params)[1].shape[1]
        if shapes != (x.shape[1], y.shape[1], p):
            raise InputError(
                f"sparsity= has {shapes[0]} variables, {shapes[2]} equalities and {shapes[1] - shapes[2]} "
                f"inequalities, but the program has {x.shape[1]}, {p} and {y.shape[1] - p}; build it for this "
                "program, or pass sparsity=True."
            )
        at = Derivatives(program, x, params)
        (C, first), (H, second) = self.jacobian(at), self.hessian(at, y)
        return Model(on_cpu(at.gradient), H, on_cpu(at.c), C), first and second

    def jacobian(self, at: Derivatives) -> tuple[SparseMatrix, bool]:
        """Return the Jacobian of the constraints, (B, r, n), and whether the places cover all its entries."""
        return _read(self._decompressions[1], at.jacobian, at.x, at.c)

    def hessian(self, at: Derivatives, y: Tensor, weight: float = 1.0) -> tuple[SparseMatrix, bool]:
        """Return the Hessian of weight * f + y'c, (B, n, n), and whether the places cover all its entries."""
        return _read(self._decompressions[0], at.hessian(y, weight), at.x, at.x)


class SparseDerivatives:
    """The sparse derivatives of a program; places that were not given are detected at the first call.

    Args:
        program: the program.
        sparsity: places of the entries of its derivatives; None, the default, detects them, and more of them wherever
            a later point shows that some are missing.

    Examples:
        >>> import torch
        >>> from foldopt import SmoothProgram
        >>> chain = SmoothProgram(lambda x: (x[:, 1:] - x[:, :-1]).square().sum(1))
        >>> places = SparseDerivatives(chain).places(torch.zeros(1, 4), ())
        >>> list(zip(places.H.rows.tolist(), places.H.columns.tolist()))
        [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 1), (2, 2), (2, 3), (3, 2), (3, 3)]
    """

    def __init__(self, program: SmoothProgram, sparsity: Sparsity | None = None) -> None:
        self.program, self.sparsity = program, sparsity
        self._detects = sparsity is None

    def places(self, x: Tensor, params: Sequence[Tensor]) -> Sparsity:
        """Return the places; if none are known yet, they are detected near x, (B, n)."""
        if self.sparsity is None:
            self.sparsity = Sparsity.detected(self.program, x, *params)
        return self.sparsity

    def extend(self, x: Tensor, params: Sequence[Tensor]) -> None:
        """Add the places that are detected near x, (B, n).

        Raises:
            InputError: the places were given, or there are no others.
        """
        known = self.places(x, params)
        if self._detects:
            self.sparsity = known.united(Sparsity.detected(self.program, x, *params))
        if self.sparsity is None or len(self.sparsity) == len(known):
            raise InputError(
                "sparsity= misses entries of the Hessian of the Lagrangian or of the constraints' Jacobian: products "
                "with the matrices are not those with the derivatives. Add the entries, or choose sparsity=True."
            )

    def model(self, x: Tensor, y: Tensor, params: Sequence[Tensor]) -> Model:
        """Return the quadratic model at x, (B, n), and y = (nu, lam), (B, r).

        Raises:
            InputError: places were given, and do not cover all entries.
        """
        params = [part.detach() for part in params]
        model, complete = self.places(x, params).model(self.program, x, y, params)
        while not complete:  # some entries were zero where the places were detected
            self.extend(x, params)
            model, complete = self.places(x, params).model(self.program, x, y, params)
        return model


def _detected(pull: Product, m: int, like: Tensor) -> Pattern:
    """Return the places where a Jacobian (m, n) has an entry in some sample."""
    columns = []
    for i in range(m):
        seed = torch.zeros_like(like[0, :1]).expand(m).clone()
        seed[i] = 1
        columns.append((pull(seed.expand(len(like), -1)) != 0).any(0).nonzero()[:, 0].cpu())
    counts = torch.tensor([len(part) for part in columns], dtype=torch.long)
    none = torch.zeros(0, dtype=torch.long)
    return Pattern(torch.arange(m).repeat_interleave(counts), torch.cat([none, *columns]), (m, like.shape[1]))


def _read(decompression: Decompression, of: Derivative, x: Tensor, value: Tensor) -> tuple[SparseMatrix, bool]:
    """Return the Jacobian at x, (B, n), of a value (B, m), and whether it gives the derivative's product."""
    M = decompression.matrix(of, x.detach())
    return M, _agrees(M, of.pull, value.detach())


def _agrees(M: SparseMatrix, pull: Product, like: Tensor) -> bool:
    """Return whether a sparse matrix gives the same product as the derivative, in samples that are finite."""
    w = probe(like.shape[1], like).expand_as(like)
    own, right = M.mT.matvec(on_cpu(w)), on_cpu(pull(w))
    if not own.numel():
        return True
    size = M.mT.abs().matvec(on_cpu(w).abs())
    tol = torch.finfo(like.dtype).eps
    wrong = (own - right).abs() > 1e6 * tol * size + 100 * tol * size.amax(1, keepdim=True)
    return not bool((wrong & right.isfinite() & size.isfinite()).any())


def _pattern(name: str, M: Any) -> Pattern:
    """Return the places of the entries of a matrix."""
    if not isinstance(M, Tensor) and not hasattr(M, "tocsr"):
        M = torch.as_tensor(M)
    if isinstance(M, Tensor):
        M = M.detach().cpu()
        if M.layout == torch.strided:
            M = M.double()
    if len(M.shape) != 2:
        raise InputError(f"{name} has shape {tuple(M.shape)}, expected a matrix.")
    return sparse_argument(name, M, torch.device("cpu")).pattern


def _united(rows: Tensor, columns: Tensor, shape: tuple[int, int]) -> Pattern:
    """Return the pattern of a list of places that may hold some of them twice."""
    places = torch.unique(rows * shape[1] + columns)
    return Pattern(places // max(shape[1], 1), places % max(shape[1], 1), shape)
