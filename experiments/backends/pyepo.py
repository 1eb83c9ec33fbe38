"""The losses of PyEPO (Tang and Khalil, "PyEPO: a PyTorch-based end-to-end predict-then-optimize library", 2024)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from experiments.contracts.backend import Backend
from experiments.contracts.problem import Parameters
from experiments.contracts.task import Task
from foldopt.checks import require_positive, require_whole
from foldopt.errors import InputError, MissingDependencyError
from foldopt.linear_solve import LinearSolver
from foldopt.step import as_tuple

if TYPE_CHECKING:
    from experiments.backends.pyepo_oracle import Oracle


class Loss(NamedTuple):
    """A method of PyEPO.

    name: of its class in `pyepo.func`. takes: what it is called with after the predicted costs, some of "costs",
    "solution" and "value", the true ones; nothing for a method that returns decisions. settings: which keys of the
    backend it uses. pooled: whether it compares with a pool of solutions.
    """

    name: str
    takes: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    pooled: bool = False


LOSSES = {
    "spo_plus": Loss("SPOPlus", ("costs", "solution", "value")),
    "pg": Loss("perturbationGradient", ("costs",), ("sigma",)),
    "pfyl": Loss("perturbedFenchelYoung", ("solution",), ("n_samples", "sigma")),
    "rfyl": Loss("regularizedFrankWolfeFenchelYoung", ("solution",), ("lambd",)),
    "nce": Loss("noiseContrastiveEstimation", ("solution",), pooled=True),
    "cmap": Loss("contrastiveMAP", ("solution",), pooled=True),
    "ltr_listwise": Loss("listwiseLearningToRank", ("costs",), pooled=True),
    "ltr_pairwise": Loss("pairwiseLearningToRank", ("costs",), pooled=True),
    "ltr_pointwise": Loss("pointwiseLearningToRank", ("costs",), pooled=True),
    "dbb": Loss("blackboxOpt", (), ("lambd",)),
    "nid": Loss("negativeIdentity"),
    "dpo": Loss("perturbedOpt", (), ("n_samples", "sigma")),
    "imle": Loss("implicitMLE", (), ("n_samples", "sigma", "lambd")),
    "aimle": Loss("adaptiveImplicitMLE", (), ("n_samples", "sigma")),
    "rfwo": Loss("regularizedFrankWolfeOpt", (), ("lambd",)),
}
ADAPTED = ("alpha", "grad_norm_avg")  # numbers that adaptiveImplicitMLE changes as it trains


class PyEPOBackend(Backend):
    """A loss, or a layer, of PyEPO on the task's problem, whose value must be linear in the predicted parameters.

    Losses (spo_plus, pg, pfyl, rfyl, nce, cmap, ltr_*) compare predicted with true parameters. Layers (dbb, nid, dpo,
    imle, aimle, rfwo) return decisions, and the task's own loss of decisions is trained through them.

    Every random number follows from `seed` and the number of the call, so that a run that was interrupted goes on with
    the same numbers.

    Args:
        task: the task; its problem needs `decide` and `value`.
        linear_solver: not used, as nothing is folded.
        loss: a key of `LOSSES`.
        n_samples: perturbations of each sample (pfyl, dpo, imle, aimle).
        sigma: size of the perturbations, in units of the parameters (pfyl, dpo, imle, aimle); width of the difference
            (pg).
        lambd: strength of the interpolation (dbb, imle), or of the quadratic regularization (rfwo, rfyl).
        solve_ratio: probability in [0, 1] that a batch is solved; else its solutions are the best of the pool.
        seed: of the perturbations; PyEPO's own default is 135.
    """

    trains_on: Literal["decision", "prediction", "surrogate"]

    def __init__(
        self,
        task: Task,
        linear_solver: LinearSolver,
        loss: str,
        n_samples: int,
        sigma: float,
        lambd: float,
        solve_ratio: float,
        seed: int,
    ) -> None:
        if loss not in LOSSES:
            raise InputError(f"backend.loss={loss!r} is unknown; choose one of {', '.join(LOSSES)}.")
        require_whole("backend.n_samples", n_samples, 1)
        require_whole("backend.seed", seed, 0)
        require_positive("backend.sigma", sigma)
        require_positive("backend.lambd", lambd)
        if not 0 <= solve_ratio <= 1:
            raise InputError(f"backend.solve_ratio={solve_ratio}: a probability is a number from 0 to 1.")
        self.task, self.kind, self.seed, self._calls = task, LOSSES[loss], seed, 0
        self.trains_on = "surrogate" if self.kind.takes else "decision"
        training = task.splits["train"]
        truth = tuple(t.cpu() for t in as_tuple(task.truth(training)))
        self.oracle = _oracle(task, truth)
        if not (self.kind.takes or self.oracle.returns_decisions):
            raise InputError(
                f"backend.loss={loss}: the decisions of this task are not the coefficients of its parameters, so this "
                f"method returns none; choose one of {', '.join(k for k, v in LOSSES.items() if v.takes)}."
            )
        given = {"n_samples": n_samples, "sigma": sigma, "lambd": lambd}
        options: dict[str, Any] = {name: given[name] for name in self.kind.settings}
        options["solve_ratio"] = solve_ratio
        if self.kind.takes:
            options["reduction"] = "none"
        if self.kind.pooled or solve_ratio < 1:
            options["dataset"] = self._pool(truth)
        self.method = self._method(options)

    @staticmethod
    def unsuitable(task: Task) -> str | None:
        """Return why PyEPO cannot do the task, None if it can."""
        return task.lacks("truth") or task.problem.lacks("decide", "value")

    def _pool(self, truth: tuple[Tensor, ...]) -> Any:
        from experiments.backends.pyepo_oracle import Solved

        costs = self.oracle.flat(truth)
        return Solved(self.oracle, costs.new_zeros(len(costs), 1).numpy(), costs.numpy())

    def _method(self, options: dict[str, Any]) -> Callable[..., Tensor]:
        import pyepo.func

        method: Callable[..., Tensor] = getattr(pyepo.func, self.kind.name)(self.oracle, **options)
        return method

    def losses(self, parameters: Parameters, truth: Parameters) -> Tensor:
        """Return PyEPO's loss of each sample, (B,), differentiable in `parameters`."""
        predicted, costs = self.oracle.flat(parameters), self.oracle.flat(truth).detach()
        solution = self.oracle.of_decisions(self.oracle.program.decide(*as_tuple(truth)))
        value = (solution * self.oracle._fullCost(costs)).sum(1, keepdim=True)
        known = {"costs": costs, "solution": solution, "value": value}
        self._reseed(predicted.device)
        return self.method(predicted, *(known[name] for name in self.kind.takes)).flatten()

    def __call__(self, parameters: Any) -> Tensor:
        """Return the decisions (B, n) for the predicted parameters, with PyEPO's derivative where it has one."""
        if self.kind.takes:
            return self.oracle.program.decide(*as_tuple(parameters))
        predicted = self.oracle.flat(parameters)
        self._reseed(predicted.device)
        return self.method(predicted)[:, : self.oracle.size]

    def _reseed(self, device: torch.device) -> None:
        """Let the random numbers of the next call follow from the seed and from how many calls there were."""
        number = self.seed * 1_000_003 + self._calls
        self._calls += 1
        generators = {str(device): torch.Generator(device).manual_seed(number)}
        for owner in filter(None, (self.method, getattr(self.method, "distribution", None))):
            if hasattr(owner, "_gen_cache"):
                owner._gen_cache = generators
        self.method._branch_rng.seed(number % 2**32)  # type: ignore[attr-defined] # numpy's generator of PyEPO's module

    def state_dict(self) -> dict[str, Any]:
        """Return what later batches depend on: the number of calls, the pool of solutions and adapted numbers."""
        adapted = {name: getattr(self.method, name) for name in ADAPTED if hasattr(self.method, name)}
        return {"calls": self._calls, "pool": self.method.solpool, "adapted": adapted}  # type: ignore[attr-defined]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state that `state_dict` returned."""
        self._calls = state_dict["calls"]
        self.method.solpool = state_dict["pool"]  # type: ignore[attr-defined]
        for name, value in state_dict["adapted"].items():
            setattr(self.method, name, value)


def _oracle(task: Task, truth: tuple[Tensor, ...]) -> Oracle:
    try:
        from experiments.backends.pyepo_oracle import Oracle
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"backend=pyepo needs the package pyepo ({error}); install it with pip install foldopt[pyepo]."
        ) from error
    return Oracle(task.problem, truth)
