import json
from pathlib import Path

import pytest

from muybridge.scripts import bench_loader_memory


def test_a_process_is_measured_with_and_without_its_renewal(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("av", reason="PyAV writes the files")
    pytest.importorskip("decord", reason="two of three cases are read by decord")
    out = tmp_path / "figures" / "memory.json"
    assert bench_loader_memory.main(["--decodes", "12", "--json", str(out)]) in (0, 1)  # so few clips may well grow it
    figures = json.loads(out.read_text())
    assert figures["requests_per_process"] == 6
    assert set(figures["cases"]) == {"decord", "pyav", "damaged"}
    for case in figures["cases"].values():
        sizes, renewed = case["resident_bytes_without_renewal"], case["resident_bytes_with_renewal"]
        assert len(sizes) == len(renewed) == 12
        assert min(sizes) > 10**7
        assert case["final_bytes"] == sizes[-1]
        assert case["growth_without_renewal"] == pytest.approx(sizes[-1] / case["settled_bytes"] - 1)
        assert case["peak_bytes_of_processes"] == [max(renewed[:6]), max(renewed[6:])]
    assert figures["cases"]["damaged"]["unreadable"] > figures["cases"]["decord"]["unreadable"] == 0
    printed = capsys.readouterr().out
    assert "never renewed" in printed
    assert "renewed every 6" in printed
    assert f"muybridge: wrote {out}" in printed
