"""The series of Figure 4(b): readings of the data and structures of the operator."""

from __future__ import annotations

import pandas as pd

from experiments.report.aggregation import last_test_rows

READINGS = ("centred", "optnet", "literal")
STRUCTURES = {
    "": "all of D, as in the paper",
    "_zero_sum": "rows of sum zero, decaying step",
    "_filter": "one filter, weighted rows",
}
SERIES = {reading + suffix: how for suffix, how in STRUCTURES.items() for reading in READINGS}


def learned_and_classical(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the test rows of the last epoch as series "learned", and those before training as series "classical".

    The column `setting` has the original series.
    """
    before = frame[(frame["split"] == "test") & (frame["epoch"] == 0)]
    return pd.concat(
        [
            part.assign(setting=part["series"], series=name)
            for name, part in (("learned", last_test_rows(frame)), ("classical", before))
        ]
    )
