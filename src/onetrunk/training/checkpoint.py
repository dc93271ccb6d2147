"""Checkpoints: a training's state in one safetensors file that checks itself.

Tensors are named network.*, best.*, good.* and optimizer.*; the card holds the step, two
accuracies, what a training must agree on to go on from it (recipe, family, classes, backbone,
data), and what it was computed with (threads, torch, device), which only makes it go on bit for
bit.
"""

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import DamagedError, DivergedError, TrainingError
from ..files import read_checked, reason, write_atomically
from ..tensorfile import pack, unpack

FORMAT = 2
PARTS = ("network", "best", "good", "optimizer")


@dataclass(frozen=True)
class Checkpoint:
    """Everything from which a training goes on bit for bit.

    Args:
        identity: what the training that goes on must agree on.
        computed_with: what it should agree on; JSON values, as in `identity`.
        step: steps done.
        epochs: epochs done, validation included.
        start_accuracy: on validation images before the first step; -1 where there are none.
        best_accuracy: the highest of the epochs that were no worse; -1 where there is none.
        network: the domain's own tensors at `step`.
        best: the same at the epoch that stays so far; empty where there is no validation.
        good: the same at the end of the last epoch, or at the start.
        optimizer: the optimiser's tensors, as `<parameter's number>.<name>`.
    """

    identity: Mapping[str, Any]
    computed_with: Mapping[str, Any]
    step: int
    epochs: int
    start_accuracy: float
    best_accuracy: float
    network: Mapping[str, Tensor]
    best: Mapping[str, Tensor]
    good: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]


def write_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Writes or replaces the file: whole or not at all, whenever the process is killed.

    Raises:
        TrainingError: where the file system refuses; the old file is then still there.
    """
    tensors = {
        f"{part}.{name}": tensor
        for part in PARTS
        for name, tensor in getattr(checkpoint, part).items()
    }
    card = {
        "checkpoint": FORMAT,
        "identity": checkpoint.identity,
        "computed_with": checkpoint.computed_with,
        "step": checkpoint.step,
        "epochs": checkpoint.epochs,
        "start_accuracy": checkpoint.start_accuracy,
        "best_accuracy": checkpoint.best_accuracy,
    }
    data = pack(tensors, card)
    make_folder(path)
    try:
        write_atomically(path, data)
    except OSError as error:
        raise TrainingError(f"cannot write the checkpoint {path}: {reason(error)}") from error


def make_folder(path: Path) -> None:
    """Makes the folder that the file at `path` goes into, where it is missing.

    Raises:
        TrainingError: where the file system refuses.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"cannot write the checkpoint {path}: {reason(error)}") from error


def read_checkpoint(
    path: Path, identity: Mapping[str, Any], computed_with: Mapping[str, Any]
) -> Checkpoint:
    """The checkpoint of the training that `identity` describes.

    Warns where it was computed with something else than `computed_with`.

    Raises:
        DamagedError: where the file's bytes are not what was written.
        TrainingError: where it belongs to another training; the message says in what they differ.
    """
    tensors, card = unpack(_bytes_of(path), str(path))
    if card.get("checkpoint") != FORMAT:
        raise TrainingError(
            f"{path} is no checkpoint of a training (of format {FORMAT}). "
            "Give another file name for the checkpoint."
        )
    saved = _checkpoint(path, tensors, card)
    if different := differences(saved.identity, identity):
        raise TrainingError(
            f"{path} is the checkpoint of another training (- its, + this one's):\n"
            + "\n".join(different)
            + "\nTrain with what it has, or remove it to start over."
        )
    if different := differences(saved.computed_with, computed_with):
        warnings.warn(
            f"{path} was computed with something else (- then, + here), so the training goes on, "
            "but not bit for bit:\n" + "\n".join(different),
            stacklevel=4,  # the caller of fit
        )
    return saved


def _bytes_of(path: Path) -> bytes:
    try:
        return read_checked(path)
    except OSError as error:
        raise TrainingError(f"cannot read the checkpoint {path}: {reason(error)}") from error


def _checkpoint(path: Path, tensors: Mapping[str, Tensor], card: Mapping[str, Any]) -> Checkpoint:
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS}
    try:
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        return Checkpoint(
            identity=dict(card["identity"]),
            computed_with=dict(card["computed_with"]),
            step=int(card["step"]),
            epochs=int(card["epochs"]),
            start_accuracy=float(card["start_accuracy"]),
            best_accuracy=float(card["best_accuracy"]),
            **parts,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedError(
            f"{path}: a checkpoint without its parts ({type(error).__name__}: {error}). "
            "Remove it to start over."
        ) from None


def differences(saved: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """Two lines for every key in which they differ; a tuple is what JSON makes of it, a list."""
    ours = json.loads(json.dumps(ours))
    lines = []
    for key in sorted({*saved, *ours}):
        if saved.get(key) != ours.get(key):
            lines += [f"- {key} {_shown(saved.get(key))}", f"+ {key} {_shown(ours.get(key))}"]
    return lines


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]} ..."


@contextmanager
def forgotten_if_diverged(checkpoint: Path) -> Iterator[None]:
    """For a training and what looks at its network: where either diverges the checkpoint goes, as
    from there it would again.
    """
    try:
        yield
    except DivergedError:
        checkpoint.unlink(missing_ok=True)
        raise
