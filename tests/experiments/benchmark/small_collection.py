"""A collection of one small made-up problem, for tests of the benchmark of quadratic programs."""

import json

import numpy as np
import scipy.io
import scipy.sparse as sp


def write_small(folder, name="SMALL"):
    """Write min x1^2 + x1 x2 + 1.5 x2^2 - x1 + 7 with an equality, a range, a limit, a free row, a fixed variable."""
    rows = np.array([[1.0, 1, 1], [1, -1, 0], [0, 2, 1], [0, 1, 1]])
    content = {
        "P": sp.csc_matrix([[2.0, 1, 0], [1, 3, 0], [0, 0, 0]]),
        "q": np.array([[-1.0], [0], [0]]),
        "r": np.array([[7]]),
        "A": sp.csc_matrix(np.vstack([rows, np.eye(3)])),
        "l": np.array([[2.0], [-1], [-1e20], [-1e20], [0], [-1e20], [0.5]]),
        "u": np.array([[2.0], [3], [4], [1e20], [1], [2], [0.5]]),
    }
    scipy.io.savemat(folder / f"{name}.mat", content)
    (folder / "optima.json").write_text(json.dumps({name: 7.25}))
