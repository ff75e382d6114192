"""Files of JSON lines after kills and full disks."""

import resource
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from muybridge.train.json_lines import JsonLines, read_json_lines, read_last_json_lines


def test_rows_come_back_in_their_order(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert read_json_lines(path) == []
    for number in (1, 2):
        rows = JsonLines(path)
        assert rows.append({"number": number, "text": "a\nb"}, sync=True) == ""
        rows.close()
    assert read_json_lines(path) == [{"number": 1, "text": "a\nb"}, {"number": 2, "text": "a\nb"}]


def test_rows_are_written_without_secrets_and_stay_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DB_PASSWORD", "17634567")
    monkeypatch.setenv("HF_TOKEN", "unix_seconds")
    rows = JsonLines(tmp_path / "rows.jsonl")
    rows.append({"unix_seconds": 1763456789.1, "cause": ["by 17634567", {"a": "unix_seconds"}]})
    expected = {"unix_seconds": 1763456789.1, "cause": ["by [DB_PASSWORD]", {"a": "[HF_TOKEN]"}]}
    assert read_json_lines(tmp_path / "rows.jsonl") == [expected]


def test_threads_may_write_at_the_same_time(tmp_path: Path) -> None:
    rows = JsonLines(tmp_path / "rows.jsonl")
    file = rows._file

    def slow_write(data: bytes) -> int:
        time.sleep(0.001)
        return file.write(data)

    rows._file = SimpleNamespace(write=slow_write)  # type: ignore[assignment]
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda number: rows.append({"number": number}), range(40))) == {""}
    assert sorted(row["number"] for row in read_json_lines(tmp_path / "rows.jsonl")) == list(range(40))


@pytest.mark.parametrize("torn", ['{"number": 9, "te', '{"number": 9}', "\x00\x00", "[1]"])
def test_a_line_that_a_kill_cut_short_does_not_spoil_the_next_one(torn: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"number": 1}\n' + torn)
    rows = JsonLines(path)
    rows.append({"number": 2})
    rows.close()
    assert path.read_text() == '{"number": 1}\n{"number": 2}\n'


def test_what_is_no_json_object_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"number": 1}\n\xff\xfe\n7\n{"number": 2}\n{"num')
    assert read_json_lines(path) == [{"number": 1}, {"number": 2}]


def test_what_a_full_disk_refuses_is_written_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    rows = JsonLines(path)
    # As a full disk answers: a part of the write succeeds, the rest fails.
    kept = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))
        failures = [rows.append({"number": number}) for number in (1, 2, 3)]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, kept)
    assert failures == ["", f"{path}: File too large", f"{path}: File too large"]
    assert read_json_lines(path) == [{"number": 1}]
    rows.close()
    assert read_json_lines(path) == [{"number": 1}, {"number": 2}, {"number": 3}]


def test_the_last_rows_of_a_large_file_are_read_from_its_end(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert read_last_json_lines(path) == []
    path.write_text("".join(f'{{"number": {number}}}\n' for number in range(1000)) + '{"num')
    assert [row["number"] for row in read_last_json_lines(path, nbytes=40)] == [998, 999]
    assert read_last_json_lines(path) == read_json_lines(path)
