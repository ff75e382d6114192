"""What a process of the health check does for its node and with the others, one step after the other.

Each step may hang: it runs beside the main thread, which keeps the deadlines (see health.py). What is known of a node is written
into the shared folder before the step in which it could fall silent, and given to rank 0's store as well once that is there.
"""

import json
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from .health_checks import look_at_node, read_fault
from .health_findings import Device, NodeReport, SumResult, one_line, read_json, replace_file
from .health_place import Place

if TYPE_CHECKING:  # it may take long to import, and hang
    from torch.distributed import Store, TCPStore

TO_RANK_0 = "the way to rank 0"
_TICK_SECONDS = 0.1
_LOOKS = 5  # at rank 0's clock


class Talk:
    """One process's part in the check, and what the main thread wants to know of it."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._report: NodeReport | None = None  # of local rank 0
        self._has_met_rank_0 = False
        self.store: TCPStore | None = None  # a connection for the main thread of rank 0
        self.is_adding_up = False
        self.code: int | None = None  # rank 0's verdict
        self.is_over = False  # whether there is nothing more to come

    def run(self) -> None:
        """Take part until rank 0 has judged."""
        try:
            self._take_part()
        except Exception as error:
            if not (self._has_met_rank_0 and isinstance(error, RuntimeError)):  # else rank 0 has gone
                traceback.print_exc()
                self._publish(f"a check that failed ({type(error).__name__}: {one_line(error)})")
        finally:
            self.is_over = True

    def _take_part(self) -> None:
        place = self._place
        with suppress(OSError):  # which the check of the folder reports
            place.folder.mkdir(parents=True, exist_ok=True)
        if place.local_rank == 0:
            first = place.rank - place.local_rank
            self._report = NodeReport(place.node, place.attempt, list(range(first, first + place.local_world)))
            self._publish("its own checks")
            look_at_node(place, self._report)
            self._publish("the import of torch")
        from . import health_devices as devices

        store: Store | None = self._open_server() if place.rank == 0 else None
        self._publish("the test of its devices")
        device, found = devices.try_device(place)
        if self._report is None:
            replace_file(_rank_file(place, place.rank), json.dumps({"attempt": place.attempt, "device": asdict(found)}))
        else:
            self._report.versions.update(devices.versions())
            self._gather(found)
            self._publish(TO_RANK_0)
        fault = ""
        if place.rank != 0:
            try:
                store = devices.open_store(place)
            except (OSError, RuntimeError) as error:
                fault = f"does not reach rank 0 at {place.master}:{place.port}: {one_line(error)}"
        self._complete(store, fault)
        if store is None:
            return
        self._has_met_rank_0 = True
        plan = json.loads(self._wait_for(store, "plan"))
        if place.rank in plan["ranks"] and device is not None:
            fault = read_fault(place.folder, plan["reads"][place.node]) if place.local_rank == 0 else ""
            self.is_adding_up = True
            result = devices.add_up(place, device, store, plan["ranks"])
            self.is_adding_up = False
            result.folder_fault = fault
            store.set(f"sum/{place.rank}", json.dumps(asdict(result)))
        self.code = int(self._wait_for(store, "verdict"))

    def tell_that_it_waits(self) -> None:
        """Let rank 0 know that this process waits for others; for the main thread, while the other one is in a call."""
        from .health_devices import open_store

        place = self._place
        waiting = SumResult(place.rank, error=f"it waited for the others for {place.elapsed:.0f} s")
        with suppress(OSError, RuntimeError):
            store = self.store or open_store(place)
            store.set(f"sum/{place.rank}", json.dumps(asdict(waiting)))

    def _open_server(self) -> "Store | None":
        from .health_devices import open_store

        place = self._place
        try:
            server = open_store(place, is_server=True)
            reached = replace(place, port=server.port)
            self.store, ticking = open_store(reached), open_store(reached)  # one for each thread
        except (OSError, RuntimeError) as error:
            assert self._report is not None
            self._report.port_fault = one_line(f"cannot open port {place.port} for the others: {error}")
            return None
        threading.Thread(target=_tick, args=(ticking,), daemon=True).start()
        return server

    def _clock_skew(self, store: "Store") -> float:
        """Seconds ahead of rank 0. What can be read of its clock is old by a tick or more: the least lead is the truest."""
        leads = []
        for _ in range(_LOOKS):
            told = float(self._wait_for(store, "time"))
            leads.append(time.time() - told)
            time.sleep(_TICK_SECONDS / 2)
        return min(leads)

    def _gather(self, own: Device) -> None:
        """Take what the other processes of the node found."""
        assert self._report is not None
        place = self._place
        found = {own.rank: own}
        while len(found) < len(self._report.ranks) and place.elapsed < place.deadlines.devices:
            for rank in self._report.ranks:
                facts = read_json(_rank_file(place, rank)) or {}
                if rank not in found and facts.get("attempt") == place.attempt:
                    found[rank] = Device(**facts["device"])
                    with suppress(OSError):
                        _rank_file(place, rank).unlink()
            time.sleep(0.05)
        self._report.devices = [found[rank] for rank in sorted(found)]
        self._report.silent_ranks = [rank for rank in self._report.ranks if rank not in found]

    def _complete(self, store: "Store | None", fault: str) -> None:
        if self._report is None:
            return
        if store is not None:
            self._report.clock_skew_seconds = self._clock_skew(store)
        self._report.is_complete = True
        self._report.master_fault = fault
        self._publish("waiting for the others")
        if store is not None:
            store.set(f"node/{self._place.node}", self._report.text())

    def _publish(self, doing: str) -> None:
        if self._report is not None:
            self._report.doing = doing
            with suppress(OSError):  # rank 0 then sees that there is no file
                replace_file(report_file(self._place.folder, self._place.node), self._report.text())

    def _wait_for(self, store: "Store", key: str) -> str:
        from datetime import timedelta

        store.wait([key], timedelta(seconds=self._place.left(self._place.deadlines.deputy)))
        return str(store.get(key).decode())


def report_file(folder: Path, node: str) -> Path:
    """Where a node's findings are."""
    return folder / f"{node}.json"


def _tick(store: "Store") -> None:
    """Tell the time of rank 0's clock, again and again."""
    with suppress(RuntimeError):  # at the end
        while True:
            store.set("time", repr(time.time()))
            time.sleep(_TICK_SECONDS)


def _rank_file(place: Place, rank: int) -> Path:
    return place.folder / f"{place.node}.rank-{rank}"
