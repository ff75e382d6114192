"""The sizes of the diffusion transformer, their rules, and their entry in a diffusers `config.json`."""

from dataclasses import dataclass, field
from typing import Any

from .token_layout import SelfAttentionConfig

# Of CLIP ViT-H/14 at 224 pixels: 16 x 16 patches, and one token for the whole image.
CLIP_TOKENS = 257


@dataclass
class DiTConfig:
    """The sizes of a DiT. The defaults of width and depth are those of Wan 2.1 T2V-1.3B."""

    # Latent channels of the input: the noisy latents', and those of a mask and of known latents beside them.
    in_channels: int = 16
    out_channels: int = 16  # latent channels of the velocity
    num_layers: int = 30  # transformer blocks
    dim: int = 1536  # model width D
    num_attention_heads: int = 12  # heads N, which divide the width into heads of K = D / N
    ffn_dim: int = 8960  # hidden width of the feed-forward
    text_dim: int = 4096  # width of the text encoder's output
    freq_dim: int = 256  # width of the timestep sinusoid
    patch_size: list[int] = field(default_factory=lambda: [1, 2, 2])  # latent frames, rows, columns in a token
    eps: float = 1e-6  # added to variances in the norms
    rope_max_seq_len: int = 1024  # largest token count along one axis
    # Width of image features that cross-attention reads beside the text (Wan 2.1 I2V); null: none.
    image_dim: int | None = None
    # Rows of image features that have a learned place, 514 where a first and a last image are given; null: no places.
    pos_embed_seq_len: int | None = None
    # Which video tokens attend to each other.
    self_attention: SelfAttentionConfig = field(default_factory=SelfAttentionConfig)

    @property
    def attention_head_dim(self) -> int:
        """Head width K."""
        return self.dim // self.num_attention_heads

    @property
    def added_kv_proj_dim(self) -> int | None:
        """Width of what the keys and values of an image are made of: the model's, for its features are embedded first."""
        return None if self.image_dim is None else self.dim

    @property
    def image_tokens(self) -> int:
        """Rows of image features in Wan's use: 257 of CLIP ViT-H/14 at 224 pixels, 0 without an image."""
        return 0 if self.image_dim is None else self.pos_embed_seq_len or CLIP_TOKENS

    def faults(self, field: str) -> list[str]:
        """All breaches of this config's own rules, as messages that name the field, the value and the rule."""
        found = []
        positive = ("in_channels", "out_channels", "num_layers", "dim", "num_attention_heads", "ffn_dim")
        for name in (*positive, "text_dim", "freq_dim", "rope_max_seq_len"):
            if getattr(self, name) < 1:
                found.append(f"{field}.{name}={getattr(self, name)} must be at least 1")
        if self.dim >= 1 and self.num_attention_heads >= 1:
            head_dim, rest = divmod(self.dim, self.num_attention_heads)
            if rest:
                found.append(
                    f"{field}.num_attention_heads={self.num_attention_heads} must divide {field}.dim={self.dim}"
                )
            elif head_dim % 16 or head_dim > 256:
                found.append(
                    f"{field}.dim={self.dim} over {field}.num_attention_heads={self.num_attention_heads} gives heads of "
                    f"{head_dim}, which must be a multiple of 16 up to 256 (the attention kernel's tile)"
                )
        if self.freq_dim % 2:
            found.append(f"{field}.freq_dim={self.freq_dim} must be even (one half is cosines, one half sines)")
        if len(self.patch_size) != 3 or min(self.patch_size, default=0) < 1:
            found.append(
                f"{field}.patch_size={list(self.patch_size)} must be three numbers of at least 1 (frames, rows, columns)"
            )
        if self.eps <= 0:
            found.append(f"{field}.eps={self.eps} must be greater than 0")
        for name in ("image_dim", "pos_embed_seq_len"):
            value = getattr(self, name)
            if value is not None and value < 1:
                found.append(f"{field}.{name}={value} must be null (none) or at least 1")
        if self.pos_embed_seq_len is not None and self.image_dim is None:
            found.append(
                f"{field}.pos_embed_seq_len={self.pos_embed_seq_len} must be null where {field}.image_dim is null (no image)"
            )
        return found + self.self_attention.faults(f"{field}.self_attention")

    def to_diffusers(self) -> dict[str, Any]:
        """The contents of a diffusers `config.json` for this model."""
        return {
            "_class_name": "WanTransformer3DModel",
            "added_kv_proj_dim": self.added_kv_proj_dim,
            "attention_head_dim": self.attention_head_dim,
            "cross_attn_norm": True,
            "eps": self.eps,
            "ffn_dim": self.ffn_dim,
            "freq_dim": self.freq_dim,
            "image_dim": self.image_dim,
            "in_channels": self.in_channels,
            "num_attention_heads": self.num_attention_heads,
            "num_layers": self.num_layers,
            "out_channels": self.out_channels,
            "patch_size": list(self.patch_size),
            "pos_embed_seq_len": self.pos_embed_seq_len,
            "qk_norm": "rms_norm_across_heads",
            "rope_max_seq_len": self.rope_max_seq_len,
            "text_dim": self.text_dim,
            # Ours: diffusers knows full attention only, and passes over a key it does not know.
            **(
                {}
                if self.self_attention == SelfAttentionConfig()
                else {"self_attention": self.self_attention.to_json()}
            ),
        }

    @classmethod
    def from_diffusers(cls, config: dict[str, Any]) -> "DiTConfig":
        """Read a diffusers `config.json`.

        Raises ValueError for a model of another kind (other class, norms or image conditioning) and for sizes that break `faults`.
        """
        required = {
            "_class_name": "WanTransformer3DModel",
            "cross_attn_norm": True,
            "qk_norm": "rms_norm_across_heads",
        }
        for name, value in required.items():
            if config.get(name, value) != value:
                raise ValueError(f"config.json: {name}={config[name]!r} must be {value!r} (a Wan transformer)")
        sizes = (
            "in_channels out_channels num_layers num_attention_heads ffn_dim text_dim freq_dim patch_size eps rope_max_seq_len"
        ).split()
        missing = [name for name in (*sizes, "attention_head_dim") if name not in config]
        if missing:
            raise ValueError(f"config.json: {', '.join(missing)} missing; they are needed to build the transformer")
        dim = config["num_attention_heads"] * config["attention_head_dim"]
        pattern = SelfAttentionConfig.from_json(config.get("self_attention", {}))
        values = {name: config[name] for name in sizes} | {"patch_size": list(config["patch_size"])}
        values |= {name: config.get(name) for name in ("image_dim", "pos_embed_seq_len")}
        read = cls(dim=dim, self_attention=pattern, **values)
        if (width := config.get("added_kv_proj_dim")) != read.added_kv_proj_dim:
            raise ValueError(
                f"config.json: added_kv_proj_dim={width} must be {read.added_kv_proj_dim}: the model's width where image_dim is "
                f"given, else null (image_dim={read.image_dim})"
            )
        if faults := read.faults("transformer"):
            raise ValueError(f"config.json: {'; '.join(faults)}")
        return read
