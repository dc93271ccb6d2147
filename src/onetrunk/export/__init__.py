"""export: a domain merged into an ordinary network, in one file that needs no onetrunk.

One file a format; to add one: a module with `FORMAT` and its line in FORMATS. What is written was
read back and run before on real images, and gave what the domain's own network gives; else there is
no file.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from ..core.tree import on_cpu
from ..errors import ExportError
from . import onnx, pt2, weights
from .base import Exported as Exported
from .base import Format, refuse_place, seen
from .onnx import export_together as export_together

FORMATS: Mapping[str, Format] = {f.name: f for f in (weights.FORMAT, pt2.FORMAT, onnx.FORMAT)}


def export(
    model: nn.Module, out: str | Path, *, format: str | None = None, images: Tensor | None = None
) -> Exported:
    """Writes a domain's merged network as one file.

    Args:
        model: a domain's network; it is left as it was.
        out: the file; its ending names the format where `format` does not.
        format: `safetensors` (weights), `pt2` (torch.export) or `onnx`; the last two take any
            number of images at a time, of the domain's own size.
        images: prepared images (b, c, h, w) on which the file is compared with the domain's own
            network, at most 8 of them; by default noise. All of it happens on the CPU.

    Raises:
        ExportError: for an unknown format, and where the file's network differs beyond rounding;
            nothing is written then.
        MergeError: where the domain does not merge exactly.
        MissingExtraError: where the format's package is not installed.
        BankError: where the file cannot be written.
    """
    out = Path(out)
    name = format or out.suffix.removeprefix(".")
    if name not in FORMATS:
        given = f"format {name!r}" if format else f"the ending of {out.name}"
        raise ExportError(f"{given} is none of {', '.join(FORMATS)}. Use --format, or format=.")
    refuse_place(out)
    model = on_cpu(model)  # where a file is read; GPUs round convolutions to TensorFloat-32
    return FORMATS[name].export(model, out, seen(model, images))
