"""Runs as a user has them: the same losses on any number of processes, and the same run after any interruption."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from muybridge.scripts.prepare import main as prepare
from muybridge.scripts.report_times import Spent, read_run_times
from muybridge.tests.conftest import Command
from muybridge.tests.patience import PATIENCE
from muybridge.tests.wandb_files import wait_until_written, wandb_records, wandb_rows
from muybridge.train.attempts import KILLED
from muybridge.train.checkpoint_folder import committed_checkpoints, step_of

TIMEOUT_SECONDS = 120 * PATIENCE
STORY_STEPS = 72
AVERAGE = "ema-0.9999"


def read_rows(run_dir: Path) -> list[dict[str, float]]:
    """The complete rows of metrics.jsonl."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def losses(run_dir: Path) -> list[float]:
    """Training losses in the order of their rows."""
    return [row["loss"] for row in read_rows(run_dir) if "loss" in row]


def story_settings(run_dir: Path) -> list[str]:
    """What the interrupted runs add to the tiny run: bf16, accumulation, checkpoints, validation with videos, W&B files.

    Every third step has a row and every tenth a checkpoint, so that rows lie across checkpoints.
    """
    return [
        *("deepspeed=zero2", "global_batch=4", "micro_batch=2", f"steps={STORY_STEPS}", f"run_dir={run_dir}"),
        *("checkpoint.every_steps=10", "tracking.log_every_steps=3", "tracking.wandb=offline"),
        *("validation.every_steps=36", "validation.prompts=[a red circle,a blue square]", "sampler.steps=2"),
    ]


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_run: list[str],
    toy_folder: Path,
    launch: Command,
) -> tuple[Path, dict[str, dict[str, Any]]]:
    """A folder of finished runs, and what became of each: two processes first, then one."""
    root = tmp_path_factory.mktemp("runs")
    fp32 = "deepspeed.precision=fp32"
    stages = [f"deepspeed=zero{zero}" for zero in range(4)]
    two = {f"zero{zero}-w2": [stage, fp32] for zero, stage in enumerate(stages)}
    # Nor do the seven clips of their validation fill its batches.
    (root / "latents").mkdir()
    for split in ("train", "validation"):
        (root / "latents" / split).symlink_to(toy_folder / "latents" / "train")
    uneven = [
        *("deepspeed=zero1", fp32, "global_batch=5", f"data.latents={root / 'latents'}"),
        *("validation.path=in-latents", "validation.every_steps=10", "validation.clips=7"),
    ]
    two["uneven-w2"] = [*uneven, "micro_batch=2"]
    two["elastic"] = ["deepspeed=zero2", fp32, "steps=10"]
    # ZeRO-3 last: it replaces torch's linear layer for the rest of the process, whose other rounding would show elsewhere.
    one = {
        "story": story_settings(root / "story"),
        **{f"zero{zero}-w1": [stage, fp32] for zero, stage in enumerate(stages[:3])},
        "larger micro-batch": ["deepspeed=zero1", fp32, "micro_batch=8"],
        "uneven-w1": [*uneven, "micro_batch=2"],
        "even": [*uneven, "micro_batch=5"],
        "bf16": ["deepspeed=zero1"],
        "other seed": [f"run_dir={root / 'zero0-w1'}", "deepspeed=zero0", "seed=1"],
        "other batch": [f"run_dir={root / 'zero0-w1'}", "deepspeed=zero0", "global_batch=16"],
        "other data": [f"run_dir={root / 'zero0-w1'}", "deepspeed=zero0", "data.caption_dropout=0.5"],
        "other model": [f"run_dir={root / 'zero0-w1'}", "deepspeed=zero0", "model.ffn_dim=96"],
        "other VAE": ["vae.path=" + str(make_other_vae(toy_folder / "vae", root / "other_vae"))],
        "no latents": [f"data.latents={root / 'nowhere'}"],
        "no clips": [f"data.path={root / 'nowhere'}", "data.access=raw"],
        "no such start": [f"init_from={root / 'other_vae'}"],
        "start of another size": [f"init_from={root / 'zero0-w1'}", "model.ffn_dim=96"],
        "start": [f"init_from={root / 'zero0-w1'}", "deepspeed=zero0", "steps=1", "optimizer.lr=1e-12"],
        "zero3-w1": ["deepspeed=zero3", fp32],
        "elastic": ["deepspeed=zero3", fp32, "steps=20"],
    }
    found: dict[str, dict[str, Any]] = {}
    for world, plan in ((2, two), (1, one)):
        (root / "plan.json").write_text(
            json.dumps({name: [*tiny_run, f"run_dir={root / name}", *own] for name, own in plan.items()})
        )
        program = Path(__file__).with_name("train_program.py")
        answer = launch(world, program, root / "plan.json", root / "found.json")
        assert answer.returncode == 0, answer.stdout + answer.stderr
        found |= {f"{name}@{world}": fate for name, fate in json.loads((root / "found.json").read_text()).items()}
    return root, found


def make_other_vae(vae: Path, folder: Path) -> Path:
    """The same autoencoder but for one latent statistic."""
    folder.mkdir()
    for path in vae.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "latents_mean": [0.5] * 16, "latents_std": [1.0] * 16}))
    return folder


def test_twenty_steps_have_the_same_losses_at_every_stage_and_world_size(
    runs: tuple[Path, dict[str, dict[str, Any]]],
) -> None:
    root, _ = runs
    expected = losses(root / "zero0-w1")
    assert len(expected) == 20
    assert len(set(expected)) == 20
    for world in (1, 2):
        for zero in range(4):
            assert losses(root / f"zero{zero}-w{world}") == pytest.approx(expected, rel=2e-5), (zero, world)


def test_accumulated_micro_batches_equal_a_larger_one(runs: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    root, _ = runs
    assert losses(root / "larger micro-batch") == pytest.approx(losses(root / "zero1-w1"), rel=2e-5)


def test_places_without_a_sample_count_for_nothing(runs: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    root, _ = runs
    for run in ("uneven-w1", "uneven-w2"):
        for name, count in (("loss", 20), ("grad_norm", 20), ("validation_loss", 2)):
            expected = [row[name] for row in read_rows(root / "even") if name in row]
            assert len(expected) == count
            assert [row[name] for row in read_rows(root / run) if name in row] == pytest.approx(expected, rel=2e-5), (
                run,
                name,
            )


def test_bf16_has_nearly_the_losses_of_fp32(runs: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    root, _ = runs
    assert losses(root / "bf16") == pytest.approx(losses(root / "zero1-w1"), rel=0.02)
    assert losses(root / "bf16") != losses(root / "zero1-w1")


def test_one_process_continues_a_run_of_two_at_another_stage(runs: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    root, found = runs
    assert (found["elastic@2"]["code"], found["elastic@1"]["code"]) == (0, 0)
    assert losses(root / "elastic") == pytest.approx(losses(root / "zero0-w1"), rel=2e-5)


def test_rows_hold_the_figures_of_each_step(runs: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    root, _ = runs
    rows = [row for row in read_rows(root / "zero0-w1") if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert [row["samples_seen"] for row in rows] == list(range(8, 161, 8))
    assert [row["lr"] for row in rows[:6]] == pytest.approx([2e-4, 4e-4, 6e-4, 8e-4, 1e-3, 1e-3])
    for name in ("grad_norm", "seconds_per_step", "samples_per_second"):
        assert all(row[name] > 0 for row in rows)


def test_a_finished_run_leaves_its_settings_and_weights(runs: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    root, _ = runs
    run_dir = root / "zero3-w2"
    names = {"checkpoints", "config.yaml", "metrics.jsonl", "model", "provenance.json"}
    assert names <= {path.name for path in run_dir.iterdir()}
    exported = load_file(run_dir / "model/transformer/diffusion_pytorch_model.safetensors")
    same = load_file(root / "zero0-w1/model/transformer/diffusion_pytorch_model.safetensors")
    assert exported.keys() == same.keys()
    for name, tensor in exported.items():
        torch.testing.assert_close(tensor, same[name], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("other seed", "seed: 0 saved, 1 now"),
        ("other batch", "global_batch: 8 saved, 16 now"),
        ("other data", "data.caption_dropout: 0.1 saved, 0.5 now"),
        ("other model", "does not fit the configured model"),
        ("other VAE", "stale: its vae_fingerprint is"),
        ("no latents", "muybridge encode"),
        ("no clips", "muybridge prepare"),
        ("no such start", "or the directory of a run with a checkpoint"),
    ],
)
def test_what_cannot_be_continued_is_refused_by_name(
    runs: tuple[Path, dict[str, dict[str, Any]]], change: str, words: str
) -> None:
    message = runs[1][f"{change}@1"]["ValueError"]
    assert words in message
    assert "\n" not in message


def test_a_start_from_a_run_of_another_size_names_the_field(runs: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    root, found = runs
    expected = f"model.ffn_dim=96 must be 64, as init_from={root / 'zero0-w1'} has it"
    assert expected in found["start of another size@1"]["ValueError"]


def test_a_run_can_start_from_the_average_of_another(runs: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    root, found = runs
    assert found["start@1"]["code"] == 0
    (source,) = committed_checkpoints(root / "zero0-w1" / "checkpoints")
    (start,) = committed_checkpoints(root / "start" / "checkpoints")
    expected, got = (load_file(folder / "shard-00000-of-00001.safetensors") for folder in (source, start))
    weights = [name for name in got if name.startswith("master/")]
    assert weights
    for name in weights:
        torch.testing.assert_close(got[name], expected[name.replace("master/", f"{AVERAGE}/")], rtol=0, atol=1e-9)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("zero", range(4))
def test_the_memory_estimate_is_what_a_run_holds(
    runs: tuple[Path, dict[str, dict[str, Any]]], zero: int, world: int
) -> None:
    fate = runs[1][f"zero{zero}-w{world}@{world}"]
    for part, held in fate["held"].items():
        # Padding between parameters and ranks is not in the estimate.
        assert held == pytest.approx(fate["estimated"][part], rel=0.01), part


def test_the_memory_estimate_of_bf16_is_what_a_run_holds(runs: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    fate = runs[1]["bf16@1"]
    for part, held in fate["held"].items():
        assert held == pytest.approx(fate["estimated"][part], rel=0.01), part


# --- a run in one process, killed, stopped by signal and by file, and taken up again ---------------------------------------


def start(arguments: list[str], env: dict[str, str]) -> subprocess.Popen[str]:
    """A command in a process group of its own."""
    return subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, start_new_session=True
    )


def wait_for_step(process: subprocess.Popen[str], run_dir: Path, step: int, *, attempt: int = 1) -> None:
    """Returns as soon as this attempt at the run has logged `step`; fails where it ends before."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        if any(row["step"] >= step and row["attempt"] == attempt for row in read_rows(run_dir)):
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)
    raise AssertionError(f"no step {step} within {TIMEOUT_SECONDS} s")


def kill_with_steps_to_lose(process: subprocess.Popen[str], run_dir: Path) -> int:
    """Kills all of a run when its last row is of a step behind its last checkpoint; returns that step."""
    while True:
        os.killpg(process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        assert process.poll() is None, process.communicate()[0]
        step, saved = max(row["step"] for row in read_rows(run_dir)), committed_checkpoints(run_dir / "checkpoints")
        if not saved or step > step_of(saved[-1]):
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return int(step)
        os.killpg(process.pid, signal.SIGCONT)
        wait_for_step(process, run_dir, step_of(saved[-1]) + 1)


@pytest.fixture(scope="module")
def story(
    runs: tuple[Path, dict[str, dict[str, Any]]],
    tiny_run: list[str],
    command_env: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """The settings of the run `story` by the command line: killed, then stopped twice, then finished."""
    run_dir = tmp_path_factory.mktemp("story") / "run"
    command = [sys.executable, "-m", "muybridge.scripts.cli", "train", *tiny_run, *story_settings(run_dir)]
    found: dict[str, Any] = {"run_dir": run_dir}

    process = start(command, command_env)
    wait_for_step(process, run_dir, 12)
    found["step at the kill"] = kill_with_steps_to_lose(process, run_dir)

    process = start(command, command_env)
    wait_for_step(process, run_dir, 24, attempt=2)
    process.send_signal(signal.SIGTERM)
    found["signalled"] = process.communicate(timeout=TIMEOUT_SECONDS)[0]
    found["signalled code"] = process.returncode
    found["signalled checkpoint"] = committed_checkpoints(run_dir / "checkpoints")[-1].name
    found["signalled at"] = max(row["step"] for row in read_rows(run_dir))

    process = start(command, command_env)
    wait_for_step(process, run_dir, 36, attempt=3)
    (run_dir / "STOP").touch()
    found["stopped"] = process.communicate(timeout=TIMEOUT_SECONDS)[0]
    found["stopped code"] = process.returncode
    found["stop file is left"] = (run_dir / "STOP").exists()

    process = start(command, command_env)
    found["finished"] = process.communicate(timeout=TIMEOUT_SECONDS)[0]
    found["finished code"] = process.returncode
    return found


def test_a_killed_run_goes_on_to_the_same_losses(
    runs: tuple[Path, dict[str, dict[str, Any]]], story: dict[str, Any]
) -> None:
    assert 12 <= story["step at the kill"] < STORY_STEPS
    assert story["finished code"] == 0, story["finished"]
    timing = {
        "samples_per_second",
        "tokens_per_second",
        "peak_gib",
        "mfu",
        "model_tflops_per_second",
        "unix_seconds",
        "attempt",
    }
    expected, got = (
        [
            {name: value for name, value in row.items() if name not in timing and "seconds_per_step" not in name}
            for row in read_rows(run_dir)
            if "loss" in row
        ]
        for run_dir in (runs[0] / "story", story["run_dir"])
    )
    assert got == expected
    assert [row["step"] for row in got] == list(range(3, STORY_STEPS + 1, 3))


def test_a_killed_run_ends_with_the_same_weights_optimizer_and_average(
    runs: tuple[Path, dict[str, dict[str, Any]]], story: dict[str, Any]
) -> None:
    expected, got = (
        committed_checkpoints(run_dir / "checkpoints")[-1] for run_dir in (runs[0] / "story", story["run_dir"])
    )
    assert expected.name == got.name == f"step-{STORY_STEPS:08d}"
    name = "shard-00000-of-00001.safetensors"
    tensors = load_file(expected / name)
    assert {key.split("/")[0] for key in tensors} == {"master", "exp_avg", "exp_avg_sq", AVERAGE}
    assert (expected / name).read_bytes() == (got / name).read_bytes()
    assert json.loads((expected / "run.json").read_text()) == json.loads((got / "run.json").read_text())


def test_a_signal_saves_and_asks_to_be_started_again(story: dict[str, Any]) -> None:
    assert story["signalled code"] == 75, story["signalled"]
    assert "the same command goes on from there" in story["signalled"]
    saved = int(story["signalled checkpoint"].removeprefix("step-"))
    assert story["signalled at"] <= saved < story["signalled at"] + 3


def test_a_stop_file_is_heeded_once(story: dict[str, Any]) -> None:
    assert story["stopped code"] == 75, story["stopped"]
    assert not story["stop file is left"]
    assert "resumed from" in story["finished"]
    assert "Traceback" not in story["signalled"] + story["stopped"] + story["finished"]


def test_nothing_of_an_interruption_is_left(story: dict[str, Any]) -> None:
    names = sorted(path.name for path in (story["run_dir"] / "checkpoints").iterdir())
    assert names == ["LATEST", "step-00000070", f"step-{STORY_STEPS:08d}"]
    suffixes = {path.suffix for path in (story["run_dir"] / "checkpoints").rglob("step-*/*")}
    assert suffixes == {".safetensors", ".json", ".jsonl"}


def test_the_report_knows_all_attempts_and_where_their_time_went(story: dict[str, Any]) -> None:
    times = read_run_times(story["run_dir"])
    causes = [current.attempt.cause for current in times.attempts]
    assert causes == [KILLED, "stopped on request", "stopped on request", "all steps are done"]
    assert times.lost_steps == times.attempts[0].furthest_step - times.attempts[1].start_step > 0
    assert sum(times.seconds.values()) == pytest.approx(times.wall_seconds, rel=0.02)
    for spent in (Spent.training, Spent.set_up, Spent.down, Spent.saving, Spent.validation, Spent.lost):
        assert times.seconds[spent] > 0, spent


def test_wandb_sees_one_run_with_all_its_rows_and_videos(story: dict[str, Any]) -> None:
    run_dir = story["run_dir"]
    run_id = (run_dir / "wandb_run_id.txt").read_text()
    files = sorted((run_dir / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 4
    wait_until_written(files[-1])
    steps: Counter[int] = Counter()
    videos = []
    for file in files:
        # None in that of the kill, if W&B's service had not come to it.
        assert {r.run.run_id for r in wandb_records(file) if r.WhichOneof("record_type") == "run"} <= {run_id}
        for row in wandb_rows(file):
            if "loss" in row:
                steps[row["step"]] += 1
            videos += row.get("samples.videos", [])
    # What W&B had not yet written at the kill is lost with its service; metrics.jsonl has it.
    everything = set(range(3, STORY_STEPS + 1, 3))
    assert {step for step in everything if step > story["step at the kill"]} <= set(steps) <= everything
    assert {video["caption"] for video in videos} == {"a red circle", "a blue square"}
    for video in videos:
        (written,) = (run_dir / "wandb").glob(f"offline-run-*/files/{video['path']}")
        assert written.stat().st_size == video["size"] > 100


# --- two processes ---------------------------------------------------------------------------------------------------------


def test_a_signal_to_all_processes_and_the_launcher_is_one_request(
    runs: tuple[Path, dict[str, dict[str, Any]]],
    tiny_run: list[str],
    tmp_path: Path,
    launcher: Callable[[int], list[str]],
    command_env: dict[str, str],
) -> None:
    own = [f"run_dir={tmp_path / 'run'}", "deepspeed=zero2", "deepspeed.precision=fp32", "steps=100000"]
    process = start([*launcher(2), "-m", "muybridge.train", *tiny_run, *own], command_env)
    wait_for_step(process, tmp_path / "run", 5)
    os.killpg(process.pid, signal.SIGTERM)
    output = process.communicate(timeout=TIMEOUT_SECONDS)[0]
    assert "stopped on request at step" in output
    (checkpoint,) = committed_checkpoints(tmp_path / "run" / "checkpoints")
    got = losses(tmp_path / "run")
    assert checkpoint.name == f"step-{len(got):08d}"
    # What came before the signal is what the program's uninterrupted run has, to the bit.
    both = min(20, len(got))
    assert got[:both] == losses(runs[0] / "zero2-w2")[:both]


def test_real_clips_train_with_the_autoencoder_online_at_two_processes(
    tiny_run: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    launcher: Callable[[int], list[str]],
    command_env: dict[str, str],
) -> None:
    clips = Path(__file__).resolve().parents[3] / "shared" / "real_clips"
    if not clips.is_dir():
        pytest.skip("the real clips are not beside this checkout (../shared/real_clips)")
    assert prepare([str(clips), str(tmp_path / "clips"), "--workers", "1"]) == 0
    assert "corrupted.mp4" in capsys.readouterr().out
    own = [
        *(f"run_dir={tmp_path / 'run'}", f"data.path={tmp_path / 'clips'}", "data.access=raw", "data.workers=1"),
        *("deepspeed=zero2", "global_batch=4", "micro_batch=1"),
    ]
    run = [*launcher(2), "-m", "muybridge.train", *tiny_run, *own]
    done = subprocess.run(run, capture_output=True, text=True, check=False, env=command_env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(losses(tmp_path / "run")) == 20
    assert not any(loss != loss for loss in losses(tmp_path / "run"))
    shards = committed_checkpoints(tmp_path / "run" / "checkpoints")[-1].glob("*.safetensors")
    assert len(list(shards)) == 2


# --- exit codes ------------------------------------------------------------------------------------------------------------


def test_a_run_that_cannot_be_continued_ends_with_64(
    runs: tuple[Path, dict[str, dict[str, Any]]],
    tiny_run: list[str],
    muybridge: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    answer = muybridge("train", *tiny_run, f"run_dir={runs[0] / 'zero0-w1'}", "deepspeed=zero0", "seed=7")
    assert answer.returncode == 64
    (line,) = answer.stderr.splitlines()
    assert "seed: 0 saved, 7 now" in line


def test_a_diverged_run_ends_with_77(
    tiny_run: list[str], tmp_path: Path, muybridge: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    own = [f"run_dir={tmp_path}", "deepspeed=zero0", "optimizer.lr=1e9", "optimizer.gradient_clipping=0", "steps=200"]
    answer = muybridge("train", *tiny_run, *own)
    assert answer.returncode == 77
    assert "lower optimizer.lr" in answer.stderr.splitlines()[-1]
    assert "Traceback" not in answer.stderr
