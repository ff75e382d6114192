"""The process that writes checkpoints in the background, with faults; its arguments are these, a file of events, and its own."""

import json
import sys
from pathlib import Path

from muybridge.tests.faults import injections
from muybridge.train import checkpoint_writer

if __name__ == "__main__":
    faults, events, *own = sys.argv[1:]
    for fault in json.loads(faults):
        injections.install(fault, Path(events))
    sys.argv = ["muybridge.train.checkpoint_writer", *own]
    checkpoint_writer.main()
