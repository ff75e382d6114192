"""Reads what W&B's offline client wrote."""

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a W&B offline file: blocks of 32 KiB, each record in chunks of checksum, length and kind."""
    from wandb.proto import wandb_internal_pb2  # its classes are made at import

    data = path.read_bytes()
    position, buffer = 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        if kind == 0:
            return
        position += 7
        buffer += data[position : position + length]
        position += length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
            record.ParseFromString(buffer)
            yield record
            buffer = b""


def wait_until_written(path: Path) -> None:
    """Until the end of a run is in its file: W&B's service, which writes it, may be behind the client that says it has finished."""
    deadline = time.monotonic() + 60
    while not any(record.WhichOneof("record_type") == "exit" for record in wandb_records(path)):
        assert time.monotonic() < deadline, f"{path} has no end"
        time.sleep(0.05)


def wandb_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows that were logged."""
    for record in wandb_records(path):
        if record.WhichOneof("record_type") == "history":
            yield {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
