"""Ask every differentiable-optimization library at hand for the same derivatives, and write what each answers.

The problem is the nearest point to z on {x : a'x = 1, x >= -9}, as a function of a: x = z - a (a'z - 1) / |a|^2. It is
a quadratic program for the libraries that take one and a fixed point for the others, and its second derivative is not
zero. `make peers` installs the libraries into an environment of their own first.
"""

from __future__ import annotations

import importlib.metadata
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import foldopt

PATH = Path("results/tables/peers.md")
F64 = torch.float64
Layer = Callable[[Tensor], Tensor]

Z = torch.tensor([[0.3, -0.2, 0.8], [1.0, 0.5, -0.4]], dtype=F64)
A0 = torch.tensor([[1.0, 0.4, -0.3], [0.2, 0.9, 1.1]], dtype=F64)
DIRECTION = torch.tensor([[0.5, -1.0, 0.2], [0.3, 0.1, -0.7]], dtype=F64)


def exact(a: Tensor) -> Tensor:
    """Return the solution in closed form."""
    z = Z.to(a)
    return z - a * (((a * z).sum(-1, keepdim=True) - 1) / (a * a).sum(-1, keepdim=True))


def step(x: Tensor, a: Tensor) -> Tensor:
    """Return one step of projected gradient descent."""
    y = x - 0.5 * (x - Z.to(a))
    return y - a * (((a * y).sum(-1, keepdim=True) - 1) / (a * a).sum(-1, keepdim=True))


def bounds(like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return Q, and G, h of x >= -9, for a batch like `like`."""
    eye = torch.eye(3, dtype=like.dtype).expand(len(like), 3, 3)
    return eye, -eye, torch.full_like(like, 9.0)


def with_foldopt() -> Layer:
    """Fold one projected gradient step around the closed form."""
    return foldopt.fold(exact, step, dtype=F64)


def with_foldopt_qp() -> Layer:
    """Solve by `QPLayer`."""
    layer = foldopt.QPLayer(on_failure="nan")

    def solve(a: Tensor) -> Tensor:
        Q, G, h = bounds(a)
        return layer(Q, -Z.to(a), G, h, a[:, None], torch.ones_like(a[:, :1]))

    return solve


def with_qpth() -> Layer:
    """Solve by qpth's QPFunction."""
    from qpth.qp import QPFunction

    def solve(a: Tensor) -> Tensor:
        Q, G, h = bounds(a)
        return QPFunction(verbose=-1, eps=1e-14, maxIter=60)(Q, -Z.to(a), G, h, a[:, None], torch.ones_like(a[:, :1]))

    return solve


def with_proxsuite() -> Layer:
    """Solve by proxsuite's QPFunction."""
    from proxsuite.torch.qplayer import QPFunction

    def solve(a: Tensor) -> Tensor:
        Q, _, h = bounds(a)
        layer = QPFunction(structural_feasibility=True, eps=1e-12)
        one, eye = torch.ones_like(a[:, :1]), torch.eye(3, dtype=a.dtype).expand(len(a), 3, 3)
        return layer(Q, -Z.to(a), a[:, None], one, eye, -h, torch.full_like(h, 1e6))[0]

    return solve


def with_cvxpylayers() -> Layer:
    """Solve by cvxpylayers' default solver at a tight tolerance."""
    import cvxpy as cp
    from cvxpylayers.torch import CvxpyLayer

    x, z, a = cp.Variable(3), cp.Parameter(3), cp.Parameter(3)
    layer = CvxpyLayer(cp.Problem(cp.Minimize(cp.sum_squares(x - z)), [a @ x == 1, x >= -9]), [z, a], [x])
    return lambda value: layer(Z.to(value), value, solver_args={"eps": 1e-10})[0]


def with_torchdeq() -> Layer:
    """Find the fixed point by torchdeq, its gradient by implicit differentiation."""
    from torchdeq import get_deq

    deq = get_deq(f_solver="fixed_point_iter", f_max_iter=200, f_tol=1e-14, b_max_iter=200, b_tol=1e-14, ift=True)
    return lambda a: deq(lambda x: step(x, a), torch.zeros_like(a))[0][-1]


LIBRARIES: dict[str, tuple[str | None, Callable[[], Layer]]] = {
    "foldopt, a folded step": (None, with_foldopt),
    "foldopt, `QPLayer`": (None, with_foldopt_qp),
    "cvxpylayers": ("cvxpylayers", with_cvxpylayers),
    "qpth": ("qpth", with_qpth),
    "proxsuite": ("proxsuite", with_proxsuite),
    "torchdeq": ("torchdeq", with_torchdeq),
}


def gradient(layer: Layer, dtype: torch.dtype = F64) -> Tensor:
    """Return the gradient of sum x^3."""
    a = A0.to(dtype).requires_grad_()
    x = layer(a)
    return torch.autograd.grad(x.pow(3).sum(), a)[0]


def second(layer: Layer) -> Tensor:
    """Return the derivative of the gradient along a direction."""
    a = A0.clone().requires_grad_()
    (first,) = torch.autograd.grad(layer(a).pow(3).sum(), a, create_graph=True)
    return torch.autograd.grad((first * DIRECTION).sum(), a)[0]


def tangent(layer: Layer) -> Tensor:
    """Return the forward-mode derivative along a direction."""
    return torch.func.jvp(layer, (A0,), (DIRECTION,))[1]


def jacobian(layer: Layer) -> Tensor:
    """Return the Jacobian by jacrev, that is by vmap over the backward pass."""
    return torch.func.jacrev(layer)(A0)


def mapped(layer: Layer) -> Tensor:
    """Return solutions for a stack of parameters by vmap."""
    return torch.func.vmap(layer)(torch.stack([A0, 2 * A0]))


def low(layer: Layer) -> Tensor:
    """Return the gradient from float32 parameters, which has to be float32."""
    a = A0.float().requires_grad_()
    x = layer(a)
    if x.dtype != torch.float32:
        raise TypeError(f"answers in {str(x.dtype).removeprefix('torch.')}")
    return torch.autograd.grad(x.pow(3).sum(), a)[0].to(F64)


FEATURES = {
    "gradient": gradient,
    "second derivative": second,
    "forward mode": tangent,
    "`jacrev`": jacobian,
    "`vmap`": mapped,
    "float32": low,
}


def answer(layer: Layer, feature: Callable[[Layer], Tensor]) -> str:
    """Return the relative error of what `layer` answers, or what it raises."""
    truth = feature(exact)
    try:
        given = feature(layer)
    except Exception as error:  # whatever it is, it is the answer
        return str(error) if isinstance(error, TypeError) and "answers in" in str(error) else type(error).__name__
    size = float((given - truth).abs().max() / truth.abs().max())
    return f"**wrong by {size:.0%}**" if size > 0.01 else f"{size:.0e}"


def table() -> str:
    """Return the table of all libraries in Markdown."""
    names = list(FEATURES)
    lines = [f"| Library | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for title, (package, make) in LIBRARIES.items():
        name = title if package is None else f"{title} {importlib.metadata.version(package)}"
        cells = [answer(make(), feature) for feature in FEATURES.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    note = f"\nErrors relative to the closed form; torch {torch.__version__.split('+')[0]}. Made by: `make peers`\n"
    return "\n".join([*lines, note])


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    PATH.write_text(table())
    sys.stdout.write(PATH.read_text())
