"""What every export format does: write, read back, run, compare, and only then appear."""

import importlib.metadata
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..backbones import fingerprint
from ..core.domain import domain_of, own_size
from ..core.merge import difference
from ..core.trace import trace
from ..core.tree import reference_of
from ..errors import BankError, ExportError
from ..files import reason, write_atomically

N_CHECKED = 8  # images on which an export is compared


@dataclass(frozen=True)
class Exported:
    """What was written.

    Args:
        file, format, bytes, numbers: the file, and the numbers of the network in it.
        architecture: the written form of the stock architecture that the weights load into; None
            where there is none, or the file holds the whole network.
        difference, noise, limit: as `merge.difference` gives them, of the file's network.
    """

    file: str
    format: str
    bytes: int
    numbers: int
    architecture: str | None
    difference: float
    noise: float
    limit: float


@dataclass(frozen=True)
class Format:
    """A kind of file: its name, which is its ending, and what writes one."""

    name: str
    export: Callable[[nn.Module, Path, Tensor], Exported]


def seen(model: nn.Module, images_bchw: Tensor | None) -> Tensor:
    """What the check looks at, as `model` takes it; noise of the domain's size for None."""
    domain, like = domain_of(model), reference_of(model)
    if images_bchw is None:
        size = own_size(domain) or trace(domain.backbone).input_size
        generator = torch.Generator().manual_seed(0)
        images_bchw = torch.randn((N_CHECKED, *size), generator=generator)
    return images_bchw[:N_CHECKED].to(like.device, like.dtype)


def metadata(model: nn.Module) -> dict[str, str]:
    """What a reader needs beside the network: JSON texts by name."""
    domain = domain_of(model)
    preprocessing = domain.preprocessing and domain.preprocessing.to_json()
    shape = own_size(domain) or trace(domain.backbone).input_size
    return {
        "onetrunk": importlib.metadata.version("onetrunk"),
        "image": json.dumps(list(shape)),
        "classes": json.dumps(list(domain.classes)),
        "preprocessing": json.dumps(preprocessing),
        "backbone": fingerprint(domain.backbone),
    }


def export_checked(
    model: nn.Module,
    merged: nn.Module,
    out: Path,
    name: str,
    images_bchw: Tensor,
    write: Callable[[Path], None],
    read: Callable[[Path], Callable[[Tensor], Tensor]],
    architecture: str | None = None,
) -> Exported:
    """The file that `write` makes, once what `read` gives of it computes what the domain does."""
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / f"network.{name}"
        write(draft)
        found = checked(out, model, read(draft), images_bchw)
        data = draft.read_bytes()
    save(out, data)
    numbers = sum(t.numel() for t in merged.state_dict().values())
    return Exported(str(out), name, len(data), numbers, architecture, **found)


def checked(
    out: Path, model: nn.Module, run: Callable[[Tensor], Tensor], images_bchw: Tensor
) -> dict[str, float]:
    """`difference` to the domain's own network, the file's run in batches of several sizes.

    Raises:
        ExportError: where that is beyond rounding.
    """
    sizes = [1, 3, len(images_bchw)]

    def in_batches(x_bchw: Tensor) -> Tensor:
        return torch.cat([run(part) for part in x_bchw.split(_cut(len(x_bchw), sizes))])

    # noise is measured over all images at once: one image alone may have next to none by chance
    found = difference(model, in_batches, images_bchw)
    if not found["difference"] <= found["limit"]:
        raise ExportError(
            f"{out} was not written: read back, its network differs from the domain's by "
            f"{found['difference']:.1e} of the largest logit, where {found['limit']:.1e} is the "
            f"limit (rounding noise {found['noise']:.1e})."
        )
    return found


def _cut(n: int, sizes: list[int]) -> list[int]:
    """`n` as a sum of the sizes in turn, the last one cut."""
    found: list[int] = []
    while sum(found) < n:
        found.append(min(sizes[len(found) % len(sizes)], n - sum(found)))
    return found


def refuse_place(out: Path) -> None:
    """Before the work: a file cannot take a folder's place, nor lie in a folder that is not there.

    Raises:
        BankError: where that is so.
    """
    if out.is_dir() or not out.parent.is_dir():
        what = "it is a folder" if out.is_dir() else f"there is no folder {out.parent}"
        raise BankError(f"{out} could not be written: {what}. Give the path of a file.")


def save(out: Path, data: bytes) -> None:
    """Writes the file whole or not at all."""
    try:
        write_atomically(out, data)
    except OSError as error:
        raise BankError(f"{out} could not be written: {reason(error)}") from error


def for_export(
    model: nn.Module, merged: nn.Module, images_bchw: Tensor
) -> tuple[nn.Module, Tensor]:
    """The merged network and example images on the CPU in plain layout, as exporters expect."""
    plain = merged.cpu().to(memory_format=torch.contiguous_format)
    return plain, two_of(images_bchw).cpu().contiguous()


def two_of(images_bchw: Tensor) -> Tensor:
    """Two images, the first twice where there is one: a graph of one would fix the number."""
    return images_bchw[:2] if len(images_bchw) > 1 else images_bchw.repeat(2, 1, 1, 1)
