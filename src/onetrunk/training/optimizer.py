"""The optimiser of a domain's own parameters, and which norms keep the backbone's statistics.

A parameter's kind (adapter, an adapter's inner factor, norm, head, full) is decided once from the
module that holds it, and learning rate and decay follow the kind; nothing depends on the order of
parameters (in the authors' released optimiser the decay of one layer leaks into the next, see
RELEASED).
"""

from typing import Any, Literal

from torch import nn, optim

from ..core.adapters import Adapter
from ..core.domain import domain_of
from ..core.tree import Frozen, is_norm
from ..errors import TrainingError
from .recipe import HEAD_LR_RATIO, LORAPLUS_LR_RATIO, SHORT, Recipe

Kind = Literal["adapter", "inner", "norm", "head", "full"]
_PEFT: dict[str, Kind] = {"lora_A": "inner", "lora_B": "adapter"}  # its names in a network


def kinds(model: nn.Module) -> dict[str, Kind]:
    """The kind of every trainable parameter of a domain's network, by name; tied ones once."""
    heads = tuple(f"{name}." for name in domain_of(model).head)
    return {
        name: _kind(model.get_submodule(name.rpartition(".")[0]), name, heads)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def _kind(owner: nn.Module, name: str, heads: tuple[str, ...]) -> Kind:
    if isinstance(owner, Adapter):
        return "inner" if name.rpartition(".")[2] in owner.inner else "adapter"
    if is_norm(owner):
        return "norm"
    for part, kind in _PEFT.items():
        if f".{part}." in name:
            return kind
    return "head" if name.startswith(heads) else "full"


def held_norms(model: nn.Module, recipe: Recipe, n_images: int) -> list[nn.Module]:
    """The batch norms that keep the backbone's statistics in a training of a domain's `model`.

    An adapter's own norm is none of them: no backbone has its statistics.
    """
    adapters = [adapter for adapter in model.modules() if isinstance(adapter, Adapter)]
    fresh = {id(norm) for adapter in adapters for norm in _batch_norms(adapter)}
    norms = [norm for norm in _batch_norms(model) if id(norm) not in fresh]
    frozen = {id(n) for m in model.modules() if isinstance(m, Frozen) for n in _batch_norms(m)}
    if domain_of(model).held and all(id(norm) in frozen for norm in norms):  # norms="none"
        return norms
    if recipe.norm_statistics == "batch":
        return []
    if recipe.norm_statistics == "auto":
        backbone = _batch_norms(domain_of(model).backbone)
        trained = any(bool(norm.running_mean.any()) for norm in backbone)  # they start at zero
        if not trained or recipe.n_steps(n_images) > SHORT:
            return []
    return norms


def _batch_norms(module: nn.Module) -> list[Any]:
    kind = nn.modules.batchnorm._BatchNorm
    return [m for m in module.modules() if isinstance(m, kind) and m.running_mean is not None]


def build_optimizer(model: nn.Module, recipe: Recipe, n_images: int) -> optim.Optimizer:
    """The optimiser over the domain's parameters; vectors (gains, biases) are decayed as norms.

    Raises:
        TrainingError: where nothing of `model` is trainable.
    """
    held = bool(held_norms(model, recipe, n_images))
    lr: dict[Kind, float] = {
        "adapter": recipe.lr,
        "inner": recipe.lr / _ratio(recipe.loraplus_lr_ratio, LORAPLUS_LR_RATIO, held),
        "norm": recipe.lr,
        "head": recipe.lr * _ratio(recipe.head_lr_ratio, HEAD_LR_RATIO, held),
        "full": recipe.lr_full,
    }
    decay: dict[Kind, float] = {
        "adapter": recipe.adapter_decay(n_images),
        "inner": recipe.adapter_decay(n_images),
        "norm": recipe.decay_norm,
        "head": recipe.decay_head,
        "full": recipe.decay_full,
    }
    parameters = dict(model.named_parameters())
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, kind in kinds(model).items():
        weight_decay = decay[kind] if parameters[name].ndim > 1 else decay["norm"]
        groups.setdefault((lr[kind], weight_decay), []).append(parameters[name])
    if not groups:
        raise TrainingError("nothing to train: the domain's network has no trainable parameter.")
    listed: list[dict[str, Any]] = [
        {"params": params, "lr": rate, "peak_lr": rate, "weight_decay": weight_decay}
        for (rate, weight_decay), params in groups.items()
    ]
    if recipe.optimizer == "adamw":
        return optim.AdamW(listed, fused=True)  # one call for all parameters, not ten for each
    return optim.SGD(listed, momentum=recipe.momentum, nesterov=recipe.nesterov)


def _ratio(asked: float | None, where_held: float, held: bool) -> float:
    if asked is not None:
        return asked
    return where_held if held else 1.0
