"""The tests' side of the fork server: starts it, hands it cases, and gives back how each process of a case ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from muybridge.tests.patience import PATIENCE
from muybridge.tests.ports import unused_port

Fault = dict[str, Any]

# All that takes long to import in a run, also what DeepSpeed and torch import late; none starts a thread that a fork would lose.
PRELOADED = [
    *(
        "torch",
        "torch._dynamo",
        "torch._inductor.compile_fx",
        "deepspeed",
        "deepspeed.runtime.zero.muon.muon_optimizer",
    ),
    *("muybridge.train.__main__", "muybridge.train.memory", "muybridge.train.run"),
]


@dataclass(frozen=True)
class RankEnd:
    """How one process ended."""

    code: int | None
    seconds: float
    stdout: str
    stderr: str
    # Seconds between the first fault that struck anywhere in the case and this process's end; None where none did.
    seconds_after_fault: float | None

    @property
    def output(self) -> str:
        return self.stdout + self.stderr


@dataclass(frozen=True)
class Outcome:
    """How a case ended, over all its processes in the order they were asked for."""

    ranks: list[RankEnd]
    faults: list[dict[str, Any]]  # that struck
    left_behind: list[str]  # command lines of processes that outlived their ranks
    is_late: bool

    @property
    def codes(self) -> list[int | None]:
        return [rank.code for rank in self.ranks]

    @property
    def output(self) -> str:
        return "\n".join(f"--- process {number}\n{rank.output}" for number, rank in enumerate(self.ranks))


@dataclass
class Attempt:
    """A start of a run, or of another program: its settings, processes, and what goes wrong on which rank."""

    arguments: list[str]
    world: int = 2  # 0 for a process that no launcher started
    faults: dict[int, list[Fault]] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    # Ranks that are never started, as on a machine that did not come up.
    missing: list[int] = field(default_factory=list)
    program: str = "muybridge.train"  # a module that can be run, or a file


class ForkServer:
    """The process of `zygote.py`, started at the first case and again after an interruption."""

    def __init__(self, environment: dict[str, str], folder: Path, *, preloaded: list[str] = PRELOADED) -> None:
        self._environment, self._folder, self._preloaded = environment, folder, preloaded
        self._process: subprocess.Popen[str] | None = None
        self._cases = 0

    @property
    def pid(self) -> int:
        return self._start().pid

    def run(
        self, *attempts: Attempt, deadline_seconds: float = 80.0 * PATIENCE, linger_seconds: float = 10.0 * PATIENCE
    ) -> Outcome:
        """Run attempts side by side until all their processes ended, or were killed at the deadline."""
        process = self._start()
        self._cases += 1
        folder = self._folder / f"case-{self._cases:04d}"
        folder.mkdir()
        plans = [plan for number, attempt in enumerate(attempts) for plan in self._plans(attempt, folder, number)]
        assert process.stdin is not None
        assert process.stdout is not None
        request = {"processes": plans, "deadline_seconds": deadline_seconds, "linger_seconds": linger_seconds}
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BaseException:  # a timeout or Ctrl-C: the case's processes must not go on
            self.close()
            raise
        assert line, "the fork server died"
        answer = json.loads(line)
        events = folder / "events.jsonl"
        faults = [json.loads(text) for text in events.read_text().splitlines()] if events.exists() else []
        struck = min((fault["time"] for fault in faults), default=None)
        ranks = [
            RankEnd(
                code=end["code"],
                seconds=end["ended"] - end["began"],
                stdout=Path(plan["stdout"]).read_text(errors="replace"),
                stderr=Path(plan["stderr"]).read_text(errors="replace"),
                seconds_after_fault=None if struck is None else end["ended"] - struck,
            )
            for end, plan in zip(answer["ranks"], plans, strict=True)
        ]
        return Outcome(ranks, faults, answer["left_behind"], answer["is_late"])

    def command(
        self, program: str, *arguments: str, processes: int = 0, environment: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a module or a file to its end, by itself or as a launcher of N processes does, of which none ends the others.

        The exit code is the first that is not 0; the output is that of one process after the other.
        """
        attempt = Attempt(list(arguments), processes, environment=environment or {}, program=program)
        outcome = self.run(attempt, deadline_seconds=250.0 * PATIENCE)
        assert not outcome.is_late, outcome.output
        code = next((code for code in outcome.codes if code), 0)
        stdout, stderr = ("".join(texts) for texts in zip(*((rank.stdout, rank.stderr) for rank in outcome.ranks)))
        return subprocess.CompletedProcess([program, *arguments], code, stdout, stderr)

    def close(self) -> None:
        """End the server and all that it forked."""
        if self._process is None:
            return
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self._process.wait()
        self._process = None

    def _start(self) -> subprocess.Popen[str]:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "muybridge.tests.faults.zygote", *self._preloaded],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=self._environment,
            )
            assert self._process.stdout is not None
            assert "ready" in self._process.stdout.readline(), "the fork server did not start"
        return self._process

    def _plans(self, attempt: Attempt, folder: Path, number: int) -> list[dict[str, Any]]:
        port = unused_port()
        plans: list[dict[str, Any]] = []
        for rank in range(attempt.world or 1):
            if rank in attempt.missing:
                continue
            place = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(attempt.world),
                "LOCAL_WORLD_SIZE": str(attempt.world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            plans.append(
                {
                    "program": attempt.program,
                    "arguments": attempt.arguments,
                    "environment": {**self._environment, **(place if attempt.world else {}), **attempt.environment},
                    "folder": str(folder),
                    "stdout": str(folder / f"attempt-{number}-rank-{rank}.out"),
                    "stderr": str(folder / f"attempt-{number}-rank-{rank}.err"),
                    "events": str(folder / "events.jsonl"),
                    "faults": attempt.faults.get(rank, []),
                }
            )
        return plans


def is_running(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return os.readlink(f"/proc/{pid}/exe") != ""
    except OSError:
        return False
