"""What several tests of the autoencoder measure with."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.profiler import ProfilerActivity, profile


@pytest.fixture
def peak_bytes(tmp_path: Path) -> Callable[[Callable[[], object]], int]:
    """The most memory that tensors made by a function take at one time, by torch's own count of every allocation."""

    def measure(run: Callable[[], object]) -> int:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            run()
        trace = tmp_path / "trace.json"
        profiler.export_chrome_trace(str(trace))
        live = peak = 0
        for event in json.loads(trace.read_text())["traceEvents"]:
            if event["name"] == "[memory]":
                live += event["args"]["Bytes"]
                peak = max(peak, live)
        assert peak > 0, "the profiler counted nothing"
        return peak

    return measure
