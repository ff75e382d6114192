"""How a clip is cut in time, so that an autoencoder takes memory for a part of its frames only."""

from itertools import pairwise

from .config import VAEConfig

# Of all clips in one chunk. One latent frame of 720 x 1280 has about as many: 1.5 GB in fp32 for an outermost layer of Wan 2.1.
CHUNK_PIXELS = 4_000_000


def default_latent_frames(config: VAEConfig, clips: int, height: int, width: int) -> int:
    """Latent frames that are encoded or decoded at once where nobody asks for another number; height and width in pixels."""
    return max(1, CHUNK_PIXELS // (clips * height * width * config.temporal_stride))


def chunk_bounds(config: VAEConfig, frames: int, latent_frames: int) -> list[tuple[int, int]]:
    """First frame and end of each chunk of a clip: a latent frame is a stride of frames, but the first is one frame."""
    later = config.temporal_stride * latent_frames
    first = later - config.temporal_stride + 1
    return list(pairwise([0, *range(first, frames, later), frames]))
