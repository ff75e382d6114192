"""`muybridge quickstart`: the whole life of a model on one CPU, by the commands a user would type, one after the other.

A stage that ended well is not run again, so a stopped quickstart goes on where it was.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..data.synthetic import HELD_OUT, TRAINED, Combination, captions_of
from ..train.config import read_config
from ..train.generate import clip_name

DEFAULT_RUN_DIR = Path("runs/quickstart")  # as in configs/experiment/quickstart*.yaml
PROMPTS = 48


@dataclass(frozen=True)
class Stage:
    """One step of the quickstart: what a user would say of it, and the command that does it."""

    name: str
    summary: str
    # Of `muybridge`, the verb first.
    arguments: list[str]
    # Of a command that does not write over what is there.
    output: Path | None = None

    def command(self, processes: int) -> tuple[list[str], str]:
        """The command for this machine, as a program's arguments and as a user types it."""
        verb, *rest = self.arguments
        if verb != "train" or processes == 1:
            return [
                sys.executable,
                "-m",
                "muybridge.scripts.cli",
                *self.arguments,
            ], f"muybridge {' '.join(self.arguments)}"
        launch = ["--standalone", "--nproc-per-node", str(processes), "-m", "muybridge.train", *rest]
        return [sys.executable, "-m", "torch.distributed.run", *launch], f"torchrun {' '.join(launch)}"


def main(argv: list[str]) -> int:
    """Run what is left to do and write report.json; returns the first failing command's exit code."""
    parser = argparse.ArgumentParser(
        prog="muybridge quickstart",
        description="Prepare data, train a video VAE and a diffusion transformer, and generate videos, in minutes on a CPU.",
    )
    parser.add_argument("--run-dir", type=Path, default=DEFAULT_RUN_DIR, help="where everything goes (%(default)s)")
    parser.add_argument(
        "--smoke", action="store_true", help="a few steps of everything: checks an installation, learns nothing"
    )
    options = parser.parse_args(argv)
    run_dir: Path = options.run_dir
    stages = build_stages(run_dir, smoke=options.smoke)
    done_path = run_dir / "stages.json"
    done = json.loads(done_path.read_text()) if done_path.exists() else {}
    for stage in stages:
        if stage.name in done and done[stage.name]["arguments"] != stage.arguments:
            raise ValueError(
                f"--run-dir={run_dir} holds a quickstart with other settings ({stage.name} ran as: "
                f"{' '.join(done[stage.name]['arguments'])}); remove it or choose another folder"
            )
    if not done and (
        foreign := [stage.output for stage in stages if stage.output is not None and stage.output.exists()]
    ):
        raise ValueError(
            f"--run-dir={run_dir} holds {foreign[0].name}/, which no quickstart made; choose another folder"
        )
    run_dir.mkdir(parents=True, exist_ok=True)
    write_prompts(run_dir, PROMPTS if not options.smoke else 8)
    processes = training_processes()
    # One thread a process: two processes of one thread share two cores far better than one of two, above all where other
    # programs run, since threads meet after every operation and processes once a step.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    console = Console(highlight=False)
    for number, stage in enumerate(stages, start=1):
        console.rule(f"[bold]{number}/{len(stages)} {stage.summary}")
        if stage.name in done:
            console.print(f"done before, in {done[stage.name]['seconds']:.0f} s")
            continue
        command, shown = stage.command(processes)
        console.print(f"$ {shown}", style="cyan", markup=False)  # a list of prompts looks like rich's markup
        if stage.output is not None and stage.output.exists():
            shutil.rmtree(stage.output)  # the stage was stopped before it was noted down
        began = time.monotonic()
        code = subprocess.run(command, check=False, env=environment).returncode
        if code != 0:
            print(
                f"muybridge: {stage.name} ended with code {code}; the same command goes on from here", file=sys.stderr
            )
            return code
        done[stage.name] = {"seconds": round(time.monotonic() - began, 1), "arguments": stage.arguments}
        done_path.write_text(json.dumps(done, indent=1))
    report = write_report(run_dir, {stage.name: done[stage.name]["seconds"] for stage in stages})
    print_report(report, console)
    console.print(f"muybridge: wrote {run_dir}/report.json, loss.png, vae_reconstruction.mp4, samples/ and pipeline/")
    console.print(f"next: open {run_dir}/samples/contact_sheet.png, or write your own prompts.txt and run")
    console.print(f"      muybridge sample run={run_dir} prompts=prompts.txt out={run_dir}/mine")
    return 0


def training_processes() -> int:
    """Processes that train: one for each GPU, or two on a CPU with two cores or more."""
    import torch

    if torch.cuda.is_available():
        return min(2, torch.cuda.device_count())
    return min(2, os.cpu_count() or 1)


def build_stages(run_dir: Path, *, smoke: bool) -> list[Stage]:
    """The commands in order; `smoke` shortens each to a few steps."""
    shards, samples = run_dir / "shards", run_dir / "samples"
    clips, test_clips = ("48", "16") if smoke else ("2400", "120")
    short = ["steps=4", "validation.clips=16"] if smoke else []
    image, vae, dit = _places(run_dir)
    return [
        Stage(
            "prepare",
            "Render captioned clips as H.264 and pack them into WebDataset shards",
            ["prepare", "synthetic", str(shards), "--clips", clips, "--test-clips", test_clips],
        ),
        Stage(
            "train_vae_image",
            "Train the VAE on single frames",
            ["train", "+experiment=quickstart_vae_image", *image, *short],
        ),
        Stage("train_vae", "Train the VAE on clips", ["train", "+experiment=quickstart_vae", *vae, *short]),
        Stage("encode", "Encode every clip once into cached latents", ["encode", "+experiment=quickstart", *dit]),
        Stage(
            "train",
            "Train the diffusion transformer under DeepSpeed",
            ["train", "+experiment=quickstart", *dit, *short],
        ),
        Stage(
            "sample",
            "Generate videos from prompts",
            ["sample", f"run={run_dir}", f"prompts={run_dir / 'prompts.txt'}", *(["steps=2"] if smoke else [])],
        ),
        Stage(
            "evaluate",
            "Judge from the mp4s whether they show what was asked for",
            [
                "evaluate",
                *("--clips", str(samples), "--labels", str(run_dir / "prompt_labels.json")),
                *("--json", str(run_dir / "prompt_following.json")),
            ],
        ),
        Stage(
            "export",
            "Write the model as a folder that other tools open",
            ["export", f"run={run_dir}", f"out={run_dir / 'pipeline'}"],
            output=run_dir / "pipeline",
        ),
    ]


def _places(run_dir: Path) -> tuple[list[str], list[str], list[str]]:
    """Overrides that move the three experiments to another run directory than the one written in them."""
    if run_dir == DEFAULT_RUN_DIR:
        return [], [], []
    data = [f"data.path={run_dir}/shards/train", f"validation.path={run_dir}/shards/test"]
    return (
        [f"run_dir={run_dir}/vae_image", *data],
        [f"run_dir={run_dir}/vae", f"init_from={run_dir}/vae_image", *data],
        [f"run_dir={run_dir}", f"vae.path={run_dir}/vae/model/vae", f"data.latents={run_dir}/latents", *data],
    )


def write_prompts(run_dir: Path, count: int) -> None:
    """prompts.txt, half of it held-out combinations, and prompt_labels.json: what each generated file should show."""
    combinations = prompt_combinations(count)
    prompts, labels = [], {}
    for number, combination in enumerate(combinations):
        phrasings = captions_of(combination)
        # The second time round the held-out combinations are worded differently.
        prompts.append(phrasings[(number + number // (2 * len(HELD_OUT))) % len(phrasings)])
        labels[clip_name(number, prompts[-1])] = vars(combination)
    (run_dir / "prompts.txt").write_text("\n".join(prompts) + "\n")
    (run_dir / "prompt_labels.json").write_text(json.dumps(labels, indent=1))


def prompt_combinations(count: int) -> list[Combination]:
    """Held-out and trained combinations in turn."""
    # 7 has no factor in common with the number of trained combinations, so a few of them already span the colours.
    return [
        (TRAINED[7 * (number // 2) % len(TRAINED)] if number % 2 else HELD_OUT[number // 2 % len(HELD_OUT)])
        for number in range(count)
    ]


def write_report(run_dir: Path, seconds: dict[str, float]) -> dict[str, Any]:
    """report.json, loss.png and vae_reconstruction.mp4 from what the stages left."""
    from .pictures import loss_plot
    from .reconstruction import measure_reconstruction

    config = read_config(run_dir / "vae")
    held_out = replace(config.data, path=str(run_dir / "shards" / "test"), caption_dropout=0.0, workers=0)
    vae = measure_reconstruction(run_dir / "vae/model/vae", held_out, video=run_dir / "vae_reconstruction.mp4")
    followed = json.loads((run_dir / "prompt_following.json").read_text())
    loss_plot(
        {
            "VAE, images": run_dir / "vae_image/metrics.jsonl",
            "VAE, clips": run_dir / "vae/metrics.jsonl",
            "DiT": run_dir / "metrics.jsonl",
        },
        run_dir / "loss.png",
    )
    report = {
        **vae,
        "prompt_following": {
            **{name: followed["all"][name]["accuracy"] for name in ("colour", "direction", "shape")},
            "n": followed["all"]["n"],
            "splits": followed,
        },
        "seconds": {**seconds, "total": round(sum(seconds.values()), 1)},
    }
    (run_dir / "report.json").write_text(json.dumps(report, indent=1))
    return report


def print_report(report: dict[str, Any], console: Console) -> None:
    """The figures as a table."""
    table = Table(title="Quickstart")
    table.add_column("what")
    table.add_column("figure", justify="right")
    table.add_row("VAE PSNR, held-out clips", f"{report['vae_psnr_db']:.1f} dB")
    table.add_row("best constant colour", f"{report['constant_colour_psnr_db']:.1f} dB")
    followed = report["prompt_following"]
    for name in ("colour", "direction", "shape"):
        table.add_row(f"right {name}, of {followed['n']} prompts", f"{100 * followed[name]:.0f} %")
    for stage, spent in report["seconds"].items():
        table.add_row(f"{stage.replace('_', ' ')}", f"{spent:.0f} s")
    console.print(table)
