"""Triton kernels with their plain torch references. Public names are imported from here."""

from .attention import attention

__all__ = ["attention"]
