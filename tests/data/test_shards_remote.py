"""Shards are read by range wherever they lie: over http from a server in this process, through fsspec from its memory."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from muybridge.data import storage, urls
from muybridge.data.config import DataConfig, build_buckets
from muybridge.data.index import ClipIndex
from muybridge.data.indexing import IndexSettings, build_index, is_up_to_date
from muybridge.data.loader import VideoLoader
from muybridge.data.storage import (
    FileFacts,
    RangeReader,
    TransientReadError,
    expand_braces,
    file_facts,
    find_shards,
    read_range,
)
from muybridge.tests.data.web_server import serving, tar_of


class FileServer(ThreadingHTTPServer):
    """Serves `files` by range; "flaky" in a name fails twice, "broken" always, "private" is forbidden, "whole" ignores ranges."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.failures = 0  # of the next requests
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: FileServer

    def do_GET(self) -> None:
        name = self.path.lstrip("/")
        self.server.requests.append(f"{name} {self.headers['Range']}")
        tries = sum(request.startswith(f"{name} ") for request in self.server.requests)
        if name.startswith("moved/"):
            return self._answer(302, {"Location": f"{self.server.url}/{name.removeprefix('moved/')}"})
        if "private" in name:
            return self._answer(403, {})
        if self.server.failures > 0:
            self.server.failures -= 1
            return self._answer(500 + self.server.failures % 4, {})
        if "broken" in name or ("flaky" in name and tries <= 2):
            return self._answer(503, {})
        if name not in self.server.files:
            return self._answer(404, {})
        data = self.server.files[name]
        if "whole" in name:
            return self._answer(200, {}, data)
        first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        if first >= len(data):
            return self._answer(416, {"Content-Range": f"bytes */{len(data)}"})
        part = data[first : last + 1]
        if "torn" in name and tries == 1:
            return self._answer(206, {"Content-Length": str(len(part))}, part[:-1])
        return self._answer(
            206,
            {"Content-Range": f"bytes {first}-{first + len(part) - 1}/{len(data)}", "ETag": f'"{hash(data)}"'},
            part,
        )

    def _answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing on the terminal."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    found = FileServer()
    with serving(found, monkeypatch):
        yield found


def test_ranges_and_facts_over_http(server: FileServer) -> None:
    data = bytes(range(256)) * 10
    server.files |= {"a.tar": data, "empty.tar": b""}
    url = f"{server.url}/a.tar"
    assert file_facts(url) == FileFacts(2560, f'"{hash(data)}"')
    assert read_range(url, 100, 300) == data[100:400]
    assert read_range(f"{server.url}/moved/a.tar", 5, 5) == data[5:10]
    assert file_facts(f"{server.url}/empty.tar").size == 0
    assert server.requests[1] == "a.tar bytes=100-399"
    with pytest.raises(EOFError, match="ends at byte 2560, 10 bytes from 2555 were asked for"):
        read_range(url, 2555, 10)


def test_passing_faults_are_retried_and_lasting_ones_named(server: FileServer) -> None:
    server.files |= {"flaky.tar": b"abc", "torn.tar": b"abc", "broken.tar": b"", "whole.tar": b"abc"}
    assert read_range(f"{server.url}/flaky.tar", 1, 2) == b"bc"
    assert read_range(f"{server.url}/torn.tar", 1, 2) == b"bc"
    with pytest.raises(TransientReadError, match=r"broken\.tar cannot be read after 5 attempts: status 503"):
        file_facts(f"{server.url}/broken.tar")
    assert sum(request.startswith("broken") for request in server.requests) == 5
    for name, kind, reason in (
        ("gone.tar", FileNotFoundError, r"gone\.tar does not exist \(status 404\)"),
        ("private.tar", PermissionError, r"private\.tar may not be read \(status 403\)"),
        ("whole.tar", OSError, r"the server does not serve ranges of a file \(status 200, not 206\)"),
    ):
        with pytest.raises(kind, match=reason):
            read_range(f"{server.url}/{name}", 0, 1)
        assert sum(request.startswith(name) for request in server.requests) == 1


def test_a_server_that_is_gone_is_a_passing_fault(server: FileServer) -> None:
    server.server_close()
    with pytest.raises(TransientReadError, match=r"cannot be read after 5 attempts: .*refused"):
        read_range(f"{server.url}/a.tar", 0, 1)


def test_small_reads_of_remote_files_share_requests(server: FileServer) -> None:
    data = bytes(range(251)) * 400  # 100,400 bytes
    server.files["a.tar"] = data
    with RangeReader(f"{server.url}/a.tar") as reader:
        for offset in (0, 512, 1000, 16_380, 16_384, 40_000, 100_300, 100_400, 200_000):
            assert reader.read(offset, 200) == data[offset : offset + 200]
    assert len(server.requests) == 5  # facts, and the blocks 0, 1, 2 and 6


def test_shards_over_http_are_indexed_and_trained_on(server: FileServer, numbered: Any, tmp_path: Path) -> None:
    video = numbered.encode([40 * i for i in range(25)])
    for n in range(2):
        server.files[f"s-{n:03d}.tar"] = tar_of({f"k{n}.mp4": video, f"k{n}.txt": b"a dog"})
    source = f"{server.url}/s-{{000..001}}.tar"
    options: dict[str, Any] = {"settings": IndexSettings(), "workers": 1, "timeout_seconds": 20.0}
    index, report = build_index(source, tmp_path / "out", **options)
    assert (report.read_shards, report.clips) == (2, 2)
    assert index.shard_names == [f"{server.url}/s-000.tar", f"{server.url}/s-001.tar"]
    assert len(server.requests) == 2 * 5  # facts twice and at the end, headers with captions, media
    config = DataConfig(path=str(tmp_path / "out"), frames=9, fps=9.0, workers=0)
    loader = VideoLoader(
        config, buckets=build_buckets(config, global_batch=2, micro_batch=2, world_size=1), rank=0, world_size=1, seed=0
    )
    [batch] = next(loader.steps(0))
    assert sorted(batch.keys) == ["k0", "k1"]
    assert is_up_to_date(source, tmp_path / "out", IndexSettings())

    server.files["s-001.tar"] = tar_of({"k1.mp4": video, "k1.txt": b"a cat"})  # of the same size
    assert not is_up_to_date(source, tmp_path / "out", IndexSettings())
    index, report = build_index(source, tmp_path / "out", **options)
    assert report.read_shards == 1
    assert index.text("caption", 1) == "a cat"

    server.files["s-001.tar"] += bytes(10240)
    del server.files["s-000.tar"]
    with pytest.raises(ValueError, match=r"s-000\.tar is missing, .*s-001\.tar has 20480 bytes, not 10240"):
        ClipIndex.open(tmp_path / "out")


@pytest.mark.parametrize("workers", [0, 1])
def test_passing_faults_of_the_storage_change_no_sample_and_lasting_ones_end_the_run(
    server: FileServer, numbered: Any, tmp_path: Path, workers: int
) -> None:
    video = numbered.encode([40 * i for i in range(25)])
    server.files["s.tar"] = tar_of(
        {f"k{n}.{end}": data for n in range(4) for end, data in (("mp4", video), ("txt", b"c"))}
    )
    build_index(f"{server.url}/s.tar", tmp_path, settings=IndexSettings(), workers=1, timeout_seconds=20.0)
    config = DataConfig(path=str(tmp_path), frames=9, fps=9.0, workers=workers, prefetch=0, timeout_seconds=20.0)
    loader = VideoLoader(
        config, buckets=build_buckets(config, global_batch=2, micro_batch=2, world_size=1), rank=0, world_size=1, seed=0
    )
    [expected] = next(loader.steps(3))
    server.failures = 4
    [batch] = next(loader.steps(3))
    assert server.failures == 0
    assert batch.keys == expected.keys
    assert torch.equal(batch.pixels, expected.pixels)
    for read in (loader.steps(3), loader.every_row(2)):
        server.failures = 1000
        with pytest.raises(TransientReadError, match=r"s\.tar cannot be read after 5 attempts: status 50"):
            next(read)
    server.failures = 0
    assert loader.counts()["bad_clips"] == 0
    loader.close()


def test_a_stale_network_file_is_a_passing_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.tar").write_bytes(b"abc")
    faults = [OSError(errno.ESTALE, "Stale file handle"), OSError(errno.EIO, "Input/output error")]

    def open_or_fail(*arguments: Any) -> Any:
        if faults:
            raise faults.pop()
        return open(*arguments)

    monkeypatch.setattr(storage, "_FIRST_WAIT_SECONDS", 0.001)
    monkeypatch.setattr(storage, "open", open_or_fail, raising=False)
    assert read_range(str(tmp_path / "a.tar"), 1, 2) == b"bc"
    faults += [OSError(errno.EIO, "Input/output error")] * 5
    with pytest.raises(TransientReadError, match=r"a\.tar cannot be read after 5 attempts: Input/output error"):
        read_range(str(tmp_path / "a.tar"), 1, 2)


def test_bad_remote_shards_are_all_named(server: FileServer, tmp_path: Path) -> None:
    server.files["cut.tar"] = tar_of({"a.mp4": b"x" * 2000})[:1024]
    with pytest.raises(ValueError, match="4 of 4 shards cannot be used") as caught:
        build_index(
            f"{server.url}/{{gone,private,broken,cut}}.tar",
            tmp_path / "out",
            settings=IndexSettings(),
            workers=1,
            timeout_seconds=20.0,
        )
    for reason in (
        "gone.tar: does not exist",
        "status 403",
        "after 5 attempts: status 503",
        "cut in the middle of a.mp4",
    ):
        assert reason in str(caught.value)


def test_other_schemes_go_through_fsspec(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec = pytest.importorskip("fsspec", reason="fsspec reads other schemes")
    monkeypatch.setitem(urls.EXTRAS, "memory", "fsspec")
    files = fsspec.filesystem("memory")
    files.pipe({"/bucket/b.tar": b"0123456789", "/bucket/a/c.tar": b"x", "/bucket/notes.txt": b"x"})
    try:
        assert find_shards("memory://bucket") == ["memory:///bucket/a/c.tar", "memory:///bucket/b.tar"]
        assert find_shards("memory://bucket/?.tar") == ["memory:///bucket/b.tar"]
        assert find_shards("memory://bucket/b.tar") == ["memory://bucket/b.tar"]
        assert file_facts("memory://bucket/b.tar").size == 10
        assert read_range("memory://bucket/b.tar", 2, 3) == b"234"
        with RangeReader("memory://bucket/b.tar") as reader:
            assert reader.read(8, 10) == b"89"
        with pytest.raises(FileNotFoundError):
            file_facts("memory://bucket/gone.tar")
    finally:
        files.rm("/bucket", recursive=True)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gs://bucket/a.tar", r"reading gs:// needs gcsfs \(.*\); pip install fsspec gcsfs"),
        ("nope://a/b.tar", "nope:// is not read"),
    ],
)
def test_a_missing_library_is_named(name: str, reason: str) -> None:
    try:
        import gcsfs  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match=reason):
            file_facts(name)
    else:
        pytest.skip("gcsfs is installed")


def test_patterns_stand_for_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(expand_braces("a-{008..010}.{x,y}")) == [f"a-{n}.{e}" for n in ("008", "009", "010") for e in "xy"]
    assert list(expand_braces("s{8..10}")) == ["s8", "s9", "s10"]
    assert list(expand_braces("plain")) == ["plain"]
    for name in ("b.tar", "a.tar", "c.tar.gz", "._d.tar", "e.txt"):
        (tmp_path / name).write_bytes(b"x")
    names = [str(tmp_path / name) for name in ("a.tar", "b.tar")]
    assert find_shards(str(tmp_path)) == [*names, str(tmp_path / "c.tar.gz")]
    assert find_shards(str(tmp_path / "*.tar")) == names
    assert find_shards(str(tmp_path / "{b,a}.tar")) == names[::-1]
    for pattern, reason in {"gone/*.tar": "holds no shards", "{a,a}.tar": "names .*a.tar twice"}.items():
        with pytest.raises(ValueError, match=reason):
            find_shards(str(tmp_path / pattern))
    monkeypatch.setattr(storage, "_MAX_BRACE_NAMES", 1000)
    with pytest.raises(ValueError, match="stands for more than 1000 shards"):
        find_shards("a-{0..99999999}.tar")
