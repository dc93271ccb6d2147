"""compress: a bank's domains over one basis, into a new bank; accuracy before and after.

The new bank is built beside its place and gets its name when it is whole: a stop leaves nothing, or
where domains are tuned what --resume goes on from. Domains that have nothing to factor go over as
they are.
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from ..bank.bank import Bank, Card
from ..bank.folder import UNFINISHED
from ..core.activations import Covariances, activation_covariances
from ..core.adapters.shared import Share
from ..core.allocate import BYTES, budget_parts, parse_budget
from ..core.compress import Compressed, compress, compress_within, factorable, sweep
from ..core.domain import domain_of
from ..data import Images, Prepared, Splits
from ..data.source_folder import images_below
from ..errors import BankError, CompressError, DataError, DivergedError
from ..pictures import check_drawable, draw_accuracy_against_size
from ..training.evaluate import evaluate
from ..training.examples import preprocessing_of
from ..training.fit import fit
from ..training.jointly import tune_basis
from ..training.recipe import Recipe
from .console import Screen, followed, percent
from .reading import read
from .summary import Figures, Summary, show
from .training import load_as_trained
from .unfinished import alone, beside, finish, stopped, unfinished_path

KEEPS = (0.15, 0.25, 0.35, 0.5, 0.7, 1.0)  # budgets of the picture
COPIED = "copied: "
BASIS_TUNED, TUNED_EPOCHS = "basis_tuned", "tuned_epochs"  # in a domain's provenance
TUNING_EPOCHS = 8
N_SEEN = 128  # images of a domain, without their labels, that activations are taken from


@dataclass(frozen=True)
class Request:
    """What to compress and how, as the user asked for it."""

    bank: Bank
    out: Path
    keep: float | None = None
    budget: str | None = None
    max_loss: float | None = None
    uniform: bool = False
    share: Share = "input"
    data: Mapping[str, str] = field(default_factory=dict)  # domain -> source
    images: Mapping[str, str] = field(default_factory=dict)  # domain -> folder without labels
    tune: frozenset[str] = frozenset()  # those of `data` that are tuned
    tune_basis: bool = False
    epochs: int = TUNING_EPOCHS
    picture: bool = True
    resume: bool = False

    @cached_property
    def cards(self) -> Mapping[str, Card]:
        """The domains as they were when first asked for, whatever others do to the bank."""
        return self.bank.domains

    @property
    def file(self) -> Path:
        """Where the picture goes."""
        return self.out.with_name(f"{self.out.name}.png")


@dataclass(frozen=True)
class Parts:
    """A domain's images: to tune with, to choose by, to be judged by."""

    train: Prepared
    val: Prepared
    judged: Prepared
    judged_on: str
    prints: str  # of the images as they came


def run(request: Request, screen: Screen) -> None:
    """Compresses, tunes, compares and writes the new bank.

    Raises:
        OnetrunkError: of the room that refuses; nothing is at `request.out` then, and beside it
            only what was tuned so far.
    """
    _refuse_contradictions(request)
    with alone(request.out):
        models, figures = _chosen(request)
        _refuse_unknown(request, models)
        if request.picture and request.data:
            check_drawable(request.file, "the picture", " (else say --no-picture)")
        parts = {
            name: _parts(models[name], load_as_trained(source, request.cards[name]), source, screen)
            for name, source in request.data.items()
        }
        unlabelled = {name: _unlabelled(folder) for name, folder in request.images.items()}
        asked = _asked(request, parts, unlabelled)
        if known := stopped(request.out, asked):
            summary = Summary.from_json(known)
        else:
            if request.resume:
                screen.say("nothing to resume: starting from the beginning")
            seen = _seen(models, parts, unlabelled, screen)
            summary = _make(models, figures, parts, seen, asked, request, screen)
        if request.tune:
            try:
                _tune(parts, summary, request, screen)
            except KeyboardInterrupt:
                folder = unfinished_path(request.out)
                screen.warn(f"what was tuned is in {folder}: go on with --resume.")
                raise
            finish(request.out)
    _tell(models, parts, summary, request, screen)


def _make(
    models: Mapping[str, nn.Module],
    figures: dict[str, Figures],
    parts: Mapping[str, Parts],
    seen: Covariances | None,
    asked: Mapping[str, Any],
    request: Request,
    screen: Screen,
) -> Summary:
    """Makes the new bank, an unfinished one where domains are to be tuned."""
    found = _compressed(models, parts, seen, request, screen)
    for name, data in parts.items():
        figures[name].judged_on = data.judged_on
        figures[name].before = _accuracy(models[name], data.judged, f"{name} before", screen)
        figures[name].compressed = _accuracy(found[name], data.judged, f"{name} after", screen)
    summary = Summary.of(found, figures)
    if request.picture:
        summary.curve = _curve(models, parts, seen, request, screen)
    if request.tune_basis:
        tuned = _basis_tuned(found, parts, request, screen)
        summary.basis_tuned, found = tuned.basis != found.basis, tuned
    with beside(request.out, asked, summary.to_json() if request.tune else None) as folder:
        new = Bank.create(folder, request.bank.backbone, by_reference=request.bank.by_reference)
        for name in request.cards:
            _add(new, name, found.models.get(name), parts, summary, request)
    return summary


def _tell(
    models: Mapping[str, nn.Module],
    parts: Mapping[str, Parts],
    summary: Summary,
    request: Request,
    screen: Screen,
) -> None:
    new = Bank.open(request.out, request.bank.backbone)
    for name, known in summary.domains.items():
        known.bytes_before = request.cards[name].size
        known.bytes_after = new.domains[name].size
    show(
        summary, request.bank.basis_bytes, new.basis_bytes, screen, asked=request.keep,
        uniform=request.uniform,
    )  # fmt: skip
    if summary.curve:
        made = {name: new.load(name) for name in parts}
        stored = summary.kept, _on_validation(made, parts, "stored", screen)
        original = _on_validation(models, parts, "as they were", screen)
        draw_accuracy_against_size(summary.curve, stored, original, request.file)
        screen.say(f"picture {request.file}")
    screen.finish(
        {
            "bank": str(request.out),
            "share": request.share,
            "numbers_before": summary.numbers_before,
            "numbers_after": summary.numbers_after,
            "kept": summary.kept,
            "basis_bytes": new.basis_bytes,
            BASIS_TUNED: summary.basis_tuned,
            "picture": str(request.file) if summary.curve else None,
            "left_out": summary.left_out,
            "domains": {name: vars(known) for name, known in summary.domains.items()},
        }
    )


def _asked(
    request: Request, parts: Mapping[str, Parts], unlabelled: Mapping[str, Images]
) -> dict[str, Any]:
    """What a run that goes on must agree on, as JSON values."""
    words = (
        "keep", "budget", "max_loss", "uniform", "share", "tune_basis", "epochs", "picture",
    )  # fmt: skip
    images = {name: part.prints for name, part in parts.items()}
    images |= {name: found.fingerprint()[:16] for name, found in unlabelled.items()}
    return {
        **{f"--{word.replace('_', '-')}": getattr(request, word) for word in words},
        **{f"--tune {name}": True for name in request.tune},
        **{f"images of {name}": prints for name, prints in images.items()},
        **{f"domain {name}": card.digest[:16] for name, card in request.cards.items()},
    }


def read_pairs(words: Sequence[str], option: str) -> dict[str, str]:
    """`flowers=photos/flowers` as domain -> source.

    Raises:
        DataError: where a word is no such pair, or names a domain twice.
    """
    pairs: dict[str, str] = {}
    for word in words:
        name, _, source = word.partition("=")
        if not name or not source:
            raise DataError(f"{option} {word!r}: write DOMAIN=SOURCE, e.g. flowers=photos/flowers.")
        if name in pairs:
            raise DataError(f"{option} names domain {name!r} twice. Leave one out.")
        pairs[name] = source
    return pairs


def _refuse_contradictions(request: Request) -> None:
    if os.path.lexists(request.out):
        raise BankError(
            f"{request.out} is there already. Give another folder: a bank is never compressed in "
            "place."
        )
    if request.picture and request.data and os.path.lexists(request.file):
        raise BankError(
            f"{request.file} is there already, where the picture would go. Move it, give another "
            "--out, or say --no-picture."
        )
    if request.uniform and request.keep is None:
        raise CompressError("--uniform goes with --keep, the share of the ranks: say --keep 0.5.")
    if request.keep is not None and not 0 < request.keep <= 1:
        raise CompressError(f"--keep {request.keep:g}: give a share above 0 and up to 1.")
    if request.max_loss is not None and not 0 <= request.max_loss < 1:
        raise CompressError(
            f"--max-loss {request.max_loss:g}: give a share of accuracy from 0 to below 1, "
            "e.g. 0.01, a point."
        )
    if sum(said is not None for said in (request.keep, request.budget, request.max_loss)) != 1:
        raise CompressError(
            "say how far: one of --keep 0.5, --budget 300kB, and --max-loss 0.01, a point of "
            "accuracy a domain."
        )
    if request.budget is not None:
        parse_budget(request.budget, request.bank.backbone)
    if request.max_loss is not None and not request.data:
        raise CompressError(
            "--max-loss needs validation images: give --data DOMAIN=SOURCE or --tune "
            "DOMAIN=SOURCE for the domains that it is to hold for."
        )
    if not request.resume and os.path.lexists(folder := unfinished_path(request.out)):
        raise BankError(
            f"{folder} is a compression that was stopped. Go on with --resume, or remove it."
        )


def _chosen(request: Request) -> tuple[dict[str, nn.Module], dict[str, Figures]]:
    """The domains to compress, and a line for every one, which says why it is left out."""
    loaded = {name: request.bank.load(name) for name in request.cards}
    if not loaded:
        raise CompressError(f"bank {request.bank.path} has no domains. Train some first.")
    sites = {name: tuple(sorted(factorable(m).items())) for name, m in loaded.items()}
    counts = Counter(found for found in sites.values() if found)
    if not counts:
        name, model = next(iter(loaded.items()))
        raise CompressError(
            f"none of the {len(loaded)} domains has series, parallel or low-rank adapters of its "
            f"own that can be factored; {name!r}: {_note(model, None).removeprefix(COPIED)}. "
            "Train some first."
        )
    (most, n_domains), *others = counts.most_common()
    if n_domains == 1 and others:
        names = ", ".join([name for name, found in sites.items() if found][:6])
        raise CompressError(
            f"no two of {names} have adapters of one kind at the same layers, so that they share "
            "nothing. Train them with one family at the same places, or by one plan (--plan-of)."
        )
    first = next(name for name, found in sites.items() if found == most)
    notes = {
        name: "" if found == most else _note(loaded[name], first if found else None)
        for name, found in sites.items()
    }
    models = {name: model for name, model in loaded.items() if not notes[name]}
    return models, {name: Figures(note=note) for name, note in notes.items()}


def _note(model: nn.Module, first: str | None) -> str:
    """Why a domain is not compressed with `first`; None where it has nothing that could be."""
    if domain_of(model).basis is not None:
        return f"{COPIED}it is over a basis already"
    if first is not None:
        return f"{COPIED}its adapters are others, or at other layers, than those of {first!r}"
    return f"{COPIED}no adapters to factor ({domain_of(model).family})"


def _refuse_unknown(request: Request, models: Mapping[str, nn.Module]) -> None:
    if twice := next((name for name in request.images if name in request.data), None):
        raise CompressError(
            f"domain {twice!r} has --images and images of --data or --tune, which serve as well. "
            "Leave one out."
        )
    for name in (*request.data, *request.images):
        if name not in models:
            raise CompressError(
                f"data was given for domain {name!r}, which is not among those that are compressed "
                f"({', '.join(models)}). Leave it out."
            )
    if request.tune_basis and (untuned := [n for n in models if n not in request.tune]):
        raise CompressError(
            f"--tune-basis moves the basis under every domain, and {untuned[0]!r} has no --tune "
            "DOMAIN=SOURCE. Give one for each, or tune the domains' own factors alone."
        )
    unseen = [name for name in models if name not in request.data]
    if request.max_loss is not None and unseen:
        raise CompressError(
            f"--max-loss holds for domains whose images are given, and {', '.join(unseen[:6])} "
            f"{'have' if len(unseen) > 1 else 'has'} none. Give --data for every domain, or say "
            "how much stays with --keep."
        )


def _parts(model: nn.Module, splits: Splits, source: str, screen: Screen) -> Parts:
    splits = splits.with_validation()
    classes = domain_of(model).classes
    if sorted(splits.classes) != sorted(classes):
        raise DataError(
            f"{source} has the classes {', '.join(splits.classes[:6])}, the domain "
            f"{', '.join(classes[:6])}. Give the domain's own data."
        )
    preprocessing = preprocessing_of(model)

    def ready(images: Images, what: str) -> Prepared:
        return read(images.in_order(classes), preprocessing, what, screen, f" of {source}")

    used = [images for images in (splits.train, splits.val, splits.test) if images is not None]
    prints = " ".join(images.fingerprint()[:16] for images in used)
    assert splits.val is not None  # with_validation made one
    train, val = ready(splits.train, "train"), ready(splits.val, "val")
    if splits.test is None:
        return Parts(train, val, val, "val", prints)
    return Parts(train, val, ready(splits.test, "test"), "test", prints)


def _unlabelled(folder: str) -> Images:
    """Some images below a folder, evenly spread, as images of one class that is not looked at."""
    top = Path(folder)
    files = sorted(images_below(top, top, [])) if top.is_dir() else []
    if not files:
        raise DataError(f"--images {folder}: there is no image below. Give a folder of images.")
    chosen = files[:: -(-len(files) // N_SEEN)]
    return Images.from_files(chosen, [0] * len(chosen), ["unlabelled"])


def _seen(
    models: Mapping[str, nn.Module],
    parts: Mapping[str, Parts],
    unlabelled: Mapping[str, Images],
    screen: Screen,
) -> Covariances | None:
    """The activations on images, where every domain has some: no label is looked at."""
    lacking = [name for name in models if name not in parts and name not in unlabelled]
    if lacking:
        if parts or unlabelled:
            screen.warn(
                f"errors are those of the matrices, not of outputs: {lacking[0]!r} has no images. "
                "Give --data or --images for every domain to weigh them by real activations."
            )
        return None
    seen: dict[str, Any] = {}
    images = {
        name: read(unlabelled[name], preprocessing_of(model), "unlabelled", screen, f" of {name}")
        if name in unlabelled
        else parts[name].train
        for name, model in models.items()
    }
    with screen.bar("looking at activations") as show:
        for done, (name, model) in enumerate(models.items()):
            seen |= activation_covariances({name: model}, {name: images[name].few_views(N_SEEN)})
            show(done + 1, len(models))
    return seen


def _compressed(
    models: Mapping[str, nn.Module],
    parts: Mapping[str, Parts],
    seen: Covariances | None,
    request: Request,
    screen: Screen,
) -> Compressed:
    if request.uniform:
        return compress(models, rank_fraction=request.keep, share=request.share, covariances=seen)
    if request.budget is not None:
        amount, unit = budget_parts(request.budget)
        asked = (
            {"n_bytes": round(amount * BYTES[unit])}
            if unit in BYTES
            else {"numbers": parse_budget(request.budget, request.bank.backbone)}
        )
        try:
            return compress(models, **asked, share=request.share, covariances=seen)
        except CompressError as error:
            raise CompressError(f"--budget {request.budget}: {error}") from None
    if request.max_loss is None:
        return compress(models, request.keep, share=request.share, covariances=seen)

    def accuracy(name: str, model: nn.Module) -> float:
        return _accuracy(model, parts[name].val, f"{name}, looking for the smallest", screen)

    return compress_within(
        models, accuracy, request.max_loss, share=request.share, covariances=seen
    )


def _accuracy(model: nn.Module, images: Prepared, what: str, screen: Screen) -> float:
    with screen.bar(f"evaluating {what}") as show:
        return evaluate(model, images, progress=show).accuracy


def _basis_tuned(
    found: Compressed, parts: Mapping[str, Parts], request: Request, screen: Screen
) -> Compressed:
    """The domains over their basis as it is or trained by all of them, whichever is better."""
    if not found.basis.factors:
        screen.say("  there is no basis to tune: every layer stays as it was")
        return found
    with screen.bar("tuning the basis") as show:
        models = tune_basis(
            found.models,
            {name: data.train for name, data in parts.items()},
            {name: data.val for name, data in parts.items()},
            Recipe(epochs=request.epochs),
            progress=show,
        )
    basis = domain_of(next(iter(models.values()))).basis
    assert basis is not None  # there was one to tune
    if basis == found.basis:
        screen.say("  the basis stays as it was: tuning it did not help on validation images")
        return found
    return replace(found, models=models, basis=basis)


def _tune(parts: Mapping[str, Parts], summary: Summary, request: Request, screen: Screen) -> None:
    """Tunes the domains of the unfinished bank that are not yet; their basis stays."""
    folder = unfinished_path(request.out)
    bank = Bank.open(folder, request.bank.backbone)
    recipe = Recipe(epochs=request.epochs)
    for name in sorted(request.tune):
        known, checkpoint = summary.domains[name], folder / UNFINISHED / f"{name}.safetensors"
        card = bank.domains[name]
        if card.provenance[TUNED_EPOCHS]:
            known.tuned = card.metrics[f"{parts[name].judged_on}_accuracy"]
            continue
        model = bank.load(name)
        try:
            _fit(name, model, parts[name], recipe, checkpoint, screen)
        except DivergedError as error:
            screen.warn(f"{name} stays as it was compressed: {error}")
            known.note = "its tuning diverged"
        else:
            known.tuned = _accuracy(model, parts[name].judged, f"{name} tuned", screen)
            _add(bank, name, model, parts, summary, request)
        checkpoint.unlink(missing_ok=True)


def _fit(
    name: str, model: nn.Module, data: Parts, recipe: Recipe, checkpoint: Path, screen: Screen
) -> None:
    """Trains the domain's own factors, norms and head in place."""
    with screen.bar(f"tuning {name}") as show:
        steps = fit(model, data.train, recipe, val=data.val, checkpoint=checkpoint)
        for _ in followed(steps, show):
            pass


def _curve(
    models: Mapping[str, nn.Module],
    parts: Mapping[str, Parts],
    seen: Covariances | None,
    request: Request,
    screen: Screen,
) -> list[tuple[float, float]]:
    """(share kept, mean validation accuracy) at several budgets, without tuning."""
    points: list[tuple[float, float]] = []
    for keep in KEEPS if parts else ():
        try:
            (found,) = sweep(models, (keep,), share=request.share, covariances=seen)
        except CompressError:
            continue  # below the smallest plan
        mean = _on_validation(found, parts, f"at {percent(keep)}", screen)
        points.append((found.kept, mean))
    return points


def _on_validation(
    models: Mapping[str, nn.Module], parts: Mapping[str, Parts], what: str, screen: Screen
) -> float:
    """The mean accuracy on validation images: a budget read off the picture saw no test image."""
    found = [_accuracy(models[n], p.val, f"{n} {what}", screen) for n, p in parts.items()]
    return sum(found) / len(found)


def _add(
    new: Bank,
    name: str,
    model: nn.Module | None,
    parts: Mapping[str, Parts],
    summary: Summary,
    request: Request,
) -> None:
    """Stores a domain as it is now, or as it was where there is no network."""
    old, known = request.cards[name], summary.domains[name]
    if model is None:
        model = request.bank.load(name)
        new.add(name, model, metrics=old.metrics, provenance=old.provenance)
        return
    accuracy = known.compressed if known.tuned is None else known.tuned
    metrics = {} if accuracy is None else {f"{parts[name].judged_on}_accuracy": accuracy}
    history = {
        "compressed_from": {"family": old.family, "metrics": dict(old.metrics)},
        "compressed_with": {
            "domains": summary.factored, "kept": summary.kept, "share": request.share,
        },
        TUNED_EPOCHS: 0 if known.tuned is None else request.epochs,
        BASIS_TUNED: summary.basis_tuned,
    }  # fmt: skip
    model = model.to(next(request.bank.backbone.parameters()).device)
    put = new.replace if name in new.domains else new.add
    put(name, model, metrics=metrics, provenance={**old.provenance, **history})
