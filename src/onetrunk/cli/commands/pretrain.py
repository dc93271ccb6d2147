"""pretrain: argv -> a request for the backbone's own training."""

from pathlib import Path
from typing import Annotated

import typer

from ..console import Screen
from ..options import AsJson, Device, Epochs, Flip, Recipes, Resume, Seed, SizePx, Source
from ..values import device_of, recipe_of


def pretrain(
    backbone: Annotated[
        str, typer.Argument(metavar="BACKBONE", help="resnet26(width=0.5), timm:NAME ...")
    ],
    data: Source,
    out: Annotated[Path, typer.Option(help="The safetensors file to write.")],
    adapter: Annotated[
        str | None,
        typer.Option(metavar="FAMILY", help="In place while the weights are trained: series."),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Start from this safetensors file, not at random.")
    ] = None,
    recipe: Recipes = "pretrain",
    epochs: Epochs = None,
    seed: Seed = None,
    size_px: SizePx = None,
    flip: Flip = None,
    half: Annotated[bool, typer.Option("--half", help="Store float16.")] = False,
    merge: Annotated[
        bool, typer.Option("--merge", help="Fold the adapters in; else they are left out.")
    ] = False,
    resume: Resume = False,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Train a backbone itself; on several GPUs or processes with torchrun -m onetrunk pretrain.

    Example: onetrunk pretrain "resnet26(width=0.5)" --data photos --out trunk.safetensors
    """
    from ...core.adapters import read_family
    from ..pretraining import Request
    from ..pretraining import pretrain as run

    screen = Screen(as_json)
    request = Request(
        backbone=backbone,
        data=data,
        out=out,
        recipe=recipe_of(recipe, epochs, seed),
        adapter=None if adapter is None else read_family(adapter),
        weights=weights,
        size_px=size_px,
        flip=flip,
        half=half,
        merge=merge,
        resume=resume,
        device=None if device is None else device_of(device),
    )
    run(request, screen)
