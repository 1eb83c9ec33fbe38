"""A batch of quadratic programs min 1/2 x'Hx + q'x subject to l <= Cx <= u, its equilibration and its KKT residual."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from foldopt.batched import matvec
from foldopt.qp._operations import (
    Matrix,
    largest_in_columns,
    largest_in_rows,
    masked_rows,
    numbers,
    rescaled,
    several_entries,
    single_entries,
)

ROUNDS, SETTLED = 10, 0.05  # of equilibration; the factors of a round that are none
INFINITE = 1e19  # a bound this far away, in units of its row, bounds nothing
TINY = 1e-300
ROUNDING = 1e-9  # a right-hand side this small beside the largest is rounding in the data
NOTHING = 1e-10  # an x this small, in units in which its size should be 1, counts as zero
ON_BOUND = 1e-12  # distance from a bound, relative to x, that is rounding


class Program(NamedTuple):
    """H (B, n, n) symmetric, q (B, n), C (B, r, n), lower l and upper u (B, r), float64; l = u is an equality.

    H and C are both dense tensors, or both a `foldopt.qp.matrix.SparseMatrix`. Bounds of the variables are rows with
    one entry. Infinite l or u: no bound on that side.
    """

    H: Matrix
    q: Tensor
    C: Matrix
    lower: Tensor
    upper: Tensor

    @property
    def equality(self) -> Tensor:
        """Which rows are equalities, (B, r) bool."""
        return self.lower == self.upper

    def at(self, index: Tensor) -> Program:
        """Return the programs of some samples."""
        return Program(self.H[index], self.q[index], self.C[index], self.lower[index], self.upper[index])

    def detach(self) -> Program:
        """Return the program without gradients."""
        H, q, C, lower, upper = self
        return Program(H.detach(), q.detach(), C.detach(), lower.detach(), upper.detach())

    def snapped_to_bounds(self, x: Tensor, d: Tensor, typical: Tensor) -> Tensor:
        """Return x (B, n) put exactly on the bounds of single variables that it is on up to rounding.

        d: (B, n), the units of the variables, in which the error of x is relative to the largest. typical: (B, 1), the
        size in these units that an x which is zero would have.
        """
        if not self.C.shape[1]:
            return x
        single, at, entry = single_entries(self.C)
        if not single.any():
            return x
        at = at.expand_as(self.lower)
        here = x.gather(1, at)
        low, high = self.lower / entry, self.upper / entry
        bound = torch.where((here - low).abs() < (here - high).abs(), low, high)
        largest = (x / d).abs().amax(1, keepdim=True)
        largest = torch.where(largest > NOTHING * typical, largest, typical)
        reach = here.abs() + bound.abs() + (d * largest).gather(1, at)
        near = single & bound.isfinite() & ((here - bound).abs() <= ON_BOUND * reach)
        sample, row = near.nonzero(as_tuple=True)
        x = x.clone()
        x[sample, at[sample, row]] = bound[sample, row] + 0.0  # and no -0
        return x


class Units(NamedTuple):
    """The units of an equilibrated program: x = d x', y = e y' / c, for d (B, n), e (B, r), c (B, 1), powers of 2."""

    d: Tensor
    e: Tensor
    c: Tensor

    def at(self, index: Tensor) -> Units:
        """Return the units of some samples."""
        return Units(*(part[index] for part in self))

    def scaled(self, program: Program) -> Program:
        """Return the program in these units."""
        d, e, c = self
        return Program(
            rescaled(program.H, c * d, d),
            c * d * program.q,
            rescaled(program.C, e, d),
            e * program.lower,
            e * program.upper,
        )


def equilibrate(program: Program, large: bool = False) -> Units:
    """Return the units in which the columns of [H; C] and the rows of C have a largest entry of about 1, and x too.

    A bound of a single variable says nothing of that variable's unit and follows it. The cost is scaled by the columns
    of H alone (by q in a linear program), so that neither a penalty in q nor a unit of the objective pushes H below
    what the linear solves can tell from zero. The one number that is left free is set by the size that x will have:
    that of equalities, else the lesser of what q and the bounds suggest. `large` is another guess: 1 where there are
    equalities, else the larger of the two. Ruiz, A scaling algorithm to equilibrate both rows and columns norms in
    matrices (2001), as in OSQP (Stellato et al., 2020, 5.1).
    """
    H, q, C = program.H.abs(), program.q.abs(), program.C.abs()
    several = several_entries(C)
    rows = masked_rows(C, several)
    d, e, c = torch.ones_like(q), torch.ones_like(program.lower), torch.ones_like(q[:, :1])

    def cost() -> Tensor:
        columns = c * d * largest_in_columns(H, d)
        curved = columns > 0
        mean = columns.sum(1) / curved.sum(1).clamp(min=1)
        size = torch.where(curved.any(1), mean, (c * d * q).amax(1))[:, None]
        return torch.where(size > TINY, size, 1.0)

    for _ in range(ROUNDS):
        largest = c * d * largest_in_columns(H, d)
        if C.shape[1]:
            largest = torch.maximum(largest, d * largest_in_columns(rows, e))
            rows_by = _inverse_root(e * largest_in_rows(rows, d))
            e = e * rows_by
        columns_by = _inverse_root(largest)
        d = d * columns_by
        c = c / cost()
        if _settled(columns_by) and (not C.shape[1] or _settled(rows_by)):
            break
    if C.shape[1]:
        own = largest_in_rows(C, d)
        e = torch.where(~several & (own > TINY), 1 / own.clamp(min=TINY), e)
    ends = e * program.lower.abs(), e * program.upper.abs()
    steep = (c * d * q).amax(1, keepdim=True)  # the size of x without rows, where H has entries of 1
    steep = torch.where(numbers(H).any(1, keepdim=True), steep, 0)
    both = torch.cat([steep, _median(torch.cat(ends, 1))], 1)
    both = torch.where(both > TINY, both, both.amax(1, keepdim=True))
    size = both.amax(1, keepdim=True) if large else both.amin(1, keepdim=True)
    typical = _median(torch.where(program.equality, ends[1], 0))
    given = torch.ones_like(typical) if large else typical
    typical = torch.where(typical > TINY, given, torch.where(size > TINY, size, 1.0))
    d, e = d * typical, e / typical
    c = c / cost()
    return Units(*(torch.exp2(torch.log2(part).round()) for part in (d, e, c)))


def _settled(factors: Tensor) -> bool:
    """Whether all factors are 1 up to what rounding to powers of 2 does not see."""
    return bool(((factors - 1).abs() < SETTLED).all())


def _inverse_root(size: Tensor) -> Tensor:
    return torch.where(size > TINY, size, 1.0).rsqrt()


def _median(sizes: Tensor) -> Tensor:
    """Return the median of those sizes (B, k) that are finite and no rounding beside the largest, (B, 1).

    0 if there are none.
    """
    if not sizes.shape[1]:
        return sizes.new_zeros(len(sizes), 1)
    finite = torch.where(sizes.isfinite(), sizes, 0)
    least = (ROUNDING * finite.amax(1, keepdim=True)).clamp(min=TINY)
    return torch.where(finite > least, finite, torch.nan).nanmedian(1, keepdim=True).values.nan_to_num()


class Sizes(NamedTuple):
    """What residuals are relative to at a point (x, y): see `sizes`. rows (B, r), columns (B, n), x (B, 1)."""

    rows: Tensor
    columns: Tensor
    x: Tensor


def sizes(program: Program, x: Tensor, y: Tensor) -> Sizes:
    """Return the sizes of the terms in each row of Cx and each column of Hx + q + C'y, and that of x.

    They scale with the units of their row or column, so that what is relative to them does not depend on units. A
    column is measured by the sums of absolute values in its three terms, but by no more than the largest of all terms:
    huge multipliers that cancel would excuse everything. To be called with an equilibrated program: a row or column of
    zeros is measured by the size of the others.
    """
    absolute = x.abs()
    largest = absolute.amax(1, keepdim=True)
    x_size = torch.where(largest > NOTHING, largest, 1.0)
    reach = matvec(program.C.abs(), absolute)
    rows = torch.maximum(reach, 1e-3 * x_size * largest_in_rows(program.C.abs()))
    terms = matvec(program.H, x), program.q, matvec(program.C.mT, y)
    net = torch.stack([term.abs() for term in terms]).amax(0)
    force = program.q.abs().amax(1, keepdim=True)
    force = torch.where(force > 0, force, 1.0)
    net = torch.maximum(net, torch.where(net.amax(1, keepdim=True) > 1e-10 * force, 0, force))
    sums = matvec(program.H.abs(), absolute) + program.q.abs() + matvec(program.C.abs().mT, y.abs())
    columns = torch.maximum(net, torch.minimum(sums, net.amax(1, keepdim=True))).clamp(min=TINY)
    return Sizes(rows.clamp(min=TINY), torch.maximum(columns, 1e-8 * columns.amax(1, keepdim=True)), x_size)


def residual(program: Program, x: Tensor, y: Tensor) -> Tensor:
    """Return the worst relative violation of the KKT conditions, (B,), of an equilibrated program at x and y (B, r).

    y > 0 pushes against u, y < 0 against l. Feasibility is judged row by row, stationarity column by column (see
    `sizes`), complementarity by the lesser of a row's slack and of its multiplier: their product would be small where
    neither is.
    """
    z = matvec(program.C, x)
    y = torch.where(program.upper.isfinite(), y, y.clamp(max=0))
    y = torch.where(program.lower.isfinite(), y, y.clamp(min=0))
    size = sizes(program, x, y)
    bound = torch.where(y > 0, program.upper, program.lower)
    bound = torch.where(bound.isfinite(), bound, z)
    outside = torch.maximum(z - program.upper, program.lower - z).clamp(min=0)
    crossed = torch.where(z > program.upper, program.upper, torch.where(z < program.lower, program.lower, 0.0))
    stationarity = matvec(program.H, x) + program.q + matvec(program.C.mT, y)
    both = torch.minimum((z - bound).abs() / size.rows, weight(program.C, y, size.columns))
    worst = torch.stack(
        [
            _largest(outside / (size.rows + crossed.abs())),
            _largest(stationarity.abs() / size.columns),
            _largest(both),
        ]
    ).amax(0)
    return worst.nan_to_num(nan=torch.inf)


def weight(C: Matrix, y: Tensor, columns: Tensor) -> Tensor:
    """Return how much each row's multiplier matters, (B, r): in the column where it does most, relative to that."""
    return y.abs() * largest_in_rows(C.abs(), 1 / columns) if C.shape[1] else y.abs()


def _largest(a: Tensor) -> Tensor:
    return a.amax(1) if a.shape[1] else a.new_zeros(len(a))
