"""merge: a domain's adapters and batch norms folded into an ordinary network.

The result is the backbone's own class with plain convolutions and linear layers; nothing of
onetrunk is in it, and it costs what the backbone costs. The domain stays as it was. Folding is
computed in float64 and stored in the layer's own type.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..errors import MergeError
from .adapted import Adapted
from .adapters.series import norm_gain_and_shift
from .domain import domain_of, own_size, unmark
from .sites import effective_weight, forward_known
from .trace import Size, following_norms
from .tree import Frozen, copy_tree, is_recast, on_cpu, reference_of, replace_modules

ABSOLUTE = 1e-4  # of the largest logit: no merge in float32 or float64 may be further off
NOISE_FACTOR = 4  # times the network's own rounding noise
LEAST = {torch.float64: 1e-10, torch.float32: 2e-6}  # limits where hardly any noise was measured

Layer = nn.Conv2d | nn.Linear


def merge(model: nn.Module, *, fold_norms: bool = True, check: Tensor | None = None) -> nn.Module:
    """The ordinary network that computes what the domain's `model` computes in eval mode.

    Adapters fold into their layers; a batch norm that alone reads a layer's output folds into that
    layer; other norms stay, with the domain's values. The merged network shares no tensor with the
    backbone or the domain.

    Args:
        model: a domain's network; it is left as it was.
        fold_norms: whether norms are folded. Without it the network keeps the backbone's own layers
            and names, so that its `state_dict` loads into the stock architecture; a bias that an
            adapter adds to a layer without one goes into the norm that follows. Adapted layers that
            standardise their weight (StdConv2d) become ordinary ones all the same.
        check: images (b, c, h, w) on which both networks are compared, if given.

    Raises:
        MergeError: where a number is not finite, for a network that `recomputed` or `cached` made,
            or where `check` shows a difference above 4 times the network's own rounding noise (in
            float32 and float64 above 1e-4 of the largest logit).
    """
    domain = domain_of(model)
    if (device := next(model.parameters()).device).type == "mps":  # it has no float64
        return merge(on_cpu(model), fold_norms=fold_norms, check=check).to(device)
    _refuse_recast(model)
    _refuse_non_finite(model)
    merged = copy_tree(model, own=[*model.parameters(), *model.buffers()]).eval()
    unmark(merged)
    replace_modules(merged, {n: m.layer for n, m in _all(merged, Frozen)})
    adapted = dict(_all(merged, Adapted))
    without_bias = {n for n, m in adapted.items() if m.layer._parameters["bias"] is None}
    replace_modules(merged, {n: _folded(m) for n, m in adapted.items()})
    if fold_norms:
        _fold_norms(merged, own_size(domain))
    else:
        _move_biases(merged, without_bias, own_size(domain))
    for parameter in merged.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    if check is not None:
        _refuse_difference(model, merged, check)
    return merged


_M = TypeVar("_M", bound=nn.Module)


def _all(model: nn.Module, kind: type[_M]) -> list[tuple[str, _M]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, kind)]


def _refuse_recast(model: nn.Module) -> None:
    if odd := next((m for m in model.modules() if is_recast(m)), None):
        raise MergeError(
            f"{type(odd).__name__} in this network computes otherwise than its class, as "
            "`recomputed` and `cached` make it for training. Merge the network that was given to "
            "them: it has the same numbers."
        )


def _refuse_non_finite(model: nn.Module) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise MergeError(
                f"{name} holds NaN or infinity: a merged network would hide it. "
                "Load or train the domain again."
            )


@torch.no_grad()
def _folded(adapted: Adapted) -> nn.Module:
    layer = adapted.layer
    bank = effective_weight(layer)
    weight_oikk, bias_o = _exact(layer, bank)
    tap = (0, 0) if adapted.tap is None else adapted.tap.tap
    weight_oikk, bias_o = adapted.adapter.fold(weight_oikk, bias_o, tap)
    with_bias = layer._parameters["bias"] is not None or bool(bias_o.any())
    return _plain(layer, weight_oikk, bias_o if with_bias else None)


def _exact(layer: Layer, bank: Tensor) -> tuple[Tensor, Tensor]:
    """(o, i, k, k) weight and (o) bias in float64; zeros where the layer has no bias."""
    weight_oikk = bank.double().view(*bank.shape, *[1] * (4 - bank.ndim))
    bias = layer._parameters["bias"]
    return weight_oikk, weight_oikk.new_zeros(len(bank)) if bias is None else bias.double()


def _plain(layer: Layer, weight_oikk: Tensor, bias_o: Tensor | None) -> nn.Module:
    """An ordinary layer of `layer`'s geometry and type with other numbers."""
    with torch.device("meta"):
        plain = _plain_linear(layer) if isinstance(layer, nn.Linear) else _plain_conv(layer)
    like = layer.weight
    plain.weight = nn.Parameter(weight_oikk.view(like.shape).to(like).contiguous())
    plain.bias = None if bias_o is None else nn.Parameter(bias_o.to(like))
    return plain.eval()


def _plain_linear(layer: nn.Linear) -> nn.Linear:
    return nn.Linear(layer.in_features, layer.out_features)


def _plain_conv(conv: nn.Conv2d) -> nn.Conv2d:
    """Of torch's own class; one that pads by the input's size keeps timm's class for that."""
    cls = nn.Conv2d
    if getattr(conv, "same_pad", "Same" in type(conv).__name__):
        from timm.layers import Conv2dSame

        cls = Conv2dSame
    plain = cls(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]
        stride=conv.stride,  # type: ignore[arg-type]
        padding=conv.padding,  # type: ignore[arg-type]
        dilation=conv.dilation,  # type: ignore[arg-type]
        groups=conv.groups,
    )
    plain.padding_mode = conv.padding_mode
    plain._reversed_padding_repeated_twice = conv._reversed_padding_repeated_twice
    return plain


@torch.no_grad()
def _fold_norms(merged: nn.Module, size: Size | None) -> None:
    found: list[tuple[str, Layer]] = [*_all(merged, nn.Conv2d), *_all(merged, nn.Linear)]
    layers = {name: layer for name, layer in found if forward_known(layer)}
    norms = dict(_all(merged, nn.modules.batchnorm._BatchNorm))
    for name, norm_name in following_norms(merged, set(layers), size).items():
        layer, norm = layers[name], norms[norm_name]
        weight_oikk, bias_o = _exact(layer, effective_weight(layer))
        gain_o, shift_o = norm_gain_and_shift(norm, weight_oikk)
        plain = _plain(layer, gain_o.view(-1, 1, 1, 1) * weight_oikk, gain_o * bias_o + shift_o)
        replace_modules(merged, {name: plain, norm_name: _without_norm(norm)})


@torch.no_grad()
def _move_biases(merged: nn.Module, without_bias: set[str], size: Size | None) -> None:
    """BN(w * x + b) with the bias b taken off the running mean instead, where a norm follows."""
    layers = {n: merged.get_submodule(n) for n in without_bias}
    biased = {name for name, layer in layers.items() if layer._parameters["bias"] is not None}
    norms = dict(_all(merged, nn.modules.batchnorm._BatchNorm))
    for name, norm_name in following_norms(merged, biased, size).items():
        layer, mean_o = layers[name], norms[norm_name].running_mean
        assert mean_o is not None  # only norms with statistics follow
        mean_o.copy_(mean_o.double() - layer._parameters["bias"].double())  # type: ignore[union-attr]
        layer.register_parameter("bias", None)


def _without_norm(norm: nn.Module) -> nn.Module:
    """What is left of a norm once it is folded: the dropout and activation that timm fuses in."""
    parts = [getattr(norm, part) for part in ("drop", "act") if hasattr(norm, part)]
    rest = [module for module in parts if not isinstance(module, nn.Identity)]
    left = nn.Identity() if not rest else rest[0] if len(rest) == 1 else nn.Sequential(*rest)
    return left.eval()


def difference(
    model: nn.Module, merged: Callable[[Tensor], Tensor], images_bchw: Tensor
) -> dict[str, float]:
    """How far apart two networks are, beside the first one's own rounding noise.

    Returns:
        `difference` (largest, relative to the largest logit of the float64 network), `noise` (the
        first network against itself in float64; 0 where it is in float64) and `limit` (what the
        laws allow: 4 times the noise, in float32 and float64 never above 1e-4).
    """
    like = reference_of(model)
    images_bchw = images_bchw.to(like.device, like.dtype)
    with torch.no_grad(), _unrounded():
        twice = _as_double(on_cpu(model) if like.device.type == "mps" else model)
        exact = twice(images_bchw.to(reference_of(twice).device).double()).cpu()
        scale = exact.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
        y = model_in_eval(model)(images_bchw).cpu().double()
        noise = float((y - exact).abs().max() / scale)
        found = float((merged(images_bchw).cpu().double() - y).abs().max() / scale)
    limit = NOISE_FACTOR * noise
    least = LEAST.get(images_bchw.dtype)
    if least is not None:
        limit = min(max(limit, least), ABSOLUTE)
    return {"difference": found, "noise": noise, "limit": limit}


@contextmanager
def _unrounded() -> Iterator[None]:
    """Convolutions on GPUs in float32, not in TensorFloat-32, which is far coarser."""
    if not torch.cuda.is_available():
        yield
        return
    cudnn = torch.backends.cudnn
    with cudnn.flags(
        cudnn.enabled, cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False
    ):
        yield


def model_in_eval(model: nn.Module) -> nn.Module:
    """`model` itself where it is in eval mode, else a copy in eval mode over the same tensors."""
    training = any(module.training for module in model.modules())
    return copy_tree(model).eval() if training else model


def _as_double(model: nn.Module) -> nn.Module:
    return copy_tree(model).double().eval()


def _refuse_difference(model: nn.Module, merged: nn.Module, images_bchw: Tensor) -> None:
    found = difference(model, merged, images_bchw)
    if not found["difference"] <= found["limit"]:
        raise MergeError(
            f"merging changes the logits by {found['difference']:.1e} of the largest, where "
            f"{found['limit']:.1e} is the limit (rounding noise {found['noise']:.1e}). "
            "Use the domain's own network instead."
        )
