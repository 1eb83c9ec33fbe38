import pytest
import torch

from data.bilinear import generate, interaction, nonlinearity
from foldopt.errors import InputError

F64 = torch.float64


def test_the_same_seed_gives_the_same_numbers_and_another_does_not():
    a, b, c = generate(0, 8, 3, 4, 6), generate(0, 8, 3, 4, 6), generate(1, 8, 3, 4, 6)
    for split, size in (("train", 8), ("val", 3), ("test", 4)):
        assert a.features[split].shape == (size, 10)
        assert a.targets[split].shape == (size, 6)
        assert torch.equal(a.features[split], b.features[split])
        assert torch.equal(a.targets[split], b.targets[split])
    assert not torch.equal(a.targets["train"], c.targets["train"])


def test_features_are_uniform_and_targets_finite():
    drawn = generate(0, 20_000, 1, 1, 4)
    z, targets = drawn.features["train"], drawn.targets["train"]
    assert -2 <= float(z.min()) < -1.999
    assert 1.999 < float(z.max()) <= 2
    assert float(z.mean()) == pytest.approx(0, abs=0.01)
    assert float(z.std()) == pytest.approx(4 / 12**0.5, rel=0.01)
    assert targets.isfinite().all()
    assert float(targets.min()) >= 2.5 * torch.tensor(1e-6, dtype=F64).log() - 2
    assert float(targets.max()) < 2


def test_the_nonlinearity_is_the_papers_where_that_has_a_value_and_finite_elsewhere():
    u = torch.tensor([0.2, 0.9], dtype=F64)
    paper = u * (2 * u).cos() + 2.5 * (u / (u + 2)).log() + u**2 * (4 * u).sin()
    torch.testing.assert_close(nonlinearity(u), paper)
    left = nonlinearity(torch.tensor([-0.5], dtype=F64))
    assert float(left) == pytest.approx(
        -0.5 * 0.5403023058681398 + 2.5 * -1.0986122886681098 - 0.25 * 0.9092974268256817
    )
    assert float(nonlinearity(torch.zeros(1, dtype=F64))) == pytest.approx(2.5 * -13.815510557964274)


def test_matrices_have_seeds_of_their_own():
    Q = interaction(3, 50)
    assert Q.shape == (50, 50)
    assert torch.equal(Q, interaction(3, 50))
    assert not torch.equal(Q, interaction(4, 50))
    assert float(Q.mean()) == pytest.approx(0, abs=0.06)
    assert float(Q.std()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("name", ["n_train", "n_val", "n_test", "n_targets", "n_features", "hidden"])
def test_bad_arguments_are_named(name):
    with pytest.raises(InputError, match=f"{name}=0: expected a whole number of at least 1"):
        generate(**{"seed": 0, "n_train": 2, "n_val": 2, "n_test": 2, "n_targets": 4, name: 0})


def test_bad_seeds_and_sizes_are_named():
    for call, match in ((lambda: interaction(-1, 3), "seed=-1"), (lambda: interaction(0, 0), "n=0")):
        with pytest.raises(InputError, match=match):
            call()
    with pytest.raises(InputError, match="seed=-1"):
        generate(-1, 2, 2, 2, 4)
