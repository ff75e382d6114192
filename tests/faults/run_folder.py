"""What a run left in its folder, in a form that two runs can be compared by."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Of a row of metrics, what depends on the machine's speed or on how often the run was started.
NOT_COMPARED = re.compile(r"seconds|per_second|^attempt$")
# Rows of steps and validations; those of checkpoints come when the disk is done.
COMPARED_ROWS = ("samples_seen", "validation_loss")


@dataclass(frozen=True)
class Story:
    """A run's rows of metrics without times, and the bytes of its last checkpoint's tensors, by file name."""

    rows: list[dict[str, Any]]
    last: str
    shards: dict[str, bytes]


def read_rows(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, without what differs between equal runs; [] where there is no such file."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [row for row in rows if any(name in row for name in COMPARED_ROWS)]
    return [{name: value for name, value in row.items() if not NOT_COMPARED.search(name)} for row in rows]


def read_story(run_dir: Path) -> Story:
    """Rows and last checkpoint of a run that is over."""
    last = run_dir / "checkpoints" / checkpoint_names(run_dir)[-1]
    return Story(read_rows(run_dir), last.name, {path.name: path.read_bytes() for path in last.glob("*.safetensors")})


def checkpoint_names(run_dir: Path) -> list[str]:
    """Names of the committed checkpoints, oldest first."""
    return sorted(
        path.name for path in (run_dir / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d{8}", path.name)
    )


def leftovers(run_dir: Path) -> list[str]:
    """What lies in `checkpoints` and should not once a run is over: staging folders, trash, half-written files."""
    allowed = re.compile(r"step-\d{8}|LATEST|set_aside")
    return [path.name for path in (run_dir / "checkpoints").iterdir() if not allowed.fullmatch(path.name)]


def resumed_step(output: str) -> int | None:
    """The step that an attempt's output says it went on from; None for a fresh start."""
    found = re.search(r"resumed from \S*step-(\d{8})", output)
    return int(found[1]) if found else None


def flip_bit(path: Path, *, byte: int = -100) -> None:
    """Change one bit of a file, as a bad disk does."""
    content = bytearray(path.read_bytes())
    content[byte] ^= 0x10
    path.write_bytes(content)
