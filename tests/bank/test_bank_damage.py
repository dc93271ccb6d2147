"""Damaged, foreign and hostile domain files: each is refused by name, the bank stays as it was."""

import json
import os
import pickle
import random

import pytest
import safetensors.torch
import torch
from torch import nn

import onetrunk as ot
from onetrunk.backbones import fingerprint
from onetrunk.bank.bank import Bank
from onetrunk.bank.card import KEYS, LIGHT, light
from onetrunk.errors import BankError, DamagedError
from onetrunk.tensorfile import pack, unpack

SIZE = (3, 12, 12)


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.conv, self.norm = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8)
            self.fc = nn.Linear(8, 5)
        self.eval()

    def forward(self, x_bchw):
        return self.fc(self.norm(self.conv(x_bchw)).relu().mean((2, 3)))


@pytest.fixture
def bank(tmp_path):
    net = Tiny()
    bank = Bank.create(tmp_path / "garden", net)
    model = ot.attach(net, ot.Parallel(init="released"), ["daisy", "rose"], input_size=SIZE)
    bank.add("flowers", model, metrics={"accuracy": 0.5})
    return bank


@pytest.fixture
def good(tmp_path, bank):
    bank.export_domain("flowers", tmp_path / "good.safetensors")
    return (tmp_path / "good.safetensors").read_bytes()


def files(bank):
    return {x.name: x.read_bytes() for x in bank.path.rglob("*") if x.is_file()}


def refused(bank, tmp_path, data, error=DamagedError):
    """What importing a file of these bytes says; the bank must stay as it was."""
    file, before = tmp_path / "given.safetensors", files(bank)
    file.write_bytes(data)
    with pytest.raises(error) as caught:
        bank.import_domain(file, "given")
    assert files(bank) == before
    assert str(file) in str(caught.value)
    return str(caught.value)


def changed(good, **card):
    """A file whole in itself, whose card says something else."""
    tensors, old = unpack(good, "good")
    return pack(tensors, {**old, **card})


def test_every_flipped_bit_of_a_domain_file_is_seen(bank, good):
    assert 1000 < len(good) < 10_000
    for place in range(len(good) * 8):
        flipped = bytearray(good)
        flipped[place // 8] ^= 1 << place % 8
        with pytest.raises(DamagedError, match="the file"):
            unpack(bytes(flipped), "the file")


def test_a_flipped_cut_or_longer_file_is_not_imported(bank, good, tmp_path):
    draw = random.Random(0)
    for _ in range(300):
        flipped = bytearray(good)
        flipped[draw.randrange(len(good))] ^= 1 << draw.randrange(8)
        refused(bank, tmp_path, bytes(flipped))
    for end in range(0, len(good), 41):
        refused(bank, tmp_path, good[:end])
    for n_more in range(1, 200, 11):
        refused(bank, tmp_path, good + b"\0" * n_more)
    bank.import_domain(tmp_path / "good.safetensors", "given")


class Evil:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


def test_foreign_files_are_refused_and_nothing_is_unpickled(bank, good, tmp_path):
    canary = tmp_path / "canary"
    torch.save({"a": torch.zeros(2), "b": Evil(canary)}, tmp_path / "evil.pt")
    tensors, _ = unpack(good, "good")
    for data in (
        pickle.dumps(Evil(canary)),
        (tmp_path / "evil.pt").read_bytes(),
        good + pickle.dumps(Evil(canary)),
        safetensors.torch.save(tensors),
        safetensors.torch.save(tensors, {"format": "pt"}),
        b"",
        b"\x89PNG\r\n\x1a\n",
    ):
        message = refused(bank, tmp_path, data)
        assert message.endswith("Get it again from where it came from.")
    assert not canary.exists()


def test_a_checkpoint_or_a_backbone_is_no_domain(bank, good, tmp_path):
    tensors, _ = unpack(good, "good")
    for card in ({"checkpoint": 1}, {"backbone": 1, "spec": "x", "fingerprint": "y"}, {}):
        assert "'domain' is not format 1" in refused(bank, tmp_path, pack(tensors, card))


def test_a_file_of_the_future_says_so(bank, good, tmp_path):
    message = refused(bank, tmp_path, changed(good, domain=5), BankError)
    assert "has format 5, and this onetrunk reads format 4" in message and "Upgrade" in message


DEEP = json.loads("[" * 500 + "]" * 500)
PREPROCESSING = {
    "size_px": 16, "crop": "center", "crop_ratio": 1.0, "interpolation": "bilinear",
    "mean": [0.5] * 3, "std": [0.5] * 3, "hflip": True, "channels": 3,
}  # fmt: skip
JUNK = [None, 0, -1, 1.5, True, "", "x", [], [1], [None], {}, {"a": 1}, {"": []}, [[]], 1 << 62]
HOSTILE = {
    "domain": [0, -1, None, "1", 1.5, [], {}, False],
    "backbone": [*JUNK, {"fingerprint": 1}, {"spec": "x"}, {"fingerprint": None}],
    "scope": [*JUNK, "all", "__import__('os')"],
    "family": [x for x in JUNK if not isinstance(x, str)],
    "plan": [
        None, 0, "x", [], {"parallel": "conv"}, {"parallel": [1]}, {"parallel": [None]},
        {"parallel": ["conv", "conv"]}, {"parallel": ["conv"], "norm": ["conv"]},
        {"parallel": ["nowhere"]}, {"parallel": [""]}, {"parallel": ["conv.weight"]},
        {"parallel": ["__class__"]}, {"parallel": ["conv.__dict__"]}, {"parallel": ["norm"]},
        {"parallel": ["../conv"]}, {"lowrank(rank=10000000000)": ["conv"]},
        {"lowrank(rank=-1)": ["conv"]}, {"lowrank(rank=[1])": ["conv"]}, {"lowrank": ["conv"]},
        {"parallel(dropout='x')": ["conv"]}, {"parallel(dropout=2)": ["conv"]},
        {"parallel(init=None)": ["conv"]}, {"unknown": ["conv"]}, {"": ["conv"]},
        {"__import__('os').system('true')": ["conv"]}, {"__import__('os')": ["conv"]},
        {"parallel(init=__import__('os'))": ["conv"]}, {"parallel(**{})": ["conv"]},
        {"(" * 100 + ")" * 100: ["conv"]}, {"(" * 5000: ["conv"]}, {"-" * 9000 + "1": ["conv"]},
        {"parallel(init='" + "x" * 9000 + "')": ["conv"]}, {"\0": ["conv"]}, {"parallel": DEEP},
        {}, {"parallel": []}, {"series": ["conv"]}, {"full": ["conv"]},
        {"parallel": ["conv", "fc"]},
    ],
    "skipped": [None, 0, "x", [], {"a": 1}, {"a": None}, {"a": []}],
    "classes": [
        *[x for x in JUNK if x != "x"], "ab", ["daisy"], ["daisy", "daisy"], ["daisy", 1],
        ["a", "b", "c"], [str(i) for i in range(100_000)], ["\ud800", "b"],
    ],
    "head": [
        None, 0, "fc", [1], [None], [], ["nowhere"], [""], ["conv"], ["norm"], ["fc", "fc", "nope"],
        ["fc.weight"], ["__class__"], ["..fc"],
    ],
    "head_features": [None, -1, 1.5, True, "8", [], {}, 10**12, 1 << 62],
    "preprocessing": [
        0, "x", [], {}, {"size_px": 16}, *({**PREPROCESSING, **change} for change in (
            {"size_px": "16"}, {"size_px": 0}, {"size_px": 10**9}, {"crop": "__import__('os')"},
            {"mean": None}, {"mean": [1]}, {"mean": ["x"] * 3}, {"mean": [1e300] * 3},
            {"mean": [10**17] * 3}, {"std": [0, 0, 0]}, {"std": [-1] * 3}, {"hflip": 1},
            {"channels": 2}, {"crop_ratio": 0}, {"crop_ratio": []}, {"interpolation": {}}, {"x": 1},
        )),
    ],
    "input_size": [
        0, "3x8x8", [], [3, 8], [3, 8, 8, 8], [3, 8, 0], [3, -8, 8], [3, 8.0, 8], [3, "8", 8],
        [3, True, 8], [3, 10**6, 10**6], [1 << 62] * 3, {"a": 1}, [[3, 8, 8]], [None] * 3,
    ],
    "metrics": [None, 0, "x", [], {"a": DEEP}, {"a": 1 << 70}, {"a": "\ud800"}],
    "provenance": [None, 0, "x", [], {"a": DEEP}, {"a": 10**400}],
    "numbers": [None, 0, -1, 1.5, True, "8", [], {}, 10**12, 1 << 62, 10**400],
}  # fmt: skip


@pytest.mark.parametrize("key", sorted(KEYS))
def test_hostile_cards_are_refused(bank, good, tmp_path, key):
    for value in HOSTILE[key]:
        message = refused(bank, tmp_path, changed(good, **{key: value}))
        assert len(message) < 2000, value
    tensors, card = unpack(good, "good")
    del card[key]
    assert "card is not what was written" in refused(bank, tmp_path, pack(tensors, card))


def test_an_unknown_key_is_refused(bank, good, tmp_path):
    assert "'its keys' is not" in refused(bank, tmp_path, changed(good, extra=1))


def test_the_card_of_the_good_file_is_the_only_one_that_passes(bank, good, tmp_path):
    (tmp_path / "same.safetensors").write_bytes(changed(good))
    bank.import_domain(tmp_path / "same.safetensors", "same")
    assert bank.domains["same"].digest == bank.domains["flowers"].digest


def test_a_domain_of_another_backbone_is_refused(bank, good, tmp_path):
    data = changed(good, backbone={"spec": bank.backbone_form, "fingerprint": "0" * 64})
    message = refused(bank, tmp_path, data, BankError)
    assert "belongs to backbone 000000000000..." in message and "meaningless" in message


def test_tensors_that_do_not_fit_are_refused(bank, good, tmp_path):
    tensors, card = unpack(good, "good")
    matrix = next(name for name in tensors if "adapter" in name)
    shape = tuple(tensors[matrix].shape)
    for change in (
        {matrix: tensors[matrix].t().contiguous()},
        {matrix: tensors[matrix].double()},
        {matrix: tensors[matrix].to(torch.int32)},
        {matrix: tensors[matrix].to(torch.float8_e4m3fn)},
        {matrix: tensors[matrix].to(torch.complex64)},
    ):
        message = refused(bank, tmp_path, pack({**tensors, **change}, card))
        assert "its numbers do not fit what its card describes" in message
        assert f"- {matrix} {shape} torch.float32" in message and f"+ {matrix} (" in message
    for renamed in ("x", "conv.layer.weight", "../x"):
        others = {renamed if name == matrix else name: t for name, t in tensors.items()}
        assert f"+ {renamed} {shape}" in refused(bank, tmp_path, pack(others, card))
    fewer = {name: t for name, t in tensors.items() if name != matrix}
    assert "'numbers' is not the" in refused(bank, tmp_path, pack(fewer, card))
    assert "'numbers' is not the" in refused(bank, tmp_path, pack({}, card))


def test_a_claim_of_many_classes_costs_no_memory(bank, good, tmp_path):
    tensors, card = unpack(good, "good")
    n_classes = 50_000
    tensors["fc.weight"], tensors["fc.bias"] = torch.zeros(n_classes, 1), torch.zeros(n_classes)
    numbers = sum(t.numel() for t in tensors.values())
    card = {**card, "classes": [str(i) for i in range(n_classes)], "numbers": numbers}
    for head_features, says in (
        (8, "borne out by the file's numbers"),
        (1, "'head_features' is not 1"),
    ):
        data = pack(tensors, {**card, "head_features": head_features})
        assert says in refused(bank, tmp_path, data)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused(bank, good, tmp_path, value):
    tensors, card = unpack(good, "good")
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            bad = tensor.clone()
            bad.view(-1)[0] = value
            message = refused(bank, tmp_path, pack({**tensors, name: bad}, card))
            assert f"{name} holds NaN or infinity, which no bank stores" in message


# The same from inside a bank, whose manifest somebody wrote anew


def test_a_hostile_bank_is_refused_at_load(bank, good):
    tensors, card = unpack(good, "good")
    bad = {**tensors, "fc.bias": torch.full((2,), float("nan"))}
    for data, match in (
        (b"nothing", "no onetrunk file"),
        (changed(good, scope="all"), "'scope' is not adapters or head or everything"),
        (changed(good, plan={"parallel": ["nowhere"]}), "no network can be built from its card"),
        (pack(bad, card), "fc.bias holds NaN or infinity"),
        (changed(good, metrics={"accuracy": 1.0}), "describe it differently"),
        (changed(good, classes=["rose", "daisy"]), "describe it differently"),
    ):
        bank._store.replace("flowers", light(card), data)
        with pytest.raises(DamagedError, match=match) as caught:
            bank.load("flowers")
        assert f"domain 'flowers' of {bank.path}" in str(caught.value)
        assert [p for p in bank.verify().problems if "'flowers'" in p]
    bank._store.replace("flowers", light(card), good)
    bank.load("flowers")


@pytest.mark.parametrize("key", LIGHT)
def test_a_hostile_manifest_is_refused(bank, good, key):
    _, card = unpack(good, "good")
    hostile = [*HOSTILE[key]] if key != "plan" else []
    for value in hostile:
        listed = {**light(card), key: value}
        try:
            bank._store.replace("flowers", listed, good)
        except BankError:
            continue  # what the manifest itself does not take
        with pytest.raises(DamagedError):
            bank.load("flowers")
        assert not bank.verify().ok
        try:
            found = bank.domains["flowers"]
        except DamagedError as error:
            assert f"domain 'flowers' of {bank.path}: its card" in str(error)
        else:
            assert getattr(found, key) in (value, tuple(value) if key == "classes" else None)
    bank._store.replace("flowers", {"x": 1}, good)
    with pytest.raises(DamagedError, match="'its keys' is not family, classes"):
        _ = bank.domains["flowers"]


def test_domains_of_two_banks_cannot_be_swapped(tmp_path, bank, good):
    """A blob under another one's name is seen by its hash."""
    other = ot.attach(bank.backbone, ot.Parallel(), ["daisy", "rose"], input_size=SIZE)
    bank.add("other", other)
    first, second = (
        bank.path / "blobs" / f"{bank.domains[name].digest}.safetensors"
        for name in ("flowers", "other")
    )
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b)
    second.write_bytes(a)
    for name in ("flowers", "other"):
        with pytest.raises(DamagedError, match=f"domain '{name}' cannot be read"):
            bank.load(name)
    assert len(bank.verify().problems) == 4 and fingerprint(bank.backbone)
