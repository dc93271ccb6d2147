"""benchmark speed: what sharing costs in time and memory, against what one would use instead.

One file a group, and its line in GROUPS.
"""

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ...errors import SpecError, TrainingError
from ..ledger import Ledger
from . import bank, cached, inference, memory, mixed, step, together
from .report import MEMORY as MEMORY
from .rounds import Contest, run_rounds
from .subjects import Subject

Progress = Callable[[int, int, str], None]
GROUPS: Mapping[str, Callable[[Subject], Iterator[Contest]]] = {
    "step": step.contests,
    "inference": inference.contests,
    "mixed": mixed.contests,
    "together": together.contests,
    "cached": cached.contests,
    "bank": bank.contests,
}
SUBJECTS = (
    "resnet26(width=1.0)@64", "timm:resnet50@224", "timm:tf_efficientnet_lite0@224",
    "timm:vit_tiny_patch16_224@224",
)  # fmt: skip
LEAST_ROUNDS = 3


def run(
    groups: Sequence[str],
    subjects: Sequence[str],
    n_rounds: int,
    out: Path,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """The records of every group on every backbone; finished rounds are read, not run again.

    Raises:
        SpecError: where a group or a backbone is unknown.
        TrainingError: for less than three rounds.
    """
    known = (*GROUPS, MEMORY)
    for group in groups:
        if group not in known:
            raise SpecError(f"no group {group!r} in benchmark speed: it has {', '.join(known)}.")
    if n_rounds < LEAST_ROUNDS:
        raise TrainingError(
            f"{n_rounds} rounds have no spread: give --repeats {LEAST_ROUNDS} or more."
        )
    ledger, records = Ledger(out), []
    read = [Subject.read(text) for text in subjects]  # refused before hours of work
    jobs = [(subject, group) for subject in read for group in groups]
    for place, (subject, group) in enumerate(jobs):
        if progress is not None:
            progress(place, len(jobs), f"{group}, {subject.title}")
        if group == MEMORY:
            records += [{"group": MEMORY, **record} for record in memory.records(subject)]
            continue
        for contest in GROUPS[group](subject):
            records += run_rounds(contest, n_rounds, ledger, _machine())
    if progress is not None:
        progress(len(jobs), len(jobs), "done")
    return records


def _machine() -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    return {
        "machine": torch.cuda.get_device_name() if cuda else _cpu(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else f"{platform.system()} {platform.machine()}"
