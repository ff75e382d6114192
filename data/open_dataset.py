"""Opening the datasets of a run: their indexes, which of their rows are taken, and a report of those that are not."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .buckets import LEFT_OVER, Assignment, Bucket, assign_buckets
from .config import Access, DataConfig
from .index import ClipIndex
from .latent_cache import ANY_ORIGIN, CacheOrigin, cached_buckets, check_cache
from .plan import DatasetRows
from .row_filter import select_rows

_log = logging.getLogger(__name__)
_SHOWN = 5


@dataclass(frozen=True)
class OpenDataset:
    """A dataset and the rows of it that are taken, by bucket."""

    index: ClipIndex
    rows: DatasetRows
    excluded: dict[str, np.ndarray]  # reason -> rows, ascending
    misfits: int  # rows that the filter takes and no bucket fits


def open_datasets(config: DataConfig, buckets: Sequence[Bucket], origin: CacheOrigin = ANY_ORIGIN) -> list[OpenDataset]:
    """Opens the datasets of the settings, in their order, and logs what is left out.

    Raises ValueError if one is missing, damaged, of the wrong kind, a cache of another `origin`, or has no clip that fits, or
    too few of them.
    """
    opened = []
    for name in config.sources():
        dataset = _open(config, name, buckets, origin)
        _report_excluded(dataset, f"data.datasets.{name}.path" if name else "data.path", config.max_misfit_share)
        opened.append(dataset)
    return opened


def _open(config: DataConfig, name: str, buckets: Sequence[Bucket], origin: CacheOrigin) -> OpenDataset:
    field = f"data.datasets.{name}" if name else "data"
    source = config.sources()[name]
    is_cache = config.access is Access.latents
    made_by = "muybridge encode" if is_cache else "muybridge prepare SRC OUT"
    index = ClipIndex.open(source.path, field=f"{field}.path", made_by=made_by)
    if not is_cache and index.manifest["kind"] != "raw":
        raise ValueError(f"{field}.path={source.path} holds {index.manifest['kind']}; set data.access=latents")
    excluded: dict[str, np.ndarray] = {}
    if is_cache:
        check_cache(index, config, name, origin)
        # Decided when it was made, from columns that only the videos have.
        assignment = Assignment(cached_buckets(index, buckets))
    else:
        chosen, excluded = _chosen(index, source.filter, field)
        assignment = assign_buckets(index, buckets, config.fit_rules(), chosen)
    rows = [np.flatnonzero(assignment.buckets == b).astype(np.int32) for b in range(len(buckets))]
    return OpenDataset(
        index,
        DatasetRows(name, rows, weight=source.weight, content=index.fingerprint),
        {**excluded, **assignment.excluded},
        sum(len(misfits) for reason, misfits in assignment.excluded.items() if reason != LEFT_OVER),
    )


def _chosen(index: ClipIndex, expression: str | None, field: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    # The rows that the filter takes, bool [rows], and the others by their reason.
    if not expression:
        return np.ones(len(index), dtype=bool), {}
    chosen = np.zeros(len(index), dtype=bool)
    chosen[select_rows(index, expression, field=f"{field}.filter")] = True
    return chosen, {} if chosen.all() else {f"not in {field}.filter={expression!r}": np.flatnonzero(~chosen)}


def _report_excluded(dataset: OpenDataset, field: str, max_misfit_share: float) -> None:
    index = dataset.index
    durations = index.column("duration_seconds")
    reasons = []
    for reason, rows in dataset.excluded.items():
        shown = [f"{index.text('key', row)} ({durations[row]:.2f} s)" for row in rows[:_SHOWN].tolist()]
        reasons.append(f"{len(rows)} {reason}: {', '.join(shown)}{', ...' if len(rows) > _SHOWN else ''}")
    if len(dataset.rows) == 0:
        raise ValueError(f"{field}={index.folder}: none of its {len(index)} clips fits; {'; '.join(reasons)}")
    if dataset.misfits > max_misfit_share * (len(dataset.rows) + dataset.misfits):
        raise ValueError(
            f"{field}={index.folder}: {dataset.misfits} of its {len(index)} clips fit no bucket, a larger share than "
            f"data.max_misfit_share={max_misfit_share:g}; {'; '.join(reasons)}"
        )
    if reasons:
        left_out = len(index) - len(dataset.rows)
        _log.warning("%d of %d clips are left out; %s", left_out, len(index), "; ".join(reasons))
