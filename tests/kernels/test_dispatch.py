"""Which implementation runs: the table, what forces another, and what is said about it."""

import logging
from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from muybridge.kernels import dispatch
from muybridge.kernels.dispatch import Backend, KernelsConfig


@pytest.fixture(autouse=True)
def fresh_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(dispatch, "_settings", None)
    monkeypatch.setattr(dispatch, "_logged", set())


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(dispatch, "_architecture", lambda _: 9)
    with FakeTensorMode():
        yield


def heads(width: int = 128, dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> torch.Tensor:
    return torch.empty(1, 2, 300, width, dtype=dtype, device=device)


def attention(q: torch.Tensor, mask: str = "none") -> Backend:
    return dispatch.attention_backend(q, mask=mask, key_length=300)


@pytest.mark.usefixtures("hopper")
def test_hopper_sends_dense_half_precision_to_cudnn_and_the_rest_to_our_kernels() -> None:
    assert attention(heads()) is Backend.cudnn
    assert attention(heads(), "packed") is Backend.own
    assert attention(heads(256)) is Backend.own
    assert attention(heads(dtype=torch.float32)) is Backend.own
    assert dispatch.pointwise_backend("gelu", heads()) is Backend.own


@pytest.mark.usefixtures("hopper")
def test_other_gpus_use_our_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_architecture", lambda _: 8)
    assert attention(heads()) is Backend.own


def test_the_cpu_and_unknown_dtypes_use_the_reference() -> None:
    assert attention(heads(device="cpu")) is Backend.reference
    assert dispatch.pointwise_backend("gelu", heads(device="cpu")) is Backend.reference
    with FakeTensorMode():
        assert attention(heads(dtype=torch.float64)) is Backend.reference


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("backend", [Backend.own, Backend.cudnn, Backend.reference])
def test_settings_force_a_backend(backend: Backend) -> None:
    dispatch.configure(KernelsConfig(attention=backend))
    assert attention(heads()) is backend


@pytest.mark.usefixtures("hopper")
def test_the_environment_overrides_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "attention=own, pointwise=reference,fused_backward=true")
    assert attention(heads()) is Backend.own  # also where nothing was configured
    dispatch.configure(KernelsConfig(attention=Backend.reference))
    assert attention(heads()) is Backend.own
    assert dispatch.pointwise_backend("gelu", heads()) is Backend.reference
    assert not dispatch.is_deterministic()


@pytest.mark.parametrize("text", ["attention=fast", "attention", "speed=own", "pointwise=cudnn", "fused_backward=no"])
def test_a_wrong_environment_variable_is_named(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, text)
    with pytest.raises(ValueError, match=f"MUYBRIDGE_KERNELS='{text}'.*attention=auto|own|cudnn|reference"):
        attention(heads(device="cpu"))
    assert len(KernelsConfig().faults("kernels")) == 1


def test_cudnn_is_no_backend_of_pointwise_operations() -> None:
    assert "kernels.pointwise=cudnn must be" in KernelsConfig(pointwise=Backend.cudnn).faults("kernels")[0]


@pytest.mark.usefixtures("hopper")
def test_cudnn_refuses_what_it_cannot_serve() -> None:
    with dispatch.forced(attention=Backend.cudnn):
        with pytest.raises(ValueError, match="mask=packed"):
            attention(heads(), "packed")
        with pytest.raises(ValueError, match="float32"):
            attention(heads(dtype=torch.float32))
        with pytest.raises(ValueError, match="on cpu"):
            attention(heads(device="cpu"))


@pytest.mark.usefixtures("hopper")
def test_forced_ends_with_its_block() -> None:
    with dispatch.forced(attention=Backend.own, fused_backward=True):
        assert attention(heads()) is Backend.own
        assert not dispatch.is_deterministic()
    assert attention(heads()) is Backend.cudnn
    assert dispatch.is_deterministic()


@pytest.mark.usefixtures("hopper")
def test_a_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="muybridge.kernels"):
        for _ in range(3):
            attention(heads())
            dispatch.pointwise_backend("gelu", heads())
    assert [record.getMessage() for record in caplog.records] == [
        "attention (bfloat16 on cuda, mask none, head width 128): cudnn",
        "gelu (bfloat16 on cuda): own",
    ]
