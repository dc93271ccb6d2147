"""A fresh classifier in the place of the backbone's: small weights from the domain's own seed."""

from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import BackboneError
from .trace import timm_classifier
from .tree import own_tensors, replace_module


def replace_head(
    model: nn.Module, head: tuple[str, ...], features: int, n_classes: int, generator: Generator
) -> None:
    """Puts a fresh layer of `n_classes` at each of the module paths `head` of `model`, in place.

    Args:
        features: what goes in, where the old head is no linear layer or convolution.

    Raises:
        BackboneError: where there is no head, or it cannot be made anew.
    """
    if not head:
        raise BackboneError(
            f"{type(model).__name__} shows no classifier to replace: its output is not that of its "
            "last linear layer. Name the module: head='fc' (an nn.Identity will do)."
        )
    before = list(model.modules())  # held: a new module must not get the id of one let go
    floating = (p for p in model.parameters() if p.is_floating_point())
    like = next(floating, torch.empty(0))
    reset: Any = getattr(model, "reset_classifier", None)
    # meta: making a layer there draws nothing from the global generator, whatever threads do
    with torch.device("meta"), _EverythingOnMeta():
        if timm_classifier(model) == head and reset is not None:
            reset(n_classes)
        else:
            for name in head:
                fresh = _fresh_head(model.get_submodule(name), features, n_classes)
                replace_module(model, name, fresh)
    known = {id(module) for module in before}
    for module in model.modules():
        if id(module) not in known:
            _start_head(module, like, generator)


class _EverythingOnMeta(TorchFunctionMode):
    """While it is entered, a device that is asked for is meta: timm asks for its classifier's."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": torch.device("meta")}
        return func(*args, **kwargs)


def _fresh_head(old: nn.Module, features: int, n_classes: int) -> nn.Module:
    if isinstance(old, nn.Conv2d):
        fresh = nn.Conv2d(old.in_channels, n_classes, 1, bias=old.bias is not None)
        if old.kernel_size == (1, 1) and old.groups == 1:
            return fresh
        raise BackboneError(
            f"the head is a convolution of kernel {old.kernel_size} in {old.groups} group(s): only "
            "a 1x1 one is a classifier. Name the classifier's module: head='fc'."
        )
    if isinstance(old, nn.Linear):
        return nn.Linear(old.in_features, n_classes, bias=old.bias is not None)
    if not features:
        raise BackboneError(
            f"the head {type(old).__name__} takes an unknown number of features: "
            "end the backbone with nn.Identity() or a linear layer."
        )
    return nn.Linear(features, n_classes)


@torch.no_grad()
def _start_head(module: nn.Module, like: Tensor, generator: Generator) -> None:
    """Fills a module that was just made on the meta device: linear layers small, norms neutral."""
    if not any(True for _ in own_tensors(module)):
        return
    module.to_empty(device=like.device, recurse=False)
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        fresh = torch.empty(module.weight.shape).normal_(0.0, 0.01, generator=generator)
        module.weight.copy_(fresh)
        if module.bias is not None:
            module.bias.zero_()
    elif isinstance(module, nn.modules.batchnorm._NormBase | nn.LayerNorm | nn.GroupNorm):
        module.reset_parameters()
    else:
        raise BackboneError(
            f"the backbone makes a {type(module).__name__} with each new classifier, whose first "
            "numbers are not known here. Name the classifier's linear layer: head='fc'."
        )
    for parameter in module.parameters(recurse=False):
        parameter.requires_grad_(True)
    for tensor in own_tensors(module):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(like.dtype)
