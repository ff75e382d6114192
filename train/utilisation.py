"""What a run gets out of its devices: tokens, FLOPs and the share of their peak (MFU; Chowdhery et al., arXiv:2204.02311, appendix
B), and the memory that it takes of them."""

import torch

from ..data.batch import VideoBatch
from ..data.config import Access
from ..models.flops import count_tokens
from .config import TrainConfig
from .costs import StepFlops, device_peak


class Utilisation:
    """Counts the tokens of the clips and the FLOPs that forward and backward of the model ask for, whatever else is computed or
    computed again; ghosts are not counted."""

    def __init__(self, config: TrainConfig, world_size: int, device: torch.device) -> None:
        """For a run in so many processes on devices like this one's."""
        self._world, self._device = world_size, device
        self._peak = device_peak(device, config.deepspeed.precision)
        flops, vae = StepFlops.of(config, world_size), config.vae.resolved()
        self._of_clip: dict[tuple[int, int, int], tuple[int, int]] = {}  # by the shape of a batch: FLOPs and tokens
        for shape, of_clip in ({} if flops is None else flops.of_clip).items():
            latents = vae.latent_shape(*shape)[1:]
            is_cached = config.data.access is Access.latents
            self._of_clip[latents if is_cached else shape] = of_clip, count_tokens(config.model, latents)
        self._done = self._tokens = 0

    def add(self, batch: VideoBatch) -> None:
        """A step over all processes, by one of its batches."""
        flops, tokens = self._of_clip.get(batch.shape, (0, 0))
        self._done += batch.step_samples * flops
        self._tokens += batch.step_samples * tokens

    def row(self, seconds: float) -> dict[str, float]:
        """Columns of a row of metrics over steps that took so long; no tokens of a model whose training is not counted."""
        (done, tokens), self._done, self._tokens = (self._done, self._tokens), 0, 0
        row = {}
        if self._device.type == "cuda":
            # Of this process since the last row, in tensors: what the allocator keeps for later is not in it.
            row["peak_gib"] = torch.cuda.max_memory_allocated(self._device) / 2**30
            torch.cuda.reset_peak_memory_stats(self._device)
        if done:
            per_process = done / (seconds * self._world)
            row["tokens_per_second"] = tokens / seconds  # of all processes
            row["model_tflops_per_second"] = per_process / 1e12  # of one process
            if self._peak is not None:
                row["mfu"] = per_process / self._peak
        return row
