"""scheduler_config.json: other tools read our sampler out of it, and we read theirs."""

import json
from pathlib import Path

import pytest

from muybridge.models.diffusion.samplers import SamplerConfig, SamplerKind, sampling_schedule
from muybridge.models.diffusion.scheduler_file import sampler_from_file, scheduler_config

diffusers = pytest.importorskip("diffusers", reason="the oracle, diffusers, is not installed")


def write(folder: Path, config: SamplerConfig) -> Path:
    (folder / "scheduler_config.json").write_text(json.dumps(scheduler_config(config)))
    return folder


@pytest.mark.parametrize("shift", [1.0, 3.0, 12.0])
def test_diffusers_loads_the_file_and_visits_the_same_timesteps(tmp_path: Path, shift: float) -> None:
    config = SamplerConfig(kind=SamplerKind.unipc, shift=shift, steps=50)
    scheduler = diffusers.UniPCMultistepScheduler.from_pretrained(write(tmp_path, config))
    for steps in (1, 4, 20, 50):
        config.steps = steps
        scheduler.set_timesteps(steps)
        schedule = sampling_schedule(config)
        assert scheduler.timesteps.tolist() == schedule.timesteps
        assert scheduler.sigmas.tolist() == schedule.noise_levels


def test_the_file_holds_every_setting_that_diffusers_would_otherwise_guess(tmp_path: Path) -> None:
    scheduler = diffusers.UniPCMultistepScheduler.from_pretrained(write(tmp_path, SamplerConfig(shift=3.0)))
    published = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0, "solver_order": 2}
    assert {name: scheduler.config[name] for name in published} == published


def test_tools_that_take_it_for_a_flow_match_euler_scheduler_get_the_shift(tmp_path: Path) -> None:
    folder = write(tmp_path, SamplerConfig(shift=8.0))
    assert diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder).shift == 8.0


def test_a_written_file_is_read_as_unipc_with_its_shift_and_the_rest_of_the_base() -> None:
    base = SamplerConfig(kind=SamplerKind.euler, steps=7, shift=1.0, guidance_scale=2.0)
    found = sampler_from_file(json.loads(json.dumps(scheduler_config(SamplerConfig(shift=3)))), base)
    assert found == SamplerConfig(kind=SamplerKind.unipc, steps=7, shift=3.0, guidance_scale=2.0)


def test_files_that_diffusers_writes_are_read(tmp_path: Path) -> None:
    unipc = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    euler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    for scheduler, kind, shift in ((unipc, SamplerKind.unipc, 5.0), (euler, SamplerKind.euler, 3.0)):
        scheduler.save_pretrained(tmp_path)
        found = sampler_from_file(json.loads((tmp_path / "scheduler_config.json").read_text()))
        assert (found.kind, found.shift) == (kind, shift)


def test_a_scheduler_nothing_here_samples_like_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"_class_name='DDIMScheduler' must be UniPCMultistepScheduler or FlowMatch"):
        sampler_from_file({"_class_name": "DDIMScheduler"})
    file = scheduler_config(SamplerConfig()) | {"solver_order": 3, "use_karras_sigmas": True, "flow_shift": 0}
    with pytest.raises(ValueError) as error:
        sampler_from_file(file)
    for message in (
        "solver_order=3 must be 2",
        "use_karras_sigmas=True must be False",
        "flow_shift=0 must be a number greater than 0",
    ):
        assert message in str(error.value)


def test_a_field_that_the_file_leaves_out_has_diffusers_default() -> None:
    """An epsilon-predicting UniPC file of another model family says nothing of flows."""
    with pytest.raises(ValueError, match="prediction_type='epsilon' must be 'flow_prediction'; use_flow_sigmas=False"):
        sampler_from_file({"_class_name": "UniPCMultistepScheduler"})
    assert sampler_from_file({"_class_name": "FlowMatchEulerDiscreteScheduler"}).shift == 1.0
