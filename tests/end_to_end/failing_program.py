"""`python -m muybridge.train` whose training fails once it is under way, with secrets in the message of the error."""

import os
import sys
from typing import NoReturn
from unittest.mock import patch

from muybridge.train import trainer
from muybridge.train.__main__ import main


def fail(*_: object, **__: object) -> NoReturn:
    secrets = " ".join(value for value in os.environ.values() if "canary" in value.lower())
    print("printed before the failure:", secrets)
    raise RuntimeError(f"cannot log in with {secrets} at https://me:{os.environ['HF_TOKEN']}@host/a.tar")


if __name__ == "__main__":
    with patch.object(trainer.Trainer, "_save_where_due", fail):
        sys.exit(main(sys.argv[1:]))
