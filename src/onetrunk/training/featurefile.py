"""One file of cached features: a safetensors file whose every byte is known before it is read.

    8 bytes      the header's length
    header       JSON: the facts that the features follow from, their type and shape, then spaces
    features     (views, images, ...), mapped into memory, never read as a whole
    sha256       32 bytes, over everything before

A file is used only where its header is, byte for byte, the one that these facts would be written
with, its length is right and its hash too (about 1 GB/s); anything else is computed again.
"""

import hashlib
import json
import math
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import TrainingError
from ..files import DISK, is_temporary, reason, write_parts_atomically

FORMAT = 1
N_HASH = 32
ABANDONED_S = 3600.0  # a temporary file that nobody wrote to for so long has lost its writer
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}


@dataclass(frozen=True)
class FeatureFile:
    """Where features lie and what they are.

    Args:
        folder: where the file is; its name is the digest of the facts.
        facts: JSON values that the features follow from.
        shape: views, images, and the axes of one image's features.
        dtype: the features' type.
    """

    folder: Path
    facts: Mapping[str, Any]
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / f"{digest_of(self.facts)[:32]}.safetensors"

    @property
    def n_bytes(self) -> int:
        """Bytes of the features alone."""
        return n_bytes(self.shape, self.dtype)

    def read(self) -> Tensor | None:
        """The features, mapped into memory; None where they are to be computed.

        Warns where there is a file that is not what was written.

        Raises:
            TrainingError: where something else than a file has that name, or it cannot be read.
        """
        try:
            facts = DISK.facts(self.path)
            if facts.kind != "file":
                raise TrainingError(
                    f"{self.path} is where cached features belong, and it is no regular file. "
                    "Move it away, or give another folder."
                )
            mapped = np.memmap(self.path, np.uint8, mode="c") if facts.size else np.empty(0)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise TrainingError(f"cannot read cached features: {reason(error)}") from error
        head = self._head()
        if (wrong := self._wrong_with(mapped, head)) is not None:
            warnings.warn(
                f"{self.path}: these cached features {wrong}, so they are computed again.",
                stacklevel=5,  # the caller of cached
            )
            return None
        inside = torch.from_numpy(mapped[len(head) : -N_HASH])
        return inside.view(self.dtype).view(self.shape)

    def write(self, batches: Iterable[Tensor]) -> None:
        """Writes batches of images' features, view after view; whole or not at all.

        Raises:
            TrainingError: where the file system refuses.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(self.folder)
            write_parts_atomically(self.path, self._parts(batches))
        except OSError as error:
            raise TrainingError(
                f"cannot compute or write cached features: {reason(error)}"
            ) from error

    def _parts(self, batches: Iterable[Tensor]) -> Iterator[bytes]:
        head = self._head()
        sha256 = hashlib.sha256(head)
        yield head
        for batch in batches:
            part = batch.contiguous().view(torch.uint8).numpy().tobytes()
            sha256.update(part)
            yield part
        yield sha256.digest()

    def _head(self) -> bytes:
        end = self.n_bytes
        header = {
            "__metadata__": {"onetrunk": _canonical({"features": FORMAT, "facts": self.facts})},
            "features": _entry(_NAMES[self.dtype], self.shape, 0, end),
            "sha256": _entry("U8", (N_HASH,), end, end + N_HASH),
        }
        text = json.dumps(header).encode()
        text += b" " * (-(8 + len(text)) % 64)  # so that the features are aligned
        return len(text).to_bytes(8, "little") + text

    def _wrong_with(self, mapped: np.ndarray[Any, Any], head: bytes) -> str | None:
        expected = len(head) + self.n_bytes + N_HASH
        if len(mapped) != expected:
            return f"have {len(mapped):,} bytes where {expected:,} were written"
        if mapped[: len(head)].tobytes() != head:
            return "say that they are of something else"
        if hashlib.sha256(mapped[:-N_HASH].data).digest() != mapped[-N_HASH:].tobytes():
            return "do not match their own checksum"
        return None


def digest_of(facts: Mapping[str, Any]) -> str:
    """SHA-256 of JSON values."""
    return hashlib.sha256(_canonical(facts).encode()).hexdigest()


def n_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of a tensor."""
    return math.prod(shape) * dtype.itemsize


def _entry(name: str, shape: tuple[int, ...], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": name, "shape": list(shape), "data_offsets": [begin, end]}


def _canonical(value: Mapping[str, Any]) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False)


def _remove_abandoned(folder: Path) -> None:
    for name in DISK.names(folder):
        with suppress(FileNotFoundError):  # another process removed it
            written_ns = DISK.facts(folder / name).stamp[2]
            if is_temporary(name) and time.time() - written_ns / 1e9 > ABANDONED_S:
                DISK.unlink(folder / name)
