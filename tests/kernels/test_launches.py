"""What the launchers hand to Triton for a model's tensors is what the compile cases describe: types, constants, warps and stages.

Nothing runs: launches are recorded in place of being made. So bf16 arguments, which the interpreter cannot take, and both
architectures' tables are seen here without a GPU.
"""

import importlib
import os
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="Triton has no build for this platform")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter makes no launches", allow_module_level=True)

from triton.runtime.jit import JITFunction, mangle_type  # noqa: E402

from muybridge import kernels  # noqa: E402
from muybridge.kernels.adamw import adamw_  # noqa: E402
from muybridge.kernels.attention import attention  # noqa: E402
from muybridge.kernels.attention_mask import block_causal_mask  # noqa: E402
from muybridge.kernels.compile_case import CompileCase  # noqa: E402
from muybridge.kernels.dispatch import forced  # noqa: E402
from muybridge.kernels.gated_residual import gated_residual  # noqa: E402
from muybridge.kernels.gelu import gelu_tanh  # noqa: E402
from muybridge.kernels.modulated_norm import (  # noqa: E402
    modulated_norm,
    residual_affine_norm,
    residual_modulated_norm,
)
from muybridge.kernels.norm_rope import build_rope, rms_norm_heads, rms_norm_rope  # noqa: E402
from muybridge.scripts.machine_code import all_cases  # noqa: E402

CASES = all_cases()
LENGTH = 2 * 4 * 32


@dataclass
class RecordedLaunch:
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]

    def differences(self, case: CompileCase) -> list[str]:
        """What is not as the case says; a count that the case has in 64 bits may come in 32."""
        described = {
            name: kind.replace(" ", "")
            for name, kind in {**case.types, **case.constants}.items()
            if isinstance(kind, str)
        }
        expected = {**dict(case.constants), **described, "warps": case.warps}
        actual = {**self.constants, **self.types, "warps": self.options.get("num_warps", 4)}
        if "num_stages" in self.options:
            expected["stages"], actual["stages"] = case.stages, self.options["num_stages"]
        different = {
            name
            for name in {**expected, **actual}
            if actual.get(name, self) != expected.get(name, self)
            and (actual.get(name), expected.get(name)) != ("i32", "i64")
        }
        if not case.has_matmul:  # smaller heads and other dtypes of these need no case of their own
            different -= {"HEAD_WIDTH", "BLOCK_K", "out_ptr", "grad_out_ptr", "grad_q_ptr"}
        return [f"{name}: {actual.get(name)} is launched, {expected.get(name)} described" for name in different]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[RecordedLaunch]:
    """The launches that the body makes on CPU tensors, as if they were on a GPU."""
    recorded: list[RecordedLaunch] = []

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        named = {name: value for name, value in kwargs.items() if name in self.arg_names}
        bound = self.signature.bind(*args, **named)
        bound.apply_defaults()
        is_constexpr = {parameter.name: parameter.is_constexpr for parameter in self.params}
        types, constants = {}, {}
        for name, value in bound.arguments.items():
            if is_constexpr[name] or value is None:
                constants[name] = value
            else:
                types[name] = mangle_type(value).replace(" ", "")
        options = {name: value for name, value in kwargs.items() if name not in named}
        assert set(options) <= {"num_warps", "num_stages"}, f"{self.fn.__name__}: Triton has no option {set(options)}"
        assert all(isinstance(size, int) and 0 < size < 2**31 for size in grid)
        recorded.append(RecordedLaunch(self, types, constants, options))

    monkeypatch.setattr(JITFunction, "run", record)
    for info in pkgutil.iter_modules(kernels.__path__):
        module = importlib.import_module(f"{kernels.__name__}.{info.name}")
        if hasattr(module, "has_kernel"):
            monkeypatch.setattr(module, "has_kernel", lambda x: True)
    return recorded


def pretend(monkeypatch: pytest.MonkeyPatch, architecture: int) -> None:
    for info in pkgutil.iter_modules(kernels.__path__):
        module = importlib.import_module(f"{kernels.__name__}.{info.name}")
        if hasattr(module, "is_hopper"):
            monkeypatch.setattr(module, "is_hopper", lambda device: architecture == 90)


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def stream(width: int = 1536) -> Tensor:
    return random(1, LENGTH, width, dtype=torch.float32)


def row(width: int = 1536) -> Tensor:
    return random(1, 1, width, dtype=torch.float32)


def heads(head_width: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    return [random(1, LENGTH, 12, head_width, dtype=dtype).transpose(1, 2) for _ in range(3)]


def masked(head_width: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return attention(*heads(head_width, dtype), mask=block_causal_mask(2, LENGTH // 2))


def fused(head_width: int) -> Tensor:
    with forced(fused_backward=True):
        return attention(*heads(head_width))


def update() -> Tensor:
    tensors = [torch.randn(5000) for _ in range(5)]
    settings: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    adamw_(*tensors[:4], step=1, **settings)
    clip = torch.ones(())
    adamw_(*tensors[:4], step=2, **settings, clip_coefficient=clip, average=tensors[4], average_weight=0.1)
    return tensors[0].requires_grad_()


BF16 = torch.bfloat16
CALLS: dict[str, Callable[[], Any]] = {
    "attention 64": lambda: attention(*heads(64)),
    "attention 128": lambda: attention(*heads(128)),
    "masked attention 64": lambda: masked(64),
    "masked attention 128": lambda: masked(128),
    "masked attention fp32": lambda: masked(128, torch.float32),
    "attention fused 64": lambda: fused(64),
    "attention fused 128": lambda: fused(128),
    "rms_norm_rope": lambda: rms_norm_rope(
        random(1, LENGTH, 1536),
        random(1536, dtype=torch.float32),
        build_rope(2, 4, 32, head_width=128, device=torch.device("cpu")),
        heads=12,
        eps=1e-6,
    ),
    "rms_norm_heads": lambda: rms_norm_heads(
        random(1, LENGTH, 1536), random(1536, dtype=torch.float32), heads=12, eps=1e-6
    ),
    "modulated_norm": lambda: modulated_norm(stream(), row(), row(), eps=1e-6, dtype=BF16),
    "residual_modulated_norm": lambda: residual_modulated_norm(
        stream(), random(1, LENGTH, 1536), row(), row(), eps=1e-6, dtype=BF16
    ),
    "residual_affine_norm": lambda: residual_affine_norm(
        stream(), random(1, LENGTH, 1536), row()[0, 0], row()[0, 0], gate=row(), eps=1e-6, dtype=BF16
    ),
    "gated_residual": lambda: gated_residual(stream(), random(1, LENGTH, 1536), row()),
    "gelu_tanh": lambda: gelu_tanh(random(1, LENGTH, 8960)),
    "adamw": update,
}


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("call", CALLS)
def test_every_launch_of_a_model_has_its_compile_case(
    call: str, architecture: int, launches: list[RecordedLaunch], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, architecture)
    outputs = CALLS[call]()
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    if outputs[0].grad_fn is not None:
        torch.autograd.backward(outputs, [torch.zeros_like(output) for output in outputs])
    assert launches
    for launch in launches:
        # In fp32 one table serves all architectures.
        is_half = any("bf16" in kind for kind in launch.types.values())
        same_kernel = [case for case in CASES if case.kernel is launch.kernel]
        cases = [case for case in same_kernel if case.architecture == architecture or not is_half]
        assert cases, f"{launch.kernel.fn.__name__} has no compile case for {architecture}"
        nearest = min((launch.differences(case) for case in cases), key=len)
        assert not nearest, f"{launch.kernel.fn.__name__} is nowhere described as it is launched: {'; '.join(nearest)}"
