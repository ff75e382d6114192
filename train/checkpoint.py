"""Checkpoints as safetensors fragments: every rank writes what it owns, and a checkpoint exists only once it is complete.

    checkpoints/step-00000200/
        shard-00000-of-00002.safetensors   fp32 pieces of rank 0: master/NAME, exp_avg/NAME, exp_avg_sq/NAME, ema-0.9999/NAME
        shard-00000-of-00002.json          where each piece lies in its parameter
        run.json                           step, shapes, names of the averages, optimizer step, state of the loader, versions;
                                           settings of a LoRA
        bad_clips.jsonl                    clips that could not be read, see data/ledger.py
        MANIFEST.json                      size and CRC-32 of every file; written last

Only what is trained is in it: of a LoRA run the factors, with a fingerprint of the weights under them in run.json.
All files go to a staging folder; its rename is the commit. No pickle is read or written. Because a piece carries its address, a
checkpoint loads at any world size and ZeRO stage.
"""

import json
import os
import re
import shutil
import uuid
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .ema import EMA
from .engine import Engine

FORMAT_VERSION = 2
OPTIMIZER_STATES = ("exp_avg", "exp_avg_sq")
LEDGER_NAME = "bad_clips.jsonl"
COMMITTED = re.compile(r"^step-(\d{8})$")


@dataclass
class CheckpointConfig:
    """When checkpoints are written and how many stay."""

    # Steps between checkpoints; 0 writes only the last one.
    every_steps: int = 500
    # Newest checkpoints kept; at least 2, so that a damaged newest one leaves another.
    keep_last: int = 2

    def faults(self, field: str) -> list[str]:
        found = []
        if self.every_steps < 0:
            found.append(f"{field}.every_steps={self.every_steps} must be 0 (only at the end) or more")
        if self.keep_last < 2:
            found.append(f"{field}.keep_last={self.keep_last} must be at least 2")
        return found


def save_checkpoint(
    folder: Path, *, step: int, engine: Engine, ema: EMA, run_state: dict[str, Any], bad_clips: str = ""
) -> Path:
    """Write `folder/step-XXXXXXXX` in two phases, with the ledger `bad_clips` of all ranks; collective.

    Raises OSError on every rank, with the staging folder removed, if any rank could not write its part.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    final = folder / f"step-{step:08d}"
    staging = Path(from_rank_0(str(folder / f"{final.name}.tmp-{uuid.uuid4().hex[:12]}")))
    failure = ""
    try:
        staging.mkdir(parents=True, exist_ok=True)
        # Stage 0 holds the same full weights on every rank: one copy is enough.
        if engine.config.zero > 0 or rank == 0:
            _write_shard(staging / f"shard-{rank:05d}-of-{world:05d}", engine, ema)
    except OSError as error:
        failure = f"rank {rank}: {error}"
    failures = [text for text in _from_all_ranks(failure) if text]
    if not failures and rank == 0:
        try:
            shapes = {name: list(shape) for name, shape in engine.parameter_shapes.items()}
            facts = {
                "format_version": FORMAT_VERSION,
                "step": step,
                "optimizer_step": engine.optimizer_step_count(),
                "world_size": world,
                "zero": engine.config.zero,
                "shapes": shapes,
                "averages": list(ema.averages),
                **run_state,
            }
            _write_json(staging / "run.json", facts)
            _write_text(staging / LEDGER_NAME, bad_clips)
            _write_json(staging / "MANIFEST.json", {path.name: _digest(path) for path in sorted(staging.iterdir())})
            _sync_folder(staging)
            if final.exists():  # the same step saved again after a resume: the older one is just as complete
                _discard(final)
            staging.rename(final)
            _sync_folder(folder)
        except OSError as error:
            failure = f"rank 0: {error}"
    failures = failures or [text for text in _from_all_ranks(failure) if text]
    if failures:
        if rank == 0:
            shutil.rmtree(staging, ignore_errors=True)
        raise OSError(f"checkpoint {final} was not written: {'; '.join(failures)}")
    return final


def find_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose files are all complete and unchanged; rank 0 decides for all. None for a fresh run.

    Raises ValueError if there are checkpoints but none is valid: starting over silently would lose a run.
    """
    answer = ""
    if dist.get_rank() == 0:
        candidates = committed_checkpoints(folder)
        reasons = []
        for candidate in reversed(candidates):
            fault = check_checkpoint(candidate)
            if not fault:
                answer = str(candidate)
                break
            reasons.append(fault)
            print(f"muybridge: {fault}; trying an older checkpoint", flush=True)
        if candidates and not answer:
            answer = "!" + f"no checkpoint under {folder} is valid: " + "; ".join(reasons)
        for leftover in [*folder.glob("step-*.tmp-*"), *folder.glob(".trash-*")]:
            shutil.rmtree(leftover, ignore_errors=True)
    answer = from_rank_0(answer)
    if answer.startswith("!"):
        raise ValueError(answer[1:])
    return Path(answer) if answer else None


def committed_checkpoints(folder: Path) -> list[Path]:
    """Committed checkpoint folders, oldest first."""
    return sorted(path for path in folder.glob("step-*") if COMMITTED.match(path.name))


def check_checkpoint(folder: Path) -> str:
    """What is wrong with a committed checkpoint, or an empty string."""
    try:
        manifest = json.loads((folder / "MANIFEST.json").read_text())
    except (OSError, ValueError) as error:
        return f"{folder}/MANIFEST.json cannot be read ({error})"
    if not isinstance(manifest, dict) or "run.json" not in manifest:
        return f"{folder}/MANIFEST.json does not list the files of a checkpoint"
    for name, expected in manifest.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if _digest(path) != expected:
            return f"{path} does not match its size and checksum in MANIFEST.json"
    return ""


def refuse_damaged(folder: Path) -> None:
    """Raise ValueError on every rank where rank 0 finds a committed checkpoint damaged; collective where there are ranks."""
    if not dist.is_initialized():
        fault = check_checkpoint(folder)
    else:
        fault = from_rank_0(check_checkpoint(folder) if dist.get_rank() == 0 else "")
    if fault:
        raise ValueError(fault)


def load_checkpoint(folder: Path, *, engine: Engine, ema: EMA) -> dict[str, Any]:
    """Fill this rank's shards from any world size's fragments; returns the contents of run.json. Collective."""
    facts = read_run_state(folder)
    _check_shapes(folder, facts["shapes"], {name: list(shape) for name, shape in engine.parameter_shapes.items()})
    averages = ema.averages
    if missing := [name for name in averages if name not in facts["averages"]]:
        raise ValueError(
            f"{folder} holds the averages {', '.join(facts['averages'])} and not {', '.join(missing)}: ema.decays must be among "
            "those that the run began with"
        )
    with FragmentReader(folder) as reader:
        for index, shard in enumerate(engine.shards):
            if facts["optimizer_step"] > 0:
                # The optimizer fills its state lazily: padding between fragments stays zero, as it would there.
                shard.optimizer_state["step"] = torch.tensor(facts["optimizer_step"], device=shard.parameter.device)
                for kind in OPTIMIZER_STATES:
                    shard.optimizer_state[kind] = torch.zeros_like(shard.parameter)
            for fragment in shard.fragments:
                here = slice(fragment.offset, fragment.offset + fragment.numel)
                shard.master[here] = reader.read("master", fragment.name, fragment.start, fragment.numel)
                for kind, tensors in averages.items():
                    tensors[index][here] = reader.read(kind, fragment.name, fragment.start, fragment.numel)
                if facts["optimizer_step"] > 0:
                    for kind in OPTIMIZER_STATES:
                        piece = reader.read(kind, fragment.name, fragment.start, fragment.numel)
                        shard.optimizer_state[kind].view(-1)[here] = piece
    engine.refresh_weights()
    return facts


def read_run_state(folder: Path) -> dict[str, Any]:
    """The contents of a checkpoint's run.json."""
    facts = json.loads((folder / "run.json").read_text())
    if facts["format_version"] != FORMAT_VERSION:
        raise ValueError(f"{folder}/run.json format_version={facts['format_version']} must be {FORMAT_VERSION}")
    return facts


def read_weights(folder: Path, kind: str = "ema") -> dict[str, Tensor]:
    """Whole fp32 weights from a checkpoint, without an engine; `kind` as for `weight_kind`."""
    shapes, kind = read_run_state(folder)["shapes"], weight_kind(folder, kind)
    with FragmentReader(folder) as reader:
        return {
            name: reader.read(kind, name, 0, torch.Size(shape).numel()).view(shape) for name, shape in shapes.items()
        }


def weight_kind(folder: Path, kind: str) -> str:
    """The name under which a checkpoint holds weights: `master`, the full name of an average, or `ema` for the first of them.

    Raises ValueError that lists what is there.
    """
    averages = read_run_state(folder)["averages"]
    if kind == "ema":
        return str(averages[0])
    if kind not in ("master", *averages):
        raise ValueError(
            f"{folder} has no weights {kind!r}; it has ema (which is {averages[0]}), master, {', '.join(averages)}"
        )
    return kind


class FragmentReader:
    """Reads any range of any tensor of a checkpoint from whichever files hold its pieces."""

    def __init__(self, folder: Path) -> None:
        self._files: list[Any] = []
        self._pieces: dict[str, list[tuple[int, int, Any]]] = {}
        for table in sorted(folder.glob("shard-*.json")):
            file = safe_open(table.with_suffix(".safetensors"), framework="pt")
            self._files.append(file)
            for name, (start, numel) in json.loads(table.read_text()).items():
                self._pieces.setdefault(name, []).append((start, numel, file))

    def __enter__(self) -> "FragmentReader":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.__exit__(None, None, None)

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of the flattened tensor `kind/name`, fp32."""
        out, found = torch.empty(numel), 0
        for piece_start, piece_numel, file in self._pieces.get(name, []):
            begin, end = max(start, piece_start), min(start + numel, piece_start + piece_numel)
            if begin < end:
                piece = file.get_slice(f"{kind}/{name}")[begin - piece_start : end - piece_start]
                out[begin - start : end - start] = piece
                found += end - begin
        if found != numel:
            raise ValueError(f"the checkpoint holds {found} of {numel} elements of {kind}/{name}")
        return out


def remove_old_checkpoints(folder: Path, keep_last: int) -> None:
    """Delete all but the newest; a name that no reader accepts comes first, so that no half-deleted one looks whole."""
    for old in committed_checkpoints(folder)[:-keep_last]:
        _discard(old)


def _write_shard(stem: Path, engine: Engine, ema: EMA) -> None:
    tensors: dict[str, Tensor] = {}
    table: dict[str, tuple[int, int]] = {}
    averages = ema.averages
    for index, shard in enumerate(engine.shards):
        kinds = {"master": shard.master} | {name: tensors[index] for name, tensors in averages.items()}
        kinds |= {kind: shard.optimizer_state[kind] for kind in OPTIMIZER_STATES if kind in shard.optimizer_state}
        for fragment in shard.fragments:
            table[fragment.name] = (fragment.start, fragment.numel)
            for kind, flat in kinds.items():
                piece = flat.view(-1)[fragment.offset : fragment.offset + fragment.numel]
                # A copy, since safetensors refuses views of one storage.
                tensors[f"{kind}/{fragment.name}"] = piece.detach().to("cpu", copy=True)
    _check_finite(tensors)
    path = stem.with_suffix(".safetensors")
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # how safetensors says that the disk is full
        raise OSError(f"{path}: {error}") from error
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    _write_json(stem.with_suffix(".json"), table)


def _check_finite(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise OSError(f"{name} holds NaN or infinite values; the checkpoint is refused")


def _check_shapes(folder: Path, saved: dict[str, list[int]], wanted: dict[str, list[int]]) -> None:
    differing = sorted(name for name in saved.keys() | wanted.keys() if saved.get(name) != wanted.get(name))
    if differing:
        shown = ", ".join(f"{name}: {saved.get(name)} saved, {wanted.get(name)} configured" for name in differing[:5])
        raise ValueError(f"{folder} does not fit the configured model: {len(differing)} parameters differ ({shown})")


def _digest(path: Path) -> dict[str, int]:
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return {"bytes": path.stat().st_size, "crc32": checksum}


def _write_json(path: Path, content: object) -> None:
    _write_text(path, json.dumps(content, indent=1))


def _write_text(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _discard(folder: Path) -> None:
    trash = folder.with_name(f".trash-{folder.name}-{uuid.uuid4().hex[:8]}")
    folder.rename(trash)
    shutil.rmtree(trash, ignore_errors=True)


def from_rank_0(text: str) -> str:
    """What rank 0 says; collective."""
    box = [text]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _from_all_ranks(text: str) -> Iterable[str]:
    box: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(box, text)
    return box
