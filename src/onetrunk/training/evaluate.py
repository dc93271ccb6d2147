"""evaluate: how good a network is on labelled images, in the usual figures, all in [0, 1]."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.domain import domain_of
from ..core.merge import model_in_eval
from ..core.tree import copy_tree, reference_of
from ..errors import DivergedError, TrainingError
from .examples import Examples, ImageExamples, Progress, examples_of

N_BINS = 15  # of the calibration error, as in Guo et al., ICML 2017


@dataclass(frozen=True)
class Evaluation:
    """The figures of one network on one set of images.

    Args:
        accuracy: share of images whose highest logit is their class's.
        balanced_accuracy: mean, over the classes that have images, of the share found.
        loss: mean cross-entropy.
        calibration_error: expected gap between confidence and accuracy, 15 equal bins.
        per_class: class -> share of its images found; 0 where it has none (see `confusion`).
        confusion: (c, c) counts, rows the true class, columns the predicted one.
        n_images: images evaluated.
        problems: (name, reason) of the images that could not be read.
    """

    accuracy: float
    balanced_accuracy: float
    loss: float
    calibration_error: float
    per_class: dict[str, float]
    confusion: np.ndarray[Any, np.dtype[np.int64]]
    n_images: int
    problems: tuple[tuple[str, str], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values, the confusion matrix as lists."""
        problems = [list(problem) for problem in self.problems]
        return {**self.__dict__, "confusion": self.confusion.tolist(), "problems": problems}


def evaluate(
    model: nn.Module,
    data: Any,
    *,
    batch_size: int = 64,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """The figures of a domain's network on labelled images; the network stays as and where it was.

    Args:
        data: as for `fit`.
        device: where to compute; by default where the network is.
        progress: called with (images done, images) after every batch.

    Raises:
        TrainingError, DataError: as `fit`, for data that does not fit the domain; for a batch of
            less than one image.
        DivergedError: where the network's logits are not finite.
    """
    examples = examples_of(model, data)
    logits_nc = logits_of(model, examples, batch_size, device, progress)
    if not torch.isfinite(logits_nc).all():
        raise DivergedError(
            "the network's logits are not finite (NaN or infinity), so nothing can be said of it: "
            "look for broken numbers in the images, or train the domain again."
        )
    prepared = examples.prepared if isinstance(examples, ImageExamples) else None
    problems = () if prepared is None else prepared.problems
    return figures(
        logits_nc, examples.labels, domain_of(model).classes,
        tuple((problem.name, problem.reason) for problem in problems),
    )  # fmt: skip


def ready(model: nn.Module, device: str | torch.device | None) -> nn.Module:
    """`model` in eval mode on `device`: itself where it is so already, else a copy."""
    network = model_in_eval(model)
    if device is None or torch.device(device) == next(network.parameters()).device:
        return network
    return copy_tree(network).to(device).eval()  # a domain's .to() would move the domain itself


@torch.no_grad()
def logits_of(
    model: nn.Module,
    examples: Examples,
    batch_size: int = 64,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Logits (n, c) of every example, on the CPU, in float32; the network stays as it was."""
    check_batch_size(batch_size)
    network = ready(model, device)
    like = reference_of(network)
    logits: list[Tensor] = []
    for indices in torch.arange(len(examples)).split(batch_size):
        x_bchw = examples.views(indices).to(like.device, like.dtype)
        logits.append(network(x_bchw).float().cpu())
        if progress is not None:
            progress(int(indices[-1]) + 1, len(examples))
    return torch.cat(logits)


def check_batch_size(batch_size: int) -> None:
    """Refuses batches of no image. Raises TrainingError."""
    if batch_size < 1:
        raise TrainingError(f"batch_size={batch_size}: give at least one image a batch.")


def figures(
    logits_nc: Tensor,
    labels_n: Tensor,
    classes: tuple[str, ...],
    problems: tuple[tuple[str, str], ...] = (),
) -> Evaluation:
    """The figures of finite logits (n, c) against labels (n,), computed in float64.

    >>> result = figures(torch.eye(3), torch.tensor([0, 1, 1]), ("ant", "bee", "cat"))
    >>> result.per_class, result.confusion.tolist()
    ({'ant': 1.0, 'bee': 0.5, 'cat': 0.0}, [[1, 0, 0], [0, 1, 1], [0, 0, 0]])
    """
    logits_nc, n_classes = logits_nc.double(), len(classes)
    confidence_n, found_n = logits_nc.softmax(dim=1).max(dim=1)
    right_n = (found_n == labels_n).double()
    pairs = labels_n * n_classes + found_n
    confusion_cc = torch.bincount(pairs, minlength=n_classes**2).view(n_classes, n_classes)
    counts_c = confusion_cc.sum(dim=1)
    recall_c = confusion_cc.diagonal().double() / counts_c.clamp_min(1)
    return Evaluation(
        accuracy=float(right_n.mean()),
        balanced_accuracy=float(recall_c[counts_c > 0].mean()),
        loss=float(F.cross_entropy(logits_nc, labels_n)),
        calibration_error=_calibration_error(confidence_n, right_n),
        per_class=dict(zip(classes, recall_c.tolist(), strict=True)),
        confusion=confusion_cc.numpy(),
        n_images=len(labels_n),
        problems=problems,
    )


def _calibration_error(confidence_n: Tensor, right_n: Tensor) -> float:
    """Sum over bins of the bin's share of images times |its accuracy - its mean confidence|."""
    bins_n = (confidence_n * N_BINS).ceil().clamp(1, N_BINS).long() - 1
    gaps_k = confidence_n.new_zeros(N_BINS).index_add_(0, bins_n, right_n - confidence_n)
    return float(gaps_k.abs().sum() / len(right_n))
