"""export: a domain merged into an ordinary network, its weights in one safetensors file.

Where the stock architecture can hold the merged weights (adapters folded into its own layers, norms
with the domain's values), the file loads into it: timm.create_model(NAME, num_classes=...) and
load_state_dict, no onetrunk. Where it cannot (a layer that standardises its weight), the norms are
folded too and the file says so.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from ..backbones.written_form import build_empty, load_tensors, read_form, written_form
from ..core.attach import domain_of, own_size
from ..core.merge import difference, merge
from ..errors import BankError, OnetrunkError
from ..files import reason, write_atomically

N_CHECKED = 8  # random images on which the merged network is compared


def export_weights(model: nn.Module, out: Path) -> dict[str, Any]:
    """Writes the merged weights and says how far they are from the domain's network.

    Raises:
        MergeError: where the domain does not merge exactly; nothing is written.
        BankError: where the file cannot be written.
    """
    domain = domain_of(model)
    channels, rows, columns = own_size(domain) or (3, 64, 64)
    generator = torch.Generator().manual_seed(0)
    images_bchw = torch.randn(N_CHECKED, channels, rows, columns, generator=generator)
    merged = merge(model, fold_norms=False)
    form = stock_form(domain.backbone, len(domain.classes))
    stock = None if form is None else _loaded(form, merged)
    if stock is not None and _agree(model, stock, images_bchw):
        merged = stock
    else:
        form, merged = None, merge(model, check=images_bchw)
    tensors = {name: t.detach().clone() for name, t in merged.state_dict().items()}
    preprocessing = domain.preprocessing and domain.preprocessing.to_json()
    metadata = {
        "format": "pt",
        "architecture": form or "norms folded: not a stock architecture",
        "classes": json.dumps(list(domain.classes)),
        "preprocessing": json.dumps(preprocessing),
    }
    data = safetensors.torch.save(tensors, metadata)
    try:
        write_atomically(out, data)
    except OSError as error:
        raise BankError(f"{out} could not be written: {reason(error)}") from error
    return {
        "file": str(out),
        "architecture": form,
        "bytes": len(data),
        "numbers": sum(t.numel() for t in tensors.values()),
        **difference(model, merged, images_bchw),
    }


def stock_form(backbone: nn.Module, n_classes: int) -> str | None:
    """The written form of `backbone` with another number of classes; None for a user's own."""
    form = written_form(backbone)
    if form.startswith("module:"):
        return None
    read = read_form(form)
    return str(dataclasses.replace(read, options={**read.options, "num_classes": n_classes}))


def _loaded(form: str, merged: nn.Module) -> nn.Module | None:
    """The stock architecture with the merged weights; None where they do not fit."""
    try:
        stock = build_empty(form)
        load_tensors(stock, merged.state_dict(), form)
    except OnetrunkError:
        return None
    return stock


def _agree(model: nn.Module, stock: nn.Module, images_bchw: torch.Tensor) -> bool:
    found = difference(model, stock, images_bchw)
    return found["difference"] <= found["limit"]
