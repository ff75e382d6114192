"""Settings that a resumed run must not change, as checkpoints keep them."""

from functools import reduce
from pathlib import Path
from typing import Any

from .compose import plain
from .config import TrainConfig
from .experts import Expert
from .fragments import read_run_state

# They decide what a step computes. The loader sees to those of the data; sizes of the model show in its parameters.
FIXED_ON_RESUME = ("seed", "global_batch", "task", "expert", "conditioning.form", "optimizer.kind")
# Of those that a checkpoint of an earlier version does not have, what they were.
_ONCE = {"optimizer.kind": "adamw"}


def refuse_changed_settings(config: TrainConfig, checkpoint: Path) -> None:
    """Raise ValueError where a run that goes on from this checkpoint would be another one."""
    if changed := changed_settings(config, read_run_state(checkpoint)):
        raise ValueError(
            f"{checkpoint} cannot be continued, these changed: {'; '.join(changed)} (undo it, or choose another run_dir)"
        )


def fixed_settings(config: TrainConfig) -> dict[str, str]:
    """What checkpoints keep of the settings that a resumed run must not change."""
    names = FIXED_ON_RESUME if config.expert is Expert.none else (*FIXED_ON_RESUME, "boundary")
    settings = plain(config)  # milliseconds, at every save
    return {name: str(reduce(lambda section, key: section[key], name.split("."), settings)) for name in names}


def changed_settings(config: TrainConfig, saved: dict[str, Any]) -> list[str]:
    """Those of them that differ from what a checkpoint has in its run.json."""
    saved = {**_ONCE, **saved}
    return [
        f"{name}: {saved.get(name, 'nothing')} saved, {value} now"
        for name, value in fixed_settings(config).items()
        if saved.get(name) != value
    ]
