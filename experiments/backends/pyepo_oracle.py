"""A problem of the harness as PyEPO sees it: an oracle that solves a linear objective."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pyepo import EPO
from pyepo.data.dataset import optDataset
from pyepo.model.mpax import optMpaxModel
from pyepo.model.opt import optModel
from torch import Tensor

from experiments.contracts.problem import Problem
from foldopt.errors import InputError
from foldopt.step import as_tuple

LINEAR = 1e-9  # largest relative error of a value that counts as linear in the parameters
PROBED = 8  # samples on which linearity and the direction of optimization are checked


class Oracle(optMpaxModel):
    """The problem of a task for PyEPO: costs in, an optimal solution out.

    The value v(w, t) of a decision w must be linear in the parameters t, so that v(w, t) = s (a(w)'t + r(w)), where s
    is 1 for problems that maximize and -1 for those that minimize, in the way PyEPO distinguishes them. PyEPO's cost
    vector is (t, 1) and its solution (a(w), r(w)): the part r of the value that does not depend on t, such as x'Qy of a
    bilinear program, is a coordinate whose cost is known to be 1 and is not predicted. It is left out where r is 0.

    PyEPO solves sample by sample, except for models of its class `optMpaxModel`, whose `batch_optimize` gets a whole
    batch. This class is derived from it for that alone; neither MPAX nor JAX is used.

    Args:
        problem: an optimization problem with the members `decide` and `value`.
        parameters: true parameters of some samples, (B, ...) each, which show the shapes, the direction of
            optimization, and whether there is a part r.

    Raises:
        InputError: if the value is not linear in the parameters.
    """

    def __init__(self, problem: Problem, parameters: Sequence[Tensor]) -> None:
        some = tuple(t[:PROBED].double() for t in parameters)
        self.program = problem  # `problem` means something else to PyEPO
        self.shapes = [tuple(t.shape[1:]) for t in some]
        self.size = sum(math.prod(shape) for shape in self.shapes)
        decisions = problem.decide(*some)
        slope, rest = self._affine(decisions)
        value = problem.value(decisions, *some)
        error = value - (slope * self.flat(some)).sum(1) - rest
        if float(error.abs().max()) > LINEAR * (1 + float(value.abs().max())):
            raise InputError(
                f"The value of {type(problem).__name__} is not linear in the parameters (it differs from its linear "
                f"part by {float(error.abs().max()):.2g}); PyEPO's losses need a linear objective."
            )
        self.sign = -1.0 if decisions.shape == slope.shape and torch.equal(slope, -decisions) else 1.0
        self.modelSense = EPO.MAXIMIZE if self.sign > 0 else EPO.MINIMIZE
        self.has_rest = bool(rest.any())
        self.returns_decisions = decisions.shape == slope.shape and torch.equal(self.sign * slope, decisions)
        optModel.__init__(self)  # not optMpaxModel's, which compiles a program for MPAX

    def get_config(self) -> dict[str, Any]:
        """Return nothing: the oracle is never rebuilt in another process."""
        return {}

    @property
    def num_cost(self) -> int:
        """How many costs are predicted."""
        return self.size

    @property
    def c_pred_index(self) -> np.ndarray | None:
        """Where the predicted costs stand among all costs; None where all are predicted."""
        return np.arange(self.size) if self.has_rest else None

    def _getModel(self) -> tuple[None, range]:  # noqa: N802 # PyEPO's name
        return None, range(self.size + self.has_rest)

    def _fullCost(self, pred_cost: Tensor) -> Tensor:  # noqa: N802 # PyEPO's name
        return torch.cat([pred_cost, torch.ones_like(pred_cost[..., :1])], -1) if self.has_rest else pred_cost

    def setObj(self, c: Any) -> None:  # noqa: N802 # PyEPO's name
        """Take the costs (B, n) of the next call of `batch_optimize`, to be minimized."""
        self.c = c if self.modelSense == EPO.MINIMIZE else -c

    def batch_optimize(self, c: Tensor) -> tuple[Tensor, Tensor, None]:
        """Return PyEPO's solutions (B, n) and objective values (B,) for costs (B, n) to be minimized, and no status."""
        solutions = self.solutions((-self.sign * c)[:, : self.size])
        return solutions, (solutions * c).sum(1), None

    def solutions(self, costs: Tensor) -> Tensor:
        """Return PyEPO's solutions (B, n) for predicted costs (B, size), all at once."""
        return self.of_decisions(self.program.decide(*self.parameters(costs)))

    def of_decisions(self, decisions: Tensor) -> Tensor:
        """Return PyEPO's solutions (B, n) of decisions."""
        slope, rest = self._affine(decisions)
        return self.sign * (torch.cat([slope, rest[:, None]], 1) if self.has_rest else slope)

    def flat(self, parameters: Any) -> Tensor:
        """Return parameters as PyEPO's predicted costs, (B, size) in float64, differentiable."""
        return torch.cat([t.flatten(1) for t in as_tuple(parameters)], 1).double()

    def parameters(self, costs: Tensor) -> tuple[Tensor, ...]:
        """Return costs (B, size) as the problem's parameters."""
        parts = costs.split([math.prod(shape) for shape in self.shapes], dim=1)
        return tuple(part.reshape(-1, *shape) for part, shape in zip(parts, self.shapes, strict=True))

    @torch.enable_grad()
    def _affine(self, decisions: Tensor) -> tuple[Tensor, Tensor]:
        """Return the slope (B, size) of the value in the parameters, and the value (B,) at parameters 0."""
        zeros = decisions.new_zeros(len(decisions), self.size).requires_grad_()
        value = self.program.value(decisions.detach(), *self.parameters(zeros))
        (slope,) = torch.autograd.grad(value.sum(), zeros)
        return slope, value.detach()


class Solved(optDataset):
    """The solutions for the true costs of the training samples, from which PyEPO's losses draw their pool."""

    model: Oracle

    def _get_sols(self) -> tuple[np.ndarray, np.ndarray]:
        costs = torch.as_tensor(self.costs).double()
        solutions = self.model.solutions(costs)
        values = (solutions * self.model._fullCost(costs)).sum(1, keepdim=True)
        return solutions.numpy(), values.numpy()
