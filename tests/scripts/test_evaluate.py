import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from muybridge.data.mp4 import write_mp4
from muybridge.data.synthetic import FPS, HELD_OUT, TRAINED, Combination, SyntheticClip, draw_clip, render_clip
from muybridge.scripts.evaluate import ATTRIBUTES, Accuracy, evaluate_folder, main, print_scores, score
from muybridge.scripts.prompt_following import Judgement


def labels_of(combination: Combination) -> dict[str, str]:
    return {attribute: getattr(combination, attribute) for attribute in ATTRIBUTES}


def write_clips(folder: Path, clips: list[SyntheticClip]) -> dict[str, dict[str, str]]:
    """The clips as mp4s with a labels.json; returns the labels."""
    for number, clip in enumerate(clips):
        write_mp4(folder / f"{number:04d}.mp4", render_clip(clip), fps=FPS)
    labels = {f"{number:04d}": labels_of(clip.combination) for number, clip in enumerate(clips)}
    (folder / "labels.json").write_text(json.dumps(labels))
    return labels


@pytest.fixture
def clips() -> list[SyntheticClip]:
    return [draw_clip(3, "test", number) for number in range(6)]  # three held out, three seen


def judged_as(combination: Combination) -> Judgement:
    return Judgement(colour=combination.colour, shape=combination.shape, direction=combination.direction)


def test_real_clips_score_full_marks_in_both_splits(tmp_path: Path, clips: list[SyntheticClip]) -> None:
    write_clips(tmp_path, clips)
    scores = evaluate_folder(tmp_path)
    assert {split: accuracies["every"] for split, accuracies in scores.items()} == {
        "all": Accuracy(6, 6),
        "seen": Accuracy(3, 3),
        "held_out": Accuracy(3, 3),
    }


def test_the_command_writes_the_figures(
    tmp_path: Path, clips: list[SyntheticClip], capsys: pytest.CaptureFixture[str]
) -> None:
    labels = write_clips(tmp_path, clips)
    labels["0000"]["colour"] = "blue" if labels["0000"]["colour"] != "blue" else "red"
    other = tmp_path / "other.json"
    other.write_text(json.dumps(labels))
    assert (
        main(["--clips", str(tmp_path), "--labels", str(other), "--json", str(tmp_path / "out" / "scores.json")]) == 0
    )
    figures = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert figures["all"]["n"] == 6
    assert figures["all"]["colour"]["right"] == 5
    assert figures["all"]["every"]["right"] == 5
    assert figures["all"]["direction"]["accuracy"] == 1.0
    assert "direction" in capsys.readouterr().out


def test_attributes_count_on_their_own_and_together() -> None:
    wanted = Combination("red", "circle", "left")
    scores = score([(wanted, Judgement("red", "circle", "right")), (wanted, Judgement("blue", None, "left"))])["all"]
    assert {name: accuracy.right for name, accuracy in scores.items()} == {
        "colour": 1,
        "shape": 1,
        "direction": 1,
        "every": 0,
    }


def test_splits_follow_the_held_out_combinations() -> None:
    scores = score([(combination, judged_as(combination)) for combination in (*HELD_OUT, *TRAINED[:20])])
    assert scores["held_out"]["colour"].n == 12
    assert scores["seen"]["colour"].n == 20
    assert "held_out" not in score([(TRAINED[0], judged_as(TRAINED[0]))])


def test_the_interval_solves_wilsons_equation() -> None:
    # Its ends are the rates p at which the observed share lies 1.96 standard errors away.
    for right, n in [(0, 32), (1, 3), (29, 32), (32, 32)]:
        accuracy = Accuracy(right, n)
        for end in accuracy.interval:
            if 0 < end < 1:
                assert abs(accuracy.share - end) == pytest.approx(1.959964 * (end * (1 - end) / n) ** 0.5)
        assert accuracy.interval[0] <= accuracy.share <= accuracy.interval[1]


def test_the_table_shows_chance_beside_the_figures() -> None:
    console = Console(record=True, width=120, file=None, quiet=False)
    with console.capture() as captured:
        print_scores(score([(TRAINED[0], judged_as(TRAINED[0]))]), console)
    lines = [line for line in captured.get().splitlines() if "colour" in line]
    assert len(lines) == 1
    assert "100 %" in lines[0]
    assert "17 %" in lines[0]


def test_an_unreadable_clip_counts_as_wrong(
    tmp_path: Path, clips: list[SyntheticClip], capsys: pytest.CaptureFixture[str]
) -> None:
    write_clips(tmp_path, clips)
    (tmp_path / "0001.mp4").write_bytes(b"no video")
    assert evaluate_folder(tmp_path)["all"]["every"] == Accuracy(5, 6)
    assert "0001" in capsys.readouterr().err


def test_an_untrained_models_noise_scores_nothing(tmp_path: Path, clips: list[SyntheticClip]) -> None:
    write_clips(tmp_path, clips)
    random = np.random.default_rng(0)
    for path in tmp_path.glob("*.mp4"):
        write_mp4(path, random.integers(0, 256, (9, 64, 64, 3), dtype=np.uint8), fps=FPS)
    assert all(accuracy.right == 0 for accuracy in evaluate_folder(tmp_path)["all"].values())


def test_mistakes_are_named(tmp_path: Path, clips: list[SyntheticClip]) -> None:
    with pytest.raises(ValueError, match="must be a folder"):
        evaluate_folder(tmp_path / "missing")
    with pytest.raises(ValueError, match="holds no mp4 files"):
        evaluate_folder(tmp_path)
    labels = write_clips(tmp_path, clips)
    (tmp_path / "labels.json").unlink()
    with pytest.raises(ValueError, match="does not exist"):
        evaluate_folder(tmp_path)
    path = tmp_path / "labels.json"
    for content, message in [
        ("{", "not JSON"),
        ("[]", "must be an object"),
        (json.dumps({**labels, "0099": labels["0000"]}), "not in both: 0099"),
        (json.dumps({**labels, "0002": {"colour": "mauve"}}), "colour='mauve' must be one of"),
    ]:
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            evaluate_folder(tmp_path)
