"""What a person at a terminal sees: lines, tables, bars with time left; JSON for machines."""

import json
import math
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from ..training.fit import Step


UNTRAINED = (
    "only resnet26(width=0.5) comes with weights: this backbone is untrained. Give --weights FILE, "
    "or make one with onetrunk pretrain."
)

WIDEST = 1000  # columns of a table where no terminal says how wide it is
_COMMANDS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
SECONDS_A_LINE = 30.0  # of progress in a log


class Bar(Protocol):
    """A running progress bar."""

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """`done` of `total`, with a few words behind it."""


class Screen:
    """Where a command writes. With `as_json` only the final value goes out, as JSON; `quiet` is
    for a process beside the one that talks.
    """

    def __init__(self, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json = as_json
        width = None if sys.stdout.isatty() else WIDEST  # a pipe gets names whole
        self.out = Console(soft_wrap=True, highlight=False, emoji=False, quiet=quiet, width=width)
        self.err = Console(stderr=True, soft_wrap=True, highlight=False, emoji=False, quiet=quiet)

    def say(self, text: str = "") -> None:
        """One line for a person."""
        if not self.as_json:
            self.out.print(shown(text), markup=False)

    def warn(self, text: str) -> None:
        """One line on standard error, whatever the output is."""
        self.err.print(shown(f"note: {text}"), markup=False, style="yellow")

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
        """A table; figures are right-aligned."""
        if self.as_json:
            return
        table = Table(title=title or None, title_justify="left", box=None, pad_edge=False)
        for place, name in enumerate(head):
            numeric = all(_numeric(row[place]) for row in rows)
            table.add_column(name, justify="right" if numeric and rows else "left")
        for row in rows:
            table.add_row(*(Text(shown(cell)) for cell in row))
        self.out.print(table)

    def finish(self, value: Any) -> None:
        """The command's result, for machines."""
        if self.as_json:
            json.dump(_finite(value), sys.stdout, indent=1, default=str, allow_nan=False)
            sys.stdout.write("\n")

    @contextmanager
    def bar(self, what: str) -> Iterator[Bar]:
        """A progress bar with time left on standard error; lines where that is no terminal.

        It appears after two seconds: short work needs none.
        """
        if not self.err.is_terminal:
            yield self._lines(what)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} {task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        progress = Progress(*columns, console=self.err, transient=True)
        task = progress.add_task(what, total=None, note="")
        started, running = time.monotonic(), False

        def show(done: int, total: int, note: str = "") -> None:
            nonlocal running
            if not running and time.monotonic() - started > 2:
                progress.start()
                running = True
            progress.update(task, completed=done, total=total, note=note)

        try:
            yield show
        finally:
            progress.stop()

    def _lines(self, what: str) -> Bar:
        """Progress for a log: a line now and then."""
        started = last = time.monotonic()
        first: tuple[float, int] | None = None  # what is shown first may be done already

        def show(done: int, total: int, note: str = "") -> None:
            nonlocal last, first
            now = time.monotonic()
            since, done_before = first = first or (now, done)
            if now - last < SECONDS_A_LINE:
                return
            last, left = now, ""
            if done > done_before:
                left = f", left {_clock((now - since) * (total - done) / (done - done_before))}"
            self.err.print(
                f"{what}: {done}/{total} {note}, {_clock(now - started)}{left}", markup=False
            )

        return show


def _clock(seconds: float) -> str:
    """75 s as `0:01:15`, as the bar has it."""
    return str(timedelta(seconds=round(seconds)))


def followed(steps: Iterable["Step"], show: Bar) -> Iterator["Step"]:
    """The steps of a training, each shown on a bar with its loss and the best accuracy so far."""
    best = 0.0
    for step in steps:
        best = max(best, step.val_accuracy or 0.0)
        known = f", best {percent(best)}" if best else ""
        show(step.step, step.n_steps, f"loss {step.loss:.3f}{known}")
        yield step


def counted(n: int, what: str) -> str:
    """1 and 2 domains as `1 domain` and `2 domains`."""
    plural = f"{what}es" if what.endswith("s") else f"{what}s"
    return f"{n:,} {what if n == 1 else plural}"


def percent(share: float) -> str:
    """0.1234 as `12.3 %`."""
    return f"{100 * share:.1f} %"


def size(n_bytes: int) -> str:
    """4_653_000 as `4.65 MB`."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= factor:
            return f"{n_bytes / factor:.2f} {unit}"
    return f"{n_bytes} B"


def _numeric(cell: str) -> bool:
    return cell[:1].isdigit() or cell[:1] in "-+" or cell == ""


def shown(text: str) -> str:
    """`text` without the characters that command a terminal: a name may come from anywhere."""
    return _COMMANDS.sub("\N{REPLACEMENT CHARACTER}", text)


def _finite(value: Any) -> Any:
    """NaN and infinity have no form in JSON: they become null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return value
