"""Shards without an index: every sample comes, all ranks have one shape a step, and what is broken costs itself."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from muybridge.data import workers
from muybridge.data.batch import VideoBatch
from muybridge.data.buckets import BucketConfig
from muybridge.data.config import Access, DataConfig, build_buckets
from muybridge.data.ledger import DataBudgetError
from muybridge.data.loader import VideoLoader
from muybridge.data.storage import TransientReadError
from muybridge.data.stream import StreamLoader
from muybridge.data.stream_agreement import agree, common_bucket
from muybridge.data.stream_reader import MOST_STEPS
from muybridge.data.stream_samples import (
    BadSample,
    EndOfPass,
    SampleStream,
    StreamSample,
    find_streams,
    read_shard,
    shuffled,
)
from muybridge.tests.data.conftest import write_synthetic
from muybridge.tests.data.time_limits import time_limits_for

WIDE, TALL = (48, 32), (32, 48)
TWO_SHAPES = [BucketConfig(frames=1, height=32, width=48), BucketConfig(frames=1, height=48, width=32)]


def picture(number: int, size: tuple[int, int] = WIDE) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (number, 255 - number, 100)).save(file, "PNG")
    return file.getvalue()


def pairs(numbers: range, size: tuple[int, int] = WIDE) -> list[tuple[str, bytes]]:
    files = [((f"{n:03d}.png", picture(n, size)), (f"{n:03d}.txt", f"picture {n}".encode())) for n in numbers]
    return list(chain.from_iterable(files))


def tar_of(members: list[tuple[str, bytes]]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def write_shards(folder: Path, *shards: list[tuple[str, bytes]]) -> Path:
    folder.mkdir(exist_ok=True)
    for number, members in enumerate(shards):
        (folder / f"{number:03d}.tar").write_bytes(tar_of(members))
    return folder


def stream_settings(path: Path | str, **changes: Any) -> DataConfig:
    own = {"path": str(path), "access": Access.stream, "workers": 1, "prefetch": 1, "caption_dropout": 0.0}
    sizes = {"frames": 1, "height": 32, "width": 48, "max_crop": 0.2}
    return DataConfig(**{**own, **sizes, **changes})


def build(
    config: DataConfig, *, global_batch: int = 2, rank: int = 0, world_size: int = 1, **more: Any
) -> StreamLoader:
    buckets = build_buckets(config, global_batch=global_batch, micro_batch=2, world_size=world_size)
    return StreamLoader(config, buckets=buckets, rank=rank, world_size=world_size, seed=3, **more)


def keys(batches: list[list[VideoBatch]]) -> list[str]:
    return [key for step in batches for batch in step for key in batch.keys]


def items_of(shard: Path) -> tuple[list[str], dict[str, str]]:
    found = list(read_shard(str(shard)))
    good = [item.key for item in found if isinstance(item, StreamSample)]
    return good, {item.key: item.reason for item in found if isinstance(item, BadSample)}


# Samples


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
def test_in_each_pass_the_ranks_share_all_samples(world_size: int, tmp_path: Path) -> None:
    folder = write_shards(tmp_path, pairs(range(3)), pairs(range(3, 10)), pairs(range(10, 12)))
    shards = find_streams(str(folder), field="data.path")
    streams = [SampleStream(shards, rank=rank, world_size=world_size, seed=1) for rank in range(world_size)]
    takers: Counter[str] = Counter()
    for number in range(6):
        parts = [[item.key for item in stream.one_pass(number) if isinstance(item, StreamSample)] for stream in streams]
        assert sorted(chain.from_iterable(parts)) == [f"{n:03d}" for n in range(12)]
        takers.update({str(rank): len(part) for rank, part in enumerate(parts)})
    assert all(takers[str(rank)] for rank in range(world_size))  # nobody goes without for long


def test_ranks_that_share_a_shard_take_turns(tmp_path: Path) -> None:
    shards = find_streams(str(write_shards(tmp_path, pairs(range(2)))), field="data.path")
    for rank in range(4):
        stream = SampleStream(shards, rank=rank, world_size=4, seed=1)
        assert sorted(item.key for number in range(4) for item in stream.one_pass(number)) == ["000", "001"]


def test_passes_have_orders_of_their_own(tmp_path: Path) -> None:
    shards = find_streams(str(write_shards(tmp_path, pairs(range(6)), pairs(range(6, 12)))), field="data.path")

    def passes(seed: int) -> list[list[str]]:
        found: list[list[str]] = [[]]
        for item in SampleStream(shards, rank=0, world_size=1, seed=seed):
            if isinstance(item, StreamSample):
                found[-1].append(item.key)
            elif isinstance(item, EndOfPass):
                if len(found) == 3:
                    break
                found.append([])
        return found

    first, other = passes(1), passes(2)
    assert len({tuple(part) for part in (*first, *other)}) == 6
    assert all(sorted(part) == [f"{n:03d}" for n in range(12)] for part in (*first, *other))
    assert passes(1) == first


def test_shuffling_holds_back_so_many_samples_and_bytes() -> None:
    def counted() -> Iterator[StreamSample | BadSample]:
        for number in range(100):
            seen.append(number)
            yield StreamSample("s", str(number), bytes(10), ["c"], 0)

    for limits, held in (({"samples": 7}, 7), ({"max_bytes": 55}, 5)):
        seen: list[int] = []
        order = []
        for item in shuffled(counted(), seed=0, **limits):
            order.append(int(item.key))
            assert len(seen) - len(order) <= held
        assert order != sorted(order)
        assert sorted(order) == list(range(100))


def test_what_is_wrong_with_a_shard_is_told_and_the_rest_of_it_comes(tmp_path: Path) -> None:
    whole = tar_of(pairs(range(8)))
    second = whole.index(b"004.png")
    damaged = bytearray(whole)
    damaged[second + 120] ^= 0xFF  # in the header: Python's tarfile ends here without a word
    files = {
        "cut": whole[: second + 600],
        "damaged": bytes(damaged) + bytes(20_000),
        "open": whole[:second],
        "text": b"<html>404</html>" * 100,
        "zero": b"",
        "twice": tar_of([*pairs(range(2)), ("001.txt", b"again"), *pairs(range(2, 3))]),
    }
    for name, data in files.items():
        (tmp_path / f"{name}.tar").write_bytes(data)
    four = ["000", "001", "002", "003"]
    for name in ("cut", "damaged", "open"):
        good, bad = items_of(tmp_path / f"{name}.tar")
        assert good == four, name
        assert bad[""].startswith("damaged shard: "), name
        assert bad[""].endswith("the rest is lost"), name
    for name in ("text", "zero"):
        assert items_of(tmp_path / f"{name}.tar")[0] == []
        assert items_of(tmp_path / f"{name}.tar")[1][""].startswith("damaged shard: ReadError"), name
    assert items_of(tmp_path / "twice.tar") == (["000", "001", "002"], {"001.txt": "duplicate: 001.txt comes twice"})
    assert items_of(tmp_path / "none.tar")[1] == {"": "the shard cannot be opened: No such file or directory"}


def test_captions_follow_the_rules_of_the_index(tmp_path: Path) -> None:
    png = picture(0)
    members = [
        *[("a.PNG", png), ("a.json", json.dumps({"caption": ["one", "two"]}).encode()), ("a.npy", bytes(100))],
        *[("b.png", png), ("c.png", png), ("c.txt", b" \n"), ("d.png", png), ("d.txt", b"\xff")],
        *[("e.txt", b"alone"), ("f.x.png", png), ("g.png", png), ("g.txt", "\ufeffa  cat\n".encode())],
        *[("._g.png", b"mac"), ("h.png", b""), ("h.txt", b"empty")],
    ]
    shard = write_shards(tmp_path, members) / "000.tar"
    good = [item for item in read_shard(str(shard)) if isinstance(item, StreamSample)]
    assert [(item.key, item.captions) for item in good] == [("a", ["one", "two"]), ("g", ["a cat"])]
    assert good[0].data == png
    assert items_of(shard)[1] == {
        "b": "no caption (b.txt is missing)",
        "c": "no caption (c.txt is empty)",
        "d": "caption file is not UTF-8 text: d.txt, byte 0",
        "e": "no media (the key has txt; media are mp4, mkv, webm, mov, jpg, jpeg, png, webp)",
        "f": "unknown extension: .x.png (a key ends at the first dot of a name)",
        "h": "the file is empty",
    }


def test_compressed_shards_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(tar_of(pairs(range(5)))))
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress(tar_of(pairs(range(5))))[:400])
    assert items_of(tmp_path / "a.tar.gz") == ([f"{n:03d}" for n in range(5)], {})
    assert items_of(tmp_path / "b.tar.gz")[1][""].startswith("damaged shard: ")
    (tmp_path / "c.tar.zst").write_bytes(b"")
    with pytest.raises(ValueError, match=r"c\.tar\.zst is compressed with zstd"):
        find_streams(str(tmp_path), field="data.path")


@contextmanager
def served(files: dict[str, bytes], status: int = 404) -> Iterator[str]:
    """A server that knows no ranges, as many that make files on the fly."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            data = files.get(self.path)
            self.send_response(200 if data is not None else status)
            self.end_headers()
            self.wfile.write(data or b"")

        def log_message(self, format: str, *arguments: Any) -> None:
            """Nothing on the terminal."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_servers_without_ranges_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    whole = tar_of(pairs(range(6)))
    with served({"/0.tar": whole, "/1.tar": whole[: whole.index(b"003.png") + 600]}) as url:
        shards = find_streams(url + "/{0..2}.tar", field="data.path")
        assert shards == [f"{url}/{n}.tar" for n in range(3)]
        found = [list(read_shard(shard)) for shard in shards]
    assert len(found[0]) == 6
    assert [isinstance(item, BadSample) for item in found[1]] == [False, False, False, True]
    assert [item.reason for item in found[2] if isinstance(item, BadSample)] == [
        f"the shard cannot be opened: {url}/2.tar does not exist (status 404)"
    ]


def test_a_storage_that_does_not_answer_is_no_broken_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr("muybridge.data.storage._FIRST_WAIT_SECONDS", 0.01)
    with served({}, status=503) as url, pytest.raises(TransientReadError, match="status 503"):
        list(read_shard(f"{url}/0.tar"))


def test_a_storage_that_stops_to_answer_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr("muybridge.data.storage._FIRST_WAIT_SECONDS", 0.01)
    with (
        served({"/0.tar": tar_of(pairs(range(6)))}, status=503) as url,
        closing(build(stream_settings(url + "/{0..1}.tar"))) as loader,
        pytest.raises(TransientReadError, match=r"1\.tar cannot be read after 5 attempts: status 503"),
    ):
        list(islice(loader.steps(0), 100))


def test_shards_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.path=.* holds no shards"):
        find_streams(str(tmp_path), field="data.path")
    pattern = str(tmp_path / "{000..002}.tar")
    with pytest.raises(ValueError, match=r"no shard can be read: .*000\.tar: No such file.*001\.tar.*002\.tar"):
        find_streams(pattern, field="data.path")
    write_shards(tmp_path, pairs(range(1)))
    assert len(find_streams(pattern, field="data.path")) == 3


# Agreement


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_the_agreed_bucket_is_ready_on_all_ranks_and_best_for_the_poorest(data: st.DataObject) -> None:
    buckets, ranks = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 6))
    needed = data.draw(st.lists(st.integers(1, 8), min_size=buckets, max_size=buckets))
    row = st.lists(st.integers(0, 20), min_size=buckets, max_size=buckets)
    ready = data.draw(st.lists(row, min_size=ranks, max_size=ranks))
    chosen = common_bucket(ready, needed)
    steps = [min(row[b] for row in ready) / needed[b] for b in range(buckets)]  # of the poorest rank
    if chosen is None:
        assert max(steps) < 1
    else:
        assert steps[chosen] == max(steps) >= 1
    assert chosen == common_bucket(ready[::-1], needed)
    rows = [[*row, 0, 0] for row in ready]
    found = {agree(row, needed=needed, is_hopeless=False, is_unreadable=False, gather=lambda _: rows) for row in ready}
    assert {agreement.bucket for agreement in found} == {chosen}  # on every rank


class Meeting:
    """What `gather` is for ranks that are threads of one process."""

    def __init__(self, world_size: int) -> None:
        self._rows: list[list[int]] = [[] for _ in range(world_size)]
        self._barrier = threading.Barrier(world_size, timeout=60)

    def gather(self, rank: int) -> Callable[[list[int]], list[list[int]]]:
        def exchange(row: list[int]) -> list[list[int]]:
            self._rows[rank] = row
            self._barrier.wait()
            found = list(self._rows)
            self._barrier.wait()  # nobody brings a new row before all have read these
            return found

        return exchange

    def leave(self) -> None:
        self._barrier.abort()


def run_ranks(config: DataConfig, *, world_size: int, steps: int, global_batch: int) -> list[Any]:
    """The steps of each rank, or what it raised."""
    meeting = Meeting(world_size)
    found: list[Any] = [None] * world_size

    def run(rank: int) -> None:
        gather = meeting.gather(rank)
        try:
            with closing(
                build(config, global_batch=global_batch, rank=rank, world_size=world_size, gather=gather)
            ) as loader:
                found[rank] = list(islice(loader.steps(0), steps))
        except Exception as error:
            found[rank] = error
            meeting.leave()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_two_ranks_have_one_shape_a_step_and_other_samples(tmp_path: Path) -> None:
    # At first one rank has wide pictures only and the other one tall ones: each must read on until it has what the other has.
    folder = write_shards(tmp_path, pairs(range(30)), pairs(range(30, 60), TALL))
    found = run_ranks(stream_settings(folder, buckets=TWO_SHAPES, width=48), world_size=2, steps=40, global_batch=4)
    shapes = [[tuple(batch.frames.shape) for step in rank for batch in step] for rank in found]
    assert shapes[0] == shapes[1]
    assert set(shapes[0]) == {(2, 1, 32, 48, 3), (2, 1, 48, 32, 3)}
    for step in zip(*found, strict=True):
        assert sorted(slot for [batch] in step for slot in batch.slots.tolist()) == [0, 1, 2, 3]
        assert all(batch.weights.tolist() == [1.0, 1.0] and batch.step_samples == 4 for [batch] in step)
    for rank in found:
        assert all(int(key) // 30 == (batch.frames.shape[2] == 48) for [batch] in rank for key in batch.keys)


def test_ranks_of_one_shard_share_its_samples(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, pairs(range(8)))
    found = run_ranks(stream_settings(folder, prefetch=0), world_size=2, steps=2, global_batch=4)
    assert sorted(key for rank in found for key in keys(rank)) == [f"{n:03d}" for n in range(8)]


def test_a_bucket_that_others_lack_fills_no_memory(tmp_path: Path) -> None:
    # The other rank has nothing but tall pictures, of which this one finds two in a hundred.
    folder = write_shards(tmp_path, [*pairs(range(196)), *pairs(range(196, 200), TALL)])
    config = stream_settings(folder, buckets=TWO_SHAPES, width=48, prefetch=0)
    most = 0

    def gather(row: list[int]) -> list[list[int]]:
        nonlocal most
        most = max(most, row[0])
        return [row, [0, 99, 0, 0]]

    with closing(build(config, global_batch=4, world_size=2, gather=gather)) as loader:
        batches = list(islice(loader.steps(0), 2))
        assert loader.counts()["dropped_samples"] > 20
    assert {batch.frames.shape[2] for step in batches for batch in step} == {48}
    assert 2 * 2 <= most <= MOST_STEPS * 2 + 16


# The loader


def test_clips_and_captions_are_those_of_the_files(numbered: Any, tmp_path: Path) -> None:
    video = numbered.encode([125 * i for i in range(9)])
    folder = write_shards(tmp_path, [("v.mp4", video), ("v.txt", b"a video"), *pairs(range(1))])
    config = stream_settings(folder, frames=5, height=64, width=96, buckets=[BucketConfig(5, 64, 96), *TWO_SHAPES[:1]])
    with closing(build(config, global_batch=1)) as loader:
        steps = list(islice(loader.steps(0), 40))
        assert loader.samples_before(40) == sum(step[0].step_samples for step in steps)
        # Of a stop while the next step is asked for in another thread.
        assert loader.samples_before(39) == sum(step[0].step_samples for step in steps[:-1])
        assert loader.counts()["samples"] >= 40
    found = {batch.keys[0]: batch for step in steps for batch in step}
    numbers = numbered.read(found["v"].frames[0].numpy())
    assert numbers == list(range(numbers[0], numbers[0] + 5))
    assert found["v"].captions[0] == "a video"
    assert (found["000"].frames[0] == torch.tensor([0, 255, 100])).all()
    assert len({step[0].step for step in steps}) == 40
    starts = {numbered.read(b.frames[i].numpy())[0] for [b] in steps for i, key in enumerate(b.keys) if key == "v"}
    assert len(starts) > 1  # a clip that comes again is cut elsewhere


def test_what_does_not_divide_is_filled_with_ghosts(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, pairs(range(9)))
    found = run_ranks(stream_settings(folder), world_size=2, steps=2, global_batch=5)
    for step in zip(*found, strict=True):
        batches = [batch for rank in step for batch in rank]
        assert [len(batch) for batch in batches] == [2, 2, 2, 2]
        assert sum(batch.weights.sum().item() for batch in batches) == 5
        assert all((weight == 1) == (slot < 5) for b in batches for weight, slot in zip(b.weights, b.slots))
        assert all(bool(key) == (weight == 1) for b in batches for key, weight in zip(b.keys, b.weights))


def test_broken_samples_cost_themselves_and_are_entered(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken = [("x.png", picture(0)[:40]), ("x.txt", b"cut"), ("y.png", picture(0))]
    small = [("z.png", picture(0, (8, 6))), ("z.txt", b"small")]
    folder = write_shards(tmp_path, pairs(range(4)), [*pairs(range(4, 8)), *broken, *small])
    (folder / "002.tar").write_bytes(tar_of(pairs(range(8, 12)))[:3000])
    config = stream_settings(folder, prefetch=0)
    with closing(build(config)) as loader:
        found = keys(list(islice(loader.steps(0), 12)))
        assert {f"{n:03d}" for n in range(8)} <= set(found) <= {f"{n:03d}" for n in range(12)}
        reasons = {clip.key.rpartition("/")[2]: clip.reason for clip in loader.ledger.clips()}
        assert loader.ledger.take_replaced() >= 3
        assert not loader.ledger.has_long_run
        assert loader.counts()["left_out_samples"] >= 1
    assert reasons["001.tar: x"].startswith("damaged image")
    assert reasons["001.tar: y"] == "no caption (y.txt is missing)"
    assert reasons["002.tar"].startswith("damaged shard")
    assert len(reasons) == 3
    assert "cannot use" in caplog.text
    assert "1 too small for 1x32x48" in caplog.text


# A decoding process that hangs on clips whose bytes say so: when it looks at them, or when it decodes them.
PROGRAM = """
import time
from muybridge.data import worker

def hang_at(operation, mark):
    original = worker.OPERATIONS[operation]
    def run(data, **arguments):
        if mark in data:
            time.sleep(1000)
        return original(data, **arguments)
    worker.OPERATIONS[operation] = run

hang_at("inspect_clip", b"hang at once")
hang_at("decode_clip", b"hang later")
worker.main()
"""


def test_a_clip_that_hangs_costs_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.setattr(workers, "_COMMAND", [workers._COMMAND[0], str(tmp_path / "program.py")])
    hanging = [(f"h{i}.png", picture(0) + mark) for i, mark in enumerate((b"hang at once", b"hang later"))]
    captions = [(f"h{i}.txt", b"never seen") for i in range(2)]
    members = [*chain.from_iterable(zip(hanging, captions)), *pairs(range(14))]
    folder = write_shards(tmp_path / "shards", members)
    with (
        time_limits_for(lambda _, data: b"hang " in data),
        closing(build(stream_settings(folder, timeout_seconds=0.5, prefetch=0))) as loader,
    ):
        batches = list(islice(loader.steps(0), 7))
        reasons = [clip.reason for clip in loader.ledger.clips()]
    # Where the queue had no other clip yet, the place of the one that was not decoded stays empty.
    assert sum(batch.weights.sum().item() for [batch] in batches) >= 13
    assert reasons == ["decoding took longer than 0.5 s"] * 2


@pytest.mark.parametrize(
    ("members", "error", "words"),
    [
        (pairs(range(3), (8, 6)), ValueError, "process 0 found no clip that it can use .* 30 too small for 1x32x48"),
        ([("a.png", picture(0))], ValueError, "found no clip .*; 1 bad: .*000.tar: a: no caption"),
        ([(f"{n}.png", b"x") for n in range(150)], DataBudgetError, "nothing but bad samples .*no caption"),
    ],
)
def test_shards_without_a_usable_clip_end_the_run(
    members: list[tuple[str, bytes]], error: type[Exception], words: str, tmp_path: Path
) -> None:
    with closing(build(stream_settings(write_shards(tmp_path, members)))) as loader, pytest.raises(error, match=words):
        next(loader.steps(0))


def test_a_run_that_resumes_counts_on_and_begins_another_order(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, pairs(range(20)), pairs(range(20, 40)))
    config = stream_settings(folder)
    with closing(build(config)) as loader:
        first = keys(list(islice(loader.steps(0), 4)))
        state = json.loads(json.dumps(loader.state(4)))
        other = {**state, "settings": {**state["settings"], "seed": "4"}}
        with pytest.raises(ValueError, match=r"seed: 4 saved, 3 now"):
            loader.resume(other)
    assert state["order_is_continued"] is False
    with closing(build(config)) as loader:
        assert loader.resume(state) is False
        assert loader.samples_before(4) == 8
        again = keys(list(islice(loader.steps(4), 4)))
        assert loader.samples_before(8) == 16
    assert again != first
    assert again[:4] != first[:4]


def test_a_run_goes_on_with_an_index_once_there_is_one(tmp_path: Path) -> None:
    index = write_synthetic(tmp_path, 11)
    config = stream_settings(tmp_path, frames=9, height=64, width=64, workers=1)
    with closing(build(config)) as loader:
        list(islice(loader.steps(0), 3))
        state = json.loads(json.dumps(loader.state(3)))
    indexed = DataConfig(path=str(index.folder), workers=0)
    buckets = build_buckets(indexed, global_batch=2, micro_batch=2, world_size=1)
    exact = VideoLoader(indexed, buckets=buckets, rank=0, world_size=1, seed=3)
    with pytest.raises(ValueError, match=r'data\.access: "stream" saved, "raw" now'):
        exact.resume(state)
    indexed.accept_changes = True
    assert exact.resume(state)
    assert exact.plan.samples_before(3) == 6
    config.accept_changes = True
    with closing(build(config)) as loader:
        assert loader.resume({**state, **exact.state(5)})
        assert loader.samples_before(5) == 10


def test_clips_to_measure_on_come_without_the_other_ranks(tmp_path: Path) -> None:
    def gather(row: list[int]) -> list[list[int]]:
        raise AssertionError("the other ranks do not take part")

    folder = write_shards(tmp_path, pairs(range(10)))
    with closing(build(stream_settings(folder), global_batch=4, world_size=2, gather=gather)) as loader:
        found = list(islice(loader.every_row(3), 15))
    assert {key for batch in found for key in batch.keys} == {f"{n:03d}" for n in range(10)}
    assert all(np.isclose(batch.weights, 1).all() for batch in found)


def test_settings_that_need_an_index_are_refused() -> None:
    config = stream_settings("x", filter="motion > 1", workers=0, image_share=0.5, buckets=TWO_SHAPES)
    faults = config.faults("data")
    assert any(fault.startswith("data.filter must not be set with data.access=stream") for fault in faults)
    assert any(fault.startswith("data.image_share must not be set") for fault in faults)
    assert any(fault.startswith("data.workers=0 must be at least 1") for fault in faults)
    assert stream_settings("x").faults("data") == []
