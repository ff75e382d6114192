"""One part of a Wan model on its way in: opened under diffusers' names, checked against its config, and given a config.json."""

import json
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..models.dit import DiTConfig
from ..models.token_layout import SelfAttentionConfig
from ..models.vae import VAEConfig
from ..models.wan_keys import Component, detect_layout, to_diffusers_keys
from ..models.wan_sizes import (
    transformer_shapes,
    transformer_sizes,
    umt5_config,
    umt5_shapes,
    vae_shapes,
    vae_sizes,
)
from ..models.weight_files import Tensors, check_shapes, open_weights, read_header, read_json
from .export_plan import EXPORTED_SETTINGS

_PLAIN_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# config.json of Wan's release -> our field, where the weights tell the size as well.
_RELEASE_SIZES = {
    "dim": "dim",
    "ffn_dim": "ffn_dim",
    "freq_dim": "freq_dim",
    "in_dim": "in_channels",
    "out_dim": "out_channels",
    "num_layers": "num_layers",
}
_DIFFUSERS_SIZES = (
    "in_channels out_channels num_layers dim ffn_dim text_dim freq_dim patch_size image_dim pos_embed_seq_len"
).split()


@dataclass(frozen=True)
class OpenPart:
    """The weights of a part under diffusers' names, whole and of the right shapes, and its config.json."""

    component: Component
    source: Path
    config: dict[str, Any]
    tensors: Tensors
    # Latent channels of a transformer's velocity or an autoencoder, the width of a text encoder's features.
    channels: int
    header: dict[str, str]  # what the files say of a transformer beside its tensors, and sampling reads

    @property
    def parameters(self) -> int:
        return sum(shape.numel() for shape in self.tensors.shapes.values())


def open_part(component: Component, source: Path, stack: ExitStack) -> OpenPart:
    """Opens a weight file or a folder with config.json; readable until `stack` closes.

    Raises ValueError naming the source and the tensors that are missing, unknown or misshapen, or the field of its config that
    the weights contradict.
    """
    stored = stack.enter_context(open_weights(source))
    config_file = source / "config.json"
    claims = read_json(config_file) if source.is_dir() else {}
    header: dict[str, str] = {}
    try:
        layout = detect_layout(stored.shapes, component)
        tensors = stored.renamed(to_diffusers_keys(stored.shapes, component, layout))
        if component is Component.transformer:
            header = _kept_header(source, claims)
            transformer = _transformer_config(_header_claims(header) | claims, tensors)
            expected, config, channels = (
                transformer_shapes(transformer),
                transformer.to_diffusers(),
                transformer.out_channels,
            )
        elif component is Component.vae:
            autoencoder = VAEConfig.from_diffusers(claims) if claims else vae_sizes(tensors.shapes)
            expected, config, channels = vae_shapes(autoencoder), autoencoder.to_diffusers(), autoencoder.z_dim
        else:
            config = claims or umt5_config(tensors.shapes)
            expected, channels = umt5_shapes(config), config["d_model"]
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    check_shapes(tensors.shapes, expected, where=str(source))
    return OpenPart(component, source, config, _without_quantised(tensors, source), channels, header)


def _transformer_config(claims: dict[str, Any], tensors: Tensors) -> DiTConfig:
    """The sizes of a transformer by its config (of the release, or of diffusers) and by its weights, which must agree."""
    if claims.get("_class_name") == "WanTransformer3DModel":
        config = DiTConfig.from_diffusers(claims)
        told = transformer_sizes(tensors.shapes, num_heads=config.num_attention_heads)
        pairs = {name: (getattr(config, name), getattr(told, name)) for name in _DIFFUSERS_SIZES}
        _check_claims(pairs)
        return config
    config = transformer_sizes(tensors.shapes, num_heads=claims.get("num_heads"))
    _check_claims(
        {name: (claims[name], getattr(config, ours)) for name, ours in _RELEASE_SIZES.items() if name in claims}
    )
    pattern = SelfAttentionConfig.from_json(claims.get("self_attention", {}))
    return replace(config, eps=claims.get("eps", config.eps), self_attention=pattern)


def _check_claims(pairs: dict[str, tuple[Any, Any]]) -> None:
    if wrong := [f"{name}={claim} must be {told}" for name, (claim, told) in pairs.items() if claim != told]:
        raise ValueError(f"config.json contradicts the weights: {', '.join(wrong)}")


def _kept_header(source: Path, claims: dict[str, Any]) -> dict[str, str]:
    """What `muybridge export` wrote into the header of a transformer; of a release, the rows of text that its config names."""
    header = {name: value for name, value in read_header(source).items() if name.startswith("muybridge.")}
    rows = claims.get("text_len")
    if rows is None or EXPORTED_SETTINGS in header:
        return header
    if not isinstance(rows, int) or rows < 1:
        raise ValueError(f"config.json: text_len={rows} must be the rows of the text features, at least 1")
    return header | {EXPORTED_SETTINGS: json.dumps({"text": {"max_tokens": rows}})}


def _header_claims(header: dict[str, str]) -> dict[str, Any]:
    """What neither the shapes nor the release's config show of a transformer, from the header that `muybridge export` writes."""
    model = json.loads(header.get(EXPORTED_SETTINGS, "{}")).get("model", {})
    names = {"num_attention_heads": "num_heads", "eps": "eps", "self_attention": "self_attention"}
    return {ours: model[name] for name, ours in names.items() if name in model}


def _without_quantised(tensors: Tensors, source: Path) -> Tensors:
    def read(name: str) -> torch.Tensor:
        tensor = tensors.read(name)
        if tensor.dtype not in _PLAIN_DTYPES:
            raise ValueError(
                f"{source}: {name} is {str(tensor.dtype).removeprefix('torch.')}; take the file of bf16, fp16 or fp32 "
                f"weights, quantised ones cannot be trained"
            )
        return tensor

    return Tensors(tensors.shapes, read)
