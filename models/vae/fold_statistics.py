"""Another latent scale for the same autoencoder, for tools that scale the latents of every model by Wan's own statistics."""

from dataclasses import replace

import torch
from torch import Tensor

from .config import VAEConfig


@torch.no_grad()
def fold_statistics(
    state_dict: dict[str, Tensor], config: VAEConfig, mean: list[float], std: list[float]
) -> tuple[dict[str, Tensor], VAEConfig]:
    """Weights and config of the same autoencoder with latent statistics `mean` and `std` (z_dim values each).

    Normalised latents, their log-variance less that of `std`, and what is decoded from them stay as they were, while raw
    latents take the new scale: `quant_conv` and `post_quant_conv` undo the change on both sides. Computed in float64 and
    rounded to the weights' dtype; all other tensors are those of `state_dict`, which is not changed. (Log-variances at the
    limits of `encode`, -30 and 20, are cut at another place.) Raises ValueError for statistics that do not fit z_dim.
    """
    folded_config = replace(config, latents_mean=list(mean), latents_std=list(std))
    if not mean:
        raise ValueError(f"fold_statistics.latents_mean must have z_dim={config.z_dim} values")
    if faults := folded_config.faults("fold_statistics"):
        raise ValueError("; ".join(faults))
    old_mean = _float64(config.latents_mean or [0.0] * config.z_dim)
    old_std = _float64(config.latents_std or [1.0] * config.z_dim)
    # new latents = scale * old latents + shift, so that (old - old_mean) / old_std == (new - mean) / std
    scale = _float64(std) / old_std
    shift = _float64(mean) - old_mean * scale

    folded = dict(state_dict)
    # Rows of quant_conv write the mean, then the log-variance; the latter only moves by the log of the squared scale.
    factors = torch.cat([scale, torch.ones_like(scale)])
    offsets = torch.cat([shift, 2 * scale.log()])
    weight, bias = (state_dict[f"quant_conv.{name}"].double().cpu() for name in ("weight", "bias"))
    folded["quant_conv.weight"] = weight * factors.view(-1, 1, 1, 1, 1)
    folded["quant_conv.bias"] = bias * factors + offsets
    # Columns of post_quant_conv read the latents.
    weight, bias = (state_dict[f"post_quant_conv.{name}"].double().cpu() for name in ("weight", "bias"))
    weight = weight / scale.view(1, -1, 1, 1, 1)
    folded["post_quant_conv.weight"] = weight
    folded["post_quant_conv.bias"] = bias - weight.flatten(1) @ shift
    for name in ("quant_conv.weight", "quant_conv.bias", "post_quant_conv.weight", "post_quant_conv.bias"):
        folded[name] = folded[name].to(state_dict[name])  # its dtype and device
    return folded, folded_config


def _float64(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
