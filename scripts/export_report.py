"""What `muybridge export` says at its end: the files, the checks they passed, who cannot use them and what to do next."""

from pathlib import Path

from rich.console import Console
from rich.table import Table
from safetensors import safe_open

from ..models.pipeline_folder import is_pipeline_folder
from .export_checks import Comparison
from .export_loaders import lost_loaders
from .export_plan import ExportPlan


def parts_table(folder: Path, comparisons: list[Comparison], *, title: str) -> Table:
    """The parts of a written folder; without comparisons none were meant."""
    table = Table(title=title)
    table.add_column("part", overflow="fold")
    table.add_column("files", justify="right")
    table.add_column("MB", justify="right")
    table.add_column("weights")
    table.add_column("off diffusers by", justify="right")
    compared = {comparison.part: comparison for comparison in comparisons}
    for part in sorted(path for path in folder.iterdir() if path.is_dir() or path.suffix == ".safetensors"):
        files = sorted(path for path in part.rglob("*") if path.is_file()) if part.is_dir() else [part]
        size = sum(path.stat().st_size for path in files)
        table.add_row(
            part.name, str(len(files)), f"{size / 1e6:.1f}", _dtypes_of(files), _outcome(compared.get(part.name))
        )
    return table


def print_report(out: Path, plan: ExportPlan, comparisons: list[Comparison], table: Table) -> None:
    """Print it for a whole model that lies in `out`."""
    config = plan.config
    console = Console(highlight=False, soft_wrap=True, markup=False)
    console.print(table)
    for comparison in comparisons:
        if comparison.difference is None:
            console.print(f"muybridge: {comparison.part}: {comparison.reason}")
    for line in lost_loaders(config.model, config.vae.resolved(), config.text):
        console.print(f"muybridge: note: {line}")
    console.print(f"muybridge: wrote {out}; every tensor was read again and is as it was meant")
    console.print(f"next: {out}/README.md says how other tools open it")
    if is_pipeline_folder(out) and (out / "text_encoder").is_dir():
        console.print(f"      muybridge sample model={out} prompts=FILE")


def _dtypes_of(files: list[Path]) -> str:
    """The number formats of a part's weights, such as `BF16, F32`; empty for a part without weights."""
    found = set()
    for path in files:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                found |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118  (not a dict)
    return ", ".join(sorted(found))


def _outcome(comparison: Comparison | None) -> str:
    if comparison is None:
        return ""
    return "not compared" if comparison.difference is None else f"{comparison.difference:.1e}"
