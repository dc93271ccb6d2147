"""quickstart: real domains, in minutes."""

from pathlib import Path
from typing import Annotated

import typer

from ..console import Screen
from ..options import AsJson


def quickstart(
    out: Annotated[Path, typer.Option(help="The bank's folder.")] = Path("quickstart.bank"),
    epochs: Annotated[int | None, typer.Option(min=1, help="Instead of the chosen number.")] = None,
    as_json: AsJson = False,
) -> None:
    """Several real domains on one ImageNet backbone, in minutes and without a network.

    Example: onetrunk quickstart --out demo.bank
    """
    from ..quickstart import run

    run(out, Screen(as_json), epochs)
