"""Diagnose a wrong layer.

Five layers for nonnegative least squares, four of them with a common mistake: what each layer says by itself, and what
only `foldopt.check` finds.
"""

# %% [markdown]
# ## The problem
#
# Nonnegative least squares with a ridge explains a spectrum b by amounts x of known substances, the columns of A:
#
# > minimize ½|Ax − b|² + ½ρ|x|² subject to x ≥ 0
#
# SciPy's `nnls` solves it. The folded step is one of projected gradient descent, x ← max(x − α(Aᵀ(Ax − b) + ρx), 0). A
# layer made of a solver and a step can be wrong although its code runs and returns numbers of the right shape. This
# page makes four mistakes on purpose and looks at what happens.

# %%
import matplotlib.pyplot as plt
import numpy as np
import scipy.optimize
import torch

import foldopt

generator = torch.Generator().manual_seed(0)
A = torch.rand(30, 6, dtype=torch.float64, generator=generator)
amounts = torch.tensor([1.0, 0.0, 2.0, 0.5, 0.0, 1.5], dtype=torch.float64)
b = (A @ amounts + 0.2 * torch.randn(30, dtype=torch.float64, generator=generator))[None]
ridge = torch.tensor(0.5, dtype=torch.float64)
ALPHA = 1 / float(torch.linalg.matrix_norm(A, 2) ** 2 + 5)  # a safe stepsize for ridges up to 5


def amounts_by_scipy(b, ridge):
    """Return x (B, 6) for spectra b (B, 30): least squares with rows sqrt(ridge) I below A."""
    stacked = np.concatenate([A.numpy(), float(ridge) ** 0.5 * np.eye(6)])
    return torch.tensor(np.array([scipy.optimize.nnls(stacked, np.append(one, np.zeros(6)))[0] for one in b.numpy()]))


def slope(x, b, ridge):
    """Return the gradient of the objective at x (B, 6)."""
    return (x @ A.T - b) @ A + ridge * x


right = foldopt.fold(amounts_by_scipy, lambda x, b, ridge: (x - ALPHA * slope(x, b, ridge)).relu())
report = foldopt.check(right, b, ridge)
print(f"right layer: residual below 1e-12 {bool((report.residual < 1e-12).all())}, problems {report.problems}")

# %% [markdown]
# ```text
# right layer: residual below 1e-12 True, problems []
# ```
#
# `print(report)` shows the whole report; the tutorial [Diagnose a wrong layer](../docs/tutorials/diagnose.md) explains
# its lines.
#
# ## Mistake 1: the step solves another problem
#
# Here the ridge has the wrong sign. The solution is no fixed point of this step, and the layer refuses at its first
# call.

# %%
other = foldopt.fold(amounts_by_scipy, lambda x, b, ridge: (x - ALPHA * slope(x, b, -ridge)).relu())
try:
    other(b, ridge)
except foldopt.errors.FixedPointError as error:
    print("FixedPointError:", str(error).split(":")[0])

# %% [markdown]
# ```text
# FixedPointError: the update step does not fix the solver's solution
# ```
#
# ## Mistake 2: the solver stops early
#
# This solver is the step itself, repeated a fixed number of times from 0. As long as the residual of the fixed point is
# above the tolerance, the layer refuses too. With `on_failure="nan"` such a sample gets a gradient of NaN instead of
# the error, and `layer.last.ok` is false for it, so that we can look at all of them.


# %%
def stopped(iterations):
    """Return a layer whose solver makes so many steps of projected gradient descent."""

    def solve(b, ridge):
        x = b.new_zeros(len(b), 6)
        for _ in range(iterations):
            x = right.update(x, b, ridge)
        return x

    return foldopt.fold(solve, right.update, on_failure="nan")


counts, residuals, answered = range(50, 601, 50), [], []
for layer in map(stopped, counts):
    layer(b, ridge)
    residuals.append(layer.last.residual.item())
    answered.append(layer.last.ok.item())
print("the layer answers from", counts[answered.index(True)], "iterations on")

# %% [markdown]
# ```text
# the layer answers from 300 iterations on
# ```
#
# ## Mistake 3: a stepsize that is too large for the chosen linear solver
#
# The derivative does not depend on the stepsize of the step, but the paper's fixed-point iteration for the backward
# pass (LFPI) converges only for small ones. With a stepsize ten times as large it diverges; the backward pass says so
# and returns nothing. The default, `linear_solver="auto"`, has no such limit.

# %%
gradients = {}
for solver in ("lfpi", "auto"):
    layer = foldopt.fold(
        amounts_by_scipy, lambda x, b, ridge: (x - 10 * ALPHA * slope(x, b, ridge)).relu(), linear_solver=solver
    )
    asked = ridge.clone().requires_grad_()
    try:
        layer(b, asked).sum().backward()
        print(f"{solver}: derivative {asked.grad:.4f}")
    except foldopt.errors.LinearSolveError as error:
        print(f"{solver}: LinearSolveError:", str(error).split(" v =")[0])

# %% [markdown]
# ```text
# lfpi: LinearSolveError: linear solver 'lfpi' did not solve the adjoint equation
# auto: derivative -0.1756
# ```
#
# ## Mistake 4: a detached tensor
#
# This step reuses a value of x that was computed without gradients. It fixes the solution, so the layer has no reason
# to complain: it answers, and its derivative is wrong. Only a comparison with differences of the solver can find that.


# %%
def careless(x, b, ridge):
    """Return a step that fixes the solution but hides a part of its dependence on x."""
    with torch.no_grad():
        kept = x.clone()
    return (x - ALPHA * ((x @ A.T - b) @ A + ridge * kept)).relu()


wrong = foldopt.fold(amounts_by_scipy, careless)
report = foldopt.check(wrong, b, ridge)
for found in report.gradients:
    print(f"parameter {found.name}: folded {found.folded:.3f}, by differences {found.differences:.3f}")
print(report.problems[0].split(".")[0])

# %% [markdown]
# ```text
# parameter 0: folded -0.781, by differences -0.631
# parameter 1: folded 0.756, by differences 0.552
# the folded derivative differs from finite differences for parameter 0, 1
# ```
#
# `report.problems` goes on to say where to look. The left picture shows how the mistake grows with the ridge (at 0.2
# one of the amounts becomes 0, so that the derivative jumps). The right one shows mistake 2: below the tolerance the
# layer answers.
#
# ![Right and wrong derivatives over the ridge; residual over iterations](../docs/assets/examples/diagnose_layer.png)

# %%
ridges = torch.linspace(0.05, 5, 34, dtype=torch.float64)


def derivatives(layer):
    """Return the derivative of the sum of x in the ridge, at each of the ridges."""
    return [torch.func.grad(lambda one: layer(b, one).sum())(one).item() for one in ridges]


h, middle = 1e-4, ridges[1::4]
differences = [((amounts_by_scipy(b, one + h) - amounts_by_scipy(b, one - h)).sum() / (2 * h)).item() for one in middle]
figure, (left, low) = plt.subplots(1, 2)
left.plot(ridges, derivatives(right), label="right layer")
left.plot(ridges, derivatives(wrong), "--", label="detached tensor")
left.plot(middle, differences, "o", color="0.1", label="differences of the solver")
left.set(xlabel="ridge ρ", ylabel="derivative of the sum of x in ρ", title="A mistake that only differences find")
left.legend()
low.semilogy(counts, residuals, color="0.6")
for mark, color, label, sign in (("x", "C1", "refused", False), ("o", "C0", "answered", True)):
    shown = [k for k, one in enumerate(answered) if one == sign]
    low.semilogy([counts[k] for k in shown], [residuals[k] for k in shown], mark, color=color, label=label)
low.axhline(1e-6, color="0.4", linestyle="--")
low.text(counts[0], 1e-6, "tolerance", va="top", color="0.3")
low.set(
    xlabel="iterations of the solver", ylabel="relative residual of the fixed point", title="A solver that stops early"
)
low.legend()
plt.show()

# %% [markdown]
# Put `assert not foldopt.check(layer, *params).problems` into the tests of your own layer, at random parameters and a
# small batch. It costs four solves for each parameter.
