"""The feasible sets of the linear programs: shortest paths on a grid, knapsacks, assignments."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foldopt.checks import require_whole
from foldopt.errors import InputError

F64 = torch.float64


@dataclass(frozen=True)
class Polytope:
    """The set {x : A x = b, G x <= h, 0 <= x <= upper}, float64.

    A: (k, n), of full row rank. b: (k,). G: (m, n). h: (m,). upper: a number above 0, or inf. whole: whether decisions
    are whole numbers; the program that is trained through is the relaxation without that.
    """

    A: Tensor
    b: Tensor
    G: Tensor
    h: Tensor
    upper: float
    whole: bool = False

    @property
    def n(self) -> int:
        """The number of variables."""
        return self.A.shape[1]


def shortest_path(rows: int, columns: int) -> Polytope:
    """Return the paths from the north-west to the south-east corner of a grid whose edges lead east and south.

    The edges are numbered row by row, those that lead east before those that lead south, as in PyEPO. The balance of
    the last node follows from the others' and is left out.
    """
    require_whole("task.rows", rows, 2)
    require_whole("task.columns", columns, 2)
    edges = []
    for i in range(rows):
        edges += [(i * columns + j, i * columns + j + 1) for j in range(columns - 1)]
        if i < rows - 1:
            edges += [(i * columns + j, (i + 1) * columns + j) for j in range(columns)]
    A = torch.zeros(rows * columns, len(edges), dtype=F64)
    for number, (tail, head) in enumerate(edges):
        A[tail, number], A[head, number] = 1.0, -1.0
    b = torch.zeros(rows * columns, dtype=F64)
    b[0] = 1.0
    n = len(edges)
    return Polytope(A[:-1], b[:-1], torch.zeros(0, n, dtype=F64), torch.zeros(0, dtype=F64), torch.inf)


def knapsack(weights: Tensor, capacity: float) -> Polytope:
    """Return the sets of items whose weights (dimensions, items) sum to at most `capacity` in each dimension."""
    if not 0 < capacity < float("inf"):
        raise InputError(f"task.capacity={capacity}: a knapsack holds a positive weight.")
    n = weights.shape[1]
    none = torch.zeros(0, n, dtype=F64), torch.zeros(0, dtype=F64)
    return Polytope(*none, weights.double(), torch.full((len(weights),), float(capacity), dtype=F64), 1.0, whole=True)


def assignment(size: int) -> Polytope:
    """Return the assignments of `size` workers to as many jobs, x[i * size + j] = 1 where worker i does job j.

    The last job's row follows from the others and is left out.
    """
    require_whole("task.size", size, 2)
    eye, ones = torch.eye(size, dtype=F64), torch.ones(1, size, dtype=F64)
    A = torch.cat([torch.kron(eye, ones), torch.kron(ones, eye)])[:-1]
    n = size * size
    return Polytope(
        A, torch.ones(len(A), dtype=F64), torch.zeros(0, n, dtype=F64), torch.zeros(0, dtype=F64), torch.inf
    )
