"""Bytes of activations that training a DiT needs, by policy: the one place that the planner, `auto` and the benchmarks ask."""

import math
from dataclasses import dataclass

from ..models.dit import DiTConfig
from .activations import ActivationPolicy, ActivationsConfig, is_recomputed, keeps_results

STREAM = 4  # bytes of a number of the residual stream, of norms' statistics and of modulation: float32 always


@dataclass(frozen=True)
class ActivationShape:
    """What goes through the model in one forward on one process."""

    tokens: int  # video tokens L of a sample, over all processes that share it
    text_tokens: int  # text tokens S of a sample
    batch: int = 1
    modulation_rows: int = 1  # timesteps R of a sample: 1, or as many as frames or tokens
    image_tokens: int = 0
    sequence: int = 1  # processes that share a sample
    width: int = 2  # bytes of a number in matmuls: 2 for bf16 weights, 4 for float32


@dataclass(frozen=True)
class ActivationBytes:
    """Bytes of one process, without weights, their gradients, and the model's inputs and output."""

    kept: int  # on the device between forward and backward
    peak: int  # on the device at the worst moment of the backward
    host: int  # in pinned memory, whose blocks come in powers of two


def activation_bytes(model: DiTConfig, shape: ActivationShape, config: ActivationsConfig) -> ActivationBytes:
    """Activations of a forward whose weights are all trained, with the GPU's kernels; a LoRA's differ by some percent.

    What a kernel takes for itself while it runs, and what the allocator loses, come on top.
    """
    local = _Local.of(model, shape)
    offloaded = [number for number in range(model.num_layers) if config.offload and is_recomputed(config, number)]
    kept_by = [0 if n in offloaded else _kept_by_block(model, local, config, n) for n in range(model.num_layers)]
    head, around = _head(model, local), _around_blocks(model, local, config)
    kept = sum(kept_by) + head + around
    one_input, one_row_each = STREAM * local.tokens * model.dim, STREAM * local.rows * model.dim
    # In the head: the gradients of its matmul's input, of the stream, of shift and scale, when what was normed has gone.
    moments = [kept + one_input + 2 * one_row_each]
    # When the feed-forward's last matmul goes backward, its block has all that it computed (again) but that matmul's result, the
    # head is done, and there are gradients of the stream, the branch, the gate and GELU's result, of the weight, and of the head's
    # modulation. The last block has most others before it; the one before also has the gradient of all blocks' modulation.
    in_block = _everything(model, local) - local.width * local.tokens * model.dim
    in_block += one_input + local.width * local.tokens * (model.dim + model.ffn_dim) + 2 * one_row_each
    in_block += local.width * model.dim * model.ffn_dim
    if len(offloaded) > 1:
        in_block += one_input  # the next one, on its way back
    moments.append(sum(kept_by[:-1]) + around + in_block)
    moments.append(sum(kept_by[:-2]) + around + in_block + 6 * one_row_each)
    # At the end of that block: the gradients of its modulation one by one, together, and the sum of the last block's.
    moments.append(sum(kept_by[:-2]) + around + 2 * one_input + 19 * one_row_each)
    # At the end, of few tokens: the gradient of the largest weight outside of the blocks, that of the modulation.
    moments.append(around + 6 * STREAM * model.dim * model.dim)
    host = len(offloaded) * (1 << (one_input - 1).bit_length())
    return ActivationBytes(kept=kept, peak=max(moments), host=host)


@dataclass(frozen=True)
class _Local:
    """Rows of one process, over all samples."""

    tokens: int
    text: int
    image: int
    rows: int
    attended: int  # tokens times heads of self-attention: all tokens of some heads, or some tokens of all heads
    heads: int
    width: int
    is_shared: bool

    @classmethod
    def of(cls, model: DiTConfig, shape: ActivationShape) -> "_Local":
        tokens = -(-shape.tokens // shape.sequence)
        heads = -(-model.num_attention_heads // shape.sequence)
        rows = shape.modulation_rows
        if shape.sequence > 1 and rows > 1:  # rows that the processes do not divide become a row a token
            rows = rows // shape.sequence if rows % shape.sequence == 0 else tokens
        return cls(
            tokens=shape.batch * tokens,
            text=shape.batch * shape.text_tokens,
            image=shape.batch * shape.image_tokens,
            rows=shape.batch * rows,
            attended=shape.batch * shape.tokens * heads,
            heads=model.num_attention_heads,
            width=shape.width,
            is_shared=shape.sequence > 1,
        )


def _kept_by_block(model: DiTConfig, local: _Local, config: ActivationsConfig, number: int) -> int:
    if is_recomputed(config, number):
        return STREAM * local.tokens * model.dim
    if keeps_results(config, number):
        return _results(model, local)
    return _everything(model, local)


def _results(model: DiTConfig, local: _Local) -> int:
    """A block's input, and the results of its matmuls and attentions."""
    dim, wide = model.dim, local.width
    size = STREAM * local.tokens * dim
    size += (
        wide * local.tokens * (7 * dim + model.ffn_dim)
    )  # q, k, v, out; q, out of cross-attention; both of the feed-forward
    size += 2 * wide * (local.text + local.image) * dim  # k, v of text and image
    size += _attended(model, local)
    return size


def _everything(model: DiTConfig, local: _Local) -> int:
    """All that a block's backward reads."""
    dim, wide, tokens = model.dim, local.width, local.tokens
    size = 3 * STREAM * tokens * dim  # the stream: as it enters, behind self-attention, behind cross-attention
    size += 3 * (wide * tokens * dim + 2 * STREAM * tokens)  # what is normed of each, mean and r
    size += (
        6 * wide * tokens * dim
    )  # q, k, v and out; q of cross-attention; the feed-forward's result (out's, for the gates)
    size += 3 * (wide * tokens * dim + STREAM * tokens)  # q, k and cross-attention's q, normed and turned
    size += (local.text + local.image) * (3 * wide * dim + STREAM)  # k, v of text and image; k normed
    size += _attended(model, local)
    size += 2 * wide * tokens * model.ffn_dim  # before and behind GELU
    size += 6 * STREAM * local.rows * dim  # modulation
    if local.image:
        size += wide * tokens * dim  # the sum of what was read from text and image
    if local.is_shared:
        size += wide * tokens * dim  # attention's output where its tokens are
    return size


def _attended(model: DiTConfig, local: _Local) -> int:
    """Outputs of a block's attentions, and log-sum-exps."""
    head_bytes = local.width * model.attention_head_dim + STREAM
    across = local.tokens * local.heads * (2 if local.image else 1)
    return head_bytes * (local.attended + across)


def _head(model: DiTConfig, local: _Local) -> int:
    """The head's input and its norm, its modulation, and its weight in float32."""
    outputs = math.prod(model.patch_size) * model.out_channels
    size = STREAM * (2 * local.tokens * (model.dim + 1) + 2 * local.rows * model.dim)
    return size + (STREAM * outputs * model.dim if local.width < STREAM else 0)


def _around_blocks(model: DiTConfig, local: _Local, config: ActivationsConfig) -> int:
    """What the embeddings keep, and inputs that all blocks share."""
    dim, wide = model.dim, local.width
    size = wide * local.tokens * math.prod(model.patch_size) * model.in_channels  # patches
    # Of each timestep: sinusoid, two Linears, two SiLUs.
    size += STREAM * local.rows * (model.freq_dim + 4 * dim)
    size += 3 * wide * local.text * dim
    if wide < STREAM:
        size += wide * local.text * model.text_dim  # text features in bf16
        size += STREAM * 7 * dim * dim  # float32 copies of two weights of the time embedding
    if config.policy is not ActivationPolicy.none:
        size += 6 * STREAM * local.rows * dim  # modulation, which the blocks add their own to
    if local.image:
        assert model.image_dim is not None
        size += local.image * (3 * wide * model.image_dim + wide * dim)  # around its two Linears; the tokens
        size += STREAM * local.image * dim  # what the second norm took
        size += (
            STREAM * local.image * (model.image_dim if model.pos_embed_seq_len is not None else 0)
        )  # features with places
    return size
