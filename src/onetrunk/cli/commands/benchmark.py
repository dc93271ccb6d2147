"""benchmark: the studies, each a command; argv -> values -> calls."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...errors import DataError, TrainingError
from ...files import check_writable, reason
from ..console import Screen, counted
from ..options import AsJson
from .decathlon import decathlon, decathlon_score

if TYPE_CHECKING:
    from ...benchmark.studies import Wish

benchmark = typer.Typer(
    name="benchmark",
    help="The paper's studies and ours, on images of yours or of theirs.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
benchmark.command()(decathlon)
benchmark.command("decathlon-score")(decathlon_score)

Folder = Annotated[
    Path, typer.Argument(metavar="FOLDER", help="One data source a domain below it.")
]
Out = Annotated[Path, typer.Option(help="Where results and report go; a run goes on there.")]
Backbones = Annotated[
    list[str] | None,
    typer.Option("--backbone", metavar="NAME[@WEIGHTS]", help="Again for several."),
]
Methods = Annotated[
    str | None, typer.Option(help="With ; between: 'head; full; lowrank(rank=8); parallel@late'.")
]
Domains = Annotated[str, typer.Option(help="With commas between; by default all but the base.")]
Seeds = Annotated[str, typer.Option(help="With commas between.")]
Full = Annotated[bool, typer.Option("--full/--small", help="Every image at 64 px, for one GPU.")]
Graphed = Annotated[
    bool, typer.Option("--graphed", help="On CUDA: record a step once and replay it.")
]
Workers = Annotated[int, typer.Option(min=1, help="Processes, each with one thread.")]
ReportOnly = Annotated[
    bool, typer.Option("--report-only", help="Compute nothing: report what is there.")
]


@benchmark.command()
def mini(
    folder: Folder,
    out: Out = Path("results/mini"),
    backbones: Backbones = None,
    methods: Methods = None,
    domains: Domains = "",
    seeds: Seeds = "0",
    full: Full = False,
    graphed: Graphed = False,
    workers: Workers = 2,
    report_only: ReportOnly = False,
    as_json: AsJson = False,
) -> None:
    """Methods x domains: accuracy against parameters, with rivals under the same tuning.

    Example: onetrunk benchmark mini domains --out results/mini --methods "head; full; parallel"
    """
    wish = _wish(folder, out, backbones, methods, domains, seeds, full, graphed)
    _run("mini", wish, workers, report_only, Screen(as_json))


@benchmark.command()
def transfer(
    folder: Folder,
    out: Out = Path("results/transfer"),
    per_class: Annotated[str, typer.Option(help="Training images a class.")] = "5,10,25,50,100,all",
    backbones: Backbones = None,
    methods: Methods = None,
    domains: Domains = "",
    seeds: Seeds = "0,1,2",
    full: Full = False,
    graphed: Graphed = False,
    workers: Workers = 2,
    report_only: ReportOnly = False,
    as_json: AsJson = False,
) -> None:
    """Accuracy against training images a class: adapters and fine-tuning where data is scarce.

    Example: onetrunk benchmark transfer domains --per-class 5,25 --domains flowers,gtsrb
    """
    import dataclasses

    from ...benchmark.studies import ALL

    wish = _wish(folder, out, backbones, methods, domains, seeds, full, graphed)
    numbers = per_class.replace("all", str(ALL))
    wish = dataclasses.replace(wish, per_class=_numbers(numbers, "--per-class"))
    _run("transfer", wish, workers, report_only, Screen(as_json))


@benchmark.command()
def stages(
    folder: Folder,
    out: Out = Path("results/stages"),
    backbones: Backbones = None,
    methods: Methods = None,
    domains: Domains = "",
    seeds: Seeds = "0",
    full: Full = False,
    graphed: Graphed = False,
    workers: Workers = 2,
    report_only: ReportOnly = False,
    as_json: AsJson = False,
) -> None:
    """Where adapters pay: early, mid or late stages, first or second convolutions of a block.

    Example: onetrunk benchmark stages domains --backbone "resnet26(width=0.5)"
    """
    wish = _wish(folder, out, backbones, methods, domains, seeds, full, graphed)
    _run("stages", wish, workers, report_only, Screen(as_json))


@benchmark.command()
def speed(
    out: Annotated[Path, typer.Option(help="Where results go; a run goes on there.")] = Path(
        "results/speed"
    ),
    only: Annotated[
        str, typer.Option(help="Of step,inference,mixed,together,cached,bank,memory.")
    ] = "",
    backbones: Annotated[
        list[str] | None,
        typer.Option("--backbone", metavar="NAME[@PIXELS]", help="Again for several."),
    ] = None,
    repeats: Annotated[int, typer.Option(help="Rounds; every one runs all contestants.")] = 9,
    threads: Annotated[int, typer.Option(min=1, help="Of PyTorch and the runtimes.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Time and memory of training, inference and mixed batches, against what one would use instead.

    Contestants take turns and are compared within their round. With one thread the processor's own
    time is taken, which other programs do not change.

    Example: onetrunk benchmark speed --only step,mixed --backbone "resnet26(width=1.0)@64"
    """
    import torch

    from ...benchmark.report import require_extra
    from ...benchmark.speed import GROUPS, MEMORY, SUBJECTS
    from ...benchmark.speed import run as run_speed
    from ...benchmark.speed.report import write

    require_extra()
    _check_writable(out)
    screen, before = Screen(as_json), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with screen.bar("speed") as show:
            groups = tuple(dict.fromkeys(_listed(only, ","))) or (*GROUPS, MEMORY)
            subjects = tuple(dict.fromkeys(backbones or SUBJECTS))
            records = run_speed(groups, subjects, repeats, out, show)
    finally:
        torch.set_num_threads(before)
    files = write(records, out, shlex.join(["onetrunk", *sys.argv[1:]]))
    screen.say((out / "speed.md").read_text())
    screen.finish({"records": records, "files": [str(path) for path in files]})


def _wish(
    folder: Path,
    out: Path,
    backbones: list[str] | None,
    methods: str | None,
    domains: str,
    seeds: str,
    full: bool,
    graphed: bool,
) -> "Wish":
    from ...benchmark.studies import Wish

    if methods is not None and not _listed(methods, ";"):
        raise typer.BadParameter("it names no method", param_hint="--methods")
    return Wish(
        data=folder,
        out=out,
        backbones=tuple(backbones or ()),
        methods=_listed(methods or "", ";"),
        domains=_listed(domains, ","),
        seeds=_numbers(seeds, "--seeds"),
        full=full,
        graphed=graphed,
    )


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        check_writable(folder)
    except OSError as error:
        raise DataError(f"results cannot be written to {folder}: {reason(error)}") from error


def _listed(text: str, between: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(between) if part.strip())


def _numbers(text: str, option: str) -> tuple[int, ...]:
    try:
        numbers = tuple(dict.fromkeys(int(part) for part in _listed(text, ",")))
    except ValueError:
        numbers = ()
    if not numbers:
        raise typer.BadParameter(
            f"{text!r} is no list of whole numbers such as 0,1,2", param_hint=option
        )
    return numbers


def _run(name: str, wish: "Wish", workers: int, report_only: bool, screen: Screen) -> None:
    from ...benchmark.cells import backbone_of
    from ...benchmark.report import require_extra, write_report
    from ...benchmark.studies import STUDIES, shown
    from ...benchmark.study import known, run

    require_extra()
    if not report_only:
        _check_writable(wish.out)
    studies = STUDIES[name](wish)
    records, failures = [], []
    for trunk in dict.fromkeys(trunk for study in studies for trunk, _ in study.trunks):
        backbone_of(trunk)  # one that cannot be built is refused here, once
    for study in studies:
        if report_only:
            records += known(study)
            continue
        n_cells = len(study.cells()) + sum(len(c) for c in study.compressions())
        n_done = len(known(study))
        screen.say(
            f"{study.trunks[0][0]}: {counted(n_cells, 'cell')}"
            f"{f', {n_done:,} of them done' if n_done else ''}, "
            f"{counted(len(study.domains), 'domain')}"
        )
        with screen.bar(name) as show:
            outcome = run(study, workers, show)
        records += outcome.records
        failures += outcome.failures
    for failure in failures:
        screen.warn(f"left out: {failure}")
    if not records and failures:
        raise TrainingError(f"no cell could be computed; the first: {failures[0]}")
    if not records:
        raise DataError(f"{wish.out} has no finished cell of this study. Run it first.")
    methods = dict.fromkeys(method for study in studies for method in study.methods)
    words = [word for word in sys.argv[1:] if word != "--report-only"]  # which computes nothing
    command = shlex.join(["onetrunk", *words])
    expected = [place for study in studies for place in study.places()]
    files = write_report(
        records, shown(list(methods)), wish.out, name, command, expected,
        [f"left out: {failure}" for failure in failures],
    )  # fmt: skip
    screen.say((wish.out / f"{name}.md").read_text())
    screen.say(f"report {wish.out / f'{name}.html'}")
    screen.finish(
        {"cells": len(records), "left_out": failures, "files": [str(path) for path in files]}
    )
    if failures:
        raise typer.Exit(1)
