"""Files of returns: what is read, what is refused and in which words, and that no sample sees its future."""

import hashlib
import re
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from data.returns_csv import WalkForward, read, split
from foldopt.errors import InputError, MissingDependencyError

ROWS = 80


def frame(rows=ROWS, assets=3, freq="B", seed=0):
    """Returns of assets A, B, ... and two features: vix with a large offset, and the whole number news."""
    draw = np.random.default_rng(seed)
    dates = pd.date_range("2021-01-04", periods=rows, freq=freq).strftime("%Y-%m-%d")
    columns = {name: draw.normal(0.001, 0.02, rows) for name in "ABCDEFGH"[:assets]}
    return pd.DataFrame(
        {"date": dates, **columns, "vix": 1e6 + draw.normal(size=rows), "news": draw.integers(0, 4, rows)}
    )


@pytest.fixture
def written(tmp_path):
    """Write a table, or a text, and return its path."""

    def write(content):
        path = tmp_path / "returns.csv"
        text = content if isinstance(content, str) else content.to_csv(index=False)
        path.write_text(text)
        return str(path)

    return write


def walk(**changed):
    default = {"lags": 1, "feature_lag": 1, "val_share": 0.15, "test_share": 0.3, "folds": 1, "fold": 0}
    return WalkForward(**{**default, **changed})


def changed_cell(row, column, value):
    table = frame().astype(object)
    table.loc[row, column] = value
    return table


def test_numbers_are_read_to_the_last_digit(written):
    table = frame()
    found = read(written(table), features=["vix", "news"])
    assert found.assets == ["A", "B", "C"]
    assert found.names == ["vix", "news"]
    assert found.returns.tolist() == table[["A", "B", "C"]].to_numpy().tolist()
    assert found.features.tolist() == table[["vix", "news"]].to_numpy().tolist()
    assert found.dates == table["date"].tolist()


def test_columns_are_those_chosen_and_their_order_is_that_of_the_choice(written):
    table = frame()[["news", "A", "date", "B", "vix", "C"]].assign(comment="text that is not read")
    found = read(written(table), date="date", returns=["C", "A"], features=["news"])
    assert found.assets == ["C", "A"]
    assert found.returns.tolist() == table[["C", "A"]].to_numpy().tolist()
    assert found.names == ["news"]


@pytest.mark.parametrize(
    "rewritten",
    [
        lambda text: "\ufeff" + text,  # as spreadsheets write it
        lambda text: text.replace(",", " , ").replace("\n", "\r\n"),
        lambda text: text.replace("date", "", 1),  # an index of pandas without a name
        lambda text: text + "\n\n",
        lambda text: re.sub(r"(\d{4})-(\d\d)-(\d\d)", r"\1\2\3", text),
    ],
)
def test_other_spellings_of_the_same_file_are_read_alike(written, rewritten):
    text = frame()[["date", "A", "B"]].to_csv(index=False)
    expected = read(written(text)).returns
    assert torch.equal(read(written(rewritten(text))).returns, expected)


@pytest.mark.parametrize(
    ("content", "choice", "messages"),
    [
        ("", {}, ["is empty", "row of column names"]),
        ("date,A,B\n", {}, ["has no rows below the names"]),
        ("date;A;B\n2021-01-04;0.1;0.2\n", {}, ["['date;A;B']", "separated by commas"]),
        ("date,A,B\n2021-01-04,0.1\n", {}, ["column 'B'", "2021-01-04", "the number is missing"]),
        ("date,A,B\n2021-01-04,0.1,0.2,0.3\n", {}, ["line 2", "as many cells in every row as names"]),
        ('date,A,B\n2021-01-04,"0.1,0.2\n', {}, ["closed quotes"]),
        ("date,A,A\n2021-01-04,0.1,0.2\n", {}, ["column 3 is named 'A' like another one"]),
        ("date,A,\n2021-01-04,0.1,0.2\n", {}, ["column 3 has no name"]),
        (changed_cell(7, "B", np.nan), {}, ["column 'B'", "2021-01-13", "missing", "drop the rows"]),
        (changed_cell(7, "B", "NaN"), {}, ["column 'B'", "2021-01-13", "missing"]),
        (changed_cell(7, "B", "halted"), {}, ["column 'B'", "2021-01-13", "'halted' is no finite number"]),
        (changed_cell(7, "B", "inf"), {}, ["column 'B'", "2021-01-13", "'inf' is no finite number"]),
        (changed_cell(7, "B", "1e999"), {}, ["column 'B'", "2021-01-13", "'1e999' is no finite number"]),
        (changed_cell(7, "B", "0,01"), {}, ["column 'B'", "'0,01' is no finite number"]),
        (changed_cell(7, "B", 250), {}, ["column 'B' holds 250 on 2021-01-13", "from -1 to 100"]),
        (changed_cell(7, "B", -1.5), {}, ["column 'B' holds -1.5 on 2021-01-13", "Divide percent by 100"]),
        (changed_cell(7, "vix", ""), {"features": ["vix"]}, ["column 'vix'", "2021-01-13", "missing"]),
        (
            changed_cell(3, "date", "08/01/2021"),
            {},
            ["column 'date'", "row 4", "'08/01/2021' is no date", "2024-01-31"],
        ),
        (changed_cell(3, "date", ""), {}, ["column 'date'", "row 4", "'' is no date"]),
        (changed_cell(3, "date", "2021-02-30"), {}, ["'2021-02-30' is no date"]),
        (changed_cell(3, "date", "2021-01-06"), {}, ["row 4", "2021-01-06 is there twice", "one row per date"]),
        (changed_cell(3, "date", "2021-01-01"), {}, ["row 4", "2021-01-01 comes after 2021-01-06", "the oldest first"]),
        (frame().drop(range(10, 25)), {}, ["between 2021-01-15 and 2021-02-08", "24 days apart", "task.max_gap"]),
        (frame(freq="MS").drop(10), {}, ["between 2021-11-01 and 2022-01-01", "61 days apart", "at most 46.5"]),
        (frame(), {"max_gap": 2}, ["between 2021-01-08 and 2021-01-11", "at most 2"]),
        (frame(), {"max_gap": 0}, ["task.max_gap=0", "above 0"]),
        (frame(), {"returns": ["A", "D"]}, ["no column 'D' (task.returns)", "date, A, B, C, vix, news"]),
        (frame(), {"features": ["VIX"]}, ["no column 'VIX' (task.features)"]),
        (frame(), {"date": "day"}, ["no column 'day' (task.date)"]),
        (frame(), {"features": "vix"}, ["task.features='vix'", "a list of column names"]),
        (frame(), {"returns": [1, 2]}, ["task.returns=[1, 2]", "a list of column names"]),
        (frame(), {"returns": ["A"]}, ["1 columns of returns (A)", "at least 2"]),
        (frame(), {"returns": ["A", "B"], "features": ["A"]}, ["'A' is chosen twice", "task.lags"]),
        (frame(), {"returns": ["A", "B", "A"]}, ["'A' is chosen twice"]),
        (frame(), {}, ["column 'vix' holds", "fractions", "Divide percent by 100", "pct_change"]),
        (
            frame().assign(B=lambda t: 100 * t["B"]),
            {"returns": ["A", "B"]},
            ["column 'B' holds", "Divide percent by 100"],
        ),
        (frame(), {"digest": "0" * 64}, ["has changed since", "task.digest=0000", "restore the file"]),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_with_place_and_remedy(written, content, choice, messages):
    file = written(content)
    with pytest.raises(InputError) as caught:
        read(file, **choice)
    for message in messages:
        assert message in str(caught.value)
    assert str(caught.value).startswith(file) or "task." in str(caught.value)


def test_a_file_that_is_not_there_is_named_with_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"task.csv='gone.csv' cannot be read \(No such file") as caught:
        read("gone.csv")
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(InputError, match=r"cannot be read \(Is a directory\)"):
        read(str(tmp_path))
    (tmp_path / "latin.csv").write_bytes("date,Zürich,B\n".encode("latin-1"))
    with pytest.raises(InputError, match="no text in UTF-8"):
        read("latin.csv")


@pytest.mark.parametrize(("freq", "longest"), [("B", 3), ("W-FRI", 7), ("MS", 31), ("QE", 92), ("YE", 366)])
def test_usual_calendars_have_no_gaps(written, freq, longest):
    table = frame(freq=freq)
    assert pd.to_datetime(table["date"]).diff().max().days == longest
    assert len(read(written(table), features=["vix", "news"]).dates) == ROWS


def test_a_gap_is_allowed_by_its_length(written):
    table = frame().drop(range(10, 25))
    assert len(read(written(table), features=["vix", "news"], max_gap=24).dates) == ROWS - 15


def test_the_digest_of_the_content_is_accepted(written):
    file = written(frame())
    with open(file, "rb") as content:
        digest = hashlib.sha256(content.read()).hexdigest()
    assert read(file, digest, features=["vix", "news"]).assets == ["A", "B", "C"]


@pytest.mark.parametrize("folds", [1, 3, 4])
def test_folds_are_blocks_in_time_order_that_end_with_the_file(folds):
    samples, blocks = 100, [walk(folds=folds, fold=fold).blocks(100, "x.csv") for fold in range(folds)]
    covered = []
    for found in blocks:
        places = [list(range(samples)[found[name]]) for name in ("train", "val", "test")]
        assert places[0] + places[1] + places[2] == list(range(found["test"].stop))
        assert len(places[1]) == 15
        assert len(places[2]) == round(30 / folds)
        covered += places[2]
    assert covered == list(range(samples - len(covered), samples))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lags": -1}, "task.lags=-1"),
        ({"feature_lag": -1}, "task.feature_lag=-1"),
        ({"folds": 0}, "task.folds=0"),
        ({"fold": 3, "folds": 3}, "task.fold=3: with task.folds=3 it is at most 2"),
        ({"val_share": 0.0}, "task.val_share=0.0"),
        ({"test_share": 0.9, "val_share": 0.1}, "take shares whose sum is below 1"),
    ],
)
def test_a_split_out_of_range_is_refused(changed, message):
    with pytest.raises(InputError, match=message):
        walk(**changed)


@pytest.mark.parametrize(
    ("rows", "changed", "sizes"),
    [
        (30, {}, "'train': 16, 'val': 4, 'test': 9"),
        (80, {"folds": 8}, "'train': 43, 'val': 12, 'test': 3"),
        (2, {"lags": 5}, "-3 samples"),
        (1, {}, "0 samples"),
    ],
)
def test_too_few_rows_are_refused(written, rows, changed, sizes):
    table = read(written(frame(rows)), features=["vix", "news"])
    with pytest.raises(InputError, match=r"returns.csv: its rows give .* too few for fold 0") as caught:
        split(table, walk(**changed), 1.0)
    assert sizes in str(caught.value)


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("B", 0.01, r"column 'B' is constant \(0.01\) in the training samples from 2021-01-05 to 2021-03-04"),
        ("B", np.arange(ROWS) // 60 / 100, r"column 'B' is constant \(0\)"),
        ("vix", 1e6, r"column 'vix \(lag 1\)' is constant \(1e\+06\)"),
    ],
)
def test_a_column_that_is_constant_in_training_is_refused(written, column, values, message):
    table = read(written(frame().assign(**{column: values})), features=["vix", "news"])
    with pytest.raises(InputError, match=message):
        split(table, walk(), 1.0)


def test_no_inputs_are_refused(written):
    table = read(written(frame()), returns=["A", "B"])
    with pytest.raises(InputError, match=r"task.lags=0 without task.features"):
        split(table, walk(lags=0), 1.0)


def test_without_features_their_lag_costs_no_rows(written):
    pytest.importorskip("sklearn")
    table = read(written(frame()), returns=["A", "B"])
    found = split(table, walk(feature_lag=30), 1.0)
    assert sum(len(values) for values in found.returns.values()) == ROWS - 1
    assert found.features["train"].shape[1] == 2


def test_a_missing_scikit_learn_is_named_with_the_extra(written, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.covariance", None)
    table = read(written(frame()), features=["vix"], returns=["A", "B"])
    with pytest.raises(MissingDependencyError, match=r"pip install 'foldopt\[data\]'"):
        split(table, walk(), 1.0)


@pytest.mark.parametrize(("lags", "feature_lag"), [(1, 1), (3, 0), (0, 2), (2, 5)])
def test_samples_are_those_of_a_plain_loop(written, lags, feature_lag):
    pytest.importorskip("sklearn")
    table = frame()
    assets, features = table[["A", "B", "C"]].to_numpy(), table[["vix", "news"]].to_numpy()
    found = split(read(written(table), features=["vix", "news"]), walk(lags=lags, feature_lag=feature_lag), 1.0)
    inputs, outcomes = [], []
    for t in range(max(lags, feature_lag), ROWS):
        inputs.append(np.concatenate([features[t - feature_lag], *(assets[t - lag] for lag in range(1, lags + 1))]))
        outcomes.append(assets[t])
    train = len(found.returns["train"])
    inputs = (np.array(inputs) - np.mean(inputs[:train], 0)) / np.std(inputs[:train], 0, ddof=1)
    assert np.array_equal(torch.cat(list(found.returns.values())).numpy(), outcomes)
    assert np.allclose(torch.cat(list(found.features.values())).numpy(), inputs, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("rows", "assets", "seed"), [(80, 3, 0), (40, 8, 1), (400, 8, 2)])
def test_the_covariance_is_that_of_ledoit_and_wolf_on_training_returns(written, rows, assets, seed):
    pytest.importorskip("sklearn")
    drawn = frame(rows, assets, seed=seed)
    common = 0.02 * np.random.default_rng(seed).normal(size=rows)
    names = list(drawn.columns[1 : 1 + assets])
    drawn[names] = drawn[names].add(common, axis=0)
    found = split(read(written(drawn), features=["vix", "news"]), walk(), 1.7)
    X = found.returns["train"].numpy()
    X = X - X.mean(0)
    n, p = X.shape
    S = X.T @ X / n
    m = np.trace(S) / p
    d2 = np.square(S - m * np.eye(p)).sum() / p
    b2 = min(sum(np.square(np.outer(x, x) - S).sum() for x in X) / p / n**2, d2)
    truth = b2 / d2 * m * np.eye(p) + (1 - b2 / d2) * S
    assert 0 < b2 < d2
    assert np.allclose(found.V.numpy(), truth, rtol=1e-10, atol=0)
    weights = np.full(p, 1 / p)
    assert found.gamma == pytest.approx(1.7 * weights @ truth @ weights, rel=1e-10)


@pytest.mark.parametrize(("lags", "feature_lag"), [(1, 1), (2, 3), (1, 0)])
@pytest.mark.parametrize(("folds", "fold"), [(1, 0), (2, 0)])
def test_no_sample_sees_its_future(written, lags, feature_lag, folds, fold):
    """Whatever is written into the rows from t on, the inputs of the samples up to t stay the same to the last bit.

    So do all numbers of training, where t is after the training samples. With feature_lag=0 the features of row t are
    declared to be known, and only those of later rows change.
    """
    pytest.importorskip("sklearn")
    original, settings = frame(), walk(lags=lags, feature_lag=feature_lag, folds=folds, fold=fold)
    before = split(read(written(original), features=["vix", "news"]), settings, 1.0)
    first = max(lags, feature_lag)
    train = len(before.returns["train"])
    known = torch.cat(list(before.features.values()))
    for t in range(first + train, first + len(known)):
        other, draw = original.copy(), np.random.default_rng(t)
        other.loc[t:, ["A", "B", "C"]] = draw.normal(0, 0.3, (ROWS - t, 3)).clip(-1)
        later = t if feature_lag else t + 1
        other.loc[later:, ["vix", "news"]] = draw.integers(-100, 100, (ROWS - later, 2))
        after = split(read(written(other), features=["vix", "news"]), settings, 1.0)
        assert torch.equal(after.V, before.V)
        assert after.gamma == before.gamma
        assert torch.equal(after.returns["train"], before.returns["train"])
        now = torch.cat(list(after.features.values()))
        assert torch.equal(now[: t - first + 1], known[: t - first + 1])
        assert t == first + len(known) - 1 or not torch.equal(now, known), "the change reaches later samples"
