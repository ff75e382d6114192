"""Findings of sound nodes, for tests of the health check to change."""

from dataclasses import replace
from typing import Any

from muybridge.slurm.health_findings import GIB, Device, Gpu, NodeReport


def gpu(index: int, **changes: Any) -> Gpu:
    sound = Gpu(index, f"u{index}", "NVIDIA H200", "570.1", 143771.0, 143000.0, 40.0, 0.0, False, False, False)
    return replace(sound, **changes)


def report(number: int = 1, *, has_gpus: bool = True, **changes: Any) -> NodeReport:
    """Of a sound node of two processes."""
    ranks = [2 * number - 2, 2 * number - 1]
    devices = [
        Device(rank, "NVIDIA H200", f"u{rank % 2}", "", 700.0) if has_gpus else Device(rank, "cpu") for rank in ranks
    ]
    sound = NodeReport(
        f"n{number}",
        "7",
        ranks,
        is_complete=True,
        gpus_needed=2 if has_gpus else 0,
        gpus=[gpu(index) for index in range(2)] if has_gpus else [],
        versions={"torch": "2.13.0"},
        shm_bytes=500 * GIB,
        memory_bytes=1000 * GIB,
        node_memory_bytes=1100 * GIB,
        run_disk_bytes=9000 * GIB,
        temp_disk_bytes=900 * GIB,
        temp_folder="/tmp",
        open_files=1 << 20,
        write_bytes_per_second=5e8,
        write_seconds=0.004,
        devices=devices,
        clock_skew_seconds=0.01,
    )
    return replace(sound, **changes)
