"""Scaling of the backends: exponents of known power laws, and measurements of real layers."""

import dataclasses

import numpy as np
import pandas as pd
import pytest

from experiments.across_studies import scaling
from experiments.report.artifacts import Artifacts
from experiments.report.measurements import in_own_process
from experiments.report.outputs import Measurement

pytestmark = pytest.mark.slow


def law(backend, exponent, values, least=1e6):
    rows = [
        {"layer": "portfolio", "axis": "n", "value": v, "backend": backend, "seconds": 1e-3 * v**exponent}
        for v in values
    ]
    return pd.DataFrame(rows).assign(peak_bytes=lambda t: least * t["value"] ** 2.0)


def test_exponents_of_power_laws_are_found_from_the_three_largest_values():
    cubic = law("fold", 3.0, (10, 20, 40, 80))
    cubic.loc[0, "seconds"] = 1e3  # an outlier outside the three largest values
    table = pd.concat([cubic, law("qpth", 1.5, (10, 20)), law("unroll", 1.0, (10,)), law("lfpi", 1, (10, 20), 1e-3)])
    fitted = scaling.slopes(table).set_index("backend")
    assert fitted.loc["fold", ["time_slope", "memory_slope"]].tolist() == pytest.approx([3.0, 2.0])
    assert fitted.loc["fold", "largest"] == 80
    assert fitted.loc["qpth", "time_slope"] == pytest.approx(1.5)
    assert np.isnan(fitted.loc["unroll", "time_slope"]), "one value has no exponent"
    assert np.isnan(fitted.loc["lfpi", "memory_slope"]), "too little memory to be seen"


def test_unfolding_keeps_every_iteration_and_series_end_at_the_limit():
    """One layer, measured in a separate process as by `make`, so that nothing else affects the memory."""
    small = {"batches": (2, 4), "iterations": (20, 200), "usual_batch": 64}
    settings = dataclasses.replace(scaling.PROFILES["smoke"], **small, limit=1e3)
    rows = in_own_process(scaling.measure, settings, ("multilabel",))
    assert set(rows.loc[rows["backend"] == "fold", "axis"]) == {"batch"}
    memory = rows[rows["axis"] == "iterations"].set_index("value")["peak_bytes"]
    assert memory[200] > 5 * memory[20]
    stopped = in_own_process(scaling.measure, dataclasses.replace(settings, limit=0.0), ("multilabel",))
    assert set(stopped["value"]) == {2, 20}


def test_the_figure_and_the_table_show_every_layer(tmp_path, monkeypatch, drawings):
    rows = pd.concat(
        law(backend, 2.0, (10, 20, 40)).assign(layer=layer, axis=axis)
        for layer, content in scaling.LAYERS.items()
        for backend in content.backends
        for axis in scaling.AXES
    )
    measured = rows.assign(seconds_forward=rows["seconds"], seconds_backward=0.0).drop(columns="seconds")
    monkeypatch.setattr(scaling, "measured_once", lambda *_: measured)
    scaling.make(Measurement("scaling", "smoke", Artifacts(tmp_path)))
    text = (tmp_path / "tables/scaling.md").read_text()
    assert text.count("| 2.0 | 2.0 | 2.0 | 2.0 | 2.0 | 2.0 |") == sum(len(c.backends) for c in scaling.LAYERS.values())
    assert "Made by: `make scaling PROFILE=smoke`" in text
    assert (tmp_path / "figures/scaling.png").read_bytes().startswith(b"\x89PNG")
    panels = np.array(drawings["scaling"].axes).reshape(-1, len(scaling.LAYERS))
    for column, layer in zip(panels.T, scaling.LAYERS.values(), strict=True):
        assert column[0].get_title() == layer.title
        for panel in column:
            assert [line.get_label() for line in panel.lines] == ["2.0"] * len(layer.backends), "the exponents"
            assert all(line.get_xdata().tolist() == [10, 20, 40] for line in panel.lines)
