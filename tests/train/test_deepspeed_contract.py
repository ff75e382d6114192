"""What the engine relies on in DeepSpeed, one thing at a time: where a new release breaks something, this says what.

deepspeed_facts.py looks at it at every ZeRO stage, at one and two processes.
"""

from typing import Any

import pytest

from muybridge.train import deepspeed_contract
from muybridge.train.deepspeed_contract import TESTED_VERSIONS, check_deepspeed

CASES = [*(f"fp32-{zero}" for zero in range(4)), *(f"bf16-{zero}" for zero in (1, 2, 3))]
LAYOUT = (
    "fragments cover every trained parameter once",
    "no frozen parameter is in a shard",
    "weights of the forward are those of the fragments",
)
FACTS = [
    "the shared-memory op can be turned off",
    "supported optimizers are a list",
    "groups keep their hyper-parameters",
    "groups keep their hyper-parameters through a step",
    "the optimizer's own step is called",
    "each group is a shard",
    *LAYOUT,
    *(f"after a step, {fact}" for fact in LAYOUT),
    *(f"after a refresh, {fact}" for fact in LAYOUT),
    "of a gradient that is not finite no optimizer hears",
    "the norm is known before the first shard is stepped",
    "the norm is of the mean over ranks, before clipping",
    "one step a shard",
    "the optimizer gets the clipped gradient of its fragments",
    "states lie as the masters do",
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("fact", FACTS)
def test_deepspeed_still_does_what_the_engine_relies_on(
    guard_runs: dict[int, list[dict[str, Any]]], fact: str, case: str
) -> None:
    for world, ranks in guard_runs.items():
        for rank, found in enumerate(ranks):
            assert found[case]["contract"][fact], f"rank {rank} of {world}"


@pytest.mark.parametrize("case", ["fp32-3", "bf16-3"])
def test_stage_3_keeps_small_parameters_gathered(guard_runs: dict[int, list[dict[str, Any]]], case: str) -> None:
    for ranks in guard_runs.values():
        assert all(found[case]["contract"]["small parameters stay gathered, large ones do not"] for found in ranks)


@pytest.mark.parametrize("installed", [TESTED_VERSIONS[0], f"{TESTED_VERSIONS[0]}+unknown"])
def test_a_tested_release_passes(monkeypatch: pytest.MonkeyPatch, installed: str) -> None:
    monkeypatch.setattr(deepspeed_contract, "version", lambda name: installed)
    check_deepspeed()


def test_another_release_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed_contract, "version", lambda name: "0.99.0")
    with pytest.raises(ValueError, match=r"deepspeed==0\.99\.0 is installed.*pip install deepspeed==0\.19\.8"):
        check_deepspeed()


def test_the_installed_release_is_a_tested_one() -> None:
    check_deepspeed()
