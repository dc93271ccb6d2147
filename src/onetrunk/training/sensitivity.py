"""sensitivity: what each site of a backbone could buy for one domain, from its training images.

The network that is measured has a head that fits: for `gradient` and `curvature` a linear probe
(minutes of work less than a training), for `trained` a domain trained with `Parallel()` everywhere.
What the three compute is in core/sensitivity.py; which one is the default, docs/allocation.md says.
"""

from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..core.plan import Where
from ..core.sensitivity import Sensitivity, by_curvature, by_gradient, by_training, measure
from ..errors import TrainingError
from .evaluate import ready
from .examples import Examples, Progress, examples_of

By = Literal["gradient", "curvature", "trained"]
DEFAULT: By = "curvature"
N_IMAGES = 1024  # read at most: the covariances of a layer need no more
BATCH = 32


def sensitivity(
    model: nn.Module,
    data: Any,
    *,
    by: By = DEFAULT,
    where: Where | None = None,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
) -> Sensitivity:
    """How much each site could buy, measured on evaluation views of at most `N_IMAGES` images.

    Args:
        model: a linear probe, or for `trained` a domain trained with `Parallel()`; it stays as it
            was. Its head must fit the domain.
        data: as for `fit`; the training images.
        by: `gradient`, `curvature` or `trained`.
        where: which sites; by default all of them.
        device: where to compute; by default where the network is.
        progress: called with (images done, images).

    Raises:
        TrainingError: for an unknown `by`, and as `fit` for data that does not fit.
        AttachError: as `measure` and `by_training`.
        DataError: where images cannot be read.
    """
    if by not in get_args(By):
        raise TrainingError(
            f"the sensitivity by {by!r} was asked for: known are {', '.join(get_args(By))}."
        )
    network = ready(model, device)
    measured = measure(network, _batches(examples_of(model, data), progress), where)
    if by == "trained":
        return by_training(network, measured)
    return by_gradient(measured) if by == "gradient" else by_curvature(measured)


def _batches(examples: Examples, progress: Progress | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Evenly spread over the examples, so that every class is met in its share."""
    n = min(len(examples), N_IMAGES)
    rows_n = torch.linspace(0, len(examples) - 1, n).round().long()
    for place, rows_b in enumerate(rows_n.split(BATCH)):
        yield examples.views(rows_b), examples.labels[rows_b]
        if progress is not None:
            progress(min(n, (place + 1) * BATCH), n)
