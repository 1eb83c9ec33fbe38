import pytest
import torch

from data.denoising import generate
from foldopt.errors import InputError


def test_the_same_seed_gives_the_same_numbers_and_another_does_not():
    a, b, c = generate(0, 10, 5, 6), generate(0, 10, 5, 6), generate(1, 10, 5, 6)
    for split, size in (("train", 10), ("val", 5), ("test", 6)):
        assert a.noisy[split].shape == a.signals[split].shape == (size, 100)
        assert torch.equal(a.noisy[split], b.noisy[split])
        assert torch.equal(a.signals[split], b.signals[split])
    assert not torch.equal(a.signals["train"], c.signals["train"])


def test_moments_are_those_of_the_description():
    drawn = generate(0, 20_000, 1, 1)
    signals = drawn.signals["train"]
    noise = drawn.noisy["train"] - signals
    assert abs(float(noise.mean())) < 0.05
    assert float(noise.std()) == pytest.approx(10, rel=0.01)
    jumps = (signals.diff(dim=1) != 0).sum(1)
    counts = jumps.bincount(minlength=9).double() / len(jumps)
    assert torch.allclose(counts, torch.full((9,), 1 / 9, dtype=torch.float64), atol=0.01), "1 to 9 segments, uniformly"
    where = (signals.diff(dim=1) != 0).double().mean(0)
    assert torch.allclose(where, torch.full((99,), 4 / 99, dtype=torch.float64), atol=0.007), "ends are everywhere"
    first = signals[:, 0]
    assert 10 <= float(signals.min()) < 10.1
    assert 99.9 < float(signals.max()) <= 100
    assert float(first.mean()) == pytest.approx(55, abs=0.6)


def test_scale_and_noise_are_what_one_asks_for():
    drawn = generate(0, 2000, 1, 1, length=30, max_segments=1, low=-3, high=3, noise=0.5)
    assert (drawn.signals["train"].diff(dim=1) == 0).all()
    assert float(drawn.signals["train"].abs().max()) <= 3
    assert float((drawn.noisy["train"] - drawn.signals["train"]).std()) == pytest.approx(0.5, rel=0.02)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"length": 1}, "length=1"),
        ({"max_segments": 0}, "max_segments=0"),
        ({"max_segments": 101}, "max_segments=101 exceeds the length=100"),
        ({"low": 5, "high": 5}, "take low below high"),
        ({"noise": 0}, "noise=0"),
        ({"n_test": 0}, "n_test=0"),
    ],
)
def test_bad_arguments_are_named(options, match):
    with pytest.raises(InputError, match=match):
        generate(**{"seed": 0, "n_train": 2, "n_val": 2, "n_test": 2, **options})
