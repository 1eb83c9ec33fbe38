"""A solver that starts from the solution of the previous training step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from foldopt.errors import InputError
from foldopt.linear_solve._base import VJP, Iterative, LinearSolveInfo
from foldopt.linear_solve._phi import Phi

__all__ = ["WarmStart"]


class WarmStart:
    """Remember each sample's v and start the next solve for that sample there, for losses that change slowly.

    A sample is its position in the batch, or an index that `samples` is given. The answer is that of the inner solver
    up to its tolerance; so a run that resumes without this memory agrees up to that tolerance only. A remembered v is
    not used if it has another size, dtype or device, or a residual above ||g||.

    Args:
        solver: an instance of `LFPI`, `Anderson`, `GMRES` or `BiCGSTAB`.

    Raises:
        InputError: solver is something else, or, when called, the indices do not fit the batch.

    Examples:
        >>> solver = foldopt.linear_solve.WarmStart(foldopt.linear_solve.GMRES())
        >>> layer = foldopt.fold(torch.sqrt, lambda x, c: 0.5 * (x + c / x), linear_solver=solver)
        >>> c = torch.tensor([[4.0], [9.0]], requires_grad=True)
        >>> with solver.samples(torch.tensor([7, 3])):  # positions in the data set
        ...     layer(c).sum().backward()
        >>> c.grad
        tensor([[0.2500],
                [0.1667]])
    """

    def __init__(self, solver: Iterative) -> None:
        if not isinstance(solver, Iterative):
            raise InputError(
                f"solver={solver!r} cannot start from a given v; pass an instance of LFPI, Anderson, GMRES or BiCGSTAB."
            )
        self.solver: Any = solver
        self._indices: Tensor | None = None
        self._memory: Tensor | None = None

    @contextmanager
    def samples(self, indices: Tensor) -> Iterator[None]:
        """Return a context in which the samples of all batches are those of the given indices.

        Args:
            indices: (B,) whole numbers of at least 0, such as positions in a data set.

        Raises:
            InputError: they are something else.
        """
        if indices.dim() != 1 or indices.is_floating_point() or (len(indices) and int(indices.min()) < 0):
            raise InputError(
                f"indices of shape {tuple(indices.shape)} and dtype {indices.dtype}: expected (B,) whole numbers >= 0."
            )
        before, self._indices = self._indices, indices
        try:
            yield
        finally:
            self._indices = before

    def __call__(self, vjp: VJP, g: Tensor, phi: Phi | None = None) -> tuple[Tensor, LinearSolveInfo]:
        """Solve for v; arguments and results are described in `foldopt.linear_solve`."""
        batch, n = g.shape
        indices = torch.arange(batch) if self._indices is None else self._indices
        if len(indices) != batch:
            raise InputError(f"WarmStart.samples got {len(indices)} indices, but the batch has {batch} samples.")
        indices = indices.to(g.device)
        memory = self._memory
        if memory is None or memory.shape[1] != n or memory.dtype != g.dtype or memory.device != g.device:
            memory = g.new_full((0, n), torch.nan)
        missing = (int(indices.max()) + 1 if batch else 0) - len(memory)
        if missing > 0:
            memory = torch.cat([memory, g.new_full((missing, n), torch.nan)])
        known = memory[indices]
        guess = torch.where(known.isfinite().all(1, keepdim=True), known, g)
        v, info = self.solver(vjp, g, phi, guess)
        memory[indices] = torch.where(info.ok[:, None], v, torch.nan)
        self._memory = memory
        return v, info._replace(method=f"{info.method} (warm)")
