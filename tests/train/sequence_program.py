"""Trains small diffusion transformers whose processes share the tokens of their clips, at every ZeRO stage, beside one process that
has the whole batch, and writes how they differ as JSON, for test_sequence_parallel.py to judge.

Torch and DeepSpeed are imported once; the ranks of each world are forks of this process.
"""

import gc
import importlib
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from muybridge.kernels import attention, block_causal_mask
from muybridge.models.dit import DiT
from muybridge.models.dit_config import DiTConfig
from muybridge.models.token_layout import AttentionPattern, SelfAttentionConfig
from muybridge.tests.train.forked import start, wait_for
from muybridge.train.activations import ActivationPolicy, ActivationsConfig, set_activation_policy
from muybridge.train.engine import Engine
from muybridge.train.engine_config import EngineConfig, Precision
from muybridge.train.mesh import Axis, Mesh, ParallelConfig, build_mesh
from muybridge.train.optimizer import OptimizerConfig, build_optimizer
from muybridge.train.sequence_parallel import WholeSequence, exchanged_attention, split_sequence

# By the number of processes: data x sequence, and the case that is trained at each ZeRO stage.
GRIDS: dict[int, dict[tuple[int, int], dict[int, str]]] = {
    2: {(1, 2): {1: "plain", 2: "recomputed", 3: "packed"}},
    3: {(1, 3): {1: "recomputed", 2: "packed", 3: "plain"}},
    4: {
        (1, 4): {1: "packed", 2: "plain", 3: "recomputed"},
        (2, 2): {1: "plain", 2: "packed", 3: "recomputed"},
    },
    6: {(2, 3): {2: "recomputed"}},
    8: {(2, 4): {3: "plain"}},
}
# By torch and DeepSpeed, by every rank on its own otherwise.
IMPORTED_LATE = ("torch._dynamo", "deepspeed.runtime.zero.muon.muon_optimizer")
SAMPLES, MICRO_BATCH, STEPS = 4, 2, 2
# Adam's division by the root of a gradient near 0 would blow rounding up.
LR, EPS, CLIPPING = 1e-2, 1e-1, 1.0


@dataclass
class Case:
    """A model and its input; 3 heads and 45 tokens, so that 2 and 4 processes divide neither and 3 divide both."""

    timesteps: str = "sample"  # one per sample, frame or token
    size: tuple[int, int, int] = (3, 6, 10)  # of the latents; the tokens are 1 x 2 x 2
    heads: int = 3
    pattern: SelfAttentionConfig = field(default_factory=SelfAttentionConfig)
    has_image: bool = False
    is_packed: bool = False
    is_recomputed: bool = False


CASES = {
    "plain": Case(),
    "divided by 2 and 4": Case(size=(3, 8, 8), heads=4),
    "a timestep a frame": Case(timesteps="frame"),
    "a timestep a token": Case(timesteps="token"),
    "fewer tokens than processes": Case(size=(1, 2, 4)),
    "image": Case(has_image=True),
    "packed": Case(is_packed=True),
    "recomputed": Case(is_recomputed=True, timesteps="token"),
    "block-causal": Case(pattern=SelfAttentionConfig(AttentionPattern.block_causal, earlier_frames=1)),
    # 384 slots for 45 tokens: some processes have nothing but padding.
    "sliding tiles": Case(
        timesteps="frame",
        pattern=SelfAttentionConfig(AttentionPattern.sliding_tile, tile=[1, 3, 5], window=[1, 1, 1]),
    ),
    "radial": Case(size=(3, 22, 20), pattern=SelfAttentionConfig(AttentionPattern.radial, radial_width=0.1)),
}
TRAINED = ("plain", "packed", "recomputed")


class Net(nn.Module):
    """The loss of each sample [B] of the places in a step's batch."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.case = case
        self.dit = DiT(
            DiTConfig(
                in_channels=2,
                out_channels=2,
                num_layers=2,
                dim=16 * case.heads,
                num_attention_heads=case.heads,
                ffn_dim=24,
                text_dim=8,
                freq_dim=8,
                image_dim=6 if case.has_image else None,
                self_attention=case.pattern,
            )
        )
        for parameter in self.dit.parameters():  # a fresh head is zero, and lets no gradient through
            parameter.data += 0.1 * torch.randn_like(parameter)

    def forward(self, step: int, places: list[int]) -> Tensor:
        case = self.case
        generator = torch.Generator().manual_seed(step)
        frames, height, width = case.size
        clips = torch.randn(SAMPLES, 2, *case.size, generator=generator)[places]
        text = torch.randn(SAMPLES, 5, 8, generator=generator)[places]
        image = torch.randn(SAMPLES, 7, 6, generator=generator)[places] if case.has_image else None
        rows = {"sample": (), "frame": (frames,), "token": (frames * height * width // 4,)}[case.timesteps]
        timestep = 1000 * torch.rand(SAMPLES, *rows, generator=generator)[places]
        if not case.is_packed:
            velocity = self.dit(clips, timestep, text, image)
            return (velocity - clips.sin()).square().mean((1, 2, 3, 4))
        # Clips and texts of several lengths, in one row.
        packed = [clip[:, : 1 + place % 3] for clip, place in zip(clips, places, strict=True)]
        texts = [tokens[: 2 + place] for tokens, place in zip(text, places, strict=True)]
        velocities = self.dit.forward_packed(packed, timestep, texts)
        return torch.stack([(v - clip.sin()).square().mean() for v, clip in zip(velocities, packed, strict=True)])


def build_net(case: Case, sequence: Axis) -> Net:
    net = Net(case)
    split_sequence(net.dit, sequence)
    if case.is_recomputed:
        set_activation_policy(net.dit, ActivationsConfig(ActivationPolicy.block))
    return net


def micro_batches(data: Axis) -> list[list[int]]:
    """The places of a data group's micro-batches."""
    starts = range(data.rank * MICRO_BATCH, SAMPLES, data.size * MICRO_BATCH)
    return [list(range(start, start + MICRO_BATCH)) for start in starts]


def run_alone(rank: int, folder: Path) -> None:
    """What a process finds that has the whole batch: losses, gradients of the first step, and the weights after the last."""
    alone = Axis(0, 1, None)
    for name, case in CASES.items():
        found: dict[str, Tensor] = {}
        net = build_net(case, alone)
        optimizer = torch.optim.AdamW(net.parameters(), lr=LR, eps=EPS, weight_decay=0.0)
        for step in range(STEPS if name in TRAINED else 1):
            losses = torch.cat([net(step, places) for places in micro_batches(alone)])
            found[f"losses/{step}"] = losses.detach()
            losses.mean().backward()
            if step == 0:
                found |= {f"gradient/{key}": parameter.grad.clone() for key, parameter in named(net).items()}
            nn.utils.clip_grad_norm_(net.parameters(), CLIPPING)
            optimizer.step()
            optimizer.zero_grad()
        found |= {f"weight/{key}": parameter.detach() for key, parameter in named(net).items()}
        save_file(found, folder / f"{name}.safetensors")


def named(net: nn.Module) -> dict[str, nn.Parameter]:
    return dict(net.named_parameters())


def distance(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest entry."""
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


def worst(found: dict[str, Tensor], expected: dict[str, Tensor], kind: str) -> float:
    assert len(found) == sum(name.startswith(f"{kind}/") for name in expected)
    return max(distance(value, expected[f"{kind}/{name}"]) for name, value in found.items())


def compare_gradients(case: Case, mesh: Mesh, expected: dict[str, Tensor]) -> dict[str, float]:
    """Losses and gradients without an engine: the flat mean over all processes, as DeepSpeed takes it."""
    net, world = build_net(case, mesh.sequence), dist.get_world_size()
    found = {"loss": 0.0, "loss within the group": 0.0}
    for places in micro_batches(mesh.data):
        with (
            torch.inference_mode()
        ):  # a validation before a step and between two micro-batches leaves nothing that hurts
            sampled = net(0, places)
        losses = net(0, places)
        found["loss"] = max(found["loss"], distance(losses.detach(), expected["losses/0"][places]))
        found["loss"] = max(found["loss"], distance(sampled, losses.detach()))
        first = losses.detach().clone()
        dist.broadcast(first, group=mesh.sequence.group, group_src=0)
        found["loss within the group"] = max(found["loss within the group"], distance(losses.detach(), first))
        (losses.sum() * (world / SAMPLES)).backward()
    gradients = {name: parameter.grad for name, parameter in named(net).items() if parameter.grad is not None}
    together = nn.utils.parameters_to_vector(gradients.values())  # all in one message
    dist.all_reduce(together)
    nn.utils.vector_to_parameters(together / world, gradients.values())
    found["gradient"] = worst(gradients, expected, "gradient")
    return found


def compare_training(case: Case, mesh: Mesh, zero: int, expected: dict[str, Tensor]) -> dict[str, float]:
    """Losses, gradients and weights of some steps under DeepSpeed."""
    net = build_net(case, mesh.sequence)
    optimizer = build_optimizer(net, OptimizerConfig(eps=EPS, weight_decay=0.0))
    config = EngineConfig(zero=zero, precision=Precision.fp32)
    engine = Engine(net, optimizer, config=config, micro_batch=MICRO_BATCH, gradient_clipping=CLIPPING)
    found = {"loss": 0.0}
    batches = micro_batches(mesh.data)
    for step in range(STEPS):
        for number, places in enumerate(batches, start=1):
            losses = engine(step, places)
            found["loss"] = max(found["loss"], distance(losses.detach(), expected[f"losses/{step}"][places]))
            loss = losses.sum() * (dist.get_world_size() / SAMPLES)
            engine.backward(loss, is_last=number == len(batches))
        if step == 0:
            gradients = {name: safe_get_full_grad(parameter) for name, parameter in named(engine.module).items()}
            found["gradient"] = worst(gradients, expected, "gradient")
        engine.step(LR)
    weights = {name: safe_get_full_fp32_param(parameter) for name, parameter in named(engine.module).items()}
    found["weight"] = worst(weights, expected, "weight")
    engine.destroy()
    return found


def compare_exchange(sequence: Axis) -> dict[str, float]:
    """Attention around the exchange against attention to everything: output and gradients, of lengths, heads and dtypes."""
    found = {}
    assert sequence.group is not None
    split = DiT(DiTConfig(num_layers=1, dim=32, num_attention_heads=2, ffn_dim=8))
    split_sequence(split, sequence)  # makes the group known
    for length, heads, dtype, is_masked in (
        (24, 12, torch.float32, False),
        (23, 5, torch.float32, True),
        (1, 1, torch.float32, False),
        (23, 5, torch.bfloat16, False),
    ):
        generator = torch.Generator().manual_seed(length)
        mask = block_causal_mask(length, 1, window=3) if is_masked else None
        whole = torch.randn(4, 2, heads, length, 16, generator=generator).to(dtype)
        q, k, v, grad = whole.unbind(0)
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        expected = attention(*leaves, mask=mask)
        expected.backward(grad)
        each = -(-length // sequence.size)
        padded = F.pad(whole, (0, 0, 0, each * sequence.size - length), value=9.0)
        here = slice(sequence.rank * each, (sequence.rank + 1) * each)
        own = [x[:, :, here].clone().requires_grad_() for x in padded[:3]]
        out = exchanged_attention(
            *own,
            mask=WholeSequence(length, mask),
            attend=attention,
            processes=sequence.size,
            group=sequence.group.group_name,
        )
        out.backward(padded[3, :, :, here])
        count = max(0, min(length - here.start, each))
        pairs = [(out, expected), *((mine.grad, leaf.grad) for mine, leaf in zip(own, leaves, strict=True))]
        # Padding gives nothing and takes no gradient.
        found[f"{length} tokens, {heads} heads, {dtype}"] = max(
            ((mine - F.pad(every[:, :, here], (0, 0, 0, each - count))).abs().max() / every.abs().max()).item()
            for mine, every in pairs
        )
    return found


def run_world(rank: int, folder: Path) -> None:
    world = dist.get_world_size()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    deepspeed.init_distributed(dist_init_required=False)
    found: dict[str, Any] = {}
    for (data, sequence), trained in GRIDS[world].items():
        mesh = build_mesh(ParallelConfig(sequence=sequence), timeout_seconds=600)
        place = f"{data}x{sequence}"
        expected = {name: load_file(folder.parent / "w1" / f"{name}.safetensors") for name in CASES}
        if data == 1:
            found[f"{place} exchange"] = compare_exchange(mesh.sequence)
            for name, case in CASES.items():
                found[f"{place} {name}"] = compare_gradients(case, mesh, expected[name])
        for zero, name in trained.items():
            found[f"{place} zero {zero}"] = compare_training(CASES[name], mesh, zero, expected[name])
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, found)
    if rank == 0:
        (folder.parent / f"w{world}.json").write_text(json.dumps(everyone))


def main(root: Path) -> None:
    for name in IMPORTED_LATE:
        importlib.import_module(name)
    gc.freeze()  # no rank should go through all of this in search of garbage
    for world in (1, *GRIDS):
        wait_for(start(run_alone if world == 1 else run_world, root / f"w{world}", world=world))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
