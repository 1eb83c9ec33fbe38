"""A linear program whose costs are predicted: exact by HiGHS, smoothed for what needs a derivative."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from experiments.contracts.problem import CvxpyForm, Forward, Problem, State, Step
from experiments.linear_program.oracle import Highs
from experiments.linear_program.polytope import Polytope
from experiments.linear_program.smoothing import smoothed
from experiments.numerics.checks import require_finite
from experiments.numerics.cone import cvxpy_for
from foldopt.checks import require_positive
from foldopt.errors import InputError


class LinearProgramProblem(Problem):
    """min c'x (or max) over a polytope; the solution of the program as it stands does not move with c, but jumps.

    `solve`, `qp` and `cvxpy` are of the smoothed program (`experiments.linear_program.smoothing`), in which whole
    numbers are relaxed; `decide` and `value` are of the program as it stands.

    Args:
        polytope: the feasible set.
        maximize: whether c is a value to be maximized instead of a cost.
        smoothing: "quadratic", "entropy" or "barrier".
        strength: of the smoothing, above 0, in units of c.
    """

    forwards: ClassVar[Mapping[str, Forward]] = {"exact": Forward(tol=1e-6)}

    def __init__(self, polytope: Polytope, maximize: bool, smoothing: str, strength: float) -> None:
        require_positive("task.strength", strength)
        self.polytope, self.sign = polytope, -1.0 if maximize else 1.0
        self.smoothing, self.strength = smoothing, float(strength)
        self.program = smoothed(polytope, smoothing, self.strength, self.sign)
        self._oracle = Highs(polytope)

    def lacks(self, *members: str) -> str | None:
        """Return why a member is missing, None if all are there: only the quadratic smoothing makes a QP."""
        if "qp" in members and self.smoothing != "quadratic":
            return f"the program smoothed by task.smoothing={self.smoothing} is not quadratic"
        return super().lacks(*members)

    @property
    def optimizers(self) -> Mapping[str, Callable[[], Step]]:
        """Update steps that can be folded, by name: Newton's on the optimality conditions of the smoothed program."""
        return {"newton": self.program.update}

    def solve(self, forward: str, c: Tensor, **options: Any) -> State:
        """Return the state at the solution of the smoothed program: x and its multipliers."""
        return self.program.solve(self._checked(c))

    def decide(self, c: Tensor) -> Tensor:
        """Return an optimal vertex, or an optimal whole point, for each sample, (B, n)."""
        return self._oracle(self.sign * self._checked(c)).to(c.device)

    def value(self, x: Tensor, c: Tensor) -> Tensor:
        """Return what is gained, (B,): c'x if it is maximized, else -c'x."""
        return -self.sign * (x * c).sum(1)

    def qp(self, c: Tensor, ridge: float) -> tuple[Tensor, ...]:
        """Return (Q, p, G, h, A, b) of the program smoothed by a quadratic; it needs no ridge."""
        B, n, p = len(c), self.polytope.n, self.polytope
        program: Any = self.program
        shared = (self.strength * torch.eye(n), program.rows, program.limits, p.A, p.b)
        Q, G, h, A, b = (t.to(c).expand(B, *t.shape) for t in shared)
        return Q, self.sign * c, G, h, A, b

    def qp_decisions(self, found: Tensor) -> Tensor:
        """Return the decisions of the solutions of that quadratic program: the solutions themselves."""
        return found

    def cvxpy(self, scaling: str) -> CvxpyForm:
        """Return the smoothed program in cvxpy's form; both scalings are the same, as nothing is badly scaled."""
        cp = cvxpy_for(scaling)
        p = self.polytope
        x, c = cp.Variable(p.n), cp.Parameter(p.n)
        distances = [x, *([p.upper - x] if p.upper < torch.inf else [])]
        distances += [p.h.numpy() - p.G.numpy() @ x] if len(p.G) else []
        constraints = [p.A.numpy() @ x == p.b.numpy()] if len(p.A) else []
        if self.smoothing == "quadratic":
            smooth = cp.sum_squares(x) / 2
            constraints += [t >= 0 for t in distances]
        else:
            terms = {"entropy": lambda t: -cp.sum(cp.entr(t)) - cp.sum(t), "barrier": lambda t: -cp.sum(cp.log(t))}
            smooth = sum(terms[self.smoothing](t) for t in distances)
        return cp.Problem(cp.Minimize(self.sign * c @ x + self.strength * smooth), constraints), [c], [x]

    def _checked(self, c: Tensor) -> Tensor:
        if c.dim() != 2 or c.shape[1] != self.polytope.n:
            raise InputError(f"c has shape {tuple(c.shape)}, expected (B, {self.polytope.n}): one cost per variable.")
        require_finite("c", c, "check the predictions")
        return c.detach().double()
