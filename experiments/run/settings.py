"""The settings that belong to no class (seed, device, training, tracking): checked before any work, then applied."""

from __future__ import annotations

import os

import torch
from omegaconf import DictConfig, ListConfig

from foldopt.checks import require_positive, require_type, require_whole
from foldopt.errors import InputError

LARGEST_SEED = 2**40 - 1
SCHEDULES = ("constant", "cosine")
TRACKING_MODES = ("offline", "online", "disabled")
LONGEST_TAG = 64  # the limit of W&B, in characters


def prepare(cfg: DictConfig) -> torch.device:
    """Check the settings of a run, then set torch's threads, algorithms and random state; return the run's device.

    Raises InputError for the first setting that is wrong; nothing has been set then.
    """
    require_type("device", cfg.device, str)
    require_type("progress", cfg.progress, bool)
    require_type("deterministic", cfg.deterministic, bool)
    device = resolve_device(cfg.device)
    require_whole("seed", cfg.seed, 0)
    if cfg.seed > LARGEST_SEED:
        raise InputError(f"seed={cfg.seed}: take one below {LARGEST_SEED + 1}.")
    require_whole("threads", cfg.threads, 1)
    check_tracking(cfg.tracking)
    _check_training(cfg.train)
    if torch.get_num_threads() != cfg.threads:  # setting it makes LU unsafe for other libraries, see foldopt.batched
        torch.set_num_threads(cfg.threads)
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is not deterministic without it
    torch.use_deterministic_algorithms(cfg.deterministic)
    torch.manual_seed(cfg.seed)
    return device


def resolve_device(name: str) -> torch.device:
    """Return the torch device called `name`; "auto" is CUDA if there is a GPU, else the CPU.

    Raises InputError for a device that is unknown or that this machine does not have.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError(f"nothing runs on {device.type}")
    except RuntimeError as error:
        raise InputError(f"device={name!r} is unknown; choose auto, cpu, cuda or cuda:<number>.") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device={name!r} is not there: {torch.cuda.device_count()} CUDA devices; use device=auto.")
    return device


def check_tracking(tracking: DictConfig) -> None:
    """Raise InputError for settings that W&B cannot take."""
    if tracking.mode not in TRACKING_MODES:
        raise InputError(f"tracking.mode={tracking.mode!r} is unknown; choose one of {TRACKING_MODES}.")
    require_positive("tracking.finish_timeout", tracking.finish_timeout)
    require_positive("tracking.init_timeout", tracking.init_timeout)
    for name, kind in (("project", str), *((name, str | None) for name in ("entity", "group", "job_type"))):
        require_type(f"tracking.{name}", tracking[name], kind)
    if not (isinstance(tracking.tags, ListConfig) and all(isinstance(tag, str) for tag in tracking.tags)):
        raise InputError(f"tracking.tags={tracking.tags}: expected a list of texts, such as [first,second].")
    if wrong := [tag for tag in tracking.tags if not 1 <= len(tag) <= LONGEST_TAG]:
        raise InputError(f"tracking.tags={wrong}: W&B takes tags of 1 to {LONGEST_TAG} characters.")


def _check_training(train: DictConfig) -> None:
    for name, least in (("epochs", 1), ("batch_size", 1), ("mse_epochs", 0)):
        require_whole(f"train.{name}", train[name], least)
    for name in ("lr", "loss_scale"):
        require_positive(f"train.{name}", train[name])
    if train.schedule not in SCHEDULES:
        raise InputError(f"train.schedule={train.schedule!r} is unknown; choose one of {SCHEDULES}.")
