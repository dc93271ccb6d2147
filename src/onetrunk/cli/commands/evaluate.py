"""evaluate: figures of a domain on labelled images."""

from typing import Annotated

import typer

from ..console import Screen, percent
from ..options import AsJson, BankPath, Device, Domain, Source
from ..values import device_of, open_bank


def evaluate(
    bank: BankPath,
    domain: Domain,
    data: Source,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Accuracy of a domain on labelled images: overall, balanced, per class, calibration.

    Example: onetrunk evaluate garden.bank flowers --data photos/flowers --split test
    """
    from ...training.evaluate import evaluate as figures_of
    from ..training import load_as_trained, split_of

    if split not in ("train", "val", "test"):
        raise typer.BadParameter(f"{split!r} is none of train, val, test", param_hint="--split")
    screen = Screen(as_json)
    opened = open_bank(bank)
    cards, model = opened.domains, opened.load(domain)
    splits = load_as_trained(data, cards[domain])
    images = split_of(splits, split, data)
    with screen.bar("evaluating") as show:
        result = figures_of(model, images, device=device_of(device), progress=show)
    if result.problems:
        screen.warn(f"{len(result.problems)} images left out; the first: {result.problems[0][0]}")
    screen.say(f"{domain}: {result.n_images} {split} images")
    if splits.note:
        screen.say(f"  {splits.note}")
    screen.say(f"  accuracy           {percent(result.accuracy)}")
    screen.say(f"  balanced accuracy  {percent(result.balanced_accuracy)}")
    screen.say(f"  calibration error  {percent(result.calibration_error)}")
    found = result.confusion.sum(axis=1)
    rows = [
        (name, str(found[row]), percent(share))
        for row, (name, share) in enumerate(result.per_class.items())
    ]
    screen.table(("class", "images", "found"), rows)
    screen.finish({"domain": domain, "split": split, **result.to_json()})
