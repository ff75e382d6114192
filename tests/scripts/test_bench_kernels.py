"""The whole command on a CPU, where plain PyTorch competes with itself, and the parts that decide and report."""

import json
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from muybridge.scripts import bench_kernels, cli
from muybridge.scripts.bench_kernels import Worker, ask, measure_all
from muybridge.scripts.bench_kernels_contestants import (
    build_contest,
    build_tile_mask,
    by_pointers,
    flex_block_mask,
    math_attention,
    own_with_launches,
    specialized,
)
from muybridge.scripts.bench_kernels_plan import GROUPS, MASKS, Problem, allowed_pairs, documents, plan
from muybridge.scripts.bench_kernels_report import disagreements, goal_lines, suspicions
from muybridge.scripts.bench_kernels_worker import kernel_names, relative_difference

CPU = torch.device("cpu")
LENGTH = 1260  # of the quick masks


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["bench", "kernels"]) == 1
    assert "no CUDA GPU" in capsys.readouterr().err


def test_the_command_measures_compares_and_reports(muybridge: Callable[..., Any], tmp_path: Path) -> None:
    answer = muybridge("bench", "kernels", "--device", "cpu", "--quick", "--out", tmp_path)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    (path,) = tmp_path.glob("kernels-quick-cpu-*.json")
    record = json.loads(path.read_text())
    assert record["left_out"] == []
    found = {(r["group"], r["problem"], r["contestant"], r["direction"]) for r in record["results"]}
    for problem in plan(quick=True):
        for contestant, direction in problem.entries():
            if contestant in ("torch", "math", "eager", "own", "foreach"):
                assert (problem.group, problem.name, contestant, direction) in found
    assert all(result["milliseconds"] > 0 for result in record["results"])
    # fp32 on both sides.
    assert max(result.get("difference", 0.0) for result in record["results"]) < 1e-5
    assert "dispatch.TABLE takes the fastest backend in" in answer.stdout
    assert f"{len(found)} measurements, 0 failed" in answer.stdout


def test_plan_begins_with_ceilings_and_ends_with_the_longest() -> None:
    problems = plan()
    assert len({problem.name for problem in problems}) == len(problems)
    assert [problem.group == "ceilings" for problem in problems] == sorted(
        (problem.group == "ceilings" for problem in problems), reverse=True
    )
    rest = [problem for problem in problems if problem.group != "ceilings"]
    assert [p.seconds() for p in rest] == sorted(p.seconds() for p in rest)
    assert max(problem.sizes.get("length", 0) for problem in problems[-4:]) == 75_600
    assert {problem.group for problem in problems} == set(GROUPS)
    assert {problem.group for problem in plan(("masks",))} == {"masks"}


def test_arithmetic_of_the_long_clip() -> None:
    """4 L^2 D for the forward pass of 32 760 tokens at width 1536, 2.5 times that for the backward."""
    problem = next(p for p in plan() if p.name == "1 x 32760 tokens, 12 heads of 128")
    assert problem.flops["forward"] == 4 * 32_760**2 * 1536
    assert problem.flops["backward"] == 10 * 32_760**2 * 1536
    assert ("own_fused_dq", "backward") in problem.entries()
    assert ("own_fused_dq", "forward") not in problem.entries()


@pytest.mark.parametrize("mask", ["none", *MASKS])
def test_pairs_are_counted_as_the_mask_allows_them(mask: str) -> None:
    built = build_tile_mask(mask, LENGTH)
    assert allowed_pairs(mask, LENGTH) == (LENGTH**2 if built is None else int(built.dense().sum()))


@pytest.mark.parametrize("length", [32_760, 75_600])
def test_tile_maps_have_their_density(length: int) -> None:
    assert sum(documents(length)) == length
    for percent in (10, 20):
        built = build_tile_mask(f"tiles_{percent}", length)
        assert built is not None
        assert built.density == pytest.approx(percent / 100, abs=0.003)


@pytest.mark.parametrize("mask", MASKS)
def test_flex_attention_gets_the_same_mask(mask: str) -> None:
    built = build_tile_mask(mask, LENGTH)
    assert built is not None
    flex = flex_block_mask(mask, LENGTH, built, CPU)
    dense = built.dense()[0]
    index = torch.arange(LENGTH)
    zero = torch.zeros((), dtype=torch.long)
    assert torch.equal(flex.mask_mod(zero, zero, index[:, None], index[None, :]), dense)
    # Whatever is allowed lies in a listed tile, and a tile listed as full is allowed altogether.
    padded = F.pad(dense, (0, -LENGTH % 128, 0, -LENGTH % 128))
    tiles = padded.unflatten(0, (-1, 128)).unflatten(2, (-1, 128)).sum((1, 3))  # allowed pairs of each tile
    listed = flex.to_dense()[0, 0].bool()
    assert not (tiles > 0)[~listed].any()
    for i, (count, row) in enumerate(zip(flex.full_kv_num_blocks[0, 0], flex.full_kv_indices[0, 0], strict=True)):
        rows = min(128, LENGTH - 128 * i)
        assert (tiles[i, row[:count].long()] == 128 * rows).all()
    lists = torch.cat([flex.full_kv_num_blocks, flex.kv_num_blocks], 1)[0].sum(0)
    assert torch.equal(lists, built.key_counts[0, :, 1])


@pytest.mark.parametrize("mask", ["none", "packed"])
def test_flex_attention_agrees(mask: str) -> None:
    length = 280
    q, k, v = (torch.randn(1, 1, length, 16) for _ in range(3))
    built = build_tile_mask(mask, length)
    from torch.nn.attention.flex_attention import flex_attention

    block_mask = None if built is None else flex_block_mask(mask, length, built, CPU)
    expected = math_attention(q, k, v, mask=built)
    torch.testing.assert_close(flex_attention(q, k, v, block_mask=block_mask), expected)


@pytest.mark.parametrize("problem", plan(("pointwise",), quick=True), ids=lambda problem: problem.kind)
def test_the_plain_pointwise_functions_compile_in_one_graph(problem: Problem) -> None:
    torch._dynamo.reset()
    contest = build_contest(problem, CPU)
    compiled = torch.compile(contest.functions["eager"], backend="aot_eager", fullgraph=True, dynamic=False)
    outputs = [f(*contest.inputs[0]) for f in (compiled, contest.functions["eager"])]
    ours, plain = ((x,) if isinstance(x, torch.Tensor) else tuple(x) for x in outputs)
    assert relative_difference(ours, plain) < 1e-6


def test_the_difference_is_relative_to_the_first_answer() -> None:
    a, b = torch.ones(4), torch.tensor([1.0, 1.0, 1.0, 2.0])
    assert relative_difference([a], [a]) == 0
    assert relative_difference([b], [a]) == pytest.approx(0.5)


def test_variants_change_the_launches_and_put_them_back() -> None:
    pytest.importorskip("triton", reason="Triton has no build for this platform")
    from muybridge.kernels import attention_backward_launches, attention_forward

    tables = (attention_forward.HOPPER_FORWARD, attention_backward_launches.HOPPER_GRAD_QUERY)
    before = [dict(table) for table in tables]
    with own_with_launches(by_pointers):
        assert not any(launch.descriptors for table in tables for launch in table.values())
    with own_with_launches(specialized):
        assert attention_forward.HOPPER_FORWARD[128].warp_specialize
        assert tables[1] == before[1]
    assert [dict(table) for table in tables] == before
    assert any(launch.descriptors for launch in before[0].values())


def fake_worker(tmp_path: Path, body: str, *, patience: float = 20.0) -> Worker:
    """A worker whose answer to a request is `body`, run with `request`, `say` and `run`, the number of its process."""
    script = tmp_path / "worker.py"
    script.write_text(
        f"""
import json, os, pathlib, sys, time
count = pathlib.Path({str(tmp_path)!r}) / "runs"
run = int(count.read_text()) + 1 if count.exists() else 1
count.write_text(str(run))
def say(**message):
    print(json.dumps(message), flush=True)
def result(who):
    say(start=[who, "forward"])
    say(result={{"contestant": who, "direction": "forward", "milliseconds": 1.0}})
say(environment={{"device": "Fake"}})
for line in sys.stdin:
    request = json.loads(line)
    left = [who for who in ("a", "b", "c") if [who, "forward"] not in request["skip"]]
{body}
    say(done=request["problem"])
"""
    )
    return Worker([sys.executable, str(script)], patience=patience)


PROBLEM = Problem("attention", "small", "attention", {"length": 1, "head_width": 64}, ("a", "b", "c"), ("forward",))


def outcomes(worker: Worker, problem: Problem = PROBLEM) -> dict[str, str]:
    try:
        return {result["contestant"]: result.get("error", "ok") for result in ask(problem, worker)}
    finally:
        worker.stop()


def test_a_worker_that_dies_loses_one_measurement(tmp_path: Path) -> None:
    body = """
    for who in left:
        if who == "b":
            say(start=["b", "forward"])
            os._exit(5)
        result(who)
"""
    found = outcomes(fake_worker(tmp_path, body))
    assert found == {"a": "ok", "b": "the measuring process ended with exit code 5", "c": "ok"}


def test_a_worker_that_hangs_loses_one_measurement(tmp_path: Path) -> None:
    body = """
    for who in left:
        if who == "b":
            say(start=["b", "forward"])
            time.sleep(600)
        result(who)
"""
    found = outcomes(fake_worker(tmp_path, body, patience=3.0))
    assert (found["a"], found["c"]) == ("ok", "ok")
    assert "nothing came for 3 s" in found["b"]


def test_a_worker_whose_context_is_lost_is_replaced_after_the_result(tmp_path: Path) -> None:
    body = """
    for who in left:
        result(who)
        if who != "c":
            sys.exit(3)
"""
    assert outcomes(fake_worker(tmp_path, body)) == {"a": "ok", "b": "ok", "c": "ok"}


def test_inputs_that_cannot_be_built_fail_the_problem_once(tmp_path: Path) -> None:
    assert outcomes(fake_worker(tmp_path, "    sys.exit(4)")) == {"all": "the measuring process ended with exit code 4"}


def test_what_does_not_fit_the_time_is_left_out_and_named(tmp_path: Path) -> None:
    worker = fake_worker(tmp_path, "    [result(who) for who in left]")
    large = Problem("attention", "large", "attention", {}, ("a",), ("forward",), {"forward": 1e18})
    try:
        record, path = measure_all([PROBLEM, large], worker, tmp_path / "out", seconds=60.0, quick=False)
    finally:
        worker.stop()
    assert record["left_out"] == ["large"]
    assert [result["problem"] for result in record["results"]] == ["small"] * 3
    assert json.loads(path.read_text()) == record
    assert path.name.startswith("kernels-fake-2")


def test_a_later_command_of_the_day_adds_to_the_file_and_replaces_what_it_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    day = SimpleNamespace(now=lambda zone: datetime(2026, 1, 2, tzinfo=zone))
    monkeypatch.setattr(bench_kernels, "datetime", day)
    other = Problem("masks", "other", "attention", {}, ("a",), ("forward",), mask="packed")
    for problems in ([PROBLEM], [other], [PROBLEM]):
        worker = fake_worker(tmp_path, "    [result(who) for who in left]")
        try:
            record, _ = measure_all(problems, worker, tmp_path / "out", seconds=60.0, quick=False)
        finally:
            worker.stop()
    assert sorted(result["problem"] for result in record["results"]) == ["other"] * 3 + ["small"] * 3


def result(group: str, contestant: str, direction: str, milliseconds: float, **more: Any) -> dict[str, Any]:
    sizes = {"batch": 1, "length": 32_760, "head_width": 128, "mask": "none"}
    base = {"group": group, "problem": f"{group} problem", "contestant": contestant, "direction": direction}
    return {**base, **sizes, "milliseconds": milliseconds, **more}


def test_goals_are_compared_with_ratios_of_one_run() -> None:
    results = [
        result("ceilings", "torch", "run", 2.0, terabytes=4.0),
        result("attention", "cudnn", "forward", 2.0),
        result("attention", "own", "forward", 2.5, tflops=500.0),
        result("attention", "cudnn", "backward", 5.0),
        result("attention", "own", "backward", 10.0),
        result("masks", "own", "forward", 1.0, mask="tiles_10", tflops=400.0),
        result("pointwise", "own", "forward", 1.0, terabytes=3.6),
    ]
    lines = goal_lines(results)
    assert (
        "goal 0.78 x cuDNN's speed, forward, head width 128: reached, 0.80 x at worst of 1 (attention problem)" in lines
    )
    assert any(
        line.startswith("goal 0.55 x cuDNN's speed, deterministic backward, 128: MISSED, 0.50 x") for line in lines
    )
    assert any("our dense rate, tiles at 10 and 20 %, forward: MISSED, 0.80 x" in line for line in lines)
    assert any("copy bandwidth, pointwise forward: reached, 0.90 x" in line for line in lines)
    assert len(lines) == 4  # what was not measured is not judged


@pytest.mark.parametrize(
    ("own", "expected"),
    [(4.0, "own is 1.25 times as fast"), (4.9, "in 1 of 1 measured"), (6.0, "in 1 of 1 measured")],
)
def test_a_wrong_line_of_the_dispatch_table_is_named(own: float, expected: str) -> None:
    results = [
        result("attention", name, direction, milliseconds / 2, chosen="cudnn")
        for name, milliseconds in (("cudnn", 5.0), ("own", own))
        for direction in ("forward", "backward")
    ]
    lines = disagreements(results)
    assert expected in lines[0]
    if "times" in expected:
        assert 'Rule("attention", Backend.cudnn, ...)' in lines[0]


def test_a_failed_choice_of_the_dispatch_table_is_named() -> None:
    results = [
        result("attention", name, direction, 1.0, chosen="own")
        for name in ("math", "cudnn", "own")
        for direction in ("forward", "backward")
    ]
    del results[-1]["milliseconds"]
    results[-1]["error"] = "OutOfMemoryError: too much"
    assert "that backend failed, cudnn ran" in disagreements(results)[0]


def test_answers_that_differ_are_called_out() -> None:
    near, far = (
        result("masks", "own", "forward", 1.0, difference=0.004),
        result("masks", "own", "backward", 1.0, difference=0.3),
    )
    broken = result("masks", "own", "step", 1.0, difference=float("nan"))
    lines = suspicions([near, far, broken])
    assert len(lines) == 2
    assert "own backward differs by 3.0e-01" in lines[0]


def test_a_log_line_says_what_was_measured() -> None:
    line = bench_kernels.describe(result("masks", "own", "forward", 1.5, tflops=400.0, difference=0.004))
    assert line == "masks problem: own forward: 1.5 ms, 400 TFLOP/s, differs by 4.0e-03"
    failed = {**result("masks", "own", "forward", 0), "error": "ValueError: first\nsecond"}
    assert bench_kernels.describe(failed) == "masks problem: own forward: FAILED: ValueError: first"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_kernels_are_named() -> None:
    a = torch.randn(64, 64, device="cuda")
    assert kernel_names(lambda: a @ a)
