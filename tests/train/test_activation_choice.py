"""`activations.policy=auto` takes what costs least of what fits, for the clips that need most."""

from dataclasses import replace

import pytest

from muybridge.train.activation_choice import GIB, LADDER, choose_policy
from muybridge.train.config import TrainConfig, load_train_config
from muybridge.train.costs_memory import step_memory
from muybridge.train.memory import parameter_counts


@pytest.fixture(scope="module")
def config() -> TrainConfig:
    """Of 1.3B, on short and on long clips."""
    buckets = "data.buckets=[{frames:17,height:256,width:256},{frames:81,height:480,width:832}]"
    return load_train_config(
        ["+experiment=wan_1_3b_480p", "data.access=latents", "data.latents=cache", buckets, "dry_run=true"]
    )


def worst(config: TrainConfig) -> str:
    """The bucket that needs most: the short clips, of which there are more at once."""
    counts = parameter_counts(config)
    return max(config.buckets(8), key=lambda bucket: step_memory(config, counts, bucket, 8).peak).name


def test_the_cheapest_policy_that_fits_all_shapes_is_chosen(config: TrainConfig) -> None:
    counts, names = parameter_counts(config), []
    for memory in (12, 16, 24, 32, 40, 48, 64, 80, 141):
        chosen, words = choose_policy(config, 8, memory * GIB)
        peaks = [
            max(step_memory(replace(config, activations=rung), counts, b, 8).peak for b in config.buckets(8))
            for rung in LADDER[: LADDER.index(chosen) + 1]
        ]
        assert peaks[-1] <= memory * GIB or chosen == LADDER[-1]
        assert all(peak > memory * GIB for peak in peaks[:-1])
        assert f"at the peak of {worst(config)}" in words
        names.append(chosen.policy.name)
    assert names == sorted(names, key=["block", "every_k", "selective", "none"].index)
    assert {"block", "selective", "none"} <= set(names)


def test_the_choice_is_given_with_its_reason(config: TrainConfig) -> None:
    _, words = choose_policy(config, 8, 80 * GIB)
    assert words.startswith("activations: selective (")
    assert "GiB of 80.0 GiB at the peak of 17x256x256; none would need " in words
    _, words = choose_policy(config, 8, 3 * GIB)
    assert "block with offload, which may not fit" in words


def test_float8_at_zero_3_takes_what_it_goes_with() -> None:
    settings = ["+experiment=wan_14b_480p", "fp8.recipe=tensorwise", "dry_run=true"]
    chosen, _ = choose_policy(load_train_config(settings, world_size=64), 64, 10_000 * GIB)
    assert chosen.policy.name == "block"
