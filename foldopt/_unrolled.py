"""Differentiation through recorded steps: unrolling (paper section 2) and fixed-point unfolding (sections 3 and 4)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from foldopt._certificates import FoldInfo, apply_policy, masked
from foldopt._compat import transforming
from foldopt._layer import TOLERANCE, LayerCall
from foldopt.checks import require_whole
from foldopt.errors import FixedPointError, LinearSolveError
from foldopt.linear_solve import LinearSolveInfo
from foldopt.linear_solve._base import relative
from foldopt.step import Tensors, flatten, unflatten

__all__ = ["Unrolled"]


@dataclass(frozen=True)
class Unrolled:
    """Record several update steps and let autograd differentiate through them: the derivative of `unroll` and `unfold`.

    Args:
        iterations: number of steps, at least 1.
        from_solution: True if the steps start at the solution (unfolding), False if they start at a starting point
            (unrolling); default False.

    Raises:
        InputError: iterations is not a whole number of at least 1.

    Source: paper, sections 2 to 4.

    Examples:
        >>> derivative = foldopt.Unrolled(iterations=8)
        >>> layer = foldopt.FixedPointLayer(torch.ones_like, lambda x, c: 0.5 * (x + c / x), derivative)
        >>> layer(torch.tensor([[4.0]]))
        tensor([[2.]])
    """

    iterations: int
    from_solution: bool = False

    def __post_init__(self) -> None:
        require_whole("iterations", self.iterations, 1)

    def __call__(self, call: LayerCall) -> tuple[Tensors, FoldInfo]:
        """Return the state after the recorded steps and its certificates."""
        layer = call.layer
        start = previous = state = call.solve(call.tensors)
        hold = layer.on_failure in ("nan", "zero")
        lost = torch.zeros(len(state[0]), dtype=torch.bool, device=state[0].device)
        watched = self.from_solution and self.iterations > 1 and not transforming(*call.tensors)
        certificate = _BackwardCertificate(self.iterations, layer.on_failure)
        for k in range(self.iterations):
            previous, state = state, call.step(state, call.tensors)
            if k == 0 and self.from_solution:
                certificate.info = layer.certify(previous, state)
                state = _hooked(state, certificate.end) if watched else state
            if hold:
                lost |= ~flatten(state).detach().isfinite().all(1)
                state = _where(~lost, state, previous)
        if certificate.info is not None:
            info, tol = certificate.info, layer.tol or TOLERANCE[state[0].dtype]
            lost |= self._diverged(start, state, info, tol, layer.on_failure)
        else:
            stepped = _where(~lost, state, tuple(torch.full_like(part, torch.nan) for part in state))
            info = layer.certify(tuple(part.detach() for part in previous), stepped)
        if hold and not (solved := info.solved & ~lost).all():
            info.solved = solved
            _mask_gradient(state, solved, layer.on_failure)
        return _hooked(state, certificate.begin) if watched else state, info

    def _diverged(self, start: Tensors, state: Tensors, info: FoldInfo, tol: float, policy: str) -> Tensor:
        """Return which samples the steps carried away from the solution, (B,): divergence amplifies rounding."""
        x, end = flatten(start).detach(), flatten(state).detach()
        moved = torch.linalg.vector_norm(end - x, dim=1) / (1 + torch.linalg.vector_norm(x, dim=1))
        left = ~(moved <= tol) & info.solved
        if left.any():
            apply_policy(
                policy,
                FixedPointError,
                left,
                moved,
                f"{self.iterations} update steps from the solver's solution end {{worst:.1e}} away from it (relative)",
                "The iteration diverges there, and its backward pass too; fold the step, or take a smaller stepsize",
            )
        return left


@dataclass(eq=False)
class _BackwardCertificate:
    """The certificate of unfolding's backward pass: the last term that it adds, (Phi^T)^(K - 1) g (Theorem 1)."""

    iterations: int
    policy: str
    info: FoldInfo | None = None
    g: Tensor | None = None

    def begin(self, g: Tensor) -> None:
        """Keep the incoming gradient g."""
        self.g = g.detach()

    def end(self, term: Tensor) -> None:
        """Certify the backward pass by its last term and apply the policy."""
        # The backward pass begins at the last step, so `begin` has run before.
        info, g = cast(FoldInfo, self.info), cast(Tensor, self.g)
        residual = relative(term.detach(), g).nan_to_num(nan=torch.inf)
        ok = residual < 1
        count = torch.full(residual.shape, self.iterations - 1, device=residual.device)
        info.backward = LinearSolveInfo("unfolding", count, residual, ok, torch.zeros_like(ok))
        if not (ok | ~info.solved).all():
            apply_policy(
                self.policy,
                LinearSolveError,
                ~ok,
                residual,
                f"the backward pass of unfolding diverges: the last of its {self.iterations} steps still adds "
                "{worst:.1e} times the incoming gradient",
                "Phi has a spectral radius of 1 or more; fold the step, or take a smaller stepsize",
            )


def _hooked(state: Tensors, hook: Callable[[Tensor], None]) -> Tensors:
    """Return the same state with a hook on the gradient of its flattened parts, (B, N)."""
    flat = flatten(state)
    if flat.requires_grad:
        flat.register_hook(hook)
    return unflatten(flat, state)


def _where(ok: Tensor, good: Tensors, other: Tensors) -> Tensors:
    """Take the samples of one state where `ok`, (B,), those of the other elsewhere."""
    return tuple(torch.where(ok.view(-1, *[1] * (a.dim() - 1)), a, b) for a, b in zip(good, other, strict=True))


def _mask_gradient(state: Tensors, ok: Tensor, policy: str) -> None:
    """Make the gradient of failed samples NaN or zero, as the policy says."""
    for part in state:
        if part.requires_grad:
            part.register_hook(lambda g: masked((g,), ok, policy)[0])
