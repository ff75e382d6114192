"""LoRA layers: what they compute and train, which layers they are, and merging them into the weights."""

import copy
import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from muybridge.models.dit import DiT, DiTConfig
from muybridge.models.lora import (
    LoRAConfig,
    LoRAFactors,
    LoRALinear,
    LoRATarget,
    add_lora,
    load_lora,
    lora_factors,
    lora_ranks,
    merge_lora,
)
from muybridge.train.activations import ActivationPolicy, ActivationsConfig, set_activation_policy

SIZES = DiTConfig(num_layers=2, num_attention_heads=2, dim=32, ffn_dim=48, text_dim=16, freq_dim=32)
LINEARS_OF_A_BLOCK = {
    *(f"attn{i}.{name}" for i in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *("ffn.net.0.proj", "ffn.net.2"),
}


def build_dit() -> DiT:
    """Random everywhere: a zero head or zero biases would hide what the layers before do."""
    torch.manual_seed(0)
    dit = DiT(SIZES)
    for parameter in dit.parameters():
        nn.init.normal_(parameter, std=0.2)
    return dit


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 16, 3, 4, 4, generator=generator)
    return latents, torch.tensor([900.0, 17.5]), torch.randn(2, 5, 16, generator=generator)


def randomise(dit: DiT) -> None:
    """B of a trained LoRA, which is not zero."""
    for name, parameter in dit.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.3)


def adapted(config: LoRAConfig) -> DiT:
    dit = build_dit()
    add_lora(dit, config)
    randomise(dit)
    return dit


def test_a_fresh_lora_changes_nothing() -> None:
    dit = build_dit()
    before = dit(*inputs())
    add_lora(dit, LoRAConfig(rank=4))
    assert torch.equal(dit(*inputs()), before)


def test_a_layer_has_the_weight_plus_alpha_over_rank_times_b_a() -> None:
    base = nn.Linear(3, 2)
    layer = LoRALinear(base, rank=1, scale=0.5)
    with torch.no_grad():
        layer.lora_A.copy_(torch.tensor([[1.0, 0.0, 2.0]]))
        layer.lora_B.copy_(torch.tensor([[4.0], [-2.0]]))
    change = torch.tensor([[2.0, 0.0, 4.0], [-1.0, 0.0, -2.0]])  # 0.5 * B A
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(x), nn.functional.linear(x, base.weight + change, base.bias))
    assert layer.weight is base.weight


def test_only_the_factors_get_gradients_and_all_of_them_do() -> None:
    dit = adapted(LoRAConfig(rank=3, alpha=5.0))
    dit(*inputs()).square().mean().backward()
    trained = {name for name, parameter in dit.named_parameters() if parameter.requires_grad}
    assert trained == {
        f"blocks.{i}.{linear}.lora_{part}" for i in (0, 1) for linear in LINEARS_OF_A_BLOCK for part in "AB"
    }
    for name, parameter in dit.named_parameters():
        if name in trained:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None, name


def test_gradients_are_those_of_the_weight_the_factors_make() -> None:
    """dL/dA = scale B^T dL/dW and dL/dB = scale dL/dW A^T, with dL/dW of a plain model with the merged weights."""
    dit = adapted(LoRAConfig(rank=3, alpha=5.0))
    plain = copy.deepcopy(dit)
    merge_lora(plain)
    plain.requires_grad_(True)
    for model in (dit, plain):
        model(*inputs()).square().mean().backward()
    for name, layer in dit.named_modules():
        if isinstance(layer, LoRALinear):
            grad = plain.get_submodule(name).weight.grad
            assert isinstance(grad, Tensor)
            assert layer.lora_A.grad is not None
            assert layer.lora_B.grad is not None
            torch.testing.assert_close(layer.lora_A.grad, 5 / 3 * layer.lora_B.T @ grad, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(layer.lora_B.grad, 5 / 3 * grad @ layer.lora_A.T, atol=1e-5, rtol=1e-4)


def test_recomputing_blocks_gives_the_same_gradients() -> None:
    gradients = []
    for recompute in (False, True):
        dit = adapted(LoRAConfig(rank=3))
        policy = ActivationPolicy.block if recompute else ActivationPolicy.none
        set_activation_policy(dit, ActivationsConfig(policy))
        dit(*inputs()).square().mean().backward()
        gradients.append({name: p.grad for name, p in dit.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-7, rtol=1e-5)


def test_bf16_stays_near_fp32() -> None:
    dit = adapted(LoRAConfig(rank=3))
    expected = dit(*inputs())
    got = dit.bfloat16()(*inputs())
    assert (got - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize(
    ("config", "ranks"),
    [
        (LoRAConfig(rank=4, targets=[LoRATarget.q]), {f"blocks.{i}.attn{j}.to_q": 4 for i in (0, 1) for j in (1, 2)}),
        (
            LoRAConfig(
                rank=4, targets=[LoRATarget.ffn, LoRATarget.o], layer_ranks=["*:0", "*.ffn.*:2", "blocks.1.*:8"]
            ),
            {
                "blocks.0.ffn.net.0.proj": 2,
                "blocks.0.ffn.net.2": 2,
                **{
                    f"blocks.1.{name}": 8
                    for name in ("ffn.net.0.proj", "ffn.net.2", "attn1.to_out.0", "attn2.to_out.0")
                },
            },
        ),
    ],
)
def test_targets_and_patterns_choose_layers_and_ranks(config: LoRAConfig, ranks: dict[str, int]) -> None:
    names = [name for name, _ in build_dit().named_modules()]
    assert lora_ranks(names, config) == ranks
    dit = adapted(config)
    found = {name: m.lora_A.shape[0] for name, m in dit.named_modules() if isinstance(m, LoRALinear)}
    assert found == ranks


def test_keys_and_values_of_image_tokens_belong_to_k_and_v() -> None:
    names = ["blocks.0.attn2.add_k_proj", "blocks.0.attn2.add_v_proj", "condition_embedder.image_embedder.ff.net.2"]
    assert lora_ranks(names, LoRAConfig(rank=2)) == dict.fromkeys(names[:2], 2)


def test_a_pattern_that_fits_no_layer_is_named() -> None:
    with pytest.raises(ValueError, match=r"lora.layer_ranks: blocks.7.\*:3 matches no layer"):
        add_lora(build_dit(), LoRAConfig(rank=2, layer_ranks=["blocks.7.*:3"]))


def test_patterns_that_leave_no_layer_are_refused() -> None:
    with pytest.raises(ValueError, match=r"lora\.layer_ranks=.*leaves no layer to train"):
        add_lora(DiT(SIZES), LoRAConfig(rank=3, layer_ranks=["*:0"]))


def test_a_merged_model_computes_the_same_and_is_plain_again() -> None:
    dit = adapted(LoRAConfig(rank=4, alpha=3.0, layer_ranks=["*.to_k:2"]))
    expected = dit(*inputs())
    names = {name for name in dit.state_dict() if "lora" not in name}
    merge_lora(dit)
    torch.testing.assert_close(dit(*inputs()), expected, atol=1e-5, rtol=1e-5)
    assert set(dit.state_dict()) == names == set(build_dit().state_dict())
    assert not any(isinstance(module, LoRALinear) for module in dit.modules())


def test_factors_of_a_state_dict_come_back_with_their_product() -> None:
    """Also into layers with another scale, and from the names of a checkpoint, where the DiT is a part of a whole."""
    config = LoRAConfig(rank=4, alpha=3.0, layer_ranks=["*.to_k:2"])
    source = adapted(config)
    factors = lora_factors({f"transformer.{name}": value for name, value in source.state_dict().items()}, config)
    assert {layer.scale for layer in factors.values()} == {0.75, 1.5}
    other = build_dit()
    add_lora(other, dataclasses.replace(config, alpha=None))
    load_lora(other, factors, where="here")
    torch.testing.assert_close(other(*inputs()), source(*inputs()), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        factors["blocks.0.attn1.to_k"].delta(),
        1.5 * (source.state_dict()["blocks.0.attn1.to_k.lora_B"] @ source.state_dict()["blocks.0.attn1.to_k.lora_A"]),
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: f.pop("blocks.0.attn1.to_q"), r"missing: blocks.0.attn1.to_q$"),
        (lambda f: f.update({"proj_out": f["blocks.0.attn1.to_q"]}), r"not in lora.targets: proj_out$"),
        (
            lambda f: f.update({"blocks.0.attn1.to_q": LoRAFactors(torch.zeros(3, 32), torch.zeros(32, 3), 1.0)}),
            r"of other sizes: blocks.0.attn1.to_q \(in, rank, out \(32, 3, 32\) instead of \(32, 4, 32\)\)$",
        ),
    ],
)
def test_factors_of_other_layers_are_refused_by_name(
    change: Callable[[dict[str, LoRAFactors]], object], words: str
) -> None:
    config = LoRAConfig(rank=4)
    dit = adapted(config)
    factors = lora_factors(dit.state_dict(), config)
    change(factors)
    with pytest.raises(ValueError, match=words):
        load_lora(dit, factors, where="here")


def test_faults_name_the_field_the_value_and_the_rule() -> None:
    assert LoRAConfig().faults("lora") == []
    assert LoRAConfig(rank=8, alpha=4.0, layer_ranks=["a:b:3"]).faults("lora") == []
    bad = LoRAConfig(rank=-1, alpha=0.0, targets=[], layer_ranks=["x", "x:y", "y:-2"])
    assert bad.faults("lora") == [
        "lora.rank=-1 must be 0 (off) or more",
        "lora.alpha=0.0 must be positive, or null for the rank",
        "lora.targets=[] must name at least one of q, k, v, o, ffn",
        "lora.layer_ranks[0]=x must be PATTERN:RANK, such as blocks.0.*:64",
        "lora.layer_ranks[1]=x:y must be PATTERN:RANK, such as blocks.0.*:64",
        "lora.layer_ranks[2]=y:-2 must be PATTERN:RANK, such as blocks.0.*:64",
        "lora.rank=-1 must be at least 1 where lora.layer_ranks is set",
    ]
    assert LoRAConfig(init_from="x").faults("lora") == ["lora.rank=0 must be at least 1 where lora.init_from is set"]
