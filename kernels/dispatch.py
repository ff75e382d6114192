"""Which implementation of an operation runs: our kernel, cuDNN's attention, or plain PyTorch.

The answer comes from a committed table, never from timing during a run: timing stalls every rank at a different moment, and
another winner is another rounding. A setting (`kernels.attention=own`) or the environment (MUYBRIDGE_KERNELS) forces one.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor

ENVIRONMENT_VARIABLE = "MUYBRIDGE_KERNELS"
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Triton reads the same variable when it compiles the kernels' decorators; its interpreter runs them on CPU tensors.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

logger = logging.getLogger(__name__)


class Backend(Enum):
    auto = "auto"  # ask the table
    own = "own"  # the Triton kernels of this package
    cudnn = "cudnn"  # cuDNN's attention through PyTorch: dense only
    reference = "reference"  # plain PyTorch


@dataclass
class KernelsConfig:
    """Which implementations run. All of an operation's backends compute the same function, up to rounding."""

    # Attention: auto, own, cudnn (dense masks only) or reference.
    attention: Backend = Backend.auto
    # Norms, rotary positions, gates, GELU and the optimizer's update: auto, own or reference.
    pointwise: Backend = Backend.auto
    # Own attention's backward pass in one kernel, which adds dQ atomically: faster, but it does not repeat bit for bit. Nor need
    # cuDNN's: for that on a GPU, set attention=own.
    fused_backward: bool = False

    def faults(self, field: str) -> list[str]:
        """All breaches of these settings' own rules, and those of the environment variable that overrides them."""
        found = []
        if self.pointwise is Backend.cudnn:
            found.append(
                f"{field}.pointwise=cudnn must be auto, own or reference (cuDNN is a backend of attention only)"
            )
        try:
            _overridden(self)
        except ValueError as error:
            found.append(str(error))
        return found


@dataclass(frozen=True)
class Rule:
    """One line of the table: `backend` serves a call that meets every condition; an empty tuple or None is no condition."""

    op: str
    backend: Backend
    reason: str
    architectures: tuple[int, ...] = ()  # major compute capabilities
    masks: tuple[str, ...] = ()
    head_width_limit: int | None = None  # largest head width
    shortest: int = 0  # fewest keys
    half_precision: bool = False  # fp16 and bf16 only


# The first rule that fits decides. No line rests on a timing of our own yet: `muybridge bench kernels` on a GPU replaces them.
TABLE = (
    Rule(
        "attention",
        Backend.cudnn,
        "published forward and backward rates of cuDNN on Hopper exceed every Triton kernel's",
        architectures=(9, 10),
        masks=("none",),
        head_width_limit=128,
        shortest=2,
        half_precision=True,
    ),
    Rule("attention", Backend.own, "serves every mask, dtype and head width"),
    Rule("pointwise", Backend.own, "one pass over the data instead of one per operation"),
)

_settings: KernelsConfig | None = None  # read from the environment at the first call, so that an import cannot fail


def configure(config: KernelsConfig) -> None:
    """Set what runs in this process from here on; MUYBRIDGE_KERNELS, where set, overrides single fields.

    Raises:
        ValueError: the variable names an unknown field or value.
    """
    global _settings
    _settings = _overridden(config)


def settings() -> KernelsConfig:
    """What is in force: that of `configure`, or the defaults with the environment's overrides."""
    if _settings is None:
        configure(KernelsConfig())
    assert _settings is not None
    return _settings


@contextmanager
def forced(
    *, attention: Backend | None = None, pointwise: Backend | None = None, fused_backward: bool | None = None
) -> Iterator[None]:
    """Run the body with some settings replaced."""
    global _settings
    kept = settings()
    _settings = KernelsConfig(
        attention=kept.attention if attention is None else attention,
        pointwise=kept.pointwise if pointwise is None else pointwise,
        fused_backward=kept.fused_backward if fused_backward is None else fused_backward,
    )
    try:
        yield
    finally:
        _settings = kept


def is_deterministic() -> bool:
    """Whether own attention's backward pass must repeat bit for bit."""
    return not settings().fused_backward


def attention_backend(q: Tensor, *, mask: str, key_length: int) -> Backend:
    """The backend of attention over `key_length` keys, for q [B, N, L, K] and a mask of kind `mask` ("none" is dense).

    Raises:
        ValueError: a forced backend that cannot serve the call.
    """
    wanted = settings().attention
    if wanted is Backend.cudnn and (mask != "none" or not q.is_cuda or q.dtype == torch.float32):
        raise ValueError(
            f"kernels.attention=cudnn cannot serve mask={mask}, {q.dtype} on {q.device.type}: it takes dense fp16 and bf16 on CUDA"
        )
    return _choose("attention", wanted, q, mask=mask, head_width=q.shape[-1], key_length=key_length)


def pointwise_backend(op: str, x: Tensor) -> Backend:
    """The backend of a pointwise operation or norm on x: own or reference."""
    return _choose("pointwise", settings().pointwise, x, label=op)


def has_kernel(x: Tensor) -> bool:
    """Whether our kernels can run on x at all: a GPU and a dtype they know (or the interpreter, whose bf16 is garbage)."""
    if INTERPRETED:
        return x.dtype in (torch.float32, torch.float16)
    return x.is_cuda and x.dtype in KERNEL_DTYPES


def _choose(
    op: str, wanted: Backend, x: Tensor, *, label: str = "", mask: str = "", head_width: int = 0, key_length: int = 0
) -> Backend:
    if wanted is Backend.reference or not (x.is_meta or has_kernel(x)):
        backend = Backend.reference
    elif wanted is not Backend.auto:
        backend = wanted
    elif not x.is_cuda:  # meta tensors and the interpreter: what the kernels promise is what is looked at
        backend = Backend.own
    else:
        backend = next(
            rule.backend
            for rule in TABLE
            if rule.op == op
            and (not rule.architectures or _architecture(x.device.index or 0) in rule.architectures)
            and (not rule.masks or mask in rule.masks)
            and (rule.head_width_limit is None or head_width <= rule.head_width_limit)
            and key_length >= rule.shortest
            and (not rule.half_precision or x.dtype != torch.float32)
        )
    if not torch.compiler.is_compiling():
        _log_once(label or op, backend, x, mask, head_width)
    return backend


def _architecture(device_index: int) -> int:
    return torch.cuda.get_device_properties(device_index).major  # a constant to torch.compile


_logged: set[tuple[object, ...]] = set()


def _log_once(op: str, backend: Backend, x: Tensor, mask: str, head_width: int) -> None:
    key = (op, backend, x.dtype, x.device.type, mask, head_width)
    if key not in _logged:
        _logged.add(key)
        details = f", mask {mask}, head width {head_width}" if mask else ""
        dtype = str(x.dtype).removeprefix("torch.")
        logger.info("%s (%s on %s%s): %s", op, dtype, x.device.type, details, backend.name)


def _overridden(config: KernelsConfig) -> KernelsConfig:
    """The settings with those that MUYBRIDGE_KERNELS names (as attention=own,fused_backward=true) replaced."""
    text = os.environ.get(ENVIRONMENT_VARIABLE, "")
    allowed: dict[str, dict[str, Any]] = {
        "attention": dict(Backend.__members__),
        "pointwise": {name: backend for name, backend in Backend.__members__.items() if name != "cudnn"},
        "fused_backward": {"true": True, "false": False},
    }
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = item.partition("=")
        if value not in allowed.get(name, {}):
            choices = "; ".join(f"{key}={'|'.join(values)}" for key, values in allowed.items())
            raise ValueError(f"{ENVIRONMENT_VARIABLE}={text!r}: {item!r} must be one of {choices}")
        config = replace(config, **{name: allowed[name][value]})
    return config
