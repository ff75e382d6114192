from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from muybridge.models.dit import DiT, DiTConfig
from muybridge.models.lora import LoRAConfig, add_lora
from muybridge.models.token_layout import AttentionPattern, SelfAttentionConfig
from muybridge.train.activations import (
    ActivationPolicy,
    ActivationsConfig,
    is_recomputed,
    keeps_results,
    set_activation_policy,
)
from muybridge.train.host_inputs import HostInputs
from muybridge.train.kept_results import keep_and_replay

BLOCKS = 5
NONE = ActivationsConfig()
SELECTIVE = ActivationsConfig(ActivationPolicy.selective)
POLICIES = [
    SELECTIVE,
    ActivationsConfig(ActivationPolicy.every_k, every=2),
    ActivationsConfig(ActivationPolicy.every_k, every=3, offload=True),
    ActivationsConfig(ActivationPolicy.block),
    ActivationsConfig(ActivationPolicy.block, offload=True),
]


def sizes(**changes: Any) -> DiTConfig:
    usual = {"num_layers": BLOCKS, "num_attention_heads": 2, "dim": 32, "ffn_dim": 48, "text_dim": 16, "freq_dim": 32}
    return DiTConfig(**{**usual, **changes})


@dataclass(frozen=True)
class Case:
    """A model, what its timesteps are, and whether it is a LoRA that is trained."""

    image_dim: int | None = None
    pattern: AttentionPattern = AttentionPattern.full
    rows: int = 1
    rank: int = 0
    packed: bool = False
    dtype: torch.dtype = torch.float32

    def build(self, config: ActivationsConfig) -> DiT:
        """Random everywhere: a zero head or zero biases would hide what the layers before do."""
        torch.manual_seed(0)
        dit = DiT(sizes(image_dim=self.image_dim, self_attention=SelfAttentionConfig(self.pattern)))
        if self.rank:
            add_lora(dit, LoRAConfig(rank=self.rank))
        for parameter in dit.parameters():
            nn.init.normal_(parameter, std=0.2)
        set_activation_policy(dit.to(self.dtype), config)
        return dit

    def loss(self, dit: DiT, seed: int) -> Tensor:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        generator = torch.Generator().manual_seed(seed)
        if self.packed:
            clips = [normal(16, 3, 4, 4), normal(16, 1, 4, 8)]
            velocities = dit.forward_packed(clips, torch.tensor([900.0, 17.5]), [normal(5, 16), normal(3, 16)])
            return torch.stack([velocity.square().sum() for velocity in velocities]).sum()
        timestep = 1000 * torch.rand(2, self.rows, generator=generator)
        image = None if self.image_dim is None else normal(2, 7, self.image_dim)
        return dit(normal(2, 16, 3, 4, 4), timestep, normal(2, 5, 16), image).square().mean()


CASES = {
    "text": Case(),
    "image": Case(image_dim=8),
    "a timestep a token": Case(rows=12),
    "masked": Case(pattern=AttentionPattern.block_causal),
    "packed": Case(packed=True),
    "LoRA": Case(rank=2),
    "LoRA in bf16": Case(rank=2, image_dim=8, dtype=torch.bfloat16),
}


@lru_cache
def gradients(case: Case, policy: str) -> dict[str, Tensor]:
    """Gradients of two steps in a row, the second of which uses what the first has left."""
    config = NONE if policy == "none" else POLICIES[int(policy)]
    dit = case.build(config)
    for seed in (1, 2):
        case.loss(dit, seed).backward()
    return {name: parameter.grad for name, parameter in dit.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize(
    "policy", range(len(POLICIES)), ids=[f"{p.policy.name}-{p.every}-{p.offload}" for p in POLICIES]
)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gradients_are_the_same_bits_with_every_policy(case: Case, policy: int) -> None:
    expected, found = gradients(case, "none"), gradients(case, str(policy))
    assert expected.keys() == found.keys()
    assert all(expected[name].abs().max() > 0 for name in expected if "to_k.bias" not in name)
    for name, gradient in expected.items():
        assert torch.equal(gradient, found[name]), name


def flops(case: Case, config: ActivationsConfig) -> int:
    dit = case.build(config)
    with FlopCounterMode(display=False) as counter:
        case.loss(dit, 1).backward()
    return counter.get_total_flops()


class Calls(TorchDispatchMode):
    """Counts the matmuls and attentions that run; torch's counter of FLOPs does not know attention on the CPU."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += any(word in func.name() for word in ("mm", "attention"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["text", "image", "masked", "packed"])
def test_selective_runs_no_matmul_or_attention_twice(name: str) -> None:
    counts = []
    for config in (NONE, SELECTIVE):
        dit = CASES[name].build(config)
        with FlopCounterMode(display=False) as flops_of, Calls() as calls:
            CASES[name].loss(dit, 1).backward()
        counts.append((flops_of.get_total_flops(), calls.count))
    assert counts[0] == counts[1]
    assert counts[0][1] > BLOCKS * 12


def test_block_runs_a_forward_of_the_blocks_twice() -> None:
    case = CASES["text"]
    once = flops(case, NONE)
    again = [flops(case, config) - once for config in POLICIES]
    assert again[0] == 0
    assert again[1] == 3 * again[3] // 5  # blocks 0, 2 and 4
    assert again[2] == 2 * again[3] // 5  # blocks 0 and 3
    assert again[3] == again[4]
    assert again[3] > 0.2 * once


def test_selective_runs_only_the_second_product_of_a_lora_twice() -> None:
    case = Case(rank=2)
    tokens, text = 2 * 12, 2 * 5
    # Products of [tokens, rank] by [rank, width] in ten layers, two of which read the text, one of which is wider.
    expected = BLOCKS * 2 * 2 * (tokens * (7 * 32 + 48) + text * 2 * 32)
    assert 0 < flops(case, SELECTIVE) - flops(case, NONE) <= expected


def test_without_gradients_nothing_is_kept_or_recomputed() -> None:
    case = CASES["text"]
    dit = case.build(POLICIES[2])
    with torch.no_grad():
        expected = case.loss(case.build(NONE), 1)
        assert torch.equal(case.loss(dit, 1), expected)


def test_blocks_run_through_their_hooks_in_the_recomputation() -> None:
    """ZeRO-3 gathers and releases weights there."""
    for config, expected in ((NONE, 1), (SELECTIVE, 2), (POLICIES[3], 2), (POLICIES[4], 2)):
        dit = CASES["text"].build(config)
        calls: list[nn.Module] = []
        dit.blocks[1].register_forward_pre_hook(lambda block, _inputs, calls=calls: calls.append(block))
        CASES["text"].loss(dit, 1).backward()
        assert len(calls) == expected, config


def test_bias_added_in_place_to_a_kept_result_is_added_once() -> None:
    """As DeepSpeed's Linear does under ZeRO-3, out of autograd's sight."""

    class InPlaceLinear(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            ctx.save_for_backward(x, weight)
            out = x.matmul(weight.t())
            out += bias
            return out

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            x, weight = ctx.saved_tensors
            return grad @ weight, grad.flatten(0, 1).t() @ x.flatten(0, 1), grad.sum((0, 1))

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return InPlaceLinear.apply(torch.sin(InPlaceLinear.apply(x, weight, bias)), weight, bias).sin()

    generator = torch.Generator().manual_seed(0)
    found = []
    for is_selective in (False, True):
        generator.manual_seed(0)
        inputs = [torch.randn(*size, generator=generator, requires_grad=True) for size in ((2, 3, 8), (8, 8), (8,))]
        if is_selective:
            out = checkpoint(function, *inputs, use_reentrant=False, context_fn=keep_and_replay)
        else:
            out = function(*inputs)
        found.append(torch.autograd.grad(out.square().sum(), inputs))
    for plain, selective in zip(*found, strict=True):
        assert torch.equal(plain, selective)


def test_a_second_backward_is_refused() -> None:
    loss = CASES["text"].loss(CASES["text"].build(SELECTIVE), 1)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="can run only once"):
        loss.backward()


def test_buffers_on_the_host_are_used_again_and_grow() -> None:
    host = HostInputs()

    def step(rows: int) -> set[int]:
        tensors = [torch.randn(rows, 4) for _ in range(3)]
        sent = [host.send(tensor) for tensor in tensors]
        for one in sent:
            one.leave_device()
        for one, tensor in reversed(list(zip(sent, tensors, strict=True))):
            assert torch.equal(one.open(), tensor)
        return {one.buffer.data_ptr() for one in sent}

    first = step(8)
    assert step(8) == first
    assert step(2) == first
    grown = step(16)
    assert len(grown) == 3
    assert step(8) == grown


def test_the_block_that_is_next_in_backward_is_fetched_ahead() -> None:
    host = HostInputs()
    sent = [host.send(torch.full((2,), float(number))) for number in range(3)]
    for one in sent:
        one.leave_device()
    assert [one._here is None for one in sent] == [True, True, True]
    sent[2].open()
    assert [one._here is None for one in sent] == [True, False, True]
    sent[1].open()
    assert [one._here is None for one in sent] == [False, True, True]


def test_a_group_of_blocks_begins_with_the_one_that_is_recomputed() -> None:
    config = POLICIES[2]
    assert [is_recomputed(config, number) for number in range(5)] == [True, False, False, True, False]
    assert [keeps_results(config, number) for number in range(5)] == [False, True, True, False, True]


def test_faults_name_field_value_and_rule() -> None:
    assert not [fault for config in (NONE, *POLICIES) for fault in config.faults("activations")]
    found = ActivationsConfig(ActivationPolicy.selective, every=1, offload=True).faults("activations")
    assert found == [
        "activations.every=1 must be at least 2 (all blocks: activations.policy=block)",
        "activations.offload=true must go with activations.policy=block or every_k, which keep the inputs of blocks, not with "
        "selective",
    ]
    assert ActivationsConfig(ActivationPolicy.auto, offload=True).faults("activations")
