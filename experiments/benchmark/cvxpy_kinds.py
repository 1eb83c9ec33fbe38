"""Typical convex problems of CVXPY users with values of their parameters, some of them degenerate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import cvxpy as cp
import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Kind:
    """A problem with the true verdict on its derivative.

    Attributes:
        problem: The problem.
        parameters: Its parameters.
        values: Their values.
        variables: The variables that a layer returns.
        gp: Whether it is a geometric program.
        verdict: The verdict on the derivative for a generic cotangent.
    """

    problem: cp.Problem
    parameters: list[cp.Parameter]
    values: list[NDArray[np.float64]]
    variables: list[cp.Variable]
    gp: bool = False
    verdict: str = "differentiable"


def _kind(
    objective: cp.Minimize | cp.Maximize,
    constraints: list[cp.Constraint],
    values: Mapping[cp.Parameter, object],
    variables: list[cp.Variable],
    gp: bool = False,
    verdict: str = "differentiable",
) -> Kind:
    numbers = [np.asarray(value, dtype=float) for value in values.values()]
    return Kind(cp.Problem(objective, constraints), list(values), numbers, variables, gp, verdict)


def lasso(draw: np.random.Generator) -> Kind:
    """Least squares with an absolute-value penalty."""
    A, b, weight, x = cp.Parameter((20, 8)), cp.Parameter(20), cp.Parameter(nonneg=True), cp.Variable(8)
    cost = cp.sum_squares(A @ x - b) + weight * cp.norm1(x)
    return _kind(cp.Minimize(cost), [], {A: draw.normal(size=(20, 8)), b: draw.normal(size=20), weight: 3}, [x])


def ridge_with_bounds(draw: np.random.Generator) -> Kind:
    """Least squares in a box."""
    A, b, top, x = cp.Parameter((12, 6)), cp.Parameter(12), cp.Parameter(nonneg=True), cp.Variable(6)
    cost = cp.sum_squares(A @ x - b) + 0.1 * cp.sum_squares(x)
    values = {A: draw.normal(size=(12, 6)), b: 2 * draw.normal(size=12), top: 0.3}
    return _kind(cp.Minimize(cost), [cp.abs(x) <= top], values, [x])


def regulator(draw: np.random.Generator) -> Kind:
    """Control of a linear system over six steps with bounded inputs (model predictive control)."""
    n, m, steps = 4, 2, 6
    dynamics, inputs, start = cp.Parameter((n, n)), cp.Parameter((n, m)), cp.Parameter(n)
    X, U = cp.Variable((n, steps + 1)), cp.Variable((m, steps))
    constraints = [X[:, 0] == start, cp.abs(U) <= 0.6]
    constraints += [X[:, t + 1] == dynamics @ X[:, t] + inputs @ U[:, t] for t in range(steps)]
    values = {
        dynamics: np.eye(n) + 0.1 * draw.normal(size=(n, n)),
        inputs: 0.5 * draw.normal(size=(n, m)),
        start: 2 * draw.normal(size=n),
    }
    return _kind(cp.Minimize(cp.sum_squares(X) + 0.5 * cp.sum_squares(U)), constraints, values, [U, X])


def portfolio(draw: np.random.Generator) -> Kind:
    """The portfolio of largest return under a limit on risk."""
    k = 10
    mean, factor, risk, w = cp.Parameter(k), cp.Parameter((k, k)), cp.Parameter(nonneg=True), cp.Variable(k)
    constraints = [cp.norm(factor @ w) <= risk, cp.sum(w) == 1, w >= 0]
    values = {mean: draw.normal(size=k), factor: np.eye(k) + 0.3 * draw.normal(size=(k, k)), risk: 0.55}
    return _kind(cp.Maximize(mean @ w), constraints, values, [w])


def logistic(draw: np.random.Generator) -> Kind:
    """Logistic regression with a quadratic and an absolute-value penalty."""
    N, d = 15, 4
    X, a, offset = cp.Parameter((N, d)), cp.Variable(d), cp.Variable()
    label = (draw.random(N) < 0.5).astype(float)
    score = X @ a + offset
    cost = cp.sum(cp.logistic(score) - cp.multiply(label, score)) + 0.5 * cp.sum_squares(a) + 0.1 * cp.norm1(a)
    return _kind(cp.Minimize(cost), [], {X: draw.normal(size=(N, d))}, [a, offset])


def soft_top_k(draw: np.random.Generator) -> Kind:
    """Smooth selection of the three largest of ten numbers."""
    c, p = cp.Parameter(10), cp.Variable(10)
    cost = -c @ p - cp.sum(cp.entr(p)) - cp.sum(cp.entr(1 - p))
    return _kind(cp.Minimize(cost), [cp.sum(p) == 3], {c: 2 * draw.normal(size=10)}, [p])


def maximum_entropy(draw: np.random.Generator) -> Kind:
    """The distribution of largest entropy with given moments."""
    F, moments, p = cp.Parameter((3, 8)), cp.Parameter(3), cp.Variable(8)
    feature, inside = draw.normal(size=(3, 8)), draw.dirichlet(np.ones(8))
    return _kind(
        cp.Maximize(cp.sum(cp.entr(p))),
        [F @ p == moments, cp.sum(p) == 1],
        {F: feature, moments: feature @ inside},
        [p],
    )


def quadratic_program(draw: np.random.Generator) -> Kind:
    """A quadratic program whose data are all parameters."""
    n = 8
    root, q, G, h = cp.Parameter((n, n)), cp.Parameter(n), cp.Parameter((6, n)), cp.Parameter(6)
    A, b, z = cp.Parameter((2, n)), cp.Parameter(2), cp.Variable(n)
    rows, inside, equal = draw.normal(size=(6, n)), draw.normal(size=n), draw.normal(size=(2, n))
    values = {
        root: np.eye(n) + 0.2 * draw.normal(size=(n, n)),
        q: draw.normal(size=n),
        G: rows,
        h: rows @ inside + 0.3 * draw.random(6),
        A: equal,
        b: equal @ inside,
    }
    return _kind(cp.Minimize(0.5 * cp.sum_squares(root @ z) + q @ z), [G @ z <= h, A @ z == b], values, [z])


def relu(draw: np.random.Generator) -> Kind:
    """The positive part as a projection."""
    x, z = cp.Parameter(10), cp.Variable(10)
    return _kind(cp.Minimize(cp.sum_squares(z - x)), [z >= 0], {x: draw.normal(size=10)}, [z])


def smoothed_linear(draw: np.random.Generator) -> Kind:
    """A linear program with a small ridge."""
    c, x = cp.Parameter(10), cp.Variable(10)
    rows = np.abs(draw.normal(size=(5, 10)))
    constraints = [rows @ x <= 3, x >= 0, x <= 1]
    return _kind(cp.Minimize(c @ x + cp.sum_squares(x)), constraints, {c: draw.normal(size=10)}, [x])


def support_vectors(draw: np.random.Generator) -> Kind:
    """A support vector machine."""
    X, C = cp.Parameter((12, 3)), cp.Parameter(nonneg=True)
    w, offset, slack = cp.Variable(3), cp.Variable(), cp.Variable(12)
    label = np.where(draw.random(12) < 0.5, -1.0, 1.0)
    constraints = [slack >= 0, slack >= 1 - cp.multiply(label, X @ w + offset)]
    cost = 0.5 * cp.sum_squares(w) + C * cp.sum(slack)
    return _kind(cp.Minimize(cost), constraints, {X: draw.normal(size=(12, 3)), C: 0.7}, [w, offset])


def huber(draw: np.random.Generator) -> Kind:
    """Regression with Huber's loss."""
    A, b, x = cp.Parameter((15, 4)), cp.Parameter(15), cp.Variable(4)
    loss = cp.huber(A @ x - b, 0.5)  # type: ignore[arg-type]  # cvxpy says int
    cost = cp.sum(loss) + 0.1 * cp.sum_squares(x)
    return _kind(cp.Minimize(cost), [], {A: draw.normal(size=(15, 4)), b: 2 * draw.normal(size=15)}, [x])


def quantiles(draw: np.random.Generator) -> Kind:
    """Quantile regression with a ridge; the line passes through some of the points."""
    A, b, x = cp.Parameter((15, 3)), cp.Parameter(15), cp.Variable(3)
    residual = b - A @ x
    cost = 2 * cp.sum(cp.pos(residual)) + cp.sum(cp.neg(residual)) + 0.05 * cp.sum_squares(x)
    return _kind(cp.Minimize(cost), [], {A: draw.normal(size=(15, 3)), b: draw.normal(size=15)}, [x])


def network_flow(draw: np.random.Generator) -> Kind:
    """The cheapest flow through a small network with capacities and congestion."""
    edges = [(0, 1), (0, 2), (1, 2), (1, 3), (2, 3), (2, 4), (3, 4), (1, 4)]
    incidence = np.zeros((5, len(edges)))
    for j, (tail, head) in enumerate(edges):
        incidence[tail, j], incidence[head, j] = 1, -1
    price, capacity, demand = cp.Parameter(len(edges)), cp.Parameter(len(edges), nonneg=True), cp.Parameter()
    flow = cp.Variable(len(edges))
    supply = np.array([1.0, 0, 0, 0])
    constraints = [incidence[:4] @ flow == demand * supply, flow >= 0, flow <= capacity]
    cost = price @ flow + 0.2 * cp.sum_squares(flow)
    values = {price: 1 + draw.random(len(edges)), capacity: 0.6 + 0.6 * draw.random(len(edges)), demand: 1.2}
    return _kind(cp.Minimize(cost), constraints, values, [flow])


def geometric(draw: np.random.Generator) -> Kind:
    """The largest box with a bounded surface (geometric program)."""
    x, y, z = (cp.Variable(pos=True) for _ in range(3))
    a, b, c = cp.Parameter(pos=True), cp.Parameter(pos=True), cp.Parameter()
    constraints = [a * (x * y + x * z + y * z) <= b, x >= y**c]  # type: ignore[operator]  # cvxpy takes parameters as exponents
    return _kind(cp.Minimize(1 / (x * y * z)), constraints, {a: 2.0, b: 1.0, c: 0.5}, [x, y, z], gp=True)


def nearest_semidefinite(draw: np.random.Generator) -> Kind:
    """The nearest semidefinite matrix of trace 2 to a symmetric one."""
    C, S = cp.Parameter((4, 4), symmetric=True), cp.Variable((4, 4), PSD=True)
    M = draw.normal(size=(4, 4))
    return _kind(cp.Minimize(cp.sum_squares(S - C)), [cp.trace(S) == 2], {C: M + M.T}, [S])


def matrix_completion(draw: np.random.Generator) -> Kind:
    """A matrix of small nuclear norm that is close to some observed entries."""
    seen, weight, X = cp.Parameter((4, 3)), cp.Parameter(nonneg=True), cp.Variable((4, 3))
    mask = (draw.random((4, 3)) < 0.7).astype(float)
    cost = cp.sum_squares(cp.multiply(mask, X - seen)) + weight * cp.norm(X, "nuc") + 0.1 * cp.sum_squares(X)
    return _kind(cp.Minimize(cost), [], {seen: draw.normal(size=(4, 3)), weight: 0.5}, [X])


def semidefinite_form(draw: np.random.Generator) -> Kind:
    """A quadratic form with a semidefinite parameter on a shifted simplex."""
    Q, q, x = cp.Parameter((5, 5), PSD=True), cp.Parameter(5), cp.Variable(5)
    M = draw.normal(size=(5, 5))
    values = {Q: M @ M.T + np.eye(5), q: draw.normal(size=5)}
    return _kind(cp.Minimize(0.5 * cp.quad_form(x, Q) + q @ x), [cp.sum(x) == 1, x >= -0.3], values, [x])


def robust_least_squares(draw: np.random.Generator) -> Kind:
    """Least squares against errors in the data (second-order cones)."""
    A, b, error, x = cp.Parameter((10, 4)), cp.Parameter(10), cp.Parameter(nonneg=True), cp.Variable(4)
    cost = cp.norm(A @ x - b) + error * cp.norm(x)
    return _kind(cp.Minimize(cost), [], {A: draw.normal(size=(10, 4)), b: draw.normal(size=10), error: 0.4}, [x])


def total_variation(draw: np.random.Generator) -> Kind:
    """A signal denoised by total variation."""
    y, weight, x = cp.Parameter(16), cp.Parameter(nonneg=True), cp.Variable(16)
    signal = np.repeat([0.0, 2.0, -1.0, 1.0], 4) + 0.2 * draw.normal(size=16)
    return _kind(cp.Minimize(0.5 * cp.sum_squares(x - y) + weight * cp.tv(x)), [], {y: signal, weight: 0.3}, [x])


def diagonal_metric(draw: np.random.Generator) -> Kind:
    """Projection on a simplex in a norm with a diagonal matrix as parameter."""
    D, y, x = cp.Parameter((6, 6), diag=True), cp.Parameter(6), cp.Variable(6)
    values = {D: np.diag(1 + draw.random(6)), y: draw.normal(size=6)}
    return _kind(cp.Minimize(cp.sum_squares(D @ x - y)), [cp.sum(x) == 1, x >= 0], values, [x])


def log_utility(draw: np.random.Generator) -> Kind:
    """The equilibrium of a market: logarithmic utilities of shared goods."""
    worth, supply, X = cp.Parameter((3, 4), nonneg=True), cp.Parameter(4, nonneg=True), cp.Variable((3, 4))
    cost = cp.sum(cp.log(cp.sum(cp.multiply(worth, X), axis=1))) - 0.1 * cp.sum_squares(X)
    values = {worth: 0.2 + draw.random((3, 4)), supply: 1 + draw.random(4)}
    return _kind(cp.Maximize(cost), [cp.sum(X, axis=0) <= supply, X >= 0], values, [X])


def weighted_geometric_mean(draw: np.random.Generator) -> Kind:
    """The largest weighted geometric mean of two outputs of shared inputs (power cones)."""
    rate, x, z = cp.Parameter((2, 3), nonneg=True), cp.Variable(3), cp.Variable()
    outputs = rate @ x
    constraints = [cp.PowCone3D(outputs[0], outputs[1], z, 0.3), x >= 0]
    cost = z - 0.1 * cp.sum_squares(x)
    return _kind(cp.Maximize(cost), constraints, {rate: 0.2 + draw.random((2, 3))}, [x, z])


def vertex(draw: np.random.Generator) -> Kind:
    """A linear program at a vertex: the derivative is zero in the cost, but not in the right-hand side."""
    c, b, x = cp.Parameter(3), cp.Parameter(3), cp.Variable(3)
    rows = np.array([[2.0, 1, 0], [1, 3, 1], [0, 1, 2]])
    return _kind(cp.Minimize(c @ x), [rows @ x <= b, x >= 0], {c: [-3, -2, -4], b: [4, 6, 3]}, [x])


def relu_at_zero(draw: np.random.Generator) -> Kind:
    """The positive part at its kink."""
    x, z = cp.Parameter(3), cp.Variable(3)
    return _kind(cp.Minimize(cp.sum_squares(z - x)), [z >= 0], {x: [1, 0, -2]}, [z], verdict="kink")


def norm_ball_from_its_rim(draw: np.random.Generator) -> Kind:
    """Projection of a point on the boundary of a ball onto the ball."""
    x, z = cp.Parameter(2), cp.Variable(2)
    return _kind(cp.Minimize(cp.sum_squares(z - x)), [cp.norm(z) <= 5], {x: [3, 4]}, [z], verdict="kink")


def semidefinite_at_zero(draw: np.random.Generator) -> Kind:
    """The nearest semidefinite matrix to one with the eigenvalue 0."""
    C, S = cp.Parameter((2, 2), symmetric=True), cp.Variable((2, 2), PSD=True)
    return _kind(cp.Minimize(cp.sum_squares(S - C)), [], {C: [[1, 1], [1, 1]]}, [S], verdict="kink")


def tied_costs(draw: np.random.Generator) -> Kind:
    """A linear program with two equally cheap goods."""
    c, x = cp.Parameter(3), cp.Variable(3)
    return _kind(cp.Minimize(c @ x), [cp.sum(x) == 1, x >= 0], {c: [1, 1, 2]}, [x], verdict="not unique")


def doubled_rows(draw: np.random.Generator) -> Kind:
    """The same bound twice, each with its own parameter."""
    a, b, x = cp.Parameter(), cp.Parameter(), cp.Variable(2)
    cost = cp.sum_squares(x - np.array([3.0, 1.0]))
    return _kind(cp.Minimize(cost), [x[0] <= a, 2 * x[0] <= b], {a: 1, b: 2}, [x], verdict="dependent rows")


KINDS: dict[str, Callable[[np.random.Generator], Kind]] = {
    make.__name__.replace("_", " "): make
    for make in (
        lasso, ridge_with_bounds, regulator, portfolio, logistic, soft_top_k, maximum_entropy, quadratic_program, relu,
        smoothed_linear, support_vectors, huber, quantiles, network_flow, geometric, nearest_semidefinite,
        matrix_completion, semidefinite_form, robust_least_squares, total_variation, diagonal_metric, log_utility,
        weighted_geometric_mean,
        vertex, relu_at_zero, norm_ball_from_its_rim, semidefinite_at_zero, tied_costs, doubled_rows,
    )
}  # fmt: skip


def kind(name: str, seed: int = 0) -> Kind:
    """Return a kind of problem by its name, with values drawn from a seed."""
    return KINDS[name](np.random.default_rng(seed))
