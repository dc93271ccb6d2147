"""Pretraining: the backbone itself, every weight trained, with series adapters in place or not.

Rebuffi et al. pretrain with series adapters where series adapters are to be used later (they must
be there from the start), and without where parallel ones are (they plug in afterwards). What is
kept is the backbone alone: its filters, norms and classifier, without the base domain's adapters as
in the paper, or with them folded in, which is the network that was trained.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones.written_form import WEIGHTS_CARD, stock_form, written_form
from ..core.adapters import Family, Full, Norm
from ..core.attach import attach, build
from ..core.domain import domain_of
from ..core.merge import merge
from ..core.plan import Where, place
from ..core.trace import trace
from ..core.tree import original_names
from ..data import Preprocessing
from ..errors import AttachError, TrainingError
from ..files import reason, write_atomically
from ..tensorfile import pack


def pretraining(
    backbone: nn.Module,
    classes: Sequence[str],
    adapter: Family | None = None,
    *,
    preprocessing: Preprocessing,
    seed: int = 0,
) -> nn.Module:
    """A network of `backbone`'s architecture whose every number is to be trained, by `fit`.

    Args:
        classes: the base domain's classes, in the order of the logits.
        adapter: a family to have in place while the weights are trained, e.g. `Series()`.

    Raises:
        AttachError: where the family does not fit the backbone.

    >>> from onetrunk import Series, backbone
    >>> small = backbone("resnet26(width=0.125)", pretrained=False)
    >>> seen = Preprocessing(size_px=32)
    >>> model = pretraining(small, ["cat", "dog"], Series(), preprocessing=seen)
    >>> sum(p.requires_grad for p in model.parameters()) == len(list(model.parameters()))
    True
    """
    size = (preprocessing.channels, preprocessing.size_px, preprocessing.size_px)
    whole = attach(
        backbone, Full(), classes, preprocessing=preprocessing, input_size=size, seed=seed
    )
    if adapter is None:
        return whole
    if adapter.scope != "adapters" or isinstance(adapter, Norm):
        raise AttachError(
            f"{adapter} puts nothing in place beside the filters, which are trained anyway. Give "
            "series, or leave it out."
        )
    plan, skipped = place(adapter, Where(), trace(backbone, size))
    domain = domain_of(whole)
    return build(
        backbone,
        scope="everything",
        family=f"full with {adapter}",
        plan=plan,
        skipped=skipped,
        classes=domain.classes,
        head=domain.head,
        head_features=domain.head_features,
        preprocessing=preprocessing,
        seed=seed,
        input_size=size,
    )


def trunk(model: nn.Module, *, merged: bool = False) -> dict[str, Tensor]:
    """The tensors of a pretrained network under the backbone's own names.

    Args:
        merged: whether the adapters are folded in; else they are left out.

    Raises:
        TrainingError: where an adapter adds a bias that the backbone has no place for.
    """
    state = model.state_dict()
    filters = {original: state[name] for name, original in original_names(model).items()}
    if not merged:
        return filters
    whole = merge(model, fold_norms=False).state_dict()
    if more := sorted(set(whole) - set(filters)):
        raise TrainingError(
            f"folded in, the adapters need {more[0]}, which the backbone does not have. "
            "Write the filters without them (without --merge)."
        )
    return whole


def write_trunk(
    path: Path, model: nn.Module, card: Mapping[str, Any], *, half: bool, merged: bool = False
) -> int:
    """Writes the backbone's weights as one safetensors file that checks itself; returns its bytes.

    Args:
        card: what a reader should know: data, recipe, accuracy; the written form is added.
        half: whether to store floating-point numbers as float16.
        merged: see `trunk`.

    Raises:
        TrainingError: where a number does not fit float16, the file cannot be written, or as in
            `trunk`.
    """
    tensors = trunk(model, merged=merged)
    if half:
        tensors = {name: _halved(name, tensor) for name, tensor in tensors.items()}
    backbone, n_classes = domain_of(model).backbone, len(domain_of(model).classes)
    form = stock_form(backbone, n_classes) or written_form(backbone)
    data = pack(tensors, {WEIGHTS_CARD: {"form": form, **card}})
    try:
        write_atomically(path, data)
    except OSError as error:
        raise TrainingError(f"cannot write {path}: {reason(error)}") from error
    return len(data)


def _halved(name: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    half = tensor.to(torch.float16)
    if not torch.isfinite(half).all():
        raise TrainingError(
            f"{name} holds {float(tensor.abs().max()):.3g}, beyond float16's 65,504: "
            "store float32 (without --half)."
        )
    return half
