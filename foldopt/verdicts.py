"""What is certified of a derivative: per sample and cotangent, whether the solution has one, and if not, why."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foldopt.errors import (
    DegenerateError,
    DependentRowsError,
    InputError,
    KinkError,
    NotUniqueError,
    SingularHessianError,
)

__all__ = ["NAMES", "POLICIES", "Verdict", "require_policy"]


def __dir__() -> list[str]:
    return __all__


DIFFERENTIABLE, DEPENDENT, KINK, NOT_UNIQUE, SINGULAR = range(5)
NAMES = ("differentiable", "dependent rows", "kink", "not unique", "singular Hessian")
POLICIES = ("raise", "warn", "one_sided", "least_norm", "nan", "zero")

_CAUSES: dict[int, tuple[type[DegenerateError], str, str]] = {
    SINGULAR: (
        SingularHessianError,
        "the Hessian of the Lagrangian is singular along the active constraints",
        "The solution moves faster than any multiple of the parameters: add curvature to the objective",
    ),
    NOT_UNIQUE: (
        NotUniqueError,
        "the solution is not unique along the incoming gradient",
        "Add a small ridge to Q, break the tie in the objective",
    ),
    KINK: (
        KinkError,
        "the solution has a kink: rows without slack and without a multiplier",
        "The derivative depends on the side from which the parameters come: move them",
    ),
    DEPENDENT: (
        DependentRowsError,
        "active rows depend on each other, so that the derivative with respect to what moves them is not unique",
        "Drop the redundant rows, do not ask for that gradient",
    ),
}


@dataclass(frozen=True)
class Verdict:
    """The verdict of a derivative, per sample.

    code: (B,) int, an index into `NAMES`. rows: (B, r) bool, the rows to blame: those at a kink, or those that depend
    on each other. variables: (B, n) bool, those that are not unique. row_names: how a row is called.
    """

    code: Tensor
    rows: Tensor
    variables: Tensor
    row_names: Callable[[int], str] = str

    @property
    def names(self) -> tuple[str, ...]:
        """The verdicts in words, one per sample."""
        return tuple(NAMES[c] for c in self.code.tolist())

    @property
    def ok(self) -> Tensor:
        """Which samples have the derivative that was asked for, (B,) bool."""
        return self.code == DIFFERENTIABLE

    @classmethod
    def joined(cls, parts: Sequence[Verdict]) -> Verdict:
        """Return the verdicts of several calls in a row."""
        return cls(
            torch.cat([p.code for p in parts]),
            torch.cat([p.rows for p in parts]),
            torch.cat([p.variables for p in parts]),
            parts[0].row_names,
        )

    def enforce(self, policy: str) -> None:
        """Raise the error of the gravest verdict, or warn of it, where `policy` says so.

        Raises a `DegenerateError` that lists the samples of every kind.
        """
        worst = int(self.code.max()) if len(self.code) else DIFFERENTIABLE
        if worst == DIFFERENTIABLE or policy not in ("raise", "warn"):
            return
        others = "" if worst == SINGULAR else "'one_sided'|'least_norm'|"
        message = f"{self.causes()[0]}, or choose degenerate={others}'nan'|'zero'."
        if policy == "raise":
            raise _CAUSES[worst][0](message, (self.code != DIFFERENTIABLE).nonzero()[:, 0].tolist())
        warnings.warn(message, RuntimeWarning, stacklevel=4)

    def causes(self) -> list[str]:
        """Return each verdict that is not "differentiable" in a sentence with its samples, the gravest first."""
        found = []
        for code, (_, what, remedy) in _CAUSES.items():
            bad = (self.code == code).nonzero()[:, 0].tolist()
            if bad:
                found.append(
                    f"{what}, at {len(bad)} of {len(self.code)} samples, first {bad[:10]}; at sample {bad[0]}: "
                    f"{self._blamed(code, bad[0])}. {remedy}"
                )
        return found

    def _blamed(self, kind: int, sample: int) -> str:
        mask, name = (
            (self.variables, lambda j: f"x[{j}]") if kind in (NOT_UNIQUE, SINGULAR) else (self.rows, self.row_names)
        )
        found = mask[sample].nonzero()[:, 0].tolist()
        return ", ".join(name(i) for i in found[:6]) + (f" and {len(found) - 6} more" if len(found) > 6 else "")


def require_policy(degenerate: str) -> None:
    """Raise InputError unless `degenerate` is the name of a policy."""
    if degenerate not in POLICIES:
        raise InputError(f"degenerate={degenerate!r} is unknown; choose one of {POLICIES}.")
