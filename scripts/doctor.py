"""`muybridge doctor`: looks at a run's data before the run does.

What the settings take and waste, what the first clips look like with their captions, and how fast they can be read.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..data.config import Access, DataConfig
from ..data.loader import VideoLoader
from ..data.open_dataset import open_datasets
from ..data.plan import Plan
from ..data.storage import TransientReadError
from ..models.flops import count_tokens
from ..models.text import text_fingerprint
from ..models.vae.folder import vae_fingerprint
from ..train.config import TaskKind, TrainConfig, load_train_config
from .dataset_commands import console, positive, say
from .doctor_report import Facts, ReadingSpeed, collect_facts, misfit_notes, reading_speed
from .doctor_samples import CLIPS_A_STEP, SHEET_NAME, Samples, first_steps, read_samples
from .doctor_tables import bucket_table, dataset_table, histogram_table, waste_table

REPORT_NAME = "report.json"
_SHOWN_UNREADABLE = 10


def main(argv: list[str]) -> int:
    """Examine, print and write; returns the exit code. Raises ValueError for settings or a dataset that cannot be used."""
    parser = _parser()
    if not argv:
        parser.print_help()
        return 0
    options = parser.parse_intermixed_args(argv)
    config = load_train_config([*options.overrides, "dry_run=true"])  # the data can be looked at without the weights
    out = options.out or Path(config.run_dir) / "doctor"
    with _without_log_of_what_is_left_out():
        report = examine(
            config, out, processes=options.processes, steps=options.steps, step_seconds=options.step_seconds
        )
    (out / REPORT_NAME).write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    files = report["files"]
    say(f"Wrote {out / REPORT_NAME}" + (f", {SHEET_NAME} and {', '.join(files[1:])} beside it." if files else "."))
    for missing in config.missing_inputs():
        say(f"Still needed for the run: {missing}")
    program = "muybridge train"
    if options.processes > 1:
        program = f"torchrun --nproc-per-node {options.processes} -m muybridge.train"
    look = "look at the pictures, then " if files else ""
    say(f"Next: {look}{program} {shlex.join(options.overrides)}")
    return 0


def examine(
    config: TrainConfig, out: Path, *, processes: int, steps: int, step_seconds: float | None
) -> dict[str, Any]:
    """Prints the facts, reads the first `steps` steps of each bucket, writes their pictures to `out`; returns the report."""
    if config.data.access not in (Access.raw, Access.latents):
        raise ValueError(f"data.access={config.data.access} has no index to look at; make one with: muybridge index")
    # Training refuses a dataset of which most clips fit no bucket; here it is shown why.
    data, buckets = replace(config.training_data(), max_misfit_share=1.0), config.buckets(processes)
    opened = open_datasets(data, buckets)
    rows = [dataset.rows for dataset in opened]
    plan = Plan(buckets, rows, seed=config.seed, image_share=data.image_share)
    latent_shape = config.vae.resolved().latent_shape
    facts = collect_facts(
        data,
        opened,
        plan,
        global_batch=config.global_batch,
        processes=processes,
        cost=config.sample_cost,
        tokens=None
        if config.task is TaskKind.video_vae
        else lambda frames, height, width: count_tokens(config.model, latent_shape(frames, height, width)[1:]),
    )
    chosen = first_steps(plan, steps, last_step=config.steps)
    never = [facts.buckets[bucket].name for bucket, found in chosen.items() if not found]
    facts.notes += misfit_notes(opened, config.data.max_misfit_share)
    facts.notes += [f"{name}: none of the run's {config.steps} steps has this bucket" for name in never]
    validation = _validation_facts(config)
    _print_facts(facts, validation)
    _remove_earlier(out)
    loader = _build_loader(config, data)
    cores = max(1, data.workers) if data.access is Access.raw else 1  # latents are read by the training process
    try:
        samples = read_samples(loader, chosen, out, processes=cores, fps=data.fps)
    except TransientReadError as error:
        raise ValueError(f"the data cannot be read now: {error}") from error
    finally:
        loader.close()
    for place, speed in samples.clips_per_cpu_second.items():
        facts.buckets[place].clips_per_cpu_second = speed
    speed_facts = reading_speed(facts.buckets, cores=cores, step_seconds=step_seconds)
    console.print(waste_table(facts.buckets, cores=cores, step_seconds=step_seconds))
    _print_findings(facts, samples, speed_facts, is_cached=data.access is Access.latents)
    return {
        "settings": {
            "processes": processes,
            **{name: getattr(config, name) for name in ("seed", "steps", "global_batch", "micro_batch")},
            **{name: str(getattr(data, name)) for name in ("access", "decoder")},
            **{name: getattr(data, name) for name in ("workers", "prefetch", "fps", "caption_dropout")},
        },
        **asdict(facts),
        "validation": validation,
        "reading": asdict(speed_facts),
        "samples": samples.clips,
        **{name: getattr(samples, name) for name in ("unreadable", "fallback_decodes", "files")},
    }


def _build_loader(config: TrainConfig, data: DataConfig) -> VideoLoader:
    # Of each step only as many clips are read as can be shown. How many processes share a step does not change its clips.
    buckets = [
        replace(bucket, micro_batch=min(CLIPS_A_STEP, bucket.global_batch)) for bucket in config.buckets(world_size=1)
    ]
    has_models = data.access is Access.latents and config.vae.path and not config.missing_inputs()
    return VideoLoader(
        replace(data, prefetch=0),
        buckets=buckets,
        rank=0,
        world_size=max(-(-bucket.global_batch // bucket.micro_batch) for bucket in buckets),
        seed=config.seed,
        vae_fingerprint=vae_fingerprint(config.vae.path) if has_models and config.vae.path else None,
        text_fingerprint=text_fingerprint(config.text) if has_models else None,
        videos={name: source.path for name, source in config.data.sources().items()} if has_models else None,
    )


def _validation_facts(config: TrainConfig) -> dict[str, Any] | None:
    data = config.validation_data()
    if data is None or not config.validation.every_steps:
        return None
    [dataset] = open_datasets(replace(data, max_misfit_share=1.0), config.buckets(world_size=1))
    return {"path": data.path, "clips": len(dataset.index), "taken": len(dataset.rows)}


def _print_facts(facts: Facts, validation: dict[str, Any] | None) -> None:
    console.print(dataset_table(facts.datasets))
    if validation is not None:
        say(f"Validation: {validation['taken']} of the {validation['clips']} clips of {validation['path']} fit.")
    console.print(histogram_table(facts.histograms))
    console.print(bucket_table(facts.buckets))
    totals = facts.totals
    tokens = "" if totals.tokens_per_step is None else f", {totals.tokens_per_step:.0f} tokens"
    say(
        f"A step has {totals.samples_per_step:.1f} samples{tokens} on average; {totals.ghost_share:.1%} of the computation is for "
        f"ghosts, {totals.cut_share:.1%} of the pictures is cut off."
    )


def _print_findings(facts: Facts, samples: Samples, speed: ReadingSpeed, *, is_cached: bool) -> None:
    if is_cached:
        say("These are cached latents: there are no pictures to show. data.access=raw shows the videos.")
    if speed.mean_cpu_seconds is not None:
        who = "the training process" if is_cached else f"data.workers={speed.cores}"
        say(
            f"A process reads {speed.clips_per_step:.1f} clips a step on average, in {speed.mean_cpu_seconds:.3g} CPU seconds; "
            f"{speed.slowest_cpu_seconds:.3g} for {speed.slowest_bucket}."
        )
        if speed.step_seconds is None:
            say(
                f"So {who} can feed {speed.steps_per_second:.3g} steps/s at most; --step-seconds S says what steps of S seconds "
                "need."
            )
        else:
            enough = "is enough" if speed.is_enough else f"is too few: set data.workers={speed.workers_needed}"
            say(
                f"Steps of {speed.step_seconds:g} s need {speed.cores_needed:.2f} cores for each process: {who} {enough}."
            )
    if samples.fallback_decodes:
        say(f"{samples.fallback_decodes} clips were read by the other decoder, as data.decoder cannot read them.")
    for note in facts.notes:
        say(f"warning: {note}")
    for clip in samples.unreadable[:_SHOWN_UNREADABLE]:
        say(f"warning: cannot read clip {clip['key']} (step {clip['step']}): {clip['reason']}")
    if len(samples.unreadable) > _SHOWN_UNREADABLE:
        say(f"and {len(samples.unreadable) - _SHOWN_UNREADABLE} more clips that cannot be read, see the report")


def _remove_earlier(out: Path) -> None:
    # Pictures of other buckets would be taken for this run's. Only what an earlier report lists is ours.
    out.mkdir(parents=True, exist_ok=True)
    try:
        files = json.loads((out / REPORT_NAME).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    for name in [*files, REPORT_NAME]:
        if os.path.basename(name) == name:
            (out / name).unlink(missing_ok=True)


@contextmanager
def _without_log_of_what_is_left_out() -> Iterator[None]:
    # The tables say it in full.
    log = logging.getLogger(open_datasets.__module__)
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="muybridge doctor",
        description="Look at a run's data before the run: which clips are taken and why others are not, what a step of each bucket "
        "costs and wastes, what the first clips look like with their captions, and how fast they are read.",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="the settings of `muybridge train`, +experiment=NAME first"
    )
    parser.add_argument("--out", type=Path, help="folder for report.json and the pictures (default: doctor in run_dir)")
    parser.add_argument("--processes", type=positive, default=1, help="that the run will have (default: %(default)s)")
    parser.add_argument(
        "--steps",
        type=positive,
        default=2,
        help="steps of each bucket to read, the first of which is shown (default: %(default)s)",
    )
    parser.add_argument(
        "--step-seconds",
        type=_seconds,
        metavar="S",
        help="time of a training step, known or wished: says what reading must keep up with",
    )
    return parser


def _seconds(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} must be positive")
    return value
