"""What the findings of the health check mean: what is wrong with which node, and whether it is only worth a warning."""

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from .health_findings import GIB, MIB, Device, Gpu, NodeReport, SumResult


@dataclass(frozen=True)
class Limits:
    """Where a finding becomes a warning, and where the node becomes a bad one."""

    # A run goes at the pace of its slowest GPU: one at three quarters costs more than a new start elsewhere. GPUs of one model
    # differ by some 5 % in a healthy cluster.
    slow_gpu: float = 0.75
    slowish_gpu: float = 0.9
    # The sum over the GPUs of one node, against the other nodes: half the speed is a link that has gone or has lost lanes.
    slow_links: float = 0.5
    # Less is another job's, or a process that was left.
    free_gpu_memory: float = 0.95
    # Unless it is this check's own, whose other processes may be quicker than nvidia-smi: a CUDA context and some matrices.
    own_gpu_mib: float = 2048.0
    # Most cards slow down from 83 to 90 degrees Celsius on.
    hot_celsius: float = 85.0
    # NCCL keeps buffers of 10 MB for each pair of GPUs and channel there; containers come with 64 MB, which 8 GPUs exceed.
    shm_bytes_per_process: int = 128 * MIB
    # torch, DeepSpeed and a CUDA context need 2 GB in a process before the first clip is read; below that nothing starts.
    memory_bytes_per_process: int = 2 * GIB
    # Another job or something left behind has the rest; the frames of clips may then not fit.
    free_memory: float = 0.1
    # Logs and metrics; a checkpoint finds out itself whether it fits.
    run_disk_bytes: int = 1 * GIB
    # Of a small model's checkpoint: below, one of a large model cannot be written.
    low_run_disk_bytes: int = 20 * GIB
    # Compiled kernels go there; Triton fails without room for them.
    temp_disk_bytes: int = 512 * MIB
    # A process has a connection to every other one, and files of the data beside them.
    open_files_beside_ranks: int = 512
    # A second is a clock that nobody sets, and spoils the order of log lines; from a minute on credentials and file times fail.
    clock_seconds: float = 1.0
    far_off_clock_seconds: float = 60.0
    # A small file takes milliseconds to get to the disk of a shared file system; at a second every log line is felt.
    slow_write_seconds: float = 1.0
    # Of the median of all nodes, which write at the same time, by caches of their own: less is another kind of path.
    slow_write: float = 0.1


@dataclass(frozen=True)
class Fault:
    """Something that is wrong with a node."""

    node: str
    check: str
    text: str
    is_bad: bool = True  # False: a warning


DATA = "data of "  # and the name of a setting: a check for each
# Versions that a run goes on with: while nodes get another driver one after the other, half of them have the old one.
_MAY_DIFFER = {"driver", "GPU", "python"}


def node_faults(reports: Sequence[NodeReport], *, first: str, world: int, limits: Limits) -> list[Fault]:
    """What is wrong with nodes that reported, each by itself and against the others; `first` is that of rank 0."""
    faults: list[Fault] = []
    for report in reports:
        faults += [
            Fault(report.node, check, text, is_bad) for check, text, is_bad in _own_faults(report, world, limits)
        ]
    faults += _minorities(reports, first)
    faults += _slow_gpus([(report.node, device) for report in reports for device in report.devices], limits)
    faults += _clocks(reports, limits)
    faults += _slow_writes(reports, limits)
    return faults


def sum_faults(
    results: Mapping[int, SumResult | None], node_of: Callable[[int], str], *, seconds: float, limits: Limits
) -> list[Fault]:
    """What is wrong with adding up; a rank with None fell silent. A fault that may be any node's has an empty name."""
    faults = []
    silent = [rank for rank, result in results.items() if result is None]
    answers = {rank: result for rank, result in results.items() if result is not None}
    silent_on, nodes = _by_node(silent, node_of), {node_of(rank) for rank in results}
    if 1 < len(silent_on) > len(nodes) / 2:  # such as all but that of rank 0, with a library that ends every process
        silent_on = {"": silent}
    for node, ranks in silent_on.items():
        faults.append(Fault(node, "sum", f"{_ranks(ranks)} did not take part in the sum within {seconds:.0f} s"))
    for node, ranks in _by_node([rank for rank in answers if answers[rank].node_fault], node_of).items():
        faults.append(Fault(node, "sum", f"its own processes: {answers[ranks[0]].node_fault}"))
    for node, ranks in _by_node([rank for rank in answers if answers[rank].folder_fault], node_of).items():
        faults.append(Fault(node, "folder", answers[ranks[0]].folder_fault))
    wrong = [rank for rank in answers if answers[rank].fault]
    blamed = {fault.node for fault in faults if fault.check == "sum"}
    if blamed:
        pass  # with one that is wrong by itself, the sum of all is as well
    elif len(wrong) < len(answers) or len({node_of(rank) for rank in answers}) == 1:
        for node, ranks in _by_node(wrong, node_of).items():
            faults.append(Fault(node, "sum", f"{_ranks(ranks)}: {answers[ranks[0]].fault}"))
    elif wrong:
        faults.append(Fault("", "sum", f"with every process: {answers[wrong[0]].fault}"))
    errors = [rank for rank in answers if answers[rank].error]
    if errors and not blamed:  # otherwise they are what a silent rank looks like to the others
        faults.append(Fault("", "sum", f"{_ranks(errors)} could not add up: {answers[errors[0]].error}"))
    return faults + _slow_links(answers, node_of, limits)


def silence(node: str, report: NodeReport | None, *, seconds: float) -> Fault:
    """A node of which the findings are missing, or not all there."""
    if report is None:
        return Fault(node, "silence", f"did not report within {seconds:.0f} s")
    return Fault(node, "silence", f"fell silent: after {seconds:.0f} s it was still at {report.doing}")


def _own_faults(report: NodeReport, world: int, limits: Limits) -> Iterable[tuple[str, str, bool]]:
    """Check, text, whether the node is bad."""
    processes = len(report.ranks)
    without = [device for device in report.devices if device.is_out_of_sight]
    # Of a node alone that has two GPUs, one may have been lost; where all tasks but the first see none of theirs, none was.
    is_bound = bool(without) and (world > processes or len(without) == processes - 1 > 1)
    if report.gpus_needed:
        if report.smi_fault:
            has_all = len(report.devices) == processes and all(device.uuid for device in report.devices)
            yield "GPUs", report.smi_fault, not (report.has_smi_timed_out and has_all)
        elif len(report.gpus) < report.gpus_needed and not is_bound:  # which hides GPUs from nvidia-smi as well
            yield "GPUs", f"nvidia-smi lists {len(report.gpus)} GPUs of {report.gpus_needed}", True
        if any(not device.uuid and not device.fault for device in report.devices):
            yield "GPUs", "torch sees no GPU (torch.cuda.is_available() is false)", True
        used = {device.uuid for device in report.devices} - {""}
        for gpu in report.gpus:
            if not used or gpu.uuid in used:
                yield from ((check, f"GPU {gpu.index} {text}", bad) for check, text, bad in _gpu_faults(gpu, limits))
    for device in report.devices:
        if device.fault:
            check = "task binding" if is_bound and device.is_out_of_sight else "products"
            yield check, f"rank {device.rank}: {device.fault}", True
    if report.silent_ranks:
        yield "products", f"{_ranks(report.silent_ranks)} did not say how their devices are", True
    shm = min(report.shm_bytes, report.memory_bytes)
    if processes > 1 and shm < (needed := processes * limits.shm_bytes_per_process):
        yield (
            "shm",
            f"/dev/shm has room for {shm / MIB:.0f} MiB, and {processes} processes need {needed / MIB:.0f}",
            True,
        )
    if report.memory_bytes < (needed := processes * limits.memory_bytes_per_process):
        text = (
            f"{report.memory_bytes / GIB:.1f} GiB of memory are free, and {processes} processes need {needed / GIB:.0f}"
        )
        yield "memory", text, True
    elif report.memory_bytes < limits.free_memory * report.node_memory_bytes:
        text = f"only {report.memory_bytes / GIB:.0f} of {report.node_memory_bytes / GIB:.0f} GiB of memory are free"
        yield "memory", text, False
    if report.folder_fault:
        yield "folder", report.folder_fault, True
    for text in report.data_faults:
        yield f"{DATA}{text.partition('=')[0]}", text, True
    if report.run_disk_bytes < limits.low_run_disk_bytes:
        text = f"the run directory's disk has {report.run_disk_bytes / GIB:.1f} GiB free"
        yield "run disk", text, report.run_disk_bytes < limits.run_disk_bytes
    if report.temp_disk_bytes < limits.temp_disk_bytes:
        yield "temp disk", f"{report.temp_folder} has {report.temp_disk_bytes / MIB:.0f} MiB free", True
    if report.open_files < (needed := world + limits.open_files_beside_ranks):
        text = f"a process may have {report.open_files} files open, and needs {needed} (ulimit -Hn)"
        yield "open files", text, True
    if report.port_fault:
        yield "port", report.port_fault, True
    if report.name_fault:
        yield "master's name", report.name_fault, True
    elif report.master_fault:
        yield "master", report.master_fault, True
    if report.write_seconds is not None and report.write_seconds > limits.slow_write_seconds:
        yield "write", f"a small file takes {report.write_seconds:.1f} s to get to the run directory's disk", False


def _gpu_faults(gpu: Gpu, limits: Limits) -> Iterable[tuple[str, str, bool]]:
    if gpu.uncorrected_errors:
        yield "ECC", f"has {gpu.uncorrected_errors:.0f} uncorrected memory errors", True
    if gpu.has_remap_failed:
        yield "ECC", "has broken memory and no spare rows left", True
    if gpu.is_remap_pending:
        yield "ECC", "waits for a reset that replaces broken rows of its memory", True
    if gpu.has_pages_pending:
        yield "ECC", "waits for a reset that retires broken pages of its memory", True
    if gpu.memory_mib and gpu.free_mib is not None:
        used = gpu.memory_mib - gpu.free_mib
        if used > max(limits.own_gpu_mib, (1 - limits.free_gpu_memory) * gpu.memory_mib):
            yield "GPU memory", f"has {used / 1024:.1f} of {gpu.memory_mib / 1024:.0f} GiB in use by others", True
    if gpu.celsius is not None and gpu.celsius >= limits.hot_celsius:
        yield "heat", f"has {gpu.celsius:.0f} degrees Celsius", False
    if gpu.slowed_by:
        yield "heat", f"is slowed down ({gpu.slowed_by})", False


def _minorities(reports: Sequence[NodeReport], first: str) -> list[Fault]:
    """Nodes that have something else than most; of as many on both sides, than the node of rank 0."""
    faults = []
    for name in sorted({name for report in reports for name in report.versions}):
        is_bad = name not in _MAY_DIFFER
        values = {
            report.node: report.versions.get(name, "none") for report in reports if is_bad or name in report.versions
        }
        counts = Counter(values.values())
        usual = max(counts, key=lambda value: (counts[value], values.get(first) == value))
        for node, value in values.items():
            if value != usual:
                text = f"{name} is {value}, and {usual} on {counts[usual]} of {len(values)} nodes"
                faults.append(Fault(node, "versions" if is_bad else name, text, is_bad))
    return faults


def _slow_gpus(devices: Sequence[tuple[str, Device]], limits: Limits) -> list[Fault]:
    faults = []
    speeds: dict[str, list[float]] = {}
    for _, device in devices:
        if device.tflops is not None:
            speeds.setdefault(device.name, []).append(device.tflops)
    medians = {name: statistics.median_high(known) for name, known in speeds.items()}
    for node, device in devices:
        if device.tflops is None:
            continue
        share = device.tflops / (median := medians[device.name])
        if share < limits.slowish_gpu:
            text = f"rank {device.rank}'s GPU makes {device.tflops:.0f} TFLOP/s, {share:.0%} of the median {median:.0f}"
            faults.append(Fault(node, "speed", text, share < limits.slow_gpu))
    return faults


def _clocks(reports: Sequence[NodeReport], limits: Limits) -> list[Fault]:
    skews = {report.node: report.clock_skew_seconds for report in reports if report.clock_skew_seconds is not None}
    # Of two clocks nobody knows which one is right: rank 0's is.
    right = statistics.median(skews.values()) if len(skews) > 2 else 0.0
    faults = []
    for node, skew in skews.items():
        if (off := abs(skew - right)) > limits.clock_seconds:
            text = f"its clock is {off:.1f} s {'ahead of' if skew > right else 'behind'} the others"
            faults.append(Fault(node, "clock", text, off > limits.far_off_clock_seconds))
    return faults


def _slow_writes(reports: Sequence[NodeReport], limits: Limits) -> list[Fault]:
    speeds = {r.node: r.write_bytes_per_second for r in reports if r.write_bytes_per_second is not None}
    if not speeds:
        return []
    median = statistics.median_high(speeds.values())
    text = "writes {:.0f} MB/s into the run directory, where the median is {:.0f}"
    slow = {node: speed for node, speed in speeds.items() if speed < limits.slow_write * median}
    return [Fault(node, "write", text.format(speed / 1e6, median / 1e6), False) for node, speed in slow.items()]


def _slow_links(answers: Mapping[int, SumResult], node_of: Callable[[int], str], limits: Limits) -> list[Fault]:
    seconds = {node_of(rank): answer.node_seconds for rank, answer in answers.items() if answer.node_seconds}
    if not seconds:
        return []
    median = statistics.median_low(seconds.values())
    text = "a sum over its own processes takes {:.1f} ms, where the median is {:.1f}"
    slow = {node: took for node, took in seconds.items() if limits.slow_links * took > median}
    return [Fault(node, "links", text.format(1e3 * took, 1e3 * median), False) for node, took in slow.items()]


def _by_node(ranks: Iterable[int], node_of: Callable[[int], str]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for rank in ranks:
        found.setdefault(node_of(rank), []).append(rank)
    return found


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"
