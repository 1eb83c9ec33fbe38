"""Batches of quadratic programs min 1/2 x'Hx + q'x, l <= Cx <= u: their equilibration and their KKT residual."""

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

ROUNDS = 10  # rounds of equilibration
SETTLED = 0.05  # equilibration ends when all factors of a round differ from 1 by less
INFINITE = 1e19  # a bound of this size, relative to the largest entry of its row, counts as infinite
TINY = 1e-300
ROUNDING = 1e-9  # right-hand sides this small beside the largest are attributed to rounding in the data
NOTHING = 1e-10  # x counts as zero if it is this small in units in which its size should be 1
ON_BOUND = 1e-12  # relative distance from a bound that is attributed to rounding


class Program(NamedTuple):
    """A batch of programs with H (B, n, n) symmetric, q (B, n), C (B, r, n), and l and u (B, r), in float64.

    H and C are both dense tensors, or both a `foldopt.qp.SparseMatrix`. A row with l = u is an equality. Bounds of the
    variables are rows with one entry. An infinite l or u means that there is no bound on that side.
    """

    H: Matrix
    q: Tensor
    C: Matrix
    lower: Tensor
    upper: Tensor

    @property
    def equality(self) -> Tensor:
        """The rows that are equalities, (B, r) bool."""
        return self.lower == self.upper

    def at(self, index: Tensor) -> Program:
        """Return the programs of the samples in `index`."""
        return Program(self.H[index], self.q[index], self.C[index], self.lower[index], self.upper[index])

    def detach(self) -> Program:
        """Return the programs detached from autograd's graph."""
        H, q, C, lower, upper = self
        return Program(H.detach(), q.detach(), C.detach(), lower.detach(), upper.detach())

    def snapped_to_bounds(self, x: Tensor, d: Tensor, typical: Tensor) -> Tensor:
        """Return x (B, n), set exactly to those bounds of single variables from which it differs by rounding only.

        d: (B, n), the units of the variables; in these units rounding is relative to the largest entry of x. typical:
        (B, 1), the size in these units that is assumed if x is zero.
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
        x[sample, at[sample, row]] = bound[sample, row] + 0.0  # turns -0 into 0
        return x


class Units(NamedTuple):
    """The units of equilibrated programs: x = d x', y = e y' / c, with d (B, n), e (B, r) and c (B, 1) powers of 2."""

    d: Tensor
    e: Tensor
    c: Tensor

    def at(self, index: Tensor) -> Units:
        """Return the units of the samples in `index`."""
        return Units(*(part[index] for part in self))

    def scaled(self, program: Program) -> Program:
        """Return the programs in these units."""
        d, e, c = self
        return Program(
            rescaled(program.H, c * d, d),
            c * d * program.q,
            rescaled(program.C, e, d),
            e * program.lower,
            e * program.upper,
        )


def equilibrate(program: Program, large: bool = False) -> Units:
    """Return units in which the columns of [H; C], the rows of C and x have a largest entry of about 1.

    Rows that bound a single variable do not influence the unit of that variable; they are scaled afterwards. The
    objective is scaled by the columns of H alone (by q in a linear program): neither a large penalty in q nor the unit
    of the objective can then make H so small that the linear solves confuse it with zero. One common factor of d
    remains free, and is set by the expected size of x: the median right-hand side of the equalities, else the smaller
    of the sizes that q and the bounds suggest. With `large` it is another guess: 1 if there are equalities, else the
    larger of the two sizes.

    Source: Ruiz, A scaling algorithm to equilibrate both rows and columns norms in matrices (2001), as in OSQP
    (Stellato et al., 2020, section 5.1).
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
    steep = (c * d * q).amax(1, keepdim=True)  # the size of the unconstrained x, as H has entries of about 1
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
    """Return whether all factors are so near 1 that rounding to powers of 2 hides the difference."""
    return bool(((factors - 1).abs() < SETTLED).all())


def _inverse_root(size: Tensor) -> Tensor:
    return torch.where(size > TINY, size, 1.0).rsqrt()


def _median(sizes: Tensor) -> Tensor:
    """Return the median (B, 1) of the finite sizes (B, k) that are not negligible beside the largest; 0 if none are."""
    if not sizes.shape[1]:
        return sizes.new_zeros(len(sizes), 1)
    finite = torch.where(sizes.isfinite(), sizes, 0)
    least = (ROUNDING * finite.amax(1, keepdim=True)).clamp(min=TINY)
    return torch.where(finite > least, finite, torch.nan).nanmedian(1, keepdim=True).values.nan_to_num()


class Sizes(NamedTuple):
    """The sizes by which residuals at a point are divided, see `sizes`: rows (B, r), columns (B, n), x (B, 1)."""

    rows: Tensor
    columns: Tensor
    x: Tensor


def sizes(program: Program, x: Tensor, y: Tensor) -> Sizes:
    """Return the size of the terms in each row of Cx and in each column of Hx + q + C'y, and the size of x.

    A size has the unit of its row or column, so that residuals relative to it do not depend on units. The size of a
    column is the sum of the absolute values in its three terms, but at most the largest of all terms; otherwise huge
    multipliers that cancel each other would hide any residual. The program has to be equilibrated, because a row or
    column of zeros gets the size of the others.
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
    """Return the largest relative violation of the KKT conditions of an equilibrated program at x and y (B, r), (B,).

    A multiplier y > 0 belongs to u, y < 0 to l. Feasibility is measured row by row and stationarity column by column,
    relative to `sizes`. The violation of complementarity is the smaller of a row's slack and its multiplier, because
    their product can be small though neither of them is.
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
    """Return the largest share of each row's multiplier in a column of the stationarity condition, (B, r)."""
    return y.abs() * largest_in_rows(C.abs(), 1 / columns) if C.shape[1] else y.abs()


def _largest(a: Tensor) -> Tensor:
    return a.amax(1) if a.shape[1] else a.new_zeros(len(a))
