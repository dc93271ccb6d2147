"""What holds on a CPU holds on a GPU: training, probes, banks, mixtures, studies."""

import copy
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset

import onetrunk as ot
from onetrunk.bank.bank import Bank
from onetrunk.benchmark.cells import Trunk
from onetrunk.benchmark.protocol import Protocol
from onetrunk.benchmark.speed.subjects import take_apart
from onetrunk.benchmark.study import Study, domains_in, run
from onetrunk.core.adapters import read_family
from onetrunk.core.domain import delta
from onetrunk.data import Preprocessing
from onetrunk.export import export, export_together

pytestmark = pytest.mark.cuda
CLASSES = ("a", "b", "c")
SIZE = (3, 32, 32)
NETWORKS = [("resnet18", "batch"), ("efficientnet_lite0", "running"), ("vit_tiny", "auto")]
FAMILIES = ["parallel(dropout=0.2)", "lowrank(rank=2)", "series", "full"]


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name.startswith("vit"):
        return timm.create_model("vit_tiny_patch16_224", drop_path_rate=0.1, img_size=32)
    return timm.create_model(name, drop_path_rate=0.1)


def domain(net: nn.Module, family: str = "lowrank(rank=2)", seed: int = 0) -> nn.Module:
    return ot.attach(net, read_family(family), CLASSES, input_size=SIZE, seed=seed)


def images(n: int = 48) -> TensorDataset:
    x_bchw = torch.rand(n, *SIZE, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x_bchw, torch.arange(n) % 3)


def trained(model: nn.Module, statistics: str, **options: Any) -> list[torch.Tensor]:
    recipe = ot.Recipe(epochs=3, batch_size=8, norm_statistics=statistics, precision="float32")  # type: ignore[arg-type]
    losses = [step.loss for step in ot.fit(model, images(), recipe, **options)]
    return [torch.tensor(losses), *(t.cpu() for t in delta(model).values())]


def close(found: Any, expected: Any, tolerance: float) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.fixture(autouse=True)
def exact_products(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("name", "statistics"), NETWORKS)
def test_recorded_steps_train_as_ordinary_ones(name, statistics, family):
    found = [
        trained(domain(network(name), family), statistics, graphed=graphed)
        for graphed in (False, True)
    ]
    close(found[0][0][:4], found[1][0][:4], 1e-2)  # later ones amplify what a kernel rounds


def test_a_step_that_waits_for_the_gpu_is_refused_with_the_reason():
    script = (  # in a process of its own, whose random numbers are spoilt
        "import torch; from onetrunk.training.graphed import cuda_graph\n"
        "x = torch.ones(1, device='cuda')\n"
        "cuda_graph(lambda: x.item())"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert found.returncode == 1
    assert "TrainingError: this network's step cannot be recorded as a CUDA graph" in found.stderr


def test_a_training_that_stopped_goes_on(tmp_path):
    net, recipe = network("resnet18"), ot.Recipe(epochs=2, batch_size=8)
    for step in ot.fit(domain(net), images(), recipe, checkpoint=tmp_path / "a"):
        if step.step == 7:
            break
    rest = [s.step for s in ot.fit(domain(net), images(), recipe, checkpoint=tmp_path / "a")]
    assert rest == list(range(8, 13))


@pytest.mark.parametrize("family", FAMILIES[:3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_folded_step_has_the_gradients_of_the_plain_one(family, dtype, monkeypatch):
    monkeypatch.setattr("onetrunk.core.adapted.FOLDING_DEVICES", ("cuda",))
    net = network("resnet18").to("cuda", dtype)
    x = torch.rand(4, *SIZE, device="cuda", dtype=dtype)
    gradients = []
    for make in (lambda model: model, take_apart):
        model = make(domain(net, family.replace("dropout=0.2", "")))
        with torch.no_grad():
            for tensor in model.parameters():
                if tensor.requires_grad and not tensor.any():
                    tensor.fill_(0.01)
        torch.manual_seed(1)  # of dropped paths
        model.train()(x).square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    close(gradients[0], gradients[1], 1e-3 if dtype == torch.float32 else 1e-10)


def test_what_was_trained_on_a_gpu_is_stored_loaded_merged_and_mixed(tmp_path):
    net = network("efficientnet_lite0")
    bank = Bank.create(tmp_path / "bank", copy.deepcopy(net).eval())
    x = torch.rand(6, *SIZE)
    logits = {}
    for seed, name in enumerate(("one", "other")):
        model = domain(net, seed=seed)
        trained(model, "running")
        bank.add(name, model)
        logits[name] = model(x.cuda()).detach().cpu()
        close(ot.merge(model)(x.cuda()).detach().cpu(), logits[name], 1e-3)
    for name, expected in logits.items():
        close(bank.load(name)(x).detach(), expected, 1e-3)
    models = {name: bank.load(name, device="cuda") for name in logits}
    mixed = ot.mix(models)
    rows = torch.tensor([0, 1, 0, 1, 1, 0], device="cuda")
    expected = torch.stack([logits[("one", "other")[int(i)]][row] for row, i in enumerate(rows)])
    found = torch.stack([y[:3] for y in mixed(x.cuda(), rows)]).detach().cpu()
    close(found, expected, 1e-3)


def test_what_is_on_a_gpu_is_checked_and_exported(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # as it is for users
    net, x = network("efficientnet_lite0"), torch.rand(4, *SIZE)
    models = {name: domain(net, seed=seed) for seed, name in enumerate(("one", "other"))}
    for model in models.values():
        trained(model, "running")
        ot.merge(model, check=x)
    ot.mix(models, check=x)
    for ending in ("safetensors", "pt2", "onnx"):
        export(models["one"], tmp_path / f"one.{ending}", images=x)
    export_together(models, tmp_path / "both.onnx", x)
    assert {p.device.type for m in models.values() for p in m.parameters()} == {"cuda"}


def test_views_of_images_on_a_gpu_are_those_on_the_cpu():
    preprocessing = Preprocessing(size_px=24)
    side = preprocessing.prepared_px
    x_bchw, seeds = torch.randint(0, 256, (8, 3, side, side), dtype=torch.uint8), range(8)
    views = [
        preprocessing.training_view(x, seeds, scale=(0.4, 1.0)) for x in (x_bchw, x_bchw.cuda())
    ]
    close(views[1].cpu(), views[0], 0.02)  # one grey level


def test_domains_in_one_batch_are_trained_as_alone():
    alone, together = network("resnet18"), network("resnet18")
    recipe = ot.Recipe(epochs=1, batch_size=8, precision="float32")
    losses = [s.loss for s in ot.fit(domain(alone), images(), recipe)]
    models = {"a": domain(together), "b": domain(together, seed=1)}
    data = {"a": images(), "b": images()}
    steps = [s.loss for name, s in ot.fit_together(models, data, recipe) if name == "a"]
    close(torch.tensor(steps), torch.tensor(losses), 1e-3)


def test_a_study_runs(tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for label, name in enumerate(("dark", "light")):
            folder = tmp_path / "domains" / "shades" / split / name
            folder.mkdir(parents=True)
            for number in range(12):
                pixels = np.clip(rng.normal(60 + 130 * label, 20, (20, 20)), 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    protocol = Protocol(
        images=24, size_px=32, epochs=2, least_steps=20, batch_size=8, tune_epochs=1
    )  # fmt: skip
    methods = (
        "head", "full", "scratch", "lowrank(rank=2)", "allocate(budget='1%')",
        "allocate(budget='1%', by='trained')", "uniform(budget='1%')",
        "lora(like='lowrank(rank=2)', norms=True)",
        "compress(of='lowrank(rank=2)', keep=0.5)", "svd(of='lowrank(rank=2)', keep=0.5)",
    )  # fmt: skip
    folder = tmp_path / "domains"
    trunks = ((Trunk("resnet26(width=0.125)"), protocol),)
    found, out = domains_in(folder), tmp_path / "out"
    outcome = run(Study("mini", folder, trunks, found, methods, (0, 1), out, graphed=True))
    assert not outcome.failures
    assert len(outcome.records) == 2 * len(methods)
    of_trained = [r["test_accuracy"] for r in outcome.records if r["method"] != "scratch"]
    assert min(of_trained) > 0.5
