"""Training on damaged data: no hang, the same curve and ledger on any number of processes, and an end where it is too much."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from muybridge.data.config import DataConfig, build_buckets
from muybridge.data.loader import VideoLoader
from muybridge.tests.conftest import Command
from muybridge.tests.end_to_end.clip_folders import cut, garbled, small_video, write_folder
from muybridge.tests.end_to_end.damaged_decoder import CRASHES, HANGS
from muybridge.tests.patience import PATIENCE
from muybridge.tests.ports import unused_port
from muybridge.train.checkpoint_folder import committed_checkpoints

CLIPS, STEPS, GLOBAL_BATCH = 400, 12, 40  # each clip comes once, some come again
# One of a hundred, in its own way each, and what the ledger says of it.
DAMAGE: dict[int, tuple[Callable[[bytes], bytes], str]] = {
    31: (cut, ""),
    122: (garbled, ""),
    213: (lambda data: data + CRASHES, "the decoder crashed (SIGSEGV)"),
    304: (lambda data: data + HANGS, "decoding took longer than 2 s"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`clips` of which one in a hundred is damaged, and `ruin` of which all are."""
    root = tmp_path_factory.mktemp("folders")
    damage = {row: how for row, (how, _) in DAMAGE.items()}
    write_folder(root / "clips", map(small_video, range(CLIPS)), damage=damage, alike=True)
    write_folder(root / "ruin", [small_video(0)] * 40, damage=dict.fromkeys(range(40), cut), alike=True)
    return root


def settings(tiny_run: list[str], data: Path, run_dir: Path) -> list[str]:
    return [
        *(*tiny_run, f"data.path={data}", f"run_dir={run_dir}", "data.access=raw", "deepspeed.precision=fp32"),
        *("data.frames=5", "data.height=32", "data.width=32", "data.timeout_seconds=2"),
        *(f"global_batch={GLOBAL_BATCH}", f"steps={STEPS}", "checkpoint.every_steps=5"),
    ]


TWO = ["deepspeed=zero2", "micro_batch=7", "data.workers=1"]
ONE = ["deepspeed=zero1", "micro_batch=10", "data.workers=1", "data.prefetch=1"]


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory,
    folders: Path,
    tiny_run: list[str],
    launch: Command,
) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    """A folder of runs, and what became of them on each rank."""
    root = tmp_path_factory.mktemp("runs")
    few = [(name, folders / "clips", name, own) for name, own in (("two", TWO), ("one", ONE))]
    begun = ["checkpoint.every_steps=1", "steps=4"]
    plans = {
        2: [
            few[0],
            ("too many", folders / "clips", "strict", [*TWO, *begun, "data.max_bad_share=0"]),
            ("still too many", folders / "clips", "strict", [*TWO, *begun, "data.max_bad_share=0"]),
            ("all", folders / "ruin", "ruin", [*TWO, "data.workers=0", "data.max_bad_share=1"]),
        ],
        1: [few[1], ("as many as they are", folders / "clips", "strict", [*ONE, *begun])],
    }
    found: dict[str, list[dict[str, Any]]] = {}
    for world, plan in plans.items():
        planned = [
            {
                "name": name,
                "records": name.replace(" ", "-"),
                "interruption": {},
                "overrides": [*settings(tiny_run, data, root / run), *own],
            }
            for name, data, run, own in plan
        ]
        decoder = str(Path(__file__).with_name("damaged_decoder.py"))
        (root / "plan.json").write_text(json.dumps({"decoding program": decoder, "runs": planned}))
        program = Path(__file__).with_name("sample_program.py")
        answer = launch(world, program, root / "plan.json", root / "found.json")
        assert answer.returncode == 0, answer.stdout + answer.stderr
        found |= json.loads((root / "found.json").read_text())
    return root, found


def curve(run_dir: Path) -> list[float]:
    rows = map(json.loads, (run_dir / "metrics.jsonl").open())
    return [row["loss"] for row in rows if "loss" in row]


def ledger(run_dir: Path) -> list[dict[str, Any]]:
    """The bad clips of the last checkpoint."""
    text = (committed_checkpoints(run_dir / "checkpoints")[-1] / "bad_clips.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def samples(run_dir: Path, name: str) -> list[str]:
    """The lines that rank 0 wrote of the samples of a part of a run."""
    return (run_dir / f"samples-{name.replace(' ', '-')}-0.jsonl").read_text().splitlines()


def test_one_and_two_processes_have_the_same_curve(runs: tuple[Path, dict[str, list[dict[str, Any]]]]) -> None:
    root, found = runs
    assert [rank["code"] for name in ("one", "two") for rank in found[name]] == [0, 0, 0]
    assert len(curve(root / "one")) == STEPS
    assert curve(root / "two") == pytest.approx(curve(root / "one"), rel=1e-5)


def test_the_ledger_holds_the_damaged_clips_and_no_others(
    runs: tuple[Path, dict[str, list[dict[str, Any]]]], folders: Path
) -> None:
    root, found = runs
    entries = ledger(root / "one")
    assert ledger(root / "two") == entries
    assert [entry["row"] for entry in entries] == sorted(DAMAGE)
    for entry in entries:
        assert DAMAGE[entry["row"]][1] in entry["reason"]
        assert entry["substitute"] not in [None, *DAMAGE]
    # How often each was drawn.
    config = DataConfig(path=str(folders / "clips"), frames=5, height=32, width=32, workers=0)
    buckets = build_buckets(config, global_batch=GLOBAL_BATCH, micro_batch=10, world_size=1)
    plan = VideoLoader(config, buckets=buckets, rank=0, world_size=1, seed=0).plan
    draws = Counter(slot.row for step in range(STEPS) for slot in plan.slots(step))
    assert {entry["row"]: entry["times"] for entry in entries} == {row: draws[row] for row in DAMAGE}
    for entry in entries:
        assert plan.slots(entry["step"])[entry["position"]].row == entry["row"]
    for run in ("one", "two"):  # each is tried once more, with PyAV
        counts = [rank["counts"] for rank in found[run]]
        # And before that in a fresh process, where the first one had read other clips.
        crashes = sum(rank["decoder_crashes"] for rank in counts)
        assert 2 * draws[213] <= crashes <= 3 * draws[213]
        assert sum(rank["decoder_timeouts"] for rank in counts) == 2 * draws[304]


def test_all_ranks_end_at_the_first_clip_too_many(runs: tuple[Path, dict[str, list[dict[str, Any]]]]) -> None:
    root, found = runs
    first = min(ledger(root / "one"), key=lambda entry: entry["step"])
    for name in ("too many", "still too many"):  # the same command ends at the same step
        messages = [rank["DataBudgetError"] for rank in found[name]]
        assert len(messages) == 2
        assert all(
            "1 of the last 10000 samples could not be read, more than data.max_bad_share=0" in m for m in messages
        )
        assert all("raise the share; the same command goes on from the last checkpoint" in m for m in messages)
        assert any(f"{first['key']}: {first['reason']}" in m for m in messages)
        steps = {json.loads(line)["step"] for line in samples(root / "strict", name)}
        assert max(steps) == first["step"] == 1


def test_with_a_higher_share_the_run_goes_on_to_the_same_losses(
    runs: tuple[Path, dict[str, list[dict[str, Any]]]],
) -> None:
    root, found = runs
    assert found["as many as they are"][0]["code"] == 0
    first = min(entry["step"] for entry in ledger(root / "one"))
    resumed = json.loads(samples(root / "strict", "as many as they are")[0])["step"]
    assert 0 < resumed == first
    assert curve(root / "strict") == pytest.approx(curve(root / "one")[:4], rel=1e-5)
    assert [(entry["row"], entry["times"]) for entry in ledger(root / "strict")] == [(213, 1)]


def test_where_nothing_can_be_read_the_run_ends(runs: tuple[Path, dict[str, list[dict[str, Any]]]]) -> None:
    root, found = runs
    for rank in found["all"]:
        assert "a process could not read one of its last 100 samples" in rank["DataBudgetError"]
        assert "000000_ruin: " in rank["DataBudgetError"]
    assert curve(root / "ruin")[0] == 0


def test_each_process_of_a_run_ends_with_76(
    tiny_run: list[str], folders: Path, tmp_path: Path, command_env: dict[str, str]
) -> None:
    port = unused_port()
    # As srun starts them: torchrun would stop the others at the end of the first.
    run = [
        sys.executable,
        "-m",
        "muybridge.train",
        *settings(tiny_run, folders / "ruin", tmp_path / "run"),
        *TWO,
        "data.workers=0",
    ]
    logs = [tmp_path / f"rank-{rank}.log" for rank in range(2)]
    ranks = []
    for rank, log in enumerate(logs):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        env = {**command_env, **place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        with open(log, "w") as file:
            ranks.append(subprocess.Popen(run, stdout=subprocess.DEVNULL, stderr=file, env=env))
    codes = [process.wait(timeout=200 * PATIENCE) for process in ranks]
    messages = [log.read_text() for log in logs]
    assert codes == [76, 76], messages
    for rank, message in enumerate(messages):
        assert f"rank {rank} met" in message
        assert "_ruin: " in message
        assert "Mend the dataset or raise the share" in message
        assert "Traceback" not in message
