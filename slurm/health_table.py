"""The outcome of a health check for people: kept as RUN_DIR/slurm/health.json, printed as a table of nodes and figures."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from .health_findings import GIB, MIB, NodeReport, SumResult, read_json, replace_file
from .health_rules import Fault
from .health_verdict import Verdict

FILE_NAME = "slurm/health.json"  # in the run directory
_WRITES = "MB/s, ms: files in the run directory"
_FREE = "shm, memory, temp: GiB free"
# And what explains them.
_COLUMNS = {
    "GPUs": "TFLOP/s: slowest GPU",
    "TFLOP/s": "TFLOP/s: slowest GPU",
    "GB/s": "GB/s: sum over a node's own GPUs",
    "MB/s": _WRITES,
    "ms": _WRITES,
    "shm": _FREE,
    "memory": _FREE,
    "temp": _FREE,
    "clock": "clock: s ahead of rank 0's",
}
_STATES = {"BAD": "bold red", "fault": "red", "warning": "yellow", "ok": ""}  # and how they look
_MOST_ALIKE = 16  # nodes in the same state, none of them bad, that get a line each; more share one


@dataclass
class NodeRow:
    """A node's figures, None for what is not known."""

    node: str
    state: str  # ok, warning, BAD, or fault: what all nodes have, so that none is bad
    gpus: int | None = None
    tflops: float | None = None  # of its slowest GPU
    node_gb_per_second: float | None = None  # of links, in a sum over its own processes
    write_mb_per_second: float | None = None
    write_milliseconds: float | None = None
    shm_gib: float | None = None
    memory_gib: float | None = None
    temp_disk_gib: float | None = None
    clock_seconds: float | None = None


@dataclass
class HealthTable:
    """The outcome of one check."""

    attempt: str
    unix_seconds: float
    seconds: float
    code: int
    rows: list[NodeRow]
    bad: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    common: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    run_disk_gib: float | None = None
    sum_words: str = ""  # how adding up over all processes went


def make_table(
    nodes: Sequence[str],
    reports: Mapping[str, NodeReport],
    results: Mapping[int, SumResult | None],
    faults: Sequence[Fault],
    verdict: Verdict,
    *,
    attempt: str,
    seconds: float,
) -> HealthTable:
    """A row for each node, sound or not."""
    answers = {rank: result for rank, result in results.items() if result is not None}
    marks = {fault.node: "warning" for fault in faults}
    marks |= {fault.node: "fault" for fault in faults if fault.is_bad} | dict.fromkeys(verdict.bad, "BAD")
    rows = []
    for node in nodes:
        state = marks.get(node, "ok")
        report = reports.get(node)
        own = [answers[rank] for rank in (report.ranks if report else []) if rank in answers]
        rows.append(_row(node, state, report, own))
    sound = [report for report in reports.values() if report.node not in verdict.bad] or list(reports.values())
    return HealthTable(
        attempt,
        time.time(),
        seconds,
        int(verdict.code),
        rows,
        *(verdict.bad, verdict.warnings, verdict.common),
        versions=sound[0].versions if sound else {},
        run_disk_gib=_scaled(sound[0].run_disk_bytes, GIB) if sound else None,
        sum_words=_sum_words(list(answers.values())),
    )


def save_table(run_dir: Path, table: HealthTable) -> None:
    """Write RUN_DIR/slurm/health.json."""
    path = run_dir / FILE_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(asdict(table), indent=1) + "\n")


def load_table(run_dir: Path) -> HealthTable | None:
    """The last check's outcome; None where there is none, or none to be read."""
    try:
        facts = read_json(run_dir / FILE_NAME) or {}
        return HealthTable(**{**facts, "rows": [NodeRow(**row) for row in facts["rows"]]})
    except (TypeError, KeyError):
        return None


def shown(table: HealthTable) -> RenderableType:
    """The table, what is wrong, and what follows."""
    lines = []
    for state in _STATES:
        rows = [row for row in table.rows if row.state == state]
        if state == "BAD" or len(rows) <= _MOST_ALIKE:
            lines += [(Text(row.node), state, [row]) for row in rows]
        else:
            lines.append((Text(f"{len(rows)} nodes"), state, rows))
    cells = [_cells(rows) for _, _, rows in lines]
    columns = [name for name in _COLUMNS if any(row[name] != "-" for row in cells)]
    grid = Table(
        Column("node", overflow="fold"),
        *(Column(name, justify="right", no_wrap=True) for name in columns),
        Column("", no_wrap=True),
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        title=f"Health of {_count(len(table.rows), 'node')}",
        caption="; ".join(dict.fromkeys(_COLUMNS[name] for name in columns)),
    )
    for (node, state, _), row in zip(lines, cells, strict=True):
        grid.add_row(node, *(row[name] for name in columns), Text(state, style=_STATES[state]))
    facts = [f"{name} {value}" for name, value in table.versions.items()]
    disk = [] if table.run_disk_gib is None else [f"run directory: {table.run_disk_gib:.0f} GiB free"]
    words = [", ".join([*facts, *disk]), table.sum_words]
    words += [f"warning: {text}" for text in table.warnings]
    words += [f"BAD {node}: {reason}" for node, reason in table.bad.items()]
    words += [f"BAD: {text}" for text in table.common]
    return Group(grid, *(Text(text) for text in words if text))


def print_table(table: HealthTable, console: Console | None = None) -> None:
    """Print it, as wide as the terminal, or as a log's lines are read."""
    (console or Console(soft_wrap=False)).print(shown(table))


def _row(node: str, state: str, report: NodeReport | None, sums: Sequence[SumResult]) -> NodeRow:
    if report is None:
        return NodeRow(node, state)
    speeds = [device.tflops for device in report.devices if device.tflops is not None]
    links = [result.bytes * _bus(len(report.ranks)) / result.node_seconds for result in sums if result.node_seconds]
    return NodeRow(
        node,
        state,
        gpus=len([device for device in report.devices if device.uuid]),
        tflops=min(speeds, default=None),
        node_gb_per_second=_scaled(min(links, default=None), 1e9),
        write_mb_per_second=_scaled(report.write_bytes_per_second, 1e6),
        write_milliseconds=_scaled(report.write_seconds, 1e-3),
        shm_gib=_scaled(report.shm_bytes, GIB),
        memory_gib=_scaled(report.memory_bytes, GIB),
        temp_disk_gib=_scaled(report.temp_disk_bytes, GIB),
        clock_seconds=report.clock_skew_seconds,
    )


def _sum_words(answers: Sequence[SumResult]) -> str:
    timed = [answer for answer in answers if answer.seconds]
    if not timed or len(answers) == 1:
        return ""
    seconds = max(answer.seconds or 0.0 for answer in timed)
    speed = timed[0].bytes * _bus(len(answers)) / seconds / 1e9
    word = "WRONG" if any(answer.fault or answer.node_fault for answer in answers) else "right"
    took = f"{timed[0].bytes / MIB:.0f} MiB take {1e3 * seconds:.1f} ms, {speed:.3g} GB/s over each link"
    return f"sum over {len(answers)} processes: {word}; {took}"


def _bus(processes: int) -> float:
    """How often each byte of a ring's sum goes over a link."""
    return 2 * (processes - 1) / processes


def _cells(rows: Sequence[NodeRow]) -> dict[str, str]:
    """Of several rows the worst of each."""
    return {
        "GPUs": _worst([row.gpus or None for row in rows], min, "d"),
        "TFLOP/s": _worst([row.tflops for row in rows], min, ".0f"),
        "GB/s": _worst([row.node_gb_per_second for row in rows], min, ".3g"),
        "MB/s": _worst([row.write_mb_per_second for row in rows], min, ".0f"),
        "ms": _worst([row.write_milliseconds for row in rows], max, ".0f"),
        "shm": _worst([row.shm_gib for row in rows], min, ".3g"),
        "memory": _worst([row.memory_gib for row in rows], min, ".0f"),
        "temp": _worst([row.temp_disk_gib for row in rows], min, ".0f"),
        "clock": _worst([row.clock_seconds for row in rows], lambda known: max(known, key=abs), "+.1f"),
    }


def _count(count: int, name: str) -> str:
    return f"{count} {name}" if count == 1 else f"{count} {name}s"


def _worst(values: Sequence[float | None], choose: Callable[[list[float]], float], form: str) -> str:
    known = [value for value in values if value is not None]
    return format(choose(known), form) if known else "-"


def _scaled(value: float | None, unit: float) -> float | None:
    return None if value is None else value / unit
