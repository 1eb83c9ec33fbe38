"""Small programs on which QP layers fail silently, each with its right value or its true cause.

The values are derived by hand and confirmed by `programs.truth`, which shares nothing with foldopt.
"""

import numpy as np

from foldopt import errors
from tests.foldopt.qp.programs import Program

I2, I3, Z2, Z3 = np.eye(2), np.eye(3), np.zeros(2), np.zeros(3)
ONES = np.ones((1, 3))
THIRDS = np.array([0.1, 0.2, 0.3])
BOX = {"G": np.concatenate([I3, -I3]), "h": np.ones(6)}
SIMPLEX = {"G": -I3, "h": Z3, "A": ONES, "b": [1]}


def mean_free(weight):
    return np.asarray(weight) - np.mean(weight)


ASSIGNMENT = np.concatenate([np.kron(I3, np.ones(3)), np.kron(np.ones(3), I3)])
SOFT = {"G": [[0.6, -1, 0], [0.8, 0, -1], [0, -1, 0], [0, 0, -1]], "h": [0.5, 0.5, 0, 0]}
TWO_AS_EIGHT = {
    "Q": [[9, -1, -6], [-1, 3, 2], [-6, 2, 6]],
    "p": [13, -3, -8],
    "G": [
        [-1, 1, 0],
        [1, 1, -1],
        [-1, -1, -1],
        [0, -1, 1],
        [1, 1, 1],
        [1, -1, 0],
        [-1, 1, 1],
        [1, -1, 0],
    ],
    "h": [0, -3, 1, 3, -1, 3, 2, 0],
}
W = [1, 2, 4]  # the weight in three variables
# Of each program: x, a weight w, and the gradient of w'x in p.
RIGHT = {
    "an equality given twice": (
        Program(I3, THIRDS, -I3, Z3, np.ones((2, 3)), [1, 1]),
        np.array([13, 10, 7]) / 30,
        W,
        -mean_free(W),
    ),
    "0'x = 0": (Program(I3, THIRDS, -I3, Z3, np.zeros((1, 3)), [0]), Z3, W, Z3),
    "0'x = 0, inside": (Program(I2, [-2, -1], -I2, Z2, np.zeros((1, 2)), [0]), [2, 1], [1, 2], [-1, -2]),
    "0'x <= 0": (Program(I2, [-2, -1], np.concatenate([-I2, np.zeros((1, 2))]), Z3), [2, 1], [1, 2], [-1, -2]),
    "an equality and its double": (
        Program(I2, [-2, -1], -I2, Z2, [[1, 2], [2, 4]], [1, 2]),  # the bound x_2 = 0 has the multiplier 1
        [1, 0],
        [1, 2],
        Z2,
    ),
    "an equality given twice, at a vertex where a bound carries nothing": (
        Program(I2, [-2, -1], -I2, Z2, np.ones((2, 2)), [1, 1]),
        [1, 0],
        [1, 1],  # the sum is fixed, so that its derivative exists and others do not
        Z2,
    ),
    "more equalities than variables": (
        Program(I2, [-2, -1], -I2, Z2, [[1, 1], [1, 0], [0, 1]], [3, 1, 2]),
        [1, 2],
        [1, 2],
        Z2,
    ),
    **{
        f"assignment 3 x 3, all rows, ridge {ridge:g}": (
            Program(ridge * np.eye(9), [4, 1, 3, 2, 0, 5, 3, 2, 2], -np.eye(9), np.zeros(9), ASSIGNMENT, np.ones(6)),
            [0, 1, 0, 1, 0, 0, 0, 0, 1],
            range(9),
            np.zeros(9),
        )
        for ridge in (0, 1e-5, 0.01)
    },
    **{
        f"LP on the simplex, upper bound {big:.0e} as rows": (
            Program(0 * I3, [0, 0.2, 2], np.concatenate([-I3, I3]), np.concatenate([Z3, np.full(3, big)]), ONES, [1]),
            [1, 0, 0],
            W,
            Z3,
        )
        for big in (1e3, 1e6, 1e8, 1e10, 1e12, 1e15, 1e20, np.inf)
    },
    **{
        f"LP on the simplex, upper bound {big:.0e} as a bound": (
            Program(0 * I3, [0, 0.2, 2], A=ONES, b=[1], lower=Z3, upper=np.full(3, big)),
            [1, 0, 0],
            W,
            Z3,
        )
        for big in (1e3, 1e6, 1e8, 1e10, 1e12, 1e15, 1e20, np.inf)
    },
    **{
        f"soft rows, penalty {penalty:.0e}": (
            Program(np.diag([1, 0, 0]), [-1.2, penalty, penalty], **SOFT),
            [0.625, 0, 0],
            W,
            Z3,
        )
        for penalty in (1e2, 1e4, 1e6, 1e7, 1e8, 1e10)
    },
    # x_3 and x_4 share the rest equally
    **{
        f"two rows times {s:.0e}": (
            Program(
                np.eye(4),
                [-1, -0.5, 0, 0.3],
                s * np.eye(4)[:2],
                s * np.array([0.1, 0.2]),
                np.ones((1, 4)),
                [1],
            ),
            [0.1, 0.2, 0.5, 0.2],
            [1, 2, 3, 5],
            [0, 0, 1, -1],
        )
        for s in (1e-10, 1e-8, 1e-5, 1, 1e5, 1e8, 1e10)
    },
    **{
        f"cost times {c:.0e}": (
            Program(c * I3, c * THIRDS, **SIMPLEX),
            np.array([13, 10, 7]) / 30,
            W,
            -mean_free(W) / c,
        )
        for c in (1e-12, 1e-8, 1e8, 1e12)
    },
    **{
        f"mixed magnitudes {a:.0e}, {e:.0e}": (
            Program(I2, [-a, e], [[0, -1], [0, 1], [1, 0]], [0, 10, 2 * a]),
            [a, 0],
            [1, 2],
            [-1, 0],
        )
        for a, e in ((1e3, 1e-7), (1e5, 1e-4), (1e7, 1e-2), (1e9, 0.5))
    },
    "an equality as two inequalities": (
        Program(I3, THIRDS, [[1, 1, 0], [-1, -1, 0]], [1, -1]),
        [0.55, 0.45, -0.3],
        W,
        [0.5, -0.5, -4],
    ),
    "two equalities as four inequalities, at a vertex": (Program(**TWO_AS_EIGHT), [-1, -1, 1], W, Z3),
    "no inequalities": (Program(I3, THIRDS, A=ONES, b=[1]), np.array([13, 10, 7]) / 30, W, -mean_free(W)),
    "no constraints": (Program(2 * I3, THIRDS), -THIRDS / 2, W, -np.array(W) / 2),
    "bounds only": (Program(I3, [-2, 0.5, 2], lower=-np.ones(3), upper=np.ones(3)), [1, -0.5, -1], W, [0, -2, 0]),
    "a variable fixed by its bounds": (
        Program(I3, THIRDS, A=ONES, b=[1], lower=[0.5, -np.inf, -np.inf], upper=[0.5, np.inf, np.inf]),
        [0.5, 0.3, 0.2],
        W,
        [0, 1, -1],
    ),
    "convex, and flat in what a row fixes": (
        Program(np.diag([1, 0]), [-1, 0], A=[[1, -1]], b=[0]),
        [1, 1],
        [1, 2],
        [-3, -3],  # x_1 = x_2 = -(p_1 + p_2)
    ),
    "an LP at a vertex with one row too many": (
        Program(0 * I2, [-1, -1], [[1, 0], [0, 1], [1, 1]], [1, 1, 2]),
        [1, 1],
        [1, 2],
        Z2,
    ),
    "a weakly active row that follows from others": (
        Program(I2, [1, 1], [[-1, 0], [0, -1], [-1, -1]], Z3),
        [0, 0],
        [1, 2],
        Z2,
    ),
}
# Any point of a face is a solution: a weight that is constant on it has the derivative 0, the other has none.
TIES = {
    "LP with a tie": (Program(0 * I3, [1, 1, 2], **SIMPLEX), [1, 1, 2], [1, 0, 0]),
    "LP with a tie, bounds": (
        Program(0 * I3, [1, 1, 2], A=ONES, b=[1], lower=Z3, upper=np.ones(3)),
        [3, 3, -1],
        [1, 0, 0],
    ),
    "a flat direction beside a curved one": (  # x_2 is free and has no influence on x_1
        Program(np.diag([1, 0]), [-1, 0], lower=[-5, -1], upper=[5, 1]),
        [0, 0],
        [1, 1],
    ),
}
# The weight is constant on the face of solutions, but a small p_2 (or p_1 - p_2) moves x to an end of the face, and the
# row that ends it takes the weight along: in one direction at each end, or by as much at both.
FACES = {
    "(x_1 + x_2 - 1)^2 in a box": (  # the sum is 1 - |e| / 2 at p = (-2 + e, -2 - e)
        Program(np.full((2, 2), 2.0), [-2, -2], lower=-np.ones(2), upper=np.ones(2)),
        [1, 1],
        None,
    ),
    "x_1^2 on a strip": (  # x_1 is p_2 - p_1
        Program(np.diag([1, 0]), [0, 0], [[1, 1], [-1, -1]], [1, 1]),
        [1, 0],
        [-1, 1],
    ),
}
# A bound that carries nothing: one weight has a derivative, the other has two.
KINKS = {
    "min 1/2 |x|^2, x >= 0": (Program(I2, [0, -1], lower=Z2), [0, 1], [0, -1], [1, 0]),
    "simplex, its vertex": (
        Program(I2, [-1, 0], -I2, Z2, np.ones((1, 2)), [1]),
        [1, 1],
        [0, 0],
        [1, 0],
    ),
}
REFUSED = {
    "inconsistent equalities": (Program(I3, THIRDS, -I3, Z3, np.ones((2, 3)), [1, 2]), errors.InfeasibleError),
    "inconsistent equalities, two variables": (
        Program(I2, [-2, -1], -I2, Z2, np.ones((2, 2)), [1, 2]),
        errors.InfeasibleError,
    ),
    "three equalities that meet nowhere": (
        Program(I2, Z2, -I2, Z2, [[1, 1], [0, 1], [-1, 1]], [1, 1, -1]),
        errors.InfeasibleError,
    ),
    "0'x = 1": (Program(I2, Z2, A=np.zeros((1, 2)), b=[1]), errors.InfeasibleError),
    "0'x <= -1": (Program(I2, Z2, np.zeros((1, 2)), [-1]), errors.InfeasibleError),
    "x >= 1 and x <= -1": (Program([[1.0]], [0], [[-1], [1]], [-1, -1]), errors.InfeasibleError),
    "lower above upper": (Program(I2, Z2, lower=[0, 1], upper=[1, 0]), errors.InfeasibleError),
    "an LP without a point": (Program(0 * I2, [1, 1], -I2, Z2, [[1, 1]], [-1]), errors.InfeasibleError),
    "an LP without a bound": (Program(0 * I2, [-1, 0], [[0, 1]], [1]), errors.UnboundedError),
    "an LP without a bound on a half-space": (
        Program(0 * I3, [-1, -2, 1], [[-1, -1, 0]], [0], [[0, 0, 1]], [1]),
        errors.UnboundedError,
    ),
    "a flat direction with a cost": (Program(np.diag([1, 0]), [0, 1]), errors.UnboundedError),
    "an LP without rows": (Program(0 * I2, [1, 0]), errors.UnboundedError),
    "indefinite in a box": (
        Program(np.diag([1, -1, 1]), [0.3, 0.1, 0.1], **BOX),
        errors.NonconvexError,
    ),
    "indefinite without rows": (Program(np.diag([1, -1, 1]), [0.3, 0.1, 0.1]), errors.NonconvexError),
    "indefinite with one row": (
        Program(np.diag([1, -1, 1]), [0.3, 0.1, 0.1], I3[:1], [1]),
        errors.NonconvexError,
    ),
    "concave": (Program(-I2, [0.3, 0.1], I2, [1, 1]), errors.NonconvexError),
    "indefinite off the diagonal": (
        Program([[0, 1], [1, 0]], [0.1, -0.2], lower=[-1, -1], upper=[1, 1]),
        errors.NonconvexError,
    ),
    "indefinite at the scale of 1e-6": (
        Program(np.diag([1, -1e-6, 1]), [0.3, 0.1, 0.1], **BOX),
        errors.NonconvexError,
    ),
}
