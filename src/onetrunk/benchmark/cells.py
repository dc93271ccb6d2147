"""A cell: one method trained on one domain of one backbone with one seed, tuned as all others are.

A cell's key is the digest of everything it depends on. Its trainings are records of their own and
each has a checkpoint, so a cell that was stopped goes on where it was.
"""

import dataclasses
import functools
import platform
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import nn

from ..backbones import backbone as build_backbone
from ..backbones import fingerprint
from ..bank.bank import Bank
from ..bank.names import is_name, suggest
from ..core.adapters import Head
from ..core.change import relative_change
from ..core.cost import cost
from ..core.domain import domain_of, stored
from ..data import Images, Prepared, Preprocessing, Splits, load
from ..errors import DataError, DivergedError
from ..training.checkpoint import forgotten_if_diverged
from ..training.evaluate import evaluate
from ..training.fit import best_device, fit
from ..training.probe import start_from_probe
from ..training.recipe import Recipe
from .allocated import probed
from .ledger import Ledger, digest_of
from .methods import Compressed, Lora, Placed, Scratch, Trained, adapts, read_method
from .protocol import TUNED_SEED, Protocol, Tuning
from .setting import Setting

FORMAT = 4  # of what a key is made of: raised where the same key would mean another computation


@dataclass(frozen=True)
class Trunk:
    """A backbone by its written form, with a file of weights or its own."""

    form: str
    weights: str = ""

    @classmethod
    def read(cls, text: str) -> "Trunk":
        """`resnet26(width=0.5)`, or with weights: `resnet26(width=0.5)@series.safetensors`."""
        form, _, weights = text.partition("@")
        return cls(form, weights)

    def __str__(self) -> str:
        return f"{self.form}@{Path(self.weights).name}" if self.weights else self.form


@dataclass(frozen=True)
class Cell:
    """What is computed; `data` is a folder of domains. How, `graphed` (see `fit`), is in no key."""

    study: str
    trunk: Trunk
    data: str
    domain: str
    method: str
    seed: int
    protocol: Protocol
    graphed: bool = False

    def configuration(self) -> dict[str, Any]:
        """Everything that the result depends on, as plain values."""
        return {
            "format": FORMAT,
            "backbone": self.trunk.form,
            "fingerprint": _trunk(self.trunk)[1],
            "domain": self.domain,
            "images": _digest_of_splits(self.data, self.domain),
            "method": self.method,
            "seed": self.seed,
            "protocol": self.protocol.to_json(),
            "recipe": dataclasses.asdict(self.protocol.recipe(self.protocol.start, 0, 1)),
        }

    @property
    def key(self) -> str:
        """The digest under which its record is kept."""
        return digest_of(self.configuration())


def run_cell(cell: Cell, ledger: Ledger, work: Path) -> dict[str, Any]:
    """The record of a cell: from the ledger where it is there, else computed and added to it.

    Args:
        work: a folder for checkpoints and for banks of the trained domains.
    """
    if (known := ledger.read().get(cell.key)) is not None:
        return known
    started = time.monotonic()
    setting = setting_of(cell)
    method = read_method(cell.method)
    assert not isinstance(method, Compressed)  # those have a file of their own
    if method == Placed(Head()):
        model = probed(setting)
        facts: dict[str, Any] = {"trials": []}
        facts |= dict.fromkeys(("lr", "decay", "norm_statistics", "epochs"))  # to its optimum
    else:
        model, facts = _tuned(cell, method, setting, ledger, work)
    record = {
        **figures(cell, model, setting),
        **facts,
        "n_train": len(setting.train),
        "seconds": round(facts.get("seconds", 0) + time.monotonic() - started, 1),
    }
    if adapts(cell.method):  # a compression may be of it
        _keep(cell, setting, model, record, work)
    ledger.append(record)
    return record


def train_again(cell: Cell, ledger: Ledger, work: Path) -> None:
    """Trains the network of a finished cell once more, as its record says, and stores it."""
    setting = setting_of(cell)
    method = read_method(cell.method)
    assert not isinstance(method, Compressed)
    model, _ = _tuned(cell, method, setting, ledger, work)
    _keep(cell, setting, model, ledger.read()[cell.key], work)


def _keep(
    cell: Cell, setting: Setting, model: nn.Module, record: dict[str, Any], work: Path
) -> None:
    metrics, provenance = {"test_accuracy": record["test_accuracy"]}, {"cell": cell.key}
    store(bank_path(work, cell), setting.backbone, cell.domain, model, metrics, provenance)


def figures(cell: Cell, model: nn.Module, setting: Setting) -> dict[str, Any]:
    """What a finished cell is reported by; the test images are scored here, once."""
    numbers = numbers_of(model)
    rival = isinstance(read_method(cell.method), Lora | Scratch)  # no change of ours to measure
    return {
        "key": cell.key,
        "kind": "cell",
        "study": cell.study,
        "backbone": str(cell.trunk),
        "domain": cell.domain,
        "method": cell.method,
        "seed": cell.seed,
        "per_class": cell.protocol.per_class,
        "short_classes": short_classes(setting, cell.protocol.per_class),
        "size_px": cell.protocol.size_px,
        "epochs": cell.protocol.n_epochs(len(setting.train)),
        "val_accuracy": evaluate(model, setting.val).accuracy,
        "test_accuracy": evaluate(model, _data(cell, "test", setting.preprocessing)).accuracy,
        **numbers,
        "backbone_numbers": shared_numbers(setting.backbone, domain_of(model).head),
        "site_change": None if rival else change(model),
        "machine": f"{platform.system()} {platform.machine()}, "
        + (torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }


def short_classes(setting: Setting, per_class: int | None) -> int:
    """Classes that have fewer than `per_class` training images."""
    counts = setting.train.labels.bincount(minlength=len(setting.classes))
    return int((counts < (per_class or 0)).sum())


def shared_numbers(backbone: nn.Module, head: Iterable[str]) -> int:
    """The backbone's numbers without its own classifier, which no domain has a use for."""
    heads = tuple(f"{name}." for name in head)
    tensors = backbone.state_dict().items()
    return sum(t.numel() for name, t in tensors if not name.startswith(heads))


def numbers_of(model: nn.Module) -> dict[str, Any]:
    """The domain's own numbers, without and of its head; those of a shared basis; by site."""
    heads = tuple(f"{name}." for name in domain_of(model).head)
    own = {name: t.numel() for name, t in stored(model).items()}
    head = sum(n for name, n in own.items() if name.startswith(heads))
    plan = domain_of(model).plan
    sites = {site.name: site.numbers for site in cost(model).sites} if plan else None
    return {
        "numbers": sum(own.values()) - head,
        "head_numbers": head,
        "shared_numbers": 0,
        "site_numbers": sites,
    }


def change(model: nn.Module) -> dict[str, float]:
    """Site -> relative size of the change there, rounded for the record."""
    return {site: round(value, 6) for site, value in relative_change(model).items()}


def _tuned(
    cell: Cell, method: Trained, setting: Setting, ledger: Ledger, work: Path
) -> tuple[nn.Module, dict[str, Any]]:
    """The cell's network at the setting that did best on validation images."""
    tuned = dataclasses.replace(cell, seed=TUNED_SEED)
    trials = _Trials(tuned, method, setting if tuned == cell else setting_of(tuned), ledger, work)
    tuning = cell.protocol.search(trials.accuracy)
    model = trials.models.get(tuning) if tuned == cell else None
    if model is None:  # of another seed, or trained before an interruption
        model, _ = _trained(cell, method, setting, tuning, work)
    facts = _facts(recipe_of(cell, method, tuning, len(setting.train)), method)
    return model, {
        "trials": list(trials.done.values()),
        "factor": tuning.factor,
        "seconds": trials.seconds if tuned == cell else 0,
        **facts,
    }


def _trained(
    cell: Cell, method: Trained, setting: Setting, tuning: Tuning, work: Path
) -> tuple[nn.Module, float]:
    """A network after its training, and its accuracy on validation images.

    Raises:
        DivergedError: where the learning rate is too high for this cell.
    """
    model = fresh(method, setting)
    checkpoint = work / "checkpoints" / f"{_trial_key(cell, tuning)}.safetensors"
    recipe = recipe_of(cell, method, tuning, len(setting.train))
    steps = fit(
        model, setting.train, recipe,
        val=setting.val, checkpoint=checkpoint, graphed=cell.graphed,
    )  # fmt: skip
    with forgotten_if_diverged(checkpoint):
        for _ in steps:
            pass
    checkpoint.unlink(missing_ok=True)
    return model, evaluate(model, setting.val).accuracy


def _trial_key(cell: Cell, tuning: Tuning) -> str:
    return digest_of({"cell": cell.key, **dataclasses.asdict(tuning)})


def fresh(method: Trained, setting: Setting) -> nn.Module:
    """A network as its training starts: at the linear probe's head where its features are used."""
    model = method.make(setting)
    if not isinstance(method, Scratch):
        start_from_probe(model, probed(setting))
    return model


def recipe_of(cell: Cell, method: Trained, tuning: Tuning, n_images: int) -> Recipe:
    """The recipe of one training of a cell on so many images."""
    recipe = cell.protocol.recipe(tuning, cell.seed, cell.protocol.n_epochs(n_images))
    if isinstance(method, Scratch):
        return dataclasses.replace(recipe, lr_full=method.lr_full * tuning.factor)
    return recipe


def _facts(recipe: Recipe, method: Trained) -> dict[str, Any]:
    """What was tuned, with the learning rate of what is trained beside norms and head."""
    whole = isinstance(method, Scratch) or (
        isinstance(method, Placed) and method.family.scope == "everything"
    )
    return {
        "lr": recipe.lr_full if whole else recipe.lr,
        "decay": recipe.decay_adapter,
        "norm_statistics": recipe.norm_statistics,
    }


class _Trials:
    """The trainings of one cell, each a record of its own; the best of them is its result."""

    def __init__(
        self, cell: Cell, method: Trained, setting: Setting, ledger: Ledger, work: Path
    ) -> None:
        self.cell, self.method, self.setting = cell, method, setting
        self.ledger, self.work = ledger, work
        self.done: dict[Tuning, dict[str, Any]] = {}
        self.models: dict[Tuning, nn.Module] = {}  # of those that were trained here
        self.seconds = 0.0  # of those that were trained in an earlier run

    def accuracy(self, tuning: Tuning) -> float:
        """The accuracy on validation images; 0 where the learning rate is too high for the cell."""
        if tuning not in self.done:
            recipe = recipe_of(self.cell, self.method, tuning, len(self.setting.train))
            facts = _facts(recipe, self.method)
            self.done[tuning] = {**facts, "val_accuracy": self._known(tuning)}
        return float(self.done[tuning]["val_accuracy"])

    def _known(self, tuning: Tuning) -> float:
        key = _trial_key(self.cell, tuning)
        if (known := self.ledger.read().get(key)) is not None:
            self.seconds += known.get("seconds", 0)
            return float(known["val_accuracy"])
        started = time.monotonic()
        accuracy = self._train(tuning)
        seconds = round(time.monotonic() - started, 1)
        self.ledger.append(
            {"key": key, "kind": "trial", "val_accuracy": accuracy, "seconds": seconds}
        )
        return accuracy

    def _train(self, tuning: Tuning) -> float:
        try:
            model, accuracy = _trained(self.cell, self.method, self.setting, tuning, self.work)
        except DivergedError:
            return 0.0
        self.models[tuning] = model
        return accuracy


def bank_path(work: Path, cell: Cell) -> Path:
    """The bank of one method's domains on one backbone with one seed under one protocol."""
    same = {**cell.configuration(), "domain": "", "images": ""}
    slug = "".join(c if c.isalnum() else "-" for c in f"{cell.trunk.form}-{cell.method}")
    return work / "banks" / f"{slug.strip('-')}-{cell.seed}-{digest_of(same)[:8]}"


def store(
    path: Path,
    backbone: nn.Module,
    name: str,
    model: nn.Module,
    metrics: dict[str, float],
    provenance: dict[str, Any],
) -> None:
    """Adds a trained domain to its bank, which is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        bank = Bank.open_or_create(path, backbone)
        put = bank.replace if bank_name(name) in bank.domains else bank.add
        put(bank_name(name), model, metrics=metrics, provenance=provenance)


def bank_name(domain: str) -> str:
    """A folder's name as a bank takes it; one that has to change gets a digest of its own."""
    if is_name(domain):
        return domain
    return f"{suggest(domain)[:55] or 'domain'}-{digest_of({'domain': domain})[:8]}"


def setting_of(cell: Cell) -> Setting:
    """The backbone and the images of a cell."""
    backbone, splits = _trunk(cell.trunk)[0], _splits(cell.data, cell.domain)
    preprocessing = Preprocessing.for_backbone(
        backbone, size_px=cell.protocol.size_px, hflip=splits.hflip is not False
    )
    train, protocol = _data(cell, "train", preprocessing), cell.protocol
    return Setting(
        backbone=backbone,
        classes=splits.classes,
        preprocessing=preprocessing,
        train=train,
        val=_data(cell, "val", preprocessing),
        seed=cell.seed,
        recipe=protocol.recipe(protocol.start, cell.seed, protocol.n_epochs(len(train))),
    )


def backbone_of(trunk: Trunk) -> nn.Module:
    """The backbone, built once a process."""
    return _trunk(trunk)[0]


@functools.lru_cache(maxsize=4)
def _trunk(trunk: Trunk) -> tuple[nn.Module, str]:
    """The backbone and its fingerprint; where it is trained, laid out as convolutions like it."""
    module = build_backbone(trunk.form, weights=trunk.weights or None)
    print_of = fingerprint(module)
    module.to(torch.device(best_device())).to(memory_format=torch.channels_last)
    return module, print_of


@functools.lru_cache(maxsize=64)
def _splits(data: str, domain: str) -> Splits:
    splits = load(Path(data) / domain).with_validation()
    if splits.test is None:
        raise DataError(
            f"domain {domain!r} of {data} has no test images: a study scores on them. "
            "Give it a test split (test.parquet, or a folder test/)."
        )
    return splits


@functools.lru_cache(maxsize=256)
def _digest_of_splits(data: str, domain: str) -> str:
    splits = _splits(data, domain)
    parts = {"train": splits.train, "val": splits.val, "test": splits.test}
    prints = {name: images.fingerprint() for name, images in parts.items() if images is not None}
    return digest_of({"hflip": splits.hflip, **prints})


def _data(cell: Cell, split: str, preprocessing: Preprocessing) -> Prepared:
    chosen = _subset_size(cell.protocol, split)
    drawn = cell.protocol.per_class is not None and split != "test"
    seed = cell.seed if drawn else 0
    return _prepared(cell.data, cell.domain, split, chosen, seed, preprocessing)


def _subset_size(protocol: Protocol, split: str) -> tuple[int, int, int | None]:
    """(images at most, least a class, at most a class) of a split; test images are all scored."""
    if split == "train":
        return protocol.images, protocol.least_per_class, protocol.per_class
    if split == "val":
        few = None if protocol.per_class is None else max(2, protocol.per_class // 2)
        return protocol.val_images, 2, few
    return 10**9, 0, None


@functools.lru_cache(maxsize=3)  # of one domain: each may hold gigabytes
def _prepared(
    data: str,
    domain: str,
    split: str,
    chosen: tuple[int, int, int | None],
    seed: int,
    preprocessing: Preprocessing,
) -> Prepared:
    images = getattr(_splits(data, domain), split)
    return Prepared(subset(images, *chosen, seed), preprocessing, on_broken="fail")


def subset(
    images: Images, most: int, least_per_class: int, per_class: int | None, seed: int
) -> Images:
    """Images drawn by class with a fixed seed: `per_class` of each, else its share of `most`."""
    share = min(1.0, most / len(images))
    rows: list[int] = []
    generator = torch.Generator().manual_seed(seed)
    for label in range(len(images.classes)):
        own = (images.labels == label).nonzero().flatten()
        shuffled = own[torch.randperm(len(own), generator=generator)].tolist()
        wanted = max(least_per_class, round(share * len(own))) if per_class is None else per_class
        rows += shuffled[:wanted]
    return images if len(rows) == len(images) else images.subset(sorted(rows))
