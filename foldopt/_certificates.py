"""What a layer certifies of each sample, and what happens to samples that fail."""

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

POLICIES = ("raise", "warn", "nan", "zero")


@dataclass
class FoldInfo:
    """Per-sample certificates of a layer's last call; all tensors have shape (B,).

    residual: ||U(x*, c) - x*|| / (1 + ||x*||) at the state the solver returned (`QPLayer`: the worst relative violation
    of the KKT conditions). solved: residual within tolerance. causes: why a sample is not, in a word each ("solved"
    where it is), from solvers that know. backward: what the linear solver did in the last backward pass (None before it
    ran). derivative: the verdict on its cotangent, from steps that can tell. `ok` is all of them together.
    """

    residual: Tensor
    solved: Tensor
    causes: tuple[str, ...] | None = None
    backward: LinearSolveInfo | None = None
    derivative: Verdict | None = None

    @property
    def ok(self) -> Tensor:
        """Which samples are solved and, after a backward pass, have the exact derivative that was asked for, (B,) bool.

        Of several cotangents at once, as under vmap, all have to have it.
        """
        ok = self.solved
        for part in (self.backward, self.derivative):
            if part is not None and len(ok):
                ok = ok & part.ok.view(-1, len(ok)).all(0)
        return ok

    @property
    def status(self) -> tuple[str, ...]:
        """What became of each sample: "solved", or the cause why it was not."""
        if self.causes is not None:
            return self.causes
        return tuple("solved" if ok else "step and solution disagree" for ok in self.solved.tolist())

    @property
    def verdict(self) -> tuple[str, ...] | None:
        """The verdict on the last backward pass in words, one per sample, or None before it.

        "not solved", or one of `foldopt.verdicts.NAMES`.
        """
        if self.derivative is None:
            return None
        names, ok = self.derivative.names, self.solved.tolist()
        if len(names) != len(ok):  # of several cotangents at once, as under vmap
            return names
        return tuple(name if good else "not solved" for name, good in zip(names, ok, strict=True))

    @classmethod
    def joined(cls, parts: Sequence[FoldInfo]) -> FoldInfo:
        """Return the certificates of several calls in a row."""
        causes = None if parts[0].causes is None else tuple(c for p in parts for c in p.causes or ())
        return cls(torch.cat([p.residual for p in parts]), torch.cat([p.solved for p in parts]), causes)


def patched(state: Tensors, ok: Tensor) -> Tensors:
    """Replace failed samples by a sound one (zeros if there is none), so that NaN cannot leak into the others."""
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
    """Raise or warn about the samples in `bad`; the policies "nan" and "zero" act on the gradient instead."""
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
    """Set the failed samples of a gradient to what the policy "nan" or "zero" says."""
    fill = torch.nan if policy == "nan" else 0.0
    return tuple(torch.where(ok.view(-1, *[1] * (part.dim() - 1)), part, fill) for part in parts)
