"""Options that several commands share, each written once."""

from pathlib import Path
from typing import Annotated

import typer

BankPath = Annotated[Path, typer.Argument(metavar="BANK", help="The bank's folder.")]
Domain = Annotated[str, typer.Argument(metavar="DOMAIN", help="The domain's name in the bank.")]
Source = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="SOURCE",
        help="A folder of class folders (train/ val/ test/ below it or not), a folder with "
        "train.parquet, hf:owner/name, torchvision:GTSRB, sklearn:digits, builtin:textures.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="The result as JSON on standard output.")]
Recipes = Annotated[
    str, typer.Option(help="default, paper, released, or one with fields: default(lr=0.001).")
]
Epochs = Annotated[int | None, typer.Option(min=1, help="Instead of the recipe's.")]
Seed = Annotated[int | None, typer.Option(help="Instead of the recipe's.")]
SizePx = Annotated[int | None, typer.Option("--size", min=8, help="Side of the images in pixels.")]
Flip = Annotated[
    bool | None, typer.Option("--flip/--no-flip", help="Whether mirrored images keep the label.")
]
Squash = Annotated[
    bool, typer.Option("--squash", help="Ignore the aspect ratio instead of cropping.")
]
Stages = Annotated[str, typer.Option(help="Any of early,mid,late.")]
Layers = Annotated[str, typer.Option(help="all, auto, spatial or pointwise.")]
NormsOf = Annotated[
    str, typer.Option(help="all are the domain's; placed: from the first adapter on; none.")
]
Pattern = Annotated[str, typer.Option(help="A glob on layer names.")]
Shares = Annotated[str, typer.Option(help="Shares for train,val,test where there are no splits.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on after a kill.")]
Replace = Annotated[bool, typer.Option("--replace", help="Over a domain of that name.")]
Device = Annotated[str | None, typer.Option(help="cuda, mps or cpu; by default the best there is.")]
