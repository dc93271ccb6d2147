"""export: a domain merged into an ordinary network, its weights in one safetensors file."""

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from ..backbones.written_form import written_form
from ..core.attach import domain_of
from ..core.merge import difference, merge
from ..errors import BankError
from ..files import write_atomically

N_CHECKED = 8  # random images on which the merged network is compared


def export_weights(model: nn.Module, out: Path) -> dict[str, Any]:
    """Writes the merged weights and says how far they are from the domain's network.

    Raises:
        MergeError: where the domain does not merge exactly; nothing is written.
        BankError: where the file cannot be written.
    """
    domain = domain_of(model)
    size_px = domain.preprocessing.size_px if domain.preprocessing else 64
    channels = domain.preprocessing.channels if domain.preprocessing else 3
    generator = torch.Generator().manual_seed(0)
    images_bchw = torch.randn(N_CHECKED, channels, size_px, size_px, generator=generator)
    merged = merge(model, check=images_bchw)
    tensors = {name: t.detach().contiguous() for name, t in merged.state_dict().items()}
    preprocessing = domain.preprocessing and domain.preprocessing.to_json()
    metadata = {
        "format": "pt",
        "backbone": written_form(domain.backbone),
        "classes": json.dumps(list(domain.classes)),
        "preprocessing": json.dumps(preprocessing),
        "merged_by": "onetrunk: adapters and following batch norms are folded in",
    }
    data = safetensors.torch.save({n: t.clone() for n, t in tensors.items()}, metadata)
    try:
        write_atomically(out, data)
    except OSError as error:
        raise BankError(f"{out} could not be written: {error.strerror}.") from error
    return {
        "file": str(out),
        "bytes": len(data),
        "numbers": sum(t.numel() for t in tensors.values()),
        **difference(model, merged, images_bchw),
    }
