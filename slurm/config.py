"""The settings of `muybridge submit`: what a job asks Slurm for, and the rules that keep a mistake out of the queue.

No value that passes these rules holds a blank, a quote or anything else that Slurm or a shell would read as more than a word.
"""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

SITE_VARIABLE = "MUYBRIDGE_SLURM_SITE"
_DEFAULT_SITE = "~/.config/muybridge/slurm.yaml"

# Slurm warns a job up to a minute early, as it looks at the clocks twice a minute.
_SLURM_SECONDS = 60
_START_SECONDS = 120  # of processes, weights and data
_WORK_SECONDS = 120
_SHORT_LEAD_SECONDS = 120
_MOST_LEAD_SECONDS = 65535  # of sbatch --signal

_LIST = r"[\w.+@:-]+(,[\w.+@:-]+)*"
_WORDS = {
    "partition": (_LIST, "names of partitions, separated by commas"),
    "account": (_LIST, "the name of an account"),
    "qos": (_LIST, "the name of a quality of service"),
    "reservation": (_LIST, "the name of a reservation"),
    "constraint": (r"[\w.+@:,&|*!()\[\]-]+", "features such as a100&ib"),
    "exclude": (r"[\w.,\[\]-]+", "nodes such as n7,n[10-12]"),
    "memory": (r"\d+[KMGT]?", "memory of a node such as 200G, or 0 for all of it"),
    "after": (r"\d+", "the number of a job"),
    "name": (r"\w[\w.-]{0,63}", "1 to 64 letters, digits, and . _ -"),
}
_TIME = re.compile(
    r"((?P<days>\d+)-(?P<day_hours>\d+)(:(?P<day_minutes>\d+)(:(?P<day_seconds>\d+))?)?"
    r"|((?P<hours>\d+):(?=\d+:))?(?P<minutes>\d+)(:(?P<seconds>\d+))?)",
    re.ASCII,
)
_OPTION = re.compile(r"--[a-z][a-z-]*(=[\w.,:;@/+*&|!()\[\]=%-]+)?", re.ASCII)
# Options of sbatch that follow from the settings, or that the batch script relies on.
_OWN_OPTIONS = {
    "--nodes": "slurm.nodes",
    "--gpus": "slurm.gpus_per_node",
    "--gpus-per-node": "slurm.gpus_per_node",
    "--gpus-per-task": "slurm.gpus_per_node",
    "--ntasks": "slurm.processes_per_node",
    "--ntasks-per-node": "slurm.processes_per_node",
    "--cpus-per-task": "slurm.cpus_per_process",
    "--mem": "slurm.memory",
    "--time": "slurm.time",
    "--partition": "slurm.partition",
    "--account": "slurm.account",
    "--qos": "slurm.qos",
    "--constraint": "slurm.constraint",
    "--reservation": "slurm.reservation",
    "--exclude": "slurm.exclude",
    "--exclusive": "slurm.exclusive",
    "--job-name": "slurm.name",
    "--signal": "slurm.lead_seconds",
    "--requeue": "slurm.requeue",
    "--no-requeue": "slurm.requeue",
    "--array": "--multirun and slurm.parallel",
    "--dependency": "slurm.after and slurm.chain",
    **dict.fromkeys(["--output", "--error", "--input", "--open-mode", "--chdir", "--export", "--export-file"], ""),
    **dict.fromkeys(["--parsable", "--test-only", "--wait", "--wrap", "--quiet", "--verbose", "--help", "--usage"], ""),
    **dict.fromkeys(["--version", "--ignore-pbs", "--get-user-env", "--uid", "--gid", "--clusters"], ""),
}
# Options that bring CPUs along, too.
_CPU_OPTIONS = ("--cpus-per-gpu", "--mincpus", "--cores-per-socket", "--threads-per-core")
# Options by which a task sees only some of its node's GPUs.
_BINDINGS = ("--gpu-bind", "--gpus-per-socket", "--ntasks-per-gpu", "--tres-bind", "--tres-per-task")


@dataclass
class SlurmConfig:
    """What is asked of Slurm, and how the job goes on after an interruption. Null leaves a thing to the site's defaults."""

    # Nodes of one run.
    nodes: int = 1
    # GPUs of each node; 0 for nodes without.
    gpus_per_node: int = 8
    # Training processes on each node; null is one a GPU, or one where there is none.
    processes_per_node: int | None = None
    # CPUs of each process, for its loader's workers, too.
    cpus_per_process: int | None = None
    # Memory of each node, such as 200G; 0 is all of it.
    memory: str | None = None
    # Time limit of one life of the job: minutes, H:M:S or D-H:M:S. A run may take many lives.
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    # Features that nodes must have.
    constraint: str | None = None
    reservation: str | None = None
    # Nodes not to run on.
    exclude: str | None = None
    # Whether other jobs stay off the nodes.
    exclusive: bool = False
    # How the job is called, before six digits that are of the run directory; null takes the directory's name.
    name: str | None = None
    # How long before the time limit or a preemption the run is asked to save and stop.
    lead_seconds: int = 300
    # Whether Slurm may start the job again, after a preemption or when a node fails.
    requeue: bool = True
    # Jobs queued for the run, one after the other: for sites where jobs cannot be requeued. Those that find it done end at once.
    chain: int = 1
    # A job that must have ended well first.
    after: str | None = None
    # Runs of a sweep that go at the same time; 0 is all of them.
    parallel: int = 0
    # Further options of sbatch, such as --gres=nvme:1, one string each.
    options: list[str] = field(default_factory=list)
    # A site's own edited copy of muybridge/slurm/train.sbatch; null takes that.
    template: str | None = None
    # The Python on the nodes; null is the one that submits.
    python: str | None = None
    # Whether the job runs a copy of the package as it is now, or what Python finds when it starts.
    snapshot_code: bool = True
    # Whether each life looks at its nodes before it trains on them.
    health: bool = True
    # Folder on each node's own disk that the data is copied to first, such as /scratch or $TMPDIR/data (variables are those of the
    # node); null reads it where it lies.
    stage_to: str | None = None

    @property
    def tasks_per_node(self) -> int:
        """Training processes on each node."""
        return (self.gpus_per_node or 1) if self.processes_per_node is None else self.processes_per_node

    @property
    def processes(self) -> int:
        """Training processes of one run."""
        return self.nodes * self.tasks_per_node

    def faults(self, field: str) -> list[str]:
        """All breaches of the rules, as complete messages."""
        found = []
        least = {
            "nodes": 1,
            "gpus_per_node": 0,
            "processes_per_node": 1,
            "cpus_per_process": 1,
            "chain": 1,
            "parallel": 0,
        }
        for name, smallest in least.items():
            if (number := getattr(self, name)) is not None and number < smallest:
                found.append(f"{field}.{name}={number} must be at least {smallest}")
        if 0 < self.gpus_per_node < (self.processes_per_node or 0):
            found.append(
                f"{field}.processes_per_node={self.processes_per_node} must be at most {field}.gpus_per_node={self.gpus_per_node}: "
                "a process has a GPU of its own"
            )
        for name, (pattern, rule) in _WORDS.items():
            if (text := getattr(self, name)) is not None and not re.fullmatch(pattern, text, re.ASCII):
                found.append(f"{field}.{name}={text!r} must be {rule}")
        for name, starts in (("python", ("/",)), ("stage_to", ("/", "$"))):
            if (text := getattr(self, name)) is not None and not (text.startswith(starts) and text.isprintable()):
                variable = " or begin with a variable of the node's" if "$" in starts else ""
                found.append(f"{field}.{name}={text!r} must be an absolute path{variable}, without control characters")
        if self.template is not None and not Path(self.template).is_file():
            found.append(f"{field}.template={self.template!r} must be a file, a copy of muybridge/slurm/train.sbatch")
        return found + self._time_faults(field) + self._option_faults(field)

    def warnings(self) -> list[str]:
        """What is allowed and may yet be a mistake."""
        found = []
        if self.lead_seconds < _SHORT_LEAD_SECONDS:
            found.append(
                f"slurm.lead_seconds={self.lead_seconds} is short: a step, a checkpoint and the end of all processes must fit "
                "into it, or the work since the last checkpoint is lost"
            )
        if self.python is not None and not Path(self.python).exists():
            found.append(f"slurm.python={self.python} is not on this machine: make sure that it is on the nodes")
        names = {option.partition("=")[0] for option in self.options}
        if self.cpus_per_process is None and not self.exclusive and names.isdisjoint(_CPU_OPTIONS):
            found.append(
                "neither slurm.cpus_per_process nor slurm.exclusive is set: unless your site gives more with a GPU, Slurm gives "
                "each process one CPU, which the workers of its loader must share"
            )
        return found

    def _time_faults(self, field: str) -> list[str]:
        found = []
        if not 1 <= self.lead_seconds <= _MOST_LEAD_SECONDS:
            found.append(f"{field}.lead_seconds={self.lead_seconds} must be in 1..{_MOST_LEAD_SECONDS}")
        if self.time is None:
            return found
        seconds = limit_seconds(self.time)
        least = self.lead_seconds + _SLURM_SECONDS + _START_SECONDS + _WORK_SECONDS
        if seconds is None:
            found.append(f"{field}.time={self.time!r} must be minutes, H:M:S or D-H:M:S, such as 90 or 1-12:00:00")
        elif seconds < least:
            found.append(
                f"{field}.time={self.time} must be at least {least} s: {field}.lead_seconds={self.lead_seconds}, "
                f"{_SLURM_SECONDS} s that Slurm may be early, and {_START_SECONDS + _WORK_SECONDS} s to start and get anything done"
            )
        return found

    def _option_faults(self, field: str) -> list[str]:
        found = []
        for option in self.options:
            name = option.partition("=")[0]
            # sbatch takes the beginning of an option for the whole of it.
            all_own = (*_OWN_OPTIONS, *_BINDINGS)
            own = name if name in all_own else next((own for own in all_own if own.startswith(name)), None)
            if not _OPTION.fullmatch(option):
                found.append(
                    f"{field}.options={option!r} must be --NAME or --NAME=VALUE of sbatch, without blanks, quotes, $ < > # \\"
                )
            elif own in _BINDINGS:
                found.append(
                    f"{field}.options={option!r} must not be {own}: every process must see all GPUs that the job has on its node, "
                    "as it takes the one of its own number among the node's processes"
                )
            elif own is not None:
                cure = f"set {_OWN_OPTIONS[own]} instead" if _OWN_OPTIONS[own] else "the job depends on it"
                found.append(f"{field}.options={option!r} must not be {own}: {cure}")
        return found


def limit_seconds(text: str) -> int | None:
    """A time limit as Slurm reads it, in seconds; None for what is none, or for no limit at all."""
    match = _TIME.fullmatch(text)
    if match is None:
        return None
    part = {name: int(value or 0) for name, value in match.groupdict().items()}
    hours = 24 * part["days"] + part["day_hours"] + part["hours"]
    return 3600 * hours + 60 * (part["day_minutes"] + part["minutes"]) + part["day_seconds"] + part["seconds"]


def site_file() -> Path | None:
    """The YAML file with this site's settings; None where there is none. Raises ValueError where the variable names none."""
    if named := os.environ.get(SITE_VARIABLE):
        path = Path(named).expanduser()
        if not path.is_file():
            raise ValueError(f"{SITE_VARIABLE}={named} must be a YAML file with the settings of slurm.*")
        return path
    path = Path(_DEFAULT_SITE).expanduser()
    return path if path.is_file() else None
