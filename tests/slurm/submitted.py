"""A run that was submitted, as its files say, and Slurm's programs that answer with what Slurm 22.05 answered."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from muybridge.tests.slurm.cluster import Cluster

SUBMITTED = 1_790_000_000.0


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


class FakeSlurm:
    """Programs squeue, scontrol and scancel in a folder for PATH. squeue chooses from `jobs` as the real one does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        for program in ("squeue", "scontrol", "scancel"):
            self.answer(program, "")
        self.queue()

    def answer(self, program: str, text: str, *, code: int = 0) -> None:
        """Let a program print this, to stderr where it fails, and note down its arguments."""
        (self.folder / f"{program}.txt").write_text(text)
        stream = ">&2" if code else ""
        self._write(program, f'cat "{self.folder}/{program}.txt" {stream}; exit {code}')

    def queue(self, *lines: str) -> None:
        """What squeue has: lines of ID|STATE|REASON|ELAPSED|NODES|NAME."""
        (self.folder / "queue").write_text("".join(f"{line}\n" for line in lines))
        choose = (
            'for argument; do case $argument in --jobs=*) ids=",${argument#*=},";; --name=*) name=${argument#*=};; esac; done\n'
            "while IFS='|' read -r id rest; do\n"
            'case ${ids-} in "" | *",${id%%_*},"*) ;; *) continue ;; esac\n'
            'case "${name-}" in "" | "${rest##*|}") echo "$id|$rest" ;; esac\n'
            f'done <"{self.folder}/queue"'
        )
        self._write("squeue", choose)

    def calls(self, program: str) -> list[list[str]]:
        """The arguments of each call, oldest first."""
        file = self.folder / f"{program}.calls"
        return [line.split() for line in file.read_text().splitlines()] if file.exists() else []

    def _write(self, program: str, body: str) -> None:
        path = self.folder / program
        path.write_text(f'#!/bin/bash\necho "$*" >>"{self.folder}/{program}.calls"\n{body}\n')
        path.chmod(0o755)


def muybridge(cluster: Cluster, verb: str, *arguments: str) -> str:
    """What `muybridge VERB` prints on the head host of a cluster."""
    program = f"import sys; from muybridge.slurm.{verb} import main; sys.exit(main(sys.argv[1:]))"
    return cluster.run([sys.executable, "-c", program, *arguments]).stdout
