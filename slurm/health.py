"""Looks at all nodes of a job before it trains, mostly in less than a minute: which nodes are bad, and why.

    python -m muybridge.slurm.health RUN_DIR

One process for each training process, as the batch script starts it; by hand, with any folder that is to be tried, on one machine
or with srun inside of an allocation. The main thread keeps the deadlines: no check that hangs, and no node that does, keeps the
others. The last process has left 55 s after its start, and with many nodes a second later for each further one, at most after
300 s; MUYBRIDGE_HEALTH_SECONDS sets another time. What a node finds out alone is in the life's folder before it meets the others,
so that one that cannot is named all the same; only nodes that are sound by themselves then add up with each other. Rank 0 judges,
or, if it falls silent, the first node that reported.

Writes LIFE/health/NODE.json for each node, LIFE/bad_nodes (NODE, tab, reason) where there are any, and RUN_DIR/slurm/health.json.
Ends with 0 where all is well or worth no more than a warning, 75 where nodes are bad, 64 where all nodes have the same fault, which
comes from how the job was set up: another node would have it as well.
"""

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NoReturn, TypedDict

from ..redaction import redact_output
from ..train.exit_codes import ExitCode
from ..train.life import Asked, tell_end
from ..train.open_files import allow_open_files
from .health_findings import NodeReport, SumResult, replace_file
from .health_place import (
    DEFAULT_SECONDS,
    MOST_DEFAULT_SECONDS,
    SECONDS_PER_FURTHER_NODE,
    SECONDS_VARIABLE,
    Place,
    find_place,
)
from .health_rules import Fault, Limits, node_faults, silence, sum_faults
from .health_table import FILE_NAME, load_table, make_table, print_table, save_table
from .health_talk import TO_RANK_0, Talk, report_file
from .health_verdict import Verdict, judge

_FURTHER = f"{SECONDS_PER_FURTHER_NODE:.0f} s more for each further node, up to {MOST_DEFAULT_SECONDS:.0f} s"
USAGE = f"""\
usage: python -m muybridge.slurm.health FOLDER
       srun [--ntasks-per-node N] python -m muybridge.slurm.health FOLDER     in an allocation: one task for each GPU

Look whether the nodes of a job can train: GPUs, memory, disks, clocks, versions, products, and sums over all processes. FOLDER is a
run's directory, or any folder on the file system that runs are on. Takes at most
{DEFAULT_SECONDS:.0f} s, and {_FURTHER}; {SECONDS_VARIABLE} sets another limit.
Prints a table and the bad nodes; ends with 0 (sound), 75 (bad nodes) or 64 (what all nodes have: a fault of the set-up)."""


class Plan(TypedDict):
    """What rank 0 tells the others to do once it knows who is sound by itself."""

    ranks: list[int]  # that add up
    reads: dict[str, str]  # whose file each node reads


_LIMITS = Limits()
_LOOK_SECONDS = 0.2
_REFRESH_SECONDS = 2.0
# In which those that a failure of another one reached say so.
_GRACE_SECONDS = 5.0
# Between the verdict and the end of rank 0, whose store goes with it.
_PARTING_SECONDS = 0.5


def main(argv: list[str]) -> int:
    """Run the check; ends the process by the deadline, whatever hangs. Raises ValueError for what cannot be tried."""
    redact_output()
    if len(argv) != 1 or argv[0].startswith("-"):
        print(USAGE)
        return ExitCode.done if argv in (["-h"], ["--help"]) else ExitCode.config
    return check(find_place(Path(argv[0])))


def check(place: Place) -> NoReturn:
    """Run the check and end the process with its outcome."""
    allow_open_files()  # rank 0 has a connection to every process, or two
    # Also where a call into the system holds Python's lock, and then says where.
    faulthandler.dump_traceback_later(place.deadlines.kill, exit=True)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # errors arrive as exceptions, too
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = (
        "0"  # a process that NCCL ends could not tell that another one was the fault
    )
    talk = Talk(place)
    threading.Thread(target=talk.run, name="checks", daemon=True).start()
    code = _lead(place, talk) if place.rank == 0 else _follow(place, talk)
    sys.stdout.flush()
    os._exit(code)  # the other thread may be in a call that never returns


def _lead(place: Place, talk: Talk) -> int:
    """Rank 0's main thread: wait for the nodes, have the sound ones add up, judge."""
    reports, faults = _reports(place, talk)
    faults += node_faults(list(reports.values()), first=place.node, world=place.world, limits=_LIMITS)
    verdict = judge(faults, place.nodes)
    results: dict[int, SumResult | None] = {}
    if talk.store is not None:
        sound = [report for node, report in reports.items() if node not in verdict.bad and not verdict.common]
        plan = _plan(sound)
        talk.store.set("plan", json.dumps(plan))
        results = _results(place, talk, plan["ranks"])
        node_of = {rank: report.node for report in sound for rank in report.ranks}
        faults += sum_faults(results, node_of.__getitem__, seconds=place.elapsed, limits=_LIMITS)
        verdict = judge(faults, place.nodes)
    _tell(place, reports, results, faults, verdict)
    if talk.store is not None:
        talk.store.set("verdict", str(int(verdict.code)))
        time.sleep(_PARTING_SECONDS if place.world > 1 else 0.0)
    return verdict.code


def _follow(place: Place, talk: Talk) -> int:
    """The others' main thread: wait for the verdict; without one, see to it that what is known is told."""
    has_told = False
    while talk.code is None and place.elapsed < place.deadlines.deputy:
        if talk.is_adding_up and not has_told and place.elapsed > place.deadlines.waiting:
            has_told = True
            talk.tell_that_it_waits()
        # Rank 0 has left and taken its store along; or a call hangs here, and the verdict cannot be heard.
        if (talk.is_over or place.elapsed > place.deadlines.sums) and (code := _written_code(place)) is not None:
            return code
        time.sleep(_LOOK_SECONDS)
    if talk.code is not None:
        return talk.code
    reports = {node: report for node in place.nodes if (report := _read_report(place, node)) is not None}
    if place.local_rank == 0 and next((node for node in reports if node != place.nodes[0]), "") == place.node:
        _judge_in_place_of_rank_0(place, reports)
    time.sleep(place.left(place.deadlines.total))  # whoever leaves with an error first may end the others
    return ExitCode.requeue


def _written_code(place: Place) -> int | None:
    """Of rank 0's verdict on this check, once that is written."""
    _refresh(place)
    table = load_table(place.run_dir)
    return table.code if table is not None and table.attempt == place.attempt else None


def _judge_in_place_of_rank_0(place: Place, reports: dict[str, NodeReport]) -> None:
    first, seconds = place.nodes[0], place.elapsed
    faults = [Fault(first, "silence", f"no word of rank 0 within {seconds:.0f} s")]
    if first in reports and not reports[first].is_complete:
        faults = [silence(first, reports[first], seconds=seconds)]
    for node in place.nodes[1:]:
        if node not in reports or not reports[node].is_complete:
            faults.append(silence(node, reports.get(node), seconds=seconds))
    found = node_faults(list(reports.values()), first=place.node, world=place.world, limits=_LIMITS)
    faults += [fault for fault in found if fault.check != "master"]  # as it is rank 0 that they did not reach
    nodes = [place.node, *(node for node in place.nodes if node != place.node)]
    _tell(place, reports, {}, faults, judge(faults, nodes))


def _reports(place: Place, talk: Talk) -> tuple[dict[str, NodeReport], list[Fault]]:
    """What the nodes say, in their order, and what is wrong with those that do not, or not where rank 0 can see it."""
    told: dict[str, NodeReport] = {}
    seen: dict[str, NodeReport] = {}
    refreshed = 0.0
    while place.elapsed < place.deadlines.reports:
        if time.monotonic() > refreshed + _REFRESH_SECONDS:
            _refresh(place)
            refreshed = time.monotonic()
        for node in place.nodes:
            if (node not in seen or not seen[node].is_complete) and (report := _read_report(place, node)):
                seen[node] = report
            if node not in told and (report := _told_report(talk, node)):
                told[node] = report
        if all(node in seen and (node in told or _has_finished(seen[node], talk)) for node in place.nodes):
            break
        time.sleep(_LOOK_SECONDS)
    reports = {node: told.get(node) or seen[node] for node in place.nodes if node in told or node in seen}
    faults = []
    for node in place.nodes:
        if node not in reports or not _has_finished(reports[node], talk):
            faults.append(silence(node, reports.get(node), seconds=place.elapsed))
        elif node not in seen and not reports[node].folder_fault:
            text = f"what it writes in {place.folder} is not seen on {place.node}: the run directory must be on a file system that "
            faults.append(Fault(node, "shared folder", text + "all nodes share"))
    return reports, faults


def _has_finished(report: NodeReport, talk: Talk) -> bool:
    """Whether there is nothing more to come from a node: without a store nobody finds the way to it."""
    return report.is_complete or (talk.is_over and talk.store is None and report.doing == TO_RANK_0)


def _plan(sound: list[NodeReport]) -> Plan:
    """Who adds up, and whose file each node reads."""
    names = [report.node for report in sound]
    return {
        "ranks": [rank for report in sound for rank in report.ranks],
        "reads": dict(zip(names, names[1:] + names[:1], strict=True)),
    }


def _results(place: Place, talk: Talk, ranks: list[int]) -> dict[int, SumResult | None]:
    """What the ranks say of adding up, None for those that do not."""
    results: dict[int, SumResult | None] = dict.fromkeys(ranks)
    until = place.deadlines.sums
    store = talk.store
    has_told = False
    with suppress(RuntimeError):  # of the store, which is in this process
        while store is not None and None in results.values() and place.elapsed < until:
            for rank in [rank for rank, result in results.items() if result is None]:
                if store.check([f"sum/{rank}"]):
                    results[rank] = result = SumResult(**json.loads(store.get(f"sum/{rank}")))
                    if result.error:
                        until = min(until, place.elapsed + _GRACE_SECONDS)
            if talk.is_adding_up and not has_told and place.elapsed > place.deadlines.waiting:
                has_told = True
                talk.tell_that_it_waits()
            time.sleep(_LOOK_SECONDS / 4)
    return results


def _tell(
    place: Place,
    reports: Mapping[str, NodeReport],
    results: Mapping[int, SumResult | None],
    faults: list[Fault],
    verdict: Verdict,
) -> None:
    """Write down the verdict and print it. A folder that cannot be written in changes nothing about the verdict."""
    seconds = place.elapsed
    table = make_table(place.nodes, reports, results, faults, verdict, attempt=place.attempt, seconds=seconds)
    print_table(table)
    try:
        lines = [f"{node}\t{reason}\n" for node, reason in verdict.bad.items()]
        if lines:
            replace_file(place.life_dir / "bad_nodes", "".join(lines))
        else:
            (place.life_dir / "bad_nodes").unlink(missing_ok=True)
        save_table(place.run_dir, table)
        words = f"see {place.run_dir / FILE_NAME}"
    except OSError as error:
        words = f"cannot be written down: {error}"
    for path in [*place.folder.glob("*.data"), *place.folder.glob("*.rank-*")]:
        with suppress(OSError):
            path.unlink()
    if verdict.common:  # which the batch script could not tell from anything else
        tell_end(verdict.code, Asked.nobody, f"the health check: {verdict.common[0]}")
    print(f"muybridge: the check took {seconds:.0f} s: {_outcome_words(place, verdict)}; {words}", flush=True)


def _outcome_words(place: Place, verdict: Verdict) -> str:
    count = f"{len(verdict.bad)} of {len(place.nodes)} nodes {'is' if len(verdict.bad) == 1 else 'are'} bad"
    match verdict.code:
        case ExitCode.done:
            return "training can begin"
        case ExitCode.config:
            return "mend what all nodes have, and submit again"
    return f"{count}, and training must do without" if verdict.bad else "training cannot begin, and no node is to blame"


def _read_report(place: Place, node: str) -> NodeReport | None:
    """What a node wrote in this check."""
    try:
        report = NodeReport.parsed(report_file(place.folder, node).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return report if report is not None and report.attempt == place.attempt else None


def _told_report(talk: Talk, node: str) -> NodeReport | None:
    """What a node gave to the store."""
    with suppress(RuntimeError):
        if talk.store is not None and talk.store.check([f"node/{node}"]):
            return NodeReport.parsed(talk.store.get(f"node/{node}").decode())
    return None


def _refresh(place: Place) -> None:
    """Make a network file system look for new files: it does where this machine has changed the folder itself."""
    path = place.folder / f"{place.node}.look"
    with suppress(OSError):
        path.touch()
        path.unlink()


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ValueError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"muybridge: {error}", file=sys.stderr)
        sys.exit(ExitCode.config)
