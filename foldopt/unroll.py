"""The baselines of the paper: unrolling (section 2) and fixed-point unfolding (sections 3 and 4)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from foldopt.checks import require_whole
from foldopt.errors import FixedPointError, LinearSolveError
from foldopt.fixed_point import FoldInfo, apply_policy, masked
from foldopt.fold import FixedPointLayer
from foldopt.linear_solve import LinearSolveInfo
from foldopt.linear_solve.base import relative
from foldopt.step import State, Tensors, flatten, unflatten
from foldopt.transforms import transformed


class IteratedLayer(FixedPointLayer):
    """Records `iterations` update steps on the graph; made by `unroll` and `unfold`."""

    def __init__(self, *args: Any, iterations: int, from_solution: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        require_whole("iterations", iterations, 1)
        self.iterations, self.from_solution = iterations, from_solution
        self._arrived: tuple[FoldInfo, Tensor] | None = None

    def layer(self, *params: Tensor) -> State:
        """Return the state after the recorded steps; see `unroll` and `unfold`."""
        cast, answer = self.cast(params)
        state, single = self.solved(cast)
        step, tensors = self.step_for(single, cast)
        hold = self.on_failure in ("nan", "zero")
        lost = torch.zeros(len(state[0]), dtype=torch.bool, device=state[0].device)
        watched = self.from_solution and self.iterations > 1 and not transformed(*tensors)
        start = previous = state
        for k in range(self.iterations):
            previous, state = state, step(state, tensors)
            if k == 0 and self.from_solution:
                self.last = self.certify(previous, state)
                state = _hooked(state, self._note_last_term) if watched else state
            if hold:
                lost |= ~flatten(state).detach().isfinite().all(1)
                state = _where(~lost, state, previous)
        if self.from_solution:
            lost |= self._left(start, state)
        else:
            stepped = _where(~lost, state, tuple(torch.full_like(part, torch.nan) for part in state))
            self.last = self.certify(tuple(part.detach() for part in previous), stepped)
        info: Any = self.last
        if hold and not (ok := info.ok & ~lost).all():
            info.ok = ok
            _mask_gradient(state, ok, self.on_failure)
        if watched:
            state = _hooked(state, lambda g: setattr(self, "_arrived", (info, g.detach())))
        state = tuple(part.to(answer) for part in state)
        return state[0] if single else state

    def _left(self, start: Tensors, state: Tensors) -> Tensor:
        """Return which samples the steps carried away from the solution, (B,): where they diverge, rounding grows."""
        x, end = flatten(start).detach(), flatten(state).detach()
        moved = torch.linalg.vector_norm(end - x, dim=1) / (1 + torch.linalg.vector_norm(x, dim=1))
        left = ~(moved <= self.tolerance(x.dtype)) & cast(FoldInfo, self.last).ok
        if left.any():
            apply_policy(
                self.on_failure,
                FixedPointError,
                left,
                moved,
                f"{self.iterations} update steps from the solver's solution end {{worst:.1e}} away from it (relative)",
                "The iteration diverges there, and its backward pass too; fold the step, or take a smaller stepsize",
            )
        return left

    def _note_last_term(self, term: Tensor) -> None:
        """Certify the backward pass by its last term, the last one that LFPI adds: (Phi^T)^(K - 1) g (Theorem 1)."""
        (info, g), self._arrived = cast(tuple[FoldInfo, Tensor], self._arrived), None
        residual = relative(term.detach(), g).nan_to_num(nan=torch.inf)
        ok = residual < 1
        count = torch.full(residual.shape, self.iterations - 1, device=residual.device)
        info.backward = LinearSolveInfo("unfolding", count, residual, ok, torch.zeros_like(ok))
        if not (ok | ~info.ok).all():
            apply_policy(
                self.on_failure,
                LinearSolveError,
                ~ok,
                residual,
                f"the backward pass of unfolding diverges: the last of its {self.iterations} steps still adds "
                "{worst:.1e} times the incoming gradient",
                "Phi has a spectral radius of 1 or more; fold the step, or take a smaller stepsize",
            )


def _hooked(state: Tensors, hook: Callable[[Tensor], None]) -> Tensors:
    """Return the state, with a hook on the gradient of its flattened parts, (B, N)."""
    flat = flatten(state)
    if flat.requires_grad:
        flat.register_hook(hook)
    return unflatten(flat, state)


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

    By Theorem 1 its backward pass is LFPI on v = Phi^T v + g. Same signature and checks as `foldopt.fold`. Samples that
    the steps carry away from the solution by more than `tol` fall under `on_failure`. After a backward pass
    ``layer.last.backward`` has the last term that it added, relative to g, as its residual; where that is 1 or more the
    pass diverges, which "raise" and "warn" say, but "nan" and "zero" only mark as not ok.
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
