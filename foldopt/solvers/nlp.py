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

FAILURES = 12  # steps in a row without progress, each with a larger ridge, that end the search
FEASIBLE = 1e-6  # violation, relative to 1 + |x| of the start, of a point far away that counts as feasible
DIVERGED = 1e10  # growth of x that nothing bounds, and its square that of the objective
STATIONARY = 1e-7  # slope of the violation, relative to the rows' gradients, at a point of least violation
STEEPEST = 1e6  # cap of the gradients on the way that count for the tolerance
RESCALED = 10  # iterations after which the units of the rows are looked at again
FAR = 1e3  # size of a row's gradient, or its inverse, that calls for other units
EXTREME = 1e12  # units of rows up to which that is done
AWAY = 1e-2  # move, relative to 1 + |x|, from such a point that may be a saddle


class NLPSolution(NamedTuple):
    """What the solver found of each sample.

    x: (B, n), the last iterate. nu: (B, p) and lam: (B, m), the multipliers. ok: (B,) bool, the KKT residual is within
    tolerance. residual: (B,), that residual, in the units in which the program was solved. iterations: (B,) int.
    cause: (B,) int, an index into `foldopt.solvers._nlp_causes.CAUSES`, which says why a sample is not solved.
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
    """Find a KKT point of min f(x, c) s.t. h(x, c) = 0, g(x, c) <= 0 from `start` for every sample of a batch.

    Sequential quadratic programming with exact Hessians and a filter line search (Fletcher and Leyffer, 2002; Wächter
    and Biegler, 2006): a model that is not convex on the active constraints is made so, a second-order correction
    follows curved constraints, a ridge shortens steps that the line search had to cut. Where the linearized constraints
    contradict each other or no step is acceptable, a restoration phase lowers the sum of the violations alone until the
    filter accepts a point; where that sum has a positive local minimum the program is called infeasible. Near a
    solution with independent active constraints and second-order sufficiency it takes Newton steps.

    Args:
        program: the functions.
        start: (B, n), float64 to reach the default tolerance.
        params: those of the functions.
        tol: the largest KKT residual that counts as solved: stationarity, infeasibility and complementarity in units in
            which the gradients at the start are about 1, relative to 1 and the sizes of the gradient, x and the
            multipliers.
        max_iter: cap of the iterations of each sample.
        time_limit: seconds after which the samples that are left are given up.

    A sample that is not solved, such as one with NaN or inf, has ok False, its cause and its last iterate. Raises
    InputError if start is not (B, n).
    """
    if start.dim() != 2 or not start.is_floating_point():
        raise InputError(f"start has shape {tuple(start.shape)} and dtype {start.dtype}, expected floating (B, n).")
    deadline = time.monotonic() + time_limit
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
    """The iterates of all samples, and what is remembered of each."""

    def __init__(self, program: SmoothProgram, x: Tensor, params: tuple[Tensor, ...], tol: float) -> None:
        self.program, self.params, self.tol = ScaledProgram(program, x, params), params, tol
        self.x = x / self.program.unit
        f, h, g = self.program.values(self.x, *params)
        self.nu, self.lam = torch.zeros_like(h), torch.zeros_like(g)
        self.size, self.cost, self.steepest = 1 + largest(self.x), 1 + f.abs(), torch.zeros_like(f)
        self.filter = Filter(1e4 * violation(h, g).clamp(min=1))
        self.cause = torch.full_like(f, RUNNING, dtype=torch.long)
        self.iterations, self.failures, self.stationary = (torch.zeros_like(self.cause) for _ in range(3))
        self.restoring = torch.zeros_like(f, dtype=torch.bool)
        self.ridge, self.entered = torch.zeros_like(f), torch.full_like(f, torch.inf)
        self.residual = torch.full_like(f, torch.inf)
        self.before = self.x, self.nu, self.lam

    def end(self, which: Tensor, cause: int) -> None:
        """Stop the samples in `which` for this cause."""
        self.cause = torch.where(which & (self.cause == RUNNING), cause, self.cause)

    def judged(self) -> SQPData:
        """Return the model at the iterates after ending the samples that are solved, not finite or unbounded."""
        data, sound = self._model()
        if not sound.all():  # the last step led to where a derivative is not finite: take a shorter one from before
            back = (~sound & (self.cause == RUNNING) & (self.failures <= FAILURES))[:, None]
            self.x, self.nu, self.lam = (
                torch.where(back, old, now) for old, now in zip(self.before, (self.x, self.nu, self.lam), strict=True)
            )
            self.failures += back[:, 0]
            self.ridge = torch.where(back[:, 0], (10 * self.ridge).clamp(min=1), self.ridge)
            data, sound = self._model()
        self.steepest = torch.maximum(self.steepest, largest(data.gradient).clamp(max=STEEPEST))
        residual = kkt_residual(self.x, self.nu, self.lam, data, self.steepest)
        self.residual = torch.where(self.restoring, torch.inf, residual)
        self.end(~sound, NOT_FINITE)
        self.end(self.residual <= self.tol, SOLVED)
        f = self.program.values(self.x, *self.params)[0]
        near = violation(data.h, data.g) <= FEASIBLE * self.size
        self.end(near & ((f < -(DIVERGED**2) * self.cost) | (largest(self.x) > DIVERGED * self.size)), UNBOUNDED)
        return data

    def _model(self) -> tuple[SQPData, Tensor]:
        """Return the model at the iterates, and which samples' are finite, (B,) bool."""
        self.program.weight = (~self.restoring).to(self.x)
        data = SQPData(*self.program.sqp_data(self.x, self.nu, self.lam, *self.params))
        return data, torch.stack([part.flatten(1).isfinite().all(1) for part in data]).all(0)

    def rescaled(self, data: SQPData) -> SQPData:
        """Return the model in new units of the rows whose gradients have become large or small on the way.

        Of inequalities those count that are violated or within reach. The filter of such a sample begins anew.
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
        """Return the solutions of the models of the running samples, of any others' none, and d'Hd, (B,)."""
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
        """Move the samples that are not being restored."""
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
        """Lower the violation of the samples that are being restored."""
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
        """Adapt the ridge to the length of the step that was accepted, and count those that were not."""
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
        """Return what was found, with the multipliers of the program itself."""
        data = self.judged()
        self.end(self.cause == RUNNING, OUT_OF_ITERATIONS)
        cause = explained(self.program, self.x, self.nu, self.lam, data, self.cause, self.params)
        x, nu, lam = self.program.unscaled(self.x, self.nu, self.lam)
        return NLPSolution(x, nu, lam, cause == SOLVED, self.residual, self.iterations, cause)
