"""Verdicts on derivatives: for each sample and cotangent, whether the solution has a derivative, and if not, why.

`NAMES` lists the verdicts, `POLICIES` the values of the argument `degenerate` of layers:

- "raise": raise an error that lists the samples;
- "warn": warn, and go on as "one_sided";
- "one_sided": take the derivative of one of the smooth pieces that meet at the point; of active rows that depend on
  each other, only linearly independent ones carry multipliers;
- "least_norm": as "one_sided", but dependent active rows share the multiplier (the multipliers of least norm);
- "nan" or "zero": make the gradient of these samples NaN or zero.
"""

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

__all__ = ["NAMES", "POLICIES", "Judge", "Verdict", "require_policy"]


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
        "the solution has a kink: active rows with a multiplier of zero",
        "The derivative depends on the side from which the parameters come: change them",
    ),
    DEPENDENT: (
        DependentRowsError,
        "active rows depend on each other, so the derivative with respect to their entries and limits is not unique",
        "Drop the redundant rows, do not ask for that gradient",
    ),
}


@dataclass(frozen=True)
class Verdict:
    """The verdict on the derivative of each sample.

    Args:
        code: (B,) int, positions in `NAMES`.
        rows: (B, r) bool, the constraints that cause the verdict: those at a kink, or those that depend on each other.
        variables: (B, n) bool, the variables that are not unique.
        row_names: function from the position of a constraint to the name used in messages; default `str`.

    Examples:
        >>> none = torch.zeros(2, 3, dtype=torch.bool)
        >>> verdict = foldopt.verdicts.Verdict(torch.tensor([0, 2]), none, none)
        >>> verdict.names
        ('differentiable', 'kink')
        >>> verdict.ok
        tensor([ True, False])
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
        """Which samples have the derivative that the backward pass needs, (B,) bool."""
        return self.code == DIFFERENTIABLE

    @classmethod
    def joined(cls, parts: Sequence[Verdict]) -> Verdict:
        """Return the verdicts of consecutive calls as one."""
        return cls(
            torch.cat([p.code for p in parts]),
            torch.cat([p.rows for p in parts]),
            torch.cat([p.variables for p in parts]),
            parts[0].row_names,
        )

    def enforce(self, policy: str) -> None:
        """Raise the error of the gravest verdict, or warn of it, if the policy says so; other policies do nothing here.

        Args:
            policy: one of `POLICIES`.

        Raises:
            DegenerateError: the policy is "raise" and some sample lacks its derivative; the subclass is that of the
                gravest verdict, and the samples are listed.
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
        """Return one sentence for each verdict other than "differentiable", with its samples, the gravest first."""
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
        """Return the names of the constraints or variables that cause the verdict of a sample, at most six."""
        mask, name = (
            (self.variables, lambda j: f"x[{j}]") if kind in (NOT_UNIQUE, SINGULAR) else (self.rows, self.row_names)
        )
        found = mask[sample].nonzero()[:, 0].tolist()
        return ", ".join(name(i) for i in found[:6]) + (f" and {len(found) - 6} more" if len(found) > 6 else "")


Judge = Callable[[Tensor, Sequence[bool], bool], tuple[Tensor, Verdict]]


def require_policy(degenerate: str) -> None:
    """Check that a value is one of `POLICIES`.

    Args:
        degenerate: the value.

    Raises:
        InputError: it is not one of them.

    Examples:
        >>> foldopt.verdicts.require_policy("zero")
    """
    if degenerate not in POLICIES:
        raise InputError(f"degenerate={degenerate!r} is unknown; choose one of {POLICIES}.")
