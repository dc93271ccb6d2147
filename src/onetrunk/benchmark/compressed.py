"""Cells of compressed methods: all trained domains of one method, factored together and tuned.

The basis is made of every domain at once, so a study's domains are one piece of work. Of each
domain's network as compressed and after tuning at each of `RATES`, validation images choose. With
`tune="all"` the same choice is made for the basis before that, by the mean over its domains.
"""

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..bank.bank import Bank, is_bank
from ..core.activations import activation_covariances
from ..core.attach import domain_of
from ..core.compress import compress, rebuilt
from ..errors import DataError
from ..training.evaluate import evaluate
from ..training.fit import fit
from ..training.jointly import RATES, tune_basis
from ..training.recipe import Recipe
from .cells import Cell, bank_name, bank_path, figures, setting_of, train_again
from .ledger import Ledger, digest_of
from .methods import Compressed, read_method
from .protocol import Tuning
from .setting import Setting

N_IMAGES = 128  # a domain, for the covariances of its activations


def run_compressed(cells: list[Cell], ledger: Ledger, work: Path) -> list[dict[str, Any]]:
    """The records of one compressed method over the domains of `cells`.

    Raises:
        DataError: where a domain was not trained yet with the method that is compressed.
    """
    keys = {cell.domain: compressed_key(cell, cells) for cell in cells}
    known = ledger.read()
    if all(key in known for key in keys.values()):
        return [known[keys[cell.domain]] for cell in cells]
    started = time.monotonic()
    method = read_method(cells[0].method)
    assert isinstance(method, Compressed)
    settings = {cell.domain: setting_of(cell) for cell in cells}
    tunings, models = _trained(cells, ledger, work, settings[cells[0].domain].backbone)
    made, shared = _compressed(models, method, settings)
    untuned = {name: evaluate(made[name], settings[name].val).accuracy for name in made}
    if method.tune == "all":
        groups = [[cell] for cell in cells] if method.alone else [cells]
        for group in groups:
            made |= _basis_tuned(group, made, settings, tunings)
    seconds = (time.monotonic() - started) / len(cells)
    records = []
    for cell in cells:
        if keys[cell.domain] not in known:
            name = cell.domain
            record = _tuned(cell, made[name], settings[name], tunings[name], seconds)
            record |= {
                "key": keys[name], "shared_numbers": shared, "untuned_val_accuracy": untuned[name],
            }  # fmt: skip
            ledger.append(record)
            known[keys[name]] = record
        records.append(known[keys[cell.domain]])
    return records


def compressed_key(cell: Cell, cells: list[Cell]) -> str:
    """The digest under which a compressed cell's record is kept: all its domains matter."""
    return digest_of({**cell.configuration(), "with": sorted(c.domain for c in cells)})


def source_of(cell: Cell) -> Cell:
    """The cell whose network is compressed in this one."""
    method = read_method(cell.method)
    assert isinstance(method, Compressed)
    return dataclasses.replace(cell, method=method.of)


def _trained(
    cells: list[Cell], ledger: Ledger, work: Path, backbone: nn.Module
) -> tuple[dict[str, Tuning], dict[str, nn.Module]]:
    """How the domains were trained, and their networks: trained again where only the record was
    kept.
    """
    sources = [source_of(cell) for cell in cells]
    known, path = ledger.read(), bank_path(work, sources[0])
    for source in sources:
        if source.key not in known:
            raise DataError(
                f"{cells[0].method} needs domains trained with {source.method}, and the training "
                f"of {source.domain!r} failed."
            )
        if not _holds(path, source):
            train_again(source, ledger, work)
    bank = Bank.open(path, backbone)
    tunings = {}
    for source in sources:
        record = known[source.key]
        tunings[source.domain] = Tuning(
            record["factor"], record["decay"], record["norm_statistics"]
        )
    return tunings, {cell.domain: bank.load(bank_name(cell.domain)) for cell in cells}


def _holds(path: Path, source: Cell) -> bool:
    """Whether the bank has this very cell's network: other images may have had that name."""
    if not is_bank(path):
        return False
    card = Bank.open(path).domains.get(bank_name(source.domain))
    return card is not None and card.provenance.get("cell") == source.key


def _compressed(
    models: Mapping[str, nn.Module], method: Compressed, settings: Mapping[str, Setting]
) -> tuple[dict[str, nn.Module], int]:
    """The compressed networks, and the numbers of their one basis; each has its own if alone."""
    weights = None
    if method.weighted:
        images = {name: settings[name].train.few_views(N_IMAGES) for name in models}
        weights = activation_covariances(models, images)
    groups = [{name: model} for name, model in models.items()] if method.alone else [models]
    made: dict[str, nn.Module] = {}
    for group in groups:
        made |= dict(compress(group, keep=method.keep, share=method.share, covariances=weights))
    basis = None if method.alone else domain_of(next(iter(made.values()))).basis
    return made, 0 if basis is None else basis.numbers


def _basis_tuned(
    cells: list[Cell],
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
        for _ in fit(candidate, setting.train, recipe, val=setting.val, graphed=cell.graphed):
            pass
        accuracy = evaluate(candidate, setting.val).accuracy
        trials.append({"lr": recipe.lr, "decay": recipe.decay_adapter, "val_accuracy": accuracy})
        if accuracy > best_accuracy:
            best, best_accuracy, chosen = candidate, accuracy, recipe.lr
    own = own_basis_numbers(best) if read_method(cell.method).alone else 0  # type: ignore[union-attr]
    record = figures(cell, best, setting)
    return {
        **record,
        "numbers": record["numbers"] + own,
        "trials": trials,
        "lr": chosen,
        "decay": source.decay,
        "norm_statistics": source.statistics,
        "n_train": len(setting.train),
        "seconds": round(seconds + time.monotonic() - started, 1),
    }


def _copy(model: nn.Module) -> nn.Module:
    """A network over the same backbone and basis with numbers of its own."""
    domain = domain_of(model)
    return rebuilt(model, domain.plan, domain.basis, {})


def own_basis_numbers(model: nn.Module) -> int:
    """Numbers of a basis that one domain alone is over: they are the domain's then."""
    basis = domain_of(model).basis
    return 0 if basis is None else basis.numbers
