"""What tells weights from others: the LoRA of a checkpoint knows by it the weights that it was trained on."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..models.weight_files import Tensors


class WeightsFingerprint:
    """Changes with the names, shapes and values of weights, whatever their order; sums of bits, as a hash of 14 B takes minutes."""

    def __init__(self) -> None:
        self._parts: dict[str, bytes] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Take in one of the weights."""
        bits = tensor.float().contiguous().view(torch.int32)
        rows: Tensor = bits.reshape(len(bits) if bits.ndim > 1 else 1, -1).sum(dim=1, dtype=torch.int64)
        self._parts[name] = f"{name} {list(tensor.shape)}".encode() + rows.cpu().numpy().tobytes()

    def hexdigest(self) -> str:
        """That of all that were added."""
        digest = hashlib.blake2b(digest_size=16)
        for _, part in sorted(self._parts.items()):
            digest.update(part)
        return digest.hexdigest()

    @staticmethod
    def of(tensors: Tensors) -> str:
        """That of weights that are read one after the other."""
        fingerprint = WeightsFingerprint()
        for name, tensor in tensors:
            fingerprint.add(name, tensor)
        return fingerprint.hexdigest()


def merged_fingerprint(lora: Mapping[str, Any], trained: str) -> str:
    """That of weights into which a LoRA was merged, of what a checkpoint keeps of it and the fingerprint of its factors.

    They were computed, which rounds differently on another device: they are known by what they were computed of.
    """
    parts = [lora["base"], json.dumps(lora["settings"], sort_keys=True), trained]
    return hashlib.blake2b(" ".join(parts).encode(), digest_size=16).hexdigest()
