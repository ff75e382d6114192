"""LoRA files in the forms that other tools write and read; inside the project a layer goes by its name in diffusers.

    comfy      diffusion_model.blocks.0.self_attn.q.lora_A.weight          ComfyUI, diffusers, diffusion-pipe
    diffusers  transformer.blocks.0.attn1.to_q.lora_A.weight               with the settings of peft in the header
    kohya      lora_unet_blocks_0_self_attn_q.lora_down.weight             musubi-tuner, with .alpha for every layer
    DiffSynth  blocks.0.self_attn.q.lora_A.default.weight                  read only
    peft       base_model.model.blocks.0.attn1.to_q.lora_A.weight          read only; adapter_config.json beside it has its alpha

Files are written with the scale multiplied into B, so that tools that look for an alpha and tools that do not agree.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .lora import LoRAFactors
from .wan_keys import transformer_modules
from .weight_files import some, write_tensors


class LoRAForm(StrEnum):
    """The forms that can be written."""

    comfy = "comfy"
    diffusers = "diffusers"
    kohya = "kohya"  # diffusers reads it only where every Linear layer of every block is in it


# Where diffusers keeps the settings of peft, as JSON, in a safetensors header.
METADATA_KEY = "lora_adapter_metadata"
_PEFT_PREFIX = "base_model.model."
_PREFIX = re.compile(r"^(model\.diffusion_model\.|diffusion_model\.|base_model\.model\.|transformer\.|lora_unet_)")
_FACTOR = re.compile(r"^(.+)\.(lora_A|lora_B|lora_down|lora_up)(?:\.default)?\.weight$")
_ALPHA = re.compile(r"^(.+)\.(?:lora_)?alpha$")


def write_lora(
    path: Path,
    factors: Mapping[str, LoRAFactors],
    form: LoRAForm = LoRAForm.comfy,
    *,
    dtype: torch.dtype = torch.float32,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file as `write_tensors` does; `metadata` goes to its header. ValueError where there is no layer."""
    if not factors:
        raise ValueError(f"{path}: a LoRA needs at least one layer")
    original = {ours: name for name, ours in transformer_modules(_depth(factors)).items()}
    tensors: dict[str, Tensor] = {}
    for name, layer in factors.items():
        down = layer.down.detach().to("cpu", dtype)
        up = (layer.up.detach().float() * layer.scale).to("cpu", dtype)
        if form is LoRAForm.kohya:
            stem = f"lora_unet_{original[name].replace('.', '_')}"
            tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
            tensors[f"{stem}.alpha"] = torch.tensor(float(layer.rank))
        else:
            stem = f"diffusion_model.{original[name]}" if form is LoRAForm.comfy else f"transformer.{name}"
            tensors |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
    header = dict(metadata or {})
    if form is LoRAForm.diffusers:
        header[METADATA_KEY] = json.dumps(_peft_settings(factors), indent=2, sort_keys=True)
    write_tensors(path, tensors, header)


def read_lora(path: Path | str) -> dict[str, LoRAFactors]:
    """The factors of a file of any of the forms, by layer.

    A layer's scale is that of its alpha in the file, else of peft's settings in the file's header or, for peft's own form, in the
    adapter_config.json beside it, else 1.

    Raises ValueError naming the file and the tensors that are no LoRA of a Wan transformer's Linear layers, and the layers that
    lack a half or whose halves do not fit each other.
    """
    path = Path(path)
    tensors, header = _read(path)
    known = transformer_modules(_depth(tensors))
    modules = {m: m for m in known.values()} | known | {name.replace(".", "_"): m for name, m in known.items()}

    def module_of(found: re.Match[str]) -> str | None:
        return modules.get(_PREFIX.sub("", found[1]))

    unknown = []
    halves: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    for key, tensor in tensors.items():
        if (found := _FACTOR.match(key)) and (module := module_of(found)):
            halves.setdefault(module, {})["down" if found[2] in ("lora_A", "lora_down") else "up"] = tensor
        elif (found := _ALPHA.match(key)) and (module := module_of(found)) and tensor.numel() == 1:
            alphas[module] = tensor.item()
        else:
            unknown.append(key)
    if unknown or not halves:
        words = f"{some(unknown)}" if unknown else "it holds no tensors"
        raise ValueError(f"{path}: not a LoRA of the Linear layers of a Wan transformer: {words}")
    broken = [f"{name} (an alpha alone)" for name in alphas.keys() - halves.keys()]
    for name, pair in halves.items():
        if (
            len(pair) < 2
            or any(half.ndim != 2 for half in pair.values())
            or pair["down"].shape[0] != pair["up"].shape[1]
        ):
            broken.append(f"{name} ({', '.join(f'{half} {list(pair[half].shape)}' for half in sorted(pair))})")
    if broken:
        raise ValueError(f"{path}: layers that are not down [rank, in] and up [out, rank]: {some(broken)}")
    settings = _peft_settings_of(path, header, is_peft=any(key.startswith(_PEFT_PREFIX) for key in tensors))
    return {
        name: LoRAFactors(
            pair["down"], pair["up"], _scale(name, pair["down"].shape[0], alphas.get(name), settings, where=path)
        )
        for name, pair in halves.items()
    }


def _scale(name: str, rank: int, alpha: float | None, settings: dict[str, Any], *, where: Path) -> float:
    """alpha / rank of a layer, by the file's own alpha or by peft's settings: patterns are regular expressions for a name's end."""
    if alpha is not None:
        return alpha / rank
    if not settings:
        return 1.0
    for field, words in (("use_dora", "DoRA"), ("lora_bias", "a LoRA with biases")):
        if settings.get(field):
            raise ValueError(f"{where}: {field}=true: {words} is not supported")
    alpha = settings.get("lora_alpha", rank)
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            alpha = value
            break
    assert alpha is not None
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _peft_settings(factors: Mapping[str, LoRAFactors]) -> dict[str, Any]:
    """The settings with which peft makes these layers, as diffusers stores them. With the scale in B, alpha is the rank."""
    [(rank, _)] = Counter(layer.rank for layer in factors.values()).most_common(1)
    others = {name: layer.rank for name, layer in factors.items() if layer.rank != rank}
    settings = {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(factors),
    }
    return {f"transformer.{name}": value for name, value in settings.items()}


def _peft_settings_of(path: Path, header: dict[str, str], *, is_peft: bool) -> dict[str, Any]:
    """peft's settings of a file: those in its header, or beside a file that peft wrote; {} where there are none.

    Any other file may lie in peft's folder by chance, such as one of ours, whose scale is in B.
    """
    source, text = f"{path}: {METADATA_KEY}", header.get(METADATA_KEY, "")
    beside = path.with_name("adapter_config.json")
    if not text and is_peft and beside.is_file():
        source, text = str(beside), beside.read_text(encoding="utf-8")
    if not text:
        return {}
    try:
        settings = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{source}: not valid JSON ({error})") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{source}: must hold a JSON object")
    return {name.removeprefix("transformer."): value for name, value in settings.items()}


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118  (not a dict)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from error


def _depth(names: Mapping[str, object]) -> int:
    """Blocks of the transformer, as far as the names of layers or tensors show."""
    return 1 + max(
        (int(number) for name in names for number in re.findall(r"blocks[._](\d{1,3})[._]", name)), default=-1
    )
