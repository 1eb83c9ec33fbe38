"""Returns of assets from a CSV file: read with checks, and cut into training, validation and test blocks in time order.

The first row of the file names the columns. One column holds dates; a row holds the returns of one period, as fractions
of the value at its beginning (0.01 is one percent). docs/harness/your-data.md describes the format for users.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from data.portfolio import PortfolioData
from foldopt.checks import require_positive, require_whole
from foldopt.errors import InputError, MissingDependencyError

LEAST = {"train": 20, "val": 5, "test": 5}  # samples of each block
DAY = pd.Timedelta(days=1)
LONGEST_STEP = 10 * DAY  # between the dates of two rows, unless rows are further apart as a rule
LARGEST = 100  # return of one period
CONSTANT = 1e-12  # deviation relative to the largest absolute value


@dataclass(frozen=True)
class ReturnsTable:
    """The numbers of a file, one row per period, float64.

    Attributes:
        file: Path as it was given, for messages.
        dates: Of the rows, increasing, as the file writes them.
        assets: Names of the columns of returns.
        returns: (rows, assets).
        names: Names of the columns of features.
        features: (rows, names).
    """

    file: str
    dates: list[str]
    assets: list[str]
    returns: Tensor
    names: list[str]
    features: Tensor


def read(
    file: str,
    digest: str | None = None,
    date: str | None = None,
    returns: list[str] | None = None,
    features: list[str] | None = None,
    max_gap: float | None = None,
) -> ReturnsTable:
    """Read and check a CSV file of returns.

    Args:
        file: Path, relative to the current directory.
        digest: SHA-256 that the content must have; None for any.
        date: Name of the column of dates; None for the first column.
        returns: Names of the columns of returns; None for all that are neither dates nor features.
        features: Names of the columns of features; None for none.
        max_gap: Most days between two rows; None for 10, or for 1.5 times the median step if that is more.

    Returns:
        The numbers of the chosen columns; other columns are ignored.

    Raises:
        InputError: The file, a column, a date or a number is not as described; the message names the place and the
            remedy.
    """
    cells = _cells(file, _content(file, digest))
    names = list(cells.columns)
    for key, chosen in (("returns", returns), ("features", features)):
        if chosen is not None and (not isinstance(chosen, list) or not all(isinstance(name, str) for name in chosen)):
            raise InputError(f"task.{key}={chosen!r}: expected a list of column names, such as [{names[-1]}].")
    date, features = names[0] if date is None else date, features or []
    if returns is None:
        returns = [name for name in names if name not in (date, *features)]
    for key, chosen in (("date", [date]), ("returns", returns), ("features", features)):
        for name in chosen:
            if name not in names:
                raise InputError(f"{file} has no column {name!r} (task.{key}); its columns are {', '.join(names)}.")
    used = [date, *returns, *features]
    for name in used:
        if used.count(name) > 1:
            raise InputError(
                f"{file}: column {name!r} is chosen twice by task.date, task.returns and task.features; name it once. "
                "task.lags makes features of earlier returns."
            )
    if len(returns) < 2:
        raise InputError(f"{file} has {len(returns)} columns of returns ({', '.join(returns)}); expected at least 2.")
    dates = _dates(file, cells[date], max_gap)
    table = ReturnsTable(
        file, dates, returns, _numbers(file, cells[returns], dates), features, _numbers(file, cells[features], dates)
    )
    _check_units(table)
    return table


def _content(file: str, digest: str | None) -> bytes:
    try:
        content = Path(file).read_bytes()
    except OSError as error:
        raise InputError(
            f"task.csv={file!r} cannot be read ({error.strerror}); the path is relative to the current directory, "
            f"{Path.cwd()}."
        ) from error
    if digest not in (None, hashlib.sha256(content).hexdigest()):
        raise InputError(
            f"{file} has changed since this run was configured (its SHA-256 is not task.digest={digest}); restore the "
            "file, or start a new run without task.digest."
        )
    return content


def _cells(file: str, content: bytes) -> pd.DataFrame:
    """Return the texts of a file by the names of its columns."""
    try:
        cells = pd.read_csv(
            io.BytesIO(content), header=None, dtype=str, keep_default_na=False, encoding="utf-8-sig"
        ).fillna("")
    except pd.errors.EmptyDataError as error:
        raise InputError(f"{file} is empty; expected a row of column names and one row per period.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is no text in UTF-8 ({error}); save it as CSV in UTF-8.") from error
    except pd.errors.ParserError as error:
        raise InputError(
            f"{file}: {str(error).strip()}; expected as many cells in every row as names in the first row, and closed "
            "quotes."
        ) from error
    cells = cells.apply(lambda column: column.str.strip())
    names = cells.iloc[0].tolist()
    names[0] = names[0] or "date"  # pandas writes an index without a name
    for position, name in enumerate(names):
        if not name or name in names[:position]:
            problem = f"is named {name!r} like another one" if name else "has no name"
            raise InputError(f"{file}: column {position + 1} {problem}; give each column a name of its own.")
    if len(names) < 3:
        raise InputError(
            f"{file} has the columns {names}; expected dates and the returns of at least 2 assets, separated by commas."
        )
    if len(cells) == 1:
        raise InputError(f"{file} has no rows below the names; expected one row per period.")
    return cells.iloc[1:].set_axis(names, axis=1).reset_index(drop=True)


def _dates(file: str, cells: pd.Series[str], max_gap: float | None) -> list[str]:
    """Return the dates of the rows. Raises InputError unless they are in ISO format, increasing and without a gap."""
    if max_gap is not None:
        require_positive("task.max_gap", max_gap)
    place = f"{file}: column {cells.name!r}"
    dates = pd.to_datetime(cells, format="ISO8601", errors="coerce", utc=True)
    if (row := _first(dates.isna())) is not None:
        raise InputError(
            f"{place}, row {row + 1} below the names: {cells[row]!r} is no date; write dates as 2024-01-31, or name "
            "the column of dates in task.date."
        )
    steps = dates.diff()
    if (row := _first(steps <= pd.Timedelta(0))) is not None:
        problem = "is there twice" if steps[row] == pd.Timedelta(0) else f"comes after {cells[row - 1]}"
        raise InputError(
            f"{place}, row {row + 1} below the names: {cells[row]} {problem}; keep one row per date, the oldest first."
        )
    longest = max(LONGEST_STEP, 1.5 * steps.median()) if max_gap is None else max_gap * DAY
    if (row := _first(steps > longest)) is not None:
        raise InputError(
            f"{place}: there is no row between {cells[row - 1]} and {cells[row]}, which are "
            f"{steps[row] / DAY:g} days apart; at most {longest / DAY:g} are expected. Add the missing "
            "rows, or allow the gap by task.max_gap (days)."
        )
    return cells.tolist()


def _first(wrong: pd.Series[bool]) -> int | None:
    """Return the first row that is wrong, None if none is."""
    return int(wrong.argmax()) if wrong.any() else None


def _numbers(file: str, cells: pd.DataFrame, dates: list[str]) -> Tensor:
    """Return columns of texts as numbers, (rows, columns) float64. Raises InputError for a cell that is none."""
    numbers = torch.empty(cells.shape, dtype=torch.float64)
    for position, name in enumerate(cells):
        numbers[:, position] = torch.tensor(pd.to_numeric(cells[name], errors="coerce").to_numpy(float))
        wrong = (~numbers[:, position].isfinite()).nonzero()[:, 0].tolist()
        if wrong:
            text = cells[name][wrong[0]]
            missing = text.lower() in ("", "nan", "na", "n/a", "null", "none")
            problem = "the number is missing" if missing else f"{text!r} is no finite number"
            raise InputError(
                f"{file}: column {name!r}, {dates[wrong[0]]}: {problem} ({len(wrong)} such cells in this "
                "column). Correct the cells, drop the rows or the column, or choose columns by task.returns and "
                "task.features."
            )
    return numbers


def _check_units(table: ReturnsTable) -> None:
    """Raise InputError for returns that are no simple returns in fractions."""
    for position, name in enumerate(table.assets):
        values = table.returns[:, position]
        wrong, median = (values < -1) | (values > LARGEST), float(values.abs().median())
        if wrong.any() or median > 1:
            row = int(wrong.int().argmax())
            raise InputError(
                f"{table.file}: column {name!r} holds {float(values[row]):g} on {table.dates[row]}, and its "
                f"median absolute value is {median:g}; expected returns as fractions, from -1 to {LARGEST} and rarely "
                "above 1. Divide percent by 100; turn prices into returns, for example by pandas' pct_change."
            )


@dataclass(frozen=True)
class WalkForward:
    """How a table becomes samples, and which of them train, validate and test.

    The sample of row t is the decision at the beginning of the period of row t, and the return of row t its outcome.
    Its inputs are the features of row t - feature_lag and the returns of the rows t - 1 to t - lags. The last
    test_share of the samples is cut into `folds` test blocks of equal length. The fold `fold` tests on one of them,
    validates on the val_share of the samples before it, and trains on all samples before those.

    Attributes:
        lags: Number of earlier returns of each asset among the inputs.
        feature_lag: Rows by which features are delayed; 0 for features that are known before the period of their row.
        val_share: Share of the samples for validation.
        test_share: Share of the samples for all test blocks together.
        folds: Number of test blocks.
        fold: The one to test on, from 0 for the oldest.

    Raises:
        InputError: A value is out of range.
    """

    lags: int
    feature_lag: int
    val_share: float
    test_share: float
    folds: int
    fold: int

    def __post_init__(self) -> None:
        for name, least in (("lags", 0), ("feature_lag", 0), ("folds", 1), ("fold", 0)):
            require_whole(f"task.{name}", getattr(self, name), least)
        for name in ("val_share", "test_share"):
            require_positive(f"task.{name}", getattr(self, name))
        if self.fold >= self.folds:
            raise InputError(f"task.fold={self.fold}: with task.folds={self.folds} it is at most {self.folds - 1}.")
        if self.val_share + self.test_share >= 1:
            raise InputError(
                f"task.val_share={self.val_share} and task.test_share={self.test_share} leave nothing for training; "
                "take shares whose sum is below 1."
            )

    def blocks(self, samples: int, file: str) -> dict[str, slice]:
        """Return the samples of each split. Raises InputError, which names the file, if there are too few."""
        test = round(self.test_share * samples / self.folds)
        val = round(self.val_share * samples)
        begin = samples - (self.folds - self.fold) * test
        sizes = {"train": begin - val, "val": val, "test": test}
        if any(size < LEAST[name] for name, size in sizes.items()):
            raise InputError(
                f"{file}: its rows give {samples} samples, too few for fold {self.fold} of {self.folds}: {sizes}, but "
                f"at least {LEAST} are needed. Take more rows, other shares (task.val_share, task.test_share) or fewer "
                "folds (task.folds)."
            )
        return {"train": slice(begin - val), "val": slice(begin - val, begin), "test": slice(begin, begin + test)}


def split(table: ReturnsTable, walk: WalkForward, risk: float) -> PortfolioData:
    """Turn a table into samples, and estimate the covariance from those for training.

    Inputs are standardized, each by its mean and deviation over the training samples. The covariance V is that of the
    training returns by the estimator of Ledoit and Wolf, "A well-conditioned estimator for large-dimensional covariance
    matrices" (2004). gamma = risk x'Vx with equal weights x = 1/n.

    Args:
        table: From `read`.
        walk: Inputs and splits.
        risk: Limit on the variance of a portfolio, as a multiple of that of equal weights.

    Raises:
        InputError: There are too few rows, no inputs, or a column that is constant in training.
        MissingDependencyError: scikit-learn is not installed.
    """
    require_positive("task.risk", risk)
    shifted = [(table.names, table.features, walk.feature_lag)] if table.names else []
    shifted += [(table.assets, table.returns, lag) for lag in range(1, walk.lags + 1)]
    if not shifted:
        raise InputError("task.lags=0 without task.features leaves no inputs; take task.lags=1 or name features.")
    rows, first = len(table.dates), max(lag for _, _, lag in shifted)
    blocks = walk.blocks(rows - first, table.file)
    names = [f"{name} (lag {lag})" for columns, _, lag in shifted for name in columns]
    inputs = torch.cat([values[first - lag : rows - lag] for _, values, lag in shifted], 1)
    returns = table.returns[first:]
    train = blocks["train"]
    for columns, values in ((table.assets, returns[train]), (names, inputs[train])):
        constant = values.std(0) <= CONSTANT * values.abs().amax(0)
        for position in constant.nonzero()[:, 0].tolist()[:1]:
            begin, end = table.dates[first], table.dates[first + len(values) - 1]
            raise InputError(
                f"{table.file}: column {columns[position]!r} is constant ({float(values[0, position]):g}) in the "
                f"training samples from {begin} to {end}. Leave the column out, or train on rows in which it varies."
            )
    inputs = (inputs - inputs[train].mean(0)) / inputs[train].std(0)
    V = _ledoit_wolf(returns[train])
    return PortfolioData(
        {name: inputs[block] for name, block in blocks.items()},
        {name: returns[block] for name, block in blocks.items()},
        V,
        risk * float(V.mean()),
    )


def _ledoit_wolf(returns: Tensor) -> Tensor:
    try:
        from sklearn.covariance import LedoitWolf
    except ImportError as error:
        raise MissingDependencyError(
            "task.csv estimates the covariance with scikit-learn; install it with: pip install 'foldopt[data]'"
        ) from error
    return torch.tensor(LedoitWolf().fit(returns.numpy()).covariance_)
