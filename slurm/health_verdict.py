"""What becomes of a job whose nodes have faults: which nodes are bad, and what is no node's fault."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ..train.exit_codes import ExitCode
from .health_place import SECONDS_VARIABLE
from .health_rules import DATA, Fault


@dataclass
class Verdict:
    """What is to be done about all faults."""

    bad: dict[str, str] = field(default_factory=dict)  # node -> reasons
    warnings: list[str] = field(default_factory=list)
    common: list[str] = field(default_factory=list)  # faults that no node can be blamed for
    code: ExitCode = ExitCode.done


_MOST_WARNINGS = 8  # of one kind
# A part that breaks: however many nodes have it, each has its own. What else most nodes have has one cause, and is none of theirs.
_EACH_NODES_OWN = {"ECC", "speed"}
# Where all nodes have these, they come from how the job was set up, and the same job would meet them again. A full disk that all
# share is not among them: somebody may make room.
_SET_UP = {"GPUs", "task binding", "master's name", "shm", "memory", "temp disk", "open files", "shared folder"}
# What rank 0's node sees of the others: where it is wrong with all of them, either side may be.
_SEEN_FROM_RANK_0 = {"shared folder", "master"}
# What to do about faults that are common.
_REMEDIES = {
    "task binding": "each task must see all GPUs of its node: ask Slurm by --gpus-per-node or --gres, and leave out what binds "
    "GPUs to tasks (--gpus-per-task, --ntasks-per-gpu, --gpu-bind, SLURM_GPU_BIND)",
    "silence": f"where they only need longer to start, {SECONDS_VARIABLE} sets the seconds that the check may take",
}


def judge(faults: Iterable[Fault], nodes: Sequence[str]) -> Verdict:
    """Which of the nodes, rank 0's first, are bad. What most of them have from a common cause is no node's fault."""
    faults = list(faults)
    if any(fault.check == "port" for fault in faults):  # which nobody reaches then
        faults = [fault for fault in faults if fault.check != "master"]
    verdict = Verdict(warnings=_warnings([fault for fault in faults if not fault.is_bad]))
    is_set_up = False
    for check in dict.fromkeys(fault.check for fault in faults if fault.is_bad):
        found = [fault for fault in faults if fault.is_bad and fault.check == check]
        blamed = {fault.node for fault in found}
        who = _common_to(blamed, check, nodes)
        if who == "all other nodes" and check == "master":
            found, who = [Fault(nodes[0], check, f"no other node reaches it: {found[0].text}")], None
        if who is None:
            for fault in found:
                verdict.bad[fault.node] = "; ".join(filter(None, (verdict.bad.get(fault.node), fault.text)))
        else:
            may_be_set_up = check in _SET_UP or check.startswith(DATA)
            is_set_up = is_set_up or (may_be_set_up and (who.startswith("all ") or check == "task binding"))
            text = "; ".join(filter(None, (found[0].text, _REMEDIES.get(check))))
            verdict.common.append(": ".join(filter(None, (who, text))))
    if is_set_up:
        verdict.code = ExitCode.config
    elif verdict.bad or verdict.common:
        verdict.code = ExitCode.requeue
    return verdict


def _warnings(faults: Sequence[Fault]) -> list[str]:
    """One line each; what many nodes have gets one line with the first of them and some names."""
    lines = []
    for check in dict.fromkeys(fault.check for fault in faults):
        found = [fault for fault in faults if fault.check == check]
        others = list(dict.fromkeys(fault.node for fault in found))[1:]
        if len(others) < _MOST_WARNINGS:
            lines += [f"{fault.node}: {fault.text}" for fault in found]
        else:
            names = ", ".join(others[:_MOST_WARNINGS])
            more = f" and {len(others) - _MOST_WARNINGS} more" if len(others) > _MOST_WARNINGS else ""
            lines.append(f"{found[0].node}: {found[0].text}; in the same way {names}{more}")
    return lines


def _common_to(blamed: set[str], check: str, nodes: Sequence[str]) -> str | None:
    """Whose fault it is if not single nodes'; None if it is theirs."""
    if "" in blamed:
        return ""
    if check == "port":  # another program's; the next life has another one
        return nodes[0]
    if check in _EACH_NODES_OWN or (len(nodes) == 1 and check != "task binding"):
        return None
    if len(blamed) == len(nodes):
        return "all nodes"
    if check in _SEEN_FROM_RANK_0 and nodes[0] not in blamed and 1 < len(blamed) == len(nodes) - 1:
        return "all other nodes"
    return f"{len(blamed)} of {len(nodes)} nodes" if len(blamed) > len(nodes) / 2 else None
