"""Which other tools cannot use an exported model, and for what reason: what they take for granted about Wan."""

from ..models.dit import DiTConfig
from ..models.text import TextEncoderConfig, TextEncoderKind
from ..models.token_layout import SelfAttentionConfig
from ..models.vae.config import VAEConfig

# Tools that know published models by their sizes.
FIXED_SIZES = "DiffSynth, musubi, diffusion-pipe"
UMT5_XXL_DIM = 4096


def lost_loaders(model: DiTConfig, vae: VAEConfig, text: TextEncoderConfig) -> list[str]:
    """One line for each departure from Wan's own sizes: the setting, its value, and who is lost by it. Empty for Wan itself."""
    comfy_header = "ComfyUI versions that do not read sizes from the file's header"
    lost = []

    def expect(what: str, value: object, wanted: object, who: str) -> None:
        if value != wanted:
            lost.append(f"{what}={value} is not Wan's {wanted}: lost are {who}")

    expect("head width dim/num_attention_heads", model.attention_head_dim, 128, f"{comfy_header}, {FIXED_SIZES}")
    expect("model.freq_dim", model.freq_dim, 256, f"{comfy_header}, {FIXED_SIZES}")
    expect("model.text_dim", model.text_dim, UMT5_XXL_DIM, f"ComfyUI (its text encoder is umT5-XXL), {FIXED_SIZES}")
    expect("model.patch_size", list(model.patch_size), [1, 2, 2], f"Wan's own code, {comfy_header}, {FIXED_SIZES}")
    expect("model.eps", model.eps, 1e-6, comfy_header)
    if model.image_dim is not None:
        expect("text.max_tokens", text.max_tokens, 512, "diffusers (it finds the image's features by it)")
    if model.self_attention != SelfAttentionConfig():
        lost.append(
            f"model.self_attention.pattern={model.self_attention.pattern.name} is not full: every other tool computes full "
            "attention, and so another function"
        )
    if not has_wan_form(vae):
        sizes = f"z_dim={vae.z_dim}, base_dim={vae.base_dim}, patch_size={vae.patch_size}"
        lost.append(
            f"the autoencoder ({sizes}) has the sizes of neither Wan 2.1 nor 2.2: lost are ComfyUI, Wan's own code, "
            f"{FIXED_SIZES}"
        )
    if text.kind is TextEncoderKind.bytes:
        lost.append(
            "text.kind=bytes is known to this project only: other tools take ready prompt embeddings (prompts=FILE), no prompts"
        )
    if text.kind is TextEncoderKind.umt5_small:
        lost.append(
            "text.kind=umt5_small is written with format=diffusers: lost are ComfyUI and Wan's own code, which have umT5-XXL "
            "built in and take ready prompt embeddings (prompts=FILE)"
        )
    return lost


def has_wan_form(vae: VAEConfig) -> bool:
    """Whether these are the sizes of Wan 2.1's or 2.2's autoencoder, whatever its latent statistics."""
    sizes = (vae.base_dim, vae.decoder_base_dim or vae.base_dim, vae.z_dim, vae.dim_mult, vae.num_res_blocks)
    form = (vae.temporal_downsample, vae.is_residual, vae.patch_size)
    levels, stride = [1, 2, 4, 4], [False, True, True]
    wan_2_1 = ((96, 96, 16, levels, 2), (stride, False, 1))
    wan_2_2 = ((160, 256, 48, levels, 2), (stride, True, 2))
    return (sizes, form) in (wan_2_1, wan_2_2)
