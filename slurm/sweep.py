"""The runs of a sweep: every combination of the values in Hydra's overrides, each with a name for its directory."""

import hashlib
import itertools
import re
from dataclasses import dataclass

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType

_MOST_NAME_CHARACTERS = 100


@dataclass(frozen=True)
class Combination:
    """One run of a sweep."""

    name: str  # readable, safe, and the same whenever the same values are combined
    overrides: list[str]


@dataclass(frozen=True)
class Sweep:
    """All runs, and what they have in common."""

    common: list[str]
    combinations: list[Combination]


def parse(text: str) -> Override | None:
    """The override, or None where it is none: whoever composes the settings says what is wrong with it."""
    try:
        return OverridesParser.create().parse_override(text)
    except Exception:  # Hydra's parser raises its own and antlr's classes
        return None


def expand(overrides: list[str]) -> Sweep:
    """Take overrides such as lr=1e-3,1e-4 and seed=range(3) apart. Raises ValueError where there is nothing to combine."""
    common: list[str] = []
    swept: list[tuple[Override, list[str]]] = []
    for text in overrides:
        override = parse(text)
        if override is None or not override.is_sweep_override():
            common.append(text)
        elif override.key_or_group == "run_dir":
            raise ValueError(f"{text!r}: run_dir cannot be swept, it is the folder that the runs of the sweep lie in")
        elif not override.is_discrete_sweep() or override.value_type is ValueType.GLOB_CHOICE_SWEEP:
            raise ValueError(
                f"{text!r}: a sweep needs values that can be counted, such as a,b or choice(a,b) or range(1,4)"
            )
        else:
            swept.append((override, list(override.sweep_string_iterator())))
    if not swept:
        raise ValueError("--multirun needs a setting with several values, such as seed=1,2 or optimizer.lr=1e-3,1e-4")
    short = _short_keys([override.key_or_group for override, _ in swept])
    combinations = []
    for values in itertools.product(*(texts for _, texts in swept)):
        chosen = [f"{override.get_key_element()}={value}" for (override, _), value in zip(swept, values)]
        pairs = [(short[override.key_or_group], value) for (override, _), value in zip(swept, values)]
        combinations.append(Combination(_name(pairs), chosen))
    names = [combination.name for combination in combinations]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"--multirun: the values of a setting must differ ({twice[0]} comes twice)")
    return Sweep(common, combinations)


def _short_keys(keys: list[str]) -> dict[str, str]:
    """The last part of each key, where that tells them apart."""
    lasts = [key.rpartition(".")[2] for key in keys]
    return {key: last if lasts.count(last) == 1 else key for key, last in zip(keys, lasts)}


def _name(pairs: list[tuple[str, str]]) -> str:
    """lr_1e-3__seed_1; where characters had to go, digits of the exact values follow."""
    exact = "__".join(f"{key}_{value}" for key, value in pairs)
    safe = re.sub(r"[^A-Za-z0-9_.-]+", "-", exact)[:_MOST_NAME_CHARACTERS].strip("-.")
    digest = hashlib.sha256(repr(pairs).encode()).hexdigest()[:6]
    return safe if safe == exact else f"{safe}-{digest}".lstrip("-.")
