"""What findings of a health check mean for their node; no process of the check runs here."""

from dataclasses import replace
from typing import Any

import pytest

from muybridge.slurm.health_findings import GIB, MIB, Device, Gpu, NodeReport, SumResult
from muybridge.slurm.health_rules import Limits, node_faults, sum_faults
from muybridge.tests.slurm.health_reports import gpu, report

LIMITS = Limits()


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
