"""CIFAR-100 from files of its format, the stand-in images, and the noise of the labels."""

import pickle
import tarfile

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR100
from torchvision.datasets.utils import calculate_md5

from data import cifar100, stand_in
from data.cifar100 import SUPERCLASSES, DataError
from data.noisy_labels import generate, resample
from foldopt.errors import InputError

TRAIN, TEST = 300, 60


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """The archive of a small data set in CIFAR-100's format that torchvision accepts as the real one."""
    rng = np.random.default_rng(0)
    names = sorted(name for group in SUPERCLASSES.values() for name in group.split())
    files = tmp_path / "made" / CIFAR100.base_folder
    files.mkdir(parents=True)

    def dump(name, content):
        (files / name).write_bytes(pickle.dumps(content, protocol=2))
        return name, calculate_md5(files / name)

    def part(count):
        labels = [*range(100), *rng.integers(100, size=count)][-count:]
        pixels = rng.integers(256, size=(count, 3072), dtype=np.uint8)
        return {"data": pixels, "fine_labels": [int(v) for v in labels], "coarse_labels": [0] * count}

    content = {"train": part(TRAIN), "test": part(TEST)}
    monkeypatch.setattr(CIFAR100, "train_list", [dump("train", content["train"])])
    monkeypatch.setattr(CIFAR100, "test_list", [dump("test", content["test"])])
    name, md5 = dump("meta", {"fine_label_names": names, "coarse_label_names": list(SUPERCLASSES)})
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "filename": name, "md5": md5})
    monkeypatch.setattr(CIFAR100, "url", "http://127.0.0.1:9/" + CIFAR100.filename)
    path = tmp_path / CIFAR100.filename
    with tarfile.open(path, "w:gz") as tar:
        tar.add(files, CIFAR100.base_folder)
    monkeypatch.setattr(CIFAR100, "tgz_md5", calculate_md5(path))
    return path, content


def put(archive, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / CIFAR100.filename).write_bytes(archive[0].read_bytes())
    return cache


def test_an_archive_in_the_cache_is_extracted_and_read(archive, tmp_path):
    cache = put(archive, tmp_path)
    assert cifar100.available(cache)
    images = cifar100.load(cache)
    expected = torch.from_numpy(archive[1]["train"]["data"]).view(TRAIN, 3, 32, 32)
    assert torch.equal(images.train[0], expected)
    assert images.train[1].tolist() == archive[1]["train"]["fine_labels"]
    assert images.test[0].shape == (TEST, 3, 32, 32)
    (cache / CIFAR100.filename).unlink()
    assert cifar100.available(cache), "the extracted files are enough"
    assert torch.equal(cifar100.load(cache).train[0], expected)


def test_without_network_the_error_says_what_to_put_where(archive, tmp_path):
    cache = tmp_path / "empty"
    assert not cifar100.available(cache)
    with pytest.raises(DataError, match=rf"{cache}.*{CIFAR100.filename} \(md5 {CIFAR100.tgz_md5}\).*stand_in"):
        cifar100.load(cache)


def test_a_damaged_file_is_not_read(archive, tmp_path):
    cache = put(archive, tmp_path)
    cifar100.load(cache)
    (cache / CIFAR100.filename).unlink()
    with (cache / CIFAR100.base_folder / "train").open("r+b") as file:
        file.write(b"damage")
    assert not cifar100.available(cache)
    with pytest.raises(DataError, match="could not be downloaded"):
        cifar100.load(cache)


def test_the_superclasses_are_20_of_5_and_a_few_are_known():
    group = cifar100.superclasses()
    assert group.bincount().tolist() == [5] * 20
    names = sorted(name for names in SUPERCLASSES.values() for name in names.split())
    assert len(set(names)) == 100
    known = {"apple": 4, "aquarium_fish": 1, "baby": 14, "bear": 8, "beaver": 0, "bicycle": 18, "worm": 13}
    assert {name: int(group[names.index(name)]) for name in known} == known
    assert list(SUPERCLASSES) == sorted(SUPERCLASSES), "superclasses are numbered alphabetically"


def test_splits_of_cifar100(archive, tmp_path):
    cache = put(archive, tmp_path)
    drawn = generate("cifar100", 0, 200, 100, 50, noise=0.0, folder=cache)
    assert {name: len(labels) for name, labels in drawn.labels.items()} == {"train": 200, "val": 100, "test": 50}
    pixels = archive[1]["train"]["data"].sum(1, dtype=np.int64)
    seen = torch.cat([drawn.images["train"], drawn.images["val"]]).long().sum((1, 2, 3))
    assert sorted(seen.tolist()) == sorted(pixels.tolist()), "each training image is in one of the two splits"
    again = generate("cifar100", 0, 200, 100, 50, noise=0.0, folder=cache)
    assert torch.equal(drawn.images["train"], again.images["train"])
    other = generate("cifar100", 1, 200, 100, 50, noise=0.0, folder=cache)
    assert not torch.equal(drawn.images["train"], other.images["train"])
    with pytest.raises(InputError, match=r"n_train \+ n_val=301: the data set has only 300"):
        generate("cifar100", 0, 201, 100, 50, folder=cache)
    with pytest.raises(InputError, match="n_test=61: the data set has only 60"):
        generate("cifar100", 0, 200, 100, 61, folder=cache)


def test_noise_stays_in_the_group_and_has_its_rate():
    labels = torch.arange(100).repeat(200)
    group = cifar100.superclasses()
    noisy = resample(labels, group, 0.4, torch.Generator().manual_seed(0))
    assert torch.equal(group[noisy], group[labels])
    assert float((noisy != labels).double().mean()) == pytest.approx(0.4 * 4 / 5, abs=0.01)
    changed = noisy[noisy != labels].bincount(minlength=100)
    assert int(changed.min()) > 0.6 * float(changed.double().mean()), "every class gets its share"
    assert torch.equal(resample(labels, group, 0.0, torch.Generator().manual_seed(0)), labels)


def test_only_training_labels_are_noisy_and_blocks_differ_from_superclasses(archive, tmp_path):
    cache = put(archive, tmp_path)
    clean, noisy, blocks = (
        generate("cifar100", 0, 200, 100, 60, noise=noise, groups=groups, folder=cache)
        for noise, groups in ((0.0, "superclasses"), (1.0, "superclasses"), (1.0, "blocks"))
    )
    for name in ("val", "test"):
        assert torch.equal(clean.labels[name], noisy.labels[name])
    group = cifar100.superclasses()
    true = clean.labels["train"]
    assert torch.equal(group[noisy.labels["train"]], group[true])
    assert torch.equal(blocks.labels["train"] // 5, true // 5)
    assert not torch.equal(group[blocks.labels["train"]], group[true])


def test_the_stand_in_is_drawn_anew_by_seed_and_shows_its_classes():
    a, b, c = (stand_in.generate(seed, 60, 20) for seed in (0, 0, 1))
    assert a.train[0].shape == (60, 3, 32, 32)
    assert a.train[0].dtype == torch.uint8
    assert torch.equal(a.train[0], b.train[0])
    assert not torch.equal(a.train[0], c.train[0])
    assert torch.equal(a.superclass, torch.arange(100) // 5)
    many = stand_in.draw(torch.tensor([0, 5]).repeat_interleave(50), torch.Generator().manual_seed(0)).float()
    red, yellow = many.mean((2, 3)).view(2, 50, 3).mean(1)
    assert float(yellow[1] - red[1]) > 10, "superclasses 0 and 1 are red and yellow discs"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "imagenet"}, r"data='imagenet' is unknown; choose one of \['cifar100', 'stand_in'\]"),
        ({"noise": 1.5}, "noise=1.5"),
        ({"groups": "coarse"}, "groups='coarse'"),
        ({"n_train": 0}, "n_train=0"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(InputError, match=message):
        generate(**{"source": "stand_in", "seed": 0, "n_train": 2, "n_val": 2, "n_test": 2, **options})
