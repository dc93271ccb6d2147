"""onnx: one file that ONNX Runtime, OpenVINO and others run.

The input is `images` (batch, c, h, w), the output `logits` (batch, classes); class names and
preprocessing are in the model's metadata.
"""

import json
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core.domain import domain_of, own_size
from ..core.merge import merge
from ..core.mix import Mixed, mix
from ..core.tree import on_cpu
from ..errors import ExportError, MissingExtraError
from .base import (
    Exported,
    Format,
    checked,
    export_checked,
    for_export,
    metadata,
    refuse_place,
    save,
    seen,
    two_of,
)
from .program import first_cause, quietly, traced

OPSET = 18
LIMIT_BYTES = 2_000_000_000  # of one protobuf file


def export_onnx(model: nn.Module, out: Path, images_bchw: Tensor) -> Exported:
    """Writes the merged network as one ONNX file for any number of images.

    Raises:
        ExportError: where its weights pass two gigabytes.
        MissingExtraError: where onnx, onnxscript or onnxruntime is not installed.
    """
    merged, example = for_export(model, merge(model), images_bchw)
    write = writer(merged, (example,), ("images",), "logits", metadata(model), out)
    return export_checked(model, merged, out, "onnx", images_bchw, write, _read)


def writer(
    network: nn.Module,
    examples: tuple[Tensor, ...],
    names: tuple[str, ...],
    output: str,
    texts: dict[str, str],
    out: Path,
) -> Callable[[Path], None]:
    """What writes a network to a path, its inputs' first axes dynamic and equal."""
    onnx = require("onnx", "onnxscript", "onnxruntime")[0]
    n_bytes = sum(t.numel() * t.element_size() for t in network.state_dict().values())
    if n_bytes > LIMIT_BYTES:
        raise ExportError(
            f"{out}: {n_bytes / 1e9:.1f} GB of weights do not fit one ONNX file, which holds 2 GB. "
            "Use --format pt2 or safetensors."
        )

    _refuse_unknown_type(examples[0])

    def write(path: Path) -> None:
        program = traced(network, examples)
        try:
            with quietly():
                made = torch.onnx.export(
                    program, dynamo=True, opset_version=OPSET, input_names=list(names),
                    output_names=[output], external_data=False, verbose=False,
                )  # fmt: skip
            proto: Any = made.model_proto  # type: ignore[union-attr]  # with dynamo=True
            _name_batch(proto.graph)
            onnx.helper.set_model_props(proto, texts)
            onnx.checker.check_model(proto)
        except Exception as error:  # whatever the exporter raises is only reported
            raise ExportError(
                f"{type(network).__name__} cannot be translated into ONNX ({first_cause(error)}). "
                "Export it with --format pt2 or safetensors."
            ) from error
        path.write_bytes(proto.SerializeToString())

    return write


def _name_batch(graph: Any) -> None:
    """`batch` in the place of torch's symbol (s77), and of expressions of it (4*s77)."""
    symbol = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(rf"\b{symbol}\b", "batch", dim.dim_param)


def _refuse_unknown_type(images_bchw: Tensor) -> None:
    if images_bchw.dtype not in (torch.float32, torch.float16):
        raise ExportError(
            f"the domain's network is in {images_bchw.dtype}, in which ONNX Runtime has no "
            "convolutions on a CPU: the file could not be checked. Export model.float()."
        )


def require(*packages: str) -> list[Any]:
    """The packages of the extra `export`.

    Raises:
        MissingExtraError: where one is not installed.
    """
    import importlib

    found = []
    for package in packages:
        try:
            found.append(importlib.import_module(package))
        except ImportError as error:
            raise MissingExtraError(
                f'ONNX needs {package}, which is not installed: pip install "onetrunk[export]"'
            ) from error
    return found


def session(path: Path) -> Any:
    """An ONNX Runtime session on the CPU."""
    (ort,) = require("onnxruntime")
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def _read(path: Path) -> Callable[[Tensor], Tensor]:
    run = session(path)

    def call(x_bchw: Tensor) -> Tensor:
        (logits,) = run.run(None, {"images": x_bchw.cpu().numpy()})
        return torch.from_numpy(logits).to(x_bchw.device)

    return call


class _ByIndex(nn.Module):
    """A mixture as a graph: images and the domain of each row in, padded scores out."""

    def __init__(self, mixed: Mixed) -> None:
        super().__init__()
        self.mixed = mixed

    def forward(self, images: Tensor, domain: Tensor) -> Tensor:
        return self.mixed.padded(images, domain)


def export_together(
    models: Mapping[str, nn.Module], out: Path, images_bchw: Tensor | None = None
) -> Exported:
    """Writes several domains as one ONNX file with the domain of each row as an input.

    The inputs are `images` (batch, c, h, w) and `domain` (batch,), places in the metadata's
    `domains`; the output `logits` is (batch, c_max), -inf behind the classes of a row's own domain.

    Args:
        models: name -> a domain's network, all of one backbone and one image size.
        images_bchw: prepared images for the check of every domain; by default noise.

    Raises:
        MixError: where the domains cannot be mixed.
        ExportError: where they take images of different sizes, or the file's network differs from a
            domain's own beyond rounding; nothing is written then.
        MissingExtraError: where onnx, onnxscript or onnxruntime is not installed.
    """
    refuse_place(out)
    _refuse_other_sizes(models)
    mixed = mix(models).cpu()
    models = {name: on_cpu(model) for name, model in models.items()}
    first = next(iter(models.values()))
    images_bchw = seen(first, images_bchw)
    examples = two_of(images_bchw).contiguous(), torch.arange(2) % len(models)
    texts = {name: metadata(model) for name, model in models.items()}
    known = {
        "domains": json.dumps(list(models)),
        "classes": json.dumps([json.loads(t["classes"]) for t in texts.values()]),
        "preprocessing": json.dumps([json.loads(t["preprocessing"]) for t in texts.values()]),
        **{key: metadata(first)[key] for key in ("backbone", "image", "onetrunk")},
    }
    write = writer(_ByIndex(mixed), examples, ("images", "domain"), "logits", known, out)
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / "network.onnx"
        write(draft)
        run, found = session(draft), []
        for k, (name, model) in enumerate(models.items()):

            def row(x_bchw: Tensor, k: int = k, name: str = name) -> Tensor:
                index = np.full(len(x_bchw), k, dtype=np.int64)
                (scores,) = run.run(None, {"images": x_bchw.numpy(), "domain": index})
                return torch.from_numpy(scores[:, : len(mixed.classes(name))])

            found.append(checked(out, model, row, images_bchw))
        data = draft.read_bytes()
    save(out, data)
    numbers = sum(t.numel() for t in mixed.state_dict().values())
    worst = max(found, key=lambda f: f["difference"])
    return Exported(str(out), "onnx", len(data), numbers, None, **worst)


def _refuse_other_sizes(models: Mapping[str, nn.Module]) -> None:
    sizes = {name: own_size(domain_of(model)) for name, model in models.items()}
    first = next(iter(sizes))
    for name, size in sizes.items():
        if size != sizes[first]:
            raise ExportError(
                f"{first!r} takes images of {_written(sizes[first])}, {name!r} of "
                f"{_written(size)}: one graph has one size. Export them one by one, or train "
                "them at one --size."
            )


def _written(size: tuple[int, ...] | None) -> str:
    return "an unknown size" if size is None else " x ".join(map(str, size))


FORMAT = Format("onnx", export_onnx)
"""One graph."""
