"""Training whose data change on the way: refused by name, unless it is wanted; what did not change goes on where it was."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from muybridge.data.index import ClipIndex
from muybridge.tests.conftest import Command
from muybridge.tests.end_to_end.clip_folders import cut, picture, video, write_folder

BUCKETS = "data.buckets=[{frames:9,height:32,width:32},{frames:5,height:32,width:32},{frames:1,height:32,width:32}]"
CHANGED_AT = 6  # step

REFUSALS = {
    "weight": ("data.datasets.moving.weight: 2.0 saved, 3.0 now", ["data.datasets.moving.weight=3"]),
    "filter": (
        'data.datasets.mixed.filter: null saved, "is_image" now',
        ["data.datasets.mixed.filter=is_image"],
    ),
    "content": ("data.datasets.mixed (content): ", ["data.datasets.mixed.path=OTHERS"]),
    "buckets": ("data.transform: ", [BUCKETS.replace("frames:5,height:32,width:32", "frames:5,height:32,width:48")]),
    "keep": ("data.transform: ", [BUCKETS.replace("{frames:9,", "{frames:9,keep:0.5,")]),
    "image share": ("data.image_share: null saved, 0.5 now", ["data.image_share=0.5"]),
    "another dataset": ("data.datasets.more (content): absent saved", ["+data.datasets.more.path=OTHERS"]),
    "batches": ("global batches: ", [f"{BUCKETS}", "data.frames=5"]),
}


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_run: list[str],
    launch: Command,
) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    """A folder of datasets and runs, and what became of the runs on each rank."""
    root = tmp_path_factory.mktemp("runs")
    write_folder(root / "moving", [video(n, 13 if n % 2 else 7) for n in range(13)])
    for name, first in (("mixed", 0), ("others", 1)):
        media = [picture(n) if n < 7 else video(n, 7) for n in range(first, first + 10)]
        write_folder(root / name, media, damage={2: cut} if name == "mixed" else {})
    common = [
        *(*tiny_run, f"run_dir={root / 'run'}", "data.path=", "data.access=raw", BUCKETS, "data.workers=0"),
        f"data.datasets={{moving:{{path:{root / 'moving'},weight:2}},mixed:{{path:{root / 'mixed'}}}}}",
        *("data.frames=9", "data.height=32", "data.width=32", "global_batch=5", "micro_batch=2"),
        "deepspeed.precision=fp32",
    ]
    others = f"data.datasets.mixed.path={root / 'others'}"
    plans = {
        2: {
            "begun": ["deepspeed=zero2", f"steps={CHANGED_AT}"],
            **{
                name: [text.replace("OTHERS", str(root / "others")) for text in change]
                for name, (_, change) in REFUSALS.items()
            },
            "accepted": ["deepspeed=zero1", others, "data.accept_changes=true", "steps=12"],
        },
        1: {"after": ["deepspeed=zero1", others, "steps=18"], "back": ["deepspeed=zero1", "steps=24"]},
    }
    found: dict[str, list[dict[str, Any]]] = {}
    for world, plan in plans.items():
        planned = [
            {"name": name, "records": name.replace(" ", "-"), "interruption": {}, "overrides": [*common, *own]}
            for name, own in plan.items()
        ]
        (root / "plan.json").write_text(json.dumps({"decoding program": None, "runs": planned}))
        program = Path(__file__).with_name("sample_program.py")
        answer = launch(world, program, root / "plan.json", root / "found.json")
        assert answer.returncode == 0, answer.stdout + answer.stderr
        assert (world == 2) == (f"a new order of samples begins at step {CHANGED_AT}" in answer.stderr)
        found |= json.loads((root / "found.json").read_text())
    return root, found


@pytest.mark.parametrize("change", REFUSALS)
def test_other_data_are_refused_by_name(runs: tuple[Path, dict[str, list[dict[str, Any]]]], change: str) -> None:
    messages = {rank["ValueError"] for rank in runs[1][change]}
    assert len(messages) == 1, "the same on all ranks"
    [message] = messages
    assert f"{runs[0] / 'run' / 'checkpoints' / 'step-00000006'} cannot be continued: these changed: " in message
    assert REFUSALS[change][0] in message
    assert "(undo it, choose another run_dir, or set data.accept_changes=true" in message


def test_other_data_are_accepted_once(runs: tuple[Path, dict[str, list[dict[str, Any]]]]) -> None:
    root, found = runs
    assert [rank["code"] for name in ("begun", "accepted", "after") for rank in found[name]] == [0] * 5
    assert "data.datasets.mixed (content): " in found["back"][0]["ValueError"]
    rows = [json.loads(line) for line in (root / "run" / "metrics.jsonl").open()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 19))


def test_no_row_of_an_unchanged_dataset_comes_again_before_all_others(
    runs: tuple[Path, dict[str, list[dict[str, Any]]]],
) -> None:
    root, _ = runs
    samples = [
        sample
        for name, ranks in (("begun", 2), ("accepted", 2), ("after", 1))
        for rank in range(ranks)
        for sample in map(json.loads, (root / "run" / f"samples-{name}-{rank}.jsonl").open())
        if sample["weight"]
    ]
    durations = ClipIndex.open(root / "moving").column("duration_seconds")
    for frames, rows in ((9, [row for row in range(13) if durations[row] > 1]), (5, list(range(0, 13, 2)))):
        draws = Counter(dict.fromkeys(rows, 0))
        for step in range(18):
            if step == CHANGED_AT:
                assert draws.total() > len(rows)
                assert draws.total() % len(rows), "the change comes within a pass"
            draws.update(s["row"] for s in samples if s["step"] == step and kind(s) == ("moving", frames))
            assert max(draws.values()) - min(draws.values()) <= 1, (frames, step)
        assert sorted(draws) == rows
        assert min(draws.values()) > 2
    # The other dataset gave way at the change, and its pictures come in passes of their own.
    assert all((kind(s)[0] == "others") == (s["step"] >= CHANGED_AT) for s in samples if kind(s)[0] != "moving")
    pictures = Counter(s["row"] for s in samples if kind(s) == ("others", 1))
    assert max(pictures.values()) - min(pictures[row] for row in range(6)) <= 1


def test_a_clip_that_was_mended_is_read(runs: tuple[Path, dict[str, list[dict[str, Any]]]]) -> None:
    root, found = runs
    assert sum(rank["counts"]["bad_clips"] for rank in found["begun"]) > 0
    ledgers = sorted((root / "run" / "checkpoints").glob("step-*/bad_clips.jsonl"))
    assert [bool(path.read_text()) for path in ledgers] == [False, False]
    samples = [json.loads(line) for line in (root / "run" / "samples-after-0.jsonl").open()]
    assert any(sample["key"] == "000002_others" for sample in samples)


def kind(sample: dict[str, Any]) -> tuple[str, int]:
    """The folder of a sample's clip, and its frames."""
    return sample["key"].split("_")[1], sample["shape"][0]
