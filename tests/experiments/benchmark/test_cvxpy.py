import numpy as np
import pytest
import torch

from experiments.benchmark import cvxpy_report
from experiments.benchmark.cvxpy_kinds import KINDS, kind


def test_rows_say_who_is_right_and_who_answers_where_there_is_no_derivative():
    rows = cvxpy_report.compared(["vertex", "relu at zero"], ["foldopt", "clarabel"], lambda line: None)
    assert rows[0][0] == "vertex"
    assert float(rows[0][2]) < 1e-9
    assert rows[1][1:] == ["kink", "says KinkError", "answers without an error"]


@pytest.mark.parametrize("name", list(KINDS))
def test_batches_keep_the_attributes_of_the_parameters(name):
    k = kind(name)
    for parameter, value, values in zip(k.parameters, k.values, cvxpy_report.batch(k, 3), strict=True):
        assert values.shape == (3, *value.shape)
        if parameter.attributes["symmetric"]:
            torch.testing.assert_close(values, values.mT)
        if parameter.attributes["nonneg"]:
            assert (values >= 0).all()


def test_a_wrong_derivative_is_printed_in_bold():
    k = kind("relu")

    def wrong(_):
        return lambda x: (0.5 * x,)

    said = cvxpy_report.answered(k, cvxpy_report.Contender("wrong", wrong), [(1.0, 0.0)])
    assert said.startswith("**")
    assert np.isfinite(float(said.strip("*")))


@pytest.mark.slow
def test_a_set_up_is_measured_apart_and_a_failure_is_told(monkeypatch):
    monkeypatch.setattr(cvxpy_report, "set_up", _counted)
    assert cvxpy_report.sizes(["foldopt", "scs"], lambda line: None) == [
        ["foldopt", "1.5", "20"],
        ["cvxpylayers, SCS", "MemoryError: too much", ""],
    ]


def _counted(who):
    if who == "scs":
        raise MemoryError("too much")
    return 1.5, 20.0
