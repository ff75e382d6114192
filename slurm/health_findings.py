"""What the health check finds out about a node, as its processes write it down for rank 0 to judge."""

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from ..redaction import redacted

GIB, MIB = 1 << 30, 1 << 20


@dataclass
class Gpu:
    """A GPU as nvidia-smi has it; None where the card does not say."""

    index: int
    uuid: str
    model: str
    driver: str
    memory_mib: float | None = None
    free_mib: float | None = None
    celsius: float | None = None
    uncorrected_errors: float | None = None  # of its memory, since the driver was loaded
    has_pages_pending: bool | None = None  # pages of memory to be retired at the next reset
    is_remap_pending: bool | None = None  # rows of memory to be replaced at the next reset
    has_remap_failed: bool | None = None  # no spare row is left
    slowed_by: str = ""  # the hardware's reasons for a lower clock


@dataclass
class Device:
    """What one process found out about the device it trains on."""

    rank: int
    name: str = ""
    uuid: str = ""  # without "GPU-" in front; empty for a CPU
    fault: str = ""
    tflops: float | None = None  # of products in bfloat16; None for a CPU, which is not measured
    is_out_of_sight: bool = False  # whether torch does not show this process the GPU that it is to have


@dataclass
class NodeReport:
    """What a node found out about itself, written anew whenever it knows more."""

    node: str
    attempt: str
    ranks: list[int]
    doing: str = ""  # what comes next: what a node that falls silent was at
    is_complete: bool = False
    # None of the checks needs a GPU where 0, else that many processes want one each.
    gpus_needed: int = 0
    gpus: list[Gpu] = field(default_factory=list)
    smi_fault: str = ""
    has_smi_timed_out: bool = False
    versions: dict[str, str] = field(default_factory=dict)  # what has to be the same on all nodes
    shm_bytes: int = 0  # free in /dev/shm
    memory_bytes: int = 0  # that processes could still have
    node_memory_bytes: int = 0
    run_disk_bytes: int = 0  # free where the run directory is
    temp_disk_bytes: int = 0  # free where temporary files go
    temp_folder: str = ""
    open_files: int = 0  # that a process may have at most
    folder_fault: str = ""
    data_faults: list[str] = field(default_factory=list)  # of the data that the run reads, one for each setting
    write_bytes_per_second: float | None = None  # into the run directory
    write_seconds: float | None = None  # until a small file is on the disk there
    devices: list[Device] = field(default_factory=list)
    silent_ranks: list[int] = field(default_factory=list)  # that did not say what they found
    name_fault: str = ""  # of the master's name
    port_fault: str = ""  # why rank 0 could not open its store
    master_fault: str = ""  # why rank 0's store cannot be reached
    clock_skew_seconds: float | None = None  # ahead of rank 0's clock

    def text(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def parsed(cls, text: str) -> Self | None:
        """None for what is no report, or not all of one."""
        try:
            facts = json.loads(text)
            lists = {"gpus": [Gpu(**gpu) for gpu in facts["gpus"]], "devices": [Device(**d) for d in facts["devices"]]}
            return cls(**{**facts, **lists})
        except (ValueError, TypeError, KeyError):
            return None


@dataclass
class SumResult:
    """How adding up with the others went for one process."""

    rank: int
    fault: str = ""  # a sum that is wrong
    node_fault: str = ""  # the same of the processes of its own node alone
    error: str = ""  # why there was none
    folder_fault: str = ""  # why it could not read what another node wrote
    seconds: float | None = None  # of a large sum over all
    bytes: int = 0
    node_seconds: float | None = None  # of the same sum over the processes of its node; None where there is one


def replace_file(path: Path, text: str) -> None:
    """Write a file as a whole and without secrets, down to the disk."""
    staging = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(staging, "w", encoding="utf-8") as file:
            file.write(redacted(text))
            file.flush()
            os.fsync(file.fileno())
        staging.replace(path)
    except OSError:
        with suppress(OSError):
            staging.unlink()
        raise


def read_json(path: Path) -> dict[str, Any] | None:
    """What a JSON file holds; None where there is none, or none to be read."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return facts if isinstance(facts, dict) else None


def one_line(text: object) -> str:
    """Text of other programs, fit for a line of a file that is read by lines and tabs, and for a terminal."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(str(text).split()))[:300]
