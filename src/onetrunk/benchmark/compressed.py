"""Cells of compressed methods: all trained domains of one method, factored together and tuned.

Three kinds of work, each kept when it is done, so that they run on several processes and go on
where they were: domains whose networks are not at hand are trained again, all are factored over
their basis, which may be tuned, into a bank, and each domain is tuned by itself. Of each domain's
network as compressed and after tuning at each of `RATES`, validation images choose. With
`tune="all"` the same choice is made for the basis before that, by the mean over its domains.
"""

import dataclasses
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..bank.bank import Bank, is_bank
from ..core.activations import activation_covariances
from ..core.compress import compress
from ..core.domain import domain_of
from ..core.rebuild import rebuilt
from ..errors import DataError, DivergedError
from ..training.evaluate import evaluate
from ..training.fit import fit
from ..training.jointly import RATES, tune_basis
from ..training.recipe import Recipe
from .cells import Cell, bank_name, bank_path, figures, setting_of, store
from .ledger import Ledger, digest_of
from .methods import Compressed, read_method
from .protocol import Tuning
from .setting import Setting

N_IMAGES = 128  # a domain, for the covariances of its activations

Group = Sequence[Cell]  # one compressed method over all its domains


def to_train_again(group: Group, ledger: Ledger, work: Path) -> list[Cell]:
    """The finished trainings of a group whose networks were not kept."""
    known, sources = ledger.read(), [source_of(cell) for cell in group]
    return [one for one in sources if one.key in known and not _kept(one, work)]


def is_finished(group: Group, ledger: Ledger) -> bool:
    """Whether every cell of a group has its record."""
    known = ledger.read()
    return all(compressed_key(cell, group) in known for cell in group)


def factor(group: Group, ledger: Ledger, work: Path) -> None:
    """Puts the networks of a group over their basis, tuned where the method says so, into a bank.

    Raises:
        DataError: where a domain was not trained yet with the method that is compressed.
    """
    started = time.monotonic()
    method = _method(group[0])
    models = _trained(group, ledger, work)
    settings = {cell.domain: setting_of(cell) for cell in group}
    made = _compressed(models, method, settings)
    untuned = {name: evaluate(made[name], settings[name].val).accuracy for name in made}
    if method.tune == "all":
        tunings = {cell.domain: _tuning(source_of(cell), ledger) for cell in group}
        for sharing in [[cell] for cell in group] if method.alone else [group]:
            made |= _basis_tuned(sharing, made, settings, tunings)
    seconds = (time.monotonic() - started) / len(group)
    for cell in group:
        provenance = {
            "cell": compressed_key(cell, group),
            "untuned_val_accuracy": untuned[cell.domain],
            "seconds": seconds,
        }
        backbone = settings[cell.domain].backbone
        store(factored_path(group, work), backbone, cell.domain, made[cell.domain], {}, provenance)


def is_factored(group: Group, work: Path) -> bool:
    """Whether the networks of all of a group's domains over their basis are kept."""
    path = factored_path(group, work)
    return all(_holds(path, cell.domain, compressed_key(cell, group)) for cell in group)


def forget_factored(group: Group, work: Path) -> None:
    """Removes them: once every domain has its record they are of no more use."""
    path = factored_path(group, work)
    shutil.rmtree(path, ignore_errors=True)
    path.with_name(f"{path.name}.lock").unlink(missing_ok=True)


def run_compressed(cell: Cell, group: Group, ledger: Ledger, work: Path) -> dict[str, Any]:
    """The record of one domain of a group that was factored: from the ledger, else its tuning."""
    key = compressed_key(cell, group)
    if (known := ledger.read().get(key)) is not None:
        return known
    setting = setting_of(cell)
    bank = Bank.open(factored_path(group, work), setting.backbone)
    model = bank.load(bank_name(cell.domain))
    factored = bank.domains[bank_name(cell.domain)].provenance
    basis = None if _method(cell).alone else domain_of(model).basis
    record = {
        **_tuned(cell, model, setting, _tuning(source_of(cell), ledger), factored["seconds"]),
        "key": key,
        "shared_numbers": 0 if basis is None else basis.numbers,
        "untuned_val_accuracy": factored["untuned_val_accuracy"],
    }
    ledger.append(record)
    return record


def compressed_key(cell: Cell, group: Group) -> str:
    """The digest under which a compressed cell's record is kept: all its domains' images matter."""
    return digest_of({**cell.configuration(), "with": sorted(source_of(c).key for c in group)})


def factored_path(group: Group, work: Path) -> Path:
    """The bank of a group's networks between their factoring and their tuning."""
    keys = digest_of({"cells": sorted(compressed_key(cell, group) for cell in group)})
    return bank_path(work, group[0]).with_name(f"factored-{keys}")


def source_of(cell: Cell) -> Cell:
    """The cell whose network is compressed in this one."""
    return dataclasses.replace(cell, method=_method(cell).of)


def _method(cell: Cell) -> Compressed:
    method = read_method(cell.method)
    assert isinstance(method, Compressed)
    return method


def _trained(group: Group, ledger: Ledger, work: Path) -> dict[str, nn.Module]:
    """The networks that are factored."""
    sources, known = [source_of(cell) for cell in group], ledger.read()
    for source in sources:
        if source.key not in known:
            raise DataError(
                f"{group[0].method} needs domains trained with {source.method}, and the training "
                f"of {source.domain!r} failed."
            )
        if not _kept(source, work):
            raise DataError(
                f"{group[0].method} needs the networks of {source.method}, and that of "
                f"{source.domain!r} could not be trained again."
            )
    bank = Bank.open(bank_path(work, sources[0]), setting_of(sources[0]).backbone)
    return {source.domain: bank.load(bank_name(source.domain)) for source in sources}


def _tuning(source: Cell, ledger: Ledger) -> Tuning:
    """How a finished cell was trained."""
    record = ledger.read()[source.key]
    return Tuning(record["factor"], record["decay"], record["norm_statistics"])


def _kept(source: Cell, work: Path) -> bool:
    """Whether a trained cell's network is at hand."""
    return _holds(bank_path(work, source), source.domain, source.key)


def _holds(path: Path, domain: str, key: str) -> bool:
    """Whether the bank has the network of that key: other images may have had the domain's name."""
    if not is_bank(path):
        return False
    card = Bank.open(path).domains.get(bank_name(domain))
    return card is not None and card.provenance.get("cell") == key


def _compressed(
    models: Mapping[str, nn.Module], method: Compressed, settings: Mapping[str, Setting]
) -> dict[str, nn.Module]:
    """The compressed networks over their one basis; each has its own if alone."""
    weights = None
    if method.weighted:
        images = {name: settings[name].train.few_views(N_IMAGES) for name in models}
        weights = activation_covariances(models, images)
    groups = [{name: model} for name, model in models.items()] if method.alone else [models]
    made: dict[str, nn.Module] = {}
    for group in groups:
        made |= dict(compress(group, keep=method.keep, share=method.share, covariances=weights))
    return made


def _basis_tuned(
    cells: Group,
    models: Mapping[str, nn.Module],
    settings: Mapping[str, Setting],
    tunings: Mapping[str, Tuning],
) -> dict[str, nn.Module]:
    """The domains of `cells` over their basis as it is, or trained with them: what is best."""
    chosen = {cell.domain: models[cell.domain] for cell in cells}
    return tune_basis(
        chosen,
        {name: settings[name].train for name in chosen},
        {name: settings[name].val for name in chosen},
        {cell.domain: _recipe(cell, tunings[cell.domain]) for cell in cells},
    )


def _recipe(cell: Cell, source: Tuning, rate: float = 1.0) -> Recipe:
    """Of a tuning at a share of the rates that the domain was trained at."""
    tuning = dataclasses.replace(source, factor=source.factor * rate)
    return cell.protocol.recipe(tuning, cell.seed, cell.protocol.tune_epochs)


def _tuned(
    cell: Cell, model: nn.Module, setting: Setting, source: Tuning, seconds: float
) -> dict[str, Any]:
    started = time.monotonic()
    best, best_accuracy, chosen = model, evaluate(model, setting.val).accuracy, 0.0
    trials = [{"lr": 0.0, "decay": source.decay, "val_accuracy": best_accuracy}]
    for rate in RATES:
        candidate = _copy(model)
        recipe = _recipe(cell, source, rate)
        accuracy = _trained_on(candidate, setting, recipe, cell.graphed)
        trials.append({"lr": recipe.lr, "decay": recipe.decay_adapter, "val_accuracy": accuracy})
        if accuracy > best_accuracy:
            best, best_accuracy, chosen = candidate, accuracy, recipe.lr
    own = own_basis_numbers(best) if _method(cell).alone else 0
    record = figures(cell, best, setting)
    return {
        **record,
        "numbers": record["numbers"] + own,
        "epochs": cell.protocol.tune_epochs if chosen else 0,
        "trials": trials,
        "lr": chosen,
        "decay": source.decay,
        "norm_statistics": source.statistics,
        "n_train": len(setting.train),
        "seconds": round(seconds + time.monotonic() - started, 1),
    }


def _trained_on(model: nn.Module, setting: Setting, recipe: Recipe, graphed: bool) -> float:
    """The accuracy on validation images after a training; 0 where its rate is too high."""
    try:
        for _ in fit(model, setting.train, recipe, val=setting.val, graphed=graphed):
            pass
        return evaluate(model, setting.val).accuracy
    except DivergedError:
        return 0.0


def _copy(model: nn.Module) -> nn.Module:
    """A network over the same backbone and basis with numbers of its own."""
    domain = domain_of(model)
    return rebuilt(model, domain.plan, domain.basis, {})


def own_basis_numbers(model: nn.Module) -> int:
    """Numbers of a basis that one domain alone is over: they are the domain's then."""
    basis = domain_of(model).basis
    return 0 if basis is None else basis.numbers
