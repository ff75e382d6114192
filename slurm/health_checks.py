"""What a node finds out about itself without torch and without any other node: GPUs, memory, disks, limits, versions."""

import hashlib
import os
import platform
import resource
import shutil
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from ..redaction import environment_without_secrets
from .health_data import missing_data
from .health_findings import MIB, Gpu, NodeReport, one_line
from .health_place import Place

WRITE_BYTES = 8 * MIB  # of each node: hundreds of them write a few GB at the same time
_WRITE_SECONDS = 4.0  # after which a slow file system has shown what it can
_READ_TRIES = 4
_PIECE = bytes(range(256)) * (MIB // 256)
_REASONS = ("hw_slowdown", "hw_thermal_slowdown", "sw_thermal_slowdown", "hw_power_brake_slowdown")
# Our names of what nvidia-smi is asked, which says [N/A] to what a card does not have.
_QUESTIONS = {
    "index": "index",
    "uuid": "uuid",
    "model": "name",
    "driver": "driver_version",
    "memory_mib": "memory.total",
    "free_mib": "memory.free",
    "celsius": "temperature.gpu",
    "uncorrected_errors": "ecc.errors.uncorrected.volatile.total",
    "has_pages_pending": "retired_pages.pending",
    **{reason: f"clocks_throttle_reasons.{reason}" for reason in _REASONS},  # the name that all drivers know
}
_REMAP_QUESTIONS = {
    "uuid": "gpu_uuid",
    "is_remap_pending": "remapped_rows.pending",
    "has_remap_failed": "remapped_rows.failure",
}


class SmiError(RuntimeError):
    """nvidia-smi did not say what it was asked."""


class SmiTimeout(SmiError):
    """Nor anything else, for too long: without the persistence daemon 8 GPUs take 20 s where processes start beside it."""


def look_at_node(place: Place, report: NodeReport) -> None:
    """Write all that local rank 0 can tell of its node into its report, also what it could not find out; nothing raises."""
    try:
        report.gpus = ask_gpus(place.left(place.deadlines.smi))
    except SmiError as error:
        report.smi_fault = one_line(error)
        report.has_smi_timed_out = isinstance(error, SmiTimeout)
    report.gpus_needed = place.local_world if _wants_gpus(report.gpus) else 0
    report.versions = {"python": platform.python_version(), **_torch_version(), "muybridge's code": code_hash()}
    if report.gpus_needed and report.gpus:
        report.versions["driver"] = ", ".join(sorted({gpu.driver for gpu in report.gpus}))
        report.versions["GPU"] = ", ".join(sorted({gpu.model for gpu in report.gpus}))
    memory = psutil.virtual_memory()
    report.memory_bytes, report.node_memory_bytes = memory.available, memory.total
    report.shm_bytes = _free_bytes(Path("/dev/shm"))
    report.temp_folder = tempfile.gettempdir()
    report.temp_disk_bytes = _free_bytes(Path(report.temp_folder))
    report.run_disk_bytes = _free_bytes(place.run_dir)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    report.open_files = most if most != resource.RLIM_INFINITY else 1 << 30
    try:
        report.write_seconds = statistics.median(_seconds(lambda: _write_small(place)) for _ in range(3))
        report.write_bytes_per_second = _write_large(_data_file(place.folder, place.node), place.node)
    except OSError as error:
        report.folder_fault = one_line(f"cannot write in {place.folder}: {error.strerror or error}")
    report.data_faults = missing_data(place.run_dir)
    try:
        socket.getaddrinfo(place.master, place.port or None)
    except OSError as error:
        report.name_fault = one_line(f"the name MASTER_ADDR={place.master} is not known here: {error}")


def _wants_gpus(gpus: list[Gpu]) -> bool:
    """Whether the job trains on GPUs: those that it was given, which may have gone, or those that there are."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if os.environ.get("DS_ACCELERATOR") == "cpu" or visible in ("", "-1", "NoDevFiles"):
        return False
    return bool(gpus or visible) or os.environ.get("SLURM_GPUS_ON_NODE", "0") not in ("", "0")


def ask_gpus(seconds: float) -> list[Gpu]:
    """The node's GPUs as nvidia-smi has them. Raises SmiError where it is missing or fails, SmiTimeout where it takes longer."""
    until = time.monotonic() + seconds
    reasons = {reason: reason.replace("_", " ") for reason in _REASONS}
    gpus = []
    for row in _ask("--query-gpu", dict(_QUESTIONS), until):
        try:
            index = int(row["index"])
        except (KeyError, ValueError) as error:
            raise SmiError(f"nvidia-smi gave a GPU without a number: {row}") from error
        gpus.append(
            Gpu(
                index,
                *(row.get("uuid", "").removeprefix("GPU-"), row.get("model", ""), row.get("driver", "")),
                memory_mib=_number(row.get("memory_mib")),
                free_mib=_number(row.get("free_mib")),
                celsius=_number(row.get("celsius")),
                uncorrected_errors=_number(row.get("uncorrected_errors")),
                has_pages_pending=_truth(row.get("has_pages_pending")),
                slowed_by=", ".join(words for reason, words in reasons.items() if row.get(reason) == "Active"),
            )
        )
    with suppress(
        SmiError
    ):  # there may be no time left; cards before Ampere have none, and old drivers do not know the question
        remaps = {
            row["uuid"].removeprefix("GPU-"): row for row in _ask("--query-remapped-rows", _REMAP_QUESTIONS, until)
        }
        for gpu in gpus:
            row = remaps.get(gpu.uuid, {})
            gpu.is_remap_pending = _truth(row.get("is_remap_pending"))
            gpu.has_remap_failed = _truth(row.get("has_remap_failed"))
    return gpus


def _ask(question: str, names: dict[str, str], until: float) -> list[dict[str, str]]:
    """A row for each GPU. What this driver does not know is left out, and asked again without."""
    names = dict(names)
    while True:
        code, answer = _run_smi([f"{question}={','.join(names.values())}", "--format=csv,noheader,nounits"], until)
        unknown = [name for name, asked in names.items() if code and f'"{asked}" is not a valid' in answer]
        if not unknown or "uuid" in unknown:
            break
        for name in unknown:
            del names[name]
    if code:
        raise SmiError(f"nvidia-smi failed ({code}): {answer.strip() or 'without a word'}")
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.splitlines() if line.strip()]
    return [dict(zip(names, row, strict=True)) for row in rows if len(row) == len(names)]


def _run_smi(arguments: list[str], until: float) -> tuple[int, str]:
    """Exit code and output. Without a wait for its end: a driver that hangs does not even let it be killed."""
    began = time.monotonic()
    try:
        process = subprocess.Popen(
            ["nvidia-smi", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment_without_secrets(),
        )
    except FileNotFoundError as error:
        raise SmiError("nvidia-smi is not there") from error
    except OSError as error:
        raise SmiError(f"nvidia-smi cannot be started: {error.strerror or error}") from error
    try:
        answer, _ = process.communicate(timeout=max(0.1, until - time.monotonic()))
    except subprocess.TimeoutExpired as error:
        process.kill()
        raise SmiTimeout(f"nvidia-smi did not answer within {time.monotonic() - began:.0f} s") from error
    return process.returncode, answer


def _number(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:
        return None


def _truth(text: str | None) -> bool | None:
    return {"Yes": True, "1": True, "No": False, "0": False}.get(text or "")


def code_hash() -> str:
    """Of the package's modules, as they are on this node."""
    digest = hashlib.blake2b(digest_size=6)
    root = Path(__file__).resolve().parents[1]
    for folder, below, files in os.walk(root):
        # A checkout has environments and builds beside the modules.
        below[:] = sorted(name for name in below if (Path(folder) / name / "__init__.py").exists())
        for path in (Path(folder) / name for name in sorted(files) if name.endswith(".py")):
            with suppress(FileNotFoundError):  # somebody edits the checkout
                digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def read_fault(folder: Path, node: str) -> str:
    """What is wrong with reading what that node wrote; "" for nothing. Tried for some seconds: file systems show files late."""
    fault = ""
    for _ in range(_READ_TRIES):
        try:
            content = _data_file(folder, node).read_bytes()
        except OSError as error:
            fault = one_line(f"cannot read in {folder} what {node} wrote: {error.strerror or error}")
        else:
            start = _data_start(node)
            if content == start + _PIECE * ((len(content) - len(start)) // len(_PIECE)):
                return ""
            fault = f"what {node} wrote in {folder} is not what can be read there"
        time.sleep(1.0)
    return fault


def _data_file(folder: Path, node: str) -> Path:
    return folder / f"{node}.data"


def _data_start(node: str) -> bytes:
    return f"written by {node}\n".encode()


def _torch_version() -> dict[str, str]:
    try:
        return {"torch": version("torch")}
    except PackageNotFoundError:
        return {"torch": "none"}


def _free_bytes(folder: Path) -> int:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0


def _write_small(place: Place) -> None:
    path = place.folder / f"{place.node}.small"
    with open(path, "wb") as file:
        file.write(_PIECE[:4096])
        file.flush()
        os.fsync(file.fileno())
    path.unlink()


def _write_large(path: Path, node: str) -> float:
    """Bytes a second, down to the disk."""
    began, written = time.monotonic(), 0
    with open(path, "wb") as file:
        file.write(_data_start(node))
        while written < WRITE_BYTES and time.monotonic() < began + _WRITE_SECONDS:
            written += file.write(_PIECE)
            file.flush()
            os.fsync(file.fileno())
    return written / (time.monotonic() - began)


def _seconds(work: Callable[[], None]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began
