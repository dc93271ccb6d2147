"""safetensors: the merged weights alone, for the architecture they belong to.

Where the stock architecture can hold them (adapters folded into its own layers, norms with the
domain's values), the file loads into it: timm.create_model(NAME, num_classes=...) and
load_state_dict, no onetrunk. Where it cannot (a layer that standardises its weight), the norms are
folded too and the file says so.
"""

from pathlib import Path

import safetensors.torch
from torch import Tensor, nn

from ..backbones.written_form import build_empty, load_tensors, stock_form
from ..core.domain import domain_of
from ..core.merge import difference, merge
from ..errors import OnetrunkError
from .base import Exported, Format, export_checked, metadata


def export_weights(model: nn.Module, out: Path, images_bchw: Tensor) -> Exported:
    """Writes the merged weights."""
    domain = domain_of(model)
    merged = merge(model, fold_norms=False)
    form = stock_form(domain.backbone, len(domain.classes))
    stock = None if form is None else _loaded(form, merged)
    if stock is not None and _agree(model, stock, images_bchw):
        merged = stock
    else:
        form, merged = None, merge(model, check=images_bchw)
    texts = {
        "format": "pt",
        "architecture": form or "norms folded: not a stock architecture",
        **metadata(model),
    }
    network = merged

    def write(path: Path) -> None:
        tensors = {n: t.detach().clone().contiguous() for n, t in network.state_dict().items()}
        path.write_bytes(safetensors.torch.save(tensors, texts))

    def read(path: Path) -> nn.Module:
        network.load_state_dict(safetensors.torch.load(path.read_bytes()))
        return network.eval()

    return export_checked(model, merged, out, "safetensors", images_bchw, write, read, form)


def _loaded(form: str, merged: nn.Module) -> nn.Module | None:
    """The stock architecture with the merged weights; None where they do not fit."""
    try:
        stock = build_empty(form).to(next(merged.parameters()).dtype)
        load_tensors(stock, merged.state_dict(), form)
    except OnetrunkError:
        return None
    return stock


def _agree(model: nn.Module, stock: nn.Module, images_bchw: Tensor) -> bool:
    found = difference(model, stock, images_bchw)
    return found["difference"] <= found["limit"]


FORMAT = Format("safetensors", export_weights)
"""Weights without a network."""
