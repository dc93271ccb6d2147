"""Running the cells of a study: in order, on several processes, every result kept at once.

A process computes with one thread; two processes on two cores do more cells an hour than one with
two threads. What fails is told at the end with its reason; what was finished stays.
"""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from ..errors import DataError, OnetrunkError
from .cells import Cell, Trunk, run_cell, train_again
from .compressed import (
    compressed_key,
    factor,
    forget_factored,
    is_factored,
    is_finished,
    run_compressed,
    source_of,
    to_train_again,
)
from .ledger import Ledger
from .methods import Compressed, read_method
from .protocol import Protocol
from .report import Place
from .report.summary import PROBE

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Study:
    """Methods x domains x seeds on some backbones, under one protocol a backbone.

    Args:
        name: `mini`, `transfer`, `stages`: what the records say.
        data: a folder of domains, each a source of its own.
        trunks: backbone -> protocol.
        work: where the ledger (`cells.jsonl`), checkpoints and banks lie.
        graphed: whether steps are recorded, see `fit`.
    """

    name: str
    data: Path
    trunks: tuple[tuple[Trunk, Protocol], ...]
    domains: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    work: Path
    graphed: bool = False

    def cells(self) -> list[Cell]:
        """Every cell, seed by seed and method by method, so that early results compare.

        A linear probe on all images has one: it is the optimum, and nothing in it is drawn.
        """
        return [
            self._cell(trunk, domain, method, seed, protocol)
            for seed in self.seeds
            for trunk, protocol in self.trunks
            for method in self.methods
            if not isinstance(read_method(method), Compressed)
            if seed == self.seeds[0] or method != PROBE or protocol.per_class is not None
            for domain in self.domains
        ]

    def compressions(self) -> list[list[Cell]]:
        """The cells of compressed methods: all domains of one are factored together."""
        return [
            [self._cell(trunk, domain, method, seed, protocol) for domain in self.domains]
            for seed in self.seeds
            for trunk, protocol in self.trunks
            for method in self.methods
            if isinstance(read_method(method), Compressed)
        ]

    def places(self) -> list[Place]:
        """What a report of the study has rows for once every cell is finished."""
        return [
            Place(
                self.name, str(cell.trunk), cell.method,
                cell.domain, cell.seed, cell.protocol.per_class,
            )
            for cell in (*self.cells(), *chain.from_iterable(self.compressions()))
        ]  # fmt: skip

    def _cell(self, trunk: Trunk, domain: str, method: str, seed: int, protocol: Protocol) -> Cell:
        return Cell(self.name, trunk, str(self.data), domain, method, seed, protocol, self.graphed)


MAX_WORDS = 400  # of an error that is not ours
KILLED = (
    "not computed, as one of the processes was killed (out of memory?). Run the command again, "
    "with fewer --workers."
)


@dataclass
class Outcome:
    """What a run of a study left: records of its cells, and what could not be computed."""

    records: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def domains_in(
    folder: Path, asked: Sequence[str] = (), *, out: Path | None = None
) -> tuple[str, ...]:
    """The names of the domains in `folder`, or those that were asked for.

    Args:
        out: where results go, which is no domain even if it is below `folder`.

    Raises:
        DataError: where there is no such folder or domain, or its name is not valid UTF-8.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder. Give a folder with one source a domain below it.")
    results = () if out is None else (out.resolve(), *out.resolve().parents)
    found = sorted(
        path.name
        for path in folder.iterdir()
        if path.is_dir() and not path.name.startswith(".") and path.resolve() not in results
    )
    for name in found:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{folder}: the name of domain {name!r} is not valid UTF-8.") from error
    missing = [name for name in asked if name not in found]
    if missing or not found:
        raise DataError(
            f"{folder} has no domain {missing[0]!r}: it has {', '.join(found) or 'none'}."
            if missing
            else f"{folder} has no folders below it. Give one with one source a domain."
        )
    return tuple(asked) or tuple(found)


def run(study: Study, workers: int = 1, progress: Progress | None = None) -> Outcome:
    """Computes what is missing of a study and returns the records of all its finished cells.

    Raises:
        OnetrunkError: for a method that cannot be read; nothing is computed then.
    """
    for method in study.methods:
        read_method(method)
    outcome, ledger = Outcome(), Ledger(study.work)
    _refuse_lone_compressions(study, ledger)
    total = len(study.places())
    done = 0
    for jobs in _stages(study, ledger):
        total += sum(not job.is_cell for job in jobs)
        for job, record, failure in _results(jobs, ledger, study.work, workers):
            done += 1
            if failure:
                outcome.failures.append(failure)
                total -= job.n_waiting
            note = job.what if record is None else f"{job.what}: {record['test_accuracy']:.3f}"
            if progress is not None:
                progress(done, total, note)
    outcome.records = known(study)
    return outcome


@dataclass(frozen=True)
class Job:
    """One piece of a study's work: `do` is called with the ledger and the folder.

    Args:
        cell: which it is for; the first one where it is for several.
        what: in words.
        is_cell: whether its result is the cell's record.
        n_waiting: cells that are not computed where it fails.
    """

    cell: Cell
    do: Callable[[Ledger, Path], dict[str, Any] | None]
    what: str
    is_cell: bool = True
    n_waiting: int = 0


def _stages(study: Study, ledger: Ledger) -> Iterator[list[Job]]:
    """Jobs that may run at once; each list is asked for when the one before it is done."""
    cells = study.cells()
    for seed in study.seeds:  # what the trials of the first one chose is there for the others
        yield [
            Job(cell, partial(run_cell, cell), _words(cell)) for cell in cells if cell.seed == seed
        ]
    groups, work = study.compressions(), study.work
    missing = [group for group in groups if not is_finished(group, ledger)]
    waiting = [group for group in missing if not is_factored(group, work)]
    again = {cell.key: cell for group in waiting for cell in to_train_again(group, ledger, work)}
    yield [
        Job(cell, partial(train_again, cell), f"{_words(cell)}, once more", is_cell=False)
        for cell in again.values()
    ]
    yield [
        Job(group[0], partial(factor, group), _words_of_all(group), False, len(group))
        for group in waiting
    ]
    yield [
        Job(cell, partial(run_compressed, cell, group), _words(cell))
        for group in groups
        if group not in missing or is_factored(group, work)
        for cell in group
    ]
    for group in groups:
        if is_finished(group, ledger):
            forget_factored(group, work)


def _words(cell: Cell) -> str:
    return f"{cell.trunk} {cell.method} {cell.domain}"


def _words_of_all(group: list[Cell]) -> str:
    return f"{group[0].trunk} {group[0].method} on {len(group)} domains"


def _refuse_lone_compressions(study: Study, ledger: Ledger) -> None:
    """Refuses to compress what is neither trained here nor known."""
    for group in study.compressions():
        of, keys = source_of(group[0]).method, ledger.read().keys()
        if of in study.methods or is_finished(group, ledger):
            continue
        missing = [cell.domain for cell in group if source_of(cell).key not in keys]
        if missing:
            raise DataError(
                f"{group[0].method} needs domains trained with {of}, and {missing[0]!r} is not. "
                f"Add {of!r} to --methods."
            )


def known(study: Study) -> list[dict[str, Any]]:
    """The records of a study's cells that are finished; computes nothing."""
    records = Ledger(study.work).read()
    keys = [(cell, cell.key) for cell in study.cells()]
    keys += [
        (cell, compressed_key(cell, group)) for group in study.compressions() for cell in group
    ]
    return [  # under the names of this study: one may have been computed for another
        {**records[key], "study": cell.study, "backbone": str(cell.trunk)}
        for cell, key in keys
        if key in records
    ]


def _results(
    jobs: list[Job], ledger: Ledger, folder: Path, workers: int
) -> Iterator[tuple[Job, dict[str, Any] | None, str]]:
    """(job, its record, why it failed) as each ends."""
    if workers <= 1:
        for job in jobs:
            yield job, *_attempt(job, ledger, folder)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:
        futures = {pool.submit(_attempt_in_worker, job, ledger, folder): job for job in jobs}
        try:
            for future in as_completed(futures):
                job = futures[future]
                try:
                    yield job, *future.result()
                except BrokenProcessPool:
                    yield job, None, f"{job.what}: {KILLED}"
        finally:
            pool.shutdown(cancel_futures=True)


def _attempt_in_worker(job: Job, ledger: Ledger, folder: Path) -> tuple[dict[str, Any] | None, str]:
    """As `_attempt`; on Ctrl-C the process ends, as it would take the next job otherwise."""
    try:
        return _attempt(job, ledger, folder)
    except KeyboardInterrupt:  # the training has left its checkpoint
        os._exit(1)


def _attempt(job: Job, ledger: Ledger, folder: Path) -> tuple[dict[str, Any] | None, str]:
    try:
        record = job.do(ledger, folder)
    except OnetrunkError as error:
        return None, f"{job.what}: {error}"
    except Exception as error:  # a rival's, or out of memory: the other cells go on
        return None, f"{job.what}: {type(error).__name__}: {error}"[:MAX_WORDS]
    return record, ""


def _start_worker() -> None:
    """One thread, and an end with the process that the study began in, even if that is killed."""
    import torch

    torch.set_num_threads(1)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # a cell is added whole or not at all, so nothing is lost
