"""recomputed: gradient checkpointing, Chen et al. 2016 (arXiv:1604.06174), block by block.

A block's activations are let go after the forward pass and computed again when the backward pass
comes to it: memory for one block instead of all, for one more forward pass. Running statistics move
once and dropout draws the same numbers, so that a training is what it is without.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..core.adapted import Adapted
from ..core.domain import domain_of, mark
from ..core.tree import Frozen, is_norm, recast, rewired
from ..errors import TrainingError

LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def recomputed(model: nn.Module, n_blocks: int | None = None) -> nn.Module:
    """A domain's network that trains in less memory; `fit` takes it in the place of `model`.

    To train it is to train `model`: they have the same parameters and statistics.

    Args:
        model: a domain's network, or the tail of one (see `cached`); it is left as it was.
        n_blocks: only so many of the first blocks, whose maps are the largest; None: all.

    Raises:
        TrainingError: for less than one block, and where the network has no blocks: modules of
            several layers in a list.
        AttachError: where `model` is no domain's network.

    >>> from onetrunk import Parallel, attach
    >>> from onetrunk.backbones import resnet26
    >>> model = attach(resnet26(0.125), Parallel(), ["daisy", "rose"], input_size=(3, 16, 16))
    >>> less = recomputed(model)
    >>> less.fc.weight is model.fc.weight, len(blocks_of(less))
    (True, 12)
    """
    domain, blocks = domain_of(model), blocks_of(model)
    if not blocks:
        raise TrainingError(
            f"{type(model).__name__} has no blocks whose activations could be computed again: "
            "none of its nn.Sequential, ModuleList or ModuleDict holds a module of several layers."
        )
    if n_blocks is not None and n_blocks < 1:
        raise TrainingError(f"recomputed(n_blocks={n_blocks}): give at least 1, or None for all.")
    less = rewired(model, {block: recast(block, _Recomputed) for block in blocks[:n_blocks]})
    mark(less, domain)
    return less


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The modules of several layers that stand in lists, and hold no row of such modules."""
    found: list[nn.Module] = []
    for child in module.children():
        whole = isinstance(module, LISTS) and _is_composite(child)
        whole = whole and not any(_is_row(inner) for inner in child.modules())
        found += [child] if whole else blocks_of(child)
    return found


def _is_composite(module: nn.Module) -> bool:
    if isinstance(module, (*LISTS, Adapted, Frozen)) or is_norm(module):
        return False
    return next(module.children(), None) is not None


def _is_row(module: nn.Module) -> bool:
    """Whether a list holds two blocks of one class or more."""
    classes = [type(child).__name__ for child in module.children() if _is_composite(child)]
    return isinstance(module, LISTS) and len(set(classes)) < len(classes)


class _Recomputed(nn.Module):
    """What a block's class does before its own, in training: forgets, and computes again."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(*args, **kwargs)
        before = [
            (module, name, buffer.clone())
            for module in self.modules()
            if module.training
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        return checkpoint(
            super().forward,
            *(list(value) if isinstance(value, list) else value for value in args),  # see DenseNet
            use_reentrant=False,
            context_fn=lambda: (nullcontext(), _AsItWas(before)),
            **kwargs,
        )


class _AsItWas:
    """While it is entered, buffers are what they were; what is written to them then is let go.

    So is the generator of an Apple GPU, which `checkpoint` does not know.
    """

    def __init__(self, before: Sequence[tuple[nn.Module, str, Tensor]]) -> None:
        self.before, self.draws_before = before, _mps_state()
        self.draws_held: Tensor | None = None
        self.held: list[tuple[nn.Module, str, Tensor | None]] = []

    def __enter__(self) -> None:
        self.held = [(module, name, module._buffers[name]) for module, name, _ in self.before]
        for module, name, value in self.before:
            module._buffers[name] = value.clone()
        self.draws_held = _mps_state()
        _set_mps_state(self.draws_before)

    def __exit__(self, *_exception: object) -> None:
        for module, name, buffer in self.held:
            module._buffers[name] = buffer
        _set_mps_state(self.draws_held)


def _mps_state() -> Tensor | None:
    return torch.mps.get_rng_state() if torch.backends.mps.is_available() else None


def _set_mps_state(state: Tensor | None) -> None:
    if state is not None:
        torch.mps.set_rng_state(state)
