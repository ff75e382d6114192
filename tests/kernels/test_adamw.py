"""AdamW's pass as the rest of the project calls it, on the CPU: contract, torch's bits, compile, fake tensors, machine code."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from muybridge.kernels.adamw import adamw_, adamw_operator, step_factors
from muybridge.kernels.dispatch import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1 replaces the CPU path tested here")

SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}


def tensors(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Tensor]:
    torch.manual_seed(0)
    made = {
        "param": torch.randn(*shape, dtype=dtype),
        "gradient": torch.randn(*shape, dtype=dtype),
        "exp_avg": torch.randn(*shape, dtype=dtype),
        "exp_avg_sq": torch.rand(*shape, dtype=dtype),
    }
    return {name: tensor.to(device) for name, tensor in made.items()}


def clones(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in given.items()}


def operator(given: dict[str, Tensor], **settings: Any) -> None:
    """The operator, which `adamw_` calls on CUDA only."""
    average, clip = given.pop("average", None), given.pop("clip_coefficient", None)
    average_weight = settings.pop("average_weight", 0.0)
    adamw_operator(*given.values(), average, clip, list(step_factors(**settings)), average_weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_cpu_gives_the_bits_of_torch_adamw(weight_decay: float, dtype: torch.dtype) -> None:
    settings = {**SETTINGS, "weight_decay": weight_decay}
    given = tensors(5, 7, dtype=dtype)
    given["exp_avg"].zero_()
    given["exp_avg_sq"].zero_()
    peer = given["param"].clone().requires_grad_()
    optimizer = torch.optim.AdamW([peer], **settings, foreach=False)
    for step in range(1, 6):
        given["gradient"] = torch.randn(5, 7, dtype=dtype)
        adamw_(**given, step=step, **settings)
        peer.grad = given["gradient"].clone()
        optimizer.step()
    assert torch.equal(given["param"], peer.detach())
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(given[name], optimizer.state[peer][name])


def test_clipping_is_a_factor_on_the_gradient() -> None:
    given = tensors(40)
    scaled = clones(given)
    scaled["gradient"] *= 0.25
    adamw_(**given, step=3, clip_coefficient=torch.tensor(0.25), **SETTINGS)
    adamw_(**scaled, step=3, **SETTINGS)
    assert all(torch.equal(given[name], scaled[name]) for name in ("param", "exp_avg", "exp_avg_sq"))


def test_the_average_follows_what_the_step_before_left() -> None:
    given, average = tensors(40), torch.zeros(40)
    expected = 0.25 * given["param"]
    adamw_(**given, step=1, average=average, average_weight=0.25, **SETTINGS)
    assert torch.equal(average, expected)


def test_a_bf16_gradient_is_read_exactly() -> None:
    given = tensors(40)
    given["gradient"] = given["gradient"].bfloat16()
    exact = clones(given)
    exact["gradient"] = exact["gradient"].float()
    adamw_(**given, step=1, **SETTINGS)
    adamw_(**exact, step=1, **SETTINGS)
    assert torch.equal(given["param"], exact["param"])


def test_factors_keep_double_precision() -> None:
    factors = step_factors(step=10, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    assert factors.second_weight == 1 - 0.999
    assert factors.decay == 1 - 1e-4
    assert factors.step_size == pytest.approx(1e-3 / (1 - 0.9**10), rel=1e-15)
    assert factors.root_correction == pytest.approx((1 - 0.999**10) ** 0.5, rel=1e-15)


@pytest.mark.parametrize("extras", [{}, {"average": torch.zeros(40), "clip_coefficient": torch.tensor(0.5)}])
def test_operator_passes_opcheck(extras: dict[str, Tensor]) -> None:
    given = tensors(40)
    factors = list(step_factors(step=2, **SETTINGS))
    arguments = (*given.values(), extras.get("average"), extras.get("clip_coefficient"), factors, 0.1)
    torch.library.opcheck(adamw_operator, arguments)


def test_operator_gives_the_same() -> None:
    extras = {"average": torch.zeros(40), "clip_coefficient": torch.tensor(0.5)}
    given = tensors(40) | extras
    expected = clones(given)
    operator(dict(given), step=2, average_weight=0.1, **SETTINGS)
    adamw_(**expected, step=2, average_weight=0.1, **SETTINGS)
    assert all(torch.equal(given[name], expected[name]) for name in given)


@pytest.mark.parametrize("through_operator", [True, False])
def test_compile_in_one_graph_gives_the_same(through_operator: bool) -> None:
    def update(given: dict[str, Tensor]) -> None:
        if through_operator:
            operator(dict(given), step=2, average_weight=0.1, **SETTINGS)
        else:
            adamw_(**given, step=2, average_weight=0.1, **SETTINGS)

    given = tensors(40) | {"average": torch.zeros(40)}
    expected = clones(given)
    torch.compile(update, backend="aot_eager", fullgraph=True)(given)
    update(expected)
    assert all(torch.equal(given[name], expected[name]) for name in given)


def test_parameters_that_require_gradients_are_updated_without_a_graph() -> None:
    given = tensors(40)
    given["param"].requires_grad_()
    before = given["param"].detach().clone()
    adamw_(**given, step=1, **SETTINGS)
    assert not torch.equal(given["param"].detach(), before)
    assert given["param"].is_leaf


def test_meta_and_fake_cuda_tensors_take_the_operator() -> None:
    adamw_(**tensors(40, device="meta"), step=1, **SETTINGS)
    with FakeTensorMode():
        given = {name: torch.empty(40, device="cuda") for name in tensors(40)}
        adamw_(**given, step=1, clip_coefficient=torch.empty((), device="cuda"), **SETTINGS)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"gradient": torch.zeros(3)}, r"gradient \[3\].*must share one shape"),
        ({"average": torch.zeros(2, 2)}, r"average \[2, 2\].*must share one shape"),
        ({"clip_coefficient": torch.zeros(2)}, r"clip_coefficient \[2\].*of one element"),
        ({"clip_coefficient": torch.zeros(()).double()}, r"clip_coefficient.*of the parameter's dtype"),
        ({"param": torch.zeros(4).half()}, r"param \[4\] torch.float16.*must be float32"),
        ({"exp_avg": torch.zeros(4).bfloat16()}, r"exp_avg \[4\] torch.bfloat16.*must be float32"),
        ({"average": torch.zeros(4).double()}, r"average \[4\] torch.float64.*must be float32"),
        ({"gradient": torch.zeros(4).half()}, r"gradient \[4\] torch.float16.*gradient of float32, bfloat16"),
    ],
)
def test_wrong_operands_are_named(change: dict[str, Tensor], says: str, device: str) -> None:
    given = {name: tensor.to(device) for name, tensor in (tensors(4) | change).items()}
    with pytest.raises(ValueError, match=says):
        adamw_(**given, step=1, **SETTINGS)


def test_mixed_devices_strides_and_wrong_numbers_are_named() -> None:
    with pytest.raises(ValueError, match="must be on one device"):
        adamw_(**tensors(4) | {"gradient": torch.zeros(4, device="meta")}, step=1, **SETTINGS)
    with pytest.raises(ValueError, match="must be contiguous"):
        adamw_(**tensors(4) | {"exp_avg": torch.zeros(8)[::2]}, step=1, **SETTINGS)
    with pytest.raises(ValueError, match="step=0 must be 1"):
        adamw_(**tensors(4), step=0, **SETTINGS)
    with pytest.raises(ValueError, match=r"average_weight=1.5 must lie in \[0, 1\]"):
        adamw_(**tensors(4), step=1, average=torch.zeros(4), average_weight=1.5, **SETTINGS)


@pytest.mark.parametrize("architecture", [80, 90])
def test_whole_blocks_move_sixteen_bytes_an_access(architecture: int) -> None:
    """Of an fp32 shard of any length: 2 accesses a thread and operand (5 loaded, 4 stored) in the block without a mask."""
    triton = pytest.importorskip("triton", reason="Triton has no build for this platform")
    from muybridge.kernels.adamw_kernels import compile_cases
    from muybridge.scripts.machine_code import _source

    (case,) = (c for c in compile_cases() if (c.name, c.architecture) == ("adamw/fp32/average/clip", architecture))
    assert "numel" not in case.aligned
    target = triton.backends.compiler.GPUTarget("cuda", architecture, 32)
    options = {"num_warps": case.warps, "num_stages": case.stages}
    ptx = triton.compiler.compile(_source(case), target=target, options=options).asm["ptx"]
    assert len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)) == 10
    assert len(re.findall(r"st\.global\S*\.v4\.b32", ptx)) == 8
