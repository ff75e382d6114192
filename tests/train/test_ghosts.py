"""A step whose samples do not fill all places learns what the samples say, on any number of processes."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from muybridge.data.batch import VideoBatch
from muybridge.data.plan import Plan, Slot
from muybridge.tests.data.plan_cases import Case, all_ranks, cases
from muybridge.train.trainer import Trainer


def batch_of(plan: Plan, slots: list[Slot]) -> VideoBatch:
    """Latents that differ between all rows, and zeros for ghosts."""
    real = torch.tensor([not slot.is_ghost for slot in slots])
    numbers = torch.tensor([[slot.dataset, slot.row, slot.pass_number, 1.0] for slot in slots], dtype=torch.float64)
    return VideoBatch(
        step=slots[0].step,
        step_samples=plan.buckets[slots[0].bucket].global_batch,
        slots=torch.tensor([slot.position for slot in slots]),
        datasets=torch.tensor([slot.dataset for slot in slots]),
        rows=torch.tensor([slot.row for slot in slots]),
        weights=real.float(),
        keys=[""] * len(slots),
        captions=[""] * len(slots),
        latents=torch.where(real[:, None], torch.sin(numbers + torch.arange(4)), 0.0).reshape(-1, 4, 1, 1, 1).float(),
    )


def gradient(micro_batches: list[VideoBatch], world: int) -> torch.Tensor:
    """One rank's gradient of a small model after the trainer's own step."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))

    def losses(engine: Any, batch: VideoBatch) -> Any:
        total = torch.square(engine.model(batch.latents.flatten(1)) - 1.5).flatten()
        return SimpleNamespace(total=total, terms={}, noise_levels=None)

    def backward(loss: torch.Tensor, *, is_last: bool) -> None:
        loss.backward()

    def step(lr: float, accept: Any) -> Any:
        return SimpleNamespace(applied=True)

    def ignore(*_: Any, **__: Any) -> None: ...

    trainer: Any = SimpleNamespace(
        task=SimpleNamespace(device="cpu", losses=losses),
        engine=SimpleNamespace(model=model, backward=backward, step=step),
        window=SimpleNamespace(add=lambda *metrics: None),
        guard=SimpleNamespace(begin_step=ignore, add=ignore, accept=ignore, end_step=ignore),
        clock=SimpleNamespace(running=nullcontext),
        mesh=SimpleNamespace(sequence=SimpleNamespace(is_first=True)),
        step=0,
        world=world,
    )
    Trainer._optimizer_step(trainer, micro_batches, 0.1)
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@settings(max_examples=25, deadline=None)
@given(case=cases(), step=st.integers(0, 10**6))
def test_the_gradient_with_ghosts_is_that_of_the_whole_batch(case: Case, step: int) -> None:
    """P13; the same through DeepSpeed at every ZeRO stage is in tests/end_to_end."""
    plan = case.plan()
    whole = gradient([batch_of(plan, plan.slots(step))], 1)
    for world in (1, 2, 3, 4):
        ranks = [[batch_of(plan, group) for group in rank] for rank in all_ranks(plan, step, world)]
        mean = torch.stack([gradient(rank, world) for rank in ranks]).mean(0)  # as the engine puts them together
        torch.testing.assert_close(mean, whole, rtol=1e-6, atol=1e-6)
