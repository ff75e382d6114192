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
from .engine import initialise_distributed
from .exit_codes import ExitCode, exit_process
from .trainer import Diverged, Trainer


def train(config: TrainConfig) -> NoReturn:
    """Run or resume training and end the process with the run's exit code."""
    device = initialise_distributed(config.deepspeed)
    alone = False
    try:
        code = Trainer(config, device).run()
    except DatasetChangedError as error:  # on the rank that reads the clip
        print(f"muybridge: {error}", file=sys.stderr)
        code = ExitCode.config
    except TransientReadError as error:
        print(f"muybridge: {error}; the same command goes on from the last checkpoint", file=sys.stderr)
        code, alone = ExitCode.requeue, True
    except DataBudgetError as error:  # every rank says what it met
        print(f"muybridge: {error}", file=sys.stderr)
        code = ExitCode.data_budget
    except ValueError as error:  # the same mistake on every rank: say it once
        if dist.get_rank() == 0:
            print(f"muybridge: {error}", file=sys.stderr)
            if os.environ.get("MUYBRIDGE_TRACEBACK") == "1":
                traceback.print_exc()
        code = ExitCode.config
    except Diverged as error:
        if dist.get_rank() == 0:
            print(f"muybridge: {error}", file=sys.stderr)
        code = ExitCode.diverged
    except torch.OutOfMemoryError as error:
        print(
            f"muybridge: out of memory with micro_batch={config.micro_batch}, frames={config.data.frames}, "
            f"height={config.data.height}, width={config.data.width} ({error})",
            file=sys.stderr,
        )
        code = ExitCode.out_of_memory
    except BaseException:
        # One rank's failure must end the others too, and a rank that waits for nobody lets the launcher do that.
        traceback.print_exc()
        code = 1
    exit_process(code, alone=alone)
