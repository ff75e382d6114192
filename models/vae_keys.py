"""The names of the video autoencoder's modules in Wan's release and in diffusers, for both the 2.1 and the 2.2 form."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

_RESIDUAL_BLOCK = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}
_RESAMPLE = {"resample.1": "resample.1", "time_conv": "time_conv"}
_ATTENTION = {"norm": "norm", "to_qkv": "to_qkv", "proj": "proj"}
_ENDS = {"conv1": "conv_in", "head.0": "norm_out", "head.2": "conv_out"}


@dataclass(frozen=True)
class VAEStructure:
    """What the numbers in the names depend on."""

    is_residual: bool  # the 2.2 form, which counts within each level; 2.1 counts through
    levels: int  # resolutions
    num_res_blocks: int  # residual blocks in a level of the encoder; the decoder has one more


def vae_structure(names: Iterable[str]) -> VAEStructure:
    """Reads the structure off the encoder's tensor names of either layout. Raises ValueError where there is no encoder."""
    inner = [
        found[1]
        for name in names
        if (found := re.match(r"encoder\.(?:downsamples|down_blocks)\.(.+)\.(?:weight|bias|gamma)$", name))
    ]
    if not inner:
        raise ValueError("not a Wan vae: it holds no levels of an encoder")
    if any(re.match(r"\d+\.(downsamples\.\d+|resnets\.\d+|downsampler)\.", name) for name in inner):
        levels = 1 + max(int(name.split(".")[0]) for name in inner)
        blocks = {
            found[1]
            for name in inner
            if (found := re.match(r"0\.(?:downsamples|resnets)\.(\d+)\.(?!resample|time_conv)", name))
        }
        return VAEStructure(True, levels, len(blocks))
    samplers = {int(name.split(".")[0]) for name in inner if ".resample." in name}
    blocks_and_samplers = 1 + max(int(name.split(".")[0]) for name in inner)
    return VAEStructure(False, 1 + len(samplers), min(samplers, default=blocks_and_samplers))


def vae_modules(names: Iterable[str]) -> dict[str, str]:
    """Original -> diffusers name of every module with weights, for the autoencoder whose tensor names (any layout) these are."""
    structure = vae_structure(names)
    modules = {"conv1": "quant_conv", "conv2": "post_quant_conv"}
    for half in ("encoder", "decoder"):
        modules |= {f"{half}.{key}": f"{half}.{value}" for key, value in _ENDS.items()}
        for place, (name, kind) in enumerate(
            [("resnets.0", _RESIDUAL_BLOCK), ("attentions.0", _ATTENTION), ("resnets.1", _RESIDUAL_BLOCK)]
        ):
            modules |= _within(f"{half}.middle.{place}", f"{half}.mid_block.{name}", kind)
    for level in range(structure.levels):
        modules |= _level(structure, level, "encoder")
        modules |= _level(structure, level, "decoder")
    return modules


def _level(structure: VAEStructure, level: int, half: str) -> dict[str, str]:
    """The modules of one resolution: its residual blocks and, except in the last, the change of resolution after them."""
    down = half == "encoder"
    resnets = structure.num_res_blocks + (0 if down else 1)
    is_last = level == structure.levels - 1
    first = level * (resnets + 1)
    original_list, our_list = ("downsamples", "down_blocks") if down else ("upsamples", "up_blocks")
    modules: dict[str, str] = {}
    for place in range(resnets if is_last else resnets + 1):
        is_resnet = place < resnets
        if structure.is_residual:
            original = f"{half}.{original_list}.{level}.{original_list}.{place}"
            ours = f"{level}.resnets.{place}" if is_resnet else f"{level}.{'downsampler' if down else 'upsampler'}"
        else:
            original = f"{half}.{original_list}.{first + place}"
            in_level = f"{level}.resnets.{place}" if is_resnet else f"{level}.upsamplers.0"
            ours = str(first + place) if down else in_level
        modules |= _within(original, f"{half}.{our_list}.{ours}", _RESIDUAL_BLOCK if is_resnet else _RESAMPLE)
    return modules


def _within(original: str, ours: str, parts: dict[str, str]) -> dict[str, str]:
    return {f"{original}.{key}": f"{ours}.{value}" for key, value in parts.items()}
