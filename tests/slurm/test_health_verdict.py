"""What becomes of a job whose nodes have faults, and how it is shown; no process of the check runs here."""

from pathlib import Path

import pytest
from rich.console import Console

from muybridge.slurm.health_findings import MIB, Device, NodeReport, SumResult
from muybridge.slurm.health_rules import Fault, Limits, node_faults, silence
from muybridge.slurm.health_table import HealthTable, load_table, make_table, print_table, save_table
from muybridge.slurm.health_verdict import Verdict, judge
from muybridge.tests.slurm.health_reports import gpu, report

LIMITS = Limits()
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
