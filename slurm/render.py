"""The batch script of a submission: the template with what the job asks Slurm for, and a few numbers. No user's text goes in."""

import subprocess
from pathlib import Path

from .config import SlurmConfig

TEMPLATE = Path(__file__).with_name("train.sbatch")
RESOURCES_MARKER, NUMBERS_MARKER = "# @resources@", "# @numbers@"


def resource_lines(config: SlurmConfig, *, job_name: str, is_array: bool) -> list[str]:
    """The #SBATCH lines of checked settings."""
    options: dict[str, str | int | None] = {
        "job-name": job_name,
        "nodes": config.nodes,
        "ntasks-per-node": config.tasks_per_node,
        "gpus-per-node": config.gpus_per_node or None,
        "cpus-per-task": config.cpus_per_process,
        "mem": config.memory,
        "time": config.time,
        "partition": config.partition,
        "account": config.account,
        "qos": config.qos,
        "constraint": config.constraint,
        "reservation": config.reservation,
        "exclude": config.exclude,
        "output": f"slurm/log-{'%A_%a' if is_array else '%j'}.txt",
        "open-mode": "append",
        "signal": f"B:USR2@{config.lead_seconds}",
    }
    texts = [f"--{name}={value}" for name, value in options.items() if value is not None]
    texts += ["--exclusive"] if config.exclusive else []
    texts += ["--requeue" if config.requeue else "--no-requeue", *config.options]
    return [f"#SBATCH {text}" for text in texts]


def read_template(config: SlurmConfig, field: str) -> tuple[str, list[str]]:
    """The template's text and its faults: a copy of a site's own must still have the places to fill in, and be a script."""
    path = TEMPLATE if config.template is None else Path(config.template)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        return "", [f"{field}={path} cannot be read ({error})"]
    lines = text.splitlines()
    faults = [
        f"{field}={path} must have one line {marker!r}, which submit replaces"
        for marker in (RESOURCES_MARKER, NUMBERS_MARKER)
        if lines.count(marker) != 1
    ]
    if not text.startswith("#!"):
        faults.append(f"{field}={path} must begin with a line such as #!/bin/bash, which Slurm asks for")
    # What stands below the first command is no option to sbatch any more.
    first_command = next((line for line in lines if line.strip() and not line.startswith("#")), None)
    if not faults and first_command and lines.index(RESOURCES_MARKER) > lines.index(first_command):
        faults.append(f"{field}={path} must have {RESOURCES_MARKER!r} above its first command")
    return text, faults or (_syntax_faults(path, text, field) if config.template is not None else [])


def render(template: str, *, resources: list[str], numbers: dict[str, int]) -> str:
    """The script: a checked template with these lines, and an assignment for each number, in the places for them."""
    filled = {
        RESOURCES_MARKER: resources,
        NUMBERS_MARKER: [f"{name}={number:d}" for name, number in numbers.items()],
    }
    lines = [new for line in template.splitlines() for new in filled.get(line, [line])]
    return "\n".join(lines) + "\n"


def _syntax_faults(path: Path, text: str, field: str) -> list[str]:
    answer = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    if answer.returncode == 0:
        return []
    return [f"{field}={path} must be a script that bash can read: {'; '.join(answer.stderr.splitlines())}"]
