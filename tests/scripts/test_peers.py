"""The comparison of libraries: what it says of a right layer, a wrong one, and one that raises."""

import pytest
import torch

from scripts import peers


@pytest.mark.parametrize("make", [peers.with_foldopt, peers.with_foldopt_qp])
@pytest.mark.parametrize("feature", peers.FEATURES)
def test_foldopt_answers_everything(make, feature):
    assert float(peers.answer(make(), peers.FEATURES[feature])) < (1e-6 if feature == "float32" else 1e-12)


def test_what_is_wrong_is_called_wrong():
    answers = [peers.answer(lambda a: peers.exact(a.detach() + 0 * a), f) for f in peers.FEATURES.values()]
    assert [a.startswith("**wrong by 100%") for a in answers] == [True, True, True, True, False, True]


def test_what_raises_is_named():
    def fails(a):
        raise NotImplementedError("no vmap here")

    assert peers.answer(fails, peers.mapped) == "NotImplementedError"
    assert peers.answer(lambda a: peers.exact(a.double()), peers.low) == "answers in float64"


@pytest.mark.parametrize("title", peers.LIBRARIES)
def test_the_libraries_agree_on_the_solution(title):
    package, make = peers.LIBRARIES[title]
    if package is not None:
        pytest.importorskip(package)
    torch.testing.assert_close(make()(peers.A0), peers.exact(peers.A0), rtol=0, atol=1e-6)
