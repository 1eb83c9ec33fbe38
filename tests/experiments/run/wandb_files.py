"""Reads the file of an offline W&B run, from which `wandb sync` sends it."""

import json
import struct
import time
from pathlib import Path

from wandb.proto import wandb_internal_pb2

MAGIC, BLOCK, HEADER = b":W&B", 32768, 7
WHOLE, LAST = 1, 4


def records(path: Path):
    """Yield the records of a .wandb file: a log in blocks, as LevelDB's, that may cut a record into several parts."""
    data = path.read_bytes()
    assert data[:4] in (MAGIC, b"")
    at, parts = HEADER, b""
    while at + HEADER <= len(data):
        left = BLOCK - at % BLOCK
        if left < HEADER:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        if at + HEADER + length > len(data):
            return
        parts += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (WHOLE, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def read(folder: Path) -> dict:
    """Return what the only offline run under `folder`/wandb has recorded, once W&B's service has written its end."""
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    deadline = time.monotonic() + 60
    while "exit_code" not in (found := _content(path)):
        assert time.monotonic() < deadline, f"{path} has no end"
        time.sleep(0.1)
    return found


def _content(path: Path) -> dict:
    found = {"history": [], "summary": {}, "artifacts": {}, "steps": {}}
    for record in records(path):
        match record.WhichOneof("record_type"):
            case "run":
                run = record.run
                found |= {"id": run.run_id, "group": run.run_group, "job_type": run.job_type, "tags": list(run.tags)}
                found["config"] = items(run.config.update)
            case "history":
                found["history"].append(items(record.history.item))
            case "summary":
                found["summary"] |= items(record.summary.update)
            case "artifact":
                artifact = record.artifact
                files = {entry.path: entry.local_path for entry in artifact.manifest.contents}
                found["artifacts"][artifact.name] = {"type": artifact.type, "files": files}
            case "metric":
                found["steps"][record.metric.glob_name or record.metric.name] = record.metric.step_metric
            case "exit":
                found["exit_code"] = record.exit.exit_code
    return found


def items(content) -> dict:
    """Return items of a record by name, inner names joined by dots."""
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in content}
