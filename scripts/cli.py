"""The `muybridge` command: finds the verb, imports its module, and turns its outcome into an exit code.

Nothing heavy is imported here, so that help and mistyped verbs answer at once.
"""

import difflib
import importlib
import os
import sys
from dataclasses import dataclass

from .. import __version__
from ..redaction import redact_output
from ..train.exit_codes import ExitCode

EXIT_INTERRUPTED = 130  # 128 + SIGINT, what a shell reports


@dataclass(frozen=True)
class Verb:
    """A command: the module (relative to this package) whose `main(argv) -> exit code` runs it, and its line of help."""

    module: str
    summary: str


VERBS = {
    "prepare": Verb(".prepare", "turn videos and captions into WebDataset shards with an index"),
    "index": Verb(".index", "index WebDataset shards that are already there"),
    "encode": Verb(".encode", "cache a dataset's latents and text embeddings as shards"),
    "doctor": Verb(".doctor", "look at a run's data before the run: clips, captions, waste, speed"),
    "train": Verb("..train.__main__", "train a VAE or a diffusion transformer; run again to resume"),
    "simulate": Verb(".simulate", "act out the start of a run on thousands of processes, on this machine"),
    "plan": Verb(".plan", "say whether a run fits the GPUs, how fast it will be and what it will cost"),
    "submit": Verb("..slurm.submit", "queue a run, or a sweep of runs, as Slurm jobs"),
    "status": Verb("..slurm.status", "say where a run is: its job, its step, its lives, what to do next"),
    "cancel": Verb("..slurm.cancel", "stop a run's jobs for good, with a checkpoint"),
    "sync": Verb(".sync", "send the W&B files of a run without network to W&B"),
    "report": Verb(".report", "say what became of a run: its attempts, its losses, where its time went"),
    "import": Verb(".import_weights", "make a pipeline folder of public Wan weights, to train from or to sample"),
    "export": Verb(".export", "write a run's model for diffusers, ComfyUI and other tools"),
    "sample": Verb(".sample", "generate videos from prompts with a run or a pipeline folder"),
    "evaluate": Verb(".evaluate", "judge whether generated shapes follow their prompts"),
    "quickstart": Verb(".quickstart", "the whole life of a model in minutes: data, VAE, DiT, videos"),
    "bench": Verb(".bench", "measure the trainer, the loader, the plan and the kernels"),
}


def main(argv: list[str] | None = None) -> int:
    """Run `muybridge <verb> ...` and return the exit code.

    0 done, 64 a mistake in what was asked for, 75 requeue, 76 data budget, 77 diverged, 78 out of memory, 93 no progress;
    all but 64 come from the verbs. A ValueError is taken for the user's mistake and printed as one message without a
    traceback, which MUYBRIDGE_TRACEBACK=1 brings back.
    """
    argv = sys.argv[1:] if argv is None else argv
    redact_output()
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"muybridge {__version__}")
        return 0
    name, rest = argv[0], argv[1:]
    if name not in VERBS:
        return complain(unknown_verb_message(name))
    try:
        module = importlib.import_module(VERBS[name].module, package=__package__)
        return int(module.main(rest) or 0)
    except ValueError as error:
        if os.environ.get("MUYBRIDGE_TRACEBACK") == "1":
            raise
        return complain(str(error))
    except SystemExit as error:
        # argparse leaves with 2 after it has printed what is wrong.
        if error.code == 2:
            return ExitCode.config
        raise
    except KeyboardInterrupt:
        print("muybridge: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def usage() -> str:
    """The help text: one line a verb."""
    width = max(map(len, VERBS))
    lines = [f"  {name:<{width}}  {verb.summary}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            "usage: muybridge VERB ...",
            "",
            "Train text-to-video diffusion models.",
            "",
            *lines,
            "",
            "`muybridge VERB --help` explains a verb; `muybridge --version` names the release.",
        ]
    )


def unknown_verb_message(name: str) -> str:
    """What to say about a verb that does not exist, with the nearest one that does."""
    nearest = difflib.get_close_matches(name, VERBS, n=1)
    hint = f"did you mean `{nearest[0]}`?" if nearest else f"the verbs are {', '.join(VERBS)}"
    return f"there is no verb `{name}`; {hint}"


def complain(message: str) -> int:
    """Print the user's mistake to stderr and return the exit code for it."""
    if os.environ.get("RANK", "0") == "0":  # under torchrun all ranks find the same mistake
        print(f"muybridge: {message}", file=sys.stderr)
    return ExitCode.config


if __name__ == "__main__":
    sys.exit(main())
