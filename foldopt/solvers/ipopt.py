"""Ipopt as a black box for smooth programs: exact first and second derivatives, sparse where that is declared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foldopt._decompression import Derivatives
from foldopt._sparsity import SparseDerivatives
from foldopt.errors import InputError, MissingDependencyError
from foldopt.qp.matrix import SparseMatrix
from foldopt.updates.programs import SmoothProgram, SQPData

__all__ = ["CAUSES", "IpoptSolution", "SparseDerivatives", "solve_ipopt"]

CAUSES = {
    0: "solved",
    1: "solved",  # to Ipopt's acceptable level
    2: "infeasible",  # a point of least violation, as far as its surroundings tell
    3: "no progress",
    4: "unbounded",
    6: "solved",  # as many equalities as variables: the only point is feasible
    -1: "iteration limit",
    -2: "no progress",  # the restoration phase failed
    -3: "no progress",  # no search direction could be computed
    -4: "time limit",
    -5: "time limit",
    -10: "more equalities than variables",
    -11: "infeasible",  # a lower bound above an upper one
    -13: "not finite",
}
WARM: dict[str, str | int | float] = {
    "warm_start_init_point": "yes",
    "warm_start_bound_push": 1e-9,
    "warm_start_slack_bound_push": 1e-9,
    "warm_start_mult_bound_push": 1e-9,
    "mu_init": 1e-6,
}


class IpoptSolution(NamedTuple):
    """What Ipopt found, sample by sample.

    Attributes:
        x: the solutions, (B, n); Ipopt's last iterate where a sample is not solved.
        nu: the multipliers of the equalities, (B, p).
        lam: the multipliers of the inequalities, (B, m), at least 0.
        status: "solved" for each sample, or why it is not, in one of the words of `CAUSES`.
        iterations: how many Ipopt took, (B,) int.

    Examples:
        >>> import torch
        >>> x = torch.zeros(1, 2)
        >>> found = IpoptSolution(x, x[:, :0], x[:, :0], ("solved",), torch.tensor([3]))
        >>> found.status
        ('solved',)
    """

    x: Tensor
    nu: Tensor
    lam: Tensor
    status: tuple[str, ...]
    iterations: Tensor


def solve_ipopt(
    program: SmoothProgram,
    start: Tensor,
    *params: Tensor,
    multipliers: tuple[Tensor, Tensor] | None = None,
    sparse: SparseDerivatives | None = None,
    tol: float = 1e-10,
    max_iter: int = 500,
    time_limit: float | None = None,
    options: Mapping[str, str | int | float] | None = None,
) -> IpoptSolution:
    """Find local solutions of min f(x, c) s.t. h(x, c) = 0, g(x, c) <= 0 by Ipopt, one sample after the other.

    Ipopt is a primal-dual interior point method with a filter line search (Wächter and Biegler, On the implementation
    of an interior-point filter line-search algorithm for large-scale nonlinear programming, Mathematical Programming
    106, 2006). It gets the exact gradient, Jacobian and Hessian of the Lagrangian by automatic differentiation.

    Args:
        program: the functions; without `sparse` any object that has the methods `values`, `bounds` and `sqp_data` of a
            `SmoothProgram`. Its bounds are bounds for Ipopt: no function is evaluated beyond them.
        start: where Ipopt starts, (B, n).
        *params: the parameters c of the functions.
        multipliers: (nu, lam), (B, p) and (B, m), to start from as well: a warm start, for a `start` that is close to
            the solution, such as that of the last call with parameters nearby.
        sparse: the derivatives as sparse matrices, ``foldopt.solvers.ipopt.SparseDerivatives(program)``; None takes
            dense ones.
        tol: Ipopt's tolerance, relative to its own scaling of the program.
        max_iter: cap of iterations for each sample.
        time_limit: seconds for each sample, or None.
        options: more of Ipopt's options by name, such as ``{"linear_solver": "ma57"}``; they come after the others.

    Returns:
        An `IpoptSolution`; the Lagrangian is f + nu.h + lam.g with lam >= 0.

    Raises:
        InputError: start is not (B, n), Ipopt does not know an option, or given sparsity misses entries.
        MissingDependencyError: cyipopt is not installed.

    Examples:
        >>> import torch
        >>> from foldopt import SmoothProgram
        >>> program = SmoothProgram(lambda x, c: (c * x).sum(1), None, lambda x, c: x.square().sum(1, keepdim=True) - 1)
        >>> c = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
        >>> found = solve_ipopt(program, torch.ones_like(c), c)  # doctest: +SKIP
        >>> found.x, found.status  # doctest: +SKIP
        (tensor([[-0.6000, -0.8000]], dtype=torch.float64), ('solved',))
    """
    if start.dim() != 2 or not start.is_floating_point():
        raise InputError(f"start has shape {tuple(start.shape)} and dtype {start.dtype}, expected floating (B, n).")
    cyipopt = _package()
    settings = _settings(tol, max_iter, time_limit, multipliers is not None, options or {})
    x, params = start.detach().clone(), tuple(part.detach() for part in params)
    _, h, g = program.values(x, *params)
    p, y = h.shape[1], torch.zeros_like(torch.cat([h, g], 1))
    if multipliers:
        y = torch.cat(multipliers, 1).detach().to(x).clone()
    box = _Box(program, x, g.shape[1] + p, params)
    limits = {"cl": [0.0] * p + [-float("inf")] * (box.rows - p), "cu": [0.0] * box.rows}
    status, iterations = [], []
    for i in range(len(x)):
        while True:
            derivatives = _Dense(program, x, y, p, params) if sparse is None else _Sparse(sparse, x, params)
            sample = _Sample(program, derivatives, x, y, i, params, box.rows)
            problem = cyipopt.Problem(n=x.shape[1], m=box.rows, problem_obj=sample, **limits, **box.around(i))
            _set_options(problem, settings)
            z, info = problem.solve(_numbers(x[i]), **box.multipliers(y[i]))
            if isinstance(sample.error, _PlacesMissingError):
                sample.error.sparse.extend(sample.error.x, params)
            elif sample.error is not None:
                raise sample.error
            else:
                break
        x[i], y[i] = torch.from_numpy(z).to(x), box.joined(info).to(x)
        status.append(CAUSES.get(info["status"], f"Ipopt failed with status {info['status']}"))
        iterations.append(sample.iterations)
    return IpoptSolution(x, y[:, :p], y[:, p:].clamp(min=0), tuple(status), torch.tensor(iterations))


def _package() -> Any:
    try:
        import cyipopt
    except ImportError as error:
        raise MissingDependencyError(
            "solver='ipopt' needs cyipopt: pip install 'foldopt[ipopt]', or conda install -c conda-forge cyipopt; "
            "solver='sqp' is built in."
        ) from error
    return cyipopt


def _settings(
    tol: float, max_iter: int, time_limit: float | None, warm: bool, options: Mapping[str, str | int | float]
) -> dict[str, str | int | float]:
    """Return Ipopt's options; those of the caller come last and win."""
    settings: dict[str, str | int | float] = {
        "print_level": 0,
        "sb": "yes",
        "bound_relax_factor": 0.0,
        "tol": float(tol),
        "max_iter": max_iter,
    }
    if time_limit is not None:
        known = _package().IPOPT_VERSION >= (3, 14, 0)
        settings["max_wall_time" if known else "max_cpu_time"] = float(time_limit)
    return {**settings, **(WARM if warm else {}), **options}


def _set_options(problem: Any, settings: Mapping[str, str | int | float]) -> None:
    for name, value in settings.items():
        try:
            problem.add_option(name, value)
        except TypeError as error:
            raise InputError(
                f"options: Ipopt refuses {name}={value!r}; its documentation lists the options and their types."
            ) from error


def _numbers(t: Tensor) -> Any:
    return t.detach().double().cpu().numpy()


class _Box:
    """The bounds of a program's variables, which Ipopt keeps to all the way; their rows are the last of g.

    rows: how many constraints are left for Ipopt.
    """

    def __init__(self, program: SmoothProgram, x: Tensor, r: int, params: tuple[Tensor, ...]) -> None:
        self.lower, self.upper = (part.double().cpu() for part in program.bounds(x, *params))
        fixed = ((self.lower == self.upper) & self.lower.isfinite()).all(0)
        self.below, self.above = (part.isfinite().any(0) & ~fixed for part in (self.lower, self.upper))
        self.rows = r - int(self.below.sum()) - int(self.above.sum())

    def around(self, i: int) -> dict[str, Any]:
        """Return the bounds of sample i under cyipopt's names."""
        return {
            "lb": torch.where(self.below, self.lower[i], -torch.inf).numpy(),
            "ub": torch.where(self.above, self.upper[i], torch.inf).numpy(),
        }

    def multipliers(self, y: Tensor) -> dict[str, Any]:
        """Return multipliers (r,) of all rows under cyipopt's names."""
        y = y.detach().double().cpu()
        ends = torch.zeros(2, len(self.below), dtype=torch.float64)
        ends[0, self.below], ends[1, self.above] = y[self.rows :].split([int(self.below.sum()), int(self.above.sum())])
        return {"lagrange": y[: self.rows].numpy(), "zl": ends[0].numpy(), "zu": ends[1].numpy()}

    def joined(self, info: dict[str, Any]) -> Tensor:
        """Return the multipliers that cyipopt found, of all rows, (r,)."""
        own, low, high = (torch.from_numpy(info[name]) for name in ("mult_g", "mult_x_L", "mult_x_U"))
        return torch.cat([own, low[self.below], high[self.above]])


class _PlacesMissingError(Exception):
    """Some derivative has entries at x, (B, n), in places that are not known."""

    def __init__(self, sparse: SparseDerivatives, x: Tensor) -> None:
        super().__init__()
        self.sparse, self.x = sparse, x


class _Dense:
    """The derivatives of a program as dense matrices, of which all entries count."""

    def __init__(self, program: SmoothProgram, x: Tensor, y: Tensor, p: int, params: tuple[Tensor, ...]) -> None:
        n, r = x.shape[1], y.shape[1]
        self.jacobian_places = torch.arange(r).repeat_interleave(n), torch.arange(n).repeat(r)
        self.hessian_places = torch.tril_indices(n, n).unbind()
        self._model = lambda x, y: SQPData(*program.sqp_data(x, y[:, :p], y[:, p:], *params))
        self._zero = torch.zeros_like(y)

    def first(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient of f, (B, n), and the entries of the constraints' Jacobian, (B, nnz)."""
        model = self._model(x, self._zero)
        return model.gradient, torch.cat([model.jacobian_h, model.jacobian_g], 1).flatten(1)

    def second(self, x: Tensor, y: Tensor, weight: float) -> Tensor:
        """Return the entries of the lower triangle of the Hessian of weight * f + y.c, (B, nnz)."""
        if weight:
            hessian = weight * self._model(x, y / weight).hessian
        else:
            hessian = self._model(x, y).hessian - self._model(x, self._zero).hessian
        rows, columns = self.hessian_places
        return hessian[:, rows, columns]


class _Sparse:
    """The derivatives of a program in the places where they have entries; methods as those of `_Dense`.

    They raise `_PlacesMissingError` where there are entries elsewhere.
    """

    def __init__(self, sparse: SparseDerivatives, x: Tensor, params: tuple[Tensor, ...]) -> None:
        self._sparse, self._params = sparse, params
        self._places = sparse.places(x, params)
        self._at = Derivatives(sparse.program, x, params)
        H, C = self._places.H, self._places.C
        self._lower = (H.rows >= H.columns).nonzero()[:, 0]
        self.jacobian_places = C.rows, C.columns
        self.hessian_places = H.rows[self._lower], H.columns[self._lower]

    def first(self, x: Tensor) -> tuple[Tensor, Tensor]:
        C = self._complete(self._places.jacobian(self._recorded(x)))
        return self._at.gradient.detach(), C.values

    def second(self, x: Tensor, y: Tensor, weight: float) -> Tensor:
        return self._complete(self._places.hessian(self._recorded(x), y, weight)).values[:, self._lower]

    def _recorded(self, x: Tensor) -> Derivatives:
        if not torch.equal(x, self._at.x):
            self._at = Derivatives(self._sparse.program, x, self._params)
        return self._at

    def _complete(self, read: tuple[SparseMatrix, bool]) -> SparseMatrix:
        matrix, complete = read
        if not complete:
            raise _PlacesMissingError(self._sparse, self._at.x.detach())
        return matrix


class _Sample:
    """The functions of sample i and their derivatives, under the names that cyipopt asks for.

    The functions see the whole batch, since only they know which of the parameters it shares.
    """

    def __init__(
        self,
        program: SmoothProgram,
        derivatives: _Dense | _Sparse,
        x: Tensor,
        y: Tensor,
        i: int,
        params: tuple[Tensor, ...],
        rows: int,
    ) -> None:
        self._program, self._derivatives, self._params = program, derivatives, params
        self._rows, self._kept = rows, (derivatives.jacobian_places[0] < rows).nonzero()[:, 0]
        self._x, self._y, self._i = x.clone(), y.clone(), i
        self._values: tuple[Tensor, Tensor] | None = None
        self._first: tuple[Tensor, Tensor] | None = None
        self.iterations = 0
        self.error: BaseException | None = None

    def _moved_to(self, z: Any) -> Tensor:
        """Return the batch, (B, n), with this sample at z; what was found at another point is forgotten."""
        row = torch.from_numpy(z).to(self._x)
        if not torch.equal(row, self._x[self._i]):
            self._x = self._x.clone()
            self._x[self._i] = row
            self._values = self._first = None
        return self._x

    def _valued(self, z: Any) -> tuple[Tensor, Tensor]:
        x = self._moved_to(z)
        if self._values is None:
            f, h, g = self._program.values(x, *self._params)
            self._values = f[self._i], torch.cat([h, g], 1)[self._i]
        return self._values

    def _sloped(self, z: Any) -> tuple[Tensor, Tensor]:
        x = self._moved_to(z)
        if self._first is None:
            self._first = self._derivatives.first(x)
        return self._first

    def _row(self, derivative: Callable[[], Tensor]) -> Any:
        """Return this sample's row of a derivative.

        An exception is kept as `error` and Ipopt is told to stop: cyipopt 1.7 loses what the Hessian raises.
        """
        try:
            return _numbers(derivative()[self._i])
        except BaseException as error:
            self.error = error
            raise _package().CyIpoptEvaluationError from error

    def objective(self, z: Any) -> float:
        return float(self._valued(z)[0])

    def constraints(self, z: Any) -> Any:
        return _numbers(self._valued(z)[1][: self._rows])

    def gradient(self, z: Any) -> Any:
        return self._row(lambda: self._sloped(z)[0])

    def jacobian(self, z: Any) -> Any:
        return self._row(lambda: self._sloped(z)[1][:, self._kept])

    def jacobianstructure(self) -> tuple[Any, Any]:
        rows, columns = self._derivatives.jacobian_places
        return rows[self._kept].numpy(), columns[self._kept].numpy()

    def hessian(self, z: Any, y: Any, weight: float) -> Any:
        self._y[self._i, : self._rows] = torch.from_numpy(y).to(self._y)
        return self._row(lambda: self._derivatives.second(self._moved_to(z), self._y, weight))

    def hessianstructure(self) -> tuple[Any, Any]:
        rows, columns = self._derivatives.hessian_places
        return rows.numpy(), columns.numpy()

    def intermediate(self, mode: int, iterations: int, *_: Any) -> bool:
        self.iterations = iterations
        return True
