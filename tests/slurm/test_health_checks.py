"""How a node is asked for its findings, and by when; no process of the check runs here."""

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from muybridge.slurm import health_checks
from muybridge.slurm.health_checks import SmiError, SmiTimeout, ask_gpus, code_hash, look_at_node, read_fault
from muybridge.slurm.health_devices import try_device
from muybridge.slurm.health_findings import Device, Gpu, NodeReport, one_line
from muybridge.slurm.health_place import find_place, node_names


@pytest.fixture
def fake_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty program nvidia-smi, the only one on PATH beside the system's."""
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin")
    (tmp_path / "nvidia-smi").touch(mode=0o755)
    return tmp_path / "nvidia-smi"


def test_fields_that_a_card_does_not_have_are_not_known(fake_smi: Path) -> None:
    fake_smi.write_text(
        "#!/bin/sh\ncase $1 in --query-remapped-rows*) echo 'Unknown option' >&2; exit 2;; esac\n"
        "echo '0, GPU-ab, NVIDIA GeForce RTX 4090, 570.1, 24564, 24000, 31, [N/A], [N/A], Active, [N/A], Not Active, Active'\n"
    )
    expected = Gpu(0, "ab", "NVIDIA GeForce RTX 4090", "570.1", 24564.0, 24000.0, 31.0)
    expected.slowed_by = "hw slowdown, hw power brake slowdown"
    assert ask_gpus(30.0) == [expected]


def test_a_field_that_a_driver_does_not_know_is_left_out(fake_smi: Path) -> None:
    fake_smi.write_text(
        "#!/bin/sh\ncase $1 in\n"
        "*gpu_uuid*) echo 'GPU-ab, 0, 1'; exit;;\n"
        "*retired_pages.pending*) echo 'Field \"retired_pages.pending\" is not a valid field to query.'; exit 2;;\nesac\n"
        "echo '0, GPU-ab, NVIDIA H200, 570.1, 143771, 143000, 31, 4, Active, [N/A], Not Active, Not Active'\n"
    )
    (found,) = ask_gpus(30.0)
    assert (found.uncorrected_errors, found.has_pages_pending, found.slowed_by) == (4.0, None, "hw slowdown")
    assert (found.is_remap_pending, found.has_remap_failed) == (False, True)


def test_an_nvidia_smi_that_hangs_fails_or_is_missing_is_named_so(fake_smi: Path) -> None:
    fake_smi.write_text("#!/bin/sh\nexec sleep 60\n")
    began = time.monotonic()
    with pytest.raises(SmiTimeout, match="nvidia-smi did not answer within 0 s"):
        ask_gpus(0.3)
    assert time.monotonic() - began < 30
    fake_smi.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed because it could not reach the driver'\nexit 9\n")
    with pytest.raises(SmiError, match=r"nvidia-smi failed \(9\): NVIDIA-SMI has failed because"):
        ask_gpus(30.0)
    fake_smi.unlink()
    with pytest.raises(SmiError, match="nvidia-smi is not there"):
        ask_gpus(30.0)


def test_another_nodes_file_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    assert "cannot read in " in read_fault(tmp_path, "n2")
    health_checks._write_large(tmp_path / "n2.data", "n2")
    assert read_fault(tmp_path, "n2") == ""
    content = (tmp_path / "n2.data").read_bytes()
    for spoiled in (content[:-1], content[:100] + b"x" + content[101:], b"", content.replace(b"n2", b"n3", 1)):
        (tmp_path / "n2.data").write_bytes(spoiled)
        assert "is not what can be read there" in read_fault(tmp_path, "n2")


def test_the_code_has_one_hash(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "muybridge"
    for folder in (package / "slurm", package / "tests"):
        folder.mkdir(parents=True)
    (package / "slurm" / "__init__.py").touch()
    (package / "slurm" / "a.py").write_text("1")
    (package / "tests" / "test_a.py").write_text("1")  # in no package
    monkeypatch.setattr(health_checks, "__file__", str(package / "slurm" / "health_checks.py"))
    first = code_hash()
    (package / "tests" / "test_a.py").write_text("2")
    assert code_hash() == first
    (package / "slurm" / "a.py").write_text("2")
    assert code_hash() != first


def test_a_process_without_a_gpu_of_its_own_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    place = replace(find_place(tmp_path, {}), local_rank=1)
    assert try_device(place) == (
        None,
        Device(0, fault="process 1 of the node needs GPU 1, and torch sees 1", is_out_of_sight=True),
    )

    def lost(_: object) -> None:
        raise RuntimeError("CUDA error: GPU is lost")

    monkeypatch.setattr(torch.cuda, "set_device", lost)
    _, found = try_device(replace(place, local_rank=0))
    assert found.fault == "GPU 0 does not work: CUDA error: GPU is lost"


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", []),
        ("login", ["login"]),
        ("n[1-2,05-06],x", ["n1", "n2", "n05", "n06", "x"]),
        ("r[1-2]n[09-10]-ib", ["r1n09-ib", "r1n10-ib", "r2n09-ib", "r2n10-ib"]),
    ],
)
def test_node_lists_are_spelled_out(text: str, names: list[str]) -> None:
    assert node_names(text) == names


def test_a_step_by_hand_finds_its_place_and_a_batch_script_is_alone(tmp_path: Path) -> None:
    step = {
        "SLURM_JOB_ID": "5",
        "SLURM_PROCID": "5",
        "SLURM_LOCALID": "1",
        "SLURM_NTASKS": "6",
        "SLURMD_NODENAME": "n3",
    }
    place = find_place(
        tmp_path,
        {**step, "SLURM_STEP_NODELIST": "n[1-3]", "SLURM_STEP_TASKS_PER_NODE": "2(x3)", "SLURM_NODEID": "2"},
    )
    assert (place.rank, place.world, place.local_rank, place.local_world) == (5, 6, 1, 2)
    assert (place.nodes, place.node, place.master, place.port) == (["n1", "n2", "n3"], "n3", "n1", 15065)
    alone = find_place(tmp_path, step)
    assert (alone.rank, alone.world, alone.nodes) == (0, 1, ["n3"])


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"MUYBRIDGE_HEALTH_SECONDS": "soon"}, "MUYBRIDGE_HEALTH_SECONDS=soon must be a number"),
        ({"MUYBRIDGE_HEALTH_SECONDS": "1"}, "MUYBRIDGE_HEALTH_SECONDS=1 must be at least 5"),
        ({"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, "start the check with srun"),
    ],
)
def test_a_place_that_makes_no_sense_is_refused(tmp_path: Path, environment: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        find_place(tmp_path, environment)


def test_the_deadlines_come_one_after_the_other(tmp_path: Path) -> None:
    ends = find_place(tmp_path, {}).deadlines
    order = [
        ends.smi,
        ends.devices,
        ends.meeting,
        ends.reports,
        ends.waiting,
        ends.sums,
        ends.deputy,
        ends.total,
        ends.kill,
    ]
    assert order == sorted(order)
    assert ends.kill < 60


def test_more_nodes_get_longer(tmp_path: Path) -> None:
    def total(nodes: int, **changes: str) -> float:
        names = {"SLURM_STEP_NODELIST": f"n[1-{nodes}]", "WORLD_SIZE": str(8 * nodes), "LOCAL_WORLD_SIZE": "8"}
        return find_place(tmp_path, {**names, "RANK": "0", **changes}).deadlines.total

    assert [total(nodes) for nodes in (1, 2, 64, 512)] == [55, 56, 118, 300]
    assert total(512, MUYBRIDGE_HEALTH_SECONDS="40") == 40


def test_nvidia_smi_has_until_its_deadline(tmp_path: Path, fake_smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_smi.write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    place = find_place(tmp_path, {"MUYBRIDGE_HEALTH_SECONDS": "5"})
    place.folder.mkdir(parents=True)
    found = NodeReport("n1", "7", [0])
    look_at_node(place, found)
    assert found.smi_fault.startswith("nvidia-smi did not answer within ")
    assert found.has_smi_timed_out
    assert place.elapsed < 30
    assert "driver" not in found.versions


def test_text_of_other_programs_stays_in_its_line() -> None:
    assert one_line("a\tb\n\x1b[31mc") == "a b ?[31mc"
