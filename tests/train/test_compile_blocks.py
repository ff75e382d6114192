"""Compiled blocks: one graph for all of them, the results of eager code with every policy of activations, no silent fallback."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import torch._inductor.config
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit

from muybridge.models.dit import DiT, DiTConfig
from muybridge.train import compile_blocks as module
from muybridge.train.activations import ActivationPolicy, ActivationsConfig, set_activation_policy
from muybridge.train.compile_blocks import CompilationCount, CompileConfig, compile_blocks

POLICIES = [
    ActivationsConfig(),
    ActivationsConfig(ActivationPolicy.selective),
    ActivationsConfig(ActivationPolicy.block),
    ActivationsConfig(ActivationPolicy.every_k, offload=True),
]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    with torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=256):
        yield
    torch._dynamo.reset()


def use_backend(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """Tracing takes seconds, inductor's code many."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))


def build(activations: ActivationsConfig, *, layers: int = 4) -> DiT:
    torch.manual_seed(0)
    sizes = {"in_channels": 4, "out_channels": 4, "dim": 32, "num_attention_heads": 2, "ffn_dim": 64}
    dit = DiT(DiTConfig(num_layers=layers, text_dim=16, freq_dim=16, patch_size=[1, 2, 2], **sizes))
    torch.nn.init.normal_(dit.proj_out.weight, std=0.1)
    set_activation_policy(dit, activations)
    return dit


def loss_of(dit: DiT, *, frames: int = 2) -> Tensor:
    latents, text = (
        torch.randn(size, generator=torch.Generator().manual_seed(1)) for size in ((2, 4, frames, 4, 4), (2, 5, 16))
    )
    return dit(latents, torch.tensor([10.0, 500.0]), text).square().mean()


def loss_and_gradient(dit: DiT) -> tuple[Tensor, Tensor]:
    loss = loss_of(dit)
    gradients = torch.autograd.grad(loss, list(dit.parameters()))
    return loss.detach(), torch.cat([gradient.flatten() for gradient in gradients])


@pytest.mark.parametrize("activations", POLICIES, ids=lambda a: a.policy.name)
def test_blocks_share_their_graphs_and_give_the_gradients_of_eager_code(
    activations: ActivationsConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_backend(monkeypatch, "aot_eager")
    dit = build(activations)
    loss, gradient = loss_and_gradient(dit)
    count = CompilationCount()
    compile_blocks(dit, CompileConfig(enabled=True), activations, shapes=1)
    compiled_loss, compiled_gradient = loss_and_gradient(dit)
    # Four blocks; every_k has those that run again as a whole and the others.
    assert count.take() == (2 if activations.policy is ActivationPolicy.every_k else 1)
    torch.testing.assert_close(compiled_loss, loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(compiled_gradient, gradient, rtol=0, atol=1e-6 * float(gradient.abs().max()))


def kept_bytes(dit: DiT) -> int:
    """Bytes of activations that wait for the backward."""
    weights = {weight.untyped_storage().data_ptr() for weight in dit.parameters()}
    kept = 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.nbytes * (tensor.untyped_storage().data_ptr() not in weights)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss_of(dit)
    return kept


def test_compiled_selective_blocks_keep_less_than_all_and_more_than_their_inputs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_backend(monkeypatch, "aot_eager")
    kept = []
    for activations in POLICIES[:3]:
        dit = build(activations, layers=1)
        compile_blocks(dit, CompileConfig(enabled=True), activations, shapes=1)
        kept.append(kept_bytes(dit))
    everything, selective, inputs = kept
    assert inputs < 0.7 * selective < 0.7 * 0.7 * everything


def test_what_inductor_makes_trains_as_eager_code_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    # Without worker processes, each of which would import torch.
    monkeypatch.setattr(torch._inductor.config, "compile_threads", 1)
    losses: list[list[float]] = []
    for enabled in (False, True):
        dit = build(ActivationsConfig(), layers=2)
        compile_blocks(dit, CompileConfig(enabled=enabled), ActivationsConfig(), shapes=1)
        optimizer = torch.optim.SGD(dit.parameters(), lr=0.1)
        losses.append([])
        for _ in range(4):
            loss = loss_of(dit)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    eager, compiled = losses
    assert eager[-1] < 0.9 * eager[0]
    # The rounding of sums that are taken in another order, which four steps carry on.
    assert compiled == pytest.approx(eager, rel=1e-5)


def test_a_new_shape_is_told_with_its_cause_and_too_many_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    use_backend(monkeypatch, "eager")
    monkeypatch.setattr(module, "_GRAPHS_PER_SHAPE", 1)
    dit = build(ActivationsConfig(), layers=1)
    with torch._dynamo.config.patch(recompile_limit=1):
        compile_blocks(dit, CompileConfig(enabled=True), ActivationsConfig(), shapes=1)
        loss_of(dit)
        count = CompilationCount()
        loss_of(dit)
        assert count.take() == 0
        loss_of(dit, frames=3)
        assert count.take() == 1
        assert "size mismatch" in count.cause()
        with pytest.raises(FailOnRecompileLimitHit):
            loss_of(dit, frames=4)
