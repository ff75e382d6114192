"""One training run from its settings to the exit of the process: what went wrong, in words and as an exit code."""

import os
import sys
import traceback
from typing import NoReturn

import torch
import torch.distributed as dist

from ..data.ledger import DataBudgetError
from ..data.media_bytes import DatasetChangedError
from ..data.storage import TransientReadError
from .config import TrainConfig
from .engine import (
    EXIT_CONFIG,
    EXIT_DATA_BUDGET,
    EXIT_DIVERGED,
    EXIT_OUT_OF_MEMORY,
    EXIT_REQUEUE,
    exit_process,
    initialise_distributed,
)
from .trainer import Diverged, Trainer


def train(config: TrainConfig) -> NoReturn:
    """Run or resume training and end the process with the run's exit code."""
    device = initialise_distributed(config.deepspeed)
    alone = False
    try:
        code = Trainer(config, device).run()
    except DatasetChangedError as error:  # on the rank that reads the clip
        print(f"muybridge: {error}", file=sys.stderr)
        code = EXIT_CONFIG
    except TransientReadError as error:
        print(f"muybridge: {error}; the same command goes on from the last checkpoint", file=sys.stderr)
        code, alone = EXIT_REQUEUE, True
    except DataBudgetError as error:  # every rank says what it met
        print(f"muybridge: {error}", file=sys.stderr)
        code = EXIT_DATA_BUDGET
    except ValueError as error:  # the same mistake on every rank: say it once
        if dist.get_rank() == 0:
            print(f"muybridge: {error}", file=sys.stderr)
            if os.environ.get("MUYBRIDGE_TRACEBACK") == "1":
                traceback.print_exc()
        code = EXIT_CONFIG
    except Diverged as error:
        if dist.get_rank() == 0:
            print(f"muybridge: {error}", file=sys.stderr)
        code = EXIT_DIVERGED
    except torch.OutOfMemoryError as error:
        print(
            f"muybridge: out of memory with micro_batch={config.micro_batch}, frames={config.data.frames}, "
            f"height={config.data.height}, width={config.data.width} ({error})",
            file=sys.stderr,
        )
        code = EXIT_OUT_OF_MEMORY
    except BaseException:
        # One rank's failure must end the others too, and a rank that waits for nobody lets the launcher do that.
        traceback.print_exc()
        code = 1
    exit_process(code, alone=alone)
