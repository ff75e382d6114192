"""`muybridge evaluate`: how often clips of coloured shapes show what they should, judged from the pixels of the mp4s.

The clips are generated ones, a folder of mp4s with a labels.json, or real ones, a folder that `muybridge prepare synthetic` wrote.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ..data.decode import DecodeError, Decoder, frame_times, probe, read_frames_with_fallback
from ..data.index import MANIFEST_NAME, ClipIndex
from ..data.synthetic import HELD_OUT, Combination
from .prompt_following import HUES, SHAPES, Judgement, judge_clip

ATTRIBUTES = {"colour": tuple(HUES), "shape": SHAPES, "direction": ("left", "right", "up", "down")}
LABELS_NAME = "labels.json"


@dataclass(frozen=True)
class Accuracy:
    """A share of right answers."""

    right: int
    n: int

    @property
    def share(self) -> float:
        return self.right / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval (E. B. Wilson, 1927), which stays inside [0, 1] and is fair to few clips."""
        z = 1.959964
        centre = (self.share + z**2 / (2 * self.n)) / (1 + z**2 / self.n)
        half = z / (1 + z**2 / self.n) * math.sqrt(self.share * (1 - self.share) / self.n + z**2 / (4 * self.n**2))
        # At 0 and at n right answers an end of the interval is exactly 0 or 1, which rounding would miss.
        return max(0.0, centre - half) if self.right else 0.0, min(1.0, centre + half) if self.right < self.n else 1.0


# Split ("all", "seen", "held_out"; the empty ones are left out) -> attribute, or "every" for all three at once -> accuracy.
Scores = dict[str, dict[str, Accuracy]]


def main(argv: list[str]) -> int:
    """Run the command and return its exit code. Raises ValueError for clips and labels that do not fit together."""
    parser = argparse.ArgumentParser(prog="muybridge evaluate", description=__doc__.split("\n\n")[0])
    parser.add_argument("--clips", type=Path, required=True, help="folder of mp4s, or a prepared synthetic dataset")
    parser.add_argument(
        "--labels",
        type=Path,
        help='JSON of what the mp4s should show: {"NAME": {"colour": "red", "shape": "circle", "direction": "left"}, ...} '
        f"where NAME.mp4 is the file; CLIPS/{LABELS_NAME} if not given",
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    options = parser.parse_args(argv)
    scores = evaluate_folder(options.clips, options.labels)
    print_scores(scores)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(scores_to_json(scores), indent=2) + "\n", encoding="utf-8")
    return 0


def evaluate_folder(clips: Path, labels: Path | None = None) -> Scores:
    """Judge every clip of a folder of mp4s or of a prepared dataset; unreadable ones count as wrong and go to stderr.

    Raises ValueError if there are no clips, or clips and labels do not match one to one.
    """
    if not clips.is_dir():
        raise ValueError(f"--clips={clips} must be a folder")
    if labels is None and (clips / MANIFEST_NAME).is_file():
        named_videos = _dataset_clips(clips)
    else:
        named_videos = _mp4_clips(clips, labels or clips / LABELS_NAME)
    return score((wanted, _judge_video(name, video)) for name, video, wanted in named_videos)


def score(judged: Iterable[tuple[Combination, Judgement]]) -> Scores:
    """Accuracies over pairs of what a clip should show and what it was judged to show."""
    judged = list(judged)
    splits = {
        "all": judged,
        "seen": [pair for pair in judged if pair[0] not in HELD_OUT],
        "held_out": [pair for pair in judged if pair[0] in HELD_OUT],
    }
    scores: Scores = {}
    for split, pairs in splits.items():
        if not pairs:
            continue
        hits = [[getattr(seen, name) == getattr(wanted, name) for name in ATTRIBUTES] for wanted, seen in pairs]
        columns = dict(zip(ATTRIBUTES, zip(*hits, strict=True), strict=True))
        columns["every"] = tuple(all(hit) for hit in hits)
        scores[split] = {name: Accuracy(right=sum(column), n=len(pairs)) for name, column in columns.items()}
    return scores


def scores_to_json(scores: Scores) -> dict[str, Any]:
    """Plain numbers: split -> {"n", attribute: {"accuracy", "right", "low", "high"}}, the interval as low and high."""
    return {
        split: {"n": accuracies["every"].n}
        | {
            name: {"accuracy": a.share, "right": a.right, "low": a.interval[0], "high": a.interval[1]}
            for name, a in accuracies.items()
        }
        for split, accuracies in scores.items()
    }


def print_scores(scores: Scores, console: Console | None = None) -> None:
    """A table with a row an attribute and a column a split, chance level beside them."""
    table = Table(title="Clips that show what they should", caption="in brackets: 95 % interval")
    table.add_column("attribute")
    for split, accuracies in scores.items():
        table.add_column(f"{split.replace('_', ' ')} (n={accuracies['every'].n})", justify="right")
    table.add_column("chance", justify="right")
    chances = {name: 1 / len(values) for name, values in ATTRIBUTES.items()}
    chances["every"] = math.prod(chances.values())
    for name, chance in chances.items():
        cells = (
            f"{_percent(a.share)} % [{_percent(a.interval[0])}, {_percent(a.interval[1])}]" for a in _row(scores, name)
        )
        table.add_row("all three" if name == "every" else name, *cells, f"{_percent(chance)} %")
    (console or Console()).print(table)


def _row(scores: Scores, attribute: str) -> Iterator[Accuracy]:
    return (accuracies[attribute] for accuracies in scores.values())


def _percent(share: float) -> str:
    return f"{100 * share:.0f}"


def parse_labels(labels: dict[str, Any], name: str) -> Combination:
    """What the clip `name` should show. Raises ValueError for a missing or unknown attribute."""
    faults = [
        f"{name}: {attribute}={labels.get(attribute)!r} must be one of {', '.join(values)}"
        for attribute, values in ATTRIBUTES.items()
        if labels.get(attribute) not in values
    ]
    if faults:
        raise ValueError("\n".join(faults))
    return Combination(**{attribute: labels[attribute] for attribute in ATTRIBUTES})


def _dataset_clips(folder: Path) -> Iterator[tuple[str, bytes, Combination]]:
    index = ClipIndex.open(folder, field="--clips")
    if not len(index):
        raise ValueError(f"--clips={folder} holds no clips")
    for row in range(len(index)):
        clip = index.clip(row)
        with index.shards[clip.shard].open("rb") as shard:
            shard.seek(clip.offset)
            video = shard.read(clip.size)
        yield clip.key, video, parse_labels(clip.label_values, f"--clips={folder}: {clip.key}")


def _mp4_clips(folder: Path, labels_path: Path) -> Iterator[tuple[str, bytes, Combination]]:
    files = {path.stem: path for path in sorted(folder.glob("*.mp4"))}
    if not files:
        raise ValueError(f"--clips={folder} holds no mp4 files and is no prepared dataset")
    try:
        labels = json.loads(labels_path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"--labels={labels_path} does not exist; it says what each mp4 should show") from None
    except ValueError as error:
        raise ValueError(f"--labels={labels_path} is not JSON: {error}") from None
    if not isinstance(labels, dict) or not all(isinstance(value, dict) for value in labels.values()):
        raise ValueError(f'--labels={labels_path} must be an object such as {{"NAME": {{"colour": "red", ...}}}}')
    if labels.keys() != files.keys():
        odd = ", ".join(sorted(labels.keys() ^ files.keys())[:5])
        raise ValueError(
            f"--labels={labels_path} and the mp4s of {folder} must name the same clips; not in both: {odd}"
        )
    wanted = {name: parse_labels(labels[name], f"--labels={labels_path}: {name}") for name in files}
    for name, path in files.items():
        yield name, path.read_bytes(), wanted[name]


def _judge_video(name: str, video: bytes) -> Judgement:
    try:
        return judge_clip(read_all_frames(video))
    except DecodeError as error:
        print(f"muybridge: {name} cannot be read and counts as wrong: {error}", file=sys.stderr)
        return Judgement(colour=None, shape=None, direction=None)


def read_all_frames(video: bytes) -> np.ndarray:
    """Every frame of a short video of constant rate, uint8 [T, H, W, 3]. Raises DecodeError."""
    info = probe(video)
    times = frame_times(info.frames, fps=info.fps_numerator / info.fps_denominator)
    return read_frames_with_fallback(video, times, decoder=Decoder.decord, seekable=info.seekable)[0]
