import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from muybridge.scripts import pictures
from muybridge.scripts.pictures import FRAME_GAP, FRAME_HEIGHT, MARGIN, contact_sheet, loss_plot, side_by_side


def grey_clip(levels: list[int], width: int = 64) -> np.ndarray:
    """Frames of one grey level each, so that a place in the sheet tells which frame is there."""
    return np.stack([np.full((64, width, 3), level, dtype=np.uint8) for level in levels])


def read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def test_frames_stand_in_the_order_of_time_from_first_to_last(tmp_path: Path) -> None:
    contact_sheet([grey_clip(list(range(0, 180, 20)))], ["a caption"], tmp_path / "new" / "sheet.png")
    sheet = read(tmp_path / "new" / "sheet.png")
    centres = [MARGIN + place * (FRAME_HEIGHT + FRAME_GAP) + FRAME_HEIGHT // 2 for place in range(5)]
    assert [int(sheet[MARGIN + 10, x, 0]) for x in centres] == [0, 40, 80, 120, 160]


def test_the_caption_is_drawn_below_its_clip(tmp_path: Path) -> None:
    contact_sheet([grey_clip([0])] * 2, ["words below", ""], tmp_path / "sheet.png")
    below = read(tmp_path / "sheet.png")[MARGIN + FRAME_HEIGHT + 1 : MARGIN + FRAME_HEIGHT + 25]
    second = 2 * MARGIN + FRAME_HEIGHT
    assert below[:, MARGIN:second].min() < 100
    assert below[:, second:].min() == 255


def test_a_sheet_keeps_a_readable_width(tmp_path: Path) -> None:
    contact_sheet([grey_clip([0] * 9)] * 32, ["a caption"] * 32, tmp_path / "sheet.png")
    height, width, _ = read(tmp_path / "sheet.png").shape
    assert width <= pictures.SHEET_WIDTH
    assert 0.5 < height / width < 2


def test_a_long_list_is_cut(tmp_path: Path) -> None:
    sizes = []
    for count in (60, 200):
        contact_sheet([grey_clip([0] * 9)] * count, ["a caption"] * count, tmp_path / "sheet.png")
        sizes.append(read(tmp_path / "sheet.png").shape)
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("caption", ["many short words " * 20, "wordwithoutspaces" * 20, "two words", ""])
def test_captions_stay_within_their_tile(caption: str) -> None:
    font = pictures._font()
    lines = pictures._wrap(caption, 200, font, most_lines=pictures.CAPTION_LINES)
    assert 1 <= len(lines) <= pictures.CAPTION_LINES
    assert all(font.getlength(line) <= 200 for line in lines)
    is_complete = " ".join(lines) == caption.strip()
    assert is_complete or lines[-1].endswith("…")


def test_a_sheet_without_a_caption_for_each_clip_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one caption for each"):
        contact_sheet([grey_clip([0])], [], tmp_path / "sheet.png")
    with pytest.raises(ValueError, match="0 clips"):
        contact_sheet([], [], tmp_path / "sheet.png")


def write_metrics(folder: Path, rows: list[dict[str, float]], tail: str = "") -> Path:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return folder / "metrics.jsonl"


def test_loss_curves_of_interrupted_runs_are_drawn(tmp_path: Path) -> None:
    rows: list[dict[str, float]] = [{"step": s, "loss": 1 / s, "lr": 1e-3} for s in range(1, 50)]
    cut = write_metrics(tmp_path / "cut", [*rows, {"step": 50, "validation_loss": 0.02}], tail='{"step": 51, "lo')
    bare = write_metrics(tmp_path / "bare", [{"step": 1, "loss": 1.0, "lr": 0.0}])
    loss_plot({"cut": cut, "bare": bare}, tmp_path / "plots" / "loss.png")
    picture = read(tmp_path / "plots" / "loss.png")
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 10


def test_a_run_without_a_loss_is_named(tmp_path: Path) -> None:
    path = write_metrics(tmp_path / "empty", [])
    with pytest.raises(ValueError, match=r"empty/metrics\.jsonl"):
        loss_plot({"empty": path}, tmp_path / "loss.png")


def test_smoothing_keeps_a_constant_and_bridges_a_gap() -> None:
    values = np.full(300, 0.5)
    values[100] = np.nan
    np.testing.assert_allclose(pictures.smoothed(values), 0.5)
    noisy = np.random.default_rng(0).normal(0, 1, 3000)
    assert pictures.smoothed(noisy)[100:].std() < 0.2


def test_original_and_reconstruction_stand_side_by_side() -> None:
    pair = side_by_side(grey_clip([10, 20]), grey_clip([30, 40]))
    assert pair.shape == (2, 64, 132, 3)
    assert (pair[1, 0, 0, 0], pair[1, 0, -1, 0]) == (20, 40)
    with pytest.raises(ValueError, match="same shape"):
        side_by_side(grey_clip([1]), grey_clip([1, 2]))
