"""allocate: argv -> a budget and a request for the training."""

from pathlib import Path
from typing import Annotated

import typer

from ..console import Screen
from ..options import (
    AsJson,
    BankPath,
    Device,
    Domain,
    Epochs,
    Flip,
    Layers,
    NormsOf,
    Pattern,
    Recipes,
    Replace,
    Resume,
    Seed,
    Shares,
    SizePx,
    Source,
    Squash,
    Stages,
)
from ..values import device_of, fractions_of, open_for, recipe_of, where_of


def allocate(
    bank: BankPath,
    domain: Domain,
    data: Source,
    budget: Annotated[
        str,
        typer.Option(help="For the adapters: 2% of the backbone, 150kB, or 40000 numbers."),
    ],
    by: Annotated[
        str,
        typer.Option(help="What is measured: gradient, curvature, or trained (takes a training)."),
    ] = "curvature",
    stages: Stages = "early,mid,late",
    layers: Layers = "all",
    pattern: Pattern = "*",
    norms: NormsOf = "all",
    plan_only: Annotated[bool, typer.Option("--plan-only", help="Train nothing.")] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the plan, for train --plan.")
    ] = None,
    map_file: Annotated[
        Path | None,
        typer.Option("--map", metavar="FILE", help="Draw layers by domains, of the whole bank."),
    ] = None,
    recipe: Recipes = "default",
    epochs: Epochs = None,
    seed: Seed = None,
    size_px: SizePx = None,
    flip: Flip = None,
    squash: Squash = False,
    split: Shares = "0.7,0.15,0.15",
    resume: Resume = False,
    replace: Replace = False,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Spend a budget of adapter numbers where a domain needs them, and train it so.

    Example: onetrunk allocate garden.bank flowers --data photos/flowers --budget 2%
    """
    from ...data import load
    from ..allocating import Wish, run
    from ..training import Request

    if by not in ("gradient", "curvature", "trained"):
        raise typer.BadParameter(
            f"{by!r} is none of gradient, curvature, trained", param_hint="--by"
        )
    screen = Screen(as_json)
    opened = open_for(bank, domain, replace or plan_only)
    request = Request(
        domain=domain,
        splits=load(data, split_fractions=fractions_of(split)),
        source=data,
        where=where_of(stages, "both", layers, pattern),
        norms=norms,  # type: ignore[arg-type]
        recipe=recipe_of(recipe, epochs, seed),
        size_px=size_px,
        hflip=flip,
        squash=squash,
        resume=resume,
        replace=replace,
        device=device_of(device),
    )
    wish = Wish(budget, by, plan_only, out, map_file)  # type: ignore[arg-type]
    screen.finish(run(opened, request, wish, screen))
