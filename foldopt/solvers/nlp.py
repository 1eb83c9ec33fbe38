"""A batched sequential quadratic programming solver for smooth programs, convex or not."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from torch import Tensor

from foldopt.batched import matvec
from foldopt.errors import InputError
from foldopt.solvers._nlp_causes import (
    INFEASIBLE,
    NOT_FINITE,
    OUT_OF_ITERATIONS,
    OUT_OF_TIME,
    RUNNING,
    SOLVED,
    STALLED,
    UNBOUNDED,
    explained,
)
from foldopt.solvers._nlp_model import convexified, elastic_step, violation
from foldopt.solvers._nlp_search import Filter, filter_search, violation_search
from foldopt.solvers.interior_point import largest
from foldopt.solvers.qp import QPSolution, solve_qp
from foldopt.updates._conditions import ScaledProgram, factors, kkt_residual
from foldopt.updates.programs import SmoothProgram, SQPData

__all__ = ["NLPSolution", "solve_nlp"]

FAILURES = 12  # number of failed steps in a row, each with a larger ridge, after which the search stops
FEASIBLE = 1e-6  # largest violation, relative to 1 + |start|, of a feasible point in the test for unboundedness
ROUNDING = 8  # rounding units below which no KKT residual is asked for
DIVERGED = 1e10  # growth of x from which a program is unbounded; for the objective it is the square of this
STATIONARY = 1e-7  # slope of the violation, relative to the constraints' gradients, that counts as zero
STEEPEST = 1e6  # gradients of iterates count for the tolerance up to this size
RESCALED = 10  # number of iterations between two checks of the constraints' units
FAR = 1e3  # a constraint's units change if the size of its gradient, or the inverse, exceeds this
EXTREME = 1e12  # largest factor, or inverse factor, by which a constraint's units change in total
AWAY = 1e-2  # move, relative to 1 + |x|, away from a stationary point of the violation, which may be a saddle


class NLPSolution(NamedTuple):
    """What the solver found, sample by sample.

    Attributes:
        x: the solutions, (B, n); the last iterate where a sample is not solved.
        nu: the multipliers of the equalities, (B, p).
        lam: the multipliers of the inequalities, (B, m).
        ok: (B,) bool, whether the KKT residual is within the tolerance.
        residual: the KKT residual, (B,), in the units in which the solver scaled the program.
        iterations: the number of iterations, (B,) int.
        cause: why a sample is not solved, (B,) int: 0 solved, 1 infeasible, 2 unbounded, 3 not smooth, 4 no
            multipliers, 5 iteration limit, 6 time limit, 7 not finite, 8 no progress.

    Examples:
        >>> x = torch.zeros(1, 2)
        >>> number = torch.tensor([3])
        >>> found = NLPSolution(x, x[:, :0], x[:, :0], torch.tensor([True]), torch.tensor([1e-12]), number, 0 * number)
        >>> found.ok
        tensor([True])
    """

    x: Tensor
    nu: Tensor
    lam: Tensor
    ok: Tensor
    residual: Tensor
    iterations: Tensor
    cause: Tensor


def solve_nlp(
    program: SmoothProgram,
    start: Tensor,
    *params: Tensor,
    tol: float = 1e-10,
    max_iter: int = 200,
    time_limit: float = float("inf"),
) -> NLPSolution:
    """Find a KKT point of min f(x, c) s.t. h(x, c) = 0, g(x, c) <= 0 near `start` for every sample of a batch.

    The method is sequential quadratic programming with exact Hessians and a filter line search. Quadratic models that
    are not convex on the active constraints are convexified. A second-order correction follows curved constraints, and
    a ridge in the Hessian shortens the steps after one that the line search had to cut. Near a solution with
    independent active constraints and second-order sufficiency the steps are Newton steps.

    If the linearized constraints contradict each other or no step is acceptable, a restoration phase lowers the sum of
    the violations alone until the filter accepts a point. If that sum has a positive local minimum, the program counts
    as infeasible.

    A sample that is not solved does not stop the others. Its ok is False, `cause` says why, and x is its last iterate.
    Values that are NaN or inf are such a cause.

    Args:
        program: the functions and bounds of the program.
        start: where the solver starts, (B, n). The default tolerance needs float64.
        *params: parameters c of the functions.
        tol: largest KKT residual of a solved sample; default 1e-10. The residual is the largest of stationarity,
            infeasibility and complementarity. It is measured in units in which gradients at the start are about 1, and
            is relative to 1 plus the size of the gradients, of x and of the multipliers, respectively. A tolerance
            below 8 times the rounding unit of the dtype counts as that.
        max_iter: largest number of iterations for each sample; default 200.
        time_limit: seconds for the whole batch, after which the unfinished samples stop; default inf: no limit.

    Returns:
        An `NLPSolution`; the Lagrangian is f + nu.h + lam.g with lam >= 0.

    Raises:
        InputError: `start` is not floating-point of shape (B, n), or a function or a bound has a wrong shape.

    Source: Fletcher and Leyffer, Nonlinear programming without a penalty function (2002); Wächter and Biegler, On the
    implementation of an interior-point filter line-search algorithm for large-scale nonlinear programming (2006).

    Examples:
        Find the point of the unit ball that is nearest to (3, 4):

        >>> from foldopt import SmoothProgram
        >>> def distance(x, c):
        ...     return (x - c).square().sum(1)
        >>> program = SmoothProgram(distance, inequalities=lambda x, c: x.square().sum(1, keepdim=True) - 1)
        >>> c = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
        >>> found = solve_nlp(program, torch.zeros_like(c), c)
        >>> found.x, found.ok
        (tensor([[0.6000, 0.8000]], dtype=torch.float64), tensor([True]))
    """
    if start.dim() != 2 or not start.is_floating_point():
        raise InputError(f"start has shape {tuple(start.shape)} and dtype {start.dtype}, expected floating (B, n).")
    deadline = time.monotonic() + time_limit
    tol = max(tol, ROUNDING * torch.finfo(start.dtype).eps)
    with torch.no_grad():
        search = _Search(program, start.detach().clone(), tuple(p.detach() for p in params), tol)
        for iteration in range(max_iter):
            data = search.judged()
            if iteration % RESCALED == RESCALED - 1:
                data = search.rescaled(data)
            if time.monotonic() > deadline:
                search.end(search.cause == RUNNING, OUT_OF_TIME)
            if not (search.cause == RUNNING).any():
                break
            search.advance(data)
        return search.finished()


class _Search:
    """The iterates of all samples with the state of their search."""

    def __init__(self, program: SmoothProgram, x: Tensor, params: tuple[Tensor, ...], tol: float) -> None:
        self.program, self.params, self.tol = ScaledProgram(program, x, params), params, tol
        self.x = x / self.program.unit
        f, h, g = self.program.values(self.x, *params)
        self.nu, self.lam = torch.zeros_like(h), torch.zeros_like(g)
        self.size, self.cost = 1 + largest(self.x), 1 + f.abs()
        self.weights = torch.ones_like(self.x), self.program.even
        self.steepest = [torch.zeros_like(f) for _ in self.weights]
        self.filter = Filter(1e4 * violation(h, g).clamp(min=1))
        self.cause = torch.full_like(f, RUNNING, dtype=torch.long)
        self.iterations, self.failures, self.stationary = (torch.zeros_like(self.cause) for _ in range(3))
        self.restoring = torch.zeros_like(f, dtype=torch.bool)
        self.ridge, self.entered = torch.zeros_like(f), torch.full_like(f, torch.inf)
        self.residual = torch.full_like(f, torch.inf)
        self.before = self.x, self.nu, self.lam

    def end(self, which: Tensor, cause: int) -> None:
        """Stop the samples in `which` that are still running, for this cause."""
        self.cause = torch.where(which & (self.cause == RUNNING), cause, self.cause)

    def judged(self) -> SQPData:
        """Stop the samples that are solved, not finite or unbounded, and return the model at the iterates."""
        data, sound = self._model()
        if not sound.all():  # something is not finite after the last step: go back and shorten the next step
            back = (~sound & (self.cause == RUNNING) & (self.failures <= FAILURES))[:, None]
            self.x, self.nu, self.lam = (
                torch.where(back, old, now) for old, now in zip(self.before, (self.x, self.nu, self.lam), strict=True)
            )
            self.failures += back[:, 0]
            self.ridge = torch.where(back[:, 0], (10 * self.ridge).clamp(min=1), self.ridge)
            data, sound = self._model()
        # A variable in a small unit hardly counts beside one in a large unit, so both ways to weigh them must agree.
        residual = torch.maximum(*(self._residual(data, way) for way in range(len(self.weights))))
        self.residual = torch.where(self.restoring, torch.inf, residual)
        self.end(~sound, NOT_FINITE)
        self.end(self.residual <= self.tol, SOLVED)
        f = self.program.values(self.x, *self.params)[0]
        near = violation(data.h, data.g) <= FEASIBLE * self.size
        self.end(near & ((f < -(DIVERGED**2) * self.cost) | (largest(self.x) > DIVERGED * self.size)), UNBOUNDED)
        return data

    def _residual(self, data: SQPData, way: int) -> Tensor:
        """Return the KKT residual (B,) in one of the two ways to weigh the variables."""
        weight = self.weights[way]
        steepest = torch.maximum(self.steepest[way], largest(weight * data.gradient).clamp(max=STEEPEST))
        self.steepest[way] = steepest
        return kkt_residual(self.x, self.nu, self.lam, data, steepest, weight)

    def _model(self) -> tuple[SQPData, Tensor]:
        """Return the model at the iterates and which samples have a finite objective and model, (B,) bool."""
        self.program.weight = (~self.restoring).to(self.x)
        data = SQPData(*self.program.sqp_data(self.x, self.nu, self.lam, *self.params))
        known = self.program.values(self.x, *self.params)[0].isfinite() | self.restoring
        return data, torch.stack([known, *(part.flatten(1).isfinite().all(1) for part in data)]).all(0)

    def rescaled(self, data: SQPData) -> SQPData:
        """Change the units of constraints whose gradients have become large or small, and return the model.

        Inequalities are left alone if they are satisfied and out of reach. The filter of a changed sample starts anew.
        """
        size = torch.cat([data.jacobian_h, data.jacobian_g], 1).abs().amax(2)
        reach = size * (1 + largest(self.x))[:, None]
        near = torch.cat([torch.ones_like(data.h, dtype=torch.bool), -data.g <= reach[:, data.h.shape[1] :]], 1)
        far = near & (size > 0) & ((size < 1 / FAR) | (size > FAR)) & (self.cause == RUNNING)[:, None]
        which = far.any(1)
        if not which.any():
            return data
        factor = torch.where(far, factors(size), 1)
        total = torch.cat([self.program.factor_h, self.program.factor_g], 1) * factor
        factor = torch.where((total < EXTREME) & (total > 1 / EXTREME), factor, 1)
        of_h, of_g = factor.split([data.h.shape[1], data.g.shape[1]], 1)
        self.program.factor_h, self.program.factor_g = self.program.factor_h * of_h, self.program.factor_g * of_g
        self.nu, self.lam = self.nu / of_h, self.lam / of_g
        theta = violation(data.h * of_h, data.g * of_g)
        self.filter.reset(which, 1e4 * theta.clamp(min=1))
        self.entered = torch.where(which, theta, self.entered)
        return self._model()[0]

    def advance(self, data: SQPData) -> None:
        """Take a step in every running sample."""
        running, self.before = self.cause == RUNNING, (self.x, self.nu, self.lam)
        self.iterations += running
        found, curvature = self._models(data, running)
        sound = torch.cat(found[:3], 1).isfinite().all(1)
        found = found._replace(
            **{key: torch.where(sound[:, None], getattr(found, key), 0) for key in ("x", "nu", "lam")}
        )
        self._minimize(data, found, curvature, running & ~self.restoring, sound)
        self._restore(data, found, curvature, running & self.restoring, sound)

    def _models(self, data: SQPData, running: Tensor) -> tuple[QPSolution, Tensor]:
        """Return the solutions d of the running samples' models, and d'Hd, (B,); other samples get a zero model."""
        data = SQPData(*(torch.where(running.view(-1, *[1] * (part.dim() - 1)), part, 0) for part in data))
        guess = self.lam > -data.g
        hessian, gradient = convexified(data, guess, self.x, self.ridge)
        found = solve_qp(hessian, gradient, data.jacobian_h, -data.h, data.jacobian_g, -data.g, guess)
        soft = (running & (self.restoring | ~found.ok)).nonzero()[:, 0]
        if len(soft) and data.h.shape[1] + data.g.shape[1]:
            some, restoring = SQPData(*(part[soft] for part in data)), self.restoring[soft]
            plain = convexified(some, guess[soft] & False, self.x[soft], self.ridge[soft])[0]
            penalty = torch.where(restoring, 1, 10 * (1 + largest(some.gradient) + largest(self.lam[soft])))
            relaxed = elastic_step(plain, some, penalty)
            found = QPSolution(*(t.index_put((soft,), new) for t, new in zip(found, relaxed, strict=True)))
            hessian = hessian.index_put((soft,), plain)
        return found, torch.einsum("bi,bij,bj->b", found.x, hessian, found.x)

    def _minimize(self, data: SQPData, model: QPSolution, curvature: Tensor, running: Tensor, sound: Tensor) -> None:
        """Take a filter step in the samples that are not in the restoration phase."""
        if not running.any():
            return
        f, h, g = self.program.values(self.x, *self.params)
        theta = violation(h, g)
        step, alpha, lowering = filter_search(
            self.program, self.x, self.params, model.x, data, model.lam > 0, self.filter, running & sound
        )
        moved = alpha > 0
        self.filter.add(moved & ~lowering, (1 - 1e-5) * theta, f - 1e-5 * theta)
        self._moved(step, alpha, model, moved)
        self._ridged(data, model.x, alpha, curvature, running)
        lost = running & ~moved & (self.failures >= 2) & (theta > self.tol * (1 + largest(self.x)))
        self.filter.add(lost, (1 - 1e-5) * theta, f - 1e-5 * theta)
        self._switch(lost, True)
        self.entered = torch.where(lost, theta, self.entered)

    def _restore(self, data: SQPData, model: QPSolution, curvature: Tensor, running: Tensor, sound: Tensor) -> None:
        """Lower the violation of the samples in the restoration phase."""
        if not running.any():
            return
        d, theta = model.x, violation(data.h, data.g)
        linear = violation(data.h + matvec(data.jacobian_h, d), data.g + matvec(data.jacobian_g, d))
        gain = (theta - linear).clamp(min=0)
        slope = largest(matvec(data.jacobian_h.mT, model.nu) + matvec(data.jacobian_g.mT, model.lam))
        steepest = torch.cat([data.jacobian_h, data.jacobian_g], 1).flatten(1).abs().amax(1)
        flat = running & sound & (slope <= STATIONARY * steepest) & (gain <= 1e-6 * theta)
        again = flat & (self.stationary > 0)
        self.end(again, INFEASIBLE)
        self.stationary += flat
        away = AWAY * (1 + self.x.abs()) * torch.cos(torch.arange(1, self.x.shape[1] + 1).to(self.x))
        self.x = torch.where((flat & ~again)[:, None], self.x + away, self.x)
        searching = running & sound & ~flat
        alpha = violation_search(self.program, self.x, self.params, d, gain, searching)
        self._moved(alpha[:, None] * d, alpha, model, alpha > 0)
        self._ridged(data, d, alpha, curvature, running & ~flat)
        self.program.weight = torch.ones_like(self.program.weight)
        f, h, g = self.program.values(self.x, *self.params)
        theta = violation(h, g)
        enough = (theta <= 0.9 * self.entered) & self.filter.accepts(theta, f)
        done = running & (alpha > 0) & (enough | (theta <= 0.1 * self.tol * (1 + largest(self.x))))
        self._switch(done, False)

    def _switch(self, which: Tensor, restoring: bool) -> None:
        self.restoring = torch.where(which, restoring, self.restoring)
        self.nu, self.lam = (torch.where(which[:, None], 0, y) for y in (self.nu, self.lam))
        self.ridge = torch.where(which, 0, self.ridge)
        self.failures = torch.where(which, 0, self.failures)

    def _moved(self, step: Tensor, alpha: Tensor, model: QPSolution, moved: Tensor) -> None:
        self.x = torch.where(moved[:, None], self.x + step, self.x)
        a = alpha[:, None]
        self.nu, self.lam = (
            torch.where(moved[:, None], old + a * (new - old), old)
            for old, new in ((self.nu, model.nu), (self.lam, model.lam))
        )

    def _ridged(self, data: SQPData, d: Tensor, alpha: Tensor, curvature: Tensor, running: Tensor) -> None:
        """Adapt the ridge to the accepted step length alpha, and count the steps in a row that were not accepted."""
        length = torch.linalg.vector_norm(d, dim=1)
        force = ((data.gradient * d).sum(1).abs() + curvature) / length.square().clamp(min=1e-300)
        larger = torch.maximum(4 * self.ridge, force.nan_to_num(0, 0, 0))
        ridge = torch.where(alpha >= 1, torch.where(self.ridge > 1e-8 * force, self.ridge / 10, 0), self.ridge)
        ridge = torch.where(alpha < 0.25, larger, ridge)
        ridge = torch.where(alpha == 0, (10 * larger).clamp(min=1e-8), ridge)
        self.ridge = torch.where(running, ridge, self.ridge)
        self.failures = torch.where(running, torch.where(alpha > 0, 0, self.failures + 1), self.failures)
        self.end(running & (self.failures > FAILURES), STALLED)

    def finished(self) -> NLPSolution:
        """Find the causes of failures and return the solution in the units of the program."""
        data = self.judged()
        self.end(self.cause == RUNNING, OUT_OF_ITERATIONS)
        cause = explained(self.program, self.x, self.nu, self.lam, data, self.cause, self.params)
        x, nu, lam = self.program.unscaled(self.x, self.nu, self.lam)
        return NLPSolution(x, nu, lam, cause == SOLVED, self.residual, self.iterations, cause)
