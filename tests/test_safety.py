"""What is loaded cannot run code: no pickle but torch's of tensors, no archive but the published one.

That no source evaluates what it reads is checked by ruff (its rules S).
"""

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
