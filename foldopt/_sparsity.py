"""The derivatives of a smooth program as sparse matrices, read off a few products with them.

Rows of a Jacobian that have no column in common share one product with its transpose (Curtis, Powell and Reid, On the
estimation of sparse Jacobian matrices, 1974): each value of the product belongs to one entry. Which rows go together
is a coloring of a graph, here a greedy one (Gebremedhin, Manne and Pothen, What color is your Jacobian?, 2005). A
column of many entries would keep all its rows apart; it has a product of its own, with the matrix itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foldopt.errors import InputError
from foldopt.qp._kkt import probe
from foldopt.qp._structure import taken
from foldopt.qp.matrix import Pattern, SparseMatrix
from foldopt.step import Recorded, pushforward, vjp_of
from foldopt.updates.programs import SmoothProgram

Product = Callable[[Tensor], Tensor]


class Model(NamedTuple):
    """The quadratic model of a program at (x, y): eq. (31), batched, with sparse matrices; float64, on the CPU.

    gradient of f (B, n), Hessian H of the Lagrangian (B, n, n), constraints c = (h, g) (B, r) and Jacobian C (B, r, n).
    """

    gradient: Tensor
    H: SparseMatrix
    c: Tensor
    C: SparseMatrix


class Sparsity:
    """Where the derivatives of a smooth program may have entries that are not zero.

    Args:
        hessian: of the Lagrangian, (n, n), one triangle or both. inequalities, equalities: their Jacobians, (m, n) and
            (p, n); None if there are none. Matrices of scipy, torch (sparse or dense) or numpy, of which only the
            places of the entries matter; a zero that is stored counts as an entry.

    `Sparsity.detected` finds them by itself.
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
        self._take(H, C, top)

    def _take(self, H: Pattern, C: Pattern, n_equalities: int) -> None:
        eye = torch.arange(H.shape[1])
        self.H = _united(torch.cat([H.rows, H.columns, eye]), torch.cat([H.columns, H.rows, eye]), H.shape)
        self.C = _united(C.rows, C.columns, C.shape)
        self.n_equalities = n_equalities
        self._readings = Reading(self.H), Reading(self.C)

    @classmethod
    def detected(cls, program: SmoothProgram, x: Tensor, *params: Tensor) -> Sparsity:
        """Find the places by a product for every variable and every constraint, at a point near x (B, n).

        An entry that is zero in all samples at that point, though not at others, is missed; what uses the places
        compares the matrices with a product and does not go on with a wrong one.
        """
        near = x + 1e-3 * (1 + x.abs()) * probe(x.shape[1], x)
        _, h, g = program.values(near, *params)
        p, r = h.shape[1], h.shape[1] + g.shape[1]
        at = Derivatives(program, near, params)
        hessian = at.hessian(1 + 0.5 * probe(r, x).expand(len(x), r))
        found = cls.__new__(cls)
        found._take(_found(hessian.pull, x.shape[1], near), _found(at.jacobian.pull, r, near), p)
        return found

    def united(self, other: Sparsity) -> Sparsity:
        """Return the places of both, for programs of the same size."""
        H, C = (
            Pattern(torch.cat([a.rows, b.rows]), torch.cat([a.columns, b.columns]), a.shape)
            for a, b in ((self.H, other.H), (self.C, other.C))
        )
        found = copy.copy(self)
        found._take(H, C, self.n_equalities)
        return found

    def __len__(self) -> int:
        return len(self.H.rows) + len(self.C.rows)

    @property
    def products(self) -> tuple[int, int]:
        """How many products the Hessian and the Jacobian of the constraints are read off."""
        return self._readings[0].products, self._readings[1].products

    def model(self, program: SmoothProgram, x: Tensor, y: Tensor, params: Sequence[Tensor]) -> tuple[Model, bool]:
        """Return the model of a program at x (B, n) and y = (nu, lam) (B, r), and whether the places are all there.

        Raises InputError if the program is of another size.
        """
        shapes = self.H.shape[1], self.C.shape[0], self.n_equalities
        p = program.values(x, *params)[1].shape[1]
        if shapes != (x.shape[1], y.shape[1], p):
            raise InputError(
                f"sparsity= is of {shapes[0]} variables, {shapes[2]} equalities and {shapes[1] - shapes[2]} "
                f"inequalities, but the program has {x.shape[1]}, {p} and {y.shape[1] - p}."
            )
        at = Derivatives(program, x, params)
        (C, first), (H, second) = self.jacobian(at), self.hessian(at, y)
        return Model(_plain(at.gradient), H, _plain(at.c), C), first and second

    def jacobian(self, at: Derivatives) -> tuple[SparseMatrix, bool]:
        """Return the Jacobian of the constraints (B, r, n), and whether its places are all there."""
        return _read(self._readings[1], at.jacobian, at.x, at.c)

    def hessian(self, at: Derivatives, y: Tensor, weight: float = 1.0) -> tuple[SparseMatrix, bool]:
        """Return the Hessian of weight * f + y.c (B, n, n) for y (B, r), and whether its places are all there."""
        return _read(self._readings[0], at.hessian(y, weight), at.x, at.x)


class SparseDerivatives:
    """The sparse derivatives of a program; places that were not given are found at the first call.

    Args:
        program: the functions.
        sparsity: where their derivatives have entries; None to find the places, and more of them wherever a later
            point shows that some are missing.

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
        """Return the places; x (B, n) is where they are looked for if none are known yet."""
        if self.sparsity is None:
            self.sparsity = Sparsity.detected(self.program, x, *params)
        return self.sparsity

    def extend(self, x: Tensor, params: Sequence[Tensor]) -> None:
        """Add the places that are found near x (B, n).

        Raises InputError if the places were given, or if there are no others.
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
        """Return the quadratic model at x (B, n) and y = (nu, lam) (B, r).

        Raises InputError if the places were given and are not all.
        """
        params = [part.detach() for part in params]
        model, complete = self.places(x, params).model(self.program, x, y, params)
        while not complete:  # entries that were zero where they were looked for
            self.extend(x, params)
            model, complete = self.places(x, params).model(self.program, x, y, params)
        return model


class Derivative(NamedTuple):
    """A Jacobian J (B, m, n) as products: pull(s) = J's, (B, m) to (B, n), and push(t) = J t."""

    pull: Product
    push: Product

    @classmethod
    def of(cls, value: Tensor, x: Tensor) -> Derivative:
        """Return that of a recorded value (B, m) with respect to x (B, n)."""
        recorded = Recorded((value,), (x,), ())

        def pull(s: Tensor) -> Tensor:
            pulled = vjp_of(recorded, (x,), (s,))[0]
            return torch.zeros_like(x) if pulled is None else pulled

        return cls(pull, lambda t: pushforward(recorded, (x,))((t,))[0])


class Derivatives:
    """Of a program, recorded at x (B, n): gradient of f (B, n), constraints c (B, r), their Jacobian, Hessians.

    They pass no gradient.
    """

    def __init__(self, program: SmoothProgram, x: Tensor, params: Sequence[Tensor]) -> None:
        params = [p.detach() for p in params]
        with torch.enable_grad():
            self.x = x.detach().requires_grad_()
            self._f, self.c = program.objective(self.x, *params).sum(), program.constraints(self.x, *params)
            self.gradient = _gradient(self._f, self.x)
        self.jacobian = Derivative.of(self.c, self.x)

    def hessian(self, y: Tensor, weight: float = 1.0) -> Derivative:
        """Return the Hessian of weight * f + y.c for y (B, r)."""
        with torch.enable_grad():
            slope = _gradient(weight * self._f + (y.detach() * self.c).sum(), self.x)
        return Derivative.of(slope, self.x)


def _gradient(value: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of a number, recorded."""
    if not value.requires_grad:
        return torch.zeros_like(x)
    return torch.autograd.grad(value, x, create_graph=True, materialize_grads=True)[0]


class Reading:
    """How the values of a Jacobian of a known pattern are read off products."""

    def __init__(self, pattern: Pattern) -> None:
        self.pattern = pattern
        by_rows, by_columns = _Groups.of(pattern), _Groups.of(pattern.transposed)
        self._transposed = by_columns.products < by_rows.products
        self._groups = by_columns if self._transposed else by_rows

    @property
    def products(self) -> int:
        """How many there are."""
        return self._groups.products

    def matrix(self, of: Derivative, like: Tensor) -> SparseMatrix:
        """Return the Jacobian; like: a tensor of the batch, dtype and device of its arguments."""
        first, second = (of.push, of.pull) if self._transposed else (of.pull, of.push)
        found = [
            _plain(product(seed.to(like).expand(len(like), -1)))
            for seeds, product in ((self._groups.seeds, first), (self._groups.alone, second))
            for seed in seeds
        ]
        values = torch.cat(found, 1) if found else torch.zeros(len(like), 0, dtype=torch.float64)
        return SparseMatrix(self.pattern, values.index_select(1, self._groups.places))


class _Groups(NamedTuple):
    """Rows of a pattern in groups without a common column, and columns that are left out of that.

    seeds: (k, m), for products with the transpose; alone: (d, n), for products with the matrix, which follow. places:
    (nnz,), of the pattern's entries in these products side by side.
    """

    seeds: Tensor
    alone: Tensor
    places: Tensor

    @classmethod
    def of(cls, pattern: Pattern) -> _Groups:
        m, n = pattern.shape
        rows, columns = pattern.rows, pattern.columns
        degrees, order = torch.bincount(columns, minlength=n).sort(descending=True)
        # At least as many groups as entries in the fullest column that is left.
        d = int((torch.arange(n) + degrees).argmin()) if n else 0
        own = torch.full((n,), -1, dtype=torch.long)
        own[order[:d]] = torch.arange(d)
        shared = own[columns] < 0
        color = _colored(rows[shared], columns[shared], m, n)
        count = int(color.max()) + 1 if m and bool(shared.any()) else 0
        seeds = torch.zeros(count, m, dtype=torch.float64)
        taking_part = rows[shared].unique()
        seeds[color[taking_part], taking_part] = 1
        alone = torch.zeros(d, n, dtype=torch.float64)
        alone[torch.arange(d), order[:d]] = 1
        places = torch.where(shared, color[rows] * n + columns, count * n + own[columns] * m + rows)
        return cls(seeds, alone, places)

    @property
    def products(self) -> int:
        return len(self.seeds) + len(self.alone)


def _colored(rows: Tensor, columns: Tensor, m: int, n: int) -> Tensor:
    """Return a color of every row, (m,), such that rows of one color have no column in common; fullest rows first."""
    entries: list[list[int]] = [[] for _ in range(m)]
    for i, j in zip(rows.tolist(), columns.tolist(), strict=True):
        entries[i].append(j)
    taken_by = [0] * n  # colors of a column's rows, as bits
    color = [0] * m
    for i in sorted(range(m), key=lambda i: -len(entries[i])):
        forbidden = 0
        for j in entries[i]:
            forbidden |= taken_by[j]
        free = ~forbidden & (forbidden + 1)
        color[i] = free.bit_length() - 1
        for j in entries[i]:
            taken_by[j] |= free
    return torch.tensor(color, dtype=torch.long)


def _found(pull: Product, m: int, like: Tensor) -> Pattern:
    """Return the places where a Jacobian (m, n) has entries in some sample."""
    columns = []
    for i in range(m):
        seed = torch.zeros_like(like[0, :1]).expand(m).clone()
        seed[i] = 1
        columns.append((pull(seed.expand(len(like), -1)) != 0).any(0).nonzero()[:, 0].cpu())
    counts = torch.tensor([len(part) for part in columns], dtype=torch.long)
    none = torch.zeros(0, dtype=torch.long)
    return Pattern(torch.arange(m).repeat_interleave(counts), torch.cat([none, *columns]), (m, like.shape[1]))


def _read(reading: Reading, of: Derivative, x: Tensor, value: Tensor) -> tuple[SparseMatrix, bool]:
    """Return a Jacobian at x (B, n) of a value (B, m), and whether it has the derivative's product."""
    M = reading.matrix(of, x.detach())
    return M, _agrees(M, of.pull, value.detach())


def _agrees(M: SparseMatrix, pull: Product, like: Tensor) -> bool:
    """Whether a sparse matrix gives the same product as the derivative, in samples that are finite."""
    w = probe(like.shape[1], like).expand_as(like)
    own, right = M.mT.matvec(_plain(w)), _plain(pull(w))
    if not own.numel():
        return True
    size = M.mT.abs().matvec(_plain(w).abs())
    tol = torch.finfo(like.dtype).eps
    wrong = (own - right).abs() > 1e6 * tol * size + 100 * tol * size.amax(1, keepdim=True)
    return not bool((wrong & right.isfinite() & size.isfinite()).any())


def _plain(t: Tensor) -> Tensor:
    return t.detach().double().cpu()


def _pattern(name: str, M: Any) -> Pattern:
    """Return the places of a matrix's entries."""
    if not isinstance(M, Tensor) and not hasattr(M, "tocsr"):
        M = torch.as_tensor(M)
    if isinstance(M, Tensor):
        M = M.detach().cpu()
        if M.layout == torch.strided:
            M = M.double()
    if len(M.shape) != 2:
        raise InputError(f"{name} has shape {tuple(M.shape)}, expected a matrix.")
    return taken(name, M, torch.device("cpu")).pattern


def _united(rows: Tensor, columns: Tensor, shape: tuple[int, int]) -> Pattern:
    """Return the pattern of places that may be there more than once."""
    places = torch.unique(rows * shape[1] + columns)
    return Pattern(places // max(shape[1], 1), places % max(shape[1], 1), shape)
