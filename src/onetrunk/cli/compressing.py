"""compress: a bank's domains over one basis, into a new bank; accuracy before and after.

The new bank is built beside its place and gets its name when it is whole: a stop leaves nothing, or
where domains are tuned what --resume goes on from. Domains that have nothing to factor go over as
they are.
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from ..bank.bank import Bank
from ..bank.folder import UNFINISHED
from ..core.activations import Covariances, activation_covariances
from ..core.adapters.shared import Share
from ..core.allocate import BYTES, budget_parts, parse_budget
from ..core.attach import domain_of
from ..core.compress import Compressed, compress, compress_within, factorable, sweep
from ..data import Images, Prepared, Splits
from ..data.source_folder import images_below
from ..errors import BankError, CompressError, DataError, DivergedError
from ..files import check_writable, reason
from ..pictures import draw_accuracy_against_size, need_matplotlib
from ..training.evaluate import evaluate
from ..training.examples import preprocessing_of
from ..training.fit import fit
from ..training.jointly import tune_basis
from ..training.recipe import Recipe
from .console import Screen, counted, followed, percent, size
from .newbank import beside, finished, refuse_another, unfinished_path
from .training import load_as_trained

LITTLE = 0.9  # of the share that was asked for
KEEPS = (0.15, 0.25, 0.35, 0.5, 0.7, 1.0)  # budgets of the picture
COPIED = "copied: "
BASIS_TUNED, TUNED_EPOCHS = "basis_tuned", "tuned_epochs"  # in a domain's provenance
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
    epochs: int = 8
    picture: bool = True
    resume: bool = False

    @property
    def asked(self) -> dict[str, Any]:
        """What a run that goes on must agree on, as JSON values."""
        other = ("bank", "out", "picture", "resume")
        words = {key: value for key, value in vars(self).items() if key not in other}
        digests = {name: card.digest for name, card in self.bank.domains.items()}
        return {**words, "tune": sorted(self.tune), "domains": digests}

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


@dataclass
class Figures:
    """What is known of one domain: accuracies, bytes of its file, why it was left as it was."""

    before: float | None = None
    compressed: float | None = None
    tuned: float | None = None
    bytes_before: int = 0
    bytes_after: int = 0
    note: str = ""


def run(request: Request, screen: Screen) -> None:
    """Compresses, tunes, compares and writes the new bank.

    Raises:
        OnetrunkError: of the room that refuses; nothing is at `request.out` then.
    """
    _refuse_contradictions(request)
    goes_on = refuse_another(request.out, request.asked, request.resume)
    if request.resume and not goes_on:
        screen.say("nothing to resume: starting from the beginning")
    models, figures = _chosen(request.bank)
    _refuse_unknown(request, models)
    if request.picture and request.data:
        need_matplotlib(f"the picture {request.file} (else say --no-picture)")
    cards = request.bank.domains
    parts = {
        name: _parts(models[name], load_as_trained(source, cards[name]), source, screen)
        for name, source in request.data.items()
    }
    unlabelled = {name: _unlabelled(folder) for name, folder in request.images.items()}
    seen = _seen(models, parts, unlabelled, screen)
    found = _compressed(models, parts, seen, request, screen)
    for name, data in parts.items():
        figures[name].before = _accuracy(models[name], data.judged, f"{name} before", screen)
        figures[name].compressed = _accuracy(found[name], data.judged, f"{name} after", screen)
    curve = _curve(models, parts, seen, request, screen) if request.picture else []
    if not goes_on:
        _write(found, parts, figures, request, screen)
    if request.tune:
        found = _tuned(found, parts, figures, request, screen)
    new = Bank.open(request.out, request.bank.backbone)
    for name, known in figures.items():
        known.bytes_before = request.bank.domains[name].size
        known.bytes_after = new.domains[name].size
    basis_bytes = new.basis_bytes
    basis_tuned = any(card.provenance.get(BASIS_TUNED) for card in new.domains.values())
    _show(found, figures, basis_bytes, request, screen)
    if curve:
        stored = found.kept, _on_validation(found, parts, "stored", screen)
        original = _on_validation(models, parts, "as they were", screen)
        draw_accuracy_against_size(curve, stored, original, request.file)
        screen.say(f"picture {request.file}")
    screen.finish(
        {
            "bank": str(request.out),
            "share": request.share,
            "numbers_before": found.numbers_before,
            "numbers_after": found.numbers_after,
            "kept": found.kept,
            "basis_bytes": basis_bytes,
            BASIS_TUNED: basis_tuned,
            "picture": str(request.file) if curve else None,
            "left_out": dict(found.left_out),
            "domains": {name: vars(known) for name, known in figures.items()},
        }
    )


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
    try:
        request.out.parent.mkdir(parents=True, exist_ok=True)
        check_writable(request.out.parent)
    except OSError as error:
        raise BankError(f"cannot write beside {request.out}: {reason(error)}") from error


def _chosen(bank: Bank) -> tuple[dict[str, nn.Module], dict[str, Figures]]:
    """The domains to compress, and a line for every one, which says why it is left out."""
    loaded = {name: bank.load(name) for name in bank.domains}
    if not loaded:
        raise CompressError(f"bank {bank.path} has no domains. Train some first.")
    sites = {name: tuple(sorted(factorable(m).items())) for name, m in loaded.items()}
    counts = Counter(found for found in sites.values() if found)
    if not counts:
        name, model = next(iter(loaded.items()))
        raise CompressError(
            f"none of the {len(loaded)} domains has series, parallel or low-rank adapters of its "
            f"own that can be factored; {name!r}: {_note(model, False).removeprefix(COPIED)}. "
            "Train some first."
        )
    (most, _), *_ = counts.most_common(1)
    notes = {
        name: "" if found == most else _note(loaded[name], bool(found))
        for name, found in sites.items()
    }
    models = {name: model for name, model in loaded.items() if not notes[name]}
    return models, {name: Figures(note=note) for name, note in notes.items()}


def _note(model: nn.Module, has_adapters: bool) -> str:
    if domain_of(model).basis is not None:
        return f"{COPIED}it is over a basis already"
    if has_adapters:
        return f"{COPIED}its adapters sit at other layers than most domains'"
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

    def ready(images: Any, what: str) -> Prepared:
        with screen.bar(f"reading {what} images of {source}") as show:
            return Prepared(images.in_order(classes), preprocessing, progress=show)

    train, val = ready(splits.train, "train"), ready(splits.val, "val")
    if splits.test is None:
        return Parts(train, val, val, "val")
    return Parts(train, val, ready(splits.test, "test"), "test")


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
    with screen.bar("looking at activations") as show:
        for done, (name, model) in enumerate(models.items()):
            images = (
                Prepared(unlabelled[name], preprocessing_of(model))
                if name in unlabelled
                else parts[name].train
            )
            seen |= activation_covariances({name: model}, {name: images.few_views(N_SEEN)})
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


def _write(
    found: Compressed,
    parts: Mapping[str, Parts],
    figures: Mapping[str, Figures],
    request: Request,
    screen: Screen,
) -> None:
    """Makes the new bank, whose domains may still have to be tuned."""
    tuned = _basis_tuned(found, parts, request, screen) if request.tune_basis else found
    basis_tuned = tuned.basis != found.basis
    with beside(request.out, request.asked if request.tune else None) as folder:
        new = Bank.create(folder, request.bank.backbone, by_reference=request.bank.by_reference)
        for name in request.bank.domains:
            _add(new, name, tuned, parts, figures[name], request, basis_tuned)


def _tuned(
    found: Compressed,
    parts: Mapping[str, Parts],
    figures: Mapping[str, Figures],
    request: Request,
    screen: Screen,
) -> Compressed:
    """Tunes the domains of the unfinished bank that are not yet, which gets its name then."""
    with finished(request.out) as folder:
        bank = Bank.open(folder, request.bank.backbone)
        models = {name: bank.load(name) for name in found}
        basis = domain_of(next(iter(models.values()))).basis
        found = replace(found, models=models, basis=basis or found.basis)
        for name in sorted(request.tune):
            provenance = bank.domains[name].provenance
            if not (done := provenance[TUNED_EPOCHS]):
                _tune(name, models[name], parts[name], request, screen)
            judged = parts[name].judged
            figures[name].tuned = _accuracy(models[name], judged, f"{name} tuned", screen)
            if not done:
                _add(bank, name, found, parts, figures[name], request, provenance[BASIS_TUNED])
                _checkpoint(name, request).unlink(missing_ok=True)
    return found


def _tune(name: str, model: nn.Module, data: Parts, request: Request, screen: Screen) -> None:
    """Trains the domain's own factors, norms and head in place; its basis stays."""
    checkpoint, recipe = _checkpoint(name, request), Recipe(epochs=request.epochs)
    with screen.bar(f"tuning {name}") as show:
        try:
            for _ in followed(
                fit(model, data.train, recipe, val=data.val, checkpoint=checkpoint), show
            ):
                pass
        except DivergedError:  # it would diverge again: the next run starts anew
            checkpoint.unlink(missing_ok=True)
            raise


def _checkpoint(name: str, request: Request) -> Path:
    return unfinished_path(request.out) / UNFINISHED / f"{name}.safetensors"


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
    found: Compressed,
    parts: Mapping[str, Parts],
    figures: Figures,
    request: Request,
    basis_tuned: bool,
) -> None:
    old = request.bank.domains[name]
    if name not in found:
        model = request.bank.load(name)
        new.add(name, model, metrics=old.metrics, provenance=old.provenance)
        return
    accuracy = figures.compressed if figures.tuned is None else figures.tuned
    metrics = {} if accuracy is None else {f"{parts[name].judged_on}_accuracy": accuracy}
    history = {
        "compressed_from": {"family": old.family, "metrics": dict(old.metrics)},
        "compressed_with": {"domains": list(found), "kept": found.kept, "share": request.share},
        TUNED_EPOCHS: 0 if figures.tuned is None else request.epochs,
        BASIS_TUNED: basis_tuned,
    }
    model = found[name].to(next(request.bank.backbone.parameters()).device)
    put = new.replace if name in new.domains else new.add
    put(name, model, metrics=metrics, provenance={**old.provenance, **history})


def _show(
    found: Compressed,
    figures: Mapping[str, Figures],
    basis_bytes: int,
    request: Request,
    screen: Screen,
) -> None:
    screen.say(
        f"adapters of {counted(len(found), 'domain')}: {found.numbers_before:,} -> "
        f"{found.numbers_after:,} numbers ({percent(found.kept)}), their basis counted once"
    )
    if request.uniform:
        screen.say(f"  {percent(request.keep or 0)} of the directions at every layer")
    elif request.keep is not None and found.kept < LITTLE * request.keep:
        screen.say("  fewer than asked for: more directions would hold nothing")
    rows = [
        (
            name,
            *(
                "" if a is None else percent(a)
                for a in (known.before, known.compressed, known.tuned)
            ),
            size(known.bytes_before),
            size(known.bytes_after),
            known.note,
        )
        for name, known in figures.items()
    ]
    before = sum(known.bytes_before for known in figures.values())
    after = sum(known.bytes_after for known in figures.values()) + basis_bytes
    rows.append(("basis, shared", "", "", "", "", size(basis_bytes), ""))
    rows.append(("all", "", "", "", size(before), size(after), ""))
    head = ("domain", "before", "compressed", "tuned", "size before", "size after", "remark")
    screen.table(head, rows)
    kept = [site for site, directions in found.directions.items() if directions == (0, 0)]
    if kept:
        screen.say(
            f"  {len(kept)} of {len(found.directions)} layers stay as they were: factors would be "
            "larger"
        )
    for site, why in found.left_out.items():
        screen.say(f"  {site} is kept as it was: {why}")
