"""A step of several domains: in one batch over one run of the shared layers, or by turns.

The limit of the shared run is that of the adapters beside their layers: nothing is spared on a
processor that one domain's batch keeps busy. What can be won is the time that small batches waste.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from ...core.together import Together
from .rounds import Call, Contest
from .step import training_step
from .subjects import CLASSES, Subject, take_apart

REFERENCE = "by turns"
MIXTURES = ((4, 4), (16, 4), (4, 32))  # domains, images of each


def contests(
    subject: Subject, mixtures: tuple[tuple[int, int], ...] = MIXTURES
) -> Iterator[Contest]:
    """Growing batches of several domains on one backbone."""
    for n, batch in mixtures:
        models = [subject.domain(None, k) for k in range(n)]
        apart = [take_apart(subject.domain(None, k)) for k in range(n)]
        title = f"{subject.title}, {n} domains, {batch} images each"
        calls = {
            REFERENCE: _by_turns(subject, models, batch),
            "by turns, beside the layer": _by_turns(subject, apart, batch),
            "in one batch": _in_one_batch(subject, models, batch),
        }
        yield Contest("together", title, REFERENCE, calls)


def _by_turns(subject: Subject, models: list[nn.Module], batch: int) -> Call:
    steps = [training_step(model, subject.images(batch)) for model in models]

    def run() -> None:
        for step in steps:
            step()

    return run


def _in_one_batch(subject: Subject, models: list[nn.Module], batch: int) -> Call:
    together = Together({f"domain {k}": model for k, model in enumerate(models)})
    for model in models:
        model.train()
    own = [[p for p in model.parameters() if p.requires_grad] for model in models]
    optimizers = [torch.optim.AdamW(parameters, lr=1e-5) for parameters in own]
    x_bchw, sizes = subject.images(batch * len(models)), [batch] * len(models)
    labels = (torch.arange(batch) % len(CLASSES)).to(x_bchw.device)

    def run() -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        losses = [F.cross_entropy(y_bc, labels) for y_bc in together(x_bchw, sizes)]
        torch.stack(losses).sum().backward()
        for optimizer in optimizers:
            optimizer.step()

    return run
