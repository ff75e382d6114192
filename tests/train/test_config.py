"""Mistakes in the settings: all of them in one message that names the field, the value and the rule, before anything starts."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from muybridge.models.diffusion.known_places import ConditioningConfig
from muybridge.models.lora import LoRAConfig
from muybridge.models.text import TextEncoderConfig, TextEncoderKind
from muybridge.scripts import cli
from muybridge.train.activations import ActivationPolicy
from muybridge.train.compose import plain
from muybridge.train.config import TrainConfig, load_train_config, read_config

# The figures that the messages below name are set here: the recipe may change.
QUICK = [
    *("+experiment=quickstart", "dry_run=true", "steps=100", "global_batch=32", "micro_batch=32"),
    *("model.dim=192", "model.num_attention_heads=6", "model.patch_size=[1,2,2]", "model.text_dim=192"),
    *("text.dim=192", "text.num_heads=6", "vae.architecture.z_dim=16", "validation.every_steps=10"),
]
LARGE = ["+experiment=wan_1_3b_480p", "dry_run=true"]

MISTAKES = {
    "misspelt field": (["optimizer.lrr=1"], "optimizer.lrr is not a setting of optimizer, did you mean optimizer.lr?"),
    "misspelt section": (["optimiser.lr=1"], "optimiser is not a setting of TrainConfig, did you mean optimizer?"),
    "misspelt top level": (["stpes=3"], "stpes is not a setting of TrainConfig, did you mean steps?"),
    "added with a plus": (["+nothing=3"], "nothing is not a setting of TrainConfig"),
    "below a number": (["steps.more=3"], "steps.more is not a setting"),
    "word for a number": (["optimizer.lr=abc"], "optimizer.lr=abc"),
    "fraction for a count": (["steps=1.5"], "steps=1.5"),
    "word for a list": (["model.patch_size=abc"], "model.patch_size"),
    "no such choice": (["task=music"], "task=music"),
    "null where a value is needed": (["steps=null"], "steps=None"),
    "frames": (["data.frames=50"], "data.frames=50 must be 1 + a multiple of 4"),
    "filter": (["data.filter='lumma > 2'"], "data.filter='lumma > 2': there is no column lumma; did you mean luma?"),
    "height": (["data.height=60"], "data.height=60 must be a multiple of"),
    "width": (["data.width=68"], "data.width=68 must be a multiple of"),
    "heads": (["model.num_attention_heads=7"], "model.num_attention_heads=7 must divide model.dim=192"),
    "text width": (["model.text_dim=64"], "model.text_dim=64 must be text.dim=192"),
    "channels": (["model.in_channels=8"], "model.in_channels=8 must be the autoencoder's z_dim=16"),
    "patch in time": (["model.patch_size=[2,2,2]"], "must give a multiple of model.patch_size[0]=2 latent frames"),
    "no batch": (["micro_batch=0"], "micro_batch=0 must be at least 1"),
    "no steps": (["steps=0"], "steps=0 must be at least 1"),
    "no run_dir": (["run_dir=''"], "run_dir must be set"),
    "stage 0 in bf16": (["deepspeed.zero=0", "deepspeed.precision=bf16"], "deepspeed.zero=0 must be 1 or more"),
    "no such stage": (["deepspeed.zero=4"], "deepspeed.zero=4 must be 0, 1, 2 or 3"),
    "no such backend": (["kernels.attention=fast"], "kernels.attention=fast"),
    "cuDNN for norms": (["kernels.pointwise=cudnn"], "kernels.pointwise=cudnn must be auto, own or reference"),
    "no learning rate": (["optimizer.lr=0"], "optimizer.lr=0.0 must be positive"),
    "average": (["ema.decays=[1]"], "ema.decays=1.0 must lie between 0 and 1"),
    "checkpoints": (["checkpoint.keep_last=1"], "checkpoint.keep_last=1 must be at least 2"),
    "threads": (["threads=-1"], "threads=-1 must be 0 (torch decides) or more"),
    "no autoencoder": (["vae.path=null"], "vae.path must name a trained autoencoder's folder"),
    "latents of nothing": (["data.latents=null"], "data.latents must name a folder"),
    "latents for a VAE": (["task=video_vae"], "data.access=latents must be raw with task=video_vae"),
    "validation of nothing": (
        ["validation.path=null", "validation.prompts=[]"],
        "must be 0 where neither path nor prompts is set",
    ),
    "best checkpoints by chance": (
        [
            "validation.path=clips",
            "checkpoint.keep_best=1",
            "checkpoint.every_minutes=20",
            "checkpoint.every_steps=null",
        ],
        "checkpoint.every_steps=None must divide validation.every_steps=10",
    ),
    "best checkpoints of few steps": (
        ["validation.path=clips", "checkpoint.keep_best=1", "checkpoint.every_steps=15"],
        "checkpoint.every_steps=15 must divide validation.every_steps=10 or be a multiple",
    ),
    "best checkpoints of the end": (
        ["validation.path=clips", "checkpoint.keep_best=1", "checkpoint.every_steps=0"],
        "checkpoint.every_steps=0 must divide validation.every_steps=10",
    ),
    "shared by nobody": (["parallel.sequence=0"], "parallel.sequence=0 must be at least 1"),
    "shared by more than there are heads": (
        ["parallel.sequence=8"],
        "parallel.sequence=8 must be at most model.num_attention_heads=6",
    ),
    "an autoencoder's clips shared": (
        ["task=video_vae", "data.access=raw", "parallel.sequence=2"],
        "parallel.sequence=2 must be 1 with task=video_vae",
    ),
    "matrices on the host": (
        ["optimizer.kind=muon", "deepspeed=zero2", "deepspeed.offload_optimizer=true"],
        "optimizer.kind=muon must be adamw with deepspeed.offload_optimizer=true",
    ),
    "gathered weights kept for float8": (
        ["deepspeed=zero3", "deepspeed.precision=bf16", "fp8.recipe=rowwise", "fp8.min_width=64"],
        "activations.policy=none must be block or auto with fp8.recipe=rowwise and deepspeed.zero=3",
    ),
    "too narrow for float8": (["fp8.recipe=rowwise"], "fp8.min_width=1024 must be at most model.dim=192"),
    "every block, but not quite": (["activations.every=1"], "activations.every=1 must be at least 2"),
    "nothing to move to the host": (
        ["activations.offload=true"],
        "activations.offload=true must go with activations.policy=",
    ),
    "no value": (["steps"], "'steps' is not KEY=VALUE"),
    "a sweep": (["steps=1,2"], "'steps=1,2': a sweep needs --multirun"),
    "a deletion": (["~steps"], "'~steps': deleting a key is not supported"),
    "no such member": (["model=huge"], "huge"),
}


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever started the tests."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named(mistake: str, capsys: pytest.CaptureFixture[str]) -> None:
    overrides, words = MISTAKES[mistake]
    assert cli.main(["train", *QUICK, *overrides]) == 64
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.out == ""
    assert captured.err.startswith("muybridge: ")


@pytest.mark.parametrize("mistake", sorted(MISTAKES.keys() - {"no such member"}))
def test_one_mistake_is_one_fault(mistake: str) -> None:
    with pytest.raises(ValueError, match="has 1 fault:"):
        load_train_config([*QUICK, *MISTAKES[mistake][0]])


def test_all_mistakes_are_in_one_message() -> None:
    wrong = ["optimizer.lrr=1", "steps=abc", "data.frames=50", "deepspeed.zero=9", "ema.decays=[2]", "global_batch=0"]
    with pytest.raises(ValueError) as error:
        load_train_config([*QUICK, *wrong])
    message = str(error.value)
    for words in ("optimizer.lrr", "steps=abc", "data.frames=50", "deepspeed.zero=9", "ema.decays=2.0"):
        assert message.count(words) == 1, words
    assert "global_batch=0" in message


def test_an_experiment_that_does_not_exist_is_answered_with_those_that_do() -> None:
    with pytest.raises(ValueError) as error:
        load_train_config(["+experiment=quikstart"])
    assert "quikstart" in str(error.value)
    assert "quickstart_vae_image" in str(error.value)
    assert "wan_14b_480p" in str(error.value)


def test_processes_need_not_divide_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    config = load_train_config([*QUICK, "global_batch=32", "micro_batch=4"])
    [bucket] = config.buckets(3)
    assert (bucket.global_batch, bucket.micro_batch) == (32, 4)


def test_processes_that_cannot_share_clips_are_refused_with_what_is_near() -> None:
    near = (
        r"parallel.sequence=4 must divide the number of processes, 6 \(nearest: parallel.sequence=3, or 8 processes\)"
    )
    with pytest.raises(ValueError, match=near):
        load_train_config([*QUICK, "parallel.sequence=4"], world_size=6)
    load_train_config([*QUICK, "parallel.sequence=4"])  # whose processes are not known
    assert load_train_config([*QUICK, "parallel.sequence=3"], world_size=6).data_groups(6) == 2


def test_a_run_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    written = plain(load_train_config(QUICK))
    del written["activations"], written["parallel"], written["compile"], written["fp8"]
    written["model"]["gradient_checkpointing"] = True
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(written))
    assert read_config(tmp_path).activations.policy is ActivationPolicy.block
    written["model"]["gradient_checkpointing"] = False
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(written))
    assert read_config(tmp_path).activations.policy is ActivationPolicy.none


def test_a_wrong_environment_variable_stops_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUYBRIDGE_KERNELS", "attention=fast")
    with pytest.raises(ValueError, match=r"MUYBRIDGE_KERNELS='attention=fast'.*must be one of attention=auto"):
        load_train_config(["+experiment=quickstart", "dry_run=true"])


def test_a_missing_autoencoder_stops_a_run_but_no_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = f"vae.path={tmp_path / 'none'}"
    with pytest.raises(ValueError, match=r"vae.path=.*none must be a folder with config.json"):
        load_train_config([*QUICK, "dry_run=false", missing])
    assert cli.main(["train", *QUICK, missing]) == 0
    assert f"still needed: {missing} must be a folder" in capsys.readouterr().out


def test_missing_text_weights_and_initial_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        load_train_config([*LARGE, "dry_run=false", f"init_from={tmp_path / 'none'}"])
    for words in ("vae.path=weights/wan_2_1/vae", "text.path=weights/umt5_xxl", f"init_from={tmp_path / 'none'}"):
        assert words in str(error.value)


def test_each_missing_half_of_an_encoder_and_a_missing_lora_file_are_named(tmp_path: Path) -> None:
    for name in ("text_encoder", "image_encoder"):
        (tmp_path / name).mkdir()
    config = TrainConfig(
        text=TextEncoderConfig(kind=TextEncoderKind.umt5, path=str(tmp_path)),
        conditioning=ConditioningConfig(image_encoder=str(tmp_path)),
        lora=LoRAConfig(rank=4, init_from=str(tmp_path / "none.safetensors")),
    )
    missing = "\n".join(config.missing_inputs())
    for words in (
        f"text.path={tmp_path} must be a folder with text_encoder/ and tokenizer/; tokenizer/ is missing",
        f"conditioning.image_encoder={tmp_path} must be a folder with image_encoder/ and image_processor/; image_processor/",
        f"lora.init_from={tmp_path / 'none.safetensors'} must be a LoRA file",
    ):
        assert words in missing


def test_a_check_prints_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", *LARGE]) == 0
    out = capsys.readouterr().out
    assert "frames: 81" in out
    assert "precision: bf16" in out
    assert "the settings are valid (1419.0 M parameters)" in out


def test_help_shows_the_usual_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--help"]) == 0
    assert "muybridge train +experiment=quickstart" in capsys.readouterr().out
    assert cli.main(["train"]) == 0


def test_an_unknown_option_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "+experiment=quickstart", "--steps=3"]) == 64
    assert "unknown option --steps=3" in capsys.readouterr().err


def test_a_model_that_does_not_fit_is_refused_with_figures(
    tiny_run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # 172 B parameters: 2.8 TB before activations.
    giant = ["model.dim=16384", "model.num_attention_heads=128", "model.ffn_dim=65536", "model.num_layers=40"]
    assert cli.main(["train", *tiny_run, f"run_dir={tmp_path / 'run'}", *giant]) == 78
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    for words in ("GiB a process before activations", "B parameters", "deepspeed.zero=1", "a smaller model"):
        assert words in line
    assert not (tmp_path / "run").exists()


def test_cfg_prints_every_setting_and_a_mistake_ends_the_command(
    muybridge: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    shown = muybridge("train", "+experiment=wan_14b_480p", "--cfg", "job")
    assert shown.returncode == 0, shown.stderr
    assert "gradient_clipping: 1.0" in shown.stdout
    assert "num_layers: 40" in shown.stdout
    wrong = muybridge("train", *QUICK, "modle.dim=3", "data.frames=8")
    assert wrong.returncode == 64
    assert wrong.stderr.splitlines() == [
        "muybridge: the configuration has 2 faults:",
        "  - modle is not a setting of TrainConfig, did you mean model?",
        "  - data.frames=8 must be 1 + a multiple of 4 (the autoencoder's temporal stride)",
    ]


def test_collectives_outlast_the_limits_of_the_watchdog() -> None:
    with pytest.raises(ValueError, match=r"deepspeed\.timeout_seconds=100 must be above watchdog\.step_seconds=7200"):
        load_train_config([*QUICK, "watchdog.step_seconds=7200", "deepspeed.timeout_seconds=100"])
    load_train_config([*QUICK, "watchdog.step_seconds=0", "deepspeed.timeout_seconds=1801"])
