"""What a run needs of memory: all of its parameters are counted, and the start of a run may need more than its steps."""

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from muybridge.models.text_small import write_tokenizer
from muybridge.train.config import TaskKind, TrainConfig, load_train_config
from muybridge.train.memory import OFFLOADED, OutOfMemoryError, bytes_per_process, check_memory, parameter_counts
from muybridge.train.tasks import TextToVideoTask

PROCESSES = 64


def test_a_text_encoder_that_is_trained_along_is_counted_with_its_vocabulary(
    tiny_run: list[str], tmp_path: Path
) -> None:
    pytest.importorskip("transformers", reason="the extra `text` is not installed")
    config = load_train_config([*tiny_run, "text=umt5_small", "text.dim=32", "text.num_heads=2", f"run_dir={tmp_path}"])
    for vocabulary in (300, 310):
        config.text.vocabulary = vocabulary
        folder = config.tokenizer_folder()
        folder.mkdir(exist_ok=True)
        # Enough repeated words for that many pieces.
        write_tokenizer(
            folder,
            9 * [f"{word}{word[::-1]} circle" for word in ("green", "moving", "square", "downwards", "left")],
            config.text,
        )
        model = TextToVideoTask(config, torch.device("cpu")).build_model()
        assert parameter_counts(config).trainable == sum(parameter.numel() for parameter in model.parameters())


@pytest.fixture
def sharded(tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    """A run whose weights are divided among many processes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("WORLD_SIZE", str(PROCESSES))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    return load_train_config([*tiny_run, "deepspeed=zero3", "model.ffn_dim=4096", f"run_dir={tmp_path}"])


def test_a_model_need_never_be_whole(sharded: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    held = sum(bytes_per_process(sharded, PROCESSES).values())
    assert held < parameter_counts(sharded).all
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=held))
    check_memory(sharded)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=held - 1))
    with pytest.raises(OutOfMemoryError, match="before activations"):
        check_memory(sharded)


def test_an_autoencoder_must_fit_once_before_it_is_sharded(
    sharded: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    sharded.task = TaskKind.video_vae
    whole, held = 4 * parameter_counts(sharded).all, sum(bytes_per_process(sharded, PROCESSES).values())
    assert held < whole - 1
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=whole - 1))
    with pytest.raises(
        OutOfMemoryError, match=r"to start \(the whole model in fp32, before .* use a smaller model, or a device"
    ):
        check_memory(sharded)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=whole))
    check_memory(sharded)


def test_what_is_on_the_host_needs_no_gpu_memory(sharded: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    sharded.deepspeed.offload_optimizer = True
    parts = bytes_per_process(sharded, PROCESSES)
    on_host = sum(parts[name] for name in OFFLOADED)
    assert parts["gradients"] == 0
    # Masters, two states, gradients twice (fp32, and bf16 where they are summed) and one average.
    assert on_host == pytest.approx((12 + 4 + 2 + 4) * parameter_counts(sharded).trainable / PROCESSES, rel=1e-3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (parts["weights"], 0))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=on_host))
    check_memory(sharded)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=on_host - 1))
    with pytest.raises(OutOfMemoryError, match=r"\(optimizer .*, EMA .* memory for each of 1 has"):
        check_memory(sharded)
    sharded.deepspeed.offload_optimizer = False
    with pytest.raises(OutOfMemoryError, match="the GPU has"):
        check_memory(sharded)


def test_what_more_processes_would_hold_is_advised(sharded: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    whole = 4 * parameter_counts(sharded).all
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=whole))
    with pytest.raises(OutOfMemoryError, match=r"before activations \(weights .* use more processes, a higher"):
        check_memory(sharded)
