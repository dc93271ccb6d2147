"""A bank of compressed domains: the basis is stored once, read back bit for bit, and checked."""

import pytest
import torch
from torch import nn

import onetrunk as ot
from onetrunk.bank.bank import Bank
from onetrunk.bank.basisfile import read_basis, write_basis
from onetrunk.bank.card import KEYS, read_blueprint
from onetrunk.core.adapters import Shared
from onetrunk.core.compress import compress
from onetrunk.core.cost import cost
from onetrunk.core.domain import delta
from onetrunk.core.rebuild import with_frozen_basis, with_trainable_basis
from onetrunk.core.tree import storage_key
from onetrunk.errors import BankError, DamagedError
from onetrunk.tensorfile import pack, unpack

SIZE = (3, 12, 12)
NAMES = ("flowers", "signs", "digits")


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8)
            self.conv2, self.norm2 = nn.Conv2d(8, 12, 3, 1, 1), nn.BatchNorm2d(12)
            self.fc = nn.Linear(12, 5)
        self.eval()

    def forward(self, x_bchw):
        x = self.norm1(self.conv1(x_bchw)).relu()
        return self.fc(self.norm2(self.conv2(x)).relu().mean((2, 3)))


@pytest.fixture
def net():
    return Tiny()


def compressed(net, family=None, share="output", fraction=0.5):
    family = family or ot.Parallel(init="released")
    models = {
        name: warmed(ot.attach(net, family, ["a", "b", "c"], input_size=SIZE, seed=seed))
        for seed, name in enumerate(NAMES)
    }
    return compress(models, rank_fraction=fraction, share=share)


@pytest.fixture
def bank(tmp_path, net):
    bank = Bank.create(tmp_path / "garden", net)
    for name, model in compressed(net).items():
        bank.add(name, model)
    return bank


@torch.no_grad()
def warmed(model):
    """A network whose norms have seen a batch."""
    model.train()(torch.rand(3, *SIZE, generator=torch.Generator().manual_seed(8)))
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(torch.rand(3, *SIZE, generator=torch.Generator().manual_seed(9)))


def files(bank):
    return {x.name: x.read_bytes() for x in bank.path.rglob("*") if x.is_file()}


def refused(bank, error, match, act):
    before = files(bank)
    with pytest.raises(error, match=match) as caught:
        act()
    assert files(bank) == before
    return str(caught.value)


@pytest.mark.parametrize("share", ["output", "input", "both"])
@pytest.mark.parametrize("family", [ot.Series("released"), ot.LowRank(2, "released")], ids=str)
def test_compressed_domains_come_back_bit_for_bit_over_one_basis(tmp_path, net, family, share):
    found = compressed(net, family, share)
    bank = Bank.create(tmp_path / "garden", net)
    for name, model in found.items():
        bank.add(name, model)
    opened = Bank.open(bank.path, Tiny())
    loaded = {name: opened.load(name) for name in found}
    for name, model in loaded.items():
        assert torch.equal(logits(model), logits(found[name]))
        assert all(torch.equal(t, delta(found[name])[n]) for n, t in delta(model).items())
        assert model.domain.basis == found.basis and model.domain.plan == found[name].domain.plan
        assert model.domain.shared == found[name].domain.shared
    held = [
        {storage_key(t) for n, t in m.state_dict().items() if n in m.domain.shared}
        for m in loaded.values()
    ]
    assert held[0] == held[1] == held[2]
    assert opened.verify().ok


def test_the_basis_is_stored_once_and_goes_with_the_last_domain(bank, net):
    basis = bank.load("signs").domain.basis
    blob = write_basis(basis)
    assert bank.basis_bytes == len(blob) > basis.n_bytes
    assert len(list((bank.path / "blobs").iterdir())) == 1 + len(NAMES) + 1  # backbone, own, basis
    for name in NAMES:
        assert bank.domains[name].numbers == cost(bank.load(name)).numbers
        assert cost(bank.load(name)).basis == basis.numbers
    for name in NAMES:
        assert bank.basis_bytes == len(blob)
        bank.remove(name)
    assert bank.basis_bytes == 0 and len(list((bank.path / "blobs").iterdir())) == 1


def test_a_later_domain_is_added_over_the_stored_basis(bank):
    opened = Bank.open(bank.path, Tiny())
    basis = opened.load("signs").domain.basis
    late = ot.attach(opened.backbone, classes=["x", "y"], basis=basis, input_size=SIZE)
    before = bank.basis_bytes
    opened.add("late", late)
    assert opened.basis_bytes == before
    assert opened.load("late").domain.basis is basis
    assert torch.equal(logits(opened.load("late")), logits(late.eval()))


def test_a_bank_keeps_domains_with_and_without_a_basis(bank, net):
    plain = warmed(ot.attach(net, ot.Parallel(init="released"), ["a", "b"], input_size=SIZE))
    bank.add("plain", plain)
    assert torch.equal(logits(bank.load("plain")), logits(plain)) and bank.verify().ok
    cards = {name: unpack(bank._store.read(name).blob, name)[1] for name in ("plain", "signs")}
    assert cards["plain"]["domain"] == 1 and cards["plain"].keys() == KEYS
    assert cards["signs"]["domain"] == 2 and cards["signs"].keys() == KEYS | {"basis"}


def test_an_exported_domain_is_a_standalone_one(bank, tmp_path):
    bank.export_domain("signs", tmp_path / "signs.safetensors")
    _, card = unpack((tmp_path / "signs.safetensors").read_bytes(), "signs")
    assert card["domain"] == 1 and not any("shared" in text for text in card["plan"])
    bank.import_domain(tmp_path / "signs.safetensors", "alone")
    torch.testing.assert_close(logits(bank.load("alone")), logits(bank.load("signs")))


def test_a_basis_that_was_written_to_in_memory_is_read_again(bank):
    expected = logits(bank.load("signs"))
    first = bank.load("flowers")
    with torch.no_grad():
        next(iter(first.domain.basis.tensors().values())).add_(1)
    assert torch.equal(logits(bank.load("signs")), expected)


def test_a_load_looks_at_no_basis_but_its_own(bank, net, monkeypatch):
    bank.add("plain", ot.attach(net, ot.Parallel(), ["a", "b"], input_size=SIZE))
    held, looks = bank.load("flowers"), []
    taken_now = type(held.domain.basis).taken_now
    monkeypatch.setattr(
        "onetrunk.core.basis.Basis.taken_now", lambda basis: looks.append(1) or taken_now(basis)
    )
    bank.load("plain")
    assert not looks
    bank.load("signs")
    assert looks


def test_a_damaged_or_missing_basis_is_found(bank):
    (digest,) = bank._store.manifest.shared
    file = bank.path / "blobs" / f"{digest}.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    for name in NAMES:
        with pytest.raises(DamagedError, match=digest):
            Bank.open(bank.path, Tiny()).load(name)
    assert len(Bank.open(bank.path, Tiny()).verify().problems) == 1 + len(NAMES)
    file.unlink()
    with pytest.raises(DamagedError, match="is not there"):
        Bank.open(bank.path, Tiny()).load("signs")
    file.write_bytes(whole)
    assert Bank.open(bank.path, Tiny()).verify().ok


def test_a_basis_trained_since_is_refused(bank, net):
    found = compressed(net)
    loose = with_trainable_basis(found)
    with torch.no_grad():
        for parameter in loose["signs"].parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    message = refused(
        bank, BankError, "basis has been trained", lambda: bank.add("x", loose["signs"])
    )
    assert "Add what with_frozen_basis(models) gives" in message
    bank.add("x", with_frozen_basis(loose)["signs"])
    with torch.no_grad():
        next(iter(found.basis.tensors().values())).add_(1)
    refused(bank, BankError, "written to since", lambda: bank.add("y", found["signs"]))


def tampered(bank, edit, card=None):
    """Puts another basis, or another card, in the place of the stored one; hashes are right."""
    entry = bank._store.manifest.domains["signs"]
    contents = bank._store.read("signs")
    tensors, old = unpack(contents.blob, "signs")
    blob = contents.blob if card is None else pack(tensors, {**old, **card})
    shared = [edit(x) for x in contents.shared.values()]
    bank._store.replace("signs", entry.card, blob, [x for x in shared if x is not None])


def rewritten(**changes):
    def edit(blob):
        tensors, card = unpack(blob, "basis")
        return pack(tensors, {**card, **changes})

    return edit


@pytest.mark.parametrize(
    ("edit", "error", "match"),
    [
        (lambda _: b"junk", DamagedError, "the basis of domain 'signs'.*no onetrunk file"),
        (rewritten(basis=2), BankError, "has format 2, .* by a newer onetrunk"),
        (rewritten(basis=0), DamagedError, "it is no basis of format 1"),
        (rewritten(more=1), DamagedError, "it is no basis of format 1"),
        (rewritten(plan=[]), DamagedError, "'plan' is an object"),
        (rewritten(plan={}), DamagedError, "disagree"),
        (rewritten(plan={"shared(rank=0)": ["conv1"]}), DamagedError, "rank is a whole number"),
        (rewritten(fingerprint="0" * 64), DamagedError, "its fingerprint disagree"),
        (rewritten(backbone="0" * 64), DamagedError, "its fingerprint disagree"),
        (lambda _: None, DamagedError, "disagree about its basis"),
    ],
)
def test_a_hostile_basis_is_refused_by_name(bank, edit, error, match):
    tampered(bank, edit)
    for opened in (bank, Bank.open(bank.path, Tiny())):
        with pytest.raises(error, match=match):
            opened.load("signs")
        opened.load("flowers")
    assert any("domain 'signs'" in p for p in Bank.open(bank.path, Tiny()).verify().problems)


def test_a_domain_over_another_basis_or_a_wrong_plan_is_refused(bank, net):
    other = compressed(net, fraction=0.3).basis
    tampered(bank, lambda _: write_basis(other))
    refused(
        bank, DamagedError, "it lies over basis .*, and the bank has", lambda: bank.load("signs")
    )
    tampered(bank, lambda _: write_basis(other), {"basis": other.fingerprint})
    refused(bank, DamagedError, "no network can be built", lambda: bank.load("signs"))
    plan = {str(Shared(rank=10**9)): ["conv1", "conv2"]}
    tampered(bank, lambda x: x, {"basis": other.fingerprint, "plan": plan})
    refused(bank, DamagedError, "no network can be built", lambda: bank.load("signs"))


def test_a_domain_without_its_basis_is_not_imported(bank, tmp_path):
    file = tmp_path / "bare.safetensors"
    file.write_bytes(bank._store.read("signs").blob)
    refused(
        bank, BankError, "over a basis that it does not hold", lambda: bank.import_domain(file, "x")
    )


def test_an_older_reader_is_told_that_a_newer_one_wrote_it(bank, monkeypatch):
    monkeypatch.setattr("onetrunk.bank.card.FORMAT", 1)
    _, card = unpack(bank._store.read("signs").blob, "signs")
    with pytest.raises(BankError, match=r"has format 2, and this .* reads format 1.*newer"):
        read_blueprint(card, "the file")


def test_a_basis_reads_back_and_keeps_its_fingerprint(net):
    basis = compressed(net, share="both").basis
    again = read_basis(write_basis(basis), "basis")
    assert again == basis and write_basis(again) == write_basis(basis)
    assert again.plan == basis.plan and hash(again) == hash(basis)
