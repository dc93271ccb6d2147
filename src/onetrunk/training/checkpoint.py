"""Checkpoints: a training's state in one safetensors file that checks itself. No pickle.

Tensors are named network.*, best.*, good.* and optimizer.*; the card holds the step, the best
accuracy and what the training must agree on (recipe, family, classes, images, threads).
"""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import TrainingError
from ..files import read_checked, write_atomically
from ..tensorfile import pack, unpack

PARTS = ("network", "best", "good", "optimizer")


@dataclass(frozen=True)
class Checkpoint:
    """Everything from which a training goes on bit for bit."""

    identity: dict[str, Any]
    step: int
    best_accuracy: float
    network: dict[str, Tensor]
    best: dict[str, Tensor] | None
    good: dict[str, Tensor]
    optimizer: dict[str, Tensor]


def write_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Writes or replaces the file: whole or not at all, whenever the process is killed."""
    tensors = {
        f"{part}.{name}": tensor
        for part in PARTS
        for name, tensor in (getattr(checkpoint, part) or {}).items()
    }
    card = {
        "checkpoint": 1,
        "identity": checkpoint.identity,
        "step": checkpoint.step,
        "best_accuracy": checkpoint.best_accuracy,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, pack(tensors, card))


def read_checkpoint(path: Path, identity: dict[str, Any]) -> Checkpoint:
    """The checkpoint of the training that `identity` describes.

    Raises:
        DamagedError: where the file's bytes are not what was written.
        TrainingError: where it belongs to another training; the message says in what they differ.
    """
    tensors, card = unpack(read_checked(path), str(path))
    saved = card.get("identity", {})
    different = {k for k in identity if k != "threads" and saved.get(k) != identity[k]}
    if different:
        lines = [f"{k}: it has {saved.get(k)!r}, this has {identity[k]!r}" for k in sorted(different)]
        raise TrainingError(
            f"{path} is the checkpoint of another training ({'; '.join(lines)}). "
            "Train with what it has, or start over without it."
        )
    if saved.get("threads") != identity["threads"]:
        warnings.warn(
            f"{path} was written with {saved.get('threads')} threads, this process has "
            f"{identity['threads']}: training goes on, but not bit for bit.",
            stacklevel=3,
        )
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = tensor
    return Checkpoint(
        identity=saved,
        step=card["step"],
        best_accuracy=card["best_accuracy"],
        network=parts["network"],
        best=parts["best"] or None,
        good=parts["good"],
        optimizer=parts["optimizer"],
    )
