"""Isolation (laws C1, C2, C6): random sequences of operations against a plain dict.

After every operation all other domains' logits and file bytes are bit-identical, the backbone's
fingerprint is what it was, and a refused operation has changed not one byte. A failing sequence is
named by its seed.
"""

import hashlib
import random
import tempfile
from pathlib import Path

import pytest
import torch
from torch import nn

import onetrunk as ot
from onetrunk.backbones import fingerprint
from onetrunk.bank.bank import Bank
from onetrunk.core.domain import delta
from onetrunk.core.tree import copy_tree
from onetrunk.errors import OnetrunkError

N_SEQUENCES, N_OPERATIONS, MAX_DOMAINS = 100, 30, 4
NAMES = ["a", "ab", "abc", "b", "a-b", "a_b", "default", "default2", "x" * 64]
HOSTILE = ["../a", "A", "", "a/b", ".", "a\0", "x" * 65, "ä"]
SIZE = (3, 12, 12)
FAMILIES = [
    ot.Series(init="released"), ot.Parallel(init="released"), ot.LowRank(rank=2, init="released"),
    ot.Channelwise(), ot.Norm(), ot.Full(), ot.Head(),
]  # fmt: skip


class Tiny(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8)
            self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8)
            self.fc = nn.Linear(8, 5)
        self.eval()

    def forward(self, x_bchw):
        x = self.norm1(self.conv1(x_bchw)).relu()
        return self.fc(self.norm2(self.conv2(x)).relu().mean((2, 3)))


PROBE = torch.rand(2, *SIZE, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model):
    return model.eval()(PROBE)


def delta_tensors(network):
    frozen = network.domain.frozen
    named = network.state_dict(keep_vars=True).items()
    return [tensor for name, tensor in named if name not in frozen]


def attached(net):
    return [ot.attach(net, family, ["x", "y", "z"], input_size=SIZE) for family in FAMILIES]


class Garden:
    """A bank beside what a plain dict says it must hold: name -> (live network, logits, bytes)."""

    def __init__(self, folder, seed, templates, foreign):
        self.draw, self.folder, self.n_files = random.Random(seed), folder, 0
        self.templates, self.foreign = templates, foreign
        self.net, self.other = templates[0].domain.backbone, foreign[0].domain.backbone
        self.fingerprint = fingerprint(self.net)
        self.bank = Bank.create(folder / "garden", self.net)
        self.model = {}

    def bytes_of(self, name):
        digest = self.bank.domains[name].digest
        return (self.bank.path / "blobs" / f"{digest}.safetensors").read_bytes()

    def everything(self):
        files = sorted(x for x in self.bank.path.rglob("*") if x.is_file())
        return {x.name: hashlib.sha256(x.read_bytes()).digest() for x in files}

    def free_name(self):
        return self.draw.choice([name for name in NAMES if name not in self.model])

    def known_name(self):
        return self.draw.choice(sorted(self.model))

    def fresh(self, templates=None):
        """A new domain: a template over the same frozen tensors, with numbers of its own."""
        template = self.draw.choice(templates or self.templates)
        network = copy_tree(template, own=delta_tensors(template))
        seed = torch.Generator().manual_seed(self.draw.randrange(1000))
        with torch.no_grad():
            for tensor in delta(network).values():
                if tensor.is_floating_point():
                    tensor += 0.1 * torch.rand(tensor.shape, generator=seed)
        return network

    def keep(self, name, network):
        self.model[name] = network, logits(network), self.bytes_of(name)

    def add(self):
        name, network = self.free_name(), self.fresh()
        self.bank.add(name, network, metrics={"loss": self.draw.random()})
        self.keep(name, network)

    def train_and_replace(self):
        name = self.known_name()
        live, expected, _ = self.model[name]
        network = self.bank.load(name) if self.draw.random() < 0.5 else live
        assert torch.equal(logits(network), expected)
        trainable = [p for p in network.parameters() if p.requires_grad]
        seed = torch.Generator().manual_seed(self.draw.randrange(1000))
        loss = network.train()(torch.rand(4, *SIZE, generator=seed)).logsumexp(1).sum()
        loss.backward()
        torch.optim.SGD(trainable, lr=0.01).step()
        self.bank.replace(name, network.eval())
        self.keep(name, network)

    def remove(self):
        name = self.known_name()
        self.bank.remove(name)
        del self.model[name]

    def rename(self):
        old, new = self.known_name(), self.free_name()
        self.bank.rename(old, new)
        self.model = {new if name == old else name: held for name, held in self.model.items()}

    def carry_over(self):
        old, new = self.known_name(), self.free_name()
        self.n_files += 1
        file = self.folder / f"{self.n_files}.safetensors"
        self.bank.export_domain(old, file)
        self.bank.import_domain(file, new)
        self.model[new] = self.bank.load(new), *self.model[old][1:]

    def reopen(self):
        self.bank = Bank.open(self.bank.path, self.net)

    def merge_a_copy(self):
        ot.merge(self.model[self.known_name()][0])

    def fail(self):
        taken, free = self.known_name(), self.free_name()
        hostile, before = self.draw.choice(HOSTILE), self.everything()
        broken = self.fresh()
        with torch.no_grad():
            broken.fc.bias[0] = float("nan")
        file = self.folder / "foreign.safetensors"
        file.write_bytes(self.draw.randbytes(200))
        act = self.draw.choice([
            lambda: self.bank.add(taken, self.fresh()),
            lambda: self.bank.add(hostile, self.fresh()),
            lambda: self.bank.add(free, self.fresh(self.foreign)),
            lambda: self.bank.add(free, self.net),
            lambda: self.bank.add(free, broken),
            lambda: self.bank.add(free, self.fresh(), metrics={"x": object()}),
            lambda: self.bank.replace(free, self.fresh()),
            lambda: self.bank.replace(taken, self.fresh(self.foreign)),
            lambda: self.bank.replace(taken, broken),
            lambda: self.bank.rename(taken, hostile),
            lambda: self.bank.rename(free, taken),
            lambda: self.bank.remove(free),
            lambda: self.bank.remove(hostile),
            lambda: self.bank.load(free),
            lambda: self.bank.import_domain(file, free),
            lambda: self.bank.import_domain(file, taken),
            lambda: self.bank.export_domain(free, self.folder / "never"),
            lambda: Bank.open(self.bank.path, self.other),
            lambda: Bank.create(self.bank.path, self.net),
        ])  # fmt: skip
        with pytest.raises(OnetrunkError):
            act()
        assert self.everything() == before and not (self.folder / "never").exists()

    def step(self):
        operations = [self.fail, self.reopen, self.train_and_replace, self.remove, self.rename]
        operations = [*operations, self.merge_a_copy] if self.model else [self.add]
        if self.model and len(self.model) < MAX_DOMAINS:
            operations += [self.add, self.add, self.carry_over]
        self.draw.choice(operations)()

    def check(self):
        assert list(self.bank.domains) == list(self.model)
        for name, (network, expected, data) in self.model.items():
            assert torch.equal(logits(network), expected), name
            assert self.bytes_of(name) == data, name
        if self.model:
            name = self.known_name()
            assert torch.equal(logits(self.bank.load(name)), self.model[name][1]), name
        assert fingerprint(self.net) == self.fingerprint


@pytest.fixture
def memory():
    """A folder in memory where there is one: 3,000 operations flush a file several times each."""
    where = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=where) as folder:
        yield Path(folder)


@pytest.mark.parametrize("tenth", range(10))
def test_no_operation_changes_another_domain(memory, tenth):
    templates, foreign = attached(Tiny()), attached(Tiny(seed=1))
    for seed in range(tenth * N_SEQUENCES // 10, (tenth + 1) * N_SEQUENCES // 10):
        folder = memory / str(seed)
        folder.mkdir()
        garden = Garden(folder, seed, templates, foreign)
        for place in range(N_OPERATIONS):
            try:
                garden.step()
                garden.check()
            except BaseException as error:
                raise AssertionError(f"sequence {seed}, operation {place}: {error!r}") from error
        assert garden.bank.verify().ok
        needed = 1 + len({card.digest for card in garden.bank.domains.values()})
        assert len(list((garden.bank.path / "blobs").iterdir())) == needed
