"""The SQP step of the portfolio problem in closed form."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from experiments.numerics.blocks import Chosen, times
from foldopt.solvers.qp import TOLERANCE
from foldopt.transforms import plain
from foldopt.updates.programs import SQPState
from foldopt.updates.sqp import SQP

SAFE = 1e-10  # smallest pivot of V on the assets held, relative to the largest variance, for the closed form


class PortfolioSQP(SQP):
    """`foldopt.SQP` on a `PortfolioProblem`, with the quadratic model solved in closed form where possible.

    The closed form takes the active set that the step guesses from its state. It needs the risk limit active and the
    model's solution determined by that set in every sample of the batch; it then only inverts V on the assets held,
    forward and backward. Otherwise the general step is taken. `last` is None after a step in closed form.
    """

    def forward(self, state: SQPState, *params: Tensor) -> SQPState:
        """Return the state after one step."""
        x, _, lam = state
        given = x, lam, *params
        if plain(*given):
            with torch.no_grad():
                model = _solved(*given)
            new = None if model is None else _Model.apply(model, *given)
            if model is not None and torch.is_grad_enabled() and _clear(model):
                self.keep(None, state, params)
        else:
            model = _solved(*given)
            new = None if model is None else model.state
        if new is None:
            return super().forward(state, *params)
        self.last = None
        if self.stepsize == 1:
            return new
        x, nu, lam = (torch.lerp(old, moved, self.stepsize) for old, moved in zip(state, new, strict=True))
        return x, nu, lam


class _Solved(NamedTuple):
    """The solution of a quadratic model, and the quantities that its derivative needs; see `_solved` for the notation.

    Attributes:
        state: The solution (x + d, nu, lam).
        held: Assets that are held, (B, n) bool.
        on: Their coordinates, m at the most.
        root: Cholesky factor of V on the assets held, (B, m, m).
        rate: 2 / gamma, (B, 1).
        k: Factor of V in the model's Hessian, (B, 1).
        a: Gradient of the risk limit, (B, n).
        a_held: `a` on the assets held, (B, m).
        fallen: lam_0 - mu_0, (B, 1).
        P1: P 1 on the assets held, (B, m).
        Pa: P a on the assets held, (B, m).
        Vx: V (x + d), (B, n).
        ones: 1'P1, (B, 1).
        mixed: 1'Pa, (B, 1).
        pivot: a'Pa - (1'Pa)^2 / 1'P1, (B, 1).
    """

    state: SQPState
    held: Tensor
    on: Chosen
    root: Tensor
    rate: Tensor
    k: Tensor
    a: Tensor
    a_held: Tensor
    fallen: Tensor
    P1: Tensor
    Pa: Tensor
    Vx: Tensor
    ones: Tensor
    mixed: Tensor
    pivot: Tensor


def _clear(model: _Solved) -> bool:
    """Return whether the solution is clearly regular in every sample: strictly complementary, with no small pivot.

    The thresholds are stricter than those by which `foldopt.SQP` finds a touched constraint (1e-7), a zero multiplier
    (1e-6) or a singular matrix.
    """
    (x, _, lam), c_size = model.state, model.k * model.Vx.abs().amax(1, keepdim=True)
    size = torch.maximum(lam.amax(1, keepdim=True), c_size)
    weights = torch.where(model.held, x > 1e-6 * x.amax(1, keepdim=True), lam[:, 1:] > 1e-5 * size)
    risk = lam[:, :1] * model.a.abs().amax(1, keepdim=True) > 1e-4 * size
    pivots = model.root.diagonal(dim1=1, dim2=2).square()
    regular = (pivots.amin(1) > 1e-7 * pivots.amax(1)) & (model.pivot > 1e-7 * (model.a_held * model.Pa).sum(1, True))[
        :, 0
    ]
    return bool(weights.all() & risk.all() & regular.all())


def _solved(x: Tensor, lam: Tensor, c: Tensor, V: Tensor, gamma: Tensor) -> _Solved | None:
    """Return the solution of the quadratic model at (x, lam); None if the guessed active set is not optimal.

    The model's Hessian is k V with k = 2 lam_0 / gamma, and the gradient of the risk limit is a = 2 V x / gamma. Let
    mu_0 be the new multiplier of the risk limit, fallen = lam_0 - mu_0, and P the inverse of V on the assets held.
    There k V (x + d) = c - nu 1 + fallen a. The conditions 1'(x + d) = 1 and a'(x + d) = 1 + a'x / 2 give two equations
    for nu and fallen.
    """
    rate = 2 / gamma.expand(len(x))[:, None]
    lam_0 = lam[:, :1]
    a = times(V, x) * rate
    risk = (a * x).sum(1, keepdim=True) / 2
    with torch.no_grad():
        held = lam[:, 1:] <= x
        if not (lam_0 > 1 - risk).all() or not held.any(1).all():
            return None
        top = c.amax(1, keepdim=True)
        on = Chosen(held)
    below = c - top
    k = lam_0 * rate
    root, info = torch.linalg.cholesky_ex(on.block(V))
    one, c_held, a_held = on.used.to(x), on.take(below), on.take(a)
    P1, Pc, Pa = torch.cholesky_solve(torch.stack([one, c_held, a_held], 2), root).unbind(2)
    ones, one_Pc, mixed = (P.sum(1, keepdim=True) for P in (P1, Pc, Pa))
    a_Pc, a_Pa = ((a_held * P).sum(1, keepdim=True) for P in (Pc, Pa))
    pivot = a_Pa - mixed.square() / ones
    excess = (one_Pc - k) / ones
    fallen = (k * (1 + risk) - a_Pc + mixed * excess) / pivot
    shift = excess + fallen * mixed / ones
    new = on.put((Pc - shift * P1 + fallen * Pa) / k)
    Vx = times(V, new)
    reduced = torch.where(held, 0.0, k * Vx - below + shift - fallen * a)
    multipliers = torch.cat([lam_0 - fallen, reduced], 1)
    with torch.no_grad():
        size = c.abs().amax(1, keepdim=True) + multipliers.abs().amax(1, keepdim=True)
        least = torch.where(on.used, root.diagonal(dim1=1, dim2=2).square(), torch.inf).amin(1)
        regular = (info == 0) & (least > SAFE * V.diagonal(dim1=-2, dim2=-1).amax(-1))
        fits = regular.all() & (new >= -TOLERANCE).all() & (multipliers >= -TOLERANCE * size).all()
    if not fits:
        return None
    state = new, shift + top, multipliers
    return _Solved(state, held, on, root, rate, k, a, a_held, fallen, P1, Pa, Vx, ones, mixed, pivot)


class _Model(torch.autograd.Function):
    """The solution of the quadratic model as a function of (x, lam, c, V, gamma), with its vjp in closed form.

    Under create_graph the vjp is that of the recorded operations, so that it can be differentiated again.
    """

    @staticmethod
    def forward(ctx: Any, solved: _Solved, *given: Tensor) -> SQPState:
        ctx.solved = solved
        ctx.save_for_backward(*given)
        ctx.set_materialize_grads(False)
        x, nu, lam = (part.detach() for part in solved.state)
        return x, nu, lam

    @staticmethod
    def backward(ctx: Any, *cotangent: Tensor | None) -> tuple[Tensor | None, ...]:
        given, needed = ctx.saved_tensors, ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():
            again = _solved(*given)
            assert again is not None, "the forward pass had a solution in closed form"
            paired = [(out, g) for out, g in zip(again.state, cotangent, strict=True) if g is not None]
            wanted = [t for t, need in zip(given, needed, strict=True) if need]
            outputs, vectors = zip(*paired, strict=True)
            pulled = iter(torch.autograd.grad(outputs, wanted, vectors, create_graph=True, allow_unused=True))
            return (None, *[next(pulled) if need else None for need in needed])
        return (None, *_pulled_back(ctx.solved, given, needed, cotangent))


def _pulled_back(
    solved: _Solved, given: tuple[Tensor, ...], needed: tuple[bool, ...], cotangent: tuple[Tensor | None, ...]
) -> list[Tensor | None]:
    """Return the vjp with respect to (x, lam, c, V, gamma), None where it is not needed.

    On the assets held, y = x + d solves k V y + nu 1 - fallen a = c, 1'y = 1 and a'y = 1 + a'x / 2. The transposed
    equations are k V p + s 1 + t a = g, 1'p = g_nu and -a'p = g_fallen, where g, g_nu and g_fallen are the cotangents
    of y, nu and fallen. The reduced costs k V y - c + nu - fallen a of the other assets and mu_0 = lam_0 - fallen
    contribute to these cotangents.
    """
    x, _, _, V, gamma = given
    (y, _, _), held, on, root, rate, k, a, a_held, fallen, P1, Pa, Vx, ones, mixed, pivot = solved
    g, g_nu, g_lam = cotangent
    g = torch.zeros_like(y) if g is None else g
    if g_lam is not None:
        r = torch.where(held, 0, g_lam[:, 1:])
        g = g + k * times(V, r)
        g_nu = r.sum(1, keepdim=True) if g_nu is None else g_nu + r.sum(1, keepdim=True)
    Pg = torch.cholesky_solve(on.take(g)[:, :, None], root)[:, :, 0]
    first, second = Pg.sum(1, keepdim=True), (a_held * Pg).sum(1, keepdim=True)
    if g_nu is not None:
        first = first - k * g_nu
    if g_lam is not None:
        second = second - k * ((a * r).sum(1, keepdim=True) + g_lam[:, :1])
    t = (second - mixed * first / ones) / pivot
    s = (first - t * mixed) / ones
    p = on.put((Pg - s * P1 - t * Pa) / k)
    g_c = p if g_lam is None else p - r
    g_a = fallen * g_c + t * (x / 2 - y)
    g_k = -(g_c * Vx).sum(1, keepdim=True)
    found: list[Tensor | None] = [None] * 5
    if needed[0]:
        found[0] = t / 2 * a + times(V, g_a) * rate
    if needed[1]:
        g_0 = g_k * rate if g_lam is None else g_k * rate + g_lam[:, :1]
        found[1] = pad(g_0, (0, x.shape[1]))
    if needed[2]:
        found[2] = g_c
    if needed[3]:
        per_sample = g_a[:, :, None] * (rate * x)[:, None, :] - (k * g_c)[:, :, None] * y[:, None, :]
        found[3] = per_sample.sum(0) if V.dim() == 2 else per_sample
    if needed[4]:
        each = -rate / 2 * ((a * g_a).sum(1, keepdim=True) + k * g_k)
        found[4] = each[:, 0].sum_to_size(gamma.shape)
    return found
