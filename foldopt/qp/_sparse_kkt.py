"""One large sparse KKT system K = [[H, S'], [S, 0]]: K is factored with a shift, and GMRES solves with K itself.

The shifted matrix is quasidefinite, so that an LDL' factorization exists for every symmetric order of its rows
(Vanderbei, Symmetric quasidefinite matrices, 1995), and the order can be chosen for little fill. GMRES with these
factors as a preconditioner removes the effect of the shift (Orban and Arioli, Iterative solution of symmetric
quasi-definite linear systems, 2017). The arrays in this module are those of numpy and scipy.
"""

from __future__ import annotations

from typing import Any

from foldopt.errors import MissingDependencyError

SHIFT, SMALL, COARSE, LARGEST_SHIFT = 1e-8, 1e-11, 1e-6, 1e-5
STEPS = 40  # GMRES steps
EXACT = 1e-14  # relative residual at which a solve ends
FAST = 1e-3  # refinement continues as long as it reduces the residual by this factor
SOLVED, SINGULAR = 1e-11, 1e-3  # relative residuals between these hint at small eigenvalues: use a smaller shift
PROBES = 3  # generic vectors that are searched for parts in the null space
REGULAR = 1e-8  # K is regular if it can be solved for a generic vector with this relative residual
PATIENCE = 60  # products with I - K / K_shifted, to find the null space
REFINEMENTS = 3  # of a solution
GONE = 1e-10  # a vector that was filtered down to this part of its norm has no part in the null space
PART = 1e-6  # a generic vector has at least this part in a null space


def packages() -> tuple[Any, Any, Any]:
    """Return numpy, scipy.sparse and qdldl, or raise MissingDependencyError."""
    try:
        import numpy
        import qdldl
        import scipy.sparse
    except ImportError as error:
        raise MissingDependencyError(
            "sparse programs need scipy and qdldl: install them with pip install 'foldopt[qp]'."
        ) from error
    return numpy, scipy.sparse, qdldl


class SparseKKT:
    """K = [[H, S'], [S, 0]] of an equilibrated program, factored once for any number of right-hand sides.

    Args:
        H: SciPy matrix (n, n) with both triangles, symmetric positive semidefinite.
        S: SciPy matrix (s, n).
        shift: added to the first n entries of the diagonal and subtracted from the others; it is multiplied by ten as
            long as a pivot has the wrong sign.
    """

    def __init__(self, H: Any, S: Any, shift: float = SHIFT) -> None:
        np, sparse, _ = packages()
        self.np = np
        self.H, self.S = sparse.csr_matrix(H), sparse.csr_matrix(S)
        self.St = self.S.T.tocsr() if self.S.shape[0] else self.S.T
        self.n, self.s = self.H.shape[0], self.S.shape[0]
        self.upper, self.diagonal, self.own = upper_triangle(self.H, self.S)
        self.shift = shift
        self.factors = self._factored()
        self._null: Any = None
        self._finer: SparseKKT | None = None
        self._coarser: SparseKKT | None = None

    def times(self, z: Any) -> Any:
        """Return K z for z (n + s,)."""
        x, y = z[: self.n], z[self.n :]
        if not self.s:
            return self.H @ x
        return self.np.concatenate([self.H @ x + self.St @ y, self.S @ x])

    def _factored(self) -> Any:
        """Return the LDL' factorization of the shifted matrix, or its sparse LU if LDL' fails with every shift."""
        np, _, qdldl = packages()
        signs = np.concatenate([np.ones(self.n), -np.ones(self.s)])
        limit = LARGEST_SHIFT if self.shift >= SHIFT else self.shift
        while True:
            self.upper.data[self.diagonal] = self.own + self.shift * signs
            try:
                factors = qdldl.Solver(self.upper, upper=True)
            except RuntimeError:  # a pivot of zero
                factors = None
            else:
                pivots = factors.factors()[1]
                if np.isfinite(pivots).all() and int((pivots > 0).sum()) == self.n:
                    return factors
            if self.shift >= limit:
                return factors if factors is not None else self._by_lu()
            self.shift *= 10

    def _by_lu(self) -> Any:
        from scipy.sparse.linalg import splu

        np, sparse, _ = packages()
        own = self.upper.data[self.diagonal]
        whole = self.upper + self.upper.T - sparse.diags(own)
        try:
            return splu(sparse.csc_matrix(whole), permc_spec="COLAMD")
        except RuntimeError:  # with this shift SuperLU only fails if an entry is not finite
            if not np.isfinite(self.upper.data).all():
                return _NotFinite(np)
            raise

    def solve(self, r: Any, tolerance: float = EXACT) -> tuple[Any, Any]:
        """Return z (n + s,) with K z = r, and the residual r - K z.

        If K is singular and r is in its range, z is nearly the solution of least norm. If r is not in the range, the
        residual is the part of r outside it. Iterative refinement is enough if the shift is small beside the
        eigenvalues; otherwise right-preconditioned GMRES starts from zero.
        """
        norm = self.np.linalg.norm
        size = before = norm(r)
        z, left = self.np.zeros_like(r), r
        for _ in range(REFINEMENTS):
            z = z + self.factors.solve(left)
            left = r - self.times(z)
            now = norm(left)
            if now <= tolerance * size:
                return z, left
            if not now <= FAST * before:
                break
            before = now
        z, left, size = self._gmres(r, STEPS)
        worse = SOLVED * size < self.np.linalg.norm(left) < SINGULAR * size
        if worse and self.shift > SMALL:
            again, other, _ = self.finer()._gmres(r, STEPS)
            if self.np.linalg.norm(other) < self.np.linalg.norm(left):
                return again, other
        return z, left

    def finer(self) -> SparseKKT:
        """Return the same system with a smaller shift, which separates small eigenvalues from zero."""
        if self.shift <= SMALL:
            return self
        if self._finer is None:
            self._finer = SparseKKT(self.H, self.S, SMALL)
        return self._finer

    def _gmres(self, r: Any, steps: int) -> tuple[Any, Any, float]:
        np = self.np
        size = float(np.linalg.norm(r))
        z = np.zeros_like(r)
        if size == 0 or not np.isfinite(size):
            return z, r.copy(), size
        basis, images, hessenberg = [r / size], [], np.zeros((steps + 1, steps))
        last = best = 1.0
        for k in range(steps):
            image = self.factors.solve(basis[k])
            w = self.times(image)
            for _ in range(2):  # Gram-Schmidt, repeated once for orthogonality
                for j, v in enumerate(basis):
                    share = v @ w
                    hessenberg[j, k] += share
                    w = w - share * v
            length = float(np.linalg.norm(w))
            if not np.isfinite(length):
                break
            hessenberg[k + 1, k] = length
            images.append(image)
            right = np.zeros(k + 2)
            right[0] = size
            c, *_ = np.linalg.lstsq(hessenberg[: k + 2, : k + 1], right, rcond=1e-15)
            best = float(np.linalg.norm(hessenberg[: k + 2, : k + 1] @ c - right)) / size
            z = c
            if best < EXACT or length < EXACT or (k > 5 and best > 0.95 * last):
                break
            last = best
            basis.append(w / length)
        if not images:
            return np.zeros_like(r), r.copy(), size
        z = np.column_stack(images) @ z[: len(images)]
        return z, r - self.times(z), size

    def null_part(self, r: Any) -> Any:
        """Return the part of r (n + s,) in the null space of K; zero if K is regular.

        It may also contain parts along eigenvectors with eigenvalues well below `COARSE`.
        """
        return self._coarse()._filtered(r) if self.singular else self.np.zeros_like(r)

    def null_vectors(self) -> Any:
        """Return the parts in the null space of some generic vectors, (n + s, `PROBES`).

        All are zero if K is regular. An entry that is zero in all of them is zero in the whole null space, except for
        an unlikely coincidence.
        """
        if self._null is None:
            np = self.np
            k = np.arange(1, self.n + self.s + 1, dtype=float)
            probe = np.sin(0.7 * k * k)
            _, left = self.solve(probe, REGULAR)
            self._null = np.zeros((len(k), PROBES))
            if np.linalg.norm(left) > REGULAR * np.linalg.norm(probe):  # not every right-hand side has a solution
                probes = (np.sin((0.7 + 0.1 * i) * k * k) for i in range(PROBES))
                found = np.stack([self._coarse()._filtered(v) for v in probes], 1)
                self._null = found if np.abs(found).max(initial=0) > PART else self._null
        return self._null

    def _filtered(self, r: Any) -> Any:
        """Replace r by r - K K_shifted^-1 r until only its part in the null space is left.

        The errors of the factors are divided by the shift, and with a small shift they would hide that part. This is
        called with a larger shift for that reason, and the solutions are refined.
        """
        norm, last = self.np.linalg.norm, r
        gone = GONE * norm(r)
        for _ in range(PATIENCE):
            z = self._shifted_solution(last)
            out = last - self.times(z)
            if norm(out) <= gone:
                return self.np.zeros_like(r)
            if norm(out - last) <= GONE * norm(out):
                break
            last = out
        return out

    def _shifted_solution(self, r: Any) -> Any:
        """Return the refined solution of the shifted system."""
        np = self.np
        z = self.factors.solve(r)
        for _ in range(REFINEMENTS):
            shift = self.shift * np.concatenate([z[: self.n], -z[self.n :]])
            left = r - self.times(z) - shift
            if np.linalg.norm(left) <= EXACT * np.linalg.norm(r):
                break
            z = z + self.factors.solve(left)
        return z

    def _coarse(self) -> SparseKKT:
        """Return the same system with a larger shift, which has more accurate factors."""
        if self._coarser is None:
            self._coarser = SparseKKT(self.H, self.S, max(self.shift, COARSE))
        return self._coarser

    @property
    def singular(self) -> bool:
        """Whether K is singular."""
        return bool(self.null_vectors().any())

    @property
    def known_singular(self) -> bool:
        """Whether K is known to be singular: the null space was computed and is not zero."""
        return self._null is not None and self.singular


class _NotFinite:
    """The factors of a matrix with entries that are not finite: every solution is NaN."""

    def __init__(self, np: Any) -> None:
        self.np = np

    def solve(self, r: Any) -> Any:
        return self.np.full_like(r, self.np.nan)


def positive_definite(H: Any, shift: float) -> bool:
    """Return whether H + shift I is positive definite (all pivots of LDL' are positive), for a symmetric SciPy H."""
    _, sparse, qdldl = packages()
    n = H.shape[0]
    matrix, diagonal, own = upper_triangle(sparse.csr_matrix(H), sparse.csr_matrix((0, n)))
    matrix.data[diagonal] = own + shift
    try:
        pivots = qdldl.Solver(matrix, upper=True).factors()[1]
    except RuntimeError:  # a pivot of zero
        return False
    return bool((pivots > 0).all())


def upper_triangle(H: Any, S: Any) -> tuple[Any, Any, Any]:
    """Return the upper triangle of [[H, S'], [S, 0]] as a CSC matrix, the positions of its diagonal, and the diagonal.

    H: CSR (n, n), symmetric. S: CSR (s, n). All diagonal entries are stored, also zeros, each as the last one of its
    column.
    """
    np, sparse, _ = packages()
    H.sort_indices()
    S.sort_indices()
    n, s = H.shape[0], S.shape[0]
    row = np.repeat(np.arange(n), np.diff(H.indptr))
    strict = H.indices < row
    counts = np.bincount(row[strict], minlength=n) if n else np.zeros(0, int)
    lengths = np.concatenate([counts, np.diff(S.indptr)]) + 1
    pointers = np.concatenate([[0], np.cumsum(lengths)])
    diagonal = pointers[1:] - 1
    data, indices = np.zeros(pointers[-1]), np.empty(pointers[-1], dtype=np.int64)
    off = np.ones(pointers[-1], bool)
    off[diagonal] = False
    indices[diagonal] = np.arange(n + s)
    indices[off] = np.concatenate([H.indices[strict], S.indices])
    data[off] = np.concatenate([H.data[strict], S.data])
    own = np.concatenate([H.diagonal(), np.zeros(s)])
    matrix = sparse.csc_matrix((data, indices, pointers), shape=(n + s, n + s))
    return matrix, diagonal, own
