"""The program of a decoding process which some files crash, and others keep busy for ever: they carry a word at their end."""

import os
import signal
import time
from typing import Any

from muybridge.data import worker

CRASHES, HANGS = b"crashes", b"hangs"


def decode_clip(data: bytes, **arguments: Any) -> tuple[dict[str, Any], bytes]:
    """The operation, at its worst."""
    if data.endswith(CRASHES):
        os.kill(os.getpid(), signal.SIGSEGV)
    if data.endswith(HANGS):
        time.sleep(1000)
    return worker.decode_clip(data, **arguments)


if __name__ == "__main__":
    worker.OPERATIONS["decode_clip"] = decode_clip
    worker.main()
