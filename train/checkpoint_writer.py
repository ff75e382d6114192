"""The process that brings a rank's snapshot to the disk while training goes on, and the handle that drives it.

`python -m muybridge.train.checkpoint_writer FILE` gets the open file of the snapshot's memory. It reads requests from stdin and
answers on stdout, a line of JSON each. It imports no torch, and ends when its stdin closes.
"""

import contextlib
import json
import mmap
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..data.child_process import start_undisturbed
from .shard_file import blocks_of, write_part

# All that it needs of the environment, which may hold keys and passwords.
ENVIRONMENT = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "LANG", "LC_ALL")
_CLOSE_SECONDS = 10.0


def main() -> None:
    """Answer requests until stdin ends."""
    image, image_file = memoryview(b""), int(sys.argv[1])
    for line in sys.stdin.buffer:
        request = json.loads(line)
        if len(image) != request["image_bytes"]:
            image = memoryview(mmap.mmap(image_file, request["image_bytes"], prot=mmap.PROT_READ))
        print(json.dumps(answer_to(image, request)), flush=True)


def answer_to(image: memoryview, request: dict[str, Any]) -> dict[str, Any]:
    """Write the bytes of a safetensors file as a rank's part; its files' digests, or what was wrong."""
    header_bytes = request["header_bytes"]
    try:
        blocks = _while_wanted(blocks_of(image[header_bytes:]))
        return {"files": write_part(Path(request["shard"]), bytes(image[:header_bytes]), blocks, request["texts"])}
    except OSError as error:
        return {"failure": str(error)}


def _while_wanted(blocks: Iterator[memoryview]) -> Iterator[memoryview]:
    # Should the training process be gone, nobody would ever commit what is written.
    parent = select.poll()
    parent.register(0, select.POLLHUP)
    for block in blocks:
        if parent.poll(0):
            sys.exit(0)
        yield block


class WriterProcess:
    """One writer process and its one request; a process that died is replaced at the next request."""

    def __init__(self, image: int) -> None:
        """Starts it; `image` is the open file of the memory that it writes from."""
        self._image = image
        self._answer: dict[str, Any] | None = None
        self._process = self._started()

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    def submit(self, **request: Any) -> None:
        """Have `answer_to` run on this request and the `image_bytes` of the memory; the one before was answered."""
        self._answer = None
        if self._process.poll() is not None:
            self._close_pipes()
            self._process = self._started()
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._answer = self._death()

    def is_done(self) -> bool:
        """Whether there is an answer; does not wait."""
        if self._answer is not None:
            return True
        poll = select.poll()
        poll.register(self._stdout(), select.POLLIN)
        return bool(poll.poll(0))

    def answer(self) -> dict[str, Any]:
        """The answer to the request, {"failure": why} also where the process died; waits for it."""
        if self._answer is None:
            line = self._stdout().readline()
            self._answer = json.loads(line) if line.endswith(b"\n") else self._death()
        return self._answer

    def close(self) -> None:
        """End the process, even in the middle of a file."""
        self._close_pipes()
        try:
            self._process.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _started(self) -> "subprocess.Popen[bytes]":
        return start_undisturbed(
            [sys.executable, "-m", f"{__package__}.checkpoint_writer", str(self._image)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=(self._image,),
            env={name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        )

    def _stdout(self) -> Any:
        assert self._process.stdout is not None
        return self._process.stdout

    def _death(self) -> dict[str, Any]:
        self._process.kill()  # where it closed its stdout and lives
        code = self._process.wait()
        ended = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return {"failure": f"the process that writes checkpoints ended ({ended})"}

    def _close_pipes(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):  # at what was still to be flushed
                pipe.close()


if __name__ == "__main__":
    main()
