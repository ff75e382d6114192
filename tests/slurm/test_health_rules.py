"""What findings of a health check mean, how they are asked for and shown; no process of the check runs here."""

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from muybridge.slurm import health_checks
from muybridge.slurm.health_checks import SmiError, SmiTimeout, ask_gpus, code_hash, look_at_node, read_fault
from muybridge.slurm.health_devices import try_device
from muybridge.slurm.health_findings import GIB, MIB, Device, Gpu, NodeReport, SumResult, one_line
from muybridge.slurm.health_place import find_place, node_names
from muybridge.slurm.health_rules import Fault, Limits, node_faults, silence, sum_faults
from muybridge.slurm.health_table import HealthTable, load_table, make_table, print_table, save_table
from muybridge.slurm.health_verdict import Verdict, judge

LIMITS = Limits()


def gpu(index: int, **changes: Any) -> Gpu:
    sound = Gpu(index, f"u{index}", "NVIDIA H200", "570.1", 143771.0, 143000.0, 40.0, 0.0, False, False, False)
    return replace(sound, **changes)


def report(number: int = 1, *, has_gpus: bool = True, **changes: Any) -> NodeReport:
    """Of a sound node of two processes."""
    ranks = [2 * number - 2, 2 * number - 1]
    devices = [
        Device(rank, "NVIDIA H200", f"u{rank % 2}", "", 700.0) if has_gpus else Device(rank, "cpu") for rank in ranks
    ]
    sound = NodeReport(
        f"n{number}",
        "7",
        ranks,
        is_complete=True,
        gpus_needed=2 if has_gpus else 0,
        gpus=[gpu(index) for index in range(2)] if has_gpus else [],
        versions={"torch": "2.13.0"},
        shm_bytes=500 * GIB,
        memory_bytes=1000 * GIB,
        node_memory_bytes=1100 * GIB,
        run_disk_bytes=9000 * GIB,
        temp_disk_bytes=900 * GIB,
        temp_folder="/tmp",
        open_files=1 << 20,
        write_bytes_per_second=5e8,
        write_seconds=0.004,
        devices=devices,
        clock_skew_seconds=0.01,
    )
    return replace(sound, **changes)


def faults(*reports: NodeReport) -> list[tuple[str, bool]]:
    """What is said, and whether the node is bad."""
    found = node_faults(reports, first="n1", world=2 * len(reports), limits=LIMITS)
    return [(f"{fault.node}: {fault.text}", fault.is_bad) for fault in found]


def test_sound_nodes_have_no_faults() -> None:
    assert faults(report(1), report(2)) == []


def test_what_a_card_does_not_say_is_no_fault() -> None:
    silent = Gpu(0, "u0", "NVIDIA GeForce RTX 4090", "570.1")
    assert faults(report(1, gpus=[silent, replace(silent, index=1, uuid="u1")])) == []


@pytest.mark.parametrize(
    ("changes", "words", "is_bad"),
    [
        ({"uncorrected_errors": 2.0}, "GPU 1 has 2 uncorrected memory errors", True),
        ({"has_remap_failed": True}, "GPU 1 has broken memory and no spare rows left", True),
        ({"is_remap_pending": True}, "GPU 1 waits for a reset that replaces broken rows of its memory", True),
        ({"has_pages_pending": True}, "GPU 1 waits for a reset that retires broken pages of its memory", True),
        ({"free_mib": 130000.0}, "GPU 1 has 13.4 of 140 GiB in use by others", True),
        ({"celsius": 91.0}, "GPU 1 has 91 degrees Celsius", False),
        ({"slowed_by": "hw slowdown"}, "GPU 1 is slowed down (hw slowdown)", False),
    ],
)
def test_a_gpu_that_is_not_sound(changes: dict[str, Any], words: str, is_bad: bool) -> None:
    assert faults(report(1, gpus=[gpu(0), gpu(1, **changes)])) == [(f"n1: {words}", is_bad)]


def test_what_the_checks_own_processes_hold_of_a_small_card_is_no_fault() -> None:
    assert faults(report(1, gpus=[gpu(0), gpu(1, memory_mib=24564.0, free_mib=22700.0)])) == []


def test_gpus_that_are_another_jobs_are_not_looked_at() -> None:
    assert faults(report(1, gpus=[gpu(0), gpu(1), gpu(2, uncorrected_errors=5.0, free_mib=0.0)])) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gpus": [gpu(0)]}, "nvidia-smi lists 1 GPUs of 2"),
        ({"gpus": [], "smi_fault": "nvidia-smi is not there"}, "nvidia-smi is not there"),
        ({"devices": [Device(0, "cpu"), Device(1, "cpu")]}, "torch sees no GPU (torch.cuda.is_available() is false)"),
        ({"devices": [Device(0, "x", "u0", "3 rows are wrong")]}, "rank 0: 3 rows are wrong"),
        ({"silent_ranks": [1]}, "rank 1 did not say how their devices are"),
        ({"shm_bytes": 64 * MIB}, "/dev/shm has room for 64 MiB, and 2 processes need 256"),
        ({"memory_bytes": 3 * GIB}, "3.0 GiB of memory are free, and 2 processes need 4"),
        ({"run_disk_bytes": GIB // 2}, "the run directory's disk has 0.5 GiB free"),
        ({"temp_disk_bytes": 100 * MIB}, "/tmp has 100 MiB free"),
        ({"open_files": 256}, "a process may have 256 files open, and needs 514 (ulimit -Hn)"),
        (
            {"folder_fault": "cannot write in /runs: Read-only file system"},
            "cannot write in /runs: Read-only file system",
        ),
        ({"master_fault": "does not reach rank 0 at n1:15000"}, "does not reach rank 0 at n1:15000"),
    ],
)
def test_a_node_that_is_not_sound(changes: dict[str, Any], words: str) -> None:
    assert faults(report(1, **changes)) == [(f"n1: {words}", True)]


def test_a_node_without_gpus_needs_no_nvidia_smi() -> None:
    assert faults(report(1, has_gpus=False, smi_fault="nvidia-smi is not there")) == []


def test_one_process_alone_needs_no_shared_memory() -> None:
    assert faults(report(1, ranks=[0], devices=report(1).devices[:1], shm_bytes=MIB)) == []


def test_a_slow_gpu_is_bad_and_a_slowish_one_worth_a_warning_against_its_own_model() -> None:
    def with_speeds(number: int, name: str, *speeds: float) -> NodeReport:
        devices = [replace(device, name=name, tflops=speed) for device, speed in zip(report(number).devices, speeds)]
        return report(number, devices=devices)

    nodes = [with_speeds(1, "H200", 700, 610), with_speeds(2, "H200", 700, 500), with_speeds(3, "A100", 250, 251)]
    assert faults(*nodes) == [
        ("n1: rank 1's GPU makes 610 TFLOP/s, 87% of the median 700", False),
        ("n2: rank 3's GPU makes 500 TFLOP/s, 71% of the median 700", True),
    ]


def test_of_two_gpus_the_faster_one_is_the_measure() -> None:
    slow = [replace(device, tflops=speed) for device, speed in zip(report(1).devices, (300.0, 700.0))]
    assert faults(report(1, devices=slow)) == [("n1: rank 0's GPU makes 300 TFLOP/s, 43% of the median 700", True)]


def test_the_node_with_other_versions_than_most_is_bad_and_of_two_the_one_without_rank_0() -> None:
    one, two, three = report(1), report(2, versions={"torch": "2.11.0"}), report(3)
    assert faults(one, two, three) == [("n2: torch is 2.11.0, and 2.13.0 on 2 of 3 nodes", True)]
    assert faults(one, two) == [("n2: torch is 2.11.0, and 2.13.0 on 1 of 2 nodes", True)]
    assert faults(report(1, versions={"torch": "2.11.0"}), two, three, report(4), report(5)) == [
        ("n1: torch is 2.11.0, and 2.13.0 on 3 of 5 nodes", True),
        ("n2: torch is 2.11.0, and 2.13.0 on 3 of 5 nodes", True),
    ]


def test_another_driver_card_or_patch_of_python_is_worth_a_warning() -> None:
    usual = {"torch": "2.13.0", "python": "3.11.4", "driver": "570.1", "GPU": "NVIDIA H200"}
    other = {"torch": "2.13.0", "python": "3.11.9", "driver": "575.2", "GPU": "NVIDIA H200 NVL"}
    assert faults(report(1, versions=usual), report(2, versions=other)) == [
        ("n2: GPU is NVIDIA H200 NVL, and NVIDIA H200 on 1 of 2 nodes", False),
        ("n2: driver is 575.2, and 570.1 on 1 of 2 nodes", False),
        ("n2: python is 3.11.9, and 3.11.4 on 1 of 2 nodes", False),
    ]
    assert faults(report(1, versions=usual), report(2, versions={"torch": "2.13.0", "python": "3.11.4"})) == []


@pytest.mark.parametrize("name", ["torch", "NCCL", "muybridge's code"])
def test_another_torch_nccl_or_code_is_bad(name: str) -> None:
    assert faults(report(1, versions={name: "1"}), report(2, versions={name: "2"})) == [
        (f"n2: {name} is 2, and 1 on 1 of 2 nodes", True)
    ]


def test_an_nvidia_smi_that_takes_too_long_is_no_fault_of_a_node_whose_gpus_torch_sees() -> None:
    text = "nvidia-smi did not answer within 16 s"
    late = report(1, gpus=[], smi_fault=text, has_smi_timed_out=True)
    assert faults(late) == [(f"n1: {text}", False)]
    assert faults(replace(late, devices=[], silent_ranks=[0, 1]))[0] == (f"n1: {text}", True)
    assert faults(replace(late, devices=[Device(0, "cpu"), Device(1, "cpu")]))[0] == (f"n1: {text}", True)


def test_a_clock_is_judged_against_most_clocks_and_not_against_rank_0s() -> None:
    skews = [0.0, 100.0, 103.0, 100.0]
    nodes = [report(number, clock_skew_seconds=skew) for number, skew in enumerate(skews, start=1)]
    assert faults(*nodes) == [
        ("n1: its clock is 100.0 s behind the others", True),
        ("n3: its clock is 3.0 s ahead of the others", False),
    ]
    assert faults(report(1, clock_skew_seconds=0.0), report(2, clock_skew_seconds=-5.0)) == [
        ("n2: its clock is 5.0 s behind the others", False)
    ]


def test_a_node_that_writes_much_more_slowly_is_worth_a_warning() -> None:
    slow = report(3, write_bytes_per_second=2e7, write_seconds=2.5)
    assert faults(report(1), report(2), slow) == [
        ("n3: a small file takes 2.5 s to get to the run directory's disk", False),
        ("n3: writes 20 MB/s into the run directory, where the median is 500", False),
    ]


def results(**changes: SumResult | None) -> dict[int, SumResult | None]:
    """Of four ranks on two nodes; r2=None is one that fell silent."""
    sound = {f"r{rank}": SumResult(rank, seconds=0.01, bytes=MIB, node_seconds=0.001) for rank in range(4)}
    return {int(name[1:]): result for name, result in {**sound, **changes}.items()}


def said_of(found: dict[int, SumResult | None]) -> list[tuple[str, str]]:
    node_of = {0: "n1", 1: "n1", 2: "n2", 3: "n2"}
    return [(f.node, f.text) for f in sum_faults(found, node_of.__getitem__, seconds=44.0, limits=LIMITS)]


def test_of_a_sum_that_failed_who_fell_silent_is_blamed_and_not_who_waited() -> None:
    assert said_of(results()) == []
    waited = {f"r{rank}": SumResult(rank, error="it waited for the others for 40 s") for rank in (0, 1, 2)}
    assert said_of(results(**waited, r3=None)) == [("n2", "rank 3 did not take part in the sum within 44 s")]
    assert said_of(results(r1=None, r2=None)) == [("", "ranks 1, 2 did not take part in the sum within 44 s")]
    assert said_of(results(**waited)) == [("", "ranks 0, 1, 2 could not add up: it waited for the others for 40 s")]


def test_a_wrong_sum_is_the_fault_of_its_node_where_one_can_be_named() -> None:
    wrong = "7 of 1000 sums over all ranks are wrong"
    assert said_of(results(r2=SumResult(2, fault=wrong))) == [("n2", f"rank 2: {wrong}")]
    own = {"r2": SumResult(2, fault=wrong, node_fault=wrong), "r3": SumResult(3, fault=wrong, node_fault=wrong)}
    spoiled = {"r0": SumResult(0, fault=wrong), "r1": SumResult(1, fault=wrong)}
    assert said_of(results(**own, **spoiled)) == [("n2", f"its own processes: {wrong}")]
    all_wrong = {f"r{rank}": SumResult(rank, fault=wrong) for rank in range(4)}
    assert said_of(results(**all_wrong)) == [("", f"with every process: {wrong}")]


def test_slow_links_and_unreadable_files_are_named() -> None:
    slow = SumResult(2, seconds=0.01, node_seconds=0.004, folder_fault="cannot read in /runs what n1 wrote: gone")
    assert said_of(results(r2=slow, r3=replace(slow, rank=3, folder_fault=""))) == [
        ("n2", "cannot read in /runs what n1 wrote: gone"),
        ("n2", "a sum over its own processes takes 4.0 ms, where the median is 1.0"),
    ]


NODES = ["n1", "n2", "n3"]


def on(nodes: list[str], check: str, text: str = "x") -> list[Fault]:
    return [Fault(node, check, text) for node in nodes]


def test_hardware_of_all_nodes_may_be_broken_but_a_set_up_that_no_node_can_meet_is_the_jobs() -> None:
    assert (judge(on(NODES, "ECC"), NODES).code, list(judge(on(NODES, "ECC"), NODES).bad)) == (75, NODES)
    verdict = judge(on(NODES, "shm", "/dev/shm is small"), NODES)
    assert (verdict.code, verdict.bad, verdict.common) == (64, {}, ["all nodes: /dev/shm is small"])
    assert list(judge(on(["n2"], "shm"), NODES).bad) == ["n2"]
    assert list(judge(on(["n1"], "shm"), ["n1"]).bad) == ["n1"]


def test_what_is_wrong_between_rank_0_and_all_others_is_not_blamed_on_all_others() -> None:
    assert list(judge([silence("n2", None, seconds=30)], ["n1", "n2"]).bad) == ["n2"]
    assert judge(on(["n2", "n3"], "shared folder"), NODES).code == 64
    verdict = judge(on(["n2", "n3"], "master", "does not reach it"), NODES)
    assert verdict.bad == {"n1": "no other node reaches it: does not reach it"}


@pytest.mark.parametrize("check", ["silence", "products", "folder", "GPU memory", "run disk", "clock", "sum"])
def test_what_most_nodes_have_is_no_nodes_fault(check: str) -> None:
    names = [f"n{number}" for number in range(1, 65)]
    verdict = judge(on(names, check, "Disk quota exceeded"), names)
    assert (verdict.code, verdict.bad) == (75, {})
    assert verdict.common[0].startswith("all nodes: Disk quota exceeded")
    verdict = judge(on(names[:33], check), names)
    assert (verdict.code, verdict.bad) == (75, {})
    assert verdict.common[0].startswith("33 of 64 nodes: x")
    assert list(judge(on(names[:32], check), names).bad) == names[:32]
    assert list(judge(on(["n1"], check), ["n1"]).bad) == ["n1"]


@pytest.mark.parametrize("check", ["ECC", "speed"])
def test_parts_that_break_are_their_nodes_fault_however_many_there_are(check: str) -> None:
    assert list(judge(on(["n1", "n2"], check), NODES).bad) == ["n1", "n2"]


def test_a_port_that_rank_0_cannot_open_is_no_nodes_fault() -> None:
    nodes = [report(1, port_fault="cannot open port 15000"), *(report(n, master_fault="no way") for n in (2, 3))]
    verdict = judge(node_faults(nodes, first="n1", world=6, limits=LIMITS), NODES)
    assert (verdict.code, verdict.bad, verdict.common) == (75, {}, ["n1: cannot open port 15000"])


def test_a_node_without_the_data_that_others_have_is_bad_and_where_all_lack_them_the_settings_are_wrong() -> None:
    def judged(*lacking: tuple[int, str]) -> Verdict:
        lists = {number: [text for of, text in lacking if of == number] for number in (1, 2, 3)}
        nodes = [report(number, data_faults=texts) for number, texts in lists.items()]
        return judge(node_faults(nodes, first="n1", world=6, limits=LIMITS), NODES)

    gone = "data.path=/mount/clips: No such file or directory"
    assert (judged((2, gone)).code, judged((2, gone)).bad) == (75, {"n2": gone})
    everywhere = judged((1, gone), (2, gone), (3, gone))
    assert (everywhere.code, everywhere.bad, everywhere.common) == (64, {}, [f"all nodes: {gone}"])
    other = "validation.path=/other: No such file or directory"
    assert judged((1, gone), (2, other)).bad == {"n1": gone, "n2": other}


def test_a_set_up_that_some_node_meets_is_tried_again() -> None:
    verdict = judge(on(["n1", "n3"], "shm"), NODES)
    assert (verdict.code, verdict.bad, verdict.common) == (75, {}, ["2 of 3 nodes: x"])


def test_most_nodes_that_need_longer_to_start_are_not_bad_and_the_words_say_how_to_give_them_longer() -> None:
    at_import = report(3, is_complete=False, doing="the import of torch")
    verdict = judge([silence("n2", None, seconds=30), silence("n3", at_import, seconds=30)], NODES)
    assert (verdict.code, verdict.bad) == (75, {})
    (words,) = verdict.common
    assert words.startswith("2 of 3 nodes: did not report within 30 s; ")
    assert "MUYBRIDGE_HEALTH_SECONDS" in words


def without_gpus(number: int, *, processes: int = 2) -> NodeReport:
    """Of a node where Slurm shows each task one GPU only."""
    ranks = [processes * (number - 1) + local for local in range(processes)]
    text = "process {0} of the node needs GPU {0}, and torch sees 1"
    devices = [Device(ranks[0], "NVIDIA H200", "u0", "", tflops=700.0)]
    devices += [Device(rank, fault=text.format(rank % processes), is_out_of_sight=True) for rank in ranks[1:]]
    return report(number, ranks=ranks, gpus=[gpu(0)], gpus_needed=processes, devices=devices)


@pytest.mark.parametrize(("nodes", "processes"), [(2, 2), (3, 8), (1, 8)])
def test_tasks_that_see_one_gpu_each_are_the_jobs_fault_and_the_words_say_what_to_change(
    nodes: int, processes: int
) -> None:
    reports = [without_gpus(number, processes=processes) for number in range(1, nodes + 1)]
    found = node_faults(reports, first="n1", world=nodes * processes, limits=LIMITS)
    verdict = judge(found, [one.node for one in reports])
    assert (verdict.code, verdict.bad) == (64, {})
    (words,) = verdict.common
    assert "rank 1: process 1 of the node needs GPU 1, and torch sees 1; each task must see all GPUs" in words
    assert "--gpus-per-task" in words
    assert "--gpu-bind" in words


def test_a_node_that_lost_a_gpu_is_bad() -> None:
    for nodes in ([without_gpus(1)], [report(1), without_gpus(2), report(3)]):
        found = node_faults(nodes, first="n1", world=2 * len(nodes), limits=LIMITS)
        assert list(judge(found, [one.node for one in nodes]).bad) == [f"n{min(2, len(nodes))}"]


def test_warnings_alone_let_training_begin() -> None:
    verdict = judge([Fault("n2", "heat", "GPU 1 has 91 degrees Celsius", is_bad=False)], NODES)
    assert (verdict.code, verdict.bad, verdict.warnings) == (0, {}, ["n2: GPU 1 has 91 degrees Celsius"])


def test_a_warning_about_many_nodes_is_one_line() -> None:
    names = [f"n{number}" for number in range(1, 300)]
    verdict = judge([Fault(name, "memory", f"{name} is short", is_bad=False) for name in names], names)
    assert verdict.warnings == ["n1: n1 is short; in the same way n2, n3, n4, n5, n6, n7, n8, n9 and 290 more"]


def test_what_no_node_can_be_blamed_for_is_tried_again() -> None:
    verdict = judge([Fault("", "sum", "ranks 0, 1 could not add up")], NODES)
    assert (verdict.code, verdict.bad, verdict.common) == (75, {}, ["ranks 0, 1 could not add up"])


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


def large_table(nodes: int) -> HealthTable:
    reports = [report(number) for number in range(1, nodes + 1)]
    reports[6].gpus[1].uncorrected_errors = 3.0
    reports[8].gpus[0].celsius = 90.0
    reports[5].devices[1].tflops = 640.0
    found = node_faults(reports, first="n1", world=2 * nodes, limits=LIMITS)
    names = [one.node for one in reports]
    sums = {rank: SumResult(rank, seconds=0.02, bytes=256 * MIB, node_seconds=0.001) for rank in range(2 * nodes)}
    by_name = {one.node: one for one in reports}
    return make_table(names, by_name, sums, found, judge(found, names), attempt="7", seconds=12.0)


@pytest.mark.parametrize("width", [80, 120])
def test_a_table_of_many_nodes_is_short_and_names_the_bad_ones(width: int, capsys: pytest.CaptureFixture[str]) -> None:
    print_table(large_table(300), Console(width=width))
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert len(lines) < 20
    assert max(map(len, lines)) <= width
    rows = [line.split() for line in lines if line.endswith(("BAD", "warning", "ok"))]
    assert [(row[0], row[-1]) for row in rows] == [("n7", "BAD"), ("n9", "warning"), ("298", "ok")]
    assert [row[-9] for row in rows] == ["700", "700", "640"]
    assert "BAD n7: GPU 1 has 3 uncorrected memory errors" in lines
    assert "warning: n9: GPU 0 has 90 degrees Celsius" in lines


def test_a_table_is_kept(tmp_path: Path) -> None:
    assert load_table(tmp_path) is None
    table = large_table(10)
    save_table(tmp_path, table)
    assert load_table(tmp_path) == table
    (tmp_path / "slurm" / "health.json").write_text('{"rows": [{}]}')
    assert load_table(tmp_path) is None
