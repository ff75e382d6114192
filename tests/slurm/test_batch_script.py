"""The batch script of a run under a real Slurm, with bash for a trainer: what it starts, and how it stops when it is asked to."""

import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from muybridge.slurm.render import TEMPLATE
from muybridge.tests.slurm.cluster import Cluster
from muybridge.tests.slurm.conftest import require_cluster
from muybridge.tests.slurm.stub_run import ONE, TWO_BY_TWO, TWO_LIVES, MakeRun, StubRun

# What no shell may take for more than text.
HOSTILE = [
    "text='a b'",
    'text="$(touch OWNED)`touch OWNED`"',
    "a;touch OWNED",
    "line\nbreak\t|&<>*?~#!\\",
    "",
    "é 映画",
    "-m",
]


@pytest.fixture(scope="module")
def silent_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Another site: what preempts a job there sends TERM to its tasks only, and nothing to the batch script."""
    require_cluster()
    cluster = Cluster(tmp_path_factory.mktemp("silent"), PREEMPT_SIGNAL="no")
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


# The file.


def test_template_is_a_job_as_it_stands(cluster: Cluster) -> None:
    done = cluster.run(["sbatch", "--test-only", TEMPLATE])
    assert "to start at" in done.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed: make slurm-packages")
@pytest.mark.parametrize("script", [TEMPLATE, Path(__file__).with_name("stub_python.sh")], ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    done = subprocess.run(["shellcheck", "--severity=style", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_bash_can_read_the_template() -> None:
    subprocess.run(["bash", "-n", TEMPLATE], check=True)


# What tasks are given.


def test_every_task_has_its_place_in_the_world(make_run: MakeRun, cluster: Cluster) -> None:
    run = make_run(health="true", stage="true", overrides=["steps=5"])
    run.submit(*TWO_BY_TWO, "--cpus-per-task=2")
    assert run.to_end() == "COMPLETED"
    for rank in range(4):
        assert run.given("train", rank) == ["-m", "muybridge.train", "steps=5"]
        assert run.given("health", rank) == ["-m", "muybridge.slurm.health", str(run.run_dir)]
        env = run.environment("train", rank)
        place = [env[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURMD_NODENAME")]
        assert place == [str(rank), "4", str(rank % 2), "2", "n1" if rank < 2 else "n2"]
        assert (env["MASTER_ADDR"], env["CUDA_VISIBLE_DEVICES"]) == ("n1", "0,1")
        assert int(env["MASTER_PORT"]) == 15000 + 13 * run.job
        assert env["PYTHONPATH"].split(":")[0] == str(run.folder / "code")
        assert (env["PYTHONSAFEPATH"], env["MUYBRIDGE_STOP_LEAD_SECONDS"]) == ("1", "60")
        assert env["MUYBRIDGE_LIFE_DIR"] == str(run.life_dir())
        for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TORCH_EXTENSIONS_DIR"):
            assert Path(env[name]).parent.name.startswith("muybridge-cache-")  # on the node's disk, unlike other caches
        assert env["MUYBRIDGE_STAGED"] == str(run.run_dir / "staged")
        assert (run.life_dir() / f"given-train-{rank}.folder").read_text().strip() == str(run.run_dir)
    assert run.given("stage", 1) == ["-m", "muybridge.slurm.stage", str(run.run_dir / "staged"), "steps=5"]
    assert not (run.life_dir() / "given-stage-2.argv").exists()  # one task a node
    assert "train: rank 0" in run.log()
    assert "train: rank 1" not in run.log()
    assert "train: rank 3" in (run.life_dir() / "rank-3.log").read_text()
    [start] = run.events("start")
    assert (start["life"], start["job"], start["nodes"]) == (f"{run.job}.0", run.job, "n[1-2]")
    [end] = run.events()
    assert (end["life"], end["code"], end["decision"]) == (f"{run.job}.0", 0, "done")
    assert 0 <= end["unix_seconds"] - start["unix_seconds"] < 60
    assert abs(end["unix_seconds"] - time.time()) < 60


def test_a_node_that_cannot_resolve_names_gets_an_address(make_run: MakeRun, cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n")
    cluster.on("n2", ["mount", "--bind", tmp_path / "hosts", "/etc/hosts"])
    try:
        run = make_run()
        run.submit(*TWO_BY_TWO)
        assert run.to_end() == "COMPLETED"
    finally:
        cluster.on("n2", ["umount", "/etc/hosts"])
    assert [run.environment("train", rank)["MASTER_ADDR"] for rank in (0, 2)] == ["n1", "10.77.0.11"]


def test_text_arrives_as_it_is_and_nothing_in_it_is_run(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run('a run\'s "$(touch OWNED)"; touch OWNED\n`touch OWNED`', overrides=HOSTILE, health="true")
    run.submit(*ONE)
    assert run.to_end() == "COMPLETED"
    assert run.given("train", 0) == ["-m", "muybridge.train", *HOSTILE]
    assert run.given("health", 0)[2] == str(run.run_dir)
    assert run.environment("train", 0)["PYTHONPATH"].split(":")[0] == str(run.folder / "code")
    assert run.decisions() == ["done"]
    assert not list(tmp_path.rglob("OWNED"))


def test_what_the_environment_of_submit_says_to_srun_does_no_harm(make_run: MakeRun) -> None:
    run = make_run()
    run.submit(*TWO_BY_TWO, "--distribution=cyclic", "--export=NONE")
    assert run.to_end() == "COMPLETED"
    assert [run.environment("train", rank)["LOCAL_RANK"] for rank in range(4)] == ["0", "1", "0", "1"]
    assert run.environment("train", 3)["MUYBRIDGE_LIFE_DIR"] == str(run.life_dir())


# Stopped from outside.


def test_a_warned_job_comes_back_and_goes_on(make_run: MakeRun) -> None:
    run = make_run(train=TWO_LIVES, health="true")
    run.submit(*TWO_BY_TWO)
    run.wait_for_phase("train", ranks=4)
    run.warn()
    run.warn()  # a second one changes nothing
    assert run.to_end() == "COMPLETED"
    assert run.decisions() == ["requeue", "done"]
    assert run.events()[0]["code"] == 75
    assert "Slurm warned of a time limit or a preemption: asked to stop" in str(run.events()[0]["why"])
    log = run.log()
    assert log.index("train: rank 0 of life 0") < log.index("train: rank 0 of life 1")
    assert [run.environment("train", 0, life=life)["MASTER_PORT"] for life in (0, 1)] == [
        str(15000 + 13 * run.job + life) for life in (0, 1)
    ]
    assert run.fruitless() == 1  # the last one's, which is done


@pytest.mark.parametrize("phase", ["stage", "health"])
def test_a_warning_before_the_training_ends_the_life_at_once(make_run: MakeRun, phase: str) -> None:
    run = make_run(
        **{"train": "leave 0", "stage": "true", "health": "true", phase: '[ "$life" != 0 ] || exec sleep 300'}
    )
    run.submit(*TWO_BY_TWO)
    run.wait_for_phase(phase, ranks=2)
    run.warn()
    assert run.to_end() == "COMPLETED"
    assert run.decisions() == ["requeue", "done"]
    assert not (run.life_dir() / "given-train-0.argv").exists()
    assert run.fruitless() == 1  # the last one's, which is done


def test_a_signal_during_set_up_is_not_lost(make_run: MakeRun) -> None:
    # The site's own lines run in the foreground, so that traps come after them.
    warned, cancelled = (make_run(name, health="true") for name in ("warned", "cancelled"))
    for run in (warned, cancelled):
        run.submit(
            *ONE, set_up='[ -n "${SLURM_RESTART_COUNT-}" ] || { : >setting-up; until [ -e go ]; do sleep 0.1; done; }'
        )
    for run in (warned, cancelled):
        run.wait_until((run.run_dir / "setting-up").exists, "the set-up")
    warned.warn()
    cancelled.cluster.run(["scancel", str(cancelled.job)])
    for run in (warned, cancelled):
        (run.run_dir / "go").touch()
    assert (warned.to_end(), cancelled.to_end()) == ("COMPLETED", "CANCELLED")
    assert (warned.decisions(), cancelled.decisions()) == (["requeue", "done"], ["slurm"])
    assert (warned.life_dir() / "stop").exists()
    for run in (warned, cancelled):
        assert not (run.life_dir() / "given-health-0.argv").exists()


def test_a_preempted_job_comes_back(make_run: MakeRun, cluster: Cluster) -> None:
    run = make_run(train=TWO_LIVES)
    run.submit(*TWO_BY_TWO)
    run.wait_for_phase("train", ranks=4)
    urgent = cluster.sbatch(["--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"])
    assert run.to_end() == "COMPLETED"
    assert cluster.state(urgent) == "COMPLETED"
    assert run.decisions() == ["requeue", "done"]


def test_a_preempted_job_comes_back_where_only_its_tasks_are_told(silent_cluster: Cluster, tmp_path: Path) -> None:
    asked = "trap 'term=1' TERM; until [ -n \"${term-}\" ]; do sleep 0.1; done; leave 75 scheduler 'TERM'"
    run = StubRun(silent_cluster, tmp_path / "run", train=f'[ "$life" = 0 ] || leave 0; {asked}')
    run.submit(*TWO_BY_TWO)
    run.wait_for_phase("train", ranks=4)
    silent_cluster.sbatch(["--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"])
    assert run.to_end() == "COMPLETED"
    assert run.decisions() == ["requeue", "done"]


def test_a_job_preempted_without_grace_comes_back(silent_cluster: Cluster, tmp_path: Path) -> None:
    silent_cluster.run(["scontrol", "update", "PartitionName=train", "GraceTime=0"])
    asked = "trap 'term=1' TERM; until [ -n \"${term-}\" ]; do sleep 0.1; done; leave 75 scheduler 'TERM'"
    run = StubRun(silent_cluster, tmp_path / "run", train=f'[ "$life" = 0 ] || leave 0; {asked}')
    run.submit(*TWO_BY_TWO)
    run.wait_for_phase("train", ranks=4)
    silent_cluster.sbatch(["--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"])
    assert run.to_end() == "COMPLETED"
    assert run.decisions() == ["slurm", "done"]


@pytest.mark.parametrize("phase", ["health", "train"])
def test_a_job_that_an_admin_requeues_comes_back(make_run: MakeRun, cluster: Cluster, phase: str) -> None:
    run = make_run(
        **{
            "train": "leave 0",
            "health": "true",
            phase: '[ "$life" != 0 ] || exec sleep 300; [ $phase = health ] || leave 0',
        }
    )
    run.submit(*TWO_BY_TWO)
    run.wait_for_phase(phase, ranks=4)
    cluster.run(["scontrol", "requeue", str(run.job)])
    assert run.to_end() == "COMPLETED"
    assert run.decisions() == ["slurm", "done"]
    assert run.fruitless() == 1  # the last one's, which is done


@pytest.mark.parametrize("answer", ["leave 75 scheduler TERM", "exit 1"])
def test_a_cancelled_job_does_not_come_back(make_run: MakeRun, cluster: Cluster, answer: str) -> None:
    run = make_run(train=f"trap '{answer}' TERM; while :; do sleep 0.1; done")
    run.submit(*TWO_BY_TWO)
    run.wait_for_phase("train", ranks=4)
    cluster.run(["scancel", str(run.job)])
    assert run.to_end() == "CANCELLED"
    assert run.decisions() == ["slurm"]
    assert cluster.job(run.job)["Restarts"] == "0"


def test_what_muybridge_cancel_marked_is_not_requeued(make_run: MakeRun) -> None:
    run = make_run(train='wait_for "$life_dir/stop"; exit 1')
    run.submit(*ONE, limit=1)
    run.wait_for_phase("train")
    (run.folder / "cancelled").touch()
    run.warn()
    assert run.to_end() == "FAILED"  # what waits for a good end of it does not begin
    assert run.decisions() == ["cancelled"]
    run.submit(*ONE)
    assert run.to_end() == "FAILED"
    assert len(run.events("start")) == 1


def test_what_was_cancelled_before_the_training_does_not_train(make_run: MakeRun) -> None:
    run = make_run(health='wait_for "$run_dir/go"')
    run.submit(*ONE)
    run.wait_for_phase("health")
    (run.folder / "cancelled").touch()
    (run.run_dir / "go").touch()
    assert run.to_end() == "FAILED"
    assert run.decisions() == ["cancelled"]
    assert not (run.life_dir() / "given-train-0.argv").exists()


def test_what_a_person_stopped_stays_stopped(make_run: MakeRun) -> None:
    run = make_run(train='wait_for "$run_dir/STOP"; leave 75 user "a file STOP"')
    run.submit(*TWO_BY_TWO)
    run.wait_for_phase("train", ranks=4)
    chained = run.cluster.sbatch(
        [f"--chdir={run.run_dir}", f"--dependency=afterany:{run.job}", run.folder / "train.sbatch"]
    )
    (run.run_dir / "STOP").touch()
    assert run.to_end() == "FAILED"
    run.job = chained
    assert run.to_end() == "FAILED"
    assert run.decisions() == ["stopped"]


def test_a_training_that_hangs_at_the_warning_comes_back(make_run: MakeRun) -> None:
    # Slurm starts no job again that met its time limit.
    run = make_run(train='[ "$life" = 0 ] || leave 0; trap "" TERM; while :; do sleep 0.1; done')
    run.submit(*TWO_BY_TWO, lead=6)
    run.wait_for_phase("train", ranks=4)
    run.warn()
    assert run.to_end() == "COMPLETED"
    assert run.decisions() == ["requeue", "done"]
    assert "ended" not in {path.name for path in run.life_dir().iterdir()}
