"""export: argv -> domains, images for the check, one file."""

import dataclasses
import os
from pathlib import Path

from torch import Tensor, nn

from ..bank.bank import Bank
from ..core.domain import domain_of
from ..data import load
from ..errors import ExportError, MissingExtraError
from ..export import Exported, export, export_together
from ..export.base import N_CHECKED
from .console import Screen, size
from .reading import read

PHOTOS = "builtin:photos"


def run(
    bank: Bank,
    domains: list[str],
    every: bool,
    out: Path | None,
    file_format: str | None,
    source: str | None,
    replace: bool,
    screen: Screen,
) -> None:
    """Writes the file and says what it is.

    Raises:
        ExportError: where it is not said what to export, or several domains as no ONNX.
        OnetrunkError: of the room that refuses; there is no file then.
    """
    if every == bool(domains):
        raise ExportError("name the domains to export, or give --all for every domain of the bank.")
    names = list(bank.domains) if every else list(dict.fromkeys(domains))
    if not names:
        raise ExportError(f"bank {bank.path} has no domains. Train some first.")
    models = {name: bank.load(name) for name in names}
    together = every or len(names) > 1
    stem = bank.path.resolve().stem if together else names[0]
    out = out or Path(f"{stem}.{file_format or 'safetensors'}")
    if not replace and os.path.lexists(out):
        raise ExportError(f"{out} is there already. Say --replace to write over it, or give --out.")
    if together and (file_format or out.suffix.removeprefix(".")) != "onnx":
        raise ExportError(
            f"{len(names)} domains in one file are ONNX only: give --format onnx or --out "
            "FILE.onnx, or export them one by one."
        )
    model = models[names[0]]
    source = source or _photographs(model)
    images = None if source is None else _images(source, model, screen)
    screen.say(f"checking on {'noise' if images is None else f'{len(images)} images of {source}'}")
    if together:
        report = export_together(models, out, images)
    else:
        report = export(model, out, format=file_format, images=images)
    _say(report, screen)
    screen.finish({"domains": names, "checked_on": source or "noise", **dataclasses.asdict(report)})


def _photographs(model: nn.Module) -> str | None:
    """Real pictures that come with installed packages; None where there are none, or no use."""
    if domain_of(model).preprocessing is None:
        return None
    try:
        load(PHOTOS)
    except MissingExtraError:
        return None
    return PHOTOS


def _images(source: str, model: nn.Module, screen: Screen) -> Tensor:
    """Some of a source's images, as the domain sees them."""
    splits, seen = load(source), domain_of(model).preprocessing
    if seen is None:
        raise ExportError(
            "this domain prepares no images: its backbone takes neither 1 nor 3 channels, or none "
            "that are square. Leave --data out."
        )
    part = splits.test or splits.val or splits.train
    few = part.subset(range(0, len(part), -(-len(part) // N_CHECKED)))
    return read(few, seen, "checked", screen).few_views(N_CHECKED)


def _say(report: Exported, screen: Screen) -> None:
    screen.say(
        f"{report.file}: {report.numbers:,} numbers, {size(report.bytes)}; differs from the "
        f"domain's network by {report.difference:.1e} of the largest logit"
    )
    if report.format == "safetensors":
        fits = report.architecture
        screen.say(f"loads into {fits}" if fits else "norms are folded: no stock architecture fits")
