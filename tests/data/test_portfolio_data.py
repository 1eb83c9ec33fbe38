import pytest
import torch

from data.portfolio import generate
from foldopt.errors import InputError


def test_the_same_seed_gives_the_same_numbers_and_another_does_not():
    a, b, c = generate(0, 3, 10, 5, 5), generate(0, 3, 10, 5, 5), generate(1, 3, 10, 5, 5)
    for split in ("train", "val", "test"):
        assert torch.equal(a.features[split], b.features[split])
        assert torch.equal(a.returns[split], b.returns[split])
    assert torch.equal(a.V, b.V)
    assert not torch.equal(a.V, c.V)
    assert [len(a.returns[split]) for split in ("train", "val", "test")] == [10, 5, 5]


def test_moments_are_those_of_the_description():
    drawn = generate(0, 1, 200_000, 1, 1, tau=1.0)
    z, c = drawn.features["train"], drawn.returns["train"]
    assert z.mean(0).abs().max() < 0.01
    design = torch.cat([torch.ones(len(z), 1), z], 1).double()
    coefficients = torch.linalg.lstsq(design, c).solution
    assert torch.allclose(coefficients[0], torch.full((20,), 0.1, dtype=c.dtype), atol=2e-4)
    steps = coefficients[1:] / (0.05 / 5**0.5)
    assert torch.minimum(steps.abs(), (steps - 1).abs()).max() < 0.01, "B is 0 or 1"
    residual = c - design @ coefficients
    assert torch.allclose(residual.T @ residual / len(c), drawn.V, atol=2e-6), "V is the covariance of the noise"
    assert drawn.gamma == pytest.approx(2.25 * float(drawn.V.sum()) / 100)


def test_noise_scales_with_tau_and_means_with_the_degree():
    low, high = generate(0, 2, 5, 1, 1, tau=0.1), generate(0, 2, 5, 1, 1, tau=1.0)
    assert torch.allclose(100 * low.V, high.V)
    mean = generate(0, 3, 2000, 1, 1, tau=1e-9).returns["train"]
    root = mean.sign() * mean.abs() ** (1 / 3)
    features = generate(0, 3, 2000, 1, 1, tau=1e-9).features["train"]
    design = torch.cat([torch.ones(2000, 1), features], 1).double()
    assert (root - design @ torch.linalg.lstsq(design, root).solution).abs().max() < 1e-6, "linear under the power"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"degree": 0}, "degree=0"),
        ({"degree": 1.5}, "degree=1.5"),
        ({"n_train": 0}, "n_train=0"),
        ({"tau": 0}, "tau=0"),
    ],
)
def test_values_out_of_range_are_named(options, message):
    with pytest.raises(InputError, match=message):
        generate(**{"seed": 0, "degree": 1, "n_train": 2, "n_val": 2, "n_test": 2, **options})
