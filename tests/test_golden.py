"""The paper's released network, number by number, without its code.

Reads every *.safetensors in the folder that ONETRUNK_GOLDEN names (default: ../shared/data/golden
beside the repository), any mode, placement (`proj`) and width; its README says what each key is.
The released names are mapped by the table below. Ours is computed in float64: in float32 a ReLU
whose input is zero but for rounding falls to either side, by build, and gradients fall with it.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import onetrunk as ot
from onetrunk.backbones import fingerprint, resnet26
from onetrunk.core.attach import attach
from onetrunk.core.domain import delta

FOLDER = Path(
    os.environ.get("ONETRUNK_GOLDEN", Path(__file__).parents[1] / ".." / "shared/data/golden")
)
FILES = sorted(FOLDER.glob("*.safetensors"))
RELATIVE = 1e-5
TRAINED = 1  # the domain that the two steps train
FAMILIES = {"series_adapters": ot.Series(), "parallel_adapters": ot.Parallel(), "bn": ot.Norm()}
CONVS = {"11": "both", "10": "first", "01": "second"}
BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")

# released convolution -> our convolution, our norm behind it
LAYERS = {"pre_layers_conv": ("stem", "stem_norm")} | {
    f"layer{stage + 1}.{block}.conv{k}{'.1' if k == 2 else ''}": (
        f"stages.{stage}.{block}.conv{k}",
        f"stages.{stage}.{block}.norm{k}",
    )
    for stage in range(3)
    for block in range(4)
    for k in (1, 2)
}

pytestmark = pytest.mark.skipif(
    not FILES, reason=f"no golden vectors in {FOLDER}: name their folder in ONETRUNK_GOLDEN"
)


@dataclass(frozen=True)
class Golden:
    """One file: its tensors by released name, and what its header says."""

    tensors: dict[str, Tensor]
    mode: str
    proj: str
    factor: float
    classes: tuple[int, ...]


@pytest.fixture(scope="module", params=FILES, ids=lambda path: path.stem)
def golden(request: pytest.FixtureRequest) -> Golden:
    with safe_open(request.param, "pt") as file:
        header = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    classes = tuple(json.loads(header["classes"]))
    return Golden(tensors, header["mode"], header["proj"], float(header["factor"]), classes)


def released_names(golden: Golden, domain: int) -> dict[str, str]:
    """Our name -> the released one, for everything that is the domain's own."""
    names: dict[str, str] = {}
    for released, (conv, norm) in LAYERS.items():
        behind = f"{released}.bns.{domain}"
        if f"state.{behind}.0.conv.1.weight" in golden.tensors:
            names |= {
                f"{conv}.adapter.norm.{key}": f"{behind}.0.conv.0.{key}" for key in BATCH_NORM
            }
            names[f"{conv}.adapter.a_oo"] = f"{behind}.0.conv.1.weight"
            behind = f"{behind}.1"
        if f"state.{released}.parallel_conv.{domain}.conv.weight" in golden.tensors:
            names[f"{conv}.adapter.a_oi"] = f"{released}.parallel_conv.{domain}.conv.weight"
        names |= {f"{norm}.{key}": f"{behind}.{key}" for key in BATCH_NORM}
    names |= {f"norm.{key}": f"end_bns.{domain}.0.{key}" for key in BATCH_NORM}
    return names | {f"fc.{key}": f"linears.{domain}.{key}" for key in ("weight", "bias")}


def backbone_of(golden: Golden) -> nn.Module:
    backbone = resnet26(golden.factor).double()
    with torch.no_grad():
        for released, (conv, _) in LAYERS.items():
            weight = golden.tensors[f"state.{released}.conv.weight"]
            backbone.get_submodule(conv).weight.copy_(weight)
    return backbone


def domains_of(golden: Golden, backbone: nn.Module) -> list[nn.Module]:
    family = FAMILIES[golden.mode]
    placed = isinstance(family, (ot.Series, ot.Parallel))
    where = ot.Where(convs=CONVS[golden.proj]) if placed else None
    models = []
    for domain, n_classes in enumerate(golden.classes):
        model = attach(backbone, family, [f"class{c}" for c in range(n_classes)], where=where)
        own, names = delta(model), released_names(golden, domain)
        assert set(own) == set(names), "the table names exactly what is the domain's own"
        for name, tensor in own.items():
            tensor.copy_(golden.tensors[f"state.{names[name]}"].view(tensor.shape))
        models.append(model.eval())
    return models


def assert_close(found: Tensor, expected: Tensor, what: str, scale: float = 0.0) -> None:
    expected = expected.view(found.shape).double()
    off = float((found.detach().double() - expected).abs().max())
    limit = RELATIVE * max(float(expected.abs().max()), scale)
    assert off <= limit, f"{what}: off by {off:.1e}, the limit is {limit:.1e}"


def two_steps(golden: Golden, model: nn.Module) -> Iterator[float]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        logits = model(golden.tensors["images"].double())
        loss = nn.functional.cross_entropy(logits, golden.tensors["labels"])
        loss.backward()
        yield loss.item()
        optimizer.step()


def test_every_domain_computes_the_released_logits(golden: Golden) -> None:
    for domain, model in enumerate(domains_of(golden, backbone_of(golden))):
        logits = model(golden.tensors["images"].double())
        assert_close(logits, golden.tensors[f"logits.{domain}"], f"logits of domain {domain}")


def test_in_float32_the_logits_are_the_released_ones_too(golden: Golden) -> None:
    for domain, model in enumerate(domains_of(golden, backbone_of(golden))):
        logits = model.float()(golden.tensors["images"])
        assert_close(logits, golden.tensors[f"logits.{domain}"], f"logits of domain {domain}")


def test_losses_and_gradients_are_the_released_ones(golden: Golden) -> None:
    model = domains_of(golden, backbone_of(golden))[TRAINED].train()
    steps = two_steps(golden, model)
    loss = next(steps)
    assert loss == pytest.approx(golden.tensors["loss.0"].item(), rel=RELATIVE)
    names = released_names(golden, TRAINED)
    expected = {key for key in golden.tensors if key.startswith("grad.")}
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {f"grad.{names[name]}" for name in learning} == expected
    # a shift in front of a batch norm has no gradient but rounding: measured against the largest
    largest = max(float(golden.tensors[key].abs().max()) for key in expected)
    for name, parameter in learning.items():
        gradient = golden.tensors[f"grad.{names[name]}"]
        assert_close(parameter.grad, gradient, f"gradient of {name}", scale=largest)
    assert next(steps) == pytest.approx(golden.tensors["loss.1"].item(), rel=RELATIVE)


def test_two_steps_leave_the_released_numbers_statistics_and_logits(golden: Golden) -> None:
    backbone = backbone_of(golden)
    before, models = fingerprint(backbone), domains_of(golden, backbone)
    list(two_steps(golden, models[TRAINED].train()))
    models[TRAINED].eval()
    names = released_names(golden, TRAINED)
    changed = {key for key in golden.tensors if key.startswith("after.")}
    assert changed <= {f"after.{released}" for released in names.values()}
    for name, tensor in delta(models[TRAINED]).items():
        after = golden.tensors.get(f"after.{names[name]}")
        expected = golden.tensors[f"state.{names[name]}"] if after is None else after
        assert_close(tensor, expected, f"{name} after two steps")
    for domain, model in enumerate(models):
        logits = model(golden.tensors["images"].double())
        assert_close(logits, golden.tensors[f"logits_after.{domain}"], f"domain {domain} after")
    assert fingerprint(backbone) == before
