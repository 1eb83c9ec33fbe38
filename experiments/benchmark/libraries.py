"""Libraries that differentiate large sparse quadratic programs, and how to run them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from experiments.benchmark.collection import Arguments, Vector
from experiments.benchmark.hard_cases import F64
from experiments.benchmark.qp_peers import OF_QPSOLVERS, Setting, moreau_settings, moreau_solution
from experiments.benchmark.refusals import DEGENERATE, reason
from experiments.report.measurements import peak_memory, seconds
from foldopt import QPLayer


@dataclass(frozen=True)
class Prepared:
    """A program in the form of a library.

    Attributes:
        solve: Maps the argument that is differentiated to x, (n,).
        verdict: Returns the verdict on the last gradient, "" for libraries without verdicts.
    """

    solve: Callable[[Tensor], Tensor]
    verdict: Callable[[], str] = str


@dataclass(frozen=True)
class Library(Setting):
    """A library at one setting.

    Attributes:
        prepare: Maps a program and the name of the argument that is differentiated to `Prepared`. All libraries except
            foldopt differentiate only p.
    """

    prepare: Callable[[Arguments, str], Prepared]


@dataclass(frozen=True)
class Answer:
    """The answer of a library: a solution and a gradient, or an error.

    Attributes:
        said: "answered", "refused" (an error that the library raises on purpose, a failure status, or NaN) or "raw"
            (any other exception).
        x: The solution, (n,).
        gradient: The gradient.
        verdict: The verdict on the derivative, if the library has one.
        error: The error message.
        seconds_forward: Seconds of the forward pass.
        seconds_backward: Seconds of the backward pass.
        peak_bytes: Growth of the memory in use during both.
    """

    said: str
    x: Vector | None = None
    gradient: Vector | None = None
    verdict: str = ""
    error: str = ""
    seconds_forward: float = np.nan
    seconds_backward: float = np.nan
    peak_bytes: float = np.nan


def tensor(value: Vector) -> Tensor:
    """Return a copy of `value` in float64."""
    return torch.tensor(value, dtype=F64)


def one_pass(prepared: Prepared, value: Vector, weights: Vector, known: dict[str, Any]) -> None:
    """Solve with `value` as the argument that is differentiated, and compute the gradient of weights'x.

    x, gradient, seconds_forward and seconds_backward are stored in `known` one by one, until an error occurs.
    """
    leaf = tensor(value).requires_grad_()
    x, known["seconds_forward"] = seconds(lambda: prepared.solve(leaf))
    known["x"] = x.detach().numpy()
    gradients, known["seconds_backward"] = seconds(lambda: torch.autograd.grad(x @ tensor(weights), leaf))
    known["gradient"] = gradients[0].numpy()


def ask(library: Library, args: Arguments, name: str, weights: Vector) -> Answer:
    """Return the answer of `library` with the gradient of weights'x with respect to the argument `name`."""
    known: dict[str, Any] = {}

    def attempt() -> Exception | None:
        try:
            one_pass(prepared, getattr(args, name), weights, known)
        except Exception as error:  # the tables show the exceptions of other libraries
            return error
        return None

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = library.prepare(args, name)
        error, known["peak_bytes"] = peak_memory(attempt)
    verdict = prepared.verdict()
    if error is not None:
        said = "refused" if library.is_refusal(error) else "raw"
        message = f"{type(error).__name__}: {error}"[:300]
        return Answer(said, verdict=verdict or reason(error, DEGENERATE), error=message, **known)
    answer = Answer("answered", verdict=verdict, **known)
    finite = np.isfinite(known["x"]).all() and np.isfinite(known["gradient"]).all()
    return answer if finite else replace(answer, said="refused", error="NaN", x=None, gradient=None)


@cache
def warm_up(library: str) -> None:
    """Let `library` solve and differentiate a small program, so that its imports are not measured later."""
    eye, none = sp.csc_matrix(np.eye(2)), sp.csr_matrix((0, 2))
    bounds = np.zeros(2), np.ones(2)
    args = Arguments(eye, np.array([1.0, -0.5]), none, np.zeros(0), none, np.zeros(0), *bounds)
    ask(LIBRARIES[library], args, "p", np.ones(2))


def _foldopt(**options: Any) -> Callable[[Arguments, str], Prepared]:
    def prepare(args: Arguments, name: str) -> Prepared:
        layer = QPLayer(**options)
        vectors = {key: tensor(getattr(args, key)) for key in ("p", "h", "b", "lower", "upper")}

        def solve(leaf: Tensor) -> Tensor:
            p, h, b, lower, upper = (vectors | {name: leaf}).values()
            return layer(args.Q, p[None], args.G, h, args.A, b, lower=lower, upper=upper)[0]

        def verdict() -> str:
            verdicts = layer.last.verdict if layer.last is not None else None
            return str(verdicts[0]) if verdicts else ""

        return Prepared(solve, verdict)

    return prepare


def _rows(args: Arguments) -> tuple[sp.csr_matrix, Vector]:
    """Return all inequalities, including the bounds, as rows and right-hand sides."""
    eye = sp.identity(len(args.p), format="csr")
    lower, upper = np.isfinite(args.lower), np.isfinite(args.upper)
    rows = sp.vstack([args.G, -eye[lower], eye[upper]], format="csr")
    return rows, np.concatenate([args.h, -args.lower[lower], args.upper[upper]])


def _dqp(**options: Any) -> Callable[[Arguments, str], Prepared]:
    def prepare(args: Arguments, name: str) -> Prepared:
        from dqp import dQP

        G, h = _rows(args)
        if not len(h):  # the library's way to have no inequalities
            G, h = sp.csr_matrix((1, len(args.p))), np.ones(1)
        equal = (_csc(args.A), tensor(args.b)) if len(args.b) else (None, None)
        layer = dQP.dQP_layer(settings=dQP.build_settings(solve_type="sparse", **options))
        Q, rows, right = _csc(args.Q), _csc(G), tensor(h)
        return Prepared(lambda p: layer(Q, p, rows, right, *equal)[0].reshape(-1))

    return prepare


def _csc(matrix: sp.spmatrix) -> Tensor:
    form = sp.csc_matrix(matrix)
    columns, rows = (torch.as_tensor(part, dtype=torch.int64) for part in (form.indptr, form.indices))
    return torch.sparse_csc_tensor(columns, rows, tensor(form.data), size=form.shape)


def _moreau(tolerance: float | None = None) -> Callable[[Arguments, str], Prepared]:
    def prepare(args: Arguments, name: str) -> Prepared:
        import moreau
        from moreau.torch import Solver

        G, h = _rows(args)
        Q, rows = sp.csr_matrix(args.Q), sp.vstack([args.A, G], format="csr")
        values, right = (tensor(Q.data), tensor(rows.data)), tensor(np.concatenate([args.b, h]))
        places = [torch.as_tensor(part).long() for m in (Q, rows) for part in (m.indptr, m.indices)]
        cones = moreau.Cones(num_zero_cones=len(args.b), num_nonneg_cones=len(h))

        def solve(p: Tensor) -> Tensor:
            solver = Solver(len(p), len(right), *places, cones=cones, settings=moreau_settings(tolerance))
            return moreau_solution(solver, *values, p, right)

        return Prepared(solve)

    return prepare


LIBRARIES: Mapping[str, Library] = {
    "foldopt": Library("foldopt", "", (), _foldopt()),
    "foldopt_piqp": Library("foldopt, piqp", "", (), _foldopt(solver="piqp")),
    "moreau": Library("moreau", "moreau", (), _moreau()),
    "moreau_tight": Library("moreau, 1e-11", "moreau", (), _moreau(tolerance=1e-11)),
    "dqp": Library("libdqp, OSQP 1e-6", "libdqp", OF_QPSOLVERS, _dqp()),
    "dqp_piqp": Library("libdqp, piqp 1e-6", "libdqp", OF_QPSOLVERS, _dqp(qp_solver="piqp")),
    "dqp_tight": Library("libdqp, piqp 1e-11", "libdqp", OF_QPSOLVERS, _dqp(qp_solver="piqp", eps_abs=1e-11)),
}
