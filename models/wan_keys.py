"""The names of Wan's tensors in the original release, in ComfyUI's files and in diffusers, and the way between them.

Converting is renaming, so a file of any size is converted tensor by tensor. The diffusers names are those of our own modules.
"""

import re
from collections.abc import Iterable
from enum import StrEnum

import torch

from .vae_keys import vae_modules
from .weight_files import some


class Layout(StrEnum):
    """Whose names a file's tensors have."""

    diffusers = "diffusers"
    original = "original"  # Wan's release; ComfyUI, musubi and others read files with these names
    comfy = "comfy"  # transformer: the original names behind a prefix; text encoder: the diffusers names; VAE: the original's


class Component(StrEnum):
    """The part of a pipeline that a file holds; its folder has the same name."""

    transformer = "transformer"
    vae = "vae"
    text_encoder = "text_encoder"


COMFY_PREFIX = "model.diffusion_model."
# Tensors without weights of their own: a copy of `shared.weight`, and the tokenizer's bytes in ComfyUI's files.
TIED_EMBEDDING = "encoder.embed_tokens.weight"
EMBEDDED_TOKENIZER = "spiece_model"

# Per component: names that only this layout has. The more of them a file holds, the surer.
_MARKS = {
    Component.transformer: {
        Layout.diffusers: r"blocks\.\d+\.attn[12]\.|condition_embedder\.|proj_out\.",
        Layout.original: r"blocks\.\d+\.(self|cross)_attn\.|(text|time)_embedding\.|head\.",
        Layout.comfy: re.escape(COMFY_PREFIX) + r"(blocks\.\d+\.(self|cross)_attn\.|(text|time)_embedding\.|head\.)",
    },
    Component.vae: {
        Layout.diffusers: r"(en|de)coder\.(conv_in|mid_block|norm_out|conv_out|down_blocks|up_blocks)\.",
        Layout.original: r"(en|de)coder\.(conv1|middle|head|downsamples|upsamples)\.",
    },
    Component.text_encoder: {
        Layout.diffusers: r"encoder\.block\.\d+\.layer\.[01]\.(SelfAttention|DenseReluDense)\.",
        Layout.original: r"blocks\.\d+\.(attn|ffn|pos_embedding)\.",
    },
}

_LEAVES = ("weight", "bias", "gamma")
# Modules and tables that Wan's own code and diffusers keep in float32, whatever the rest of the transformer is in.
_FLOAT32_PARTS = {"time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"}

_BLOCK = {
    "self_attn.q": "attn1.to_q",
    "self_attn.k": "attn1.to_k",
    "self_attn.v": "attn1.to_v",
    "self_attn.o": "attn1.to_out.0",
    "cross_attn.q": "attn2.to_q",
    "cross_attn.k": "attn2.to_k",
    "cross_attn.v": "attn2.to_v",
    "cross_attn.o": "attn2.to_out.0",
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "self_attn.norm_q": "attn1.norm_q",
    "self_attn.norm_k": "attn1.norm_k",
    "cross_attn.norm_q": "attn2.norm_q",
    "cross_attn.norm_k": "attn2.norm_k",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
    # The only norm of a block with weights: diffusers numbers the norms in the order of use, the release does not.
    "norm3": "norm2",
    "modulation": "scale_shift_table",
}
_AROUND_BLOCKS = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
_UMT5_BLOCK = {
    "norm1": "layer.0.layer_norm",
    "attn.q": "layer.0.SelfAttention.q",
    "attn.k": "layer.0.SelfAttention.k",
    "attn.v": "layer.0.SelfAttention.v",
    "attn.o": "layer.0.SelfAttention.o",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}


def detect_layout(names: Iterable[str], component: Component) -> Layout:
    """The layout of a file from its tensors' names. Raises ValueError where they are not those of this part of Wan."""
    names = list(names)
    counts = {
        layout: sum(re.match(mark, name) is not None for name in names) for layout, mark in _MARKS[component].items()
    }
    layout = max(counts, key=lambda candidate: counts[candidate])
    if counts[layout] == 0:
        raise ValueError(f"not a Wan {component}: it holds {some(names) or 'no tensors'}")
    if component is Component.text_encoder and layout is Layout.diffusers and EMBEDDED_TOKENIZER in names:
        return Layout.comfy
    return layout


def to_diffusers_keys(names: Iterable[str], component: Component, layout: Layout) -> dict[str, str]:
    """Name in the file -> name in diffusers, in the order given; a state dict will do for `names`.

    Left out is what has no weights of its own: `TIED_EMBEDDING`, `EMBEDDED_TOKENIZER`. Raises ValueError naming unknown names.
    """
    names = list(names)
    prefix = _prefix(component, layout)
    bare = [name.removeprefix(prefix) for name in names]
    modules = _modules(bare, component)
    if _has_diffusers_names(component, layout):
        modules = {ours: ours for ours in modules.values()}
    renamed = _renamed(bare, modules)
    unknown = [name for name, found in zip(names, renamed, strict=True) if found is None or not name.startswith(prefix)]
    return _checked(names, renamed, unknown, f"a Wan {component} with {layout} names")


def from_diffusers_keys(names: Iterable[str], component: Component, layout: Layout) -> dict[str, str]:
    """Name in diffusers -> name in a file of `layout`: the inverse of `to_diffusers_keys`, with the same errors."""
    names = list(names)
    prefix = _prefix(component, layout)
    modules = _modules(names, component)
    table = {ours: ours if _has_diffusers_names(component, layout) else theirs for theirs, ours in modules.items()}
    renamed = [prefix + found if found else found for found in _renamed(names, table)]
    unknown = [name for name, found in zip(names, renamed, strict=True) if found is None]
    return _checked(names, renamed, unknown, f"a Wan {component} with diffusers names")


def transformer_modules(num_layers: int) -> dict[str, str]:
    """Original -> diffusers name of every module with weights, and of the tables that are parameters themselves.

    The image modules of Wan 2.1 I2V are among them, for they are named alike in every model that has them.
    """
    return _AROUND_BLOCKS | _blocks("blocks", "blocks", _BLOCK, num_layers)


def umt5_modules(num_layers: int) -> dict[str, str]:
    """Original -> transformers name of every module with weights in the umT5 encoder."""
    around = {"token_embedding": "shared", "norm": "encoder.final_layer_norm"}
    return around | _blocks("blocks", "encoder.block", _UMT5_BLOCK, num_layers)


def transformer_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """What a tensor of a transformer in `dtype` is stored in, by its diffusers name: a few are computed in float32 always."""
    return torch.float32 if _FLOAT32_PARTS & set(name.split(".")) else dtype


def _blocks(original: str, ours: str, block: dict[str, str], count: int) -> dict[str, str]:
    return {f"{original}.{i}.{key}": f"{ours}.{i}.{value}" for i in range(count) for key, value in block.items()}


def _modules(names: list[str], component: Component) -> dict[str, str]:
    """The table for a model of the depth that the names show."""
    if component is Component.vae:
        return vae_modules(names)
    numbers = [int(found[1]) for name in names if (found := re.match(r"(?:encoder\.block|blocks)\.(\d+)\.", name))]
    num_layers = 1 + max(numbers, default=-1)
    return transformer_modules(num_layers) if component is Component.transformer else umt5_modules(num_layers)


def _has_diffusers_names(component: Component, layout: Layout) -> bool:
    return layout is Layout.diffusers or (layout is Layout.comfy and component is Component.text_encoder)


def _prefix(component: Component, layout: Layout) -> str:
    return COMFY_PREFIX if layout is Layout.comfy and component is Component.transformer else ""


def _renamed(names: list[str], table: dict[str, str]) -> list[str | None]:
    """The new name of each tensor; None for an unknown one, and "" for what has no weights of its own."""
    found: list[str | None] = []
    for name in names:
        module, _, leaf = name.rpartition(".")
        if name in (TIED_EMBEDDING, EMBEDDED_TOKENIZER):
            found.append("")
        elif name in table:
            found.append(table[name])
        else:
            found.append(f"{table[module]}.{leaf}" if module in table and leaf in _LEAVES else None)
    return found


def _checked(names: list[str], renamed: list[str | None], unknown: list[str], what: str) -> dict[str, str]:
    if unknown:
        raise ValueError(f"not tensors of {what}: {some(unknown)}")
    return {name: new for name, new in zip(names, renamed, strict=True) if new}
