"""Bank: what goes in comes out bit for bit, and every refusal says what to do."""

import copy
import gc
import os
import shutil
import subprocess
import sys
import threading
import weakref

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

import onetrunk as ot
from onetrunk.backbones import fingerprint
from onetrunk.bank.bank import Bank
from onetrunk.bank.card import WITHOUT_BASIS
from onetrunk.bank.store import Store
from onetrunk.core.domain import delta, stored
from onetrunk.data import Preprocessing
from onetrunk.errors import AttachError, BankError, DamagedError, OnetrunkError
from onetrunk.tensorfile import pack, unpack

FAMILIES = {
    "series": ot.Series(init="released"),
    "parallel": ot.Parallel(init="released"),
    "lowrank": ot.LowRank(rank=2, init="released"),
    "channelwise": ot.Channelwise(),
    "norm": ot.Norm(),
    "full": ot.Full(),
    "head": ot.Head(),
}
CLASSES = ["daisy", "rose", "tulip"]
SIZE = (3, 16, 16)


class Tiny(nn.Module):
    """A user's own network of 2,000 numbers."""

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
            self.conv2, self.norm2 = nn.Conv2d(8, 16, 3, 1, 1), nn.BatchNorm2d(16)
            self.fc = nn.Linear(16, 5)
        self.eval()

    def forward(self, x_bchw):
        x = self.norm1(self.conv1(x_bchw)).relu()
        return self.fc(self.norm2(self.conv2(x)).relu().mean((2, 3)))


def attached(net, family=None, seed=0, classes=CLASSES):
    """A domain whose numbers, running statistics included, are those of no fresh one."""
    model = ot.attach(net, family or ot.Parallel(), classes, input_size=SIZE)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in delta(model).values():
            if tensor.is_floating_point():
                noise = torch.rand(tensor.shape, generator=generator)
                tensor += (0.1 * noise).to(tensor.dtype)
    return model.eval()


@torch.no_grad()
def logits(model, dtype=torch.float32, size=SIZE):
    x_bchw = torch.rand(3, *size, generator=torch.Generator().manual_seed(9)).to(dtype)
    return model(x_bchw)


def state(bank):
    """Every byte of a bank, and every name in it."""
    files = sorted(x for x in bank.path.rglob("*") if x.is_file() and x.name != "bank.lock")
    return {str(file.relative_to(bank.path)): file.read_bytes() for file in files}


def only_blob(bank, name):
    return bank.path / "blobs" / f"{bank.domains[name].digest}.safetensors"


@pytest.fixture
def net():
    return Tiny()


@pytest.fixture
def bank(tmp_path, net):
    return Bank.create(tmp_path / "garden", net)


# What goes in comes out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_domain_comes_back_bit_for_bit(tmp_path, family, dtype):
    net = Tiny().to(dtype)
    bank = Bank.create(tmp_path / "garden", net)
    model = attached(net, FAMILIES[family])
    bank.add("flowers", model)
    for found in (bank.load("flowers"), Bank.open(bank.path, net).load("flowers")):
        assert not any(module.training for module in found.modules())
        assert delta(found).keys() == delta(model).keys()
        for name, tensor in delta(model).items():
            assert (
                torch.equal(delta(found)[name], tensor) and delta(found)[name].dtype == tensor.dtype
            )
        assert torch.equal(logits(found, dtype), logits(model, dtype))
        record = {k: v for k, v in vars(found.domain).items() if k != "backbone"}
        assert record == {k: v for k, v in vars(model.domain).items() if k != "backbone"}
        trainable = [n for n, p in found.named_parameters() if p.requires_grad]
        assert trainable == [n for n, p in model.named_parameters() if p.requires_grad]


def torchvision_net():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torchvision.models.squeezenet1_1(num_classes=7).eval()


NETS = {
    "resnet26(width=0.25)": lambda: ot.backbone("resnet26(width=0.25)"),
    "resnet26(width=0.25, num_classes=3)": lambda: ot.backbone(
        "resnet26(width=0.25, num_classes=3)"
    ),
    "timm:test_vit": lambda: ot.backbone("timm:test_vit", pretrained=False),
    "timm:test_efficientnet(num_classes=0)": lambda: ot.backbone(
        "timm:test_efficientnet(num_classes=0)", pretrained=False
    ),
    "torchvision:shufflenet_v2_x0_5": lambda: ot.backbone(
        "torchvision:shufflenet_v2_x0_5", pretrained=False
    ),
    "module:torchvision.models.squeezenet.SqueezeNet": torchvision_net,
}


@pytest.mark.parametrize("form", NETS)
def test_every_kind_of_backbone_comes_back_bit_for_bit(tmp_path, form):
    net = NETS[form]()
    size = (3, 160, 160) if form == "timm:test_vit" else (3, 64, 64)
    model = ot.attach(net, classes=CLASSES, input_size=size)
    bank = Bank.create(tmp_path / "garden", net)
    bank.add("flowers", model)
    assert bank.backbone_form == form and bank.backbone_fingerprint == fingerprint(net)
    expected = logits(model.eval(), size=size)
    assert torch.equal(logits(Bank.open(bank.path, net).load("flowers"), size=size), expected)
    if form.startswith("module:"):
        with pytest.raises(BankError, match=r"made with a module of your own, torchvision.models"):
            Bank.open(bank.path).load("flowers")
        return
    again = Bank.open(bank.path)
    assert torch.equal(logits(again.load("flowers"), size=size), expected)
    assert fingerprint(again.backbone) == fingerprint(net) and again.verify().ok


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_named_backbone_of_another_type_is_built_again_in_that_type(tmp_path, dtype):
    net = ot.backbone("resnet26(width=0.25)").to(dtype)
    bank = Bank.create(tmp_path / "garden", net)
    assert bank.backbone_form == "resnet26(width=0.25)"
    found = Bank.open(bank.path).backbone
    assert {t.dtype for t in found.parameters()} == {dtype}
    assert fingerprint(found) == fingerprint(net)


def test_preprocessing_metrics_and_provenance_travel_along(bank, net):
    model = ot.attach(
        net,
        ot.Norm(),
        CLASSES,
        input_size=SIZE,
        preprocessing=Preprocessing(size_px=16, hflip=False),
    )
    metrics = {
        "accuracy": 0.1 + 0.2, "exact": np.float64(1 / 3), "single": np.float32(0.5),
        "n": np.int64(7), "torch": torch.tensor(0.25), "text": "Straße",
        "nested": {"per_class": (1, 2.5, None, True)},
    }  # fmt: skip
    bank.add("flowers", model, metrics=metrics, provenance={"data": "folder"})
    for card in (bank.domains["flowers"], Bank.open(bank.path).domains["flowers"]):
        assert card.metrics == {
            "accuracy": 0.1 + 0.2, "exact": 1 / 3, "single": 0.5, "n": 7, "torch": 0.25,
            "nested": {"per_class": [1, 2.5, None, True]}, "text": "Straße",
        }  # fmt: skip
        assert card.provenance == {
            "data": "folder", "onetrunk": ot.__version__, "torch": str(torch.__version__)
        }  # fmt: skip
        assert card.preprocessing == model.domain.preprocessing
        assert (card.name, card.family, card.classes) == ("flowers", "norm", tuple(CLASSES))
        assert card.numbers == sum(t.numel() for t in stored(model).values())
        assert only_blob(bank, "flowers").stat().st_size == card.size
    assert bank.load("flowers").domain.preprocessing.hflip is False


def test_domains_is_a_mapping_of_one_generation(bank, net):
    before = bank.domains
    bank.add("b", attached(net))
    bank.add("a", attached(net))
    assert list(before) == [] and list(bank.domains) == ["b", "a"]
    assert repr(bank.domains) == "Domains(b, a)" and len(bank.domains) == 2
    assert "c" not in bank.domains and bank.domains.get("c") is None
    assert bank.generation == 3


def test_loaded_domains_share_the_backbone_and_nothing_else(bank, net):
    for name in ("a", "b"):
        bank.add(name, attached(net, ot.Parallel()))
    other = Bank.open(bank.path, Tiny())
    models = [bank.load("a"), bank.load("b"), bank.load("a"), other.load("a")]
    frozen = [
        {t.data_ptr() for n, t in m.state_dict().items() if n in m.domain.frozen} for m in models
    ]
    own = [
        {t.data_ptr() for n, t in m.state_dict().items() if n not in m.domain.frozen}
        for m in models
    ]
    assert frozen[0] == frozen[1] == frozen[2] and not frozen[0] & frozen[3]
    assert all(not own[i] & own[j] for i in range(4) for j in range(i))
    assert frozen[0] <= {t.data_ptr() for t in net.state_dict().values()}


def test_loading_and_adding_leave_the_global_generator_alone(bank, net):
    model = attached(net)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    bank.add("flowers", model)
    bank.load("flowers")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_trained_loaded_domain_can_replace_the_stored_one(bank, net):
    bank.add("flowers", attached(net, seed=0))
    model = Bank.open(bank.path, Tiny()).load("flowers")
    bank.replace("flowers", attached(net, seed=1), metrics={"accuracy": 0.5})
    assert bank.domains["flowers"].metrics == {"accuracy": 0.5}
    assert not torch.equal(logits(bank.load("flowers")), logits(model))
    bank.replace("flowers", model)
    assert torch.equal(logits(bank.load("flowers")), logits(model))
    assert len(list((bank.path / "blobs").iterdir())) == 2


def test_rename_keeps_bytes_and_remove_frees_space(bank, net):
    bank.add("a", attached(net, seed=0))
    bank.add("b", attached(net, seed=1))
    blob, digest = only_blob(bank, "a").read_bytes(), bank.domains["a"].digest
    bank.rename("a", "c")
    assert list(bank.domains) == ["c", "b"] and bank.domains["c"].digest == digest
    assert only_blob(bank, "c").read_bytes() == blob
    bank.remove("c")
    assert not (bank.path / "blobs" / f"{digest}.safetensors").exists()
    assert digest not in (bank.path / "bank.json").read_text() and list(bank.domains) == ["b"]
    with pytest.raises(BankError, match=r"has no domain 'c'. It holds b."):
        bank.load("c")


def test_export_and_import_carry_a_domain_to_another_bank(tmp_path, bank, net):
    bank.add("flowers", attached(net), metrics={"accuracy": 0.5})
    bank.export_domain("flowers", tmp_path / "flowers.safetensors")
    other = Bank.create(tmp_path / "other", Tiny())
    other.import_domain(tmp_path / "flowers.safetensors", "imported")
    assert torch.equal(logits(other.load("imported")), logits(bank.load("flowers")))
    assert other.domains["imported"].metrics == {"accuracy": 0.5}
    assert other.domains["imported"].digest == bank.domains["flowers"].digest


def test_by_reference_keeps_no_weights(tmp_path):
    bank = Bank.create(tmp_path / "garden", "resnet26(width=0.25)", by_reference=True)
    bank.add("flowers", ot.attach(bank.backbone, ot.Norm(), CLASSES))
    assert sum(x.stat().st_size for x in (bank.path / "blobs").iterdir()) < 100_000
    again = Bank.open(bank.path)
    assert (
        torch.equal(logits(again.load("flowers")), logits(bank.load("flowers")))
        and again.verify().ok
    )
    net = ot.backbone("resnet26(width=0.25)")
    assert Bank.create(tmp_path / "second", net, by_reference=True).backbone is net


def test_a_device_is_asked_for_by_name(bank, net):
    bank.add("flowers", attached(net))
    found = bank.load("flowers", device="cpu")
    assert found.domain.backbone is net and torch.equal(logits(found), logits(bank.load("flowers")))
    for device in ("cuda:99", "no-such-device", "xpu:7"):
        with pytest.raises(BankError, match=rf"device='{device}' cannot be used: .* Use 'cpu'"):
            bank.load("flowers", device=device)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_device_gets_one_copy_and_the_backbone_stays(bank, net):
    bank.add("a", attached(net))
    there, again, here = (
        bank.load("a", device="cuda"),
        bank.load("a", device="cuda:0"),
        bank.load("a"),
    )
    assert {t.device.type for t in there.state_dict().values()} == {"cuda"}
    assert {t.device.type for t in net.state_dict().values()} == {"cpu"}
    assert there.domain.backbone is again.domain.backbone is not here.domain.backbone
    bank.add("b", there)
    assert bank.domains["b"].digest == bank.domains["a"].digest
    own_bank = Bank.open(bank.path, copy.deepcopy(net).cuda())
    assert own_bank.load("a").fc.weight.device.type == "cuda"


def test_threads_get_one_backbone(tmp_path):
    bank = Bank.create(tmp_path / "garden", "resnet26(width=0.25)")
    bank.add("flowers", ot.attach(bank.backbone, ot.Norm(), CLASSES))
    expected, again, found = logits(bank.load("flowers")), Bank.open(bank.path), []
    threads = [
        threading.Thread(target=lambda: found.append(again.load("flowers"))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(model.domain.backbone) for model in found}) == 1
    assert all(torch.equal(logits(model), expected) for model in found)


def test_200_loads_leave_no_memory_behind(bank, net):
    bank.add("flowers", attached(net, ot.Full()))
    for _ in range(20):
        bank.load("flowers")
    gc.collect()
    before, pages = len(gc.get_objects()), resident_kib()
    for i in range(200):
        gone = weakref.ref(bank.load("flowers"))
        bank.replace("flowers", attached(net, ot.Full(), seed=i)) if i % 20 == 0 else None
        assert gone() is None
    gc.collect()
    assert len(gc.get_objects()) - before < 500
    assert resident_kib() - pages < 8 * 1024


def test_nothing_of_a_removed_domain_is_left(bank, net):
    bank.add("marguerite", attached(net))
    gone = weakref.ref(bank.load("marguerite"))
    bank.remove("marguerite")
    assert gone() is None
    assert "marguerite" not in repr(vars(bank)) and "marguerite" not in repr(bank.domains)
    assert not [file for file, data in state(bank).items() if b"marguerite" in data]


def resident_kib():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE") // 1024


ADDER = """
import sys, torch
torch.set_num_threads(1)
import onetrunk as ot
bank = ot.Bank.open(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for i in range(10):
    bank.add(f"theirs-{i}", ot.attach(bank.backbone, ot.Norm(), ["x", "y"], seed=i))
assert "onetrunk.bank.hub" not in sys.modules  # imported when it is used
"""


def test_two_processes_add_domains_to_one_bank(tmp_path):
    bank = Bank.create(tmp_path / "garden", "resnet26(width=0.25)")
    other = subprocess.Popen(
        [sys.executable, "-c", ADDER, bank.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout.readline() == b"ready\n"
    other.stdin.write(b"go\n")
    other.stdin.close()
    for i in range(10):
        bank.add(f"ours-{i}", ot.attach(bank.backbone, ot.Norm(), CLASSES, seed=i))
    assert other.wait(120) == 0
    other.stdout.close()
    assert set(bank.domains) == {f"{whose}-{i}" for whose in ("ours", "theirs") for i in range(10)}
    assert bank.generation == 21 and bank.verify().ok
    bank.load("theirs-5")


# What is refused, and how


def refused(bank, error, match, act):
    """`act` raises `error`, and not one byte of the bank is another."""
    before = state(bank)
    with pytest.raises(error, match=match) as caught:
        act()
    assert state(bank) == before
    return str(caught.value)


def test_names_are_refused_before_anything_else(tmp_path, bank, net):
    bank.add("flowers", attached(net))
    model = attached(net)
    for name in ("../x", "", "A", "a/b", "a" * 65, None, 3, "con.", "\0"):
        refused(bank, BankError, "is no name for a domain", lambda n=name: bank.add(n, model))
        refused(bank, BankError, "is no name", lambda n=name: bank.replace(n, model))
        refused(bank, BankError, "is no name", lambda n=name: bank.load(n))
        refused(bank, BankError, "is no name", lambda n=name: bank.rename("flowers", n))
        refused(bank, BankError, "is no name", lambda n=name: bank.remove(n))
        refused(bank, BankError, "is no name", lambda n=name: bank.export_domain(n, tmp_path / "x"))
        refused(bank, BankError, "is no name", lambda n=name: bank.import_domain(tmp_path / "x", n))
    assert not (tmp_path / "x").exists()
    refused(bank, BankError, "has a domain 'flowers' already", lambda: bank.add("flowers", model))
    refused(
        bank,
        BankError,
        "has no domain 'flwers'. Did you mean 'flowers'",
        lambda: bank.load("flwers"),
    )
    refused(bank, BankError, "has no domain 'x'", lambda: bank.replace("x", model))


def test_another_backbone_is_refused(bank, net):
    other = Tiny(seed=1)
    message = refused(
        bank, BankError, "the numbers would be meaningless", lambda: bank.add("a", attached(other))
    )
    assert fingerprint(other)[:12] in message and fingerprint(net)[:12] in message
    assert message.startswith("domain 'a' belongs to backbone") and str(bank.path) in message
    assert "Use the bank's own, Bank.open(path).backbone" in message
    with pytest.raises(BankError, match="the backbone that was given belongs to backbone"):
        Bank.open(bank.path, other)


def test_what_is_no_domain_or_no_backbone_is_refused(tmp_path, bank, net):
    refused(bank, AttachError, "is no domain's network", lambda: bank.add("a", net))
    for value in (None, 5, {"a": 1}):
        with pytest.raises(BankError, match=r"backbone is of type .*: give the module itself"):
            Bank.create(tmp_path / "new", value)
    with pytest.raises(BankError, match="backbone is of type str: give the module itself"):
        Bank.open(bank.path, "resnet26(width=0.25)")
    for act in (
        lambda: Bank.create(tmp_path / "new", attached(net)),
        lambda: Bank.open(bank.path, attached(net)),
    ):
        with pytest.raises(
            BankError, match=r"a domain's network and no backbone. Give model.domain"
        ):
            act()
    assert not (tmp_path / "new").exists()
    with pytest.raises(BankError, match="there is no bank at"):
        Bank.open(tmp_path / "new")
    with pytest.raises(BankError, match="there is one already"):
        Bank.create(bank.path, net)


def test_by_reference_is_refused_where_no_name_brings_the_weights_back(tmp_path, net):
    with pytest.raises(
        BankError, match=r"module:.*Tiny cannot be kept by reference.*Leave by_reference"
    ):
        Bank.create(tmp_path / "new", net, by_reference=True)
    other = ot.backbone("resnet26(width=0.25)")
    with torch.no_grad():
        other.stem.weight += 1
    with pytest.raises(BankError, match=r"resnet26\(width=0.25\) brings other weights than this"):
        Bank.create(tmp_path / "new", other, by_reference=True)
    assert not (tmp_path / "new").exists()


def test_shared_weights_that_changed_are_refused(bank, net):
    model = attached(net)
    model.conv1.layer.weight = nn.Parameter(model.conv1.layer.weight + 1)
    message = refused(bank, BankError, "no longer the backbone's", lambda: bank.add("a", model))
    assert "domain 'a': its shared weight conv1.weight" in message and "attach Full()" in message
    half = attached(net).half()
    refused(bank, BankError, r"\(torch.float16, not torch.float32\)", lambda: bank.add("a", half))
    with torch.no_grad():  # zero and minus zero are different bits
        net.conv2.bias.zero_()
    minus = attached(net)
    minus.conv2.layer.bias = nn.Parameter(-torch.zeros(16))
    with pytest.raises(BankError, match=r"conv2.bias is no longer the backbone's,"):
        Bank.create(bank.path.parent / "zero", net).add("a", minus)


def test_a_backbone_that_was_trained_is_refused_at_add_and_at_load(bank, net):
    bank.add("a", attached(net))
    with torch.no_grad():
        net.conv1.weight += 1
    model = attached(net)
    refused(bank, BankError, "domain 'b' belongs to backbone", lambda: bank.add("b", model))
    refused(bank, BankError, "backbone as it is now belongs to", lambda: bank.load("a"))
    with torch.no_grad():
        net.conv1.weight.copy_(Tiny().conv1.weight)
    bank.load("a")


def test_verify_finds_what_was_written_through_data(bank, net):
    bank.add("a", attached(net))
    bank.load("a").conv1.layer.weight.data.mul_(2)  # the backbone's: PyTorch counts no such write
    bank.load("a")
    (problem,) = bank.verify().problems
    assert "this bank's backbone as it is in memory belongs to backbone" in problem


class Averaging(nn.Module):
    """Takes off a running mean that no state_dict has."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(8), persistent=False)

    def forward(self, x):
        if self.training:
            self.mean.lerp_(x.detach().mean((0, 2, 3)), 0.1)
        return x - self.mean[:, None, None]


def test_numbers_that_no_file_would_hold_are_refused(tmp_path):
    net = Tiny()
    net.norm1 = Averaging()
    bank = Bank.create(tmp_path / "averages", net)
    model = ot.attach(net, ot.Parallel(), CLASSES, input_size=SIZE)
    bank.add("fresh", model)
    model.train()(torch.ones(2, *SIZE))
    refused(bank, BankError, "buffer norm1.mean is not .* not persistent, so no file would hold it",
            lambda: bank.add("trained", model))  # fmt: skip


def test_a_backbone_in_inference_mode_is_taken(tmp_path):
    net = Tiny()
    with torch.inference_mode():
        frozen = copy.deepcopy(net)
        frozen.load_state_dict(net.state_dict(), assign=False)
        for parameter in frozen.parameters():
            parameter.data = parameter.data.clone()
    bank = Bank.create(tmp_path / "garden", frozen)
    bank.add("a", attached(net))
    assert torch.equal(logits(bank.load("a")), logits(attached(net)))


def test_an_altered_network_is_refused(bank, net):
    more = attached(net)
    more.extra = nn.Linear(2, 2)
    message = refused(bank, BankError, "altered after attach", lambda: bank.add("a", more))
    assert "+ extra.weight (2, 2) torch.float32" in message
    for i in range(9):
        setattr(more, f"extra{i}", nn.Linear(2, 2))
    assert "  and 12 more" in refused(bank, BankError, "altered", lambda: bank.add("a", more))
    normed = attached(net)
    torch.nn.utils.parametrizations.weight_norm(normed.conv1.layer)
    refused(
        bank,
        BankError,
        "has no conv1.layer.weight, so it was wrapped",
        lambda: bank.add("a", normed),
    )
    double = attached(net)
    double.fc.double()
    refused(bank, BankError, "altered after attach", lambda: bank.add("a", double))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused(bank, net, value):
    for name in delta(attached(net)):
        model = attached(net)
        tensor = model.state_dict()[name]
        if tensor.is_floating_point():
            tensor.view(-1)[-1] = value
            message = refused(
                bank, BankError, "holds NaN or infinity", lambda m=model: bank.add("a", m)
            )
            assert f"domain 'a': {name} holds" in message


ITSELF = {}
ITSELF["x"] = ITSELF


@pytest.mark.parametrize(
    ("metrics", "match"),
    [
        ({"a": float("nan")}, r"the card of domain 'a'\['metrics'\]\['a'\] is nan of type float"),
        ({"a": np.float32("inf")}, r"is inf of type float"),
        ({"a": {1, 2}}, r"of type set. A card is plain JSON"),
        ({"a": np.zeros(3)}, r"of type ndarray. A card is plain JSON"),
        ({"a": torch.zeros(3)}, r"of type Tensor. A card is plain JSON"),
        ({"a": 1j}, r"of type complex"),
        ({1: 2}, r"has the key 1, and JSON's keys are str"),
        ({"a": 10**30}, r"64-bit int"),
        ({"a": "\ud800"}, r"plain JSON"),
        (ITSELF, r"the card of domain 'a' holds a value that holds itself"),
    ],
)
def test_metrics_without_json_form_are_refused(bank, net, metrics, match):
    model = attached(net)
    refused(bank, BankError, match, lambda: bank.add("a", model, metrics=metrics))
    if 1 not in metrics:
        match = match.replace("metrics", "provenance")
        refused(bank, BankError, match, lambda: bank.add("a", model, provenance=metrics))


def test_files_that_cannot_be_read_or_written_are_refused(tmp_path, bank, net):
    bank.add("a", attached(net))
    (tmp_path / "link").symlink_to(only_blob(bank, "a"))
    (tmp_path / "folder").mkdir()
    where = str(tmp_path)
    refused(
        bank,
        BankError,
        f"{where}/no cannot be read: No such file",
        lambda: bank.import_domain(tmp_path / "no", "b"),
    )
    refused(
        bank, DamagedError, "is a symbolic link", lambda: bank.import_domain(tmp_path / "link", "b")
    )
    refused(bank, DamagedError, "is a folder", lambda: bank.import_domain(tmp_path / "folder", "b"))
    refused(bank, BankError, "has a NUL in it", lambda: bank.import_domain("a\0b", "b"))
    refused(bank, BankError, "has a NUL in it", lambda: bank.export_domain("a", "a\0b"))
    refused(
        bank,
        BankError,
        f"{where}/no/x cannot be written",
        lambda: bank.export_domain("a", tmp_path / "no" / "x"),
    )
    refused(
        bank,
        BankError,
        "folder cannot be written",
        lambda: bank.export_domain("a", tmp_path / "folder"),
    )


def test_a_hostile_reference_is_not_followed(tmp_path):
    from onetrunk.bank.store import Store

    for option in (
        "checkpoint_path='/tmp/evil.pth'", "pretrained_cfg_overlay={'file': '/tmp/evil.pth'}",
        "pretrained=True", "cache_dir='/tmp'", "features_only=True", "act_layer={'a': 1}",
    ):  # fmt: skip
        folder = tmp_path / option.partition("=")[0]
        described = {"spec": f"timm:test_vit({option})", "fingerprint": "0" * 64}
        Store.create(folder, described)
        with pytest.raises(DamagedError, match="may name a file or an address, which is never"):
            _ = Bank.open(folder).backbone
        assert not Bank.open(folder).verify().ok
    Store.create(tmp_path / "unknown", {"spec": "os:system", "fingerprint": "0" * 64})
    with pytest.raises(OnetrunkError, match="unknown backbone source"):
        _ = Bank.open(tmp_path / "unknown").backbone
    Store.create(tmp_path / "lying", {"spec": "resnet26(width=0.25)", "fingerprint": "0" * 64})
    with pytest.raises(BankError, match=r"resnet26\(width=0.25\) as it is found now belongs to"):
        _ = Bank.open(tmp_path / "lying").backbone


# verify


def test_verify_says_that_a_whole_bank_is_whole(bank, net):
    bank.add("a", attached(net))
    found = bank.verify()
    assert found.ok and not found.problems and not found.remarks
    assert (found.n_domains, found.fingerprint) == (1, fingerprint(net))


def test_verify_without_the_users_module_says_what_it_could_not_do(bank, net):
    bank.add("a", attached(net))
    found = Bank.open(bank.path).verify()
    assert found.ok and len(found.remarks) == 1
    assert "were read and not built" in found.remarks[0] and "Tiny" in found.remarks[0]


def test_verify_remarks_on_files_that_are_no_part_of_the_bank(bank):
    (bank.path / "notes.txt").write_text("mine")
    found = bank.verify()
    assert found.ok and found.remarks == (
        "notes.txt: it is no part of a bank; nothing reads or removes it",
    )


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_verify_finds_damage_and_never_raises(tmp_path):
    bank = Bank.create(tmp_path / "garden", "resnet26(width=0.25)")
    for seed, name in enumerate("abc"):
        bank.add(name, ot.attach(bank.backbone, ot.Norm(), CLASSES, seed=seed))
    backbone = bank.path / "blobs" / f"{bank._store.manifest.backbone['blob']}.safetensors"
    blob = only_blob(bank, "a")
    whole = state(bank)

    flip(blob)
    found = bank.verify()
    assert not found.ok and found.n_domains == 3
    assert any(p.startswith(f"blobs/{blob.name}") for p in found.problems)
    assert any(p.startswith("domain 'a'") for p in found.problems)
    assert not any("domain 'b'" in p for p in found.problems)
    with pytest.raises(DamagedError, match=rf"domain 'a' cannot be read: .*{blob.name}"):
        bank.load("a")
    bank.load("b")

    blob.unlink()
    assert any("is not there" in p for p in bank.verify().problems)
    blob.write_bytes(whole[f"blobs/{blob.name}"])
    assert bank.verify().ok

    flip(backbone)
    for opened in (bank, Bank.open(bank.path)):  # with the backbone in memory, and without
        assert any(p.startswith("backbone: ") for p in opened.verify().problems)
    with pytest.raises(DamagedError, match=backbone.name):
        Bank.open(bank.path).load("b")
    backbone.unlink()
    assert any(p.startswith("backbone: ") for p in bank.verify().problems)

    (bank.path / "bank.json").write_bytes(b"{}")
    assert "is damaged" in bank.verify().problems[0]
    (bank.path / "bank.json").unlink()
    assert bank.verify().problems == (
        f"there is no bank at {bank.path} (no bank.json). Create one, or check the path.",
    )


def test_a_stored_backbone_of_other_bytes_is_found(tmp_path):
    from onetrunk.bank.store import Store

    net = ot.backbone("resnet26(width=0.25)")
    form, wrong = "resnet26(width=0.25)", {**net.state_dict()}
    wrong["stem.weight"] = wrong["stem.weight"] + 1
    described = {"spec": form, "fingerprint": fingerprint(net)}
    Store.create(tmp_path / "garden", described, pack(wrong, {"backbone": 1}))
    found = Bank.open(tmp_path / "garden").verify()
    assert any("the stored backbone of" in p and "meaningless" in p for p in found.problems)
    with pytest.raises(BankError, match="as it is found now belongs to"):
        _ = Bank.open(tmp_path / "garden").backbone


def test_verify_survives_what_no_file_should_do(bank, net, monkeypatch):
    bank.add("a", attached(net))
    monkeypatch.setattr("onetrunk.bank.bank.network_of", lambda *_: 1 / 0)
    assert bank.verify().problems == ("domain 'a': ZeroDivisionError: division by zero",)


def test_a_domain_removed_during_verify_is_no_problem(bank, net, monkeypatch):
    bank.add("a", attached(net))
    verify = bank._verify_backbone
    monkeypatch.setattr(
        bank, "_verify_backbone", lambda *x: (verify(*x), bank.remove("a"))[0]
    )  # fmt: skip
    assert bank.verify().ok


def test_blobs_are_plain_files_that_check_themselves(bank, net):
    bank.add("a", attached(net))
    tensors, card = unpack(only_blob(bank, "a").read_bytes(), "the blob")
    assert card["domain"] == 4 and card["backbone"]["fingerprint"] == fingerprint(net)
    assert tensors.keys() == stored(attached(net)).keys()


def test_a_bank_made_anew_over_another_backbone_is_opened_again(tmp_path):
    nets = [ot.backbone("resnet26(width=0.125)", pretrained=False) for _ in "ab"]
    nets[1].stem.weight.data.mul_(2)
    for net in nets:
        shutil.rmtree(tmp_path / "bank", ignore_errors=True)
        made = ot.Bank.create(tmp_path / "bank", net)
        made.add("a", ot.attach(net, classes=["no", "yes"], input_size=(3, 16, 16)))
        if net is nets[0]:
            opened = ot.Bank.open(tmp_path / "bank")
            opened.load("a")
    with pytest.raises(BankError, match="made anew over another backbone since it was opened"):
        opened.load("a")
    ot.Bank.open(tmp_path / "bank").load("a")


def test_a_device_without_numbers_is_refused(bank, net):
    bank.add("a", attached(net))
    with pytest.raises(BankError, match="device='meta' cannot be used: it holds no numbers"):
        bank.load("a", device="meta")


def test_a_form_that_wants_far_more_than_is_stored_is_refused_before_it_is_built(tmp_path):
    path = tmp_path / "bank"
    store = Store.create(path, {"spec": "resnet26(width=8.0)", "fingerprint": "0" * 64}, small())
    assert store.path == path
    with pytest.raises(
        DamagedError, match=r"resnet26\(width=8.0\).*which takes \d.*its file holds"
    ):
        ot.Bank.open(path).backbone  # noqa: B018


def small() -> bytes:
    net = ot.backbone("resnet26(width=0.125)", pretrained=False)
    described = {"spec": "resnet26(width=8.0)", "fingerprint": "0" * 64}
    return pack(net.state_dict(), {"backbone": WITHOUT_BASIS, **described})
