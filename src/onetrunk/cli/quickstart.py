"""quickstart: five small, really different domains on one ImageNet backbone, and the proof.

No network: the backbone is the packaged EfficientNet-Lite0, the images come with scikit-learn,
scikit-image and matplotlib. After every addition the earlier domains' logits are compared bit for
bit; at the end every domain is merged and compared, and the bank is verified.
"""

import dataclasses
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..backbones import backbone as build_backbone
from ..backbones import fingerprint
from ..bank.bank import Bank, is_bank
from ..bank.folder import BLOBS, LOCK, MANIFEST, UNFINISHED
from ..bank.lock import one_at_a_time
from ..core.merge import difference, merge
from ..core.tree import copy_tree
from ..data import Prepared, load
from ..errors import BankError, MergeError
from ..files import is_temporary
from ..training.examples import preprocessing_of
from ..training.recipe import Recipe
from .console import Screen, percent, size
from .picture import draw_domains, is_ours
from .training import Request, Trained, train_domain

BACKBONE = "timm:tf_efficientnet_lite0"
SIZE_PX = 64
MADE_BY = "made_by"  # in a domain's provenance
N_WATCHED = 16  # images a domain whose logits are compared


@dataclass(frozen=True)
class Planned:
    """A domain of the quickstart: where its images come from and how long it trains."""

    name: str
    source: str
    epochs: int


DOMAINS = (
    Planned("digits", "sklearn:digits", 3),
    Planned("glyphs", "builtin:glyphs", 5),
    Planned("textures", "builtin:textures", 4),
    Planned("faces", "builtin:faces", 8),
    Planned("photos", "builtin:photos", 4),
)


@dataclass(frozen=True)
class Watched:
    """A domain's images and the logits it gave for them when it was added."""

    images_bchw: Tensor
    logits_bc: Tensor


def run(out: Path, screen: Screen, epochs: int | None = None) -> None:
    """Trains, shows, proves and draws; the bank lies at `out` afterwards.

    Raises:
        BankError: where `out` exists and is no bank of an earlier quickstart, or a proof fails.
    """
    picture = _picture(out)
    busy = BankError(
        f"{out} is being made by another quickstart. Wait for it, or give another --out."
    )
    lock = out.with_name(f"{out.name}.lock")
    with one_at_a_time(lock, busy, BankError, f"cannot write beside {out}"):
        _run(out, picture, screen, epochs)


def _picture(out: Path) -> Path:
    """Where the picture goes: beside the bank, over that of an earlier quickstart only."""
    if not out.name:
        raise BankError(f"{out} has no name that a bank could get. Give one: --out demo.bank")
    picture = out.with_name(f"{out.name}.png")
    if os.path.lexists(picture) and not is_ours(picture):
        raise BankError(
            f"{picture} is there already, where the picture would go. Move it, or give another "
            "folder: onetrunk quickstart --out FOLDER"
        )
    return picture


def _run(out: Path, picture: Path, screen: Screen, epochs: int | None) -> None:
    started = time.monotonic()
    backbone = build_backbone(BACKBONE)
    _clear(out, fingerprint(backbone))
    screen.say("one backbone: EfficientNet-Lite0 with its ImageNet weights, frozen")
    bank = Bank.create(out, backbone)
    results: dict[str, Trained] = {}
    watched: dict[str, Watched] = {}
    for planned in DOMAINS:
        results[planned.name] = _add(bank, planned, screen, epochs)
        watched[planned.name] = _watch(bank, planned)
        _prove_isolation(bank, watched, planned.name, screen)
    screen.say()
    _show(bank, results, screen)
    screen.say()
    worst = _prove_merge(bank, watched, screen)
    verified = bank.verify()
    if not verified.ok:
        raise BankError(f"bank {out} is damaged: {verified.problems[0]}")
    screen.say(f"verified    every byte and all {verified.n_domains} domains of {out}")
    draw_domains(bank, results, picture)
    screen.say(f"picture     {picture}")
    seconds = time.monotonic() - started
    screen.say(f"\n{seconds:.0f} s. Next: onetrunk show {out} digits")
    screen.say(f"      or: onetrunk train {out} mine --data FOLDER_OF_CLASS_FOLDERS")
    screen.finish(
        {
            "bank": str(out),
            "picture": str(picture),
            "domains": {name: result.to_json() for name, result in results.items()},
            "others_bit_identical": True,
            "merged_difference": worst,
            "verified": verified.ok,
            "seconds": seconds,
        }
    )


def _clear(out: Path, backbone: str) -> None:
    """Makes room for the bank; only a bank that a quickstart made whole is removed."""
    if not out.exists() or (out.is_dir() and not is_bank(out)):
        return  # what a creation left that was killed, or what Bank.create refuses
    if not _is_mine(out, backbone):
        raise BankError(
            f"{out} is there already and holds more than a quickstart of this version. "
            "Give another folder: onetrunk quickstart --out FOLDER"
        )
    shutil.rmtree(out)


def _is_mine(out: Path, backbone: str) -> bool:
    """Whether all that is there is a quickstart's: backbone, domains, trainings under way."""
    try:
        bank = Bank.open(out)
        made = all(card.provenance.get(MADE_BY) == "quickstart" for card in bank.domains.values())
    except BankError:
        return False
    names = {path.name for path in out.iterdir()} - {MANIFEST, BLOBS, LOCK, UNFINISHED}
    trainings = {path.name for path in (out / UNFINISHED).glob("*")}
    names |= {name for name in trainings if Path(name).stem not in {one.name for one in DOMAINS}}
    foreign = [name for name in names if not is_temporary(name)]
    return made and bank.backbone_fingerprint == backbone and not foreign


def _add(bank: Bank, planned: Planned, screen: Screen, epochs: int | None) -> Trained:
    splits = load(planned.source)
    recipe = dataclasses.replace(Recipe(), epochs=epochs or planned.epochs)
    request = Request(
        planned.name, splits, planned.source,
        recipe=recipe, size_px=SIZE_PX, provenance={MADE_BY: "quickstart"},
    )  # fmt: skip
    return train_domain(bank, request, screen)


def _watch(bank: Bank, planned: Planned) -> Watched:
    model = bank.load(planned.name)
    splits = load(planned.source).with_validation()
    images = splits.test or splits.val
    assert images is not None  # with_validation gives at least the second
    few = images.subset(range(min(N_WATCHED, len(images))))
    prepared = Prepared(few, preprocessing_of(model))
    images_bchw = prepared.preprocessing.evaluation_view(prepared.batch(range(len(prepared)))[0])
    with torch.no_grad():
        return Watched(images_bchw, model(images_bchw))


def _prove_isolation(bank: Bank, watched: dict[str, Watched], new: str, screen: Screen) -> None:
    """Loads every earlier domain again: its logits must be the very same bits."""
    others = [name for name in watched if name != new]
    for name in others:
        with torch.no_grad():
            again = bank.load(name)(watched[name].images_bchw)
        if not torch.equal(again, watched[name].logits_bc):
            raise BankError(f"adding {new!r} changed the logits of {name!r}: please report this.")
    if others:
        screen.say(f"  unchanged, bit for bit: {', '.join(others)}")


def _prove_merge(bank: Bank, watched: dict[str, Watched], screen: Screen) -> float:
    """Merges every domain: exact in float64, and in float32 what rounding leaves, which is told."""
    worst = 0.0
    for name, seen in watched.items():
        model = bank.load(name)
        twice = copy_tree(model).double()
        exact = difference(twice, merge(twice), seen.images_bchw.double())
        if exact["difference"] > exact["limit"]:
            raise MergeError(f"merging {name!r} changes its logits: please report this.")
        found = difference(model, merge(model), seen.images_bchw)
        worst = max(worst, found["difference"])
    screen.say(
        f"merged      each domain is an ordinary network too: same logits within {worst:.0e}"
    )
    return worst


def _show(bank: Bank, results: dict[str, Trained], screen: Screen) -> None:
    head = ("domain", "classes", "images", "delta", "of backbone", "probe", "adapted", "seconds")
    rows = [
        (
            name,
            str(len(bank.domains[name].classes)),
            str(result.n_images),
            size(bank.domains[name].size),
            percent(result.cost.share),
            percent(result.probe_accuracy or 0.0),
            percent(result.evaluation.accuracy),
            f"{result.seconds:.0f}",
        )
        for name, result in results.items()
    ]
    screen.table(head, rows)
    first = next(iter(results.values())).cost
    deltas = sum(result.cost.delta_bytes for result in results.values())
    together, apart = first.backbone_bytes + deltas, first.backbone_bytes * len(results)
    screen.say(
        f"\n{len(results)} domains in {size(together)}; as fine-tuned networks {size(apart)}"
    )
    screen.say("isolated    adding each domain left the others' logits the same, bit for bit")
