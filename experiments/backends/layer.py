"""Backends around a layer of foldopt, and the failures that its certificates report."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from experiments.contracts.backend import Backend
from experiments.contracts.problem import Problem, Step
from experiments.contracts.task import Task
from foldopt import FixedPointLayer, FoldInfo
from foldopt.checks import require_positive
from foldopt.errors import InputError


class LayerBackend(Backend):
    """A backend around a layer of foldopt; the problem reads the decisions from the layer's state."""

    def __init__(self, problem: Problem, layer: FixedPointLayer) -> None:
        self.problem, self.layer = problem, layer

    def __call__(self, parameters: Any) -> Tensor:
        """Return the decisions for the predicted parameters."""
        params = self.problem.params(parameters)
        return self.problem.decisions(self.layer(*params), *params)

    def take_failures(self) -> int:
        """Return how many samples of the last call failed, forward or backward.

        Sets `products` to the number of products with Phi that the adjoint equations of that call took.
        """
        last, self.layer.last = self.layer.last, None
        backward = None if last is None else last.backward
        self.products = 0 if backward is None else int(backward.iterations.sum())
        return failures(last)


class SolutionBackend(LayerBackend):
    """A layer, in float64, that calls the problem's forward solver and differentiates its update step there.

    optimizer: the update step, one of the problem's, or "auto", its first. forward: one of the problem's solvers.
    forward_tol: that solver's own tolerance, None for its default. tol: largest accepted residual of the step at a
    solution; None follows the accuracy of the forward solver. on_failure: what happens to samples above it, a policy of
    `foldopt.fold`.
    """

    def __init__(
        self,
        problem: Problem,
        make: Callable[..., FixedPointLayer],
        optimizer: str,
        forward: str,
        forward_tol: float | None,
        tol: float | None,
        on_failure: str,
        **options: Any,
    ) -> None:
        """make: `foldopt.fold` or `foldopt.unfold`; options: its further arguments."""
        solve, update = solver_and_step(problem, optimizer, forward, forward_tol)
        tol = problem.forwards[forward].tol if tol is None else tol
        super().__init__(problem, make(solve, update, dtype=torch.float64, tol=tol, on_failure=on_failure, **options))

    @staticmethod
    def unsuitable(task: Task) -> str | None:
        """Return why the task's problem has no update step, None if it has."""
        return task.problem.lacks("optimizers", "forwards", "solve")


def failures(last: FoldInfo | None) -> int:
    """Return how many samples failed, forward or backward, according to the certificates of a layer's last call."""
    if last is None:
        return 0
    ok = last.solved if last.backward is None else last.solved & last.backward.ok
    return int((~ok).sum())


def optimizer_of(problem: Problem, name: str) -> str:
    """Return the problem's optimizer called `name`, or its first for "auto".

    Raises InputError if the problem has no optimizer of that name.
    """
    able = list(problem.optimizers)
    if name != "auto" and name not in able:
        raise InputError(f"backend.optimizer={name!r} is not there for this task; choose auto or one of {able}.")
    return able[0] if name == "auto" else name


def solver_and_step(
    problem: Problem, optimizer: str, forward: str, forward_tol: float | None
) -> tuple[Callable[..., Any], Step]:
    """Return the problem's solver called `forward` and its update step called `optimizer`.

    forward_tol: given to the solver as `tol` unless it is None. Raises InputError for names that the problem does not
    have, and for a tolerance of a solver that has none.
    """
    name = optimizer_of(problem, optimizer)
    update = problem.optimizers[name]()
    if forward not in problem.forwards:
        raise InputError(
            f"backend.forward={forward!r} is not there for this task; choose one of {list(problem.forwards)}."
        )
    solve = partial(problem.solve, forward)
    if forward_tol is not None:
        require_positive("backend.forward_tol", forward_tol)
        if not problem.forwards[forward].adjustable:
            raise InputError(
                f"backend.forward_tol={forward_tol}: backend.forward={forward!r} takes no tolerance for this task; "
                "leave it null."
            )
        solve = partial(solve, tol=forward_tol)
    return lambda *params: problem.state(name, solve(*params), *params), update
