"""`muybridge bench encode`: clips and captions a second of Wan's autoencoder and of umT5-XXL, as training uses them.

Weights are random. What they take beside a training step is what a cache of latents and features saves.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

TEXT_TOKENS = 512  # rows of a caption, padding too
# Sizes of umT5-XXL's encoder as its config.json has them: 5.7 B parameters.
XXL = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
QUICK = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
# Clips together, frames, height and width.
CLIPS = [(1, 81, 480, 832), (1, 17, 256, 256), (8, 17, 256, 256)]
QUICK_CLIPS = [(2, 5, 16, 16)]


def main(argv: list[str]) -> int:
    """Measure, print and perhaps write the figures."""
    parser = argparse.ArgumentParser(prog="muybridge bench encode", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that everything runs")
    parser.add_argument("--repeats", type=int, default=5, help="of each, after one other (%(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    options = parser.parse_args(argv)
    found = measure(quick=options.quick, repeats=options.repeats)
    table = Table(title=f"muybridge bench encode, {found['device']}")
    table.add_column("what")
    table.add_column("clips/s", justify="right")
    for name, value in found["clips_per_second"].items():
        table.add_row(name, f"{value:.4g}")
    for name, why in found["not_measured"].items():
        table.add_row(name, why)
    Console(width=None if sys.stdout.isatty() else 130).print(table)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1) + "\n")
        print(f"muybridge: wrote {options.json}")
    return 0


def measure(*, quick: bool, repeats: int) -> dict[str, Any]:
    """Clips a second by what encodes them, and why the others have none."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wait: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    speeds: dict[str, float] = {}
    faults: dict[str, str] = {}
    plans: list[tuple[str, int, Callable[..., Callable[[], object]], Any]] = []
    for batch, frames, height, width in QUICK_CLIPS if quick else CLIPS:
        plans.append((f"VAE {batch} x {frames}x{height}x{width}", batch, _build_vae, (batch, frames, height, width)))
    for batch in (1, 8):
        plans.append((f"umT5 {batch} x {TEXT_TOKENS} tokens", batch, _build_text, batch))
    encode: Callable[[], object] = _nothing
    for name, batch, build, size in track(plans, description="encoders", console=Console(stderr=True)):
        try:
            encode = build(size, device, quick)
            seconds = []
            for _ in range(1 + repeats):
                wait()
                began = time.perf_counter()
                encode()
                wait()
                seconds.append(time.perf_counter() - began)
            speeds[name] = batch / statistics.median(seconds[1:])
        except ImportError as error:
            faults[name] = str(error)
        except torch.OutOfMemoryError:
            faults[name] = "out of memory"
        encode = _nothing  # lets go of the model
        if device.type == "cuda":
            torch.cuda.empty_cache()
    device_name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    return {
        "ok": True,
        "device": device_name,
        "torch": torch.__version__,
        "clips_per_second": speeds,
        "not_measured": faults,
    }


def _nothing() -> None:
    pass


def _build_vae(clips: Any, device: Any, quick: bool) -> Callable[[], object]:
    import torch

    from ..models.vae import VideoVAE
    from ..models.vae.config import VAEConfig

    batch, frames, height, width = clips
    with device:
        vae = VideoVAE(VAEConfig(base_dim=8) if quick else VAEConfig()).eval().requires_grad_(False)
        pixels = 2 * torch.rand(batch, 3, frames, height, width) - 1
    return lambda: vae.encode_chunked(pixels)


def _build_text(batch: Any, device: Any, quick: bool) -> Callable[[], object]:
    import torch
    import transformers

    config = transformers.UMT5Config.from_dict({**(QUICK if quick else XXL), "feed_forward_proj": "gated-gelu"})
    with device:
        model = transformers.UMT5EncoderModel(config).eval().bfloat16()
        tokens = torch.randint(3, config.vocab_size, (batch, TEXT_TOKENS))

    @torch.no_grad()
    def encode() -> object:
        return model(tokens, torch.ones_like(tokens)).last_hidden_state

    return encode
