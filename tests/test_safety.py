"""What is loaded cannot run code: no eval, no pickle but torch's of tensors, no archive but the published one."""

import ast
import os
import pickle
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from data import cifar100
from experiments.run.checkpoint import Checkpoint
from foldopt.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [
    *(path for folder in ("foldopt", "experiments", "data", "scripts") for path in (ROOT / folder).rglob("*.py"))
]
UNSAFE = {"eval", "exec", "pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load", "os.system", "numpy.load"}


def calls(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}


@pytest.mark.parametrize("path", [*SOURCES, ROOT / "run.py"], ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_evaluates_what_it_reads(path):
    for name, keywords in calls(path):
        assert name not in UNSAFE, name
        assert name != "torch.load" or keywords.get("weights_only") == "True"
        assert keywords.get("shell") != "True"


def test_the_check_sees_what_it_should(tmp_path):
    (tmp_path / "bad.py").write_text("import pickle, torch\npickle.loads(x)\ntorch.load(p)\neval('1')\n")
    assert {name for name, _ in calls(tmp_path / "bad.py")} == {"pickle.loads", "torch.load", "eval"}


class Malicious:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_a_checkpoint_that_carries_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = {"epoch": 0, "seconds": 0.0, "rng": torch.get_rng_state(), "model": Malicious()}
    torch.save(content, tmp_path / "checkpoint.pt")
    with pytest.raises(InputError, match=r"checkpoint.pt cannot be read"):
        Checkpoint(tmp_path, model=torch.nn.Linear(1, 1)).restore(torch.device("cpu"))
    (tmp_path / "checkpoint.pt").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(InputError, match=r"checkpoint.pt cannot be read"):
        Checkpoint(tmp_path).restore(torch.device("cpu"))
    assert not (tmp_path / "executed").exists()


def test_an_archive_that_is_not_the_published_one_is_not_extracted(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR100

    monkeypatch.setattr(CIFAR100, "url", (tmp_path / "nowhere").as_uri())
    cache = tmp_path / "cache"
    cache.mkdir()
    (tmp_path / "evil.txt").write_text("evil")
    with tarfile.open(cache / CIFAR100.filename, "w:gz") as archive:
        archive.add(tmp_path / "evil.txt", "../outside.txt")
        archive.add(tmp_path / "evil.txt", f"{CIFAR100.base_folder}/train")
    assert not cifar100.available(cache)
    with pytest.raises(cifar100.DataError, match="Put its archive"):
        cifar100.load(cache)
    assert not (tmp_path / "outside.txt").exists()
    assert not (cache / CIFAR100.base_folder).exists()


def test_the_lock_pins_every_package_by_hash(tmp_path):
    lock = (ROOT / "requirements.lock").read_text()
    assert "://" not in lock, "an address of an index"
    packages = re.split(r"\n(?! )", lock.strip())
    assert len(packages) > 100
    for package in packages:
        assert re.match(r"[\w.-]+==\S+", package)
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", package), package
    installs = re.findall(r"uv pip install.*requirements\.lock", (ROOT / "Makefile").read_text())
    assert installs
    assert all("--require-hashes" in command for command in installs)

    pinned = next(package for package in packages if package.startswith("rich=="))
    (tmp_path / "bare").write_text(pinned.split(" ")[0] + "\n")
    command = [sys.executable, "-m", "uv", "pip", "install", "--dry-run", "--reinstall", "--offline", "--no-deps"]
    options = ["--require-hashes", "--python", sys.executable, "-r", str(tmp_path / "bare")]
    refused = subprocess.run([*command, *options], capture_output=True, text=True)
    assert refused.returncode != 0
    assert "hash" in refused.stderr
    assert "rich" in refused.stderr
