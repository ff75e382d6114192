"""The batch script of a run under a real Slurm, with bash for a trainer: what it makes of the end of a life."""

import os
from pathlib import Path

from muybridge.tests.slurm.cluster import Cluster
from muybridge.tests.slurm.stub_run import ONE, TWO_BY_TWO, TWO_LIVES, MakeRun, write_fields

# Ended by itself.


def test_the_next_job_of_a_chain_has_nothing_to_do_after_a_run_that_is_done(make_run: MakeRun) -> None:
    run = make_run()
    first = run.submit(*ONE)
    run.submit(*ONE, options=[f"--dependency=afterany:{first}"])
    assert run.to_end() == "COMPLETED"
    assert run.decisions() == ["done"]
    # Submitted again, with more steps say, it goes on, also where the clock of the login node is behind.
    (run.folder / "submission").write_text("second\n")
    os.utime(run.folder / "command", (0, 0))
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
    assert run.fruitless() == 1  # that of the last one, which is done
    assert "step-5" in (run.folder / "fruitless").read_text()


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
    assert run.fruitless() == 2
    assert "2 lives in a row without a new checkpoint" in (run.folder / "gave_up").read_text()
    first = run.job
    run.submit(*ONE, limit=2)  # the next of a chain
    assert run.to_end() == "FAILED"
    assert [start["job"] for start in run.events("start")] == [first] * 4


def test_lives_of_which_no_more_was_heard_are_counted(make_run: MakeRun) -> None:
    given_up, goes_on = make_run("given up"), make_run("goes on")
    for run in (given_up, goes_on):
        (run.folder / "fruitless").write_text("2\nstep-5\n")
        (run.run_dir / "checkpoints").mkdir()
    (given_up.run_dir / "checkpoints" / "LATEST").write_text("step-5\n")
    (goes_on.run_dir / "checkpoints" / "LATEST").write_text("step-9\n")
    for run in (given_up, goes_on):
        run.submit(*ONE, limit=2)
    assert (given_up.to_end(), given_up.decisions()) == ("FAILED", ["give_up"])
    assert "2 lives in a row without a new checkpoint" in (given_up.folder / "gave_up").read_text()
    assert not (given_up.life_dir() / "given-train-0.argv").exists()
    assert (goes_on.to_end(), goes_on.decisions()) == ("COMPLETED", ["done"])


def test_a_stop_that_nobody_asked_for_is_a_life_without_progress(make_run: MakeRun) -> None:
    # As srun stops all ranks where one has failed, and rank 0 takes that for Slurm's wish.
    run = make_run(train="leave 75 scheduler 'stopped by SIGTERM before the first step'")
    run.submit(*ONE, limit=2)
    assert run.to_end() == "FAILED"
    assert run.decisions() == ["requeue", "give_up"]


def test_a_python_that_is_not_there_is_given_up(make_run: MakeRun) -> None:
    run = make_run()
    (run.run_dir / "python").unlink()
    run.submit(*ONE)
    assert run.to_end() == "FAILED"
    assert [(end["decision"], end["code"]) for end in run.events()] == [("give_up", 127)]
    assert "could not be started on n1" in (run.folder / "gave_up").read_text()


def test_wrong_data_on_one_node_does_not_end_a_run_that_trained(make_run: MakeRun) -> None:
    run = make_run(train='[ "$life" != 0 ] || { save step-5; leave 75; }; [ "$life" = 1 ] && leave 64; leave 0')
    run.submit(*ONE)
    assert run.to_end() == "COMPLETED"
    assert run.decisions() == ["requeue", "requeue", "done"]


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


# Nodes and the controller.


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
    # The script of a node that was cut off may be there still. Here the second life takes itself for the first one.
    run = make_run(train="leave 75 scheduler")
    run.submit(*ONE, set_up="export SLURM_RESTART_COUNT=0")
    assert run.to_end() == "FAILED"
    assert run.decisions() == ["requeue", "slurm"]
    assert cluster.job(run.job)["Restarts"] == "1"


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
    # What the job's own environment says to sbatch is not for the job that it submits.
    set_up = "export SBATCH_TIMELIMIT=77"
    first = run.submit(*TWO_BY_TWO, "--no-requeue", set_up=set_up, options=["--hold"])
    (run.run_dir / "first").write_text(str(first))
    cluster.run(["scontrol", "release", str(first)])
    run.wait_for_phase("train", ranks=4)
    # Of another run, which is to begin when this one is done: it is not the next of a chain, and must not begin now.
    other = cluster.sbatch([f"--dependency=afterok:{first}", "--output=/dev/null", "--wrap=true"])
    run.warn()
    assert run.to_end() == "FAILED"
    assert cluster.state(other) == "PENDING"
    [resubmit] = run.events("resubmit")
    assert (resubmit["life"], run.decisions()[0]) == (f"{first}.0", "resubmit")
    run.job = int(str(resubmit["job"]))
    assert cluster.job(run.job)["TimeLimit"] != "01:17:00"
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
    assert run.to_end() == "FAILED"
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


def test_bad_nodes_between_checkpoints_are_no_row(make_run: MakeRun, cluster: Cluster) -> None:
    broken = '[ $((life % 2)) = 1 ] || { printf "n3\\tbroken\\n" >"$life_dir/bad_nodes"; exit 1; }'
    run = make_run(health=broken, train='[ "$life" -lt 7 ] || leave 0; save "step-$life"; leave 1')
    run.submit(*ONE)
    assert run.to_end(seconds=120) == "COMPLETED"
    assert run.decisions() == [*["requeue"] * 7, "done"]


def test_nodes_are_left_out_only_where_enough_are_left(make_run: MakeRun, cluster: Cluster) -> None:
    # A fault that is not the nodes' own would otherwise leave the job waiting for ever.
    run = make_run(
        health='[ "$life" != 0 ] || { printf "%s\\tbroken\\n" "$SLURMD_NODENAME" >>"$life_dir/bad_nodes"; exit 1; }'
    )
    run.submit(*TWO_BY_TWO)
    assert run.to_end() == "COMPLETED"
    assert run.decisions() == ["requeue", "done"]
    assert "too few are left" in str(run.events()[0]["why"])
    assert cluster.job(run.job)["ExcNodeList"] == "(null)"


# Job arrays.


def test_tasks_of_an_array_have_their_own_runs_and_lives(make_run: MakeRun, cluster: Cluster, tmp_path: Path) -> None:
    # The task that Slurm knows by the number of the array is asked to stop: what it asks for must not befall the other one.
    runs = [make_run(f"run {index}", train=TWO_LIVES) for index in range(2)]
    sweep = make_run("sweep")
    write_fields(sweep.folder / "tasks", [str(run.run_dir) for run in runs])
    array = sweep.submit(*ONE, "--array=0-1", "--output=slurm/log-%A_%a.txt")
    for run in runs:
        lives = run.folder / "lives"
        run.wait_until(lambda lives=lives: list(lives.glob("*.0/given-train-0.argv")), "both tasks")  # type: ignore[misc]
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
