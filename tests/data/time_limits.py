"""Time limits for decoding processes that hang, and for none of the others, however slow the machine is."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

from muybridge.data.workers import WorkerProcess

LONG_SECONDS = 300.0


def time_limits_for(hangs: Callable[[dict[str, Any], bytes], bool]) -> AbstractContextManager[object]:
    """A context in which a request's time limit holds where `hangs(arguments, data)`; every other request has minutes."""
    call = WorkerProcess.call

    def patient_call(
        process: WorkerProcess,
        operation: str,
        arguments: dict[str, Any],
        *,
        timeout_seconds: float,
        data: bytes | None = None,
        **more: Any,
    ) -> tuple[dict[str, Any], bytearray]:
        limit = timeout_seconds if hangs(arguments, data or b"") else LONG_SECONDS
        return call(process, operation, arguments, timeout_seconds=limit, data=data, **more)

    return mock.patch.object(WorkerProcess, "call", patient_call)
