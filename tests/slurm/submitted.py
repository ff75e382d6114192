"""A run that was submitted, as its files say and as Slurm 22.05 has it."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from muybridge.tests.slurm.cluster import Cluster
from muybridge.tests.slurm.programs import FakeSlurm

SUBMITTED = 1_790_000_000.0
Submit = Callable[..., str]


def write_job(
    run_dir: Path,
    jobs: Sequence[int],
    *,
    index: int | None = None,
    name: str = "mb-run",
    submit_dir: Path | None = None,
) -> None:
    """What `muybridge submit` writes down."""
    facts = {
        "jobs": list(jobs),
        "array_index": index,
        "name": name,
        "submit_dir": str(submit_dir or run_dir),
        "submitted_unix_seconds": SUBMITTED,
        "nodes": 2,
        "processes": 16,
        "lead_seconds": 300,
    }
    (run_dir / "slurm").mkdir(parents=True, exist_ok=True)
    (run_dir / "slurm" / "job.json").write_text(json.dumps(facts))


def write_life(
    run_dir: Path,
    life: str,
    begin: float,
    end: float | None = None,
    *,
    decision: str = "requeue",
    code: int = 75,
    why: str = "training ended with code 75",
    nodes: str = "n[1-2]",
) -> None:
    """What the batch script writes down at the start and the end of a life."""
    job = int(life.partition(".")[0])
    rows: list[dict[str, object]] = [
        {"event": "start", "life": life, "job": job, "nodes": nodes, "unix_seconds": begin}
    ]
    if end is not None:
        rows.append({"event": "end", "life": life, "code": code, "decision": decision, "why": why, "unix_seconds": end})
    (run_dir / "slurm" / "lives" / life).mkdir(parents=True, exist_ok=True)
    with (run_dir / "slurm" / "lives.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def set_queue(slurm: FakeSlurm, *lines: str) -> None:
    """What squeue has: lines of ID|STATE|REASON|ELAPSED|NODES|NAME, of which it chooses by number or name as the real one does."""
    (slurm.folder / "queue").write_text("".join(f"{line}\n" for line in lines))
    slurm.answer(
        "squeue",
        'for argument; do case $argument in --jobs=*) ids=",${argument#*=},";; --name=*) wanted=${argument#*=};; esac; done\n'
        "while IFS='|' read -r id rest; do\n"
        'case ${ids-} in "" | *",${id%%_*},"*) ;; *) continue ;; esac\n'
        'case "${wanted-}" in "" | "${rest##*|}") echo "$id|$rest" ;; esac\n'
        'done <"$here/queue"\n',
    )


def set_facts(slurm: FakeSlurm, line: str) -> None:
    """What scontrol knows of every job it is asked about."""
    (slurm.folder / "facts").write_text(f"{line}\n")
    slurm.answer("scontrol", 'cat "$here/facts"\n')


def muybridge(cluster: Cluster, verb: str, *arguments: str) -> str:
    """What `muybridge VERB` prints on the head host of a cluster."""
    program = f"import sys; from muybridge.slurm.{verb} import main; sys.exit(main(sys.argv[1:]))"
    return cluster.run([sys.executable, "-c", program, *arguments]).stdout


def files_below(folder: Path) -> dict[str, bytes]:
    """The files of a folder but for the copy of the code."""
    found = (path for path in folder.rglob("*") if path.is_file() and "code" not in path.parts)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}
