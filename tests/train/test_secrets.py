"""Settings that would put a secret into run_dir are refused before anything is said or started, without repeating it."""

from pathlib import Path

import pytest

from muybridge.scripts import cli
from muybridge.train.config import load_train_config, read_config

CANARY = "canary-0123456789"
QUICK = ["+experiment=quickstart", "dry_run=true"]
HEX = "0123456789abcdef0123456789abcdef01234567"
SECRETS = {
    "the value of a variable": (
        [f"tracking.name=x{CANARY}"],
        "tracking.name must not be the value of the environment variable",
    ),
    "in a list": ([f"validation.prompts=[a dog,{CANARY}]"], "validation.prompts must not be"),
    "in a word that is no number": ([f"steps={CANARY}"], "steps must not be"),
    "in what is no setting": ([f"+tracking.api={CANARY}"], "tracking.api must not be"),
    "in what is no override": ([CANARY], "an argument must not be"),
    "by its name": (["+wandb_api_key=a1b2c3d4e5"], "wandb_api_key must not be a secret, as its name says"),
    "a key of W&B": ([f"tracking.name={HEX}"], "tracking.name must not be a key of W&B"),
    "a key of others": (["data.path=hf_" + "a1B2" * 9], "data.path must not be a key"),
    "a URL": (["'data.path=https://me:hunter22@host/a'"], "data.path must not be a URL with a user's name or password"),
    "a signed URL": (["'data.path=https://host/a?sig=hunter22hunter'"], "data.path must not be a URL with a signature"),
}
QUIET = (CANARY, HEX, "a1b2c3d4e5", "a1B2", "hunter22")


@pytest.fixture(autouse=True)
def secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", CANARY)
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@pytest.mark.parametrize("shown", ["started", "shown"])
@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_is_named_and_not_repeated(name: str, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    overrides, words = SECRETS[name]
    # A mistake beside it, whose message would repeat its value: the secret comes first and alone.
    arguments = [*QUICK, f"optimizer.lr={CANARY}", *overrides, *(["--cfg", "job"] if shown == "shown" else [])]
    assert cli.main(["train", *arguments]) == 64
    captured = capsys.readouterr()
    assert words in captured.err.replace("+", "")
    assert captured.out == ""
    assert not [text for text in QUIET if text in captured.err]


def test_a_secret_in_a_file_of_settings_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    project = str(load_train_config(QUICK).tracking.project)
    monkeypatch.setenv("OTHER_TOKEN", project + "-0123")
    load_train_config(QUICK)
    monkeypatch.setenv("OTHER_TOKEN", f"{load_train_config(QUICK).data.path}")
    with pytest.raises(
        ValueError, match=r"^data\.path must not be the value of the environment variable OTHER_TOKEN \("
    ):
        load_train_config(QUICK)


@pytest.mark.parametrize(
    "setting", ["run_dir=${oc.env:HF_TOKEN}", "run_dir=x/${oc.env:HF_TOKEN,y}", "+a=${oc.env:OTHER}"]
)
def test_settings_bring_in_no_variable_that_may_be_a_secret(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTHER", "no secret, but how should anybody know")
    with pytest.raises(
        ValueError, match=r"settings must not hold the environment variable (HF_TOKEN|OTHER) \(only HOME, "
    ) as caught:
        load_train_config([*QUICK, setting])
    assert CANARY not in str(caught.value)


def test_settings_bring_in_variables_of_places_and_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_JWT", "eyJ")
    setting = "run_dir=${oc.env:SCRATCH}/${oc.env:SLURM_JOB_ID}/${oc.env:MUYBRIDGE_NAME,first}"
    assert load_train_config([*QUICK, setting]).run_dir == "/scratch/me/77/first"
    with pytest.raises(ValueError, match="environment variable SLURM_JWT"):
        load_train_config([*QUICK, "run_dir=${oc.env:SLURM_JWT}"])


def test_what_a_run_wrote_is_data(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("steps: 3\ntracking: {name: '${oc.env:HOME}'}\n")
    with pytest.raises(ValueError, match=r"config\.yaml must hold plain values"):
        read_config(tmp_path)
    (tmp_path / "config.yaml").write_text("steps: 3\n_target_: os.system\n")
    with pytest.raises(ValueError, match="_target_"):
        read_config(tmp_path)
    (tmp_path / "config.yaml").write_text("steps: !!python/object/apply:os.system ['touch ran']\n")
    with pytest.raises(ValueError, match="python/object"):
        read_config(tmp_path)
