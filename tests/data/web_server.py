"""A web server in a thread, and tars in memory, for tests of what comes from elsewhere."""

from __future__ import annotations

import io
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import HTTPServer

import pytest

from muybridge.data import storage


@contextmanager
def serving(server: HTTPServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Answers requests until the block ends; repetitions after faults come at once."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(storage, "_FIRST_WAIT_SECONDS", 0.001)
    with server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield
        server.shutdown()
        thread.join()


def tar_of(members: dict[str, bytes]) -> bytes:
    """A tar with these members, in their order."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()
