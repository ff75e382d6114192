"""Muybridge: distributed training of text-to-video diffusion models."""

import sys
from pathlib import Path

__version__ = "0.1.0"

# The checkout is this package. Where Python is started in it, its folders can be imported by their bare names as well;
# transformers and diffusers look for a package `kernels`, and would load a second copy of ours, whose operators take over.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
