"""Training on raw videos and pictures that is killed, stopped and taken up on other numbers of processes sees the same samples."""

import json
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from muybridge.data.buckets import BucketConfig
from muybridge.data.config import DataConfig, DatasetConfig, build_buckets
from muybridge.data.loader import VideoLoader
from muybridge.data.raw_clips import RawClips
from muybridge.tests.conftest import Command
from muybridge.tests.end_to_end.clip_folders import cut, picture, video, write_folder
from muybridge.tests.patience import PATIENCE
from muybridge.train.checkpoint_folder import committed_checkpoints

Sample = dict[str, Any]
STEPS, GLOBAL_BATCH = 14, 5
# Each on another number of processes; the places of a step come out on none of them.
HISTORY: dict[str, dict[str, Any]] = {
    "two": {
        "processes": 2,
        "settings": ["deepspeed=zero3", "micro_batch=1", "data.workers=1", "data.prefetch=3"],
        "interruption": {"step": 5, "how": "kill"},
    },
    "four": {
        "processes": 4,
        "settings": ["deepspeed=zero2", "micro_batch=2", "data.workers=1", "data.prefetch=0"],
        "interruption": {"step": 6, "how": "stop file"},
    },
    "three": {
        "processes": 3,
        "settings": ["deepspeed=zero1", "micro_batch=1", "data.workers=0"],
        "interruption": {"step": 9, "how": "signal"},
    },
    "one": {
        "processes": 1,
        "settings": ["deepspeed=zero0", "micro_batch=3", "data.workers=2", "data.prefetch=1"],
        "interruption": {},
    },
}
STARTS = {
    "two": 0,
    "four": 3,
    "three": 7,
    "one": 10,
}  # the last checkpoint of a killed run, the last step of a stopped one


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders: videos of two lengths, one of which cannot be read, and pictures with a few videos."""
    root = tmp_path_factory.mktemp("datasets")
    write_folder(root / "moving", [video(n, 13 if n % 2 else 7) for n in range(11)], damage={4: cut})
    write_folder(root / "mixed", [picture(n) if n < 7 else video(n, 7) for n in range(10)])
    return root


def data_settings(datasets: Path) -> list[str]:
    """Two datasets, clips of nine, five and one frame, and dropped captions."""
    return [
        *("data.path=", "data.access=raw", "data.frames=9", "data.height=32", "data.width=32"),
        f"data.datasets={{moving:{{path:{datasets / 'moving'},weight:2}},mixed:{{path:{datasets / 'mixed'}}}}}",
        "data.buckets=[{frames:9,height:32,width:32},{frames:5,height:32,width:48},{frames:1,height:32,width:32}]",
        "data.caption_dropout=0.3",
    ]


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory,
    datasets: Path,
    tiny_run: list[str],
    launch: Command,
    launcher: Callable[[int], list[str]],
    command_env: dict[str, str],
) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    """A folder with the runs `reference` and `history`, and what became of each part on each of its ranks."""
    root = tmp_path_factory.mktemp("runs")
    common = [*tiny_run, *data_settings(datasets), "deepspeed.precision=fp32", f"steps={STEPS}"]
    common += [f"global_batch={GLOBAL_BATCH}", "checkpoint.every_steps=3"]

    def planned(name: str, run_dir: Path, settings: list[str], interruption: dict[str, Any]) -> dict[str, Any]:
        overrides = [*common, f"run_dir={run_dir}", *settings]
        return {"name": name, "records": name, "overrides": overrides, "interruption": interruption}

    found: dict[str, list[dict[str, Any]]] = {}
    for name, part in HISTORY.items():
        parts = [planned(name, root / "history", part["settings"], part["interruption"])]
        if name == "one":  # in the same process: its start costs more than its steps
            settings = ["deepspeed=zero1", "micro_batch=2", "data.workers=1"]
            parts.append(planned("reference", root / "reference", settings, {}))
        (root / "plan.json").write_text(json.dumps({"decoding program": None, "runs": parts}))
        program = [Path(__file__).with_name("sample_program.py"), root / "plan.json", root / "found.json"]
        if part["interruption"].get("how") == "kill":
            log = root / f"{name}.log"
            with open(log, "w") as out:
                command = [*launcher(part["processes"]), *program]
                process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=command_env)
                kill_when(root / "history" / "waiting", process, log)
            continue
        done = launch(part["processes"], *program)
        assert done.returncode == 0, done.stdout + done.stderr
        found |= json.loads((root / "found.json").read_text())
    return root, found


def kill_when(reached: Path, launcher: subprocess.Popen[bytes], log: Path) -> None:
    """Kills the launcher, its ranks and their decoders once there is a file."""
    deadline = time.monotonic() + 200 * PATIENCE
    try:
        while not reached.exists():
            assert launcher.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
    finally:
        kill_family(launcher)


def kill_family(launcher: subprocess.Popen[bytes]) -> None:
    """Kills a launcher that still runs, its ranks and their decoders."""
    if launcher.poll() is not None:
        return
    family = [*psutil.Process(launcher.pid).children(recursive=True), psutil.Process(launcher.pid)]
    for process in reversed(family):
        with suppress(psutil.NoSuchProcess):  # it may end with those before it
            process.kill()
    psutil.wait_procs(family, timeout=60 * PATIENCE)
    launcher.wait()


def samples_of(run_dir: Path, part: str, ranks: int) -> list[Sample]:
    """The real samples of a part of a run, of all its ranks."""
    files = [run_dir / f"samples-{part}-{rank}.jsonl" for rank in range(ranks)]
    return [sample for sample in (json.loads(line) for f in files for line in f.open()) if sample["weight"]]


def by_place(samples: list[Sample]) -> dict[tuple[int, int], Sample]:
    """Samples by step and slot, of which no two may be alike."""
    placed = {(sample["step"], sample["slot"]): sample for sample in samples}
    assert len(placed) == len(samples)
    return placed


def drawn(sample: Sample) -> Sample:
    """All of a sample but its loss, whose last digits depend on what is computed beside it."""
    return {name: value for name, value in sample.items() if name != "loss"}


@pytest.fixture(scope="module")
def reference(runs: tuple[Path, dict[str, list[dict[str, Any]]]]) -> dict[tuple[int, int], Sample]:
    return by_place(samples_of(runs[0] / "reference", "reference", 1))


def test_the_runs_went_as_they_were_meant_to(runs: tuple[Path, dict[str, list[dict[str, Any]]]]) -> None:
    root, found = runs
    codes = {name: [rank["code"] for rank in ranks] for name, ranks in found.items()}
    assert codes == {"four": [75] * 4, "three": [75] * 3, "one": [0], "reference": [0]}
    for name, part in HISTORY.items():
        steps = {sample["step"] for sample in samples_of(root / "history", name, part["processes"])}
        assert min(steps) == STARTS[name]
        assert max(steps) == part["interruption"].get("step", STEPS - 1)
    # The kill came after a checkpoint, in the middle of a step.
    last = [s for s in samples_of(root / "history", "two", 2) if s["step"] == 5]
    assert 0 < len(last) < GLOBAL_BATCH


def test_the_samples_are_of_every_kind(reference: dict[tuple[int, int], Sample]) -> None:
    samples = list(reference.values())
    assert {tuple(s["shape"]) for s in samples} == {(9, 32, 32), (5, 32, 48), (1, 32, 32)}
    kinds = {(s["key"].split("_")[1], s["shape"][0]) for s in samples}
    assert kinds == {("moving", 9), ("moving", 5), ("mixed", 5), ("mixed", 1)}
    rows = {(s["dataset"], s["row"]) for s in samples}
    assert len(rows) == 20, "all rows come but the unreadable one"
    excerpts = Counter((s["dataset"], s["row"]) for s in samples)
    assert max(excerpts.values()) > 2
    assert len({s["frames"] for s in samples}) > 0.9 * len(samples), "each time another crop or start"
    captions = Counter(s["caption"].startswith("clip") for s in samples if s["caption"])
    assert min(captions[True], captions[False]) > 10
    assert 10 < sum(not s["caption"] for s in samples) < len(samples) / 2
    assert len({s["text"] for s in samples}) == len({s["caption"] for s in samples})
    assert len({s["noise"] for s in samples}) == len({s["noise_level"] for s in samples}) == len(samples)


def test_the_committed_samples_are_those_of_the_uninterrupted_run(
    runs: tuple[Path, dict[str, list[dict[str, Any]]]], reference: dict[tuple[int, int], Sample]
) -> None:
    committed: dict[tuple[int, int], Sample] = {}
    for name, part in HISTORY.items():
        found = by_place(samples_of(runs[0] / "history", name, part["processes"]))
        repeated = {place: sample for place, sample in committed.items() if place in found}
        assert bool(repeated) == (name == "four"), "only what a kill took is done again"
        for place, sample in repeated.items():
            assert drawn(found[place]) == drawn(sample), place
        committed |= found
    assert committed.keys() == reference.keys()
    for place, sample in reference.items():
        assert drawn(committed[place]) == drawn(sample), place
        assert committed[place]["loss"] == pytest.approx(sample["loss"], rel=1e-5), place


def test_the_losses_are_those_of_the_uninterrupted_run(
    runs: tuple[Path, dict[str, list[dict[str, Any]]]], reference: dict[tuple[int, int], Sample]
) -> None:
    curves = []
    for run in ("reference", "history"):
        rows = [row for row in map(json.loads, (runs[0] / run / "metrics.jsonl").open()) if "loss" in row]
        curves.append({name: [row[name] for row in rows] for name in ("step", "samples_seen", "loss", "grad_norm")})
    expected, found = curves
    assert found["step"] == expected["step"] == list(range(1, STEPS + 1))
    assert found["samples_seen"] == expected["samples_seen"]
    assert found["samples_seen"][-1] == len(reference)
    for name in ("loss", "grad_norm"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5)
    for step in range(STEPS):
        each = [sample["loss"] for place, sample in reference.items() if place[0] == step]
        assert expected["loss"][step] == pytest.approx(sum(each) / len(each), rel=1e-5)


def test_the_unreadable_clip_is_entered_as_in_the_uninterrupted_run(
    runs: tuple[Path, dict[str, list[dict[str, Any]]]],
) -> None:
    expected, found = (
        (committed_checkpoints(runs[0] / run / "checkpoints")[-1] / "bad_clips.jsonl").read_text()
        for run in ("reference", "history")
    )
    assert found == expected
    entry = json.loads(expected)
    assert (entry["dataset"], entry["row"], entry["key"]) == ("moving", 4, "000004_moving")
    assert entry["times"] > 2


@pytest.mark.parametrize("image_share", [None, 0.5])
def test_weights_and_image_share_decide_what_is_trained_on(
    datasets: Path, image_share: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DataConfig(
        datasets={
            "moving": DatasetConfig(path=str(datasets / "moving"), weight=2.0),
            "mixed": DatasetConfig(path=str(datasets / "mixed")),
        },
        buckets=[BucketConfig(9, 32, 32), BucketConfig(5, 32, 48), BucketConfig(1, 32, 32)],
        image_share=image_share,
        height=32,
        width=32,
        workers=0,
    )
    buckets = build_buckets(config, global_batch=GLOBAL_BATCH, micro_batch=2, world_size=1)
    loader = VideoLoader(config, buckets=buckets, rank=0, world_size=1, seed=0)
    monkeypatch.setattr(
        RawClips, "read", lambda self, row, b, *_: np.zeros((b.frames, b.height, b.width, 3), dtype=np.uint8)
    )
    steps: Counter[int] = Counter()  # by frames
    counts: Counter[tuple[int, str]] = Counter()  # samples by frames and dataset
    for batches in islice(loader.steps(0), 60):
        frames = batches[0].frames
        assert frames is not None
        steps[frames.shape[1]] += 1
        for batch in batches:
            counts.update((frames.shape[1], key.split("_")[1]) for key in batch.keys if key)
    # Two thirds and one third; of the videos 5 of 11 and 6 of 11 rows are long and short, of the others 7 of 10 are pictures.
    pictures = image_share or 1 / 3 * 0.7
    videos = (1 - pictures) / (2 / 3 + 1 / 3 * 0.3)
    expected = {
        (1, "mixed"): pictures,
        (5, "mixed"): videos / 3 * 0.3,
        (5, "moving"): videos * 2 / 3 * 6 / 11,
        (9, "moving"): videos * 2 / 3 * 5 / 11,
    }
    assert counts.keys() == expected.keys()
    of_bucket = {b.frames: sum(share for kind, share in expected.items() if kind[0] == b.frames) for b in buckets}
    weights = {b.frames: of_bucket[b.frames] / b.global_batch for b in buckets}
    for bucket in buckets:
        share = weights[bucket.frames] / sum(weights.values())
        assert abs(steps[bucket.frames] - 60 * share) < 2
    for kind, share in expected.items():
        places = sum(count for other, count in counts.items() if other[0] == kind[0])
        assert abs(counts[kind] - places * share / of_bucket[kind[0]]) < 2
