"""predict: classes of image files."""

from pathlib import Path
from typing import Annotated

import typer

from ...errors import BankError
from ..console import Screen, percent
from ..options import AsJson, BankPath, Device, Domain
from ..values import device_of, open_bank


def predict(
    bank: BankPath,
    domain: Domain,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGES...", help="Files or folders.")],
    top_k: Annotated[int, typer.Option("--top-k", min=1, help="Classes an image.")] = 3,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """The likeliest classes of image files.

    Example: onetrunk predict garden.bank flowers holiday/ --top-k 3
    """
    from ...training.predict import predict as predictions_of

    screen = Screen(as_json)
    model = open_bank(bank).load(domain)
    asked = images[0] if len(images) == 1 else images
    found = predictions_of(model, asked, top_k=top_k, device=device_of(device))
    for prediction in found:
        likely = "  ".join(f"{name} {percent(p)}" for name, p in prediction.classes)
        screen.say(f"{prediction.name}: {likely or prediction.problem}")
    screen.finish(
        [
            {"image": p.name, "classes": [list(c) for c in p.classes], "problem": p.problem}
            for p in found
        ]
    )
    broken = [prediction for prediction in found if prediction.problem]
    if len(broken) == len(found):
        raise BankError(
            f"none of the {len(found)} images has an answer; the first: {found[0].problem}"
        )
    if broken:
        first = f"{broken[0].name}: {broken[0].problem}"
        screen.warn(f"{len(broken)} of {len(found)} images have no answer; the first: {first}")
