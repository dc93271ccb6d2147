"""Results that grow: a line of JSON a training; those that are missing are computed and added."""

import dataclasses
import json
import multiprocessing
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar

import torch

Job = TypeVar("Job")  # a frozen dataclass whose `run()` gives its row, its own fields among them


def known(path: Path, kind: type[Job]) -> dict[Job, dict[str, Any]]:
    """Job -> row of those that are there."""
    if not path.exists():
        return {}
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {kind(**{name: row[name] for name in names}): row for row in rows}


def add_missing(path: Path, jobs: Iterable[Any], workers: int) -> None:
    """Runs the jobs that have no row yet, a process with one thread each, and adds their rows."""
    jobs = list(jobs)
    there = known(path, type(jobs[0]))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,)) as pool:
        for future in as_completed([pool.submit(job.run) for job in jobs if job not in there]):
            with path.open("a") as file:
                file.write(json.dumps(future.result()) + "\n")
            print(future.result(), flush=True)
