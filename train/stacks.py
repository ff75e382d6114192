"""What the threads of this process are doing: as a file for people, and in a few words."""

import faulthandler
import json
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist

# Code in which a rank waits for the others.
_COLLECTIVES = ("/torch/distributed/", "/deepspeed/comm/")
_SHOWN_COLLECTIVES = 20
_OWN = str(Path(__file__).parents[1]) + "/"


@dataclass(frozen=True)
class Doing:
    """What a process does."""

    where: str  # the main thread's place in our code, and in what that called
    in_collective: bool  # whether one of its threads is in code that waits for other ranks
    collectives: int  # that it has begun, whether they have ended or not
    last_collective: str


def what_it_does() -> Doing:
    """Of this process, but for the thread that asks."""
    frames = {ident: frame for ident, frame in sys._current_frames().items() if ident != threading.get_ident()}
    main = frames.get(threading.main_thread().ident or 0)
    in_collective = any(_is_in_collective(frame) for frame in frames.values())
    last = _recorded()[-1:]
    return Doing(
        where=_place(main) if main is not None else "nowhere",
        in_collective=in_collective,
        collectives=_begun(),
        last_collective=_words(last[0]) if last else "",
    )


def write_stacks(path: Path, heading: str) -> None:
    """The Python stacks of all threads, below a heading. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = "\n".join(
        f"thread 0x{thread.ident:016x} is {thread.name}" for thread in threading.enumerate() if thread.ident
    )
    with open(path, "a", encoding="utf-8") as file:
        file.write(f"{heading}\n{names}\n\n")
        file.flush()
        faulthandler.dump_traceback(file)
        entries = _recorded()[-_SHOWN_COLLECTIVES:]
        lines = [f"{entry.get('collective_seq_id')} {_words(entry)} {entry.get('state')}\n" for entry in entries]
        file.write(f"\nlast collectives, by number:\n{''.join(lines)}\n")


def _begun() -> int:
    # Of all groups together. No public call tells it; where a version of torch has none either, ranks are told apart by less.
    with suppress(AttributeError, RuntimeError):
        groups = dist.distributed_c10d._world.pg_map
        return sum(group._get_sequence_number_for_group() for group in groups)  # type: ignore[attr-defined]
    return 0


def _recorded() -> list[dict[str, Any]]:
    """What torch's flight recorder has of collectives, oldest first; nothing where it is off or not in this version."""
    with suppress(ImportError, RuntimeError, ValueError):
        from torch._C._distributed_c10d import _dump_fr_trace_json  # type: ignore[attr-defined]

        return json.loads(_dump_fr_trace_json()).get("entries", [])
    return []


def _words(entry: dict[str, Any]) -> str:
    return f"{entry.get('profiling_name')} of {entry.get('input_sizes')} in group {entry.get('process_group')}"


def _is_in_collective(frame: FrameType | None) -> bool:
    while frame is not None:
        if any(part in frame.f_code.co_filename for part in _COLLECTIVES):
            return True
        frame = frame.f_back
    return False


def _place(frame: FrameType) -> str:
    innermost, own = _name(frame), ""
    found: FrameType | None = frame
    while found is not None and not own:
        if found.f_code.co_filename.startswith(_OWN) and "/site-packages/" not in found.f_code.co_filename:
            own = _name(found)
        found = found.f_back
    return innermost if own in ("", innermost) else f"{own}, which called {innermost}"


def _name(frame: FrameType) -> str:
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} ({frame.f_code.co_name})"
