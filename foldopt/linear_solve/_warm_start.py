"""Starting the adjoint solve of a training step from the one of the step before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from foldopt.errors import InputError
from foldopt.linear_solve._base import VJP, Iterative, LinearSolveInfo
from foldopt.linear_solve._phi import Phi


class WarmStart:
    """Remembers each sample's v and starts the next solve for that sample from it: for losses that change slowly.

    Samples are told apart by their place in the batch, or by the indices given to `samples`:

        solver = WarmStart(GMRES())
        layer = fold(solve, update, linear_solver=solver)
        for indices, inputs in batches:
            with solver.samples(indices):
                layer(network(inputs)).sum().backward()

    The answer is that of the solver inside to its tolerance, so runs that resume without the memory agree to that
    tolerance only. A remembered v that is worse than none (another state size, dtype or device; a residual above ||g||)
    is not used.

    Args:
        solver: LFPI, Anderson, GMRES or BiCGSTAB, with their settings.
    """

    def __init__(self, solver: Iterative) -> None:
        if not isinstance(solver, Iterative):
            raise InputError(
                f"solver={solver!r} does not start from anything; give WarmStart an LFPI, Anderson, GMRES or BiCGSTAB."
            )
        self.solver: Any = solver
        self._indices: Tensor | None = None
        self._memory: Tensor | None = None

    @contextmanager
    def samples(self, indices: Tensor) -> Iterator[None]:
        """Take the batches solved for inside to be these samples: (B,) whole numbers >= 0, such as dataset indices."""
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
        """Solve for v; see the docstring of `foldopt.linear_solve`."""
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
