"""The certificates that a layer gives for each sample, and the policies for samples that fail."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foldopt._compat import transforming
from foldopt.errors import SolverError
from foldopt.linear_solve import LinearSolveInfo
from foldopt.step import Tensors
from foldopt.verdicts import Verdict

__all__ = ["POLICIES", "FoldInfo", "apply_policy", "masked", "patched"]

POLICIES = ("raise", "warn", "nan", "zero")


@dataclass
class FoldInfo:
    """Certificates of a layer's last call, per sample; a layer keeps them as ``layer.last``.

    Attributes:
        residual: (B,), ``||U(x*, c) - x*|| / (1 + ||x*||)`` at the state that the solver returned. Layers with their
            own optimality conditions (`QPLayer`) store the largest relative violation of the KKT conditions.
        solved: (B,) bool, whether the residual is within the layer's tolerance.
        causes: one word per sample, "solved" or the cause of the failure; None where the solver does not tell.
        backward: report of the linear solver on the last backward pass (`foldopt.linear_solve.LinearSolveInfo`); None
            before there was one.
        derivative: verdict on the derivative in the last backward pass (`foldopt.verdicts.Verdict`); None before there
            was one, or where the step has no method ``judge``.

    Examples:
        >>> layer = foldopt.fold(lambda c: c.sqrt(), lambda x, c: 0.5 * (x + c / x))
        >>> x = layer(torch.tensor([[4.0]], dtype=torch.float64))
        >>> layer.last.ok, layer.last.status
        (tensor([True]), ('solved',))
    """

    residual: Tensor
    solved: Tensor
    causes: tuple[str, ...] | None = None
    backward: LinearSolveInfo | None = None
    derivative: Verdict | None = None

    @property
    def ok(self) -> Tensor:
        """Which samples are solved and, after a backward pass, have the exact derivative, (B,) bool.

        If there were several cotangents at once, as under vmap, the derivative must exist for all of them.
        """
        ok = self.solved
        for part in (self.backward, self.derivative):
            if part is not None and len(ok):
                ok = ok & part.ok.view(-1, len(ok)).all(0)
        return ok

    @property
    def status(self) -> tuple[str, ...]:
        """For each sample "solved", or the cause of the failure."""
        if self.causes is not None:
            return self.causes
        return tuple("solved" if ok else "step and solution disagree" for ok in self.solved.tolist())

    @property
    def verdict(self) -> tuple[str, ...] | None:
        """The verdict on the last backward pass, one per sample: "not solved", or one of `foldopt.verdicts.NAMES`.

        None before the first backward pass, and for layers whose step has no method ``judge``.
        """
        if self.derivative is None:
            return None
        names, ok = self.derivative.names, self.solved.tolist()
        if len(names) != len(ok):  # several cotangents at once, as under vmap
            return names
        return tuple(name if good else "not solved" for name, good in zip(names, ok, strict=True))

    @classmethod
    def joined(cls, parts: Sequence[FoldInfo]) -> FoldInfo:
        """Return the certificates of consecutive calls as one."""
        causes = None if parts[0].causes is None else tuple(c for p in parts for c in p.causes or ())
        return cls(torch.cat([p.residual for p in parts]), torch.cat([p.solved for p in parts]), causes)


def patched(state: Tensors, ok: Tensor) -> Tensors:
    """Replace failed samples by one that did not fail, or by zeros, so that their NaN cannot reach the others."""
    if not transforming() and bool(ok.all()):
        return state
    if not len(ok):
        return state
    source = ok.to(torch.uint8).argmax()[None]
    filler = [torch.where(ok.any(), part.index_select(0, source), 0) for part in state]
    return tuple(
        torch.where(ok.view(-1, *[1] * (part.dim() - 1)), part, fill) for part, fill in zip(state, filler, strict=True)
    )


def apply_policy(policy: str, error: type[SolverError], bad: Tensor, residual: Tensor, what: str, remedy: str) -> None:
    """Raise an error or warn about the samples in `bad`; "nan" and "zero" do nothing here, as they change the gradient.

    `what` is the first part of the message; ``{worst}`` in it becomes the largest residual of these samples.
    """
    if policy in ("nan", "zero"):
        return
    indices = bad.nonzero()[:, 0].tolist()
    worst = indices[int(residual[bad].nan_to_num(nan=torch.inf).argmax())]
    message = (
        f"{what.format(worst=float(residual[worst]))} at {len(indices)} of {len(bad)} samples, worst at index {worst}, "
        f"first {indices[:10]}. {remedy}."
    )
    if policy == "raise":
        raise error(message, indices)
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def masked(parts: Tensors, ok: Tensor, policy: str) -> Tensors:
    """Set the failed samples of a gradient to NaN or zero, as the policy says."""
    fill = torch.nan if policy == "nan" else 0.0
    return tuple(torch.where(ok.view(-1, *[1] * (part.dim() - 1)), part, fill) for part in parts)
