"""What the threads of this process are doing: as a file for people, and in a few words."""

import faulthandler
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

# Code in which a rank waits for the others.
_COLLECTIVES = ("/torch/distributed/", "/deepspeed/comm/")
_OWN = str(Path(__file__).parents[1]) + "/"


@dataclass(frozen=True)
class Doing:
    """What a process does."""

    where: str  # the main thread's place in our code, and in what that called
    in_collective: bool  # whether one of its threads is in code that waits for other ranks


def what_it_does() -> Doing:
    """Of this process, but for the thread that asks."""
    frames = {ident: frame for ident, frame in sys._current_frames().items() if ident != threading.get_ident()}
    main = frames.get(threading.main_thread().ident or 0)
    in_collective = any(_is_in_collective(frame) for frame in frames.values())
    return Doing(_place(main) if main is not None else "nowhere", in_collective)


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
