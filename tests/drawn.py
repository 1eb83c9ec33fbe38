"""Numbers for property tests: at one scale and of few values, so that ties, zeros and denormals are frequent.

The examples are the same in every run; ``HYPOTHESIS_PROFILE=nightly`` draws new ones, and more of them. An example that
fails is made as small as it can be.
"""

import os

import torch
from hypothesis import settings
from hypothesis import strategies as st

F64 = torch.float64
PROFILES = {
    "fixed": {"derandomize": True, "max_examples": 10, "database": None},
    "nightly": {"max_examples": 200, "print_blob": True},
}
properties = settings(deadline=None, **PROFILES[os.environ.get("HYPOTHESIS_PROFILE", "fixed")])
scales = st.integers(-8, 8).map(lambda k: 10.0**k)
seeds = st.integers(0, 10**6)
units = st.one_of(st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 1e-300, 5e-324]), st.floats(-1, 1))
not_finite = st.sampled_from([torch.nan, torch.inf, -torch.inf])


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@st.composite
def points(draw, rows=3, columns=5, scales=scales):
    """(rows, columns) at one scale, of at most 6 values."""
    values = draw(st.lists(units, min_size=1, max_size=6))
    picked = draw(st.lists(st.sampled_from(values), min_size=rows * columns, max_size=rows * columns))
    return draw(scales) * torch.tensor(picked, dtype=F64).view(rows, columns)
