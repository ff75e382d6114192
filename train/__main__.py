"""`muybridge train` and `python -m muybridge.train` (also under torchrun): settings in, exit code out."""

import sys

import yaml

from .. import __version__
from .config import SCHEMA_NAME, TrainConfig, load_train_config, register_schema

EXIT_OUT_OF_MEMORY = 78

USAGE = f"""\
usage: muybridge train +experiment=NAME [KEY=VALUE ...]
       torchrun --nproc-per-node N -m muybridge.train +experiment=NAME [KEY=VALUE ...]

Train a video autoencoder or a text-to-video diffusion transformer. Run it again with the same run_dir to resume.

  muybridge train +experiment=quickstart                          the small model that trains on a CPU
  muybridge train +experiment=wan_1_3b_480p run_dir=runs/first    Wan 2.1 1.3B at 81 x 480 x 832
  muybridge train +experiment=quickstart optimizer.lr=1e-3        any field can be set
  muybridge train +experiment=quickstart dry_run=true             check the settings, start nothing
  muybridge train +experiment=quickstart --cfg job                print every setting and its value

muybridge {__version__}; --hydra-help explains Hydra's own flags."""


def main(argv: list[str]) -> int:
    """Run or resume training; returns the exit code where no process group was started, otherwise ends the process."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if any(argument.startswith("-") for argument in argv):
        return _show_with_hydra(argv)
    config = load_train_config(argv)
    from ..models.flops import parameter_count_text
    from .memory import OutOfMemoryError, check_memory

    try:
        check_memory(config)
        if config.dry_run:
            print(yaml.safe_dump(plain(config), sort_keys=False))
            print(f"muybridge: the configuration is valid ({parameter_count_text(config.model)}); nothing was started")
            return 0
        # torch and DeepSpeed take seconds to import: a fault above is reported before that.
        from .trainer import train

        train(config)
    except OutOfMemoryError as error:
        print(f"muybridge: {error}", file=sys.stderr)
        return EXIT_OUT_OF_MEMORY
    raise AssertionError("train() ends the process")
