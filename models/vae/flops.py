"""FLOPs of encoding a clip, counted from the autoencoder's sizes as `VideoVAE.encode_chunked` computes it."""

from itertools import pairwise

from .chunks import chunk_bounds, default_latent_frames
from .config import VAEConfig


def encode_flops(config: VAEConfig, clips: int, frames: int, height: int, width: int) -> int:
    """FLOPs of encoding `clips` clips of these pixels together; a multiply-add counts as two."""
    chunk = default_latent_frames(config, clips, height, width)
    lengths = [stop - start for start, stop in chunk_bounds(config, frames, chunk)]
    rows, columns = height // config.patch_size, width // config.patch_size
    return clips * sum(
        _chunk_flops(config, length, rows, columns, is_first=place == 0) for place, length in enumerate(lengths)
    )


def _chunk_flops(config: VAEConfig, frames: int, rows: int, columns: int, *, is_first: bool) -> int:
    widths = [config.base_dim * mult for mult in [1, *config.dim_mult]]

    def conv(inputs: int, outputs: int) -> int:
        # In front of a single first frame there are only zeros, and one tap of three does.
        taps = 9 if is_first and frames == 1 else 27
        return 2 * inputs * outputs * taps * frames * rows * columns

    def residual_block(inputs: int, outputs: int) -> int:
        shortcut = 2 * inputs * outputs * frames * rows * columns if inputs != outputs else 0
        return conv(inputs, outputs) + conv(outputs, outputs) + shortcut

    total = conv(config.folded_channels, widths[0])
    for (inputs, outputs), halves_time in zip(pairwise(widths), [*config.temporal_downsample, None], strict=True):
        total += residual_block(inputs, outputs) + (config.num_res_blocks - 1) * residual_block(outputs, outputs)
        if halves_time is None:  # the last level halves nothing
            continue
        rows, columns = rows // 2, columns // 2
        total += 2 * outputs * outputs * 9 * frames * rows * columns
        if halves_time:
            halved = (frames - 1) // 2 if is_first else frames // 2
            total += 2 * outputs * outputs * 3 * halved * rows * columns
            frames = halved + is_first
    width, places = widths[-1], rows * columns
    attention = frames * (2 * width * 4 * width * places + 4 * width * places**2)  # q, k, v, out, and within frames
    total += 2 * residual_block(width, width) + attention
    moments = 2 * config.z_dim
    return total + conv(width, moments) + 2 * moments * moments * frames * rows * columns
