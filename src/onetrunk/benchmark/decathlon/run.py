"""train and conclude: every domain on one frozen backbone, then the submission and its report.

WORK is a folder that belongs to one run:

    bank/                      a bank with every domain that is finished
    bank/unfinished/           checkpoints of those under way
    predictions/<name>.json    a finished domain's test answers
    results.json               all of them, to submit

A killed run goes on where it was: finished domains are not trained again, half-trained ones go on
from their checkpoint, and answers that are gone or damaged are given anew by the bank's network. A
domain that fails does not stop the others.

Trained jointly, the domains take turns, a step each, as in the authors' code; as they share nothing
that learns, the networks are those of training one after another, bit for bit. (There, an epoch
ends with the smallest domain; here each sees all of its images.)
"""

import dataclasses
import hashlib
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, cast

import torch
from torch import nn

from ...bank.bank import Bank, Card, is_bank
from ...bank.folder import UNFINISHED
from ...bank.lock import BusyError, one_training
from ...core.adapters import Family
from ...core.attach import attach
from ...data.images import MEMORY_LIMIT_BYTES
from ...errors import BankError, DataError, DivergedError, OnetrunkError, TrainingError
from ...files import PathLike, reason
from ...training.checkpoint import forgotten_if_diverged
from ...training.evaluate import logits_of
from ...training.examples import Examples, Progress
from ...training.fit import Step, best_device, fit
from ...training.recipe import RELEASED, Recipe
from .domains import DOMAINS
from .files import Devkit, DomainFiles
from .protocol import as_released, evaluation_examples, preprocessing, training_examples
from .report import DomainResult, Report
from .submission import read_results, score_answers, write_results

RESULTS = "results.json"
Reading = Callable[[str, int, int], None]  # called with domain, images read, images
Telling = Callable[[str, OnetrunkError], None]  # called with domain, why it was left


class FailedDomainsError(TrainingError):
    """Domains of a run that failed; the others went on to their end.

    Args:
        reasons: by domain.
    """

    def __init__(self, reasons: Mapping[str, str]) -> None:
        self.reasons = dict(reasons)
        lines = [f"{name}: {reason}" for name, reason in self.reasons.items()]
        super().__init__(
            "training failed; when that is repaired the same call trains what is left:\n"
            + "\n".join(lines)
        )


@dataclass(frozen=True)
class Settings:
    """How to train.

    Args:
        family: what to add to the backbone; None for what fits it.
        recipe: RELEASED or PAPER, the two readings of the decay; its crops are the protocol's.
        train_on: `train`, where validation chooses the epoch as in the released code, or
            `train+val`, as the entries in the papers' tables usually did.
        joint: the domains take turns instead of one after another.
        device: by default the best there is.

    Raises:
        TrainingError: for another `train_on`.
    """

    family: Family | None = None
    recipe: Recipe = RELEASED
    train_on: Literal["train", "train+val"] = "train"
    joint: bool = False
    device: str | None = None

    def __post_init__(self) -> None:
        if self.train_on not in ("train", "train+val"):
            raise TrainingError(
                f"train_on={self.train_on!r}: train on 'train', or on 'train+val' for a submission."
            )
        object.__setattr__(self, "recipe", as_released(self.recipe))

    def provenance(self, files: DomainFiles) -> dict[str, str]:
        """What makes two trainings of a domain the same one."""
        rows = files.rows(self.train_on)
        listed = repr((rows.ids, rows.labels, files.category_ids)).encode()
        return {
            "data": f"decathlon-1.0 {files.official.name}",
            **self._of_all(),
            "decay": f"{self.recipe.adapter_decay(len(files.train)):g}",
            "images": hashlib.sha256(listed).hexdigest()[:16],
        }

    def otherwise(self, card: Card) -> str:
        """How a domain was trained in another way, as far as that is the same for all, or ''."""
        different = _first_difference(card, self._of_all())
        return "{} {}".format(*different) if different else ""

    def _of_all(self) -> dict[str, str]:
        return {
            "train_on": self.train_on,
            "recipe": str(self.recipe),
            "keep": self.recipe.keep,
            "adapter": "by default" if self.family is None else str(self.family),
        }


def train(
    devkit: Devkit,
    backbone: nn.Module,
    settings: Settings,
    work: PathLike,
    *,
    progress: Reading | None = None,
    on_failure: Telling | None = None,
) -> Iterator[tuple[str, Step]]:
    """Trains what is not finished yet in `work`: yields (domain, step), one for every step.

    Leaving the loop keeps checkpoints; the same call goes on from them.

    Args:
        progress: called with (domain, images read, images) while the images of a domain are read.
        on_failure: called with (domain, error) as soon as one fails, or is left to another process
            that is training it.

    Raises:
        BankError: where `work` is another run's: another backbone, or a domain trained otherwise.
        FailedDomainsError: after the others' end, where an image of a domain cannot be read or its
            training diverges.
    """
    folder = _folder(work)
    bank = Bank.open_or_create(folder / "bank", backbone)
    waiting = _waiting(devkit, bank, settings, folder)
    limit = MEMORY_LIMIT_BYTES // max(1, len(waiting)) if settings.joint else MEMORY_LIMIT_BYTES
    failed: dict[str, str] = {}

    def note(name: str, error: OnetrunkError) -> None:
        if not isinstance(error, BusyError):
            failed[name] = str(error)
        if on_failure is not None:
            on_failure(name, error)

    with ExitStack() as stack:
        trainings = [
            stack.enter_context(
                closing(_train_one(files, bank, settings, folder, limit, progress, note))
            )
            for files in waiting
        ]
        yield from (_taking_turns if settings.joint else _in_order)(trainings)
    if failed:
        raise FailedDomainsError(failed)


def steps_left(devkit: Devkit, settings: Settings, work: PathLike) -> dict[str, int]:
    """Steps of the domains that `train` would train, as if each began anew.

    Raises:
        BankError: where a domain was trained in another way.
    """
    folder = _folder(work)
    path = folder / "bank"
    bank = Bank.open(path) if is_bank(path) else None
    return {
        name: settings.recipe.n_steps(len(files.rows(settings.train_on)))
        for name, files in devkit.domains.items()
        if bank is None or not _is_trained(bank, folder, files, settings)
    }


def _waiting(devkit: Devkit, bank: Bank, settings: Settings, folder: Path) -> list[DomainFiles]:
    return [
        files
        for files in devkit.domains.values()
        if not _is_trained(bank, folder, files, settings) or _answers(folder, files) is None
    ]


def conclude(
    devkit: Devkit, settings: Settings, work: PathLike, *, labels: PathLike | None = None
) -> Report:
    """Writes `results.json` in `work`, for every domain finished there; reports on `devkit`'s.

    Args:
        labels: a folder with `<name>_test.json`, to score the test answers.

    Raises:
        BankError: where a domain is not finished, or was trained in another way.
        DataError: where labels are missing or damaged.
    """
    folder = _folder(work)
    bank = Bank.open(folder / "bank")
    answers: dict[int, int] = {}
    for name, files in devkit.domains.items():
        if not _is_trained(bank, folder, files, settings):
            raise BankError(f"{folder}: {name} is not trained yet. Run the training to its end.")
        if (own := _answers(folder, files)) is None:
            raise BankError(
                f"{_predictions(folder, name)} is not there, is damaged, or does not answer "
                f"exactly the test images of {name}. Run the training again: {name} is in the bank "
                "and will only answer anew."
            )
        answers |= own
    accuracies = {} if labels is None else score_answers(answers, labels).accuracies
    answered: list[str] = []
    left_out: dict[str, str] = {}
    for name in (n for n in DOMAINS if n in bank.domains and n not in devkit.domains):
        if other := settings.otherwise(bank.domains[name]):
            left_out[name] = f"trained with {other}"
            continue
        try:
            answers |= read_results(_predictions(folder, name))
            answered.append(name)
        except DataError:
            left_out[name] = "its answers are gone or damaged"
    write_results(folder / RESULTS, answers)
    cards = {name: bank.domains[name] for name in devkit.domains}
    return Report(
        tuple(
            _result(files, cards[name], accuracies.get(name), settings)
            for name, files in devkit.domains.items()
        ),
        bank.backbone_form,
        ", ".join(sorted({card.family for card in cards.values()})),
        str(settings.recipe),
        settings.train_on,
        str(folder / RESULTS),
        tuple(n for n in DOMAINS if n in devkit.domains or n in answered),
        left_out,
    )


Training = Generator[tuple[str, Step], None, None]


def _in_order(trainings: Sequence[Training]) -> Training:
    for training in trainings:
        yield from training


def _taking_turns(trainings: Sequence[Training]) -> Training:
    """One step each, round and round; who is done drops out."""
    waiting = deque(trainings)
    while waiting:
        training = waiting.popleft()
        for record in training:
            yield record
            waiting.append(training)
            break


def _train_one(
    files: DomainFiles,
    bank: Bank,
    settings: Settings,
    folder: Path,
    limit: int,
    progress: Reading | None,
    note: Telling,
) -> Training:
    """One domain: trained, its test answers on disk, and only then in the bank.

    One that is in the bank already only answers. Where it fails that is noted: the others go on.
    """
    name = files.official.name
    shown = None if progress is None else partial(progress, name)
    try:
        with one_training(bank.path, name):
            if not _is_trained(bank, folder, files, settings):
                yield from _trained(files, bank, settings, folder, limit, shown)
            elif _answers(folder, files) is None:
                test = _for_evaluation(files, "test", limit, shown)
                model = bank.load(name, device=settings.device or best_device())
                _answer(model, files, test, folder)
    except OnetrunkError as error:
        note(name, error)


def _trained(
    files: DomainFiles,
    bank: Bank,
    settings: Settings,
    folder: Path,
    limit: int,
    progress: Progress | None,
) -> Training:
    name, seen = files.official.name, preprocessing(files.official.name)
    model = attach(
        bank.backbone,
        settings.family,
        files.classes,
        preprocessing=seen,
        input_size=(seen.channels, seen.size_px, seen.size_px),
        seed=settings.recipe.seed,
    )
    data = training_examples(
        files.official,
        files.images(settings.train_on),
        memory_limit_bytes=limit,
        progress=progress,
    )
    val = None
    if settings.train_on == "train":
        val = _for_evaluation(files, "val", limit, progress)
    test = _for_evaluation(files, "test", limit, progress)  # read before the training, not after
    # the texts give a decay to a domain, by its training images; trained on more, it is the same
    decay = settings.recipe.adapter_decay(len(files.train))
    recipe = dataclasses.replace(settings.recipe, decay_adapter=decay, decay_by_size=())
    checkpoint = bank.path / UNFINISHED / f"{name}.safetensors"
    steps = fit(model, data, recipe, val=val, checkpoint=checkpoint, device=settings.device)
    with forgotten_if_diverged(checkpoint):
        with closing(cast(Generator[Step, None, None], steps)):
            for step in steps:
                yield name, step
        metrics = {} if val is None else {"val_accuracy": _accuracy(model, val)}
        _answer(model, files, test, folder)
    bank.add(
        name,
        model.to(next(bank.backbone.parameters()).device),
        metrics=metrics,
        provenance=settings.provenance(files),
    )
    checkpoint.unlink(missing_ok=True)


def _for_evaluation(
    files: DomainFiles, part: Literal["val", "test"], limit: int, progress: Progress | None
) -> Examples:
    return evaluation_examples(
        files.official, files.images(part), memory_limit_bytes=limit, progress=progress
    )


def _accuracy(model: nn.Module, examples: Examples) -> float:
    return float((_found(model, examples) == examples.labels).double().mean())


def _found(model: nn.Module, examples: Examples) -> torch.Tensor:
    """The likeliest label of every example, int64 (n,)."""
    logits_nc = logits_of(model, examples, batch_size=100)
    if not torch.isfinite(logits_nc).all():
        raise DivergedError(
            "the network's logits are not finite (NaN or infinity): train the domain again with a "
            "lower learning rate."
        )
    return logits_nc.argmax(1)


def _answer(model: nn.Module, files: DomainFiles, test: Examples, folder: Path) -> None:
    """Writes the answers of `model` to the domain's test images."""
    labels = _found(model, test).tolist()
    categories = [files.category_ids[label] for label in labels]
    answers = dict(zip(files.test.ids, categories, strict=True))
    write_results(_predictions(folder, files.official.name), answers)


def _answers(folder: Path, files: DomainFiles) -> dict[int, int] | None:
    """A domain's answers; None where they are not there or not those of its test images."""
    try:
        found = read_results(_predictions(folder, files.official.name))
    except DataError:
        return None
    return found if found.keys() == set(files.test.ids) else None


def _folder(work: PathLike) -> Path:
    folder = Path(work).expanduser()
    try:
        (folder / "predictions").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BankError(f"{folder} cannot be made or used: {reason(error)}") from error
    return folder


def _predictions(folder: Path, name: str) -> Path:
    return folder / "predictions" / f"{name}.json"


def _is_trained(bank: Bank, folder: Path, files: DomainFiles, settings: Settings) -> bool:
    """Whether the bank has the domain, trained as asked.

    Raises:
        BankError: where it was trained in another way.
    """
    name = files.official.name
    if name not in bank.domains:
        return False
    asked = settings.provenance(files)
    if different := _first_difference(bank.domains[name], asked):
        key, found = different
        raise BankError(
            f"{folder} has {name} trained with {key} {found}, and {asked[key]} was asked for. Use "
            "another folder for another run."
        )
    return True


def _first_difference(card: Card, asked: Mapping[str, str]) -> tuple[str, object] | None:
    """A key of `asked` in which a domain's provenance differs, and what it has there."""
    found = card.provenance
    return next(((key, found.get(key)) for key in asked if found.get(key) != asked[key]), None)


def _result(
    files: DomainFiles, card: Card, test_accuracy: float | None, settings: Settings
) -> DomainResult:
    return DomainResult(
        files.official.name,
        len(files.classes),
        len(files.rows(settings.train_on)),
        len(files.val),
        len(files.test),
        card.numbers,
        card.metrics.get("val_accuracy"),
        test_accuracy,
    )
