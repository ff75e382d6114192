"""What a video autoencoder looks like: its sizes, its strides, and its entry in a diffusers `config.json`."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class VAEConfig:
    """Sizes of a causal video autoencoder; the defaults are Wan 2.1.

    Wan 2.2 is `base_dim=160, decoder_base_dim=256, z_dim=48, patch_size=2, is_residual=true`.
    """

    base_dim: int = 96  # encoder width at full resolution, channels
    decoder_base_dim: int | None = None  # decoder width at full resolution; null: base_dim
    z_dim: int = 16  # latent channels
    dim_mult: list[int] = field(default_factory=lambda: [1, 2, 4, 4])  # width of each level, times the base
    num_res_blocks: int = 2  # residual blocks of an encoder level; the decoder has one more
    temporal_downsample: list[bool] = field(default_factory=lambda: [False, True, True])  # between levels: halve T too
    is_residual: bool = False  # Wan 2.2: parameter-free shortcut around every level
    patch_size: int = 1  # side of the pixel squares folded into channels before the encoder; 1: off
    in_channels: int = 3  # channels of a pixel
    latents_mean: list[float] = field(default_factory=list)  # per latent channel, z_dim values; empty: not measured
    latents_std: list[float] = field(default_factory=list)  # per latent channel, z_dim values; empty: not measured

    @property
    def temporal_stride(self) -> int:
        """Frames per latent frame, after the first, which has its own."""
        return 2 ** sum(self.temporal_downsample)

    @property
    def spatial_stride(self) -> int:
        """Pixels per latent position along height and width."""
        return self.patch_size * 2 ** (len(self.dim_mult) - 1)

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(z, T', H', W') of the latents of a clip of these sizes."""
        stride = self.spatial_stride
        return self.z_dim, 1 + (frames - 1) // self.temporal_stride, height // stride, width // stride

    @property
    def folded_channels(self) -> int:
        """Channels the encoder sees and the decoder writes: pixels folded by `patch_size`."""
        return self.in_channels * self.patch_size**2

    def faults(self, field: str) -> list[str]:
        """Every broken rule, as messages that name the field under its dotted path."""
        found = []
        positive = {
            "base_dim": self.base_dim,
            "decoder_base_dim": 1 if self.decoder_base_dim is None else self.decoder_base_dim,
            "z_dim": self.z_dim,
            "num_res_blocks": self.num_res_blocks,
            "patch_size": self.patch_size,
            "in_channels": self.in_channels,
        }
        found += [f"{field}.{name}={value} must be at least 1" for name, value in positive.items() if value < 1]
        if not self.dim_mult or min(self.dim_mult) < 1:
            found.append(f"{field}.dim_mult={self.dim_mult} must name at least one level, each at least 1")
        elif len(self.temporal_downsample) != len(self.dim_mult) - 1:
            found.append(
                f"{field}.temporal_downsample={self.temporal_downsample} must have one entry per step between the "
                f"{len(self.dim_mult)} levels of dim_mult, so {len(self.dim_mult) - 1}"
            )
        elif not found:
            found += self._width_faults(field)
        for name, values in (("latents_mean", self.latents_mean), ("latents_std", self.latents_std)):
            if values and len(values) != self.z_dim:
                found.append(f"{field}.{name} has {len(values)} values and must have z_dim={self.z_dim}, or none")
        if bool(self.latents_mean) != bool(self.latents_std):
            found.append(f"{field}.latents_mean and latents_std must be given together, or both left empty")
        if any(std <= 0 for std in self.latents_std):
            found.append(f"{field}.latents_std={self.latents_std} must be positive in every channel")
        return found

    def _width_faults(self, field: str) -> list[str]:
        """Widths that the shortcuts of the residual form, or the halving upsampler of the plain form, cannot split."""
        found = []
        decoder_base = self.decoder_base_dim or self.base_dim
        if not self.is_residual:
            for mult in self.dim_mult[1:]:
                if decoder_base * mult % 2:
                    found.append(f"{field}: decoder width {decoder_base}x{mult} must be even, upsampling halves it")
            return found
        down = list(zip([1, *self.dim_mult[:-1]], self.dim_mult, [*self.temporal_downsample, None], strict=True))
        for narrow, wide, temporal in down:
            factor = 1 if temporal is None else 8 if temporal else 4
            if narrow * factor % wide:
                found.append(f"{field}.dim_mult={self.dim_mult}: {wide} must divide {narrow}x{factor} (shortcut down)")
        wide_to_narrow = self.dim_mult[::-1]
        up = zip(
            [wide_to_narrow[0], *wide_to_narrow], wide_to_narrow[:-1], self.temporal_downsample[::-1], strict=False
        )
        for wide, narrow, temporal in up:
            factor = 8 if temporal else 4
            if narrow * factor % wide:
                found.append(f"{field}.dim_mult={self.dim_mult}: {wide} must divide {narrow}x{factor} (shortcut up)")
        return found

    def to_diffusers(self) -> dict[str, Any]:
        """The `config.json` of a diffusers `AutoencoderKLWan` with these sizes.

        Statistics that were not measured are written as mean 0, std 1: left out, diffusers fills in Wan 2.1's own.
        """
        return {
            "_class_name": "AutoencoderKLWan",
            "base_dim": self.base_dim,
            "decoder_base_dim": self.decoder_base_dim,
            "z_dim": self.z_dim,
            "dim_mult": list(self.dim_mult),
            "num_res_blocks": self.num_res_blocks,
            "attn_scales": [],
            "temperal_downsample": list(self.temporal_downsample),
            "dropout": 0.0,
            "latents_mean": list(self.latents_mean) or [0.0] * self.z_dim,
            "latents_std": list(self.latents_std) or [1.0] * self.z_dim,
            "is_residual": self.is_residual,
            "in_channels": self.folded_channels,
            "out_channels": self.folded_channels,
            "patch_size": None if self.patch_size == 1 else self.patch_size,
            "scale_factor_temporal": self.temporal_stride,
            "scale_factor_spatial": self.spatial_stride,
        }

    @classmethod
    def from_diffusers(cls, config: dict[str, Any]) -> "VAEConfig":
        """The sizes in a diffusers `config.json`; keys it leaves out take Wan 2.1's values, as in diffusers."""
        if config.get("attn_scales"):
            raise ValueError(f"attn_scales={config['attn_scales']} must be empty: attention is in the middle only")
        if config.get("dropout"):
            raise ValueError(f"dropout={config['dropout']} must be 0")
        patch_size = config.get("patch_size") or 1
        folded, rest = divmod(config.get("in_channels", 3), patch_size**2)
        if rest:
            raise ValueError(f"in_channels={config['in_channels']} must be a multiple of patch_size^2={patch_size**2}")
        if config.get("out_channels", 3) != config.get("in_channels", 3):
            raise ValueError(f"out_channels={config.get('out_channels', 3)} must equal in_channels")
        defaults = cls()
        built = cls(
            base_dim=config.get("base_dim", defaults.base_dim),
            decoder_base_dim=config.get("decoder_base_dim"),
            z_dim=config.get("z_dim", defaults.z_dim),
            dim_mult=list(config.get("dim_mult", defaults.dim_mult)),
            num_res_blocks=config.get("num_res_blocks", defaults.num_res_blocks),
            temporal_downsample=list(config.get("temperal_downsample", defaults.temporal_downsample)),
            is_residual=config.get("is_residual", False),
            patch_size=patch_size,
            in_channels=folded,
            latents_mean=list(config.get("latents_mean", WAN_2_1_LATENTS_MEAN)),
            latents_std=list(config.get("latents_std", WAN_2_1_LATENTS_STD)),
        )
        if faults := built.faults("vae"):
            raise ValueError("; ".join(faults))
        return built


def wan_latent_statistics(z_dim: int) -> tuple[list[float], list[float]]:
    """Latent mean and std of Wan's released autoencoder of that many latent channels.

    The release's code holds them and its weight files do not, so other tools take them for granted. Raises ValueError where Wan
    has no autoencoder of so many channels.
    """
    if z_dim == len(WAN_2_1_LATENTS_MEAN):
        return list(WAN_2_1_LATENTS_MEAN), list(WAN_2_1_LATENTS_STD)
    if z_dim == len(WAN_2_2_LATENTS_MEAN):
        return list(WAN_2_2_LATENTS_MEAN), list(WAN_2_2_LATENTS_STD)
    raise ValueError(
        f"an autoencoder of {z_dim} latent channels is neither Wan 2.1's (16) nor Wan 2.2's (48), so the latents' mean and "
        f"std are not known: give its folder in diffusers' form, whose config.json has them"
    )


# Statistics of the released Wan 2.1 autoencoder, and what a config.json without them means.
WAN_2_1_LATENTS_MEAN = [
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
]  # fmt: skip
WAN_2_1_LATENTS_STD = [
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
]  # fmt: skip
# Those of the released Wan 2.2 autoencoder (4x16x16, 48 channels).
WAN_2_2_LATENTS_MEAN = [
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
]  # fmt: skip
WAN_2_2_LATENTS_STD = [
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
]  # fmt: skip
