"""Encodes clips on several processes and writes how the latents differ from one process's as JSON, for test_vae_parallel.py."""

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from muybridge.models.vae import VAEConfig, VideoVAE
from muybridge.tests.train.forked import start, wait_for
from muybridge.train.mesh import ParallelConfig, build_mesh
from muybridge.train.vae_parallel import encode_in_parallel

WORLDS = (2, 3, 4)
FRAMES = (1, 5, 9, 17, 33)
SIZES: dict[str, Any] = {"base_dim": 2, "z_dim": 2, "dim_mult": [1, 2, 2], "num_res_blocks": 1}
CONFIGS = {
    "wan_2_1": VAEConfig(**SIZES, temporal_downsample=[True, True]),
    # Its first halving leaves time as it is: layers at one resolution of time lie on both sides of it.
    "wan_2_2": VAEConfig(
        **{**SIZES, "dim_mult": [1, 2, 2, 2]}, temporal_downsample=[False, True, True], patch_size=2, is_residual=True
    ),
}


def run_world(rank: int, folder: Path) -> None:
    axis = build_mesh(ParallelConfig(sequence=dist.get_world_size()), timeout_seconds=600).sequence
    found: dict[str, Any] = {}
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        vae = VideoVAE(config).requires_grad_(False)
        for parameter in vae.parameters():  # fresh weights look at single frames
            parameter.data += 0.2 * torch.randn_like(parameter)
        seen: list[int] = []  # frames that the encoder gets at a time

        def look(module: nn.Module, inputs: tuple[Tensor, ...], seen: list[int] = seen) -> None:
            seen.append(inputs[0].shape[2])

        for frames in FRAMES:
            pixels = torch.randn(2, 3, frames, 16, 16)
            expected = vae.encode_chunked(pixels).mode()
            for chunk in (None, 1):
                with vae.encoder.register_forward_pre_hook(look):
                    latents = encode_in_parallel(vae, pixels, axis, latent_frames_per_chunk=chunk)
                error = (latents - expected).abs().max() / expected.abs().max()
                first = latents.clone()
                dist.broadcast(first, 0)
                found[f"{name} {frames} {chunk}"] = {
                    "error": error.item(),
                    "is_alike": torch.equal(first, latents),
                    "frames": seen.copy(),
                    "moves": (expected[:, :, -1] - vae.encode_chunked(pixels[:, :, -1:]).mode()[:, :, 0])
                    .abs()
                    .max()
                    .item(),
                }
                seen.clear()
        half = vae.to(torch.bfloat16)
        latents, expected = encode_in_parallel(half, pixels, axis), half.encode_chunked(pixels).mode()
        found[f"{name} bf16"] = {
            "dtype": str(latents.dtype),
            "error": ((latents - expected).abs().max() / expected.abs().max()).item(),
        }
    everyone: list[Any] = [None] * axis.size
    dist.all_gather_object(everyone, found)
    if rank == 0:
        (folder.parent / f"w{axis.size}.json").write_text(json.dumps(everyone))


def main(root: Path) -> None:
    gc.freeze()  # no rank should go through all of this in search of garbage
    for world in WORLDS:
        wait_for(start(run_world, root / f"w{world}", world=world))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
