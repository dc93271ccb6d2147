"""A bank with domains whose norms stay the backbone's, or early ones: format 3 of a card."""

import pytest
import torch
from torch import nn

import onetrunk as ot
from onetrunk.bank.bank import Bank
from onetrunk.bank.card import read_blueprint
from onetrunk.core.compress import compress
from onetrunk.core.domain import delta
from onetrunk.errors import BankError, DamagedError
from onetrunk.tensorfile import pack, unpack

SIZE = (3, 12, 12)
LATE = ot.Where(pattern="conv2")


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8)
            self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8)
            self.fc = nn.Linear(8, 5)
        self.eval()

    def forward(self, x_bchw):
        x = self.norm1(self.conv1(x_bchw)).relu()
        return self.fc(self.norm2(self.conv2(x)).relu().mean((2, 3)))


def late(net, seed=0, norms="placed"):
    """A domain that has learned a little."""
    model = ot.attach(
        net, ot.Parallel(init="released"), ["daisy", "rose"], where=LATE, norms=norms,
        input_size=SIZE, seed=seed,
    ).train()  # fmt: skip
    x_bchw = torch.rand(4, *SIZE, generator=torch.Generator().manual_seed(seed))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(x_bchw).logsumexp(1).sum().backward()
    optimizer.step()
    return model.eval()


@pytest.fixture
def net():
    return Tiny()


@pytest.fixture
def bank(tmp_path, net):
    bank = Bank.create(tmp_path / "garden", net)
    bank.add("flowers", late(net))
    return bank


def card_of(bank, name="flowers"):
    return unpack(bank._store.read(name).blob, name)[1]


@pytest.mark.parametrize(("norms", "held"), [("placed", ("norm1",)), ("none", ("norm1", "norm2"))])
def test_it_reads_back_bit_for_bit(tmp_path, net, norms, held):
    bank, model = Bank.create(tmp_path / "garden", net), late(net, norms=norms)
    bank.add("flowers", model)
    again = Bank.open(bank.path, net).load("flowers")
    assert again.domain.held == model.domain.held == held
    assert delta(again).keys() == delta(model).keys()
    assert {f"{name}.layer.weight" for name in held} <= set(again.domain.frozen)
    x_bchw = torch.rand(2, *SIZE, generator=torch.Generator().manual_seed(1))
    assert torch.equal(again(x_bchw), model(x_bchw))
    assert bank.verify().ok


def test_only_a_domain_that_needs_it_is_of_the_new_format(bank, net):
    every = ot.attach(net, ot.Parallel(), ["daisy", "rose"], input_size=SIZE).train()
    every(torch.rand(2, *SIZE))
    bank.add("all", every)
    assert (card_of(bank)["domain"], card_of(bank, "all")["domain"]) == (3, 1)
    assert card_of(bank)["held"] == ["norm1"] and card_of(bank)["basis"] is None
    assert "held" not in card_of(bank, "all")


def test_a_domain_over_a_basis_keeps_them_too(bank, net):
    smaller = compress({"one": late(net), "two": late(net, seed=1)}, rank_fraction=0.5)
    x_bchw = torch.rand(2, *SIZE, generator=torch.Generator().manual_seed(1))
    for name, model in smaller.items():
        bank.add(name, model)
        assert card_of(bank, name)["basis"] == smaller.basis.fingerprint
        assert torch.equal(bank.load(name)(x_bchw), model.eval()(x_bchw))


def test_an_older_reader_is_told_that_a_newer_one_wrote_it(bank, monkeypatch):
    monkeypatch.setattr("onetrunk.bank.card.FORMAT", 2)
    with pytest.raises(BankError, match=r"has format 3, and this .* reads format 2.*newer"):
        read_blueprint(card_of(bank), "the file")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"held": []}, "'held' is not one or more different names"),
        ({"held": ["norm1", "norm1"]}, "'held' is not one or more different names"),
        ({"held": "norm1"}, "'held' is not a list of texts"),
        ({"held": None}, "'held' is not a list of texts"),
        ({"held": [1]}, "'held' is not a list of texts"),
        ({"held": ["nowhere"]}, "'nowhere' is to stay the backbone's norm"),
        ({"held": ["conv1"]}, "'conv1' is to stay the backbone's norm"),
        ({"held": ["norm2"]}, "numbers do not fit what its card describes"),
        ({"scope": "head"}, "'scope' is not adapters, where norms are held"),
        ({"basis": 1}, "'basis' is not a text"),
        ({"domain": 1}, "'its keys' is not"),
        ({"domain": 2}, "'its keys' is not"),
        ({"domain": True}, "'domain' is not format 1, 2, 3 or 4"),
    ],
)
def test_hostile_cards_are_refused(bank, tmp_path, change, match):
    tensors, card = unpack(bank._store.read("flowers").blob, "flowers")
    file = tmp_path / "given.safetensors"
    file.write_bytes(pack(tensors, {**card, **change}))
    with pytest.raises(DamagedError, match=match):
        bank.import_domain(file, "given")
    assert set(bank.domains) == {"flowers"}
