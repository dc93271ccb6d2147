"""export: one file that needs no onetrunk."""

from pathlib import Path
from typing import Annotated

import typer

from ..console import Screen
from ..options import AsJson, BankPath
from ..values import open_bank


def export(
    bank: BankPath,
    domain: Annotated[
        list[str] | None, typer.Argument(metavar="DOMAIN...", help="One, or several as one ONNX.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The file to write; by default DOMAIN.safetensors.")
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="Every domain of the bank, as ONNX.")
    ] = False,
    file_format: Annotated[
        str | None, typer.Option("--format", help="safetensors, pt2 or onnx; by default OUT's.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="SOURCE", help="Images for the check; by default photos."),
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Over a file of that name.")] = False,
    as_json: AsJson = False,
) -> None:
    """The merged network as one file that needs no onetrunk, with class names and preprocessing.

    safetensors: weights, for the stock architecture where they fit it; pt2: torch.export; onnx: for
    ONNX Runtime, OpenVINO and others. The file is read back, run and compared with the domain's
    own network before it appears. Several domains, or --all, become one ONNX file whose second
    input says the domain of each row.

    Example: onetrunk export garden.bank flowers --out flowers.onnx --data photos/flowers
    """
    from .. import exporting

    exporting.run(
        open_bank(bank), domain or [], every, out, file_format, data, replace, Screen(as_json)
    )
