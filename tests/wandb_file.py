"""Reads the file of an offline W&B run: a LevelDB log of protobuf records, with a header of seven bytes."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK, _HEADER = 32768, 7
_FULL, _LAST = 1, 4


def chunks(data: bytes) -> Iterator[bytes]:
    assert data[:4] == b":W&B"
    place, parts = _HEADER, []
    while place + _HEADER <= len(data):
        left = _BLOCK - place % _BLOCK
        if left < _HEADER:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        parts.append(data[place + _HEADER : place + _HEADER + length])
        place += _HEADER + length
        if kind in (_FULL, _LAST):
            yield b"".join(parts)
            parts = []


def read(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]:
    """History rows, summary and configuration of the one offline run under a folder, once it has finished."""
    import wandb
    from wandb.proto import wandb_internal_pb2

    wandb.finish()
    wandb.teardown()
    rows: list[dict[str, Any]] = []
    summary: dict[str, Any] = {}
    config: dict[str, Any] = {}
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    for chunk in chunks(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(chunk)
        kind = record.WhichOneof("record_type")
        if kind == "history":
            rows.append(_values(record.history.item))
        elif kind == "summary":
            summary.update(_values(record.summary.update))
        elif kind == "config":
            config.update(_values(record.config.update))
        elif kind == "run":
            config.update(_values(record.run.config.update))
    return rows, summary, config


def _values(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
