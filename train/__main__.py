"""`muybridge train` and `python -m muybridge.train` (also under torchrun): settings in, exit code out."""

import os
import sys

import hydra
import yaml
from omegaconf import DictConfig

from .. import __version__
from ..redaction import redact_output
from .compose import plain, register_schema
from .config import SCHEMA_NAME, TrainConfig, load_train_config
from .exit_codes import ExitCode
from .life import Asked, tell_end
from .secrets import refuse_secrets_in_overrides

USAGE = f"""\
usage: muybridge train +experiment=NAME [KEY=VALUE ...]
       torchrun --nproc-per-node N -m muybridge.train +experiment=NAME [KEY=VALUE ...]

Train a video autoencoder or a text-to-video diffusion transformer. Run it again with the same run_dir to resume.

  muybridge train +experiment=quickstart                          the small model that trains on a CPU
  muybridge train +experiment=wan_1_3b_480p run_dir=runs/first    Wan 2.1 1.3B at 81 x 480 x 832
  muybridge train +experiment=wan_1_3b_lora                       a LoRA on public weights (muybridge import --help)
  muybridge train +experiment=quickstart optimizer.lr=1e-3        any field can be set
  muybridge train +experiment=quickstart dry_run=true             check the settings, start nothing
  muybridge train +experiment=quickstart --cfg job                print every setting and its value

muybridge {__version__}; --hydra-help explains Hydra's own flags."""


def main(argv: list[str]) -> int:
    """Run or resume training; returns the exit code where no process group was started, otherwise ends the process."""
    redact_output()
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if any(argument.startswith("-") for argument in argv):
        return _show_with_hydra(argv)
    # Settings can be checked on a machine that is not the cluster.
    is_check = "dry_run=true" in argv and "WORLD_SIZE" not in os.environ
    config = load_train_config(argv, world_size=None if is_check else int(os.environ.get("WORLD_SIZE", "1")))
    # DeepSpeed takes seconds to import: a fault above is reported before that.
    from .memory import OutOfMemoryError, check_memory, parameter_counts

    if config.dry_run:
        print(yaml.safe_dump(plain(config), sort_keys=False))
        counts = parameter_counts(config)
        trained = "" if counts.trainable == counts.all else f", {counts.trainable / 1e6:.1f} M of them trained"
        print(f"muybridge: the settings are valid ({counts.all / 1e6:.1f} M parameters{trained}); nothing was started")
        for missing in config.missing_inputs():
            print(f"muybridge: still needed: {missing}")
        return 0
    try:
        check_memory(config)
    except OutOfMemoryError as error:
        print(f"muybridge: {error}", file=sys.stderr)
        tell_end(ExitCode.out_of_memory, Asked.nobody, str(error))
        return ExitCode.out_of_memory
    from .run import train

    return train(config)


def _show_with_hydra(argv: list[str]) -> int:
    """Hydra's own flags (--cfg, --info, --hydra-help): it prints and stops."""
    allowed = ("--cfg", "-c", "--info", "-i", "--hydra-help", "--resolve", "--package", "-p")
    if unknown := [text for text in argv if text.startswith("-") and text.split("=")[0] not in allowed]:
        raise ValueError(f"unknown option {unknown[0]} (see muybridge train --help)")
    refuse_secrets_in_overrides(argv)
    register_schema(SCHEMA_NAME, TrainConfig)

    @hydra.main(config_path="pkg://muybridge.configs", config_name="train", version_base="1.3")
    def show(_: DictConfig) -> None:
        raise AssertionError("every allowed option prints and stops")

    sys.argv = ["muybridge train", *argv]
    show()
    return 0


if __name__ == "__main__":  # torchrun starts this file, not the `muybridge` command
    try:
        sys.exit(main(sys.argv[1:]))
    except ValueError as error:
        if os.environ.get("RANK", "0") == "0":  # all ranks find the same mistake
            print(f"muybridge: {error}", file=sys.stderr)
        tell_end(ExitCode.config, Asked.nobody, str(error))
        sys.exit(ExitCode.config)
