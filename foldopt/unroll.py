"""The baselines of the paper: unrolling (section 2) and fixed-point unfolding (sections 3 and 4)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from foldopt.checks import require_whole
from foldopt.fixed_point import masked
from foldopt.fold import FixedPointLayer
from foldopt.step import State, Tensors, flatten


class IteratedLayer(FixedPointLayer):
    """Records `iterations` update steps on the graph; made by `unroll` and `unfold`."""

    def __init__(self, *args: Any, iterations: int, from_solution: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        require_whole("iterations", iterations, 1)
        self.iterations, self.from_solution = iterations, from_solution

    def layer(self, *params: Tensor) -> State:
        """Return the state after the recorded steps; see `unroll` and `unfold`."""
        cast, answer = self.cast(params)
        state, single = self.solved(cast)
        step, tensors = self.step_for(single, cast)
        hold = self.on_failure in ("nan", "zero")
        lost = torch.zeros(len(state[0]), dtype=torch.bool, device=state[0].device)
        previous = state
        for k in range(self.iterations):
            previous, state = state, step(state, tensors)
            if k == 0 and self.from_solution:
                self.last = self.certify(previous, state)
            if hold:
                lost |= ~flatten(state).detach().isfinite().all(1)
                state = _where(~lost, state, previous)
        if not self.from_solution:
            stepped = _where(~lost, state, tuple(torch.full_like(part, torch.nan) for part in state))
            self.last = self.certify(tuple(part.detach() for part in previous), stepped)
        if hold and not (ok := self.last.ok & ~lost).all():
            self.last.ok = ok
            _mask_gradient(state, ok, self.on_failure)
        state = tuple(part.to(answer) for part in state)
        return state[0] if single else state


def _where(ok: Tensor, good: Tensors, other: Tensors) -> Tensors:
    return tuple(torch.where(ok.view(-1, *[1] * (a.dim() - 1)), a, b) for a, b in zip(good, other, strict=True))


def _mask_gradient(state: Tensors, ok: Tensor, policy: str) -> None:
    for part in state:
        if part.requires_grad:
            part.register_hook(lambda g: masked((g,), ok, policy)[0])


def unroll(
    solve: Callable[..., State],
    update: Callable[..., State],
    *,
    iterations: int,
    tol: float | None = None,
    on_failure: str = "raise",
    dtype: torch.dtype | None = None,
    modules: Iterable[nn.Module] = (),
) -> IteratedLayer:
    """Unroll: run `iterations` steps from the starting point ``solve(*params)`` on the graph.

    Same signature and checks as `foldopt.fold`; time and memory of the backward grow with `iterations`. A sample that
    still moves by more than `tol` in the last step has not converged and falls under `on_failure`; with "nan" or "zero"
    a sample whose step is not finite keeps its last finite state.
    """
    return IteratedLayer(
        solve,
        update,
        iterations=iterations,
        from_solution=False,
        tol=tol,
        on_failure=on_failure,
        dtype=dtype,
        modules=modules,
    )


def unfold(
    solve: Callable[..., State],
    update: Callable[..., State],
    *,
    iterations: int,
    tol: float | None = None,
    on_failure: str = "raise",
    dtype: torch.dtype | None = None,
    modules: Iterable[nn.Module] = (),
) -> IteratedLayer:
    """Fixed-point unfolding: start at the solution ``solve(*params)`` and record `iterations` steps there.

    By Theorem 1 its backward pass is LFPI on v = Phi^T v + g. Same signature and checks as `foldopt.fold`.
    """
    return IteratedLayer(
        solve,
        update,
        iterations=iterations,
        from_solution=True,
        tol=tol,
        on_failure=on_failure,
        dtype=dtype,
        modules=modules,
    )
