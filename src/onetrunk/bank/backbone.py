"""The backbone that a bank holds: what it may be, and whether it still is what it was."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..backbones import backbone as build_backbone
from ..backbones import fingerprint
from ..backbones.written_form import OWN_MODULE, build_empty, load_tensors, read_form, size_of
from ..core.domain import Domain
from ..core.tree import storage_key
from ..errors import BankError, DamagedError, told
from ..tensorfile import unpack

# What timm would read files or addresses from, or build another kind of network with.
_UNSAFE_OPTIONS = ("checkpoint_path", "cache_dir", "features_only")
MAX_GROWTH = 8  # of stored weights in memory before they are looked at: float16 or int8 ones grow


@dataclass
class Checked:
    """A backbone that had this fingerprint when its tensors had this stamp."""

    module: nn.Module
    fingerprint: str
    stamp: tuple[object, ...]

    @classmethod
    def of(cls, module: nn.Module, known: str) -> "Checked":
        return cls(module, known, stamp_of(module))


def stamp_of(module: nn.Module) -> tuple[object, ...]:
    """Changes when a stored tensor of `module` is written to or replaced; looks at no bytes.

    Not where it is written to through `.data`, which PyTorch's versions leave out.
    """
    return tuple(
        (name, storage_key(t), t.dtype, 0 if t.is_inference() else t._version)
        for name, t in module.state_dict(keep_vars=True).items()
    )


def place_of(backbone: nn.Module) -> torch.device:
    tensors = itertools.chain(backbone.parameters(), backbone.buffers())
    return next((t.device for t in tensors), torch.device("cpu"))


def rebuilt(form: str, blob: bytes | None, path: Path) -> nn.Module:
    """The backbone of the bank at `path`, from its stored weights or, where none are, its name.

    Raises:
        BankError: where it is a user's own module, which no form brings back.
        DamagedError: where the form names files or addresses, or the weights do not fit it.
    """
    if form.startswith(OWN_MODULE):
        raise BankError(
            f"bank {path} was made with a module of your own, {form.removeprefix(OWN_MODULE)}: "
            "open it with Bank.open(path, backbone=that_module)."
        )
    _refuse_unsafe(form, f"bank {path}")
    if blob is None:
        return build_backbone(form)
    tensors, _ = unpack(blob, f"the backbone of {path}", trusted=True)
    n_bytes = sum(tensor.nbytes for tensor in tensors.values())
    if (n_wanted := size_of(form)) > MAX_GROWTH * n_bytes:
        raise DamagedError(
            f"the backbone of {path} is written {form[:200]!r}, which takes {n_wanted:,} bytes, "
            f"and its file holds {n_bytes:,}. Get the bank from somebody you trust."
        )
    module = build_empty(form)
    _take_dtypes(module, tensors)
    load_tensors(module, tensors, f"the backbone of {path}")
    return module


def _take_dtypes(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Gives `module`'s parameters and buffers the types of the stored ones."""
    for name, own in module.state_dict(keep_vars=True).items():
        if name in tensors and own.dtype != tensors[name].dtype:
            own.data = own.data.to(tensors[name].dtype)


def usable_device(device: str | torch.device) -> torch.device:
    """The device by that name. Raises BankError where this machine or build of torch has none."""
    try:
        found = torch.empty(0, device=device)
        problem = "it holds no numbers" if found.is_meta else ""
    except (RuntimeError, AssertionError, TypeError) as error:
        problem = told(error)
    if problem:
        raise BankError(
            f"device={str(device)!r} cannot be used: {problem}. Use 'cpu', or a device that this "
            "machine and this build of torch have."
        )
    return found.device


def refuse_no_backbone(module: object) -> None:
    if not isinstance(module, nn.Module):
        raise BankError(
            f"backbone is of type {type(module).__name__}: give the module itself, or for a new "
            "bank its written form, e.g. 'timm:resnet18.a1_in1k'."
        )
    if isinstance(getattr(module, "domain", None), Domain):
        raise BankError(
            "this is a domain's network and no backbone. Give model.domain.backbone, and add the "
            "domain to the bank."
        )


def refuse_reference(form: str, found: str, *, known: bool) -> None:
    if form.startswith(OWN_MODULE):
        raise BankError(
            f"{form} cannot be kept by reference: it has no name that brings its weights back. "
            "Leave by_reference out, so that the bank holds them."
        )
    if not known and fingerprint(build_backbone(form)) != found:
        raise BankError(
            f"{form} brings other weights than this backbone has, so that it cannot be kept by "
            "reference. Leave by_reference out, so that the bank holds them."
        )


def _refuse_unsafe(form: str, where: str) -> None:
    """Refuses a form from a file whose options name files or addresses: none is ever followed."""
    for key, value in read_form(form).options.items():
        if key in _UNSAFE_OPTIONS or key.startswith("pretrained") or isinstance(value, dict):
            raise DamagedError(
                f"{where}: its backbone is written {form[:200]!r}, and the option {key!r} may name "
                "a file or an address, which is never followed. Get the bank from somebody you "
                "trust."
            )
