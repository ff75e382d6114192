"""Pictures of clips and of what a run did: contact sheets, captioned grids, loss curves, originals beside reconstructions."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..train.json_lines import read_json_lines

# Lengths in pixels of the contact sheet.
SHEET_WIDTH = 1800  # at most, unless one column is wider
FRAME_HEIGHT = 96
FRAME_GAP = 3
CAPTION_GAP = 6
ROW_GAP = 18
MARGIN = 28
FONT_SIZE = 15
LINE_HEIGHT = 22
CAPTION_LINES = 2
MAX_CLIPS = 60  # nobody looks at more at once, and viewers refuse very tall pictures
# And of the grid of clips.
GRID_WIDTH = 1700  # at most, unless one column is wider
GRID_COLUMNS = 4
TILE_SIDES = (256, 512)  # the longer side of a clip as it is shown is between these
GRID_CAPTION_LINES = 9
PAPER, INK, FAINT_INK = (255, 255, 255), (32, 36, 44), (120, 126, 138)

Font = ImageFont.FreeTypeFont


def contact_sheet(
    clips: Sequence[np.ndarray], captions: Sequence[str], path: str | Path, *, frames_per_clip: int = 5
) -> None:
    """Write a PNG of clips, each uint8 [T, H, W, 3]: frames in the order of time, the caption below; 60 clips at most.

    Raises ValueError where clips and captions are not equally many, or there are none.
    """
    if not clips or len(clips) != len(captions):
        raise ValueError(f"a contact sheet of {len(clips)} clips needs one caption for each, not {len(captions)}")
    strips = [_strip(clip, frames_per_clip) for clip in clips[:MAX_CLIPS]]
    tile_width = max(strip.width for strip in strips)
    font = _font()
    texts = [_wrap(caption, tile_width, font, most_lines=CAPTION_LINES) for caption in captions[:MAX_CLIPS]]
    row_height = FRAME_HEIGHT + CAPTION_GAP + LINE_HEIGHT * max(map(len, texts)) + ROW_GAP
    columns = min(len(strips), max(1, SHEET_WIDTH // (tile_width + MARGIN)))
    rows = -(-len(strips) // columns)
    footer_top = MARGIN + rows * row_height
    sheet = Image.new("RGB", (MARGIN + columns * (tile_width + MARGIN), footer_top + LINE_HEIGHT + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    for place, (strip, lines) in enumerate(zip(strips, texts, strict=True)):
        row, column = divmod(place, columns)
        left, top = MARGIN + column * (tile_width + MARGIN), MARGIN + row * row_height
        sheet.paste(strip, (left, top))
        for number, line in enumerate(lines):
            draw.text((left, top + FRAME_HEIGHT + CAPTION_GAP + number * LINE_HEIGHT), line, fill=INK, font=font)
    left_out = f"; the first {len(strips)} of {len(clips)} clips" if len(clips) > len(strips) else ""
    draw.text((MARGIN, footer_top), f"time runs from left to right{left_out}", fill=FAINT_INK, font=font)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, format="PNG", optimize=True)


def _font() -> Font:
    # matplotlib's, as Pillow's own has no letters but those of English.
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", FONT_SIZE)


def _strip(clip: np.ndarray, count: int) -> Image.Image:
    """`count` frames of a clip, evenly spread from the first to the last, side by side."""
    times = np.unique(np.linspace(0, len(clip) - 1, count).round().astype(int))
    height, width = clip.shape[1:3]
    size = (max(1, round(width * FRAME_HEIGHT / height)), FRAME_HEIGHT)
    strip = Image.new("RGB", (len(times) * (size[0] + FRAME_GAP) - FRAME_GAP, FRAME_HEIGHT), PAPER)
    for place, time in enumerate(times):
        frame = Image.fromarray(clip[time]).resize(size, Image.Resampling.LANCZOS)
        strip.paste(frame, (place * (size[0] + FRAME_GAP), 0))
    return strip


def _wrap(caption: str, width: int, font: Font, *, most_lines: int) -> list[str]:
    """The caption on at most so many lines, cut with an ellipsis where they do not suffice."""
    lines: list[str] = [""]
    for word in caption.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    shown = lines[:most_lines]
    is_cut = len(lines) > most_lines
    for number, line in enumerate(shown):
        is_last = is_cut and number == most_lines - 1
        text = line
        while text and font.getlength(text + ("…" if is_last or text != line else "")) > width:
            text = text[:-1]
        shown[number] = text + ("…" if is_last or text != line else "")
    return shown


def captioned_grid(
    clips: np.ndarray, captions: Sequence[str], labels: Sequence[str], *, title: str, columns: int = GRID_COLUMNS
) -> np.ndarray:
    """Clips uint8 [B, T, H, W, 3] side by side as one uint8 [T, H', W', 3]: label and caption below each, even sides as mp4 needs.

    Small clips are shown larger, pixel by pixel, and large ones smaller.
    """
    height, width = clips.shape[2:4]
    size = _shown_size(height, width)
    font = _font()
    tile_width = max(size[0], TILE_SIDES[0])  # narrower, a caption would have a word a line
    texts = [_wrap(caption, tile_width, font, most_lines=GRID_CAPTION_LINES) for caption in captions]
    tile_height = size[1] + CAPTION_GAP + LINE_HEIGHT * (1 + max(map(len, texts))) + ROW_GAP
    columns = max(1, min(len(clips), columns, GRID_WIDTH // (tile_width + MARGIN)))
    rows = -(-len(clips) // columns)
    top = MARGIN + LINE_HEIGHT + CAPTION_GAP
    grid_width, grid_height = MARGIN + columns * (tile_width + MARGIN), top + rows * tile_height
    page = Image.new("RGB", (grid_width + grid_width % 2, grid_height + grid_height % 2), PAPER)
    draw = ImageDraw.Draw(page)
    [title] = _wrap(title, grid_width - 2 * MARGIN, font, most_lines=1)
    draw.text((MARGIN, MARGIN // 2), title, fill=INK, font=font)
    places = [
        (MARGIN + number % columns * (tile_width + MARGIN), top + number // columns * tile_height)
        for number in range(len(clips))
    ]
    for (left, upper), label, lines in zip(places, labels, texts, strict=True):
        below = upper + size[1] + CAPTION_GAP
        [label] = _wrap(label, tile_width, font, most_lines=1)
        draw.text((left, below), label, fill=FAINT_INK, font=font)
        for number, line in enumerate(lines, start=1):
            draw.text((left, below + number * LINE_HEIGHT), line, fill=INK, font=font)
    grid = np.repeat(np.asarray(page)[None], clips.shape[1], axis=0)
    sampling = Image.Resampling.NEAREST if size[0] > width else Image.Resampling.LANCZOS
    for clip, (left, upper) in zip(clips, places, strict=True):
        for frame, target in zip(clip, grid):
            shown = frame if size == (width, height) else np.asarray(Image.fromarray(frame).resize(size, sampling))
            target[upper : upper + size[1], left : left + size[0]] = shown
    return grid


def _shown_size(height: int, width: int) -> tuple[int, int]:
    """Width and height of a clip in the grid: a whole multiple of a small one, so that its pixels can be seen."""
    side, (least, most) = max(height, width), TILE_SIDES
    scale = -(-least // side) if side < least else min(1.0, most / side)
    return round(width * scale), round(height * scale)


def loss_plot(runs: Mapping[str, Path], path: str | Path) -> None:
    """Write a PNG with the loss (each row, smoothed, and on validation clips) and the learning rate of one or more runs.

    `runs` maps the name that the legend shows to the run's metrics.jsonl. Raises ValueError for a file without a loss.
    """
    # Drawing on a figure of our own leaves a notebook's or user's choice of backend alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), dpi=130, layout="constrained")
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    several = len(runs) > 1
    smallest, largest = np.inf, 0.0
    for number, (name, metrics_path) in enumerate(runs.items()):
        rows = read_json_lines(metrics_path)
        colour = f"C{number}"
        prefix = f"{name}: " if several else ""
        steps, loss = metric_column(rows, "loss")
        if not len(steps):
            raise ValueError(f"{metrics_path} has no row with a loss")
        smooth = smoothed(loss)
        losses.plot(steps, loss, color=colour, alpha=0.22, linewidth=0.8)
        losses.plot(steps, smooth, color=colour, linewidth=1.8, label=f"{prefix}training (smoothed)")
        validation_steps, validation = metric_column(rows, "validation_loss")
        if len(validation):
            style = {"color": colour if several else "C1", "linewidth": 1.2, "marker": "o", "markersize": 4}
            losses.plot(validation_steps, validation, linestyle="--", label=f"{prefix}validation", **style)
        rates.plot(*metric_column(rows, "lr"), color=colour, linewidth=1.5)
        values = np.concatenate([smooth, validation])
        values = values[np.isfinite(values) & (values > 0)]
        smallest, largest = min(smallest, values.min(initial=np.inf)), max(largest, values.max(initial=0.0))
    if largest > 5 * smallest:
        losses.set_yscale("log")
    losses.set_ylabel("loss")
    losses.legend(frameon=False)
    rates.set_ylabel("learning rate")
    rates.set_xlabel("step")
    rates.set_ylim(bottom=0)
    rates.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    for axes in (losses, rates):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(path))


def metric_column(rows: Sequence[dict[str, float]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the rows that have a value."""
    pairs = [(row["step"], row[name]) for row in rows if name in row]
    steps, values = zip(*pairs, strict=True) if pairs else ((), ())
    return np.asarray(steps, dtype=float), np.asarray(values, dtype=float)


def smoothed(values: np.ndarray) -> np.ndarray:
    """Exponential average over about a thirtieth of the curve, corrected at its start as in Adam."""
    keep = 1 - 1 / max(1.0, len(values) / 30)
    average, weight, result = 0.0, 0.0, []
    for value in values:
        if np.isfinite(value):
            average, weight = keep * average + (1 - keep) * value, keep * weight + 1 - keep
        result.append(average / weight if weight else np.nan)
    return np.asarray(result)


def side_by_side(original: np.ndarray, reconstruction: np.ndarray, *, gap: int = 4) -> np.ndarray:
    """Two clips uint8 [T, H, W, 3] as one [T, H, 2 W + gap, 3], the original on the left, light grey between."""
    if original.shape != reconstruction.shape:
        raise ValueError(
            f"original {original.shape} and reconstruction {reconstruction.shape} must have the same shape"
        )
    frames, height = original.shape[:2]
    divider = np.full((frames, height, gap, 3), 200, dtype=np.uint8)
    return np.concatenate([original, divider, reconstruction], axis=2)
