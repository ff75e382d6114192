"""The health check of whole jobs: sound ones, and ones with faults; most of them run by health_program.py."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from muybridge.slurm.health_table import load_table
from muybridge.tests.patience import PATIENCE
from muybridge.tests.slurm.cluster import Cluster


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, command_env: dict[str, str]) -> Path:
    root = tmp_path_factory.mktemp("health")
    program = [sys.executable, str(Path(__file__).with_name("health_program.py")), str(root)]
    env = {**command_env, "TORCH_CPP_LOG_LEVEL": "FATAL"}
    answer = subprocess.run(program, capture_output=True, text=True, check=False, env=env)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return root


@pytest.fixture(scope="module")
def found(root: Path) -> dict[str, dict[str, Any]]:
    """Of each case the processes' exit codes, the seconds that they took and what they said."""
    return json.loads((root / "found.json").read_text())


def bad_nodes(root: Path, case: str) -> dict[str, str]:
    """Node and reason, as the batch script reads them."""
    path = root / case / "run" / "slurm" / "lives" / "7.0" / "bad_nodes"
    lines = path.read_text().splitlines() if path.exists() else []
    return dict(line.split("\t") for line in lines)


def test_sound_nodes_may_train(root: Path, found: dict[str, dict[str, Any]]) -> None:
    assert found["is_sound"]["codes"] == [0, 0, 0, 0]
    assert "training can begin" in found["is_sound"]["said"][0]
    assert "sum over 4 processes: right" in found["is_sound"]["said"][0]
    assert found["is_sound"]["said"][1:] == ["", "", ""]
    life = root / "is_sound" / "run" / "slurm" / "lives" / "7.0"
    assert [path.name for path in life.iterdir()] == ["health"]
    assert sorted(path.name for path in (life / "health").iterdir()) == ["n1.json", "n2.json"]
    table = load_table(root / "is_sound" / "run")
    assert table is not None
    assert [(row.node, row.state) for row in table.rows] == [("n1", "ok"), ("n2", "ok")]
    assert table.code == 0


def test_each_bad_node_is_named_with_its_reasons_and_the_others_add_up(
    root: Path, found: dict[str, dict[str, Any]]
) -> None:
    assert found["has_faults"]["codes"] == [75] * 6
    bad = bad_nodes(root, "has_faults")
    assert sorted(bad) == ["n2", "n3", "n4", "n5"]
    assert bad["n2"].startswith("muybridge's code is 0123456789ab, and ")
    assert "GPU 0 has 3 uncorrected memory errors" in bad["n3"]
    assert "GPU 1 waits for a reset that replaces broken rows of its memory" in bad["n3"]
    assert "GPU 1 has 42.7 of 140 GiB in use by others" in bad["n3"]
    assert "torch sees no GPU" in bad["n3"]
    assert "is not seen on n1: the run directory must be on a file system that all nodes share" in bad["n4"]
    assert "rank 4: 3 of 128 rows of a product are wrong" in bad["n5"]
    assert "its clock is 10" in bad["n5"]
    assert "sum over 2 processes: right" in found["has_faults"]["said"][0]
    assert "warning: n3: GPU 1 is slowed down (hw slowdown)" in found["has_faults"]["said"][0]


def test_nodes_that_fall_silent_are_named_by_the_deadline(root: Path, found: dict[str, dict[str, Any]]) -> None:
    bad = bad_nodes(root, "loses_a_node")
    assert sorted(bad) == ["n2", "n3"]
    assert bad["n2"].startswith("did not report within ")
    assert "it was still at the test of its devices" in bad["n3"]
    assert [found["loses_a_node"]["codes"][rank] for rank in (0, 2)] == [75, 75]


def test_a_rank_that_dies_before_the_sum_is_named_and_those_who_waited_for_it_are_not(
    root: Path, found: dict[str, dict[str, Any]]
) -> None:
    bad = bad_nodes(root, "loses_a_rank")
    assert list(bad) == ["n2"]
    assert bad["n2"].startswith("rank 3 did not take part in the sum within ")
    assert found["loses_a_rank"]["codes"] == [75, 75, 75, 9]


def test_another_node_judges_where_rank_0_hangs(root: Path, found: dict[str, dict[str, Any]]) -> None:
    bad = bad_nodes(root, "loses_rank_0")
    assert list(bad) == ["n1"]
    assert "fell silent" in bad["n1"]
    assert found["loses_rank_0"]["codes"][1:] == [75, 75]
    assert "BAD n1" in found["loses_rank_0"]["said"][1]
    assert found["loses_rank_0"]["said"][2] == ""


def test_what_all_nodes_have_ends_the_job_and_names_no_node(root: Path, found: dict[str, dict[str, Any]]) -> None:
    assert found["has_small_shm"]["codes"] == [64] * 4
    assert bad_nodes(root, "has_small_shm") == {}
    ended = root / "has_small_shm" / "run" / "slurm" / "lives" / "7.0" / "ended"
    words = "the health check: all nodes: /dev/shm has room for 64 MiB, and 2 processes need 256"
    assert ended.read_text() == f"64\nnobody\n{words}\n"


def test_a_taken_port_is_no_nodes_fault(root: Path, found: dict[str, dict[str, Any]]) -> None:
    assert found["has_no_port"]["codes"] == [75, 75]
    assert bad_nodes(root, "has_no_port") == {}
    code, who, words = (root / "has_no_port" / "run" / "slurm" / "lives" / "7.0" / "ended").read_text().splitlines()
    assert (code, who) == ("75", "nobody")
    assert words.startswith("the health check: n1: cannot open port ")


def test_every_process_leaves_by_the_deadline(found: dict[str, dict[str, Any]]) -> None:
    for case in ("has_faults", "loses_a_node", "loses_a_rank", "loses_rank_0", "has_no_port"):
        # Rank 0 of loses_rank_0 is killed by the program, after the others have left.
        assert max(found[case]["seconds"]) < 1.1 * 18 * PATIENCE, case


def test_by_hand_one_machine_needs_nothing_but_a_folder(tmp_path: Path, command_env: dict[str, str]) -> None:
    command = [sys.executable, "-m", "muybridge.slurm.health"]
    answer = subprocess.run([*command, tmp_path], capture_output=True, text=True, check=False, env=command_env)
    assert (answer.returncode, answer.stderr) == (0, "")
    assert "training can begin" in answer.stdout
    assert (tmp_path / "slurm" / "health.json").exists()
    answer = subprocess.run([*command, tmp_path / "no"], capture_output=True, text=True, check=False, env=command_env)
    assert answer.returncode == 64
    assert f"{tmp_path / 'no'} is not a folder" in answer.stderr
    assert not (tmp_path / "no").exists()


def test_slurm_hears_of_a_node_without_shared_memory(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    command = ["srun", "--nodes=2", "--nodelist=n1,n2", "--ntasks-per-node=2", "--kill-on-bad-exit=0", sys.executable]
    cluster.on("n2", ["mount", "-o", "remount,size=64M", "/dev/shm"])
    try:
        answer = cluster.run([*command, "-m", "muybridge.slurm.health", tmp_path / "run"], check=False)
    finally:
        cluster.on("n2", ["mount", "-o", "remount,size=50%", "/dev/shm"])
    assert answer.returncode == 75, answer.stdout + answer.stderr
    assert (tmp_path / "run" / "slurm" / "by_hand" / "bad_nodes").read_text() == (
        "n2\t/dev/shm has room for 64 MiB, and 2 processes need 256\n"
    )
    assert "sum over 2 processes: right" in answer.stdout
