"""Inputs of blocks that wait in pinned host memory between a block's forward and its backward, copied beside the computation."""

import weakref

import torch
from torch import Tensor


class HostInputs:
    """Sends tensors to the host; on the CPU the same without streams and pinned memory.

    Buffers are used again as soon as the graph that needed them is gone, and grow to the largest tensor that was sent.
    """

    def __init__(self) -> None:
        self._free: list[Tensor] = []
        self._newest: weakref.ref[HostInput] | None = None
        self._stream: torch.cuda.Stream | None = None

    def send(self, x: Tensor) -> "HostInput":
        """Begins to copy x, which stays on its device until `leave_device`."""
        if x.is_cuda and self._stream is None:
            self._stream = torch.cuda.Stream(x.device)
        sent = HostInput(x, self._buffer(x), self._stream, None if self._newest is None else self._newest())
        self._newest = weakref.ref(sent)
        weakref.finalize(sent, self._free.append, sent.buffer)
        return sent

    def _buffer(self, x: Tensor) -> Tensor:
        """Bytes on the host, at least as many as x has."""
        for place, buffer in enumerate(self._free):
            if len(buffer) >= x.nbytes:
                return self._free.pop(place)
        if self._free:
            self._free.pop()  # as small as all the others; pinned memory is scarce
        return torch.empty(x.nbytes, dtype=torch.uint8, pin_memory=x.is_cuda)


class HostInput:
    """One tensor on its way to the host and back."""

    def __init__(self, x: Tensor, buffer: Tensor, stream: torch.cuda.Stream | None, before: "HostInput | None") -> None:
        self.buffer = buffer
        self._on_host = buffer[: x.nbytes].view(x.dtype).view(x.shape)
        self._device, self._requires_grad = x.device, x.requires_grad
        self._here: Tensor | None = x
        self._has_left = False
        self._stream = stream
        # Backward comes to it next, since it goes the other way.
        self._before = None if before is None else weakref.ref(before)
        self._copy(self._on_host, x.detach())

    def leave_device(self) -> None:
        """Give the tensor up here. Its memory lasts until the copy has ended."""
        self._here, self._has_left = None, True

    def open(self) -> Tensor:
        """The tensor on its device: x itself, or once it has left a copy, while the next one in backward begins to come."""
        if not self._has_left:
            assert self._here is not None
            return self._here
        self._fetch()
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        before = None if self._before is None else self._before()
        if before is not None and before._has_left:
            before._fetch()  # behind the wait above, so that it overlaps with the block that opens this one
        here, self._here = self._here, None
        assert here is not None
        return here.requires_grad_(self._requires_grad)

    def _fetch(self) -> None:
        if self._here is None:
            self._here = torch.empty(self._on_host.shape, dtype=self._on_host.dtype, device=self._device)
            self._copy(self._here, self._on_host)

    def _copy(self, to: Tensor, source: Tensor) -> None:
        if self._stream is None:
            to.copy_(source)
            return
        # Whatever wrote the source, or used the target's memory before, was queued on the computation's stream.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            to.copy_(source, non_blocking=True)
        for tensor in (to, source):
            if tensor.is_cuda:
                tensor.record_stream(self._stream)  # its memory is not handed on before the copy has ended
