"""Two processes that share every clip train as two that have clips of their own, and each goes on from the other's checkpoint."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from muybridge.tests.conftest import Command
from muybridge.tests.end_to_end.clip_folders import cut, picture, video, write_folder
from muybridge.train.checkpoint import LEDGER_NAME
from muybridge.train.checkpoint_folder import committed_checkpoints

STEPS, GLOBAL_BATCH = 8, 3


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_run: list[str],
    launch: Command,
) -> tuple[Path, dict[str, dict[str, Any]]]:
    """The folder of the runs, and what became of each."""
    root = tmp_path_factory.mktemp("sequence")
    write_folder(root / "clips", [video(n, 13) if n % 3 else picture(n) for n in range(12)], damage={4: cut})
    write_folder(root / "held_out", [video(n, 13) for n in range(3)])
    common = [
        *(
            *tiny_run,
            f"data.path={root / 'clips'}",
            "data.access=raw",
            "data.frames=9",
            "data.height=32",
            "data.width=32",
        ),
        *("data.buckets=[{frames:9,height:32,width:32},{frames:1,height:32,width:32}]", "data.workers=1"),
        *("data.max_bad_share=1", "deepspeed=zero2", "deepspeed.precision=fp32", f"steps={STEPS}", "micro_batch=2"),
        *(f"global_batch={GLOBAL_BATCH}", f"validation.path={root / 'held_out'}", "validation.every_steps=4"),
        *("validation.prompts=[a circle,a square,a star]", "sampler.steps=2", "checkpoint.every_steps=4"),
    ]
    apart, shared = ([*common, f"parallel.sequence={width}"] for width in (1, 2))
    plan = {
        "apart": [*apart, f"run_dir={root / 'apart'}"],
        "shared": [*shared, f"run_dir={root / 'shared'}"],
        "half apart": [*apart, f"run_dir={root / 'changing'}", "steps=4"],
        "half shared": [*shared, f"run_dir={root / 'changing'}", "activations.policy=block"],
        "three": [*common, "parallel.sequence=3", f"run_dir={root / 'three'}", "model.num_attention_heads=2"],
        "stream": [*shared, "data.access=stream", f"run_dir={root / 'stream'}"],
    }
    (root / "plan.json").write_text(json.dumps(plan))
    program = Path(__file__).with_name("train_program.py")
    answer = launch(2, program, root / "plan.json", root / "found.json")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return root, json.loads((root / "found.json").read_text())


def rows_of(run_dir: Path) -> dict[int, dict[str, float]]:
    """Rows of metrics put together by step."""
    rows: dict[int, dict[str, float]] = {}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows.setdefault(row["step"], {}).update(row)
    return rows


@pytest.mark.parametrize("name", ["shared", "changing"])
def test_the_losses_are_those_of_processes_with_clips_of_their_own(
    runs: tuple[Path, dict[str, dict[str, Any]]], name: str
) -> None:
    root, found = runs
    assert all(found[part]["code"] == 0 for part in ("apart", "shared", "half apart", "half shared")), found
    expected, got = rows_of(root / "apart"), rows_of(root / name)
    assert list(got) == list(expected) == list(range(1, STEPS + 1))
    for step, row in expected.items():
        for column in {"loss", "grad_norm", "validation_loss"} & row.keys():
            assert math.isclose(got[step][column], row[column], rel_tol=2e-5), (step, column)
        assert got[step]["samples_seen"] == row["samples_seen"]
    assert {"validation_loss"} <= expected[4].keys() & expected[STEPS].keys()


def test_each_bad_clip_is_counted_once_and_each_prompt_has_one_video(
    runs: tuple[Path, dict[str, dict[str, Any]]],
) -> None:
    root, _ = runs
    ledgers = {
        name: [
            json.loads(line) for line in (committed_checkpoints(root / name / "checkpoints")[-1] / LEDGER_NAME).open()
        ]
        for name in ("apart", "shared")
    }
    assert ledgers["apart"]
    assert [(clip["row"], clip["times"]) for clip in ledgers["shared"]] == [
        (clip["row"], clip["times"]) for clip in ledgers["apart"]
    ]
    assert len(list((root / "shared" / "validation" / f"step-{STEPS:08d}").glob("*.mp4"))) == 3


def test_what_cannot_share_clips_is_refused(runs: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    _, found = runs
    assert "parallel.sequence=3 must be at most model.num_attention_heads=2" in found["three"]["ValueError"]
    assert "parallel.sequence=2 must be 1 with data.access=stream" in found["stream"]["ValueError"]
