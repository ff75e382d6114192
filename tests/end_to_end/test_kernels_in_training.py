"""Training with our kernels and with plain PyTorch: one setting apart, the same losses. The kernels run in Triton's interpreter."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has no build for this platform")

STEPS = 4
PATTERNS = ("full", "block_causal")


@pytest.fixture(scope="module")
def losses(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_run: list[str],
    launcher: Callable[[int], list[str]],
    command_env: dict[str, str],
) -> dict[str, list[float]]:
    """Training losses of four steps, by kernels and pattern."""
    root = tmp_path_factory.mktemp("kernels")
    # Three frames of four tokens, since a step of 96 tokens takes 16 seconds in the interpreter. In fp32, since the interpreter
    # truncates where a GPU rounds to bf16.
    common = [*tiny_run, f"steps={STEPS}", "global_batch=1", "micro_batch=1", "model.patch_size=[1,4,4]"]
    common += ["optimizer.lr=1e-1", "optimizer.warmup_steps=0", "deepspeed=zero1", "deepspeed.precision=fp32"]
    common += ["optimizer.eps=1e-4"]  # Adam divides rounding in a gradient near 0 by that gradient
    plan = {
        f"{kernels} {pattern}": [
            *common,
            f"kernels={kernels}",
            f"model.self_attention.pattern={pattern}",
            f"run_dir={root / f'{kernels}-{pattern}'}",
        ]
        for pattern in PATTERNS
        for kernels in ("reference", "fused")
    }
    (root / "plan.json").write_text(json.dumps(plan))
    program = [str(Path(__file__).with_name("train_program.py")), str(root / "plan.json"), str(root / "found.json")]
    answer = subprocess.run(
        [*launcher(1), *program],
        capture_output=True,
        text=True,
        check=False,
        env={**command_env, "TRITON_INTERPRET": "1"},
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "): own" in answer.stderr, "the interpreter did not run our kernels"
    found = {}
    for name in plan:
        rows = [json.loads(line) for line in (root / name.replace(" ", "-") / "metrics.jsonl").read_text().splitlines()]
        found[name] = [row["loss"] for row in rows if "loss" in row]
    return found


@pytest.mark.parametrize("pattern", PATTERNS)
def test_fused_kernels_give_the_loss_curve_of_the_reference(pattern: str, losses: dict[str, list[float]]) -> None:
    reference, fused = losses[f"reference {pattern}"], losses[f"fused {pattern}"]
    assert len(reference) == STEPS
    assert fused == pytest.approx(reference, rel=1e-5)


def test_the_curves_are_of_runs_that_learn_and_differ_by_pattern(losses: dict[str, list[float]]) -> None:
    full, causal = losses["fused full"], losses["fused block_causal"]
    assert full[-1] != pytest.approx(full[0], rel=1e-2)
    assert full[0] == pytest.approx(causal[0], rel=2e-5), "a fresh model's velocity is 0, whatever its attention"
    assert full[-1] != pytest.approx(causal[-1], rel=1e-2)
