"""The whole life of a model in a minute: what the quickstart leaves, that it goes on where it stopped, and what it judges."""

import contextlib
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from muybridge.data.decode import read_frames
from muybridge.scripts import cli, quickstart
from muybridge.scripts.quickstart import build_stages, prompt_combinations
from muybridge.tests.faults.fork_server import ForkServer

Answer = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def smoke(
    tmp_path_factory: pytest.TempPathFactory, server: ForkServer
) -> tuple[Path, Answer, Answer, dict[str, float]]:
    """A run directory, the answers of the first and a second call, and when files were written before the second."""
    said: list[str] = []

    def run(command: list[str], *, check: bool, env: dict[str, str]) -> Answer:
        """A stage's command, forked off a process that has torch in memory: a dozen starts of torch cost more than all stages."""
        assert (command[:2], check) == ([sys.executable, "-m"], False)
        module, rest, processes = command[2], command[3:], 0
        if module == "torch.distributed.run":
            assert (rest[:2], rest[3]) == (["--standalone", "--nproc-per-node"], "-m")
            processes, module, rest = int(rest[2]), rest[4], rest[5:]
        threads = {"OMP_NUM_THREADS": env["OMP_NUM_THREADS"]}
        answer = server.command(module, *rest, processes=processes, environment=threads)
        said.append(answer.stdout + answer.stderr)
        return answer

    def call() -> Answer:
        said.clear()
        arguments = ["quickstart", "--smoke", "--run-dir", str(run_dir)]
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as stdout:
            patch.setattr(quickstart.subprocess, "run", run)
            code = cli.main(arguments)
        return Answer(arguments, code, stdout.getvalue(), "".join(said))

    run_dir = tmp_path_factory.mktemp("quickstart") / "run"
    first = call()
    # As if it had been stopped before the last stage but one.
    done = json.loads((run_dir / "stages.json").read_text())
    del done["sample"], done["evaluate"]
    (run_dir / "stages.json").write_text(json.dumps(done))
    shutil.rmtree(run_dir / "samples")
    times = {str(path): path.stat().st_mtime for path in run_dir.rglob("*.safetensors")}
    return run_dir, first, call(), times


def test_it_leaves_every_part_of_the_life_of_a_model(smoke: tuple[Path, Answer, Answer, dict[str, float]]) -> None:
    run_dir, first, _, _ = smoke
    assert first.returncode == 0, first.stdout + first.stderr
    for pattern in (
        *("shards/train/*.tar", "shards/test/index.arrow", "latents/train/*.tar", "latents/validation/index.arrow"),
        *("vae_image/metrics.jsonl", "vae/metrics.jsonl", "metrics.jsonl", "wandb/offline-run-*/run-*.wandb"),
        *("vae/model/vae/config.json", "vae/checkpoints/step-*/MANIFEST.json", "checkpoints/step-*/MANIFEST.json"),
        *("model/transformer/config.json", "samples/*.mp4", "samples/contact_sheet.png", "loss.png"),
        *("model/text_encoder/model.safetensors", "tokenizer/tokenizer.json", "pipeline/model_index.json"),
        *("vae_reconstruction.mp4", "validation/step-*/*.mp4", "prompts.txt", "report.json"),
    ):
        found = list(run_dir.glob(pattern))
        assert found, pattern
        assert all(path.stat().st_size > 0 for path in found), pattern


def test_the_report_has_the_figures(smoke: tuple[Path, Answer, Answer, dict[str, float]]) -> None:
    report = json.loads((smoke[0] / "report.json").read_text())
    assert 0 < report["vae_psnr_db"] < 60
    assert 10 < report["constant_colour_psnr_db"] < 40
    assert report["prompt_following"]["n"] == 8
    stages = ["prepare", "train_vae_image", "train_vae", "encode", "train", "sample", "evaluate", "export"]
    assert list(report["seconds"]) == [*stages, "total"]
    assert report["seconds"]["total"] == pytest.approx(sum(report["seconds"][stage] for stage in stages), abs=0.1)


def test_an_untrained_model_scores_no_better_than_chance(smoke: tuple[Path, Answer, Answer, dict[str, float]]) -> None:
    followed = json.loads((smoke[0] / "report.json").read_text())["prompt_following"]
    # Chance is 1/6, 1/4 and 1/3; a guesser is right more often than this in 8 tries once in a hundred.
    assert followed["colour"] <= 4 / 8
    assert followed["direction"] <= 5 / 8
    assert followed["shape"] <= 6 / 8


def test_the_videos_have_the_size_and_length_that_was_trained(
    smoke: tuple[Path, Answer, Answer, dict[str, float]],
) -> None:
    videos = sorted((smoke[0] / "samples").glob("*.mp4"))
    assert len(videos) == 8
    for video in videos:
        frames = read_frames(video.read_bytes(), [number / 8 for number in range(9)])
        assert frames.shape == (9, 64, 64, 3)


def test_a_second_call_goes_on_with_what_is_missing(smoke: tuple[Path, Answer, Answer, dict[str, float]]) -> None:
    run_dir, _, second, times = smoke
    assert second.returncode == 0, second.stdout + second.stderr
    assert second.stdout.count("done before, in ") == 6
    assert times == {str(path): path.stat().st_mtime for path in run_dir.rglob("*.safetensors")}


def test_a_folder_of_another_quickstart_is_refused(smoke: tuple[Path, Answer, Answer, dict[str, float]]) -> None:
    with pytest.raises(ValueError, match="holds a quickstart with other settings"):
        quickstart.main(["--run-dir", str(smoke[0])])


def test_a_failing_stage_ends_it_with_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = iter([0, 77])
    ran: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        ran.append(command)
        return subprocess.CompletedProcess(command, next(codes))

    monkeypatch.setattr(quickstart.subprocess, "run", run)
    assert quickstart.main(["--smoke", "--run-dir", str(tmp_path)]) == 77
    prepare, train = ran
    assert prepare[2:4] == ["muybridge.scripts.cli", "prepare"]
    assert "+experiment=quickstart_vae_image" in train
    assert "steps=4" in train
    assert list(json.loads((tmp_path / "stages.json").read_text())) == ["prepare"]


def test_an_export_that_was_not_noted_down_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = build_stages(tmp_path, smoke=True)
    done = {stage.name: {"arguments": stage.arguments, "seconds": 1.0} for stage in stages if stage.name != "export"}
    (tmp_path / "stages.json").write_text(json.dumps(done))
    (tmp_path / "pipeline").mkdir()

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        assert command[3] == "export"
        return subprocess.CompletedProcess(command, 64 if (tmp_path / "pipeline").exists() else 1)

    monkeypatch.setattr(quickstart.subprocess, "run", run)
    assert quickstart.main(["--smoke", "--run-dir", str(tmp_path)]) == 1


def test_training_is_spread_over_processes_by_torchrun() -> None:
    stages = {stage.name: stage for stage in build_stages(Path("runs/quickstart"), smoke=False)}
    command, shown = stages["train"].command(2)
    assert shown == "torchrun --standalone --nproc-per-node 2 -m muybridge.train +experiment=quickstart"
    assert command[1:3] == ["-m", "torch.distributed.run"]
    assert stages["train"].command(1)[1] == "muybridge train +experiment=quickstart"
    assert stages["encode"].command(2)[1] == "muybridge encode +experiment=quickstart"


def test_half_of_the_prompts_are_combinations_never_trained() -> None:
    from muybridge.data.synthetic import HELD_OUT

    combinations = prompt_combinations(48)
    assert sum(combination in HELD_OUT for combination in combinations) == 24


def test_in_its_own_folder_the_experiments_need_no_change() -> None:
    for stage in build_stages(Path("runs/quickstart"), smoke=False):
        if stage.arguments[0] in ("train", "encode"):
            assert len(stage.arguments) == 2, stage.arguments


def test_a_folder_of_somebody_elses_is_not_cleared(tmp_path: Path) -> None:
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "mine.txt").write_text("kept")
    with pytest.raises(ValueError, match=r"holds pipeline/, which no quickstart made; choose another folder"):
        quickstart.main(["--smoke", "--run-dir", str(tmp_path)])
    assert [path.name for path in tmp_path.rglob("*")] == ["pipeline", "mine.txt"]
