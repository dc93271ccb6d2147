"""benchmark decathlon, decathlon-score: the challenge from its official files, for a person."""

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...errors import OnetrunkError, TrainingError
from ..console import UNTRAINED, Screen, percent
from ..options import AsJson, Device, Epochs

if TYPE_CHECKING:
    from ...benchmark.decathlon import Report

LABELS = "A folder with <name>_test.json, of the authors' labels_test.zip."


def decathlon(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="The devkit, decathlon-1.0: see the docs.")
    ],
    out: Annotated[Path, typer.Option(metavar="WORK", help="The folder of this run.")],
    backbone: Annotated[
        str, typer.Option(metavar="NAME", help="resnet26(width=1.0), timm:NAME, torchvision:NAME.")
    ] = "resnet26(width=1.0)",
    weights: Annotated[
        Path | None, typer.Option(help="A safetensors file with the backbone's weights.")
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(metavar="FAMILY", help="By default what fits the backbone.")
    ] = None,
    recipe: Annotated[
        str, typer.Option(help="released, paper, or one with fields: released(lr=0.05).")
    ] = "released",
    joint: Annotated[
        bool, typer.Option("--joint", help="The domains take turns, a step each.")
    ] = False,
    train_on: Annotated[str, typer.Option(help="train or train+val.")] = "train",
    domains: Annotated[
        str | None, typer.Option(metavar="A,B", help="Some of the ten; by default all.")
    ] = None,
    epochs: Epochs = None,
    labels: Annotated[Path | None, typer.Option(metavar="FOLDER", help=LABELS)] = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """The Visual Decathlon from its official files: train, answer the test images, score.

    Saying the same command again goes on where it was stopped. WORK/results.json is the submission.

    Example: onetrunk benchmark decathlon decathlon-1.0 --weights trunk.safetensors --out work
    """
    import dataclasses

    from ...backbones import backbone as build_backbone
    from ...backbones.written_form import is_untrained
    from ...bank.backbone import usable_device
    from ...bank.lock import BusyError
    from ...benchmark.decathlon import (
        DOMAINS,
        Devkit,
        FailedDomainsError,
        Settings,
        check_labels,
        conclude,
        read_devkit,
        steps_left,
        train,
    )
    from ...benchmark.decathlon.domains import checked_names
    from ...core.adapters import read_family
    from ...training.recipe import read_recipe

    screen = Screen(as_json)
    asked = read_recipe(recipe)
    settings = Settings(
        family=None if adapter is None else read_family(adapter),
        recipe=asked if epochs is None else dataclasses.replace(asked, epochs=epochs),
        train_on=train_on,  # type: ignore[arg-type]
        joint=joint,
        device=None if device is None else str(usable_device(device)),
    )
    names = checked_names(DOMAINS if domains is None else [n.strip() for n in domains.split(",")])
    network = build_backbone(backbone, weights=weights)
    if is_untrained(backbone, weights):
        screen.warn(UNTRAINED)
    slow = "; ImageNet's takes a minute or two" if "imagenet12" in names else ""
    screen.say(f"reading the lists of images in {folder}{slow}")
    kit = read_devkit(folder, names)
    if labels is not None:
        check_labels(kit, labels)
    for name, files in kit.domains.items():
        counts = f"{len(files.train)} train, {len(files.val)} val, {len(files.test)} test"
        screen.say(f"{name}: {len(files.classes)} classes, images: {counts}")
    not_done: dict[str, OnetrunkError] = {}

    def tell(name: str, error: OnetrunkError) -> None:
        not_done[name] = error
        busy = isinstance(error, BusyError)
        screen.warn(f"{name} is left to another process" if busy else f"{name} failed: {error}")

    with screen.bar("training") as show:
        left, done = sum(steps_left(kit, settings, out).values()), dict[str, int]()

        def reading(name: str, n_read: int, n_images: int) -> None:
            show(sum(done.values()), left, f"reading {name}: {n_read:,} of {n_images:,} images")

        steps = train(kit, network, settings, out, progress=reading, on_failure=tell)
        with suppress(FailedDomainsError):  # each was told of
            for name, step in steps:
                done[name] = step.step
                show(sum(done.values()), left, f"{name}, loss {step.loss:.3f}")
    finished = {name: files for name, files in kit.domains.items() if name not in not_done}
    if not finished:
        raise TrainingError(
            f"none of {', '.join(kit.domains)} is finished in {out}. The same command trains what "
            "is left."
        )
    report = conclude(Devkit(kit.folder, finished), settings, out, labels=labels)
    _show_decathlon(report, screen)
    if not_done:
        screen.say(f"{', '.join(not_done)}: not finished; the same command trains what is left")
    failed = {n: str(error) for n, error in not_done.items() if not isinstance(error, BusyError)}
    screen.finish({**report.to_json(), "failed": failed})
    if failed:
        raise typer.Exit(1)


def _show_decathlon(report: "Report", screen: Screen) -> None:
    screen.table(*report.table())
    if report.mean_accuracy is not None:
        measured = f"mean {report.measured_on} accuracy {percent(report.mean_accuracy)}"
        all_ten = "" if report.score is None else f", S = {report.score:.0f}"
        screen.say(f"{measured}{all_ten}")
    if report.measured_on == "val":
        screen.say("points are of validation images: submit, or give --labels, for a result")
    if report.unofficial:
        screen.warn(
            f"{', '.join(report.unofficial)}: classes or test images are not as many as in the "
            "challenge, so the points mean nothing."
        )
    for name, why in report.left_out.items():
        screen.warn(f"{name} is there too, {why}: {report.results} is without its answers.")
    if report.lacking:
        n_there = len(report.answered)
        screen.say(
            f"{report.results}: answers for {n_there} of the ten domains; a submission needs "
            f"{', '.join(report.lacking)} too"
        )
    else:
        screen.say(f"to submit: {report.results}")


def decathlon_score(
    results: Annotated[Path, typer.Argument(metavar="RESULTS_JSON", help="The submission.")],
    labels: Annotated[Path, typer.Option(metavar="FOLDER", help=LABELS)],
    as_json: AsJson = False,
) -> None:
    """The score of a results.json against local label files.

    Example: onetrunk benchmark decathlon-score work/results.json --labels labels_test
    """
    from ...benchmark.decathlon import score_results

    screen = Screen(as_json)
    found = score_results(results, labels)
    rows = [
        (name, f"{100 * accuracy:.2f}", f"{found.points[name]:.0f}")
        for name, accuracy in found.accuracies.items()
    ]
    screen.table(("domain", "test %", "points"), rows)
    if found.score is None:
        screen.say(f"{len(rows)} of the ten domains; S needs all of them")
    else:
        screen.say(f"S = {found.score:.0f}")
    screen.finish(found.to_json())
