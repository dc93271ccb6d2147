"""pt2: torch.export's format, a zip of weights and graph that torch.export.load reads.

`torch.export.load(FILE).module()(images)` runs it; class names and preprocessing are extra files of
the archive. Its tensors are raw bytes and nothing in it is pickled.
"""

import io
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from ..core.merge import merge
from ..errors import ExportError
from .base import Exported, Format, export_checked, for_export, metadata
from .program import traced


def export_pt2(model: nn.Module, out: Path, images_bchw: Tensor) -> Exported:
    """Writes the merged network as a torch.export program for any number of images."""
    merged, example = for_export(model, merge(model), images_bchw)
    texts = metadata(model)

    def write(path: Path) -> None:
        program = traced(merged, (example,))
        _leave_examples_out(program)
        buffer = io.BytesIO()
        torch.export.save(program, buffer, extra_files=dict(texts))
        path.write_bytes(buffer.getvalue())

    return export_checked(model, merged, out, "pt2", images_bchw, write, _read)


def _leave_examples_out(program: ExportedProgram) -> None:
    """Takes off the program, in place, what torch would pickle into its file.

    Raises:
        ExportError: where this torch (2.6 is known) saves no program without them.
    """
    try:
        program.example_inputs = None
    except ValueError as error:
        raise ExportError(
            f"torch {torch.__version__} pickles a program's example inputs into a .pt2 file, and "
            "nothing here is pickled. Export with a newer torch (2.14 is known to do), or "
            "--format safetensors."
        ) from error


def _read(path: Path) -> Callable[[Tensor], Tensor]:
    network = torch.export.load(io.BytesIO(path.read_bytes())).module()
    return lambda x_bchw: network(x_bchw.cpu()).to(x_bchw.device)


FORMAT = Format("pt2", export_pt2)
"""One program."""
