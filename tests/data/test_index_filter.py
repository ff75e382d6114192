"""Rows are chosen by comparisons of columns, and by nothing that could run as code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from muybridge.data.index import Clip, ClipIndex
from muybridge.data.row_filter import expression_fault, select_rows
from muybridge.data.shards import DatasetWriter


def write(folder: Path, clips: list[Clip]) -> ClipIndex:
    with DatasetWriter(folder, kind="raw", description={}, shard_bytes=2) as writer:
        for clip in clips:
            writer.add(clip, b"x", extension="mp4")
        return writer.close()


def make_clip(n: int, **values: object) -> Clip:
    known: dict[str, object] = {
        "frames": 10 * n + 1,
        "fps_numerator": 30000,
        "fps_denominator": 1001,
        "duration_seconds": float(n),
        "width": 100 + n,
        "height": 100,
        "seekable": True,
        "luma": 10.0 * n,
        "sharpness": 2.0,
        "motion": 0.5,
        "is_hdr": n % 2 == 0,
        "is_image": n == 0,
    }
    return Clip(key=f"k{n}", caption="c", **{**known, **values})


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ClipIndex:
    return write(tmp_path_factory.mktemp("filter"), [make_clip(n) for n in range(6)])


@pytest.mark.parametrize(
    ("expression", "rows"),
    [
        ("", [0, 1, 2, 3, 4, 5]),
        ("luma > 20", [3, 4, 5]),
        ("luma >= 20 and not is_hdr", [3, 5]),
        ("is_image or duration_seconds >= 5", [0, 5]),
        ("10 < luma <= 30", [2, 3]),
        ("not (luma < 20 or luma > 40)", [2, 3, 4]),
        ("frames == 21", [2]),
        ("frames != 21 and aspect < 1.03", [0, 1]),
        ("29.9 < fps < 30", [0, 1, 2, 3, 4, 5]),
        ("width > height", [1, 2, 3, 4, 5]),
        ("luma > -1.5e1", [0, 1, 2, 3, 4, 5]),
        ("duration_seconds > 100", []),
        ("1 > 2", []),
        ("  is_hdr  ", [0, 2, 4]),
    ],
)
def test_expressions_choose_rows(index: ClipIndex, expression: str, rows: list[int]) -> None:
    chosen = select_rows(index, expression)
    assert chosen.dtype == np.int64
    assert chosen.tolist() == rows
    assert expression_fault(expression) is None


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("luma >", "is no filter .it cannot be parsed.: write comparisons"),
        ("lumma > 3", "there is no column lumma; did you mean luma"),
        ("beauty > 3", "there is no column beauty; columns are size, frames"),
        ("luma", "luma is a number; compare it"),
        ("is_hdr == 1", "is_hdr is true or false; write `is_hdr` or `not is_hdr`"),
        ("luma + 3 > 4", "`luma \\+ 3` is not allowed"),
        ("__import__('os').system('true')", "is not allowed"),
        ("(lambda: 1)() > 2", "is not allowed"),
        ("luma.__class__ > 2", "is not allowed"),
        ("[luma for luma in (1, 2)] > 2", "is not allowed"),
        ("luma in (1, 2)", "is not allowed"),
        ("luma is 3", "is not allowed"),
        ("key == 'a'", "there is no column key"),
        ("luma > True", "`True` is not allowed"),
        ("luma > 1j", "is not allowed"),
        ("(x := 3) > 2", "is not allowed"),
        ("luma > 1" + "0" * 400, "a number is too large"),
        ("is_hdr or " * 300 + "is_hdr", "has 3006 characters, more than 2000"),
        ("luma > 1; luma", "is no filter"),
    ],
)
def test_anything_else_is_refused(index: ClipIndex, expression: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        select_rows(index, expression)
    assert "data.filter" in str(caught.value)
    assert expression_fault(expression) == str(caught.value)  # without an index


def test_what_was_not_measured_is_said(tmp_path: Path) -> None:
    index = write(tmp_path, [make_clip(0), make_clip(1, luma=None)])
    with pytest.raises(ValueError, match=r"luma was not measured for 1 of 2 clips of .*; measure it with --quality"):
        select_rows(index, "luma > 0", field="data.datasets.a.filter")
    assert select_rows(index, "motion > 0").tolist() == [0, 1]


def test_deep_expressions_never_crash(index: ClipIndex) -> None:
    for expression in ("not " * 490 + "is_hdr", "(" * 900 + "is_hdr" + ")" * 900):
        try:
            rows = select_rows(index, expression).tolist()
        except ValueError as error:
            said = str(error)
        else:
            assert rows == [0, 2, 4]
            continue
        assert "nested too deeply" in said or "cannot be parsed" in said
