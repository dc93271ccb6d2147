"""The rival: PEFT's own LoRA at our layers, at about our numbers, trained by our loop."""

import dataclasses
import sys

import numpy as np
import pytest
import torch

import onetrunk as ot
from onetrunk.benchmark.lora import matched_ranks
from onetrunk.benchmark.methods import read_method
from onetrunk.benchmark.protocol import Protocol
from onetrunk.benchmark.setting import Setting
from onetrunk.core.adapted import Adapted
from onetrunk.data import Images, Prepared, Preprocessing
from onetrunk.errors import MissingExtraError
from onetrunk.training.optimizer import kinds

CLASSES = ("ant", "bee")


@pytest.fixture(scope="module")
def setting() -> Setting:
    rng, preprocessing = np.random.default_rng(0), Preprocessing(size_px=16)
    arrays = rng.integers(0, 256, (16, 20, 20, 3), dtype=np.uint8)
    images = Prepared(Images.from_arrays(arrays, [0, 1] * 8, list(CLASSES)), preprocessing)
    recipe = Protocol().recipe(Protocol().start, seed=0, epochs=1)
    backbone = ot.backbone("resnet26(width=0.125)")
    return Setting(backbone, CLASSES, preprocessing, images, images, 0, recipe)


def made(setting: Setting, text: str) -> torch.nn.Module:
    return read_method(text).make(setting)


def n_numbers(model: torch.nn.Module, part: str) -> int:
    return sum(p.numel() for n, p in model.named_parameters() if part in n)


def test_it_sits_where_ours_does_at_about_as_many_numbers(setting):
    twin, rival = made(setting, "parallel"), made(setting, "lora(like='parallel')")
    ours = {name for name, m in twin.named_modules() if isinstance(m, Adapted)}
    theirs = {name.partition(".lora_A")[0] for name, _ in rival.named_parameters()
              if ".lora_A." in name}  # fmt: skip
    assert theirs == ours == set(matched_ranks(twin))
    ratio = n_numbers(rival, ".lora_") / n_numbers(twin, ".adapter.")
    assert 0.8 < ratio < 1.6  # ranks are whole numbers, and these layers narrow
    assert torch.allclose(rival.eval()(torch.ones(1, 3, 16, 16)),
                          made(setting, "norm").eval()(torch.ones(1, 3, 16, 16)))  # fmt: skip


@pytest.mark.parametrize("norms", [True, False])
def test_it_trains_with_its_norms_saved_and_the_backbone_as_it_was(setting, norms):
    rival = made(setting, f"lora(like='parallel', norms={norms})")
    before = {name: t.clone() for name, t in rival.state_dict().items()}
    backbone = {name: t.clone() for name, t in setting.backbone.state_dict().items()}
    for _ in ot.fit(rival, setting.train, setting.recipe, device="cpu"):
        pass
    moved = {n for n, t in rival.state_dict().items() if not torch.equal(t, before[n])}
    assert any(".lora_B." in name for name in moved)
    gains = {n for n, p in rival.named_parameters() if ".norm" in n or "bn" in n}
    assert bool(gains & moved) == norms and gains
    for name, tensor in setting.backbone.state_dict().items():
        assert torch.equal(tensor, backbone[name])


def test_its_factors_learn_at_the_rates_of_ours(setting):
    found = kinds(made(setting, "lora(like='parallel')"))
    assert {kind for name, kind in found.items() if ".lora_A." in name} == {"inner"}
    assert {kind for name, kind in found.items() if ".lora_B." in name} == {"adapter"}
    assert set(found.values()) == {"inner", "adapter", "head"}


def test_without_peft_the_way_out_is_said(setting, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r"lora\(...\) needs PEFT.*onetrunk\[rivals\]"):
        made(setting, "lora(like='parallel')")


def test_its_start_is_drawn_from_the_cells_seed_alone(setting):
    before = torch.get_rng_state()
    first = made(setting, "lora(like='parallel')").state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    again = made(setting, "lora(like='parallel')").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    other = made(dataclasses.replace(setting, seed=1), "lora(like='parallel')").state_dict()
    assert any(not torch.equal(other[n], t) for n, t in first.items() if ".lora_A." in n)
