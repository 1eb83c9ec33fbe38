"""Total variation denoising with any operator D (paper section 6): min_x 1/2 |x - d|^2 + weight |D x|_1.

The dual is min_w 1/2 |d + D'w|^2 subject to |w| <= weight, and x = d + D'w. At the solution w_i is -weight sign((Dx)_i)
where (Dx)_i is not zero, and between the bounds where it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from experiments.contracts.problem import CvxpyForm, Forward, Problem
from experiments.denoising.dual import DualSystem, stepsize
from experiments.numerics.checks import require_finite
from experiments.numerics.cone import cvxpy_for
from experiments.numerics.graphs import replayed
from foldopt.checks import require_whole
from foldopt.errors import InputError
from foldopt.prox import soft_threshold
from foldopt.transforms import transforming
from foldopt.updates import DualProximalGradient

FDPGState = tuple[Tensor, Tensor, Tensor, Tensor]
MAX_PIVOTS = 60
GUESS, RHO, RELAXATION = 20, 0.5, 1.8  # iterations, penalty and over-relaxation of ADMM before the first pivot
EARLY = (1, 2, 4, 8)  # iterations of FDPG at which its residual is computed, besides every 20th
TOLERANCE = 1e-11


class DenoisingSolution(NamedTuple):
    """Solutions of a batch of denoising problems, in float64.

    Attributes:
        x: Denoised signals, (B, n).
        w: Dual solutions, (B, m).
        iterations: Number of iterations, (B,) int.
        residual: KKT residual of the dual relative to the size of D d, (B,).
        ok: Whether the residual is below the tolerance, (B,) bool.
    """

    x: Tensor
    w: Tensor
    iterations: Tensor
    residual: Tensor
    ok: Tensor


class DenoisingStep(DualProximalGradient):
    """One dual proximal gradient step (eq. 28), with the inverse of I - Phi in closed form.

    It is called as ``DenoisingStep()(w, D, d, weight)`` with w (B, m), D (m, n) shared by the batch, d (B, n) and a
    positive weight of shape (). Its stepsize is `stepsize(D)`, with which the iteration converges for every D.
    """

    def __init__(self) -> None:
        super().__init__(lambda v, t, D, d, weight: soft_threshold(v, t * weight))

    def _step(self, D: Tensor) -> Tensor:
        return stepsize(D) if transforming(D) else DualSystem.of(D).stepsize

    def inverse(
        self, g: Tensor, transposed: bool, stepped: Tensor, w: Tensor, D: Tensor, d: Tensor, weight: Tensor
    ) -> Tensor:
        """Return the solution of v = Phi^T v + g, or of v = Phi v + g if `transposed`, (B, m).

        Rows of Phi are zero where the step ends at a bound; on the free set they are those of I - s D D'.
        """
        dual = DualSystem.of(D)
        s = dual.stepsize
        free = (w - s * self.primal(w, D, d) @ D.mT).abs() <= weight
        if transposed:
            fixed = torch.where(free, 0, g)
            return fixed + dual.solve(g / s - fixed @ dual.M, free)
        v = dual.solve(g / s, free)
        return torch.where(free, v, g - s * v @ dual.M)


class FDPG(nn.Module):
    """One iteration of FDPG (eqs. 28a-d), for unrolling: a dual step from y with Nesterov's momentum.

    The state is (w, y, 1 / t, s): the dual w (B, m), its extrapolation y (B, m), the momentum parameter t (B, 1) and
    the stepsize s (B, 1).
    """

    @staticmethod
    def start(D: Tensor, d: Tensor, _: Tensor) -> FDPGState:
        """Return the cold start, with the stepsize that suits D."""
        zero, one = d.new_zeros(len(d), len(D)), d.new_ones(len(d), 1)
        return zero, zero, one, stepsize(D) * one

    def forward(self, state: FDPGState, D: Tensor, d: Tensor, weight: Tensor) -> FDPGState:
        """Return the state after one iteration; in the dual the prox of (28b) is a projection on |w| <= weight."""
        w, y, reciprocal, s = state
        moved = y - s * (DenoisingStep.primal(y, D, d) @ D.mT)
        new = moved - soft_threshold(moved, weight)
        t = 1 / reciprocal
        t_new = (1 + (1 + 4 * t.square()).sqrt()) / 2
        return new, new + (t - 1) / t_new * (new - w), 1 / t_new, s


class DenoisingProblem(Problem):
    """The denoising problem; its parameters are the operator D and the signals d.

    Args:
        weight: The paper's lambda, above 0.
        n: Length of the signals, at least 2.

    Raises:
        InputError: The weight is not a positive number, or n is not a whole number above 1.
    """

    forwards: ClassVar[Mapping[str, Forward]] = {"exact": Forward(tol=1e-6), "fdpg": Forward(tol=1e-5, adjustable=True)}

    def __init__(self, weight: float, n: int) -> None:
        require_whole("n", n, 2)
        if not 0 < weight < torch.inf:
            raise InputError(f"weight={weight}: the weight lambda of the total variation is a positive number.")
        self.weight, self.n = float(weight), n

    @property
    def optimizers(self) -> Mapping[str, Callable[[], DenoisingStep]]:
        """Update steps that can be folded, by name."""
        return {"fdpg": DenoisingStep}

    def unrolled(self, optimizer: str) -> tuple[Callable[..., FDPGState], FDPG]:
        """Return a cold start and the step to unroll from there."""
        return FDPG.start, FDPG()

    def solve(self, forward: str, D: Tensor, d: Tensor, _: Tensor, **options: Any) -> Tensor:
        """Return the dual solution (B, m) of the solver `forward`; options: `tol`, the tolerance of "fdpg"."""
        return (self.fdpg(D, d, **options) if forward == "fdpg" else self.exact(D, d)).w

    def decisions(self, state: Any, D: Tensor, d: Tensor, _: Tensor) -> Tensor:
        """Return the denoised signals (B, n) of a state."""
        return DenoisingStep.primal(state if isinstance(state, Tensor) else state[0], D, d)

    def params(self, parameters: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the parameters (D, d, weight) of every layer of this problem."""
        D, d = parameters
        return D, d, torch.tensor(self.weight, dtype=d.dtype, device=d.device)

    def exact(self, D: Tensor, d: Tensor, *, warm: Tensor | None = None) -> DenoisingSolution:
        """Solve to machine precision, batched, in float64, by a primal-dual active set method on the dual.

        Each pivot solves for the free coordinates, fixes those that exceed their bounds, and frees fixed ones whose
        (Dx)_i has the wrong sign (Hintermueller, Ito and Kunisch, SIAM J. Optim. 13(3), 2002).

        Args:
            D: Operator with linearly independent rows, (m, n).
            d: Noisy signals, (B, n).
            warm: Dual solutions of similar instances to start from, (B, m).

        Raises:
            InputError: A shape is wrong, a tensor holds NaN or inf, or rows of D are linearly dependent.
        """
        D, d = _checked(D, d)
        dual = DualSystem.of(D)
        q = d @ D.mT
        if warm is not None and warm.shape != q.shape:
            raise InputError(f"warm has shape {tuple(warm.shape)}, expected {tuple(q.shape)}.")
        w = self._guess(dual, q) if warm is None else warm.to(q, copy=True)
        side = self._sides(w)
        iterations = torch.zeros(len(d), dtype=torch.long, device=d.device)
        running = torch.arange(len(d), device=d.device)
        for _ in range(MAX_PIVOTS):
            if not len(running):
                break
            old = side[running]
            found = self._on_sides(dual, q[running], old)
            slope = found @ dual.M + q[running]
            over = torch.where(found.abs() > self.weight, found.sign(), 0)
            new = torch.where(old == 0, over, torch.where(slope * old < 0, old, 0))
            w[running], side[running] = found, new
            iterations[running] += 1
            running = running[(new != old).any(1)]
        return self._certified(D, d, dual, q, w, iterations)

    def fdpg(self, D: Tensor, d: Tensor, *, iterations: int = 10_000, tol: float = 1e-8) -> DenoisingSolution:
        """Solve by FDPG (eq. 28) from zero, until the residual of every sample is at most `tol`."""
        D, d = _checked(D, d)
        M, q = D @ D.mT, d @ D.mT
        for taken, w in enumerate(islice(self._descent(M, q, stepsize(D)), iterations), 1):
            if (taken % 20 == 0 or taken in EARLY) and float(self._residual(M, q, w).max()) <= tol:
                break
        residual = self._residual(M, q, w)
        counts = torch.full((len(d),), taken, device=d.device)
        return DenoisingSolution(d + w @ D, w, counts, residual, residual <= tol)

    def _guess(self, dual: DualSystem, q: Tensor) -> Tensor:
        """Guess w by a few over-relaxed steps of ADMM that split off |w| <= weight (Boyd et al., 2011, section 3.4.3).

        The penalty is proportional to |q| / weight, since M w is about as large as q, and w about as large as weight.
        """
        rho = (RHO * q.abs().mean() / self.weight).clamp(min=1e-3 * float(dual.M.diagonal().mean()))
        return _admm(q, dual.damped(rho), rho, self.weight)

    def _descent(self, M: Tensor, q: Tensor, step: Tensor) -> Iterator[Tensor]:
        """Yield the iterates w of FDPG from zero; y is w extrapolated by the momentum of eqs. (28c-d)."""
        keep, move = torch.eye(len(M), dtype=M.dtype, device=M.device) - step * M, -step * q
        w = y = torch.zeros_like(q)
        t = 1.0
        while True:
            new = torch.addmm(move, y, keep).clamp_(-self.weight, self.weight)
            t_new = (1 + (1 + 4 * t * t) ** 0.5) / 2
            w, y, t = new, torch.lerp(w, new, 1 + (t - 1) / t_new), t_new
            yield w

    def qp(self, D: Tensor, d: Tensor, weight: Tensor, ridge: float) -> tuple[Tensor, ...]:
        """Return (Q, p, G, h, A, b) of the quadratic program (33) in (x, t), with -t <= D x <= t.

        Args:
            D: operators, (m, n).
            d: noisy signals, (B, n).
            weight: of the total variation, a number.
            ridge: Diagonal entry of Q for t, above 0, for solvers that need a positive definite Q. It changes the
                solution slightly.
        """
        m, n = D.shape
        Q = torch.diag(torch.cat([d.new_ones(n), d.new_full((m,), ridge)]))
        p = torch.cat([-d, weight.expand(len(d), m)], 1)
        eye = torch.eye(m, dtype=D.dtype, device=D.device)
        G = torch.cat([torch.cat([D, -eye], 1), torch.cat([-D, -eye], 1)])
        return Q, p, G, d.new_zeros(2 * m), d.new_zeros(0, n + m), d.new_zeros(0)

    def qp_decisions(self, found: Tensor) -> Tensor:
        """Return the denoised signals x (B, n) of solutions (x, t) of the quadratic program."""
        return found[:, : (found.shape[1] + 1) // 2]

    def cvxpy(self, scaling: str) -> CvxpyForm:
        """Return the cvxpy problem with its parameters (D, d) and variable x.

        Args:
            scaling: "paper" states the problem as the paper does; "normalized" divides the objective by the weight.
        """
        cp = cvxpy_for(scaling)
        x, d, D = cp.Variable(self.n), cp.Parameter(self.n), cp.Parameter((self.n - 1, self.n))
        size = 1.0 if scaling == "paper" else self.weight
        objective = cp.sum_squares(x - d) / (2 * size) + self.weight / size * cp.norm1(D @ x)
        return cp.Problem(cp.Minimize(objective)), [D, d], [x]

    def _sides(self, w: Tensor) -> Tensor:
        """Return -1 where w is at its lower bound, 1 where it is at its upper bound, and 0 elsewhere."""
        return torch.where(w.abs() >= self.weight * (1 - 1e-9), w.sign(), 0)

    def _on_sides(self, dual: DualSystem, q: Tensor, side: Tensor, near: Tensor | None = None) -> Tensor:
        """Return w at the bounds that `side` names, with zero gradient elsewhere; `near`, if given, is refined."""
        w = self.weight * side if near is None else torch.where(side == 0, near, self.weight * side)
        return w + dual.solve(-q - w @ dual.M, side == 0)

    def _certified(
        self, D: Tensor, d: Tensor, dual: DualSystem, q: Tensor, w: Tensor, iterations: Tensor
    ) -> DenoisingSolution:
        w = self._on_sides(dual, q, self._sides(w), w)
        residual = self._residual(dual.M, q, w)
        hard = (residual > TOLERANCE).nonzero()[:, 0]
        if len(hard):  # the pivots cycled
            rough = self.fdpg(D, d[hard], tol=1e-13).w
            polished = self._on_sides(dual, q[hard], self._sides(rough), rough)
            better = self._residual(dual.M, q[hard], polished) < self._residual(dual.M, q[hard], rough)
            w[hard] = torch.where(better[:, None], polished, rough)
            residual = self._residual(dual.M, q, w)
        return DenoisingSolution(d + w @ D, w, iterations, residual, residual <= TOLERANCE)

    def _residual(self, M: Tensor, q: Tensor, w: Tensor) -> Tensor:
        """Return how far a projected gradient step of size 1 / max M_ii moves w, (B,).

        The distance is relative to max |q| / max M_ii or to the weight, whichever is larger.
        """
        size = M.diagonal().amax()
        moved = w - (w - (q + w @ M) / size).clamp(-self.weight, self.weight)
        scale = (q.abs().amax(1) / size).clamp(min=self.weight)
        return moved.abs().amax(1) / scale


@replayed
def _admm(q: Tensor, inverse: Tensor, rho: Tensor, weight: float) -> Tensor:
    """Return z after `GUESS` steps of ADMM from zero, given the inverse of M + rho I.

    v is z plus the scaled dual. A step is w = (rho (2z - v) - q) (M + rho I)^-1, v <- v + RELAXATION (w - z), and
    z = the projection of v on |z| <= weight. With u = 2z - v, the new v is RELAXATION w + (2 - RELAXATION) z - u, which
    takes one matrix product.
    """
    move, pull = -RELAXATION * (q @ inverse), RELAXATION * rho * inverse
    pull.diagonal().sub_(1)
    z = u = torch.zeros_like(q)
    for _ in range(GUESS):
        v = torch.addmm(torch.add(move, z, alpha=2 - RELAXATION), u, pull)
        z = v.clamp(-weight, weight)
        u = torch.lerp(v, z, 2)
    return z


def differencing(n: int) -> Tensor:
    """Return the differencing operator of total variation, (n - 1, n), float64: (D x)_i = x_i - x_(i+1)."""
    eye = torch.eye(n, dtype=torch.float64)
    return eye[:-1] - eye[1:]


def _checked(D: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    if D.dim() != 2 or d.dim() != 2 or D.shape[1] != d.shape[1]:
        raise InputError(
            f"D has shape {tuple(D.shape)} and d {tuple(d.shape)}, expected (m, n) and (B, n): pass signals as long as "
            "the rows of D."
        )
    if not D.isfinite().all():
        raise InputError(f"D of shape {tuple(D.shape)} holds NaN or inf; lower train.lr.")
    require_finite("d", d, "check the data", "signals")
    return D.detach().double(), d.detach().double()
