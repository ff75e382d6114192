import importlib.util
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from muybridge.scripts import bench_encode, bench_step, bench_steps
from muybridge.scripts.bench_steps import LEFT_OUT, Results, measure, print_results, read_results, run_command
from muybridge.scripts.bench_steps_goals import Goal, goals
from muybridge.scripts.bench_steps_plan import GROUPS, LARGE, SIZES, Case, cases
from muybridge.train.activations import ActivationPolicy

GPU = {"gpu": "Some GPU 9000", "torch": "2", "cuda": "13"}


def measured(seconds: float, **more: Any) -> dict[str, Any]:
    """What `bench step` says of a step of so many seconds on an H200, of 500 TFLOP."""
    return {
        "state": "measured",
        "ok": True,
        "transformer": "as bench step calls it",
        "seconds_per_step": seconds,
        "seconds_of_update": 0.01,
        "host_seconds_of_forward_and_backward": 0.2,
        "tokens_per_second": 1000 / seconds,
        "model_tflop_per_step": 500.0,
        "tflops_per_second": 500 / seconds,
        "mfu": 500 / seconds / 989.4,
        "peak_memory_gib": 80.0,
        "peak_reserved_gib": 85.0,
        "memory_between_steps_gib": 30.0,
        "launches_per_step": 4000,
        "losses": [2.0] * 30,
        **more,
    }


def run_plan(tmp_path: Path, answers: dict[str, dict[str, Any]], plan: list[Case] | None = None) -> Results:
    """Results of the plan's cases with such answers, by name; those without one are not in the plan."""
    results: Results = {}
    chosen = [case for case in plan or cases() if case.name in answers]
    answer = iter([answers[case.name] for case in chosen])
    measure(chosen, tmp_path / "steps.json", GPU, results, seconds=1e6, run=lambda *_: next(answer))
    return results


def verdict(results: Results, text: str) -> Goal:
    [found] = [goal for goal in goals(results) if goal.text.startswith(text)]
    return found


def test_every_size_has_every_policy_and_every_peer_and_the_most_telling_come_first() -> None:
    plan = cases()
    assert len({case.name for case in plan}) == len(plan)
    assert {case.group for case in plan} == set(GROUPS)
    steps = [case for case in plan if case.group == "steps"]
    policies = {policy.name for policy in ActivationPolicy} - {"auto"}
    for size in SIZES:
        here = [case for case in steps if case.size == size]
        ours = {(case.policy, case.compiled) for case in here if case.transformer == "ours"}
        assert ours == {(policy, compiled) for policy in policies for compiled in (True, False)}
        assert {case.transformer for case in here} - {"ours"} == {peer.name for peer in bench_step.Peer}
    for size in LARGE:  # what decides the goals, within one machine's first minutes
        first = [(case.transformer, case.policy) for case in plan[:8] if case.size == size]
        assert first == [("ours", "selective"), ("default", "block"), ("cudnn", "block"), ("ours", "block")]


def telling_cases() -> list[Case]:
    """Those with an argument that none before them has."""
    seen: set[str] = set()
    found = []
    for case in cases():
        if not seen.issuperset(case.arguments()):
            found.append(case)
            seen.update(case.arguments())
    return found


@pytest.mark.parametrize("case", telling_cases(), ids=lambda case: case.name)
def test_each_case_is_a_command_that_is_understood(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to where something would be built."""
    seen: dict[str, Any] = {}

    def see(config: Any, **options: Any) -> None:
        seen.update(options, config=config)
        raise SystemExit

    kind, *rest = case.arguments()
    if case.group == "fp8" and importlib.util.find_spec("torchao") is None:
        pytest.skip("torchao (the extra `fp8`) is not installed")
    if case.group == "encode":
        assert (kind, rest) == ("encode", [])
        return
    monkeypatch.setattr(bench_step, "time_steps", see)
    with pytest.raises(SystemExit):
        bench_step.main(rest)
    assert kind == "step"
    config = seen["config"]
    assert config.activations.policy.name == case.policy
    assert config.micro_batch == config.global_batch == int(case.size.partition("=")[2])
    assert (config.data.frames, config.data.height) == ((81, 480) if "480p" in case.size else (17, 256))
    assert (None if case.transformer == "ours" else case.transformer) == (seen["peer"] and seen["peer"].name)
    assert seen["optimizer"].name == case.optimizer
    assert config.compile.enabled == case.compiled


def test_a_command_leaves_out_what_an_earlier_one_measured(tmp_path: Path) -> None:
    plan = cases()[:3]
    asked: list[list[str]] = []

    def run(arguments: list[str], seconds: float) -> dict[str, Any]:
        asked.append(arguments)
        if len(asked) == 2:
            return {"state": "failed", "summary": "exit code 1", "output": "why"}
        return {"state": "measured", "ok": False, "summary": "out of memory"} if len(asked) == 3 else measured(1.0)

    path, results = read_results(tmp_path, GPU)
    measure(plan, path, GPU, results, seconds=1e6, run=run)
    assert asked == [case.arguments() for case in plan]
    path, results = read_results(tmp_path, GPU)
    assert [results[case.name]["state"] for case in plan] == ["measured", "failed", "measured"]
    measure(plan, path, GPU, results, seconds=1e6, run=run)
    assert asked[3:] == [plan[1].arguments()]  # what failed is tried again; what has no memory will have none
    measure(plan, path, GPU, results, seconds=1e6, run=run, again=True)
    assert len(asked) == 7
    assert read_results(tmp_path, {**GPU, "torch": "3"})[1] == {}
    assert {goal["state"] for goal in json.loads(path.read_text())["goals"]} <= {"met", "not met", "not measured"}


def test_no_case_is_begun_or_blamed_where_the_time_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, now, limits = cases()[:4], [0.0], []

    def run(arguments: list[str], seconds: float) -> dict[str, Any]:
        limits.append(seconds)
        now[0] += min(seconds, 200.0)
        return measured(1.0) if seconds >= 200 else {"state": "stopped", "summary": "stopped after 100 s"}

    monkeypatch.setattr(bench_steps, "time", SimpleNamespace(monotonic=lambda: now[0]))
    results: Results = {}
    measure(plan, tmp_path / "steps.json", GPU, results, seconds=500.0, run=run)
    assert limits == [240.0, 240.0, 100.0]
    assert [results[case.name]["state"] for case in plan] == ["measured", "measured", LEFT_OUT, LEFT_OUT]


def test_a_process_that_hangs_or_dies_is_recorded(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    # The child holds the pipe open: only ending it, too, lets the command end.
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    assert run_command([sys.executable, "-c", child], figures, 1.0)["state"] == "stopped"
    died = run_command([sys.executable, "-c", "print('why'); raise SystemExit(3)"], figures, 60.0)
    assert died == {"state": "failed", "summary": "exit code 3", "output": "why"}
    wrote = f"import pathlib; pathlib.Path({str(figures)!r}).write_text('{{\"ok\": false}}'); raise SystemExit(78)"
    assert run_command([sys.executable, "-c", wrote], figures, 60.0) == {"state": "measured", "ok": False}


def test_goals_are_met_or_not_or_not_measured(tmp_path: Path) -> None:
    assert {goal.state for goal in goals({})} == {"not measured"}
    size = "480p B=1, "
    answers = {
        size + "ours compiled, selective": measured(0.9, predicted_activations_gib=48.0),
        size + "ours compiled, block": measured(1.2, peak_memory_gib=45.0, predicted_activations_gib=10.0),
        size + "ours compiled, none": {"state": "measured", "ok": False, "summary": "out of memory"},
        size + "diffusers default, block": measured(2.0, peak_memory_gib=50.0),
        size + "diffusers cudnn, block": measured(0.95, peak_memory_gib=44.0),
        # Another arithmetic is no answer to the question.
        size + "ours compiled, selective, fp8.recipe=tensorwise": measured(0.1),
    }
    results = run_plan(tmp_path, answers)
    mfu = verdict(results, size[:-2] + ": MFU")
    assert (mfu.state, mfu.found) == ("met", "56.2 % (selective)")
    assert mfu.limit == "0.633 s at 790 TFLOP/s, of which this is 70.3 %"
    assert verdict(results, "480p B=1: 2.0 times").found == "2.22 times"
    assert verdict(results, "480p B=1: 1.0 times") == Goal("480p B=1: 1.0 times diffusers' best", "met", "1.06 times")
    assert verdict(results, "480p B=1: less memory than diffusers with policy block").state == "not met"
    assert verdict(results, "480p B=1: less memory than diffusers with policy none").state == "not measured"
    memory = verdict(results, "480p B=1: no matmul")
    assert (memory.state, memory.found) == ("met", "85.9 GB (selective)")
    assert memory.limit.startswith("32.2 GB")
    assert verdict(results, "480p B=1: memory of policy selective").state == "met"  # 50 GiB
    assert verdict(results, "480p B=1: memory of policy block").limit == "+50 %"
    assert verdict(results, "256p B=64: MFU").state == "not measured"


@pytest.mark.parametrize(("last", "state"), [(2.001, "met"), (2.004, "not met"), (float("nan"), "not met")])
def test_loss_curves_must_agree(last: float, state: str, tmp_path: Path) -> None:
    case, peer = "256p B=16, ours eager, block", "256p B=16, diffusers default, block"
    answers = {case: measured(1.0, losses=[2.0] * 19 + [last, 9.0]), peer: measured(1.0)}
    assert verdict(run_plan(tmp_path, answers), "256p B=16: 20 losses").state == state


def test_everything_is_printed_side_by_side(tmp_path: Path) -> None:
    results = run_plan(
        tmp_path,
        {
            "480p B=1, ours compiled, selective": measured(1.0),
            "480p B=1, diffusers default, block": measured(2.5),
            "480p B=1, diffusers cudnn, none": {"state": "measured", "ok": False, "summary": "out of memory"},
            "encoders": {"state": "measured", "ok": True, "clips_per_second": {"VAE 1 x 9x9x9": 1.5}},
        },
    )
    out = io.StringIO()
    print_results(results, Console(file=out, width=200))
    ours, default, none = (line for line in out.getvalue().splitlines() if line.startswith("│") and ", " in line[:40])
    assert "0.5054 │" in ours  # MFU of 500 TFLOP in a second
    assert "2.5 │" in ours  # times diffusers' default
    assert " 1 │" in default
    assert "cudnn, none: out of memory" in none
    assert "VAE 1 x 9x9x9: 1.5 clips/s" in out.getvalue()
    assert "not measured" in out.getvalue()


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_steps.main([]) == 1
    assert "no CUDA GPU" in capsys.readouterr().err
    assert bench_steps.main(["--list", "--only", "optimizer"]) == 0
    assert "256p B=1, ours eager, none, torch_fused" in capsys.readouterr().out.splitlines()


def test_encoders_are_timed_and_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_encode, "TEXT_TOKENS", 8)
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if it were not installed
    out = tmp_path / "encode.json"
    assert bench_encode.main(["--quick", "--repeats", "1", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["clips_per_second"].keys() == {"VAE 2 x 5x16x16"}
    assert set(found["not_measured"]) == {"umT5 1 x 8 tokens", "umT5 8 x 8 tokens"}
