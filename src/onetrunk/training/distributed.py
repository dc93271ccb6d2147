"""One training on several processes: each computes its rows of every batch, gradients are averaged.

`torchrun` starts the processes; `join` reads what it set. Rows are dealt out in turn (rank, rank +
n, ...), so that every batch is the one that a single process would have. Batch norm takes its
statistics over each process's own rows; those of process 0 are the network's.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn

from ..errors import TrainingError


@dataclass(frozen=True)
class World:
    """Which of how many processes this one is."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0

    def rows(self, rows_b: Tensor) -> Tensor:
        """This process's share of a batch."""
        return rows_b[self.rank :: self.size]

    def wrap(self, model: nn.Module) -> Any:
        """`model` behind a forward whose backward averages gradients over the processes."""
        if self.size == 1:
            return model
        return nn.parallel.DistributedDataParallel(model)

    def mean(self, value: float) -> float:
        """The mean of each process's value, the same number everywhere."""
        if self.size == 1:
            return value
        total = torch.tensor([value], dtype=torch.float64, device=_device())
        distributed.all_reduce(total)
        return float(total) / self.size

    def agree(self, tensors: Iterable[Tensor]) -> None:
        """Overwrites every process's tensors with those of process 0."""
        if self.size > 1:
            for tensor in tensors:
                distributed.broadcast(tensor, src=0)


def world() -> World:
    """The processes of this training; one where no process group was joined."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return World()
    return World(distributed.get_rank(), distributed.get_world_size())


@contextmanager
def join(device: str | None = None) -> Iterator[World]:
    """Joins the processes that `torchrun` started, for the block; alone, does nothing.

    Args:
        device: where they train; None: each on a GPU of its own where there are any.

    Raises:
        TrainingError: where there are fewer GPUs than processes of this machine.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or world().size > 1:
        yield world()
        return
    on_gpus = torch.cuda.is_available() and (device is None or device.startswith("cuda"))
    if on_gpus:
        _take_gpu(int(os.environ["LOCAL_RANK"]), torch.cuda.device_count())
    distributed.init_process_group("nccl" if on_gpus else "gloo")
    try:
        yield world()
    finally:
        distributed.destroy_process_group()


def _take_gpu(place: int, n_gpus: int) -> None:
    if place >= n_gpus:
        raise TrainingError(
            f"process {place} of this machine has no GPU of its own: there are {n_gpus}. Start "
            f"torchrun with --nproc-per-node {n_gpus}, or train with --device cpu."
        )
    torch.cuda.set_device(place)


def check_batch(batch_size: int, size: int) -> None:
    """Refuses a batch that does not deal out evenly: its gradients would not be the mean.

    Raises:
        TrainingError: where `batch_size` is no multiple of the number of processes.
    """
    if batch_size % size:
        raise TrainingError(
            f"batch_size={batch_size} on {size} processes: each needs the same number of images. "
            f"Use a multiple of {size}, e.g. batch_size={max(1, round(batch_size / size)) * size}."
        )


def _device() -> torch.device:
    return torch.device("cuda" if distributed.get_backend() == "nccl" else "cpu")
