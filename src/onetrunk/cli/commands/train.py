"""train: argv -> a request for a domain's training."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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

if TYPE_CHECKING:
    from ...bank.bank import Bank
    from ...core.adapters import Family
    from ...core.basis import Basis
    from ...core.plan import Plan


def train(
    bank: BankPath,
    domain: Domain,
    data: Source,
    adapter: Annotated[
        str | None,
        typer.Option(
            metavar="FAMILY",
            help="series, parallel, lowrank(rank=8), channelwise, norm, full or head; by default "
            "what fits the backbone.",
        ),
    ] = None,
    stages: Stages = "early,mid,late",
    convs: Annotated[str, typer.Option(help="both, first or second of a block.")] = "both",
    layers: Layers = "auto",
    pattern: Pattern = "*",
    norms: NormsOf = "all",
    plan: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help='Layer by layer: of allocate, or {"layer or glob": "family"}.'
        ),
    ] = None,
    plan_of: Annotated[
        str | None,
        typer.Option(
            metavar="DOMAIN",
            help="The plan of a domain of this bank; of a compressed one, over the same basis.",
        ),
    ] = None,
    recipe: Recipes = "default",
    epochs: Epochs = None,
    seed: Seed = None,
    size_px: SizePx = None,
    flip: Flip = None,
    squash: Squash = False,
    split: Shares = "0.7,0.15,0.15",
    probe: Annotated[
        bool, typer.Option("--probe/--no-probe", help="Compare with a linear probe.")
    ] = True,
    cache: Annotated[
        int | None,
        typer.Option(
            metavar="VIEWS",
            min=0,
            help="Run what is frozen once for so many augmented views an image (0: none is "
            "augmented), with --stages late --norms placed.",
        ),
    ] = None,
    cache_folder: Annotated[
        Path | None, typer.Option(help="Keep the cached features there, not in memory.")
    ] = None,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Less memory: compute activations twice.")
    ] = False,
    graphed: Annotated[
        bool, typer.Option("--graphed", help="On CUDA: record a step once and replay it.")
    ] = False,
    resume: Resume = False,
    replace: Replace = False,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Train a domain and store it in the bank.

    Example: onetrunk train garden.bank flowers --data photos/flowers --adapter "lowrank(rank=8)"
    """
    from ...data import load
    from ..training import Request, train_domain

    if cache_folder is not None and cache is None:
        raise typer.BadParameter("it is for --cache VIEWS", param_hint="--cache-folder")
    where = where_of(stages, convs, layers, pattern)
    if where is not None and (plan is not None or plan_of is not None):
        raise typer.BadParameter(
            "a plan says which layers: leave --stages, --convs, --layers and --pattern out"
        )
    screen = Screen(as_json)
    opened = open_for(bank, domain, replace)
    family, basis = _family(opened, adapter, plan, plan_of)
    request = Request(
        domain=domain,
        splits=load(data, split_fractions=fractions_of(split)),
        source=data,
        family=family,
        basis=basis,
        where=where,
        norms=norms,  # type: ignore[arg-type]
        recipe=recipe_of(recipe, epochs, seed),
        size_px=size_px,
        hflip=flip,
        squash=squash,
        probe=probe,
        cache=cache,
        cache_folder=cache_folder,
        recompute=recompute,
        graphed=graphed,
        resume=resume,
        replace=replace,
        device=device_of(device),
    )
    screen.finish({"domain": domain, **train_domain(opened, request, screen).to_json()})


def _family(
    bank: "Bank", adapter: str | None, plan: Path | None, plan_of: str | None
) -> "tuple[Family | Plan | None, Basis | None]":
    """What is attached: a family, the plan of a file or of another domain, or the default."""
    from ...core.adapters import read_family

    if sum(given is not None for given in (adapter, plan, plan_of)) > 1:
        raise typer.BadParameter("--adapter, --plan and --plan-of exclude each other")
    if adapter is not None:
        return read_family(adapter), None
    if plan is None and plan_of is None:
        return None, None
    from .. import allocating

    if plan is not None:
        return allocating.read_plan(plan, bank.backbone), None
    return allocating.plan_of(bank, str(plan_of))
