"""What a process finds out about its device, and how it adds up with the others: the part of the health check that needs torch."""

import socket
import time
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from ..train.probe import wrong_products, wrong_sum
from .health_findings import MIB, Device, SumResult, one_line
from .health_place import Place

_GEMM_SIZE = 8192  # of the square matrices: as large as those of a model's wide layers
_WARM_UP_PRODUCTS, _PRODUCTS = 20, 300  # half a second on a card of 700 TFLOP/s: as long as its clocks take to settle
_LEAST_STORE_SECONDS = 2.0
_MOST_SECONDS = 3.0  # after which a card that needs longer for them has shown what it can
# Of a sum that shows the bandwidth of links between cards; on CPUs it only shows that the links are there.
_SUM_BYTES = {"cuda": 256 * MIB, "cpu": 4 * MIB}


def try_device(place: Place) -> tuple[torch.device | None, Device]:
    """The device that training takes here, None where it cannot have it, and what it does with products."""
    found = Device(place.rank)
    if not torch.cuda.is_available():
        device = torch.device("cpu")
        found.name = "cpu"
        found.fault = one_line(wrong_products(device))
        return device, found
    if place.local_rank >= (count := torch.cuda.device_count()):
        found.fault = f"process {place.local_rank} of the node needs GPU {place.local_rank}, and torch sees {count}"
        found.is_out_of_sight = True
        return None, found
    device = torch.device("cuda", place.local_rank)
    try:
        torch.cuda.set_device(device)
        properties = torch.cuda.get_device_properties(device)
        found.name, found.uuid = properties.name, str(getattr(properties, "uuid", "")).removeprefix("GPU-")
        found.fault = one_line(wrong_products(device))
        found.tflops = None if found.fault else _tflops(device)
    except RuntimeError as error:
        found.fault = one_line(f"GPU {place.local_rank} does not work: {error}")
    return device, found


def versions() -> dict[str, str]:
    """Of what must be the same on all nodes and only torch knows."""
    nccl = ""
    with suppress(RuntimeError, AttributeError):  # a build without it
        nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else ""
    return {"NCCL": nccl} if nccl else {}


def add_up(place: Place, device: torch.device, store: dist.Store, ranks: list[int]) -> SumResult:
    """Join these ranks, of which this one is, and add up with those of the same node, then with all.

    Waits for ever for a GPU that does not take part: a time-out of NCCL would end the process, which then could not tell.
    """
    result = SumResult(place.rank)
    deadlines = place.deadlines
    timeout = timedelta(seconds=place.left(deadlines.waiting if device.type == "cpu" else 2 * deadlines.total))
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore("sums", store),
            rank=ranks.index(place.rank),
            world_size=len(ranks),
            timeout=timeout,
        )
        first = place.rank - place.local_rank
        neighbours = [number for number, rank in enumerate(ranks) if first <= rank < first + place.local_world]
        if 1 < len(neighbours) < len(ranks):
            group = dist.new_group(neighbours, timeout, use_local_synchronization=True)
            result.node_fault = wrong_sum(device, group=group)
            if device.type == "cuda":  # between processes on a CPU there are no links
                result.node_seconds = _sum_seconds(device, group)
        result.bytes = _SUM_BYTES[device.type]
        result.fault = wrong_sum(device) or wrong_sum(device, count=result.bytes // 8)
        result.seconds = _sum_seconds(device, None)
        if len(neighbours) == len(ranks) > 1 and device.type == "cuda":
            result.node_seconds = result.seconds
    except (RuntimeError, ValueError) as error:
        result.error = one_line(str(error).splitlines()[0] if str(error) else type(error).__name__)
    return result


def open_store(place: Place, *, is_server: bool = False) -> dist.TCPStore:
    """A connection to rank 0's store, which opens it as the server first. Raises OSError or RuntimeError."""
    until = place.deadlines.meeting
    if not is_server:
        _wait_for_server(place, until)
    # torch tries for twice as long as this.
    seconds = max(_LEAST_STORE_SECONDS, place.left(until) / 2)
    return dist.TCPStore(
        place.master,
        place.port,
        is_master=is_server,
        wait_for_workers=False,
        timeout=timedelta(seconds=seconds),
    )


def _wait_for_server(place: Place, until: float) -> None:
    """Until somebody listens there. Raises OSError, whose words say more about the network than torch's."""
    while True:
        try:
            seconds = max(_LEAST_STORE_SECONDS, place.left(until))
            with socket.create_connection((place.master, place.port), timeout=seconds):
                return
        except OSError:
            if place.elapsed > until:
                raise
            time.sleep(0.2)


def _tflops(device: torch.device) -> float:
    a, b = (torch.randn(_GEMM_SIZE, _GEMM_SIZE, device=device).bfloat16() for _ in range(2))
    _products_seconds(a, b, 1)  # loads the library
    seconds = _products_seconds(a, b, _WARM_UP_PRODUCTS) / _WARM_UP_PRODUCTS
    count = max(1, min(_PRODUCTS, int(_MOST_SECONDS / seconds)))
    return count * 2 * _GEMM_SIZE**3 / _products_seconds(a, b, count) / 1e12


def _products_seconds(a: torch.Tensor, b: torch.Tensor, count: int) -> float:
    began = time.monotonic()
    for _ in range(count):
        a @ b
    torch.cuda.synchronize(a.device)
    return time.monotonic() - began


def _sum_seconds(device: torch.device, group: dist.ProcessGroup | None) -> float:
    numbers = torch.zeros(_SUM_BYTES[device.type] // 8, dtype=torch.int64, device=device)
    best = float("inf")
    for _ in range(3):
        dist.all_reduce(numbers[:1], group=group)
        _wait_for(device)  # so that all begin together
        began = time.monotonic()
        dist.all_reduce(numbers, group=group)
        _wait_for(device)
        best = min(best, time.monotonic() - began)
    return best


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
