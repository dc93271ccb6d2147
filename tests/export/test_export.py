"""export: what another program reads is the domain's network, or there is no file."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import onetrunk as ot
from onetrunk.core.domain import delta
from onetrunk.errors import BankError, ExportError, MissingExtraError, MixError
from onetrunk.export import FORMATS, export, export_together
from onetrunk.export import base as base_module
from onetrunk.export.onnx import LIMIT_BYTES, session, writer

CLASSES = ("daisy", "rose", "tulip")
FAMILIES = (
    ot.Series(), ot.Parallel(), ot.LowRank(2), ot.Channelwise(), ot.Norm(), ot.Full(), ot.Head(),
)  # fmt: skip


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, 2, 1, groups=2), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 4),
    )  # fmt: skip


@pytest.fixture(scope="module")
def make(net: nn.Module) -> Callable[..., nn.Module]:
    def made(family: Any = None, classes: tuple[str, ...] = CLASSES, size_px: int = 16) -> Any:
        size = (3, size_px, size_px)
        model = ot.attach(net, family or ot.Parallel(), classes, input_size=size)
        generator = torch.Generator().manual_seed(1)
        for name, tensor in delta(model).items():
            if tensor.is_floating_point():
                drawn = 0.5 * torch.randn(tensor.shape, generator=generator)
                tensor.copy_(drawn.abs() + 0.5 if name.endswith("running_var") else drawn)
        return model.eval()

    return made


def images(n: int = 5) -> Tensor:
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_a_pt2_file_runs_without_onetrunk_at_any_batch_size(
    make: Callable[..., nn.Module], family: Any, tmp_path: Path
) -> None:
    model, out = make(family), tmp_path / "flowers.pt2"
    report = export(model, out, images=images())
    assert report.difference <= report.limit and report.bytes == out.stat().st_size
    texts = {"classes": "", "preprocessing": "", "backbone": ""}
    network = torch.export.load(out, extra_files=texts).module()
    for n in (1, 2, 5):
        assert torch.allclose(network(images(n)), model(images(n)), atol=1e-5)
    assert json.loads(texts["classes"]) == list(CLASSES)
    assert json.loads(texts["preprocessing"])["size_px"] == 16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_of_any_type_load_into_the_stock_architecture(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    backbone = ot.backbone("resnet26(width=0.125)", pretrained=False).to(dtype)
    model = ot.attach(backbone, ot.Parallel(), CLASSES, input_size=(3, 16, 16)).eval()
    report = export(model, tmp_path / "flowers.safetensors", images=images())
    assert report.architecture == "resnet26(width=0.125, num_classes=3)"
    assert report.difference <= report.limit


def test_nothing_in_a_pt2_file_is_pickled(make: Callable[..., nn.Module], tmp_path: Path) -> None:
    import zipfile

    export(make(), tmp_path / "flowers.pt2")
    with zipfile.ZipFile(tmp_path / "flowers.pt2") as archive:
        starts = {name: archive.read(name)[:2] for name in archive.namelist()}
    pickled = [n for n, s in starts.items() if n.endswith((".pt", ".pkl")) and s]
    assert pickled == []


def test_an_onnx_file_runs_in_onnx_runtime_and_openvino(
    make: Callable[..., nn.Module], tmp_path: Path
) -> None:
    model, out = make(ot.Series()), tmp_path / "flowers.onnx"
    export(model, out, images=images())
    run = session(out)
    for n in (1, 3):
        (logits,) = run.run(None, {"images": images(n).numpy()})
        assert np.allclose(logits, model(images(n)).detach(), atol=1e-5)
    texts = run.get_modelmeta().custom_metadata_map
    assert json.loads(texts["classes"]) == list(CLASSES)
    assert json.loads(texts["preprocessing"])["size_px"] == 16 and len(texts["backbone"]) == 64
    assert json.loads(texts["image"]) == [3, 16, 16] and texts["onetrunk"] == ot.__version__
    openvino = pytest.importorskip("openvino")
    exact = {"INFERENCE_PRECISION_HINT": "f32"}  # else bfloat16 where the processor has AMX
    compiled = openvino.compile_model(openvino.Core().read_model(out), "CPU", exact)
    found = compiled(images(3).numpy())[0]
    assert np.allclose(found, model(images(3)).detach(), atol=1e-4)


def test_one_onnx_file_holds_many_domains(make: Callable[..., nn.Module], tmp_path: Path) -> None:
    models = {
        "flowers": make(ot.Parallel()),
        "signs": make(ot.LowRank(2), ("stop", "yield")),
        "digits": make(ot.Norm(), tuple("0123456789")),
    }
    out = tmp_path / "bank.onnx"
    report = export_together(models, out, images())
    assert report.difference <= report.limit
    run, rows = session(out), ["signs", "digits", "flowers", "signs"]
    names = json.loads(run.get_modelmeta().custom_metadata_map["domains"])
    assert names == list(models)
    index = np.array([names.index(row) for row in rows])
    (logits,) = run.run(None, {"images": images(4).numpy(), "domain": index})
    assert logits.shape == (4, 10)
    for k, row in enumerate(rows):
        own = models[row](images(4))[k].detach().numpy()
        assert np.allclose(logits[k, : len(own)], own, atol=1e-5)
        assert (logits[k, len(own) :] == -np.inf).all()


def test_one_limit_holds_for_all_images_in_batches_of_several_sizes(
    make: Callable[..., nn.Module],
) -> None:
    model, sizes = make(), []

    def run(x_bchw: Tensor) -> Tensor:
        sizes.append(len(x_bchw))
        return model(x_bchw).detach()

    assert base_module.checked(Path("x.pt2"), model, run, images(8))["difference"] < 1e-5
    assert sizes == [1, 3, 4]


def test_a_channels_last_network_and_a_folder_in_the_way(
    make: Callable[..., nn.Module], tmp_path: Path
) -> None:
    model = make().to(memory_format=torch.channels_last)
    report = export(model, tmp_path / "x.safetensors")
    assert report.difference <= report.limit
    (tmp_path / "x.onnx").mkdir()
    with pytest.raises(BankError, match=r"x\.onnx could not be written: it is a folder"):
        export(model, tmp_path / "x.onnx")


def test_weights_say_where_no_stock_architecture_fits(
    make: Callable[..., nn.Module], tmp_path: Path
) -> None:
    report = export(make(), tmp_path / "x.safetensors")
    assert report.architecture is None and report.difference <= report.limit
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert "norms folded" in file.metadata()["architecture"]


@pytest.mark.parametrize("name", FORMATS)
def test_an_export_that_computes_something_else_is_not_written(
    make: Callable[..., nn.Module], tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def far(*_: object) -> dict[str, float]:
        return {"difference": 0.5, "noise": 1e-7, "limit": 2e-6}

    monkeypatch.setattr(base_module, "difference", far)
    monkeypatch.setattr("onetrunk.core.merge.difference", far)
    with pytest.raises(ot.OnetrunkError, match=r"5.0e-01 of the largest"):
        export(make(), tmp_path / f"x.{name}", images=images())
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported_is_said_and_leaves_nothing(
    make: Callable[..., nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ExportError, match=r"ending of x\.bin is none of safetensors, pt2, onnx"):
        export(make(), tmp_path / "x.bin")
    with pytest.raises(ExportError, match="format 'tflite' is none of"):
        export(make(), tmp_path / "x.onnx", format="tflite")
    with pytest.raises(BankError, match="could not be written"):
        export(make(), tmp_path / "missing" / "x.safetensors")
    models = {"small": make(), "large": make(size_px=24)}
    with pytest.raises(ExportError, match="'small' takes images of 3 x 16 x 16, 'large' of 3 x 24"):
        export_together(models, tmp_path / "x.onnx")
    with pytest.raises(MixError, match="layers of its own"):
        export_together({"tuned": make(ot.Full())}, tmp_path / "x.onnx")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingExtraError, match=r"ONNX needs onnxscript.*onetrunk\[export\]"):
        export(make(), tmp_path / "x.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_torch_that_would_pickle_is_refused(tmp_path: Path, make: Callable[..., nn.Module],
                                              monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    def demanded(_program: Any, _inputs: Any) -> None:
        raise ValueError("Example inputs should be a tuple")  # as torch 2.6 does

    inputs = property(lambda _program: None, demanded)
    monkeypatch.setattr(torch.export.ExportedProgram, "example_inputs", inputs)
    with pytest.raises(ExportError, match=r"pickles a program's example inputs.*newer torch"):
        export(make(ot.Norm()), tmp_path / "x.pt2")
    assert list(tmp_path.iterdir()) == []


def test_what_makes_no_graph_is_said(
    tmp_path: Path, make: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x).mean((2, 3))
            return self.fc(y if float(y.detach().sum()) > 0 else -y)

    model = ot.attach(Branches(), ot.Parallel(), ("a", "b"), input_size=(3, 8, 8), head="fc")
    with pytest.raises(ExportError, match="Branches cannot be made into one graph"):
        export(model.eval(), tmp_path / "x.pt2")

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no such operator")

    monkeypatch.setattr(torch.onnx, "export", broken)
    with pytest.raises(ExportError, match=r"into ONNX \(RuntimeError: no such operator\)"):
        export(make(), tmp_path / "x.onnx")
    with pytest.raises(ExportError, match=r"in torch.bfloat16, in which ONNX Runtime has no"):
        export(make().bfloat16(), tmp_path / "x.onnx")
    assert list(tmp_path.iterdir()) == []


def test_files_tell_nothing_of_the_machine_that_wrote_them(
    make: Callable[..., nn.Module], tmp_path: Path
) -> None:
    export(make(), tmp_path / "x.onnx", images=images())
    export(make(), tmp_path / "x.pt2", images=images())
    here = str(Path(ot.__file__).parents[2]).encode()
    packages = b"site-packages"
    for name in ("x.onnx", "x.pt2"):
        data = (tmp_path / name).read_bytes()
        assert here not in data and packages not in data


def test_weights_beyond_one_onnx_file_are_refused() -> None:
    network = nn.Linear(1, 1, bias=False)
    network.weight = nn.Parameter(torch.empty(LIMIT_BYTES // 4 + 1, device="meta"))
    with pytest.raises(ExportError, match=r"2\.0 GB of weights do not fit one ONNX file"):
        writer(network, (), (), "logits", {}, Path("x.onnx"))


@pytest.mark.parametrize("file_format", ["pt2", "onnx"])
def test_one_image_is_enough_for_the_check(
    make: Callable[..., nn.Module], file_format: str, tmp_path: Path
) -> None:
    found = export(make(), tmp_path / f"one.{file_format}", images=images(1))
    assert found.difference <= found.limit
    together = export_together({"a": make(), "b": make()}, tmp_path / "both.onnx", images(1))
    assert together.difference <= together.limit
