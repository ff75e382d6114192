"""Clips that several processes encode together against one process, as vae_program.py found them."""

import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from muybridge.tests.conftest import Command

Runs = dict[int, list[dict[str, Any]]]
WORLDS, FRAMES = (2, 3, 4), (1, 5, 9, 17, 33)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, launch: Command) -> Runs:
    """What each rank found, by the number of processes."""
    root = tmp_path_factory.mktemp("vae_parallel")
    answer = launch(0, Path(__file__).with_name("vae_program.py"), root)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return {world: json.loads((root / f"w{world}.json").read_text()) for world in WORLDS}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("frames", FRAMES)
@pytest.mark.parametrize("vae", ["wan_2_1", "wan_2_2"])
def test_latents_are_those_of_one_process_and_the_same_bits_on_all(
    found: Runs, world: int, frames: int, vae: str
) -> None:
    for rank in found[world]:
        for chunk in (None, 1):
            case = rank[f"{vae} {frames} {chunk}"]
            assert case["error"] < 2e-6
            assert case["is_alike"]
            assert frames == 1 or case["moves"] > 1e-3  # or the frames before would not matter


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("vae", ["wan_2_1", "wan_2_2"])
def test_every_frame_is_encoded_once_and_chunks_stay_small(found: Runs, world: int, vae: str) -> None:
    for frames in FRAMES:
        for chunk in (None, 1):
            parts = [rank[f"{vae} {frames} {chunk}"]["frames"] for rank in found[world]]
            assert sum(chain(*parts)) == frames
            if chunk is None:  # small clips: one stretch of frames a process, and none are left idle without need
                assert sum(map(len, parts)) == min(world, 1 + frames // 4)
            else:  # two latent frames where the processes do not divide them
                assert max(chain(*parts)) <= 8


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("vae", ["wan_2_1", "wan_2_2"])
def test_half_precision_stays_what_it_is(found: Runs, world: int, vae: str) -> None:
    for rank in found[world]:
        assert rank[f"{vae} bf16"]["dtype"] == "torch.bfloat16"
        assert rank[f"{vae} bf16"]["error"] < 0.05
