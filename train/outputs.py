"""What a run writes into its directory, whole, and that all of it stays there."""

import os
from pathlib import Path

# Besides the files STOP and SAVE, which the user makes.
OUTPUTS = (
    *("config.yaml", "provenance.json", "metrics.jsonl", "metrics_dropped.jsonl", "attempts.jsonl", "lock.json"),
    *(
        "wandb_run_id.txt",
        "wandb_url.txt",
        "checkpoints",
        "validation",
        "stacks",
        "tokenizer",
        "model",
        "wandb",
        "slurm",
    ),
)
_FOLDERS = ("checkpoints", "validation", "stacks", "model", "slurm")


def replace_text(path: Path, text: str) -> None:
    """Write a small file, which holds what was there before or all of the text, whatever happens meanwhile."""
    staging = path.with_name(f"{path.name}.tmp")
    staging.write_text(text, encoding="utf-8")
    staging.replace(path)


def link_fault(run_dir: Path) -> str:
    """What is wrong with a directory in which a link leads an output elsewhere, where it could overwrite anything; "" for none."""
    root = Path(os.path.realpath(run_dir))
    paths = [run_dir / name for name in OUTPUTS]
    paths += [path for name in _FOLDERS if (run_dir / name).is_dir() for path in sorted((run_dir / name).iterdir())]
    for path in paths:
        if path.is_symlink() and not (target := Path(os.path.realpath(path))).is_relative_to(root):
            return (
                f"run_dir={run_dir} must not hold a link that leads out of it: {path} is one to {target}; make run_dir itself a "
                "link, or move what is there into it"
            )
    return ""
