"""The share of the devices' peak that the model's own arithmetic takes: MFU (Chowdhery et al., arXiv:2204.02311, appendix B)."""

import torch

from ..data.batch import VideoBatch
from ..data.config import Access
from .config import TrainConfig
from .costs import StepFlops, device_peak


class Utilisation:
    """Counts the FLOPs that forward and backward of the model ask for, whatever else is computed or computed again."""

    def __init__(self, config: TrainConfig, world_size: int, device: torch.device) -> None:
        """For a run in so many processes on devices like this one's."""
        self._world = world_size
        self._peak = device_peak(device, config.deepspeed.precision)
        flops, vae = StepFlops.of(config, world_size), config.vae.resolved()
        of_pixels = {} if flops is None else flops.of_clip
        self._of_clip = of_pixels
        if config.data.access is Access.latents:
            self._of_clip = {vae.latent_shape(*shape)[1:]: of_clip for shape, of_clip in of_pixels.items()}
        self._done = 0

    def add(self, batch: VideoBatch) -> None:
        """A step over all processes, by one of its batches."""
        self._done += batch.step_samples * self._of_clip.get(batch.shape, 0)

    def row(self, seconds: float) -> dict[str, float]:
        """Columns of a row of metrics over the steps that took so long; nothing of a model whose training is not counted."""
        done, self._done = self._done, 0
        if not done:
            return {}
        per_process = done / (seconds * self._world)
        row = {"model_tflops_per_second": per_process / 1e12}  # of one process
        return row if self._peak is None else {**row, "mfu": per_process / self._peak}
