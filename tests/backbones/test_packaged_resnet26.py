"""The packaged ResNet-26: small, self-checking, brought by its name, and no random weights."""

import json
import os
from pathlib import Path

import pytest
import torch

import onetrunk as ot
from onetrunk.backbones import packaged
from onetrunk.backbones.written_form import is_untrained, read_weights
from onetrunk.bank.bank import Bank
from onetrunk.data import load
from onetrunk.data.preprocessing import Preprocessing

FORM = "resnet26(width=0.5)"
BESIDE = Path(__file__).parents[3] / "shared" / "data" / "mini-decathlon"
BASE = Path(os.environ.get("ONETRUNK_DATA", BESIDE)) / "tiny_imagenet"


def test_its_name_brings_its_weights_and_its_classes():
    net = ot.backbone(FORM)
    assert net.written_form == "resnet26(width=0.5, num_classes=100)"
    stored = read_weights(packaged.RESNET26)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, stored.tensors[name].to(tensor.dtype)), name


def test_the_file_is_small_and_its_card_says_how_it_was_made():
    assert packaged.RESNET26.stat().st_size <= 4_000_000
    card = read_weights(packaged.RESNET26).card
    known = {"data", "recipe", "classes", "val_accuracy", "test_accuracy", "seconds", "machine"}
    assert known <= card.keys()
    assert len(card["classes"]) == 100
    json.dumps(card)


@pytest.mark.parametrize("form", ["resnet26(width=0.25)", "resnet26(width=0.5, in_chans=1)"])
def test_other_shapes_have_none(form):
    ours, seeded = ot.backbone(form), ot.backbone(form, pretrained=False)
    assert torch.equal(ours.stem.weight, seeded.stem.weight)


def test_a_bank_keeps_it_by_reference(tmp_path):
    made = Bank.create(tmp_path / "a.bank", FORM, by_reference=True)
    made.add("pets", ot.attach(made.backbone, ot.Parallel(), ["cat", "dog"]))
    again = Bank.open(tmp_path / "a.bank")
    assert again.verify().ok
    assert again.load("pets").domain.classes == ("cat", "dog")


@pytest.mark.skipif(not BASE.is_dir(), reason=f"no {BASE}; set ONETRUNK_DATA")
def test_it_classifies_its_base_domain_as_its_card_says():
    base_domain = load(BASE)
    card = read_weights(packaged.RESNET26).card
    net, seen = ot.backbone(FORM), Preprocessing.from_json(card["preprocessing"])
    few = base_domain.test.subset(range(0, len(base_domain.test), 5))
    with torch.no_grad():
        x_bchw = torch.stack([seen.prepare(few[k][0]) for k in range(len(few))])
        found = net(seen.evaluation_view(x_bchw)).argmax(1)
    accuracy = float((found == few.labels).double().mean())
    assert accuracy == pytest.approx(card["test_accuracy"], abs=0.06)  # of a fifth of the images


@pytest.mark.parametrize(
    ("form", "weights", "expected"),
    [
        (FORM, None, False),
        ("resnet26(width=0.5, num_classes=100)", None, False),
        ("resnet26(width=1.0)", None, True),
        ("resnet26(width=1.0)", "trunk.safetensors", False),
        ("timm:test_resnet", None, False),
    ],
)
def test_which_names_bring_random_weights_is_known(form, weights, expected):
    assert is_untrained(form, weights) is expected
