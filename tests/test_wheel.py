"""The wheel by itself: installed where there is nothing but torch and what torch requires, it runs the first pages."""

import re
import shutil
import subprocess
import sys
from importlib import metadata

import pytest

from tests.docs.pages import ROOT, examples

pytestmark = pytest.mark.slow

PAGES = (
    "README.md",
    "docs/getting-started.md",
    *(f"docs/tutorials/{name}.md" for name in ("qp", "nested", "diagnose")),
)


def required_by(name, found):
    """Add the distributions that `name` needs on this machine, itself among them."""
    found.add(name)
    for line in metadata.requires(name) or []:
        requirement = re.match(r"[\w.-]+", line)[0].lower()
        if "extra ==" not in line and requirement not in found and installed(requirement):
            required_by(requirement, found)
    return found


def installed(name):
    try:
        return metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A search path of the wheel's content and of links to torch and its requirements."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT / "foldopt", source / "foldopt", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(source)]
    subprocess.run(build, check=True, capture_output=True, text=True)
    (wheel,) = folder.glob("foldopt-*.whl")
    site, links = folder / "site", folder / "links"
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", str(site), str(wheel)], check=True)
    links.mkdir()
    for name in required_by("torch", set()):
        distribution = metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            link = links / top
            if not link.exists():
                link.symlink_to(distribution.locate_file(top))
    return site, links


def test_torch_is_the_only_requirement(alone):
    (info,) = alone[0].glob("foldopt-*.dist-info/METADATA")
    required = [line for line in info.read_text().splitlines() if line.startswith("Requires-Dist:")]
    assert [line for line in required if "extra ==" not in line] == ["Requires-Dist: torch>=2.11"]
    assert {path.name for path in alone[0].iterdir() if path.is_dir()} == {"foldopt", info.parent.name}


def test_types_come_with_it(alone):
    """PEP 561: type checkers read the annotations of packages that say so."""
    assert (alone[0] / "foldopt" / "py.typed").exists()


@pytest.mark.parametrize("page", PAGES)
def test_the_first_pages_run(alone, page, tmp_path):
    environment = {"PYTHONPATH": ":".join(map(str, alone)), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    guard = "import importlib.util as u; assert not u.find_spec('scipy') and not u.find_spec('pytest')\n"
    code = "\n".join(block for block, _ in examples((ROOT / page).read_text()))
    command = [sys.executable, "-S", "-c", guard + code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout
