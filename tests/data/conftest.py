"""Videos whose frames carry their number, a small synthetic dataset, and the real clips where they are."""

from __future__ import annotations

import shutil
import tempfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from muybridge.data import worker
from muybridge.data.index import Clip, ClipIndex
from muybridge.data.shards import DatasetWriter, json_labels, shard_key
from muybridge.tests.usual_priority import usual_priority


class NumberedVideos:
    """Videos of 96x64 pixels whose frames show their number as bright bars, least significant bit first."""

    bits = 6

    def frame(self, number: int) -> np.ndarray:
        """A frame uint8 [64, 96, 3] with its number in the upper half."""
        frame = np.full((64, 96, 3), 16, dtype=np.uint8)
        for bit in range(self.bits):
            if number >> bit & 1:
                frame[:32, bit * 16 : (bit + 1) * 16] = 235
        return frame

    def read(self, frames: np.ndarray) -> list[int]:
        """The numbers of frames uint8 [T, 64, 96, 3]."""
        bars = frames[:, 8:24].reshape(len(frames), 16, self.bits, 16, 3)[:, :, :, 4:12].mean((1, 3, 4))  # [T, bits]
        return [sum(1 << bit for bit, level in enumerate(levels) if level > 128) for levels in bars]

    def encode(
        self,
        times_ms: list[int],
        *,
        codec: str = "libx264",
        container: str = "mp4",
        options: dict[str, str] | None = None,
        header_first: bool = False,
    ) -> bytes:
        """A video with frame i shown from times_ms[i] on; `header_first` as mp4 files for the web have it."""
        av = pytest.importorskip("av", reason="PyAV writes the test videos")
        path = Path(tempfile.mkdtemp()) / "video"  # FFmpeg moves the header to the front of named files only
        layout = {"movflags": "faststart"} if header_first else {}
        with usual_priority(), av.open(str(path), mode="w", format=container, options=layout) as out:
            stream = out.add_stream(codec, rate=25, options=options or {})
            stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
            stream.codec_context.time_base = Fraction(1, 1000)
            stream.codec_context.thread_count = 1
            for number, time in enumerate(times_ms):
                frame = av.VideoFrame.from_ndarray(self.frame(number), format="rgb24")
                frame.pts, frame.time_base = time, Fraction(1, 1000)
                out.mux(stream.encode(frame))
            out.mux(stream.encode())
        data = path.read_bytes()
        shutil.rmtree(path.parent)
        return data


@pytest.fixture(scope="session")
def numbered() -> NumberedVideos:
    """Makes and reads videos whose frames carry their number."""
    return NumberedVideos()


def write_synthetic(folder: Path, clips: int, *, split: str = "train") -> ClipIndex:
    """A synthetic dataset, rendered in this process."""
    with DatasetWriter(folder, kind="raw", description={"source": "test"}, shard_bytes=10_000) as writer:
        for number in range(clips):
            info, mp4 = worker.synthesize(0, split, number)
            labels = info.pop("labels")
            writer.add(Clip(key=shard_key(number, "clip"), labels=json_labels(labels), **info), mp4, extension="mp4")
        return writer.close()


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> ClipIndex:
    """Eleven synthetic clips in several shards: a number that no batch size divides."""
    return write_synthetic(tmp_path_factory.mktemp("dataset") / "train", 11)


@pytest.fixture(scope="session")
def real_clips() -> Path:
    """The folder of real clips that lies beside a checkout in our own workplace."""
    folder = Path(__file__).resolve().parents[3] / "shared" / "real_clips"
    if not folder.is_dir():
        pytest.skip("the real clips are not beside this checkout (../shared/real_clips)")
    return folder
