"""new: a bank around a backbone."""

from pathlib import Path
from typing import Annotated

import typer

from ...errors import BankError
from ..console import UNTRAINED, Screen
from ..options import AsJson, BankPath


def new(
    bank: BankPath,
    backbone: Annotated[
        str,
        typer.Option(metavar="NAME", help="timm:NAME, torchvision:NAME or resnet26(width=0.5)."),
    ] = "timm:tf_efficientnet_lite0",
    weights: Annotated[
        Path | None, typer.Option(help="A safetensors file with the backbone's weights.")
    ] = None,
    by_reference: Annotated[
        bool, typer.Option("--by-reference", help="Store the name, not the weights.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make a bank around a backbone.

    Example: onetrunk new garden.bank --backbone timm:resnet18.a1_in1k
    """
    from ...backbones import backbone as build_backbone
    from ...backbones.written_form import is_untrained
    from ...bank.bank import Bank

    screen = Screen(as_json)
    if by_reference and weights is not None:
        raise BankError(
            "--by-reference stores the backbone's name only, which does not bring back --weights "
            f"{weights}. Leave --by-reference out."
        )
    made = Bank.create(bank, build_backbone(backbone, weights=weights), by_reference=by_reference)
    screen.say(f"{bank}: {made.backbone_form}, fingerprint {made.backbone_fingerprint[:12]}")
    if is_untrained(backbone, weights):
        screen.warn(UNTRAINED)
    screen.finish(
        {
            "bank": str(bank),
            "backbone": made.backbone_form,
            "fingerprint": made.backbone_fingerprint,
        }
    )
