"""A training step recorded once and replayed as one CUDA graph.

A step of a small network is thousands of short kernels, and Python needs longer to launch them than
a GPU to run them. Forward and backward are recorded with their memory, after a few ordinary steps,
and replayed with the next batch copied in; the optimiser's step stays as it was, so that a loss
that is not finite is seen before it.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..errors import TrainingError

N_BEFORE = 2  # ordinary steps: libraries choose their kernels in them

WithGradients = Callable[[Tensor, Tensor], Tensor]
Record = Callable[[Callable[[], None]], Callable[[], None]]


class GraphedStep:
    """Losses and gradients of batches of one shape.

    Args:
        ordinary: batch (b, c, h, w) and labels (b,) -> loss, without its autograd graph; leaves
            gradients at the parameters.
        trained: the parameters, whose gradients are in the same memory from the recording on.
        record: gives back a function that computes again what it is given, in the same memory.
    """

    def __init__(
        self, ordinary: WithGradients, trained: Sequence[nn.Parameter], record: Record
    ) -> None:
        self.ordinary, self.trained, self.record = ordinary, trained, record
        self.n_ordinary = 0
        self.replay: Callable[[], None] | None = None

    def __call__(self, x_bchw: Tensor, labels_b: Tensor) -> Tensor:
        """The loss; every gradient is that of this batch."""
        if self.n_ordinary < N_BEFORE:
            self.n_ordinary += 1
            return self.ordinary(x_bchw, labels_b)
        if self.replay is None:
            self.x_bchw, self.labels_b = x_bchw.clone(), labels_b.clone()
            self.replay = self.record(self._compute)
            self.grads = [parameter.grad for parameter in self.trained]
        self.x_bchw.copy_(x_bchw)
        self.labels_b.copy_(labels_b)
        self.replay()
        for parameter, grad in zip(self.trained, self.grads, strict=True):
            parameter.grad = grad
        return self.loss

    def _compute(self) -> None:
        for parameter in self.trained:
            parameter.grad = None
        self.loss = self.ordinary(self.x_bchw, self.labels_b)


def cuda_graph(
    compute: Callable[[], None], device: torch.device | str = "cuda"
) -> Callable[[], None]:
    """Records what `compute` launches on `device`, without running it.

    No autograd graph over the same parameters may be alive, as the nodes that add up gradients
    belong to the stream of the first one.

    Raises:
        TrainingError: where it waits for the GPU, or does what else cannot be recorded.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.device(device):  # else the one that is current would be listened to
            stream = torch.cuda.Stream()
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                compute()
    except RuntimeError as error:
        reason = str(_first(error)).strip().splitlines()[0]
        raise TrainingError(
            f"this network's step cannot be recorded as a CUDA graph ({reason}): train it without "
            "graphed, in a new process."
        ) from error
    return graph.replay


def _first(error: BaseException) -> BaseException:
    """What happened: the end of a broken recording complains on top of it."""
    while error.__context__ is not None:
        error = error.__context__
    return error
