"""Settings hold no secrets: they are written into run_dir and shown in W&B, and from there they are copied and shared."""

import re
from collections.abc import Iterable

from ..redaction import MIN_SECRET_CHARACTERS, is_secret_name, redacted, secret_in

# Variables that ${oc.env:NAME} may bring into the settings, beside those that Slurm or the user's own MUYBRIDGE_ prefix names: what
# is not on the list may be a secret under any name.
READABLE_VARIABLES = ("HOME", "USER", "LOGNAME", "HOSTNAME", "PWD", "TMPDIR", "SCRATCH", "WORK", "PROJECT", "DATA")
READABLE_PREFIXES = ("SLURM_", "MUYBRIDGE_")
_WANDB_KEY = re.compile(r"[0-9a-f]{40}")
_CURE = "settings are written into run_dir; keys belong in the environment, `wandb login`, or files of the storage's library"


def is_readable_variable(name: str) -> bool:
    """Whether settings may hold the value of this environment variable."""
    return name in READABLE_VARIABLES or (name.startswith(READABLE_PREFIXES) and not is_secret_name(name))


def refuse_secrets(settings: Iterable[tuple[str, object]]) -> None:
    """Raises ValueError that names every setting (path, value) with a secret in it, and repeats none of them."""
    found = [f"{redacted(path)} must not be {kind}" for path, value in settings if (kind := _kind(path, str(value)))]
    if found:
        raise ValueError(f"{'; '.join(dict.fromkeys(found))} ({_CURE})")


def refuse_secrets_in_overrides(overrides: Iterable[str]) -> None:
    """The same for a command line's KEY=VALUE, before anything is said of them."""
    pairs = (text.partition("=") for text in overrides)
    refuse_secrets((path, value) if equals else ("an argument", path) for path, equals, value in pairs)


def _kind(path: str, value: str) -> str:
    if kind := secret_in(value):
        return kind
    name = path.rpartition(".")[2]
    if _WANDB_KEY.fullmatch(value) and ("tracking." in path or is_secret_name(name)):
        return "a key of W&B"
    has_letters = len(value) >= MIN_SECRET_CHARACTERS and any(character.isalpha() for character in value)
    return "a secret, as its name says" if is_secret_name(name) and has_letters else ""
