"""What a resumed run must not change, and what a finished one says that comes next."""

from dataclasses import replace

import pytest

from muybridge.models.diffusion.conditioning import ConditioningForm
from muybridge.models.diffusion.known_places import ConditioningConfig
from muybridge.models.lora import LoRAConfig
from muybridge.train.config import TrainConfig
from muybridge.train.experts import Expert
from muybridge.train.fixed_settings import changed_settings, fixed_settings
from muybridge.train.optimizer import OptimizerConfig, OptimizerKind
from muybridge.train.tasks import next_command

HIGH = TrainConfig(run_dir="runs/a", expert=Expert.high)


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (replace(HIGH, seed=1), ["seed: 0 saved, 1 now"]),
        (replace(HIGH, expert=Expert.low), ["expert: high saved, low now"]),
        (replace(HIGH, expert=Expert.none), ["expert: high saved, none now"]),
        (replace(HIGH, boundary=0.9), ["boundary: 0.875 saved, 0.9 now"]),
        (
            replace(HIGH, conditioning=ConditioningConfig(form=ConditioningForm.clean_frames)),
            ["conditioning.form: none saved, clean_frames now"],
        ),
        (
            replace(HIGH, optimizer=OptimizerConfig(kind=OptimizerKind.muon)),
            ["optimizer.kind: adamw saved, muon now"],
        ),
        (replace(HIGH, steps=7), []),
    ],
)
def test_what_decides_a_step_must_not_change(now: TrainConfig, words: list[str]) -> None:
    assert changed_settings(now, fixed_settings(HIGH)) == words


def test_the_boundary_is_free_without_experts() -> None:
    assert changed_settings(TrainConfig(boundary=0.9), fixed_settings(TrainConfig())) == []


def test_a_setting_that_a_checkpoint_does_not_have_is_another_one() -> None:
    assert changed_settings(HIGH, fixed_settings(TrainConfig())) == [
        "expert: none saved, high now",
        "boundary: nothing saved, 0.875 now",
    ]


def test_a_checkpoint_of_before_there_was_another_optimizer_is_adamws() -> None:
    saved = {name: value for name, value in fixed_settings(HIGH).items() if name != "optimizer.kind"}
    assert changed_settings(HIGH, saved) == []
    muon = replace(HIGH, optimizer=OptimizerConfig(kind=OptimizerKind.muon))
    assert changed_settings(muon, saved) == ["optimizer.kind: adamw saved, muon now"]


def test_the_next_command_is_one_that_works_on_the_run() -> None:
    channels = ConditioningConfig(form=ConditioningForm.channels)
    run = TrainConfig(run_dir="runs/a")
    assert next_command(run) == "muybridge sample run=runs/a prompts=prompts.txt"
    assert next_command(replace(run, conditioning=channels)).endswith(" prompts=prompts.txt image=FILE")
    assert next_command(HIGH) == "muybridge export run=runs/a low_run=LOW_RUN out=FOLDER"
    assert next_command(replace(HIGH, lora=LoRAConfig(rank=4))).endswith(" out=FOLDER merge=true")
    low = replace(HIGH, expert=Expert.low, conditioning=channels)
    assert next_command(low) == "muybridge export run=HIGH_RUN low_run=runs/a out=FOLDER"
