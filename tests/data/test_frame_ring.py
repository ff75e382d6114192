"""The frame ring holds what a pipe would have brought, is checked against the memory that is there, and leaves nothing behind."""

from __future__ import annotations

import gc
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from muybridge.data import frame_ring
from muybridge.data.decode import Decoder, frame_times, has_decoder
from muybridge.data.frame_ring import FrameRing, Spot, available_memory
from muybridge.data.workers import WorkerPool

GIB = 2**30


def request(decoder: Decoder = Decoder.pyav, *, frames: int = 5, height: int = 32, width: int = 48) -> dict[str, Any]:
    return {
        "times_seconds": frame_times(frames, fps=10),
        "seekable": True,
        "decoder": decoder.value,
        "height": height,
        "width": width,
        "crop_x": 0.3,
        "crop_y": 0.5,
    }


@pytest.fixture(scope="module")
def ring() -> Iterator[FrameRing]:
    ring = FrameRing(2, 200_000)
    yield ring
    ring.close()


@pytest.fixture(scope="module")
def pool(ring: FrameRing) -> Iterator[WorkerPool]:
    with WorkerPool(1, timeout_seconds=60.0, ring=ring) as pool:
        yield pool


@pytest.fixture(scope="module")
def video(numbered: Any) -> bytes:
    return numbered.encode([40 * i for i in range(25)], options={"crf": "10"})


@pytest.mark.parametrize("decoder", list(Decoder))
@pytest.mark.parametrize(("height", "width"), [(32, 48), (64, 96), (40, 40)])  # resized, as the file is, cropped
def test_the_ring_holds_what_a_pipe_brings(
    ring: FrameRing, pool: WorkerPool, video: bytes, decoder: Decoder, height: int, width: int
) -> None:
    if not has_decoder(decoder):
        pytest.skip(f"{decoder} is not installed")
    asked = request(decoder, height=height, width=width)
    place = ring.acquire()
    assert place is not None
    spot = Spot(place, 1000, (5, height, width, 3))
    ring.view(spot)[:] = 77
    by_pipe, payload = pool.submit("decode_clip", data=video, **asked).result()
    by_ring, nothing = pool.submit("decode_clip", data=video, out=spot, **asked).result()
    assert by_ring == by_pipe
    assert not nothing
    assert np.array_equal(ring.view(spot), np.frombuffer(payload, np.uint8).reshape(spot.shape))
    assert ring.view(spot).std() > 10  # not 77 any more
    ring.release(place)


def test_a_still_image_is_a_clip_of_one_frame(ring: FrameRing, pool: WorkerPool) -> None:
    file = io.BytesIO()
    Image.fromarray(np.full((32, 48, 3), (10, 20, 30), dtype=np.uint8)).save(file, "png")
    place = ring.acquire()
    assert place is not None
    spot = Spot(place, 0, (1, 32, 48, 3))
    pool.submit("decode_clip", data=file.getvalue(), out=spot, **request(frames=1)).result()
    assert np.array_equal(ring.view(spot)[0, 5, 7], [10, 20, 30])
    ring.release(place)


def test_a_clip_of_another_shape_than_its_spot_is_a_bug(ring: FrameRing, pool: WorkerPool, video: bytes) -> None:
    place = ring.acquire()
    assert place is not None
    around = ring.view(Spot(place, 0, (6, 32, 48, 3)))
    around[:] = 77
    with pytest.raises(RuntimeError, match=r"out of shape \(4, 32, 48, 3\) must have the shape \(5, 32, 48, 3\)"):
        pool.submit("decode_clip", data=video, out=Spot(place, 0, (4, 32, 48, 3)), **request()).result()
    assert (around == 77).all()
    ring.release(place)


def test_places_are_handed_out_once_and_come_back() -> None:
    ring = FrameRing(3, 10_000)
    places = [ring.acquire() for _ in range(3)]
    assert sorted(place for place in places if place is not None) == [0, 1, 2]
    assert ring.acquire() is None
    ring.release(1)
    assert ring.acquire() == 1
    ring.release(2)
    with pytest.raises(AssertionError, match="place 2 is not in use"):
        ring.release(2)
    ring.close()


def test_spots_do_not_touch_each_other() -> None:
    ring = FrameRing(2, 3 * 5000)
    assert ring.acquire() == 0
    spots = [Spot(place, offset, (1, 40, 40, 3)) for place in (0, 1) for offset in (0, 4800, 9600)]
    for number, spot in enumerate(spots):
        ring.view(spot)[:] = number
    assert (
        [int(ring.view(spot).min()) for spot in spots] == [int(ring.view(spot).max()) for spot in spots] == [*range(6)]
    )
    with pytest.raises(AssertionError, match="exceeds a place"):
        ring.start(Spot(0, ring.place_bytes - 4799, (1, 40, 40, 3)))
    ring.close()


def test_memory_is_taken_at_the_first_use_and_given_back() -> None:
    gc.collect()  # files that earlier tests left to it
    before = os.listdir("/proc/self/fd")
    ring = FrameRing(2, 1_000_000)
    assert os.fstat(ring.file).st_blocks == 0
    ring.acquire()
    assert os.fstat(ring.file).st_blocks * 512 >= 2_000_000
    view = ring.view(Spot(0, 0, (1, 10, 10, 3)))
    view[:] = 5
    ring.close()
    ring.close()
    assert (view == 5).all()  # who still holds frames may go on
    del view
    assert os.listdir("/proc/self/fd") == before


def test_what_does_not_fit_is_refused_with_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(frame_ring, "available_memory", lambda: 40 * GIB)
    gc.collect()  # files that earlier tests left to it
    before = os.listdir("/proc/self/fd")
    with pytest.raises(ValueError) as caught:
        FrameRing(3, 2 * GIB)
    for part in (
        "48.0 GiB",
        "8 processes",
        "3 steps",
        "2.00 GiB a step",
        "40.0 GiB",
        "data.prefetch",
        "data.workers=0",
    ):
        assert part in str(caught.value)
    assert os.listdir("/proc/self/fd") == before
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "5")  # 30 of 40 GiB
    FrameRing(3, 2 * GIB).close()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "6")  # 36 of 40 GiB would leave too little for the rest
    with pytest.raises(ValueError, match=re.escape("more than 80% of the 40.0 GiB")):
        FrameRing(3, 2 * GIB)


@pytest.mark.parametrize("is_second_version", [True, False])
def test_a_container_has_the_memory_of_its_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_second_version: bool
) -> None:
    limit, usage, prefix = (
        ("memory.max", "memory.current", "")
        if is_second_version
        else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
    )
    root = tmp_path if is_second_version else tmp_path / "memory"

    def write(group: Path, limit_text: str, used: int, cache: int) -> None:
        group.mkdir(parents=True, exist_ok=True)
        (group / limit).write_text(f"{limit_text}\n")
        (group / usage).write_text(f"{used}\n")
        (group / "memory.stat").write_text(f"anon 1\n{prefix}active_file {cache}\n{prefix}inactive_file {cache}\n")

    own = tmp_path / "own"
    monkeypatch.setattr(frame_ring, "_CGROUPS", tmp_path)
    monkeypatch.setattr(frame_ring, "_OWN_CGROUPS", own)
    monkeypatch.setattr(frame_ring.psutil, "virtual_memory", lambda: type("", (), {"available": 10**12}))
    assert available_memory() == 10**12  # no groups at all
    own.write_text("0::/job/step\n" if is_second_version else "7:cpu:/\n4:hugetlb,memory:/job/step\n0::/\n")
    assert available_memory() == 10**12  # a group that cannot be seen from here
    write(root / "job" / "step", "max" if is_second_version else str(2**63 - 4096), 10**9, 0)
    assert available_memory() == 10**12  # no limit
    write(root / "job", str(9 * 10**9), 4 * 10**9, 10**9)
    assert available_memory() == 7 * 10**9  # the limit is on the group above; the cache of files counts as free
    write(root, str(2 * 10**9), 3 * 10**9, 0)
    assert available_memory() == 0
