"""train: one domain from a data source into a bank, with the linear probe as its yardstick."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..bank.bank import Bank, Card
from ..bank.folder import UNFINISHED
from ..bank.lock import one_training
from ..core.adapters import Family
from ..core.attach import Norms, attach
from ..core.basis import Basis
from ..core.cost import Cost, cost
from ..core.domain import delta, domain_of
from ..core.plan import Plan, Where
from ..data import Prepared, Preprocessing, Splits, load
from ..data.options import Fractions
from ..errors import BankError, DataError
from ..files import check_writable, reason
from ..training.cached import cached
from ..training.checkpoint import forgotten_if_diverged
from ..training.evaluate import Evaluation, evaluate
from ..training.fit import fit
from ..training.optimizer import held_norms
from ..training.probe import linear_probe, start_from_probe
from ..training.recipe import Recipe
from ..training.recomputed import recomputed
from ..training.size import sensible_size
from .console import Screen, followed, percent, size
from .reading import name_of, read, say_how_it_was_read

CUT = "split"  # in a domain's provenance: the shares of train, val and test


@dataclass(frozen=True)
class Request:
    """What to train, as the user asked for it."""

    domain: str
    splits: Splits
    source: str
    family: Family | Plan | None = None
    basis: Basis | None = None  # that the plan is over
    where: Where | None = None
    norms: Norms = "all"
    recipe: Recipe = field(default_factory=Recipe)
    size_px: int | None = None
    hflip: bool | None = None
    squash: bool = False
    probe: bool = True
    cache: int | None = None  # views an image of cached features; None: no cache
    cache_folder: Path | None = None
    recompute: bool = False
    graphed: bool = False
    resume: bool = False
    replace: bool = False
    device: str | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)  # beside data and recipe


@dataclass(frozen=True)
class Ready:
    """A source's images, ready for a network; None where there is no such split."""

    classes: tuple[str, ...]
    preprocessing: Preprocessing
    parts: dict[str, Prepared | None]
    started: float  # of the monotonic clock

    @property
    def n_images(self) -> int:
        """Training images."""
        train = self.parts["train"]
        return 0 if train is None else len(train)


@dataclass(frozen=True)
class Trained:
    """What came of it."""

    model: nn.Module
    evaluation: Evaluation
    evaluated_on: str
    probe_accuracy: float | None
    cost: Cost
    n_images: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain values for --json."""
        domain = domain_of(self.model)
        return {
            "accuracy": self.evaluation.accuracy,
            "balanced_accuracy": self.evaluation.balanced_accuracy,
            "evaluated_on": self.evaluated_on,
            "linear_probe_accuracy": self.probe_accuracy,
            "family": domain.family,
            "sites": len(domain.plan),
            "skipped": dict(domain.skipped),
            "classes": list(domain.classes),
            "train_images": self.n_images,
            "delta_numbers": self.cost.numbers,
            "delta_bytes": self.cost.delta_bytes,
            "delta_share_of_backbone": self.cost.share,
            "seconds": self.seconds,
        }


def train_domain(bank: Bank, request: Request, screen: Screen) -> Trained:
    """Trains, evaluates and stores one domain; a killed run goes on with `resume`.

    Raises:
        OnetrunkError: of the room that refuses; the bank is then as it was.
    """
    with alone(bank, request):
        return train_ready(bank, request, prepare(bank, request, screen), screen)


@contextmanager
def alone(bank: Bank, request: Request) -> Iterator[None]:
    """For one training of a name at a time, from before its images are read: two would write over
    each other.

    Raises:
        BankError: for a bank or cache that cannot be written, a name that is being trained or was
            taken, and a training that was stopped.
    """
    try:
        if request.cache_folder is not None and request.cache_folder.exists():
            check_writable(request.cache_folder)
        check_writable(bank.path)
    except OSError as error:
        raise BankError(f"cannot train into bank {bank.path}: {reason(error)}") from error
    with one_training(bank.path, request.domain):
        _refuse_taken(bank, request)
        yield


def _refuse_taken(bank: Bank, request: Request) -> None:
    name, checkpoint = request.domain, _checkpoint(bank, request)
    if name in bank.domains and not request.replace:
        raise BankError(f"bank {bank.path} has a domain {name!r} already: it was trained just now.")
    if checkpoint.exists() and not request.resume:
        raise BankError(
            f"{checkpoint} is a training of {name!r} that was stopped. Go on with --resume, or "
            "remove it."
        )


def _checkpoint(bank: Bank, request: Request) -> Path:
    return bank.path / UNFINISHED / f"{request.domain}.safetensors"


def prepare(bank: Bank, request: Request, screen: Screen) -> Ready:
    """The request's images as its network will see them.

    Raises:
        DataError: where the images cannot be read.
    """
    started = time.monotonic()
    splits = request.splits.with_validation()
    screen.say(f"{request.domain}: {_described(splits)}")
    bank.backbone.to(memory_format=torch.channels_last)  # steps are faster so, on CPUs too
    preprocessing = _preprocessing(bank.backbone, request)
    return Ready(splits.classes, preprocessing, _prepared(splits, preprocessing, screen), started)


def start_at_head(
    model: nn.Module, probed: nn.Module | None, request: Request, ready: Ready
) -> None:
    """Starts a domain's head at the linear probe's, where the probe's features are its own."""
    if probed is not None and held_norms(model, request.recipe, ready.n_images):
        start_from_probe(model, probed)  # with a batch's own statistics it would fit no longer


def train_ready(
    bank: Bank, request: Request, ready: Ready, screen: Screen, probed: nn.Module | None = None
) -> Trained:
    """`train_domain` over images that are ready; a linear probe that there is already is used.

    Raises:
        OnetrunkError: of the room that refuses; the bank is then as it was.
    """
    data = ready.parts
    model = attached(
        bank.backbone, request.family, ready, request.where, request.norms, request.basis
    )
    _say_family(model, request, screen)
    scored_on = "test" if data["test"] is not None else "val"
    if request.probe and probed is None:
        probed = probe(bank.backbone, ready, request.device, screen)
    start_at_head(model, probed, request, ready)
    came = {name: tensor.clone().cpu() for name, tensor in delta(model).items()}
    with forgotten_if_diverged(_checkpoint(bank, request)):
        _fit(bank, model, data, request, screen)
        result = evaluate(model, data[scored_on])
    if all(torch.equal(tensor.cpu(), came[name]) for name, tensor in delta(model).items()):
        screen.warn(
            f"{request.domain}: no epoch did better on validation images than the state that "
            "training started from, which is kept. Where that is not all right already, lower the "
            "learning rate (--recipe)."
        )
    trained = Trained(
        model,
        result,
        scored_on,
        None if probed is None else evaluate(probed, data[scored_on]).accuracy,
        cost(model),
        ready.n_images,
        time.monotonic() - ready.started,
    )
    _store(bank, request, trained)
    _say_result(trained, screen)
    return trained


def _described(splits: Splits) -> str:
    parts = {"train": splits.train, "val": splits.val, "test": splits.test}
    counts = ", ".join(f"{len(part)} {name}" for name, part in parts.items() if part is not None)
    return f"{len(splits.classes)} classes, images: {counts}"


def _preprocessing(backbone: nn.Module, request: Request) -> Preprocessing:
    hflip = request.hflip if request.hflip is not None else request.splits.hflip
    px = request.size_px or sensible_size(backbone, request.splits.train)
    base = Preprocessing.for_backbone(backbone, px, True if hflip is None else hflip)
    if not request.squash:
        return base
    return Preprocessing(**{**base.__dict__, "crop": "squash"})


def _prepared(
    splits: Splits, preprocessing: Preprocessing, screen: Screen
) -> dict[str, Prepared | None]:
    data: dict[str, Prepared | None] = {}
    for name in ("train", "val", "test"):
        images = getattr(splits, name)
        if images is None:
            data[name] = None
            continue
        data[name] = read(images, preprocessing, name, screen)
    say_how_it_was_read(splits, screen)
    return data


def _say_family(model: nn.Module, request: Request, screen: Screen) -> None:
    domain = domain_of(model)
    chosen = "" if request.family is not None else " (chosen for this backbone)"
    px = domain.preprocessing.size_px if domain.preprocessing else 0
    flips = "" if domain.preprocessing and domain.preprocessing.hflip else ", no flips"
    screen.say(f"  {domain.family}{chosen} at {len(domain.plan)} sites; {px} px{flips}")
    if domain.held:
        screen.say(f"  {len(domain.held)} norms stay the backbone's, up to {domain.held[-1]}")
    if domain.skipped:
        name, reason = next(iter(domain.skipped.items()))
        screen.say(f"  {len(domain.skipped)} layers without adapter, e.g. {name}: {reason}")


def attached(
    backbone: nn.Module,
    family: Family | Plan | None,
    ready: Ready,
    where: Where | None = None,
    norms: Norms = "all",
    basis: Basis | None = None,
) -> nn.Module:
    """A fresh domain for these images."""
    seen = ready.preprocessing
    return attach(
        backbone,
        family,
        ready.classes,
        basis=basis,
        where=where,
        preprocessing=seen,
        input_size=(seen.channels, seen.size_px, seen.size_px),
        norms=norms,
    )


def probe(backbone: nn.Module, ready: Ready, device: str | None, screen: Screen) -> nn.Module:
    """The linear probe on these images."""
    with screen.bar("linear probe") as show:
        return linear_probe(
            backbone,
            ready.parts["train"],
            ready.parts["val"],
            ready.classes,
            preprocessing=ready.preprocessing,
            device=device,
            progress=show,
        )


def _fit(
    bank: Bank,
    model: nn.Module,
    data: Mapping[str, Any],
    request: Request,
    screen: Screen,
) -> None:
    checkpoint = _checkpoint(bank, request)
    if request.resume and not checkpoint.exists():
        screen.say("  nothing to resume: starting from the beginning")
    train, val = data["train"], data["val"]
    if request.cache is not None:
        with screen.bar("computing features") as show:
            made = cached(
                model,
                train,
                request.recipe,
                val=val,
                views=request.cache,
                folder=request.cache_folder,
                device=request.device,
                progress=show,
            )
        screen.say(f"  {percent(made.cut.share)} of the network runs once, up to {made.cut.at}")
        model, train, val = made.model, made.train, made.val
    with screen.bar(f"training {request.domain}") as show:
        steps = fit(
            recomputed(model) if request.recompute else model,
            train,
            request.recipe,
            val=val,
            checkpoint=checkpoint,
            device=request.device,
            graphed=request.graphed,
        )
        for _ in followed(steps, show):
            pass


def _store(bank: Bank, request: Request, trained: Trained) -> None:
    metrics = {
        f"{trained.evaluated_on}_accuracy": trained.evaluation.accuracy,
        "balanced_accuracy": trained.evaluation.balanced_accuracy,
        "linear_probe_accuracy": trained.probe_accuracy,
    }
    provenance = {
        "data": name_of(request.source),
        "recipe": str(request.recipe),
        "train_images": trained.n_images,
        **request.provenance,
    }
    if (cut := request.splits.cut) is not None:
        provenance[CUT] = ",".join(map(repr, cut))
    put = bank.replace if request.replace and request.domain in bank.domains else bank.add
    model = trained.model.to(next(bank.backbone.parameters()).device)
    put(request.domain, model, metrics=metrics, provenance=provenance)
    _checkpoint(bank, request).unlink(missing_ok=True)


def load_as_trained(source: str, card: Card) -> Splits:
    """A source, cut as the domain's was for its training where it has no splits of its own."""
    cut = _cut_of(card)
    return load(source) if cut is None else load(source, split_fractions=cut)


def _cut_of(card: Card) -> Fractions | None:
    try:
        train, val, test = map(float, str(card.provenance.get(CUT)).split(","))
    except ValueError:
        return None  # it had splits of its own, or was trained elsewhere
    return train, val, test


def _say_result(trained: Trained, screen: Screen) -> None:
    accuracy = trained.evaluation.accuracy
    against = ""
    if trained.probe_accuracy is not None:
        gain = accuracy - trained.probe_accuracy
        against = f", linear probe {percent(trained.probe_accuracy)} ({100 * gain:+.1f} points)"
    screen.say(f"  {trained.evaluated_on} accuracy {percent(accuracy)}{against}")
    screen.say(
        f"  {size(trained.cost.delta_bytes)}, {percent(trained.cost.share)} of a fine-tuned "
        f"network; {trained.seconds:.0f} s"
    )


def split_of(splits: Splits, name: str, source: str) -> Any:
    """One split by name.

    Raises:
        DataError: where the source has no such split.
    """
    images = getattr(splits, name)
    if images is None:
        there = [n for n in ("train", "val", "test") if getattr(splits, n) is not None]
        raise DataError(f"{source} has no {name} split: it has {', '.join(there)}.")
    return images
