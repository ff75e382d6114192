"""Which releases of DeepSpeed the engine is known to work with.

`Engine` reads DeepSpeed's inner layout, which no release promises to keep: another one may train on, and save wrong weights. What
it relies on is written down in tests/train/test_deepspeed_contract.py; a release that passes there can be added here.
"""

from importlib.metadata import version

TESTED_VERSIONS = ("0.19.8",)


def check_deepspeed() -> None:
    """Raises ValueError where the installed DeepSpeed is none of them."""
    # A build from source has the commit behind a +.
    installed = version("deepspeed").partition("+")[0]
    if installed not in TESTED_VERSIONS:
        raise ValueError(
            f"deepspeed=={installed} is installed, and what it keeps where was checked for {', '.join(TESTED_VERSIONS)} only: "
            f"pip install deepspeed=={TESTED_VERSIONS[-1]}"
        )
