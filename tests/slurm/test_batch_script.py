"""The batch script of a run under a real Slurm, with a few lines of bash for the trainer: what it starts, and what it makes of its end."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from muybridge.slurm.render import TEMPLATE
from muybridge.tests.slurm.cluster import Cluster
from muybridge.tests.slurm.conftest import require_cluster
from muybridge.tests.slurm.stub_run import StubRun, write_fields

TWO_BY_TWO = ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2")
ONE = ("--nodes=1", "--ntasks-per-node=1")
# The first life trains until it is asked to stop, the second to the end.
TWO_LIVES = '[ "$life" = 0 ] || leave 0; wait_for "$life_dir/stop"; leave 75 scheduler "asked to stop"'
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

MakeRun = Callable[..., StubRun]


@pytest.fixture
def make_run(cluster: Cluster, tmp_path: Path) -> MakeRun:
    """Makes run directories; those of one test have names of their own."""
    return lambda name="run", **phases: StubRun(cluster, tmp_path / name, **phases)


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


# --- The file ---


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


# --- What tasks are given ---


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


# --- Stopped from outside ---


def test_a_warned_job_comes_back_and_goes_on(make_run: MakeRun) -> None:
    run = make_run(train=TWO_LIVES, health="true")
    run.submit(*TWO_BY_TWO)
    run.wait_for_phase("train", ranks=4)
    run.warn()
    run.warn()  # a second one changes nothing
    assert run.to_end() == "COMPLETED"
    assert run.decisions() == ["requeue", "done"]
    assert run.events()[0]["code"] == 75
    assert "asked to stop" in str(run.events()[0]["why"])
    log = run.log()
    assert log.index("train: rank 0 of life 0") < log.index("train: rank 0 of life 1")
    assert [run.environment("train", 0, life=life)["MASTER_PORT"] for life in (0, 1)] == [
        str(15000 + 13 * run.job + life) for life in (0, 1)
    ]
    assert not (run.folder / "fruitless").exists()


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
    assert not (run.folder / "fruitless").exists()


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
    assert not (run.folder / "fruitless").exists()


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
    assert run.to_end() == "COMPLETED"
    assert run.decisions() == ["cancelled"]
    run.submit(*ONE)
    assert run.to_end() == "COMPLETED"
    assert len(run.events("start")) == 1


def test_what_a_person_stopped_stays_stopped(make_run: MakeRun) -> None:
    run = make_run(train='wait_for "$run_dir/STOP"; leave 75 user "a file STOP"')
    run.submit(*TWO_BY_TWO)
    run.wait_for_phase("train", ranks=4)
    chained = run.cluster.sbatch(
        [f"--chdir={run.run_dir}", f"--dependency=afterany:{run.job}", run.folder / "train.sbatch"]
    )
    (run.run_dir / "STOP").touch()
    assert run.to_end() == "COMPLETED"
    run.job = chained
    assert run.to_end() == "COMPLETED"
    assert run.decisions() == ["stopped"]


# --- Ended by itself ---


def test_the_next_job_of_a_chain_has_nothing_to_do_after_a_run_that_is_done(make_run: MakeRun) -> None:
    run = make_run()
    first = run.submit(*ONE)
    run.submit(*ONE, options=[f"--dependency=afterany:{first}"])
    assert run.to_end() == "COMPLETED"
    assert run.decisions() == ["done"]
    # Submitted again, with more steps say, it goes on.
    write_fields(run.folder / "command", [str(run.run_dir), str(run.run_dir / "python"), "", ""])
    run.submit(*ONE)
    assert run.to_end() == "COMPLETED"
    assert run.decisions() == ["done", "done"]


def test_what_would_fail_again_is_not_tried_again(make_run: MakeRun) -> None:
    words = {64: "settings", 76: "clips", 77: "diverged", 78: "memory", 93: "checkpoint"}
    runs = {code: make_run(str(code), train=f"leave {code} nobody 'the cause'") for code in words}
    unsaid = make_run("unsaid", train="exit 77")  # it did not come to write how it ended
    for run in (*runs.values(), unsaid):
        run.submit(*ONE)
    for code, run in runs.items():
        assert run.to_end() == "FAILED"
        assert run.decisions() == ["give_up"]
        assert run.events()[0]["code"] == code
        reason = (run.folder / "gave_up").read_text()
        assert words[code] in reason
        assert "the cause" in reason
    assert (unsaid.to_end(), unsaid.decisions()) == ("FAILED", ["give_up"])


def test_a_killed_process_costs_a_life_and_not_the_run(make_run: MakeRun, cluster: Cluster) -> None:
    run = make_run(train='[ "$life" = 0 ] || leave 0; save step-5; exec sleep 300')
    run.submit(*TWO_BY_TWO)
    run.wait_for_phase("train", ranks=4)
    run.wait_until((run.run_dir / "checkpoints" / "LATEST").exists, "a checkpoint")
    pid = (run.life_dir() / "given-train-3.pid").read_text().strip()
    cluster.on("n2", ["kill", "-9", pid])
    assert run.to_end() == "COMPLETED"
    assert run.decisions() == ["requeue", "done"]
    assert (run.folder / "fruitless").read_text() == "0\n"


def test_a_working_folder_that_is_missing_costs_a_life(make_run: MakeRun) -> None:
    run = make_run()
    write_fields(run.folder / "command", [str(run.run_dir / "missing"), str(run.run_dir / "python"), "", ""])
    run.submit(*ONE, limit=1)
    assert run.to_end() == "FAILED"
    assert run.decisions() == ["give_up"]
    assert "missing: No such file or directory" in run.log()


def test_a_process_has_its_share_of_a_whole_node(make_run: MakeRun) -> None:
    run = make_run()
    run.submit("--nodes=1", "--ntasks-per-node=2", "--exclusive")
    assert run.to_end() == "COMPLETED"
    assert run.environment("train", 0)["SLURM_CPUS_PER_TASK"] == "4"


def test_a_step_that_ends_well_without_a_word_is_no_end_of_the_training(make_run: MakeRun) -> None:
    run = make_run(train='[ "$life" = 0 ] || leave 0; exit 0')
    run.submit(*ONE)
    assert run.to_end() == "COMPLETED"
    assert run.decisions() == ["requeue", "done"]


def test_a_run_without_progress_is_given_up_and_progress_starts_the_count_anew(make_run: MakeRun) -> None:
    run = make_run(train='[ "$life" != 1 ] || save step-5; exit 1')
    run.submit(*ONE, limit=2)
    assert run.to_end() == "FAILED"
    assert run.decisions() == ["requeue", "requeue", "requeue", "give_up"]
    assert (run.folder / "fruitless").read_text() == "2\n"
    assert "2 lives in a row without a new checkpoint" in (run.folder / "gave_up").read_text()
    first = run.job
    run.submit(*ONE, limit=2)  # the next of a chain
    assert run.to_end() == "FAILED"
    assert [start["job"] for start in run.events("start")] == [first] * 4


def test_a_python_that_is_not_there_is_given_up(make_run: MakeRun) -> None:
    run = make_run()
    (run.run_dir / "python").unlink()
    run.submit(*ONE, limit=1)
    assert run.to_end() == "FAILED"
    assert [(end["decision"], end["code"]) for end in run.events()] == [("give_up", 127)]


def test_files_of_another_life_of_that_name_say_nothing(make_run: MakeRun, cluster: Cluster) -> None:
    run = make_run(train='[ ! -e "$life_dir/stop" ] && leave 64')
    run.submit(*ONE, options=["--hold"])
    run.life_dir().mkdir(parents=True)
    for name, text in {"ended": "0\nnobody\n\n", "stop": "", "bad_nodes": "n1\tbroken\n"}.items():
        (run.life_dir() / name).write_text(text)
        os.utime(run.life_dir() / name, (0, 0))
    cluster.run(["scontrol", "release", str(run.job)])
    assert run.to_end() == "FAILED"
    assert [(end["decision"], end["code"]) for end in run.events()] == [("give_up", 64)]


# --- Nodes and the controller ---


def test_a_run_goes_on_without_a_node_that_died(make_run: MakeRun, cluster: Cluster) -> None:
    run = make_run(train='[ "$life" = 0 ] || leave 0; exec sleep 300')
    run.submit(*TWO_BY_TWO)
    run.wait_for_phase("train", ranks=4)
    cluster.crash("n2")
    # Slurm finds that out by itself too, after half a minute here and five in production.
    cluster.run(["scontrol", "update", "nodename=n2", "state=down", "reason=test"])
    assert run.to_end() == "COMPLETED"
    assert [start["nodes"] for start in run.events("start")] == ["n[1-2]", "n[1,3]"]
    assert run.decisions()[-1] == "done"


def test_a_life_does_not_end_the_next_one_that_slurm_has_begun(make_run: MakeRun, cluster: Cluster) -> None:
    # A node that is down for a moment: Slurm takes the job back, and the script of the life before is still there.
    run = make_run(train='trap "" TERM; [ "$life" = 0 ] || { sleep 5; leave 0; }; wait_for "$run_dir/never"')
    run.submit(*TWO_BY_TWO)
    run.wait_for_phase("train", ranks=4)
    cluster.run(["scontrol", "update", "nodename=n2", "state=down", "reason=test"])
    assert run.to_end() == "COMPLETED"
    assert cluster.job(run.job)["Restarts"] == "1"
    assert run.decisions()[-1] == "done"


def test_a_requeue_waits_for_the_controller(make_run: MakeRun, cluster: Cluster) -> None:
    # The controller goes once it knows that the step has ended: else the job is a minute in coming back.
    waits = (
        'scontrol() { until [ "$1" != requeue ] || [ -e "$run_dir/go" ]; do sleep 0.1; done; command scontrol "$@"; }'
    )
    run = make_run(train='[ "$life" = 0 ] || leave 0; leave 75 scheduler')
    run.submit(*ONE, set_up=waits)
    run.wait_for_phase("train")
    run.wait_until(
        lambda: f"{run.job}.0" not in cluster.run(["squeue", "-s", "-h", "-o", "%i"]).stdout, "the end of the step"
    )
    cluster.controller_stop()
    (run.run_dir / "go").touch()
    log = run.folder / f"log-{run.job}.txt"
    cluster.wait_for(lambda: "scontrol requeue: " in log.read_text(), 60, "a requeue that fails")
    cluster.controller_start()
    assert run.to_end() == "COMPLETED"
    assert run.decisions() == ["requeue", "done"]


def test_a_job_that_may_not_be_requeued_submits_itself_again(make_run: MakeRun, cluster: Cluster) -> None:
    again = '[ "$SLURM_JOB_ID" = "$(cat "$run_dir/first")" ] || leave 0; wait_for "$life_dir/stop"; leave 75 scheduler'
    run = make_run(train=again)
    first = run.submit(*TWO_BY_TWO, "--no-requeue", options=["--hold"])
    (run.run_dir / "first").write_text(str(first))
    cluster.run(["scontrol", "release", str(first)])
    run.wait_for_phase("train", ranks=4)
    run.warn()
    assert run.to_end() == "COMPLETED"
    [resubmit] = run.events("resubmit")
    assert (resubmit["life"], run.decisions()[0]) == (f"{first}.0", "resubmit")
    run.job = int(str(resubmit["job"]))
    assert run.to_end() == "COMPLETED"
    assert run.decisions() == ["resubmit", "done"]
    assert (run.environment("train", 2)["WORLD_SIZE"], run.environment("train", 2)["PYTHONPATH"].count("code")) == (
        "4",
        1,
    )


def test_a_chain_goes_on_with_its_next_job_where_requeue_is_forbidden(make_run: MakeRun, cluster: Cluster) -> None:
    run = make_run(
        train='[ "$SLURM_JOB_ID" = "$(cat "$run_dir/last")" ] && leave 0; wait_for "$life_dir/stop"; leave 75 scheduler'
    )
    first = run.submit(*ONE, "--no-requeue", options=["--hold"])
    last = run.submit(*ONE, "--no-requeue", options=[f"--dependency=afterany:{first}"])
    (run.run_dir / "last").write_text(str(last))
    run.job = first
    cluster.run(["scontrol", "release", str(first)])
    run.wait_for_phase("train")
    run.warn()
    assert run.to_end() == "COMPLETED"
    run.job = last
    assert run.to_end() == "COMPLETED"
    assert run.decisions() == ["resubmit", "done"]
    assert run.events("resubmit") == []


def test_a_bad_node_is_left_out_of_the_next_life(make_run: MakeRun, cluster: Cluster) -> None:
    broken = '[ "$SLURMD_NODENAME" != n2 ] || { printf "n2\\tno GPU\\n" >>"$life_dir/bad_nodes"; exit 1; }; sleep 1'
    run = make_run(health=broken)
    run.submit(*TWO_BY_TWO)
    assert run.to_end() == "COMPLETED"
    assert run.decisions() == ["requeue", "done"]
    assert [start["nodes"] for start in run.events("start")] == ["n[1-2]", "n[1,3]"]
    assert set((run.folder / "bad_nodes").read_text().splitlines()) == {"n2\tno GPU"}
    assert not (run.life_dir() / "given-train-0.argv").exists()


def test_bad_nodes_are_left_out_twice_and_no_more(make_run: MakeRun, cluster: Cluster) -> None:
    run = make_run(health='printf "%s\\tbroken\\n" "$SLURMD_NODENAME" >"$life_dir/bad_nodes"; exit 1')
    run.submit(*ONE, "--exclude=n3")
    run.wait_until(lambda: run.decisions() == ["requeue"], "the first life")
    run.wait_until(lambda: cluster.state(run.job) == "PENDING", "the requeue")
    assert cluster.job(run.job)["ExcNodeList"].split(",") == ["n3", "n1"]  # what the user left out stays out
    cluster.run(["scontrol", "update", f"jobid={run.job}", "ExcNodeList="])
    assert run.to_end() == "FAILED"
    assert run.decisions() == ["requeue", "requeue", "give_up"]
    assert "third time" in (run.folder / "gave_up").read_text()


# --- Job arrays ---


def test_tasks_of_an_array_have_their_own_runs_and_lives(make_run: MakeRun, cluster: Cluster, tmp_path: Path) -> None:
    # The task that Slurm knows by the number of the array is asked to stop: what it asks for must not befall the other one.
    runs = [make_run(f"run {index}", train=TWO_LIVES) for index in range(2)]
    sweep = make_run("sweep")
    write_fields(sweep.folder / "tasks", [str(run.run_dir) for run in runs])
    array = sweep.submit(*ONE, "--array=0-1", "--output=slurm/log-%A_%a.txt")
    for run in runs:
        run.wait_until(lambda run=run: list(run.folder.glob("lives/*.0/given-train-0.argv")), "both tasks")
        run.job = int(next(run.folder.glob("lives/*.0")).name.split(".")[0])
    last, other = sorted(runs, key=lambda run: run.job != array)
    assert last.job == array
    index = runs.index(last)
    cluster.run(["scancel", "--batch", "--signal=USR2", f"{array}_{index}"])
    cluster.wait_for(lambda: cluster.state(f"{array}_{index}") == "PENDING", 60, "the requeue")
    cluster.hurry(f"{array}_{index}")
    cluster.wait_for(lambda: last.decisions() == ["requeue", "done"], 60, "the second life")
    assert other.decisions() == []
    (other.life_dir() / "stop").touch()
    cluster.wait_for(lambda: other.decisions() == ["requeue"], 60, "the other task")
    cluster.wait_for(lambda: cluster.state(f"{array}_{1 - index}") == "PENDING", 60, "the requeue")
    cluster.hurry(f"{array}_{1 - index}")
    cluster.wait_for(lambda: other.decisions() == ["requeue", "done"], 60, "the second life")
    assert "life 1" in (sweep.folder / f"log-{array}_{index}.txt").read_text()
