"""The YAML files: every one composes, holds only settings that exist, and describes what its name says."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from muybridge.models.flops import count_parameters
from muybridge.scripts.sample import SampleConfig
from muybridge.train.compose import compose_config, plain
from muybridge.train.config import TrainConfig, load_train_config, read_config

ROOT = Path(__file__).parents[2] / "configs"
EXPERIMENTS = sorted(path.stem for path in (ROOT / "experiment").glob("*.yaml"))
MEMBERS = sorted(
    f"{path.parent.name}={path.stem}" for path in ROOT.glob("*/*.yaml") if path.parent.name != "experiment"
)
# What each group fills.
SECTIONS = {"model", "vae", "text", "data", "objective", "optimizer", "deepspeed", "kernels"}


def compose(*overrides: str) -> TrainConfig:
    """Settings without the rules between them."""
    return compose_config(list(overrides), config_class=TrainConfig, config_name="train", schema_name="train_schema")


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_and_keeps_the_rules(experiment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    config = load_train_config([f"+experiment={experiment}", "dry_run=true"])
    assert config.steps > 0
    assert config.run_dir.startswith("runs/")


@pytest.mark.parametrize(
    ("experiment", "processes", "latents"),
    [
        ("wan_1_3b_480p", 8, (16, 21, 60, 104)),
        ("wan_14b_480p", 64, (16, 21, 60, 104)),
        ("wan_14b_full", 32, (16, 21, 60, 104)),
        ("wan2_2_a14b_two_experts", 32, (16, 21, 60, 104)),
        ("wan_i2v", 32, (16, 21, 60, 104)),
        ("wan2_2_5b_full", 16, (48, 31, 44, 80)),
    ],
)
def test_the_large_experiments_divide_over_their_machines(
    experiment: str, processes: int, latents: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    config = load_train_config([f"+experiment={experiment}", "dry_run=true"])
    assert all(bucket.global_batch % (bucket.micro_batch * processes) == 0 for bucket in config.buckets(processes))
    assert config.latent_shape() == latents


def test_an_experiments_folders_follow_its_weights_and_its_expert() -> None:
    config = compose("+experiment=wan2_2_a14b_two_experts", "init_from=weights/mine", "expert=low")
    assert (config.vae.path, config.text.path) == ("weights/mine/vae", "weights/mine")
    assert config.run_dir == "runs/wan2_2_a14b_low"
    assert (config.noise_schedule().min_level, config.noise_schedule().max_level) == (0.0, 0.875)


@pytest.mark.parametrize(("model", "parameters"), [("wan_1_3b", 1.419e9), ("wan_14b", 14.288e9)])
def test_model_sizes_are_those_of_wan(model: str, parameters: float) -> None:
    assert count_parameters(compose(f"model={model}").model) == pytest.approx(parameters, rel=1e-3)


@pytest.mark.parametrize("member", MEMBERS)
def test_every_group_member_can_be_chosen_and_changes_what_its_file_says(member: str) -> None:
    group, name = member.split("=")
    assert group in SECTIONS
    chosen = plain(compose(member))[group]

    def check(file: dict[str, Any], settings: dict[str, Any], path: str) -> None:
        for key, value in file.items():
            if isinstance(value, dict):
                check(value, settings[key], f"{path}.{key}")
            else:
                assert settings[key] == value, f"{path}.{key}"

    check(yaml.safe_load((ROOT / group / f"{name}.yaml").read_text()), chosen, group)


def test_every_folder_is_a_group_or_the_experiments() -> None:
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == SECTIONS | {"experiment"}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_settings_a_run_writes_are_read_back_the_same(experiment: str, tmp_path: Path) -> None:
    config = compose(f"+experiment={experiment}")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(plain(config), sort_keys=False))
    config.run_dir = str(tmp_path)  # where it lies now
    assert read_config(tmp_path) == config


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must be the directory of a training run .*no config.yaml"):
        read_config(tmp_path)


def test_sample_settings_compose() -> None:
    config = compose_config(
        ["run=runs/first", "prompts=p.txt", "weights=ema-0.999", "shift=2"],
        config_class=SampleConfig,
        config_name="sample",
        schema_name="sample_schema",
    )
    assert (config.run, config.prompts, config.weights, config.shift, config.steps) == (
        "runs/first",
        "p.txt",
        "ema-0.999",
        2.0,
        None,
    )
