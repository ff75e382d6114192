"""Where a process of the health check stands: its rank, its node, the names of all nodes, and by when it has to be done."""

import os
import re
import socket
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..train.life import FOLDER_VARIABLE, NODE_VARIABLE

SECONDS_VARIABLE = "MUYBRIDGE_HEALTH_SECONDS"
# With these the last process of one node has left before a minute is over. Half of the seconds must do for the start of Python and
# torch from a file system that all nodes read at the same time, so each further node gets some more, up to a limit: a node that
# hangs keeps the others for as long.
DEFAULT_SECONDS = 55.0
SECONDS_PER_FURTHER_NODE = 1.0
MOST_DEFAULT_SECONDS = 300.0
_LEAST_SECONDS = 5.0


@dataclass(frozen=True)
class Deadlines:
    """When what has to be over, in seconds since this process began; each leaves the next one time to be told.

    The total is 55 s for one node and a second more for each further one, at most 300 s; MUYBRIDGE_HEALTH_SECONDS sets another.
    """

    total: float

    @property
    def smi(self) -> float:
        """nvidia-smi has answered by now, or is left alone."""
        return 0.3 * self.total

    @property
    def devices(self) -> float:
        """Local rank 0 waits this long for the other processes of its node."""
        return 0.4 * self.total

    @property
    def meeting(self) -> float:
        """Who has not met rank 0 by now reports this."""
        return 0.48 * self.total

    @property
    def reports(self) -> float:
        """Who has not reported its node by now is bad."""
        return 0.55 * self.total

    @property
    def waiting(self) -> float:
        """Who still waits for others to add up says so by now, as nobody can tell it from who hangs otherwise."""
        return 0.72 * self.total

    @property
    def sums(self) -> float:
        """Who has not added up with the others by now is bad."""
        return 0.8 * self.total

    @property
    def deputy(self) -> float:
        """Without a word of rank 0 by now, the first node of those that reported judges in its place."""
        return 0.9 * self.total

    @property
    def kill(self) -> float:
        """A process that even a hanging import or file system keeps is ended from outside of Python."""
        return 1.05 * self.total


@dataclass(frozen=True)
class Place:
    """One process of the check among all of them."""

    run_dir: Path
    life_dir: Path
    rank: int
    world: int
    local_rank: int
    local_world: int
    node: str
    nodes: list[str]  # of the whole job, rank 0's first
    master: str
    port: int  # 0: any, for a process that is alone
    attempt: str  # tells the files of this check from those of an earlier one
    deadlines: Deadlines
    began: float  # time.monotonic()

    @property
    def folder(self) -> Path:
        """Where the nodes' findings are."""
        return self.life_dir / "health"

    @property
    def elapsed(self) -> float:
        """Seconds since this process began."""
        return time.monotonic() - self.began

    def left(self, deadline: float) -> float:
        """Seconds until a deadline, at least a moment."""
        return max(0.05, deadline - self.elapsed)


def find_place(run_dir: Path, environment: Mapping[str, str] = os.environ) -> Place:
    """Of the batch script's variables, else of a step that srun started by hand, else of one process alone.

    Raises ValueError for a variable that does not hold what it must.
    """
    began = time.monotonic()
    run_dir = run_dir.absolute()
    nodes = node_names(environment.get("SLURM_STEP_NODELIST", ""))
    # Slurm gives a batch script ranks, too; those of a step come with its node list.
    if "RANK" not in environment and nodes:
        environment = {**environment, **_of_a_step(environment, nodes)}
    world = int(_number(environment, "WORLD_SIZE", 1))
    local_world = int(_number(environment, "LOCAL_WORLD_SIZE", 1))
    node = environment.get(NODE_VARIABLE) or socket.gethostname()
    if world == local_world:
        nodes = [node]
    elif not nodes:
        raise ValueError(
            f"WORLD_SIZE={world} with LOCAL_WORLD_SIZE={local_world} are several nodes, which only Slurm can name: start the check "
            "with srun, or for one node alone without these variables"
        )
    usual = min(DEFAULT_SECONDS + SECONDS_PER_FURTHER_NODE * (len(nodes) - 1), MOST_DEFAULT_SECONDS)
    seconds = _number(environment, SECONDS_VARIABLE, usual)
    if seconds < _LEAST_SECONDS:
        raise ValueError(f"{SECONDS_VARIABLE}={seconds:g} must be at least {_LEAST_SECONDS:g} (seconds)")
    life_dir = environment.get(FOLDER_VARIABLE, "")
    if not life_dir and not run_dir.is_dir():  # by hand; for a job, a folder that one node lacks is that node's fault
        raise ValueError(f"{run_dir} is not a folder: name one on the file system that runs are on")
    port = int(_number(environment, "MASTER_PORT", 0))
    names = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_STEP_ID")
    return Place(
        run_dir=run_dir,
        life_dir=Path(life_dir) if life_dir else run_dir / "slurm" / "by_hand",
        rank=int(_number(environment, "RANK", 0)),
        world=world,
        local_rank=int(_number(environment, "LOCAL_RANK", 0)),
        local_world=local_world,
        node=node,
        nodes=nodes,
        master=environment.get("MASTER_ADDR", "127.0.0.1"),
        port=port if world > 1 else 0,
        attempt=".".join([*(environment.get(name, "0") for name in names), str(port)])
        if world > 1
        else uuid.uuid4().hex,
        deadlines=Deadlines(seconds),
        began=began,
    )


def node_names(node_list: str) -> list[str]:
    """The names in a node list of Slurm: "n[1-2,05],login" is n1, n2, n05 and login. scontrol is not in every container."""
    names = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", node_list):
        expanded = [""]
        for text, ranges in re.findall(r"([^\[]+)|\[([^\]]*)\]", part):
            expanded = [name + piece for name in expanded for piece in ([text] if text else _pieces(ranges))]
        names += expanded
    return names


def _pieces(ranges: str) -> list[str]:
    pieces = []
    for item in ranges.split(","):
        first, _, last = item.partition("-")
        pieces += [f"{number:0{len(first)}d}" for number in range(int(first), int(last or first) + 1)]
    return pieces


def _of_a_step(environment: Mapping[str, str], nodes: list[str]) -> dict[str, str]:
    """The variables of training for a task of `srun python -m muybridge.slurm.health` inside of an allocation."""
    tasks: list[str] = []
    for count, repeated in re.findall(r"(\d+)(?:\(x(\d+)\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", "1")):
        tasks += [count] * int(repeated or 1)
    number = int(_number(environment, "SLURM_NODEID", 0))
    seed = 13 * int(_number(environment, "SLURM_JOB_ID", 0)) + int(_number(environment, "SLURM_STEP_ID", 0))
    return {
        "RANK": environment.get("SLURM_PROCID", "0"),
        "WORLD_SIZE": environment.get("SLURM_NTASKS", "1"),
        "LOCAL_RANK": environment.get("SLURM_LOCALID", "0"),
        "LOCAL_WORLD_SIZE": tasks[min(number, len(tasks) - 1)],
        "MASTER_ADDR": nodes[0],
        "MASTER_PORT": str(15000 + seed % 15000),  # below the ports that the system hands out
    }


def _number(environment: Mapping[str, str], name: str, default: float) -> float:
    text = environment.get(name, "")
    try:
        return float(text) if text else default
    except ValueError as error:
        raise ValueError(f"{name}={text} must be a number") from error
