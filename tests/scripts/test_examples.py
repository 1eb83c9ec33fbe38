"""The command that runs examples and saves their figures, on scripts of its own."""

import pytest

from scripts import examples

pytest.importorskip("matplotlib")
ONE = "import sys\nimport matplotlib.pyplot as plt\nprint(sys.argv[1:])\nplt.plot([1, 2])\nplt.show()\n"


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    texts = {"one": ONE, "none": "x = 1\n", "two": f"{ONE}plt.figure()\n"}
    for name, text in texts.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setattr(examples, "SCRIPTS", {name: tmp_path / f"{name}.py" for name in texts})
    return tmp_path


def test_figures_are_saved_in_one_size(scripts, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["examples", "one", "--folder", str(scripts / "new")])
    examples.main()
    assert capsys.readouterr().out == "one:\n[]\n"
    picture = examples.plt.imread(scripts / "new" / "one.png")
    width, height = examples.STYLE["figure.figsize"]
    assert picture.shape[:2] == (height * examples.STYLE["savefig.dpi"], width * examples.STYLE["savefig.dpi"])


@pytest.mark.parametrize(("name", "count"), [("none", 0), ("two", 2)])
def test_a_script_draws_one_figure(scripts, name, count):
    with pytest.raises(ValueError, match=f"{name}.py must draw one figure with pyplot, but it drew {count}"):
        examples.play(name)


def test_a_name_that_no_example_has_is_refused_before_anything_runs(scripts, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["examples", "one", "other", "--folder", str(scripts / "new")])
    with pytest.raises(SystemExit):
        examples.main()
    assert "no example is called other. There are: one, none, two." in capsys.readouterr().err
    assert not (scripts / "new").exists()
