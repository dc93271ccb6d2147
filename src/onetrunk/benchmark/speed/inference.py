"""One forward: the plain backbone with its norms folded, merged and unmerged domains, runtimes."""

import functools
import io
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from ...core.adapters import Norm
from ...core.merge import merge
from ...errors import MissingExtraError, OnetrunkError, SpecError
from ...export import export
from ...export.onnx import require
from .rounds import Call, Contest
from .subjects import Subject, device, peft, quiet

REFERENCE = "plain, norms folded"
BATCHES = (1, 16)


def contests(subject: Subject, compiled: bool = True) -> Iterator[Contest]:
    """Forwards on one backbone, one image and sixteen at a time; every head has ten classes."""
    domain, plain = subject.domain(None).eval(), subject.domain(Norm()).eval()
    networks: dict[str, nn.Module] = {
        REFERENCE: _laid_out(merge(plain)),
        "plain": _laid_out(merge(plain, fold_norms=False)),
        "merged": _laid_out(merge(domain)),
        "unmerged": domain,
    }
    skipped: dict[str, str] = {}
    if compiled:
        networks["merged, torch.compile"] = torch.compile(networks["merged"])  # type: ignore[assignment]
    data = functools.cache(lambda: _onnx_file(domain))  # for two that read it
    makers: dict[str, Callable[[], nn.Module]] = {
        "PEFT, merged": lambda: _peft_merged(merge(plain, fold_norms=False), domain),
        "ONNX Runtime": lambda: _onnx_runtime(data()),
        "OpenVINO": lambda: _openvino(data()),
    }
    for name, make in makers.items():
        try:
            networks[name] = make()
        except OnetrunkError as error:
            skipped[name] = str(error)
    for batch in BATCHES:
        x_bchw = subject.images(batch)
        calls = {name: _forward(network, x_bchw) for name, network in networks.items()}
        title = f"{subject.title}, batch {batch}"
        yield Contest("inference", title, REFERENCE, calls, {"merged": 1.0}, skipped=skipped)


def _laid_out(network: nn.Module) -> nn.Module:
    return network.eval().to(memory_format=torch.channels_last)


def _forward(network: nn.Module, x_bchw: Tensor) -> Call:
    @torch.inference_mode()
    def forward() -> None:
        network(x_bchw)

    return forward


def _peft_merged(network: nn.Module, domain: nn.Module) -> nn.Module:
    from ..lora import matched_ranks

    library, ranks = peft(), matched_ranks(domain)
    config = library.LoraConfig(r=1, lora_alpha=1, target_modules=list(ranks), rank_pattern=ranks)
    with quiet():
        wrapped = library.get_peft_model(network, config)
        return _laid_out(wrapped.merge_and_unload())


class _Runs(nn.Module):
    """A runtime's network, called as a module."""

    def __init__(self, run: object) -> None:
        super().__init__()
        self.run = run

    def forward(self, x_bchw: Tensor) -> object:
        return self.run(x_bchw.contiguous().numpy())  # type: ignore[operator]


def _onnx_file(domain: nn.Module) -> bytes:
    if device() != "cpu":
        raise SpecError("timed on the CPU only, and this run is on a GPU.")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "network.onnx"
        export(domain, out)
        return out.read_bytes()


def _onnx_runtime(data: bytes) -> nn.Module:
    (runtime,) = require("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return _Runs(lambda x: session.run(None, {"images": x}))


def _openvino(data: bytes) -> nn.Module:
    try:
        import openvino
    except ImportError as error:
        raise MissingExtraError(
            'OpenVINO is not installed: pip install "onetrunk[rivals]"'
        ) from error
    core = openvino.Core()
    # float32 as the others: on processors with AMX its own choice is bfloat16
    wanted = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    core.set_property("CPU", wanted)
    return _Runs(core.compile_model(core.read_model(io.BytesIO(data)), "CPU"))
