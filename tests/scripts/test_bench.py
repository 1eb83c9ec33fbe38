"""The command of the benchmark: what it measures, and how its tables say that they were made."""

import pytest

from experiments.report.artifacts import Artifacts
from scripts import bench


@pytest.mark.parametrize(
    ("arguments", "threads", "command"),
    [
        ([], [1, 8], "make bench"),
        (["--profile", "smoke", "--threads=4", "--threads=1"], [1, 4], 'make bench PROFILE=smoke THREADS="1 4"'),
        (["--layer", "qp", "--threads", "2"], [2], "python -m scripts.bench --layer qp --threads 2"),
        (["--no-cuda"], [1, 8], "python -m scripts.bench --no-cuda"),
    ],
)
@pytest.mark.parametrize("gpu", [None, "a GPU"])
def test_the_tables_name_the_command_that_makes_them(monkeypatch, tmp_path, capsys, arguments, threads, command, gpu):
    asked = []

    def make(_, *given):
        asked.append(given)
        (tmp_path / "bench").mkdir()
        for name in ("targets", "cuda"):
            (tmp_path / "bench" / f"{name}.md").write_text(f"the table of {name}")
        return Artifacts(tmp_path), None

    monkeypatch.setattr(bench.report, "make", make)
    monkeypatch.setattr(bench.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(bench.torch.cuda, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(bench.torch.cuda, "get_device_name", lambda: gpu)
    assert bench.main(arguments) == 0
    ((names, counts, said, measured),) = asked
    assert names == (["qp"] if "qp" in arguments else list(bench.LAYERS))
    assert (counts, said) == (threads, command)
    assert measured == (None if "--no-cuda" in arguments else gpu)
    printed = capsys.readouterr().out
    assert "the table of targets" in printed
    assert ("the table of cuda" in printed) == (measured is not None)
