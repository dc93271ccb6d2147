"""Norm statistics that are the backbone's are not stored with a domain: format 4 of its card."""

import pytest
import torch
from torch import nn

import onetrunk as ot
from onetrunk.bank.bank import Bank
from onetrunk.bank.card import read_blueprint
from onetrunk.core.compress import compress
from onetrunk.core.cost import cost
from onetrunk.core.domain import delta
from onetrunk.core.tree import storage_key
from onetrunk.errors import BankError, DamagedError
from onetrunk.tensorfile import pack, unpack

SIZE = (3, 12, 12)
CLASSES = ["daisy", "rose"]
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class Tiny(nn.Module):
    """A backbone whose statistics are no fresh norm's."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8)
            self.conv2, self.norm2 = nn.Conv2d(8, 6, 3, 1, 1), nn.BatchNorm2d(6)
            self.fc = nn.Linear(6, 5)
            self.train()(torch.rand(4, *SIZE))
        self.eval()

    def forward(self, x_bchw):
        x = self.norm1(self.conv1(x_bchw)).relu()
        return self.fc(self.norm2(self.conv2(x)).relu().mean((2, 3)))


def trained(net, family, statistics="running", seed=0):
    """A domain after two epochs of `fit`."""
    model = ot.attach(net, family, CLASSES, input_size=SIZE, seed=seed)
    images = torch.rand(8, *SIZE, generator=torch.Generator().manual_seed(seed))
    data = torch.utils.data.TensorDataset(images, torch.arange(8) % 2)
    recipe = ot.Recipe(epochs=2, batch_size=4, norm_statistics=statistics)
    for _ in ot.fit(model, data, recipe):
        pass
    return model


def read(bank, name="flowers"):
    return unpack(bank._store.read(name).blob, name)


@pytest.fixture
def net():
    return Tiny()


@pytest.fixture
def bank(tmp_path, net):
    return Bank.create(tmp_path / "garden", net)


FAMILIES = [ot.Parallel(), ot.LowRank(rank=2), ot.Norm(), ot.Series(), ot.Full()]


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_a_domain_that_kept_them_reads_back_bit_for_bit_without_them(bank, net, family):
    model = trained(net, family)
    bank.add("flowers", model)
    tensors, card = read(bank)
    again = Bank.open(bank.path, Tiny()).load("flowers")
    assert card["domain"] == 4 and not any(n in tensors for n in statistics_of(net))
    assert delta(again).keys() == delta(model).keys()
    assert all(torch.equal(t, delta(model)[name]) for name, t in delta(again).items())
    assert bank.domains["flowers"].numbers == cost(model).numbers == cost(again).numbers
    assert bank.verify().ok


def statistics_of(net):
    return [name for name in net.state_dict() if name.endswith(STATISTICS)]


def test_an_adapters_own_norm_keeps_its_own(bank, net):
    bank.add("flowers", trained(net, ot.Series()))
    assert "conv2.adapter.norm.running_mean" in read(bank)[0]


def test_a_domain_that_moved_them_stores_them(bank, net):
    bank.add("flowers", trained(net, ot.Parallel(), "batch"))
    tensors, card = read(bank)
    assert card["domain"] == 1 and set(statistics_of(net)) <= tensors.keys()


def test_one_moved_statistic_is_stored_alone(bank, net):
    model = trained(net, ot.Parallel())
    model.norm1.running_var[0] += 0.5
    bank.add("flowers", model)
    assert [name for name in read(bank)[0] if name in statistics_of(net)] == ["norm1.running_var"]
    assert torch.equal(bank.load("flowers").norm1.running_var, model.norm1.running_var)


def test_a_loaded_domain_has_statistics_of_its_own(bank, net):
    """A later training may move them: the backbone must stay as it is."""
    bank.add("flowers", trained(net, ot.Parallel()))
    model, before = bank.load("flowers"), bank.backbone.norm1.running_mean.clone()
    assert storage_key(model.norm1.running_mean) != storage_key(bank.backbone.norm1.running_mean)
    model.train()(torch.rand(4, *SIZE))
    assert torch.equal(bank.backbone.norm1.running_mean, before)
    assert not torch.equal(model.norm1.running_mean, before)


def test_a_domain_over_a_basis_or_with_held_norms_leaves_them_out_too(bank, net):
    models = {name: trained(net, ot.Parallel(), seed=k) for k, name in enumerate(("one", "two"))}
    smaller = compress(models, rank_fraction=0.5)
    bank.add("shared", smaller["one"])
    late = ot.attach(
        net, ot.Parallel(), CLASSES, where=ot.Where(pattern="conv2"), norms="placed",
        input_size=SIZE,
    )  # fmt: skip
    bank.add("held", late)
    assert (read(bank, "shared")[1]["domain"], read(bank, "shared")[1]["held"]) == (4, [])
    assert read(bank, "shared")[1]["basis"] == smaller.basis.fingerprint
    assert (read(bank, "held")[1]["domain"], read(bank, "held")[1]["held"]) == (4, ["norm1"])
    x_bchw = torch.rand(2, *SIZE)
    for name, model in {"shared": smaller["one"], "held": late}.items():
        assert torch.equal(bank.load(name)(x_bchw), model.eval()(x_bchw))


def test_an_older_reader_is_told_that_a_newer_one_wrote_it(bank, net, monkeypatch):
    bank.add("flowers", trained(net, ot.Parallel()))
    monkeypatch.setattr("onetrunk.bank.card.FORMAT", 3)
    with pytest.raises(BankError, match=r"has format 4, and this .* reads format 3.*newer"):
        read_blueprint(read(bank)[1], "the file")


@pytest.mark.parametrize(
    ("missing", "change", "match"),
    [
        ("norm1.weight", {}, r"do not fit .*\n- norm1.weight"),
        ("conv1.adapter.a_oi", {}, r"do not fit .*\n- conv1.adapter.a_oi"),
        ("fc.bias", {}, r"do not fit .*\n- fc.bias"),
        (None, {"domain": 3, "held": ["norm1"]}, "do not fit"),
        (None, {"held": ["norm1", "norm1"]}, "'held' is not one or more different names"),
        (None, {"domain": 3}, "'held' is not one or more different names"),
    ],
)
def test_nothing_else_may_be_missing(bank, net, tmp_path, missing, change, match):
    bank.add("flowers", trained(net, ot.Parallel()))
    tensors, card = read(bank)
    tensors.pop(missing, None)
    numbers = sum(tensor.numel() for tensor in tensors.values())
    file = tmp_path / "given.safetensors"
    file.write_bytes(pack(tensors, {**card, "numbers": numbers, **change}))
    with pytest.raises(DamagedError, match=match):
        bank.import_domain(file, "given")
    assert set(bank.domains) == {"flowers"}
