"""The contract of a problem: the mathematics of one study, its solvers and its update steps, for the backends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from experiments.contracts.base import Contract
from foldopt.step import as_tuple

if TYPE_CHECKING:
    import cvxpy

Parameters = Tensor | tuple[Tensor, ...]
State = Tensor | tuple[Tensor, ...]
Step = Callable[..., Any]
CvxpyForm = tuple["cvxpy.Problem", list["cvxpy.Parameter"], list["cvxpy.Variable"]]


@dataclass(frozen=True)
class Forward:
    """A forward solver of a problem.

    tol: the largest fixed-point residual that its solutions may have, unless backend.tol says otherwise.
    adjustable: whether `solve` takes its own tolerance as the keyword `tol` (backend.forward_tol).
    """

    tol: float
    adjustable: bool = False


class Problem(Contract):
    """An optimization problem whose parameters are predicted; each backend needs some of the members below.

    B is the number of samples. `parameters` is what a task's `parameters` returns, a tensor or a tuple of tensors;
    `params` are the tensors that a layer is called with, each (B, ...) or shared by the samples.

    forwards: the solvers that `solve` knows, by name (backend.forward). lacking: for each member that this problem
    leaves out, the reason, which the error about an unsuitable backend quotes.

    Which backend needs what: fold and unfold `optimizers`, `forwards`, `solve`; unroll `optimizers`, `unrolled`; cvxpy
    and cvxpylayers `cvxpy`; qpth `qp`, `qp_decisions`; exact `closed_form`; pyepo and spo_plus `decide`, `value`;
    two_stage `decide`.
    """

    ABSENT: ClassVar[Mapping[str, str]] = {
        "optimizers": "its problem has no update step (optimizers)",
        "forwards": "its problem declares no forward solver (forwards)",
        "solve": "its problem has no forward solver (solve)",
        "unrolled": "its problem has no optimizer with a start (unrolled)",
        "decide": "its problem has no exact decision (decide)",
        "value": "its problem does not tell the value of a decision (value)",
        "closed_form": "its problem has no differentiable closed form (closed_form)",
        "qp": "its problem is no quadratic program (qp)",
        "qp_decisions": "its problem does not read decisions from the quadratic program (qp_decisions)",
        "cvxpy": "its problem has no convex form that cvxpy could take",
    }

    forwards: ClassVar[Mapping[str, Forward]] = {}

    @property
    def optimizers(self) -> Mapping[str, Callable[[], Step]]:
        """Makers of the update steps that can be folded, by name (backend.optimizer), the default first.

        A step is called as ``step(state, *params)`` and returns the next state.
        """
        self._absent("optimizers")

    def params(self, parameters: Any) -> tuple[Tensor, ...]:
        """Return the tensors that layers of this problem are called with; by default the parameters themselves."""
        return as_tuple(parameters)

    def solve(self, forward: str, *params: Any, **options: Any) -> State:
        """Return the forward solver's solution, in float64 and without a graph; options: `tol`, its tolerance."""
        self._absent("solve")

    def state(self, optimizer: str, solution: Any, *params: Any, **options: Any) -> State:
        """Return the state of an update step at a solution of `solve`; by default the solution itself."""
        return solution

    def decisions(self, state: Any, *params: Any, **options: Any) -> Tensor:
        """Return the decisions (B, n) of a state, differentiable; by default the state, or its first tensor."""
        return as_tuple(state)[0]

    def unrolled(self, optimizer: str) -> tuple[Callable[..., State], Step]:
        """Return a cold start, called as ``start(*params)``, and the step to unroll from there."""
        self._absent("unrolled")

    def decide(self, *parameters: Any, **options: Any) -> Tensor:
        """Return the optimal decisions (B, n) for the parameters, without a graph."""
        self._absent("decide")

    def value(self, *decisions_and_parameters: Any, **options: Any) -> Tensor:
        """Return the value of decisions (B, n) for the parameters, (B,): larger is better.

        Called as ``value(decisions, *parameters)``; spo_plus and pyepo need it linear in the parameters.
        """
        self._absent("value")

    def closed_form(self, *params: Any, **options: Any) -> Tensor:
        """Return the optimal decisions (B, n), differentiable by autograd."""
        self._absent("closed_form")

    def qp(self, *arguments: Any) -> tuple[Tensor, ...]:
        """Return (Q, p, G, h, A, b) of min 1/2 z'Qz + p'z subject to Gz <= h, Az = b.

        Called as ``qp(*params, ridge)``; ridge: a number above 0 for the diagonal of variables without curvature.
        """
        self._absent("qp")

    def qp_decisions(self, found: Tensor) -> Tensor:
        """Return the decisions (B, n) of the solutions z of that quadratic program, (B, N)."""
        self._absent("qp_decisions")

    def cvxpy(self, scaling: str) -> CvxpyForm:
        """Return the problem in cvxpy's form with its parameters and its variable; scaling: "paper" or "normalized"."""
        self._absent("cvxpy")

    def cvxpy_decisions(self, solutions: Tensor) -> Tensor:
        """Return the decisions (B, n) of that variable's solutions; by default the solutions themselves."""
        return solutions
