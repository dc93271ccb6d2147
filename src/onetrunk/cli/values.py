"""What was typed, as the values that it names."""

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ..errors import BankError

if TYPE_CHECKING:
    from ..bank.bank import Bank
    from ..core.plan import Where
    from ..training.recipe import Recipe


def open_bank(path: Path) -> "Bank":
    """The bank in that folder."""
    from ..bank.bank import Bank

    return Bank.open(path)


def open_for(path: Path, domain: str, replace: bool) -> "Bank":
    """The bank, where it can take a domain of that name."""
    from ..bank.names import check_name

    check_name(domain)
    opened = open_bank(path)
    if domain in opened.domains and not replace:
        raise BankError(
            f"bank {path} has a domain {domain!r} already. Use --replace to train it anew, or "
            "another name."
        )
    return opened


def device_of(asked: str | None) -> str:
    """The device by that name; the best there is where none was named."""
    from ..bank.backbone import usable_device
    from ..training.fit import best_device

    return best_device() if asked is None else str(usable_device(asked))


def recipe_of(text: str, epochs: int | None, seed: int | None) -> "Recipe":
    """The written recipe, with the two fields that have options of their own."""
    import dataclasses

    from ..training.recipe import read_recipe

    given = {"epochs": epochs, "seed": seed}
    changed = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(read_recipe(text), **changed)  # type: ignore[arg-type]


def where_of(stages: str, convs: str, layers: str, pattern: str) -> "Where | None":
    """Which layers; None where it is the default."""
    from ..core.plan import Where

    names = tuple(name.strip() for name in stages.split(",") if name.strip())
    where = Where(names, convs, layers, pattern)  # type: ignore[arg-type]
    return None if where == Where() else where


def fractions_of(text: str) -> tuple[float, float, float]:
    """Shares for train, validation and test."""
    try:
        train, val, test = (float(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not three shares such as 0.7,0.15,0.15", param_hint="--split"
        ) from None
    return train, val, test
