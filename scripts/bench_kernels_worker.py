"""The process that measures for `muybridge bench kernels`: problems come in on stdin, messages in JSON go out on stdout.

It is apart from the command so that a kernel that hangs, or ruins its CUDA context, costs one measurement and not the rest.
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TextIO

import torch
import torch._dynamo
import torch._functorch.config
from torch import Tensor

from .bench_kernels_contestants import Contest, build_contest
from .bench_kernels_plan import Problem, plan

# Another process must take over: this one's CUDA context is lost.
EXIT_BROKEN = 3
# A measurement's calls take at least this long together, and there are at least this many of them.
MEASURE_MILLISECONDS = 100.0
LEAST_CALLS = 5


def main(argv: list[str]) -> int:
    """Answer requests {"problem": name, "skip": [[contestant, direction], ...]} until stdin ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", required=True)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    torch._functorch.config.donated_buffer = False  # compiled backward passes are run again and again
    # Compilers print to stdout what they please: messages get the real one, everything else goes to stderr.
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    send(channel, {"environment": describe(device)})
    problems = {problem.name: problem for problem in plan(quick=options.quick)}
    for line in sys.stdin:
        request = json.loads(line)
        skip = [tuple(entry) for entry in request["skip"]]
        run_problem(problems[request["problem"]], device, skip, channel)
        send(channel, {"done": request["problem"]})
    return 0


def send(channel: TextIO, message: dict[str, Any]) -> None:
    print(json.dumps(message), file=channel, flush=True)


def run_problem(problem: Problem, device: torch.device, skip: Sequence[tuple[str, ...]], channel: TextIO) -> None:
    """Measure every contestant of a problem on the same inputs; an exception is that contestant's result."""
    if device.type == "cuda":
        torch._dynamo.reset()  # after eight shapes, it would run FlexAttention uncompiled
        torch.cuda.empty_cache()
    try:
        contest = build_contest(problem, device)
    except Exception as error:
        send(channel, {"result": {"contestant": "all", "direction": "all", "error": _described(error)}})
        return
    for contestant, direction in problem.entries():
        if contestant not in contest.functions or (contestant, direction) in skip:
            continue
        send(channel, {"start": [contestant, direction]})
        result: dict[str, Any] = {"contestant": contestant, "direction": direction, "chosen": contest.chosen}
        try:
            with contest.contexts.get(contestant, contextlib.nullcontext)():
                result |= measure(problem, contest, contestant, direction, device)
        except Exception as error:
            result["error"] = _described(error)
        send(channel, {"result": result})
        if device.type == "cuda":
            try:
                torch.cuda.synchronize()
            except RuntimeError:
                sys.exit(EXIT_BROKEN)
            torch.cuda.empty_cache()


def measure(
    problem: Problem, contest: Contest, contestant: str, direction: str, device: torch.device
) -> dict[str, Any]:
    """Milliseconds and what follows from them, the distance from the first contestant's answer, and the kernels that ran."""
    function = contest.functions[contestant]
    if direction == "backward":
        calls = [prepare_backward(function, inputs) for inputs in contest.inputs]
    else:
        calls = [partial(function, *inputs) for inputs in contest.inputs]
    answer = _tensors(calls[0]())
    found: dict[str, Any] = {}
    if direction in ("forward", "backward"):
        expected = contest.answers.setdefault(direction, [tensor.detach() for tensor in answer])
        found["difference"] = relative_difference(answer, expected)
    del answer
    if device.type == "cuda":
        found["kernels"] = kernel_names(calls[0])
        if contestant == "cudnn" and not any("cudnn" in name.lower() for name in found["kernels"]):
            raise RuntimeError(f"cuDNN was asked for, and these kernels ran: {found['kernels']}")
    found["milliseconds"] = milliseconds = time_calls(calls, device)
    if flops := problem.flops.get(direction):
        found["tflops"] = flops / milliseconds / 1e9
    if moved := problem.bytes.get(direction):
        found["terabytes"] = moved / milliseconds / 1e9
    return found


def prepare_backward(function: Callable[..., Any], inputs: Sequence[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """The backward pass alone, which can be run again and again."""
    outputs = _tensors(function(*inputs))
    leaves = [tensor for tensor in inputs if tensor.requires_grad]
    generator = torch.Generator(outputs[0].device).manual_seed(1)
    grads = [
        # The same numbers whatever the layout, and laid out as the output is.
        torch.empty_like(x).copy_(torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator))
        for x in outputs
    ]
    return lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True)


def time_calls(calls: Sequence[Callable[[], Any]], device: torch.device) -> float:
    """Median milliseconds of one call, with the inputs taken in turn."""
    turn = 0

    def call() -> None:
        nonlocal turn
        turn += 1
        calls[turn % len(calls)]()

    if device.type == "cuda":
        from triton.testing import do_bench

        call()
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        torch.cuda.synchronize()
        once = 1e3 * (time.perf_counter() - began)
        return float(do_bench(call, warmup=25, rep=max(MEASURE_MILLISECONDS, LEAST_CALLS * once), return_mode="median"))
    seconds = []
    for _ in range(LEAST_CALLS):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return 1e3 * statistics.median(seconds)


def kernel_names(call: Callable[[], Any]) -> list[str]:
    """The GPU kernels of one call, the longest first."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    kernels = [event for event in profiler.key_averages() if event.device_type == DeviceType.CUDA]
    kernels.sort(key=lambda event: -event.self_device_time_total)
    return [event.key[:120] for event in kernels[:5]]


def relative_difference(answer: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """||answer - expected|| / ||expected|| over all tensors together."""
    with torch.no_grad():
        error = sum(float((a.float() - b.float()).square().sum()) for a, b in zip(answer, expected, strict=True))
        norm = sum(float(b.float().square().sum()) for b in expected)
    return float((error / max(norm, 1e-30)) ** 0.5)


def describe(device: torch.device) -> dict[str, Any]:
    """The machine and the versions that a figure belongs to."""
    found: dict[str, Any] = {"device": "CPU", "torch": torch.__version__, "python": sys.version.split()[0]}
    if device.type == "cuda":
        import triton
        from triton import knobs

        found |= {
            "device": torch.cuda.get_device_name(),
            "triton": triton.__version__,
            "ptxas": knobs.nvidia.ptxas.version,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


def _tensors(value: Any) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else tuple(value or ())


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:2000]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
