"""train and conclude: every domain on one frozen backbone, then the submission and its report.

WORK is a folder that belongs to one run:

    bank/                      a bank with every domain that is finished
    bank/unfinished/           checkpoints of those under way
    predictions/<name>.json    a finished domain's test answers
    results.json               all of them, to submit

A killed run goes on where it was: finished domains are not trained again, half-trained ones go on
from their checkpoint. Trained jointly, the domains take turns, a step each, as in the authors'
code; as they share nothing that learns, the networks are those of training one after another, bit
for bit. (There, an epoch ends with the smallest domain; here each sees all of its images.)
"""

import dataclasses
import hashlib
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from torch import nn

from ...bank.bank import Bank, Card, is_bank
from ...bank.folder import UNFINISHED
from ...core.adapters import Family
from ...core.attach import attach
from ...data.images import MEMORY_LIMIT_BYTES
from ...errors import BankError, DataError, TrainingError
from ...files import PathLike, reason
from ...training.evaluate import logits_of
from ...training.examples import Examples, Progress
from ...training.fit import Step, fit
from ...training.recipe import RELEASED, Recipe
from .domains import DOMAINS
from .files import Devkit, DomainFiles
from .protocol import as_released, evaluation_examples, preprocessing, training_examples
from .report import DomainResult, Report
from .submission import read_results, score_answers, write_results

RESULTS = "results.json"


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

    def made(self, card: Card) -> bool:
        """Whether a domain was trained so, as far as that is the same for all."""
        return self._of_all().items() <= dict(card.provenance).items()

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
    progress: Progress | None = None,
) -> Iterator[tuple[str, Step]]:
    """Trains what is not finished yet in `work`: yields (domain, step), one for every step.

    Leaving the loop keeps checkpoints; the same call goes on from them.

    Args:
        progress: called with (images read, images) while the images of a domain are read.

    Raises:
        BankError: where `work` is another run's: another backbone, or a domain trained otherwise.
        DataError: where an image cannot be read.
        TrainingError: as `fit`.
    """
    folder = _folder(work)
    bank = Bank.open_or_create(folder / "bank", backbone)
    waiting = _waiting(devkit, bank, settings, folder)
    limit = MEMORY_LIMIT_BYTES // max(1, len(waiting)) if settings.joint else MEMORY_LIMIT_BYTES
    with ExitStack() as stack:
        trainings = [
            stack.enter_context(closing(_train_one(files, bank, settings, folder, limit, progress)))
            for files in waiting
        ]
        yield from (_taking_turns if settings.joint else _in_order)(trainings)


def steps_left(devkit: Devkit, settings: Settings, work: PathLike) -> dict[str, int]:
    """Steps of the domains that `train` would train, as if each began anew.

    Raises:
        BankError: where a domain was trained in another way.
    """
    folder = _folder(work)
    path = folder / "bank"
    bank = Bank.open(path) if is_bank(path) else None
    waiting = devkit.domains.values() if bank is None else _waiting(devkit, bank, settings, folder)
    return {
        files.official.name: settings.recipe.n_steps(len(files.rows(settings.train_on)))
        for files in waiting
    }


def _waiting(devkit: Devkit, bank: Bank, settings: Settings, folder: Path) -> list[DomainFiles]:
    every = devkit.domains.values()
    return [files for files in every if not _is_finished(bank, folder, files, settings)]


def conclude(
    devkit: Devkit, settings: Settings, work: PathLike, *, labels: PathLike | None = None
) -> Report:
    """Writes `results.json` in `work`, for every domain finished there; reports on `devkit`'s.

    Args:
        labels: a folder with `<name>_test.json`, to score the test answers.

    Raises:
        BankError: where a domain is not finished, or was trained in another way.
        DataError: where predictions or labels are missing or damaged.
    """
    folder = _folder(work)
    bank = Bank.open(folder / "bank")
    answers: dict[int, int] = {}
    for name, files in devkit.domains.items():
        if not _is_finished(bank, folder, files, settings):
            raise BankError(f"{folder}: {name} is not trained yet. Run the training to its end.")
        own = read_results(_predictions(folder, name))
        if own.keys() != set(files.test.ids):
            raise DataError(
                f"{_predictions(folder, name)} does not answer exactly the test images of {name}. "
                "Remove it, and run again."
            )
        answers |= own
    accuracies = {} if labels is None else score_answers(answers, labels).accuracies
    answered = []
    for name in (n for n in DOMAINS if n in bank.domains and n not in devkit.domains):
        if settings.made(bank.domains[name]):
            with suppress(DataError):  # one whose answers are gone is lacking
                answers |= read_results(_predictions(folder, name))
                answered.append(name)
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
    progress: Progress | None,
) -> Training:
    """One domain: trained, its test answers on disk, and only then in the bank."""
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
    with closing(cast(Generator[Step, None, None], steps)):
        for step in steps:
            yield name, step
    metrics = {} if val is None else {"val_accuracy": _accuracy(model, val)}
    _answer(model, files, test, _predictions(folder, name))
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
        raise TrainingError(
            "the network's logits are not finite (NaN or infinity): train the domain again with a "
            "lower learning rate."
        )
    return logits_nc.argmax(1)


def _answer(model: nn.Module, files: DomainFiles, test: Examples, path: Path) -> None:
    """Writes the answers of `model` to the domain's test images."""
    labels = _found(model, test).tolist()
    categories = [files.category_ids[label] for label in labels]
    write_results(path, dict(zip(files.test.ids, categories, strict=True)))


def _folder(work: PathLike) -> Path:
    folder = Path(work).expanduser()
    try:
        (folder / "predictions").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BankError(f"{folder} cannot be made or used: {reason(error)}") from error
    return folder


def _predictions(folder: Path, name: str) -> Path:
    return folder / "predictions" / f"{name}.json"


def _is_finished(bank: Bank, folder: Path, files: DomainFiles, settings: Settings) -> bool:
    """Whether the bank has the domain, trained as asked.

    Raises:
        BankError: where it was trained in another way.
    """
    name = files.official.name
    if name not in bank.domains:
        return False
    found, asked = bank.domains[name].provenance, settings.provenance(files)
    for key, value in asked.items():
        if found.get(key) != value:
            raise BankError(
                f"{folder} has {name} trained with {key} {found.get(key)}, and {value} was asked "
                "for. Use another folder for another run."
            )
    if not _predictions(folder, name).exists():
        raise BankError(
            f"{folder} has {name} trained, and its answers {_predictions(folder, name)} are gone. "
            f"Restore them, or train it again: onetrunk remove {bank.path} {name}"
        )
    return True


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
