"""merge: a domain's adapters and batch norms folded into an ordinary network.

The result is the backbone's own class with plain convolutions and linear layers; nothing of
onetrunk is in it, and it costs what the backbone costs. The domain stays as it was. Folding is
computed in float64 and stored in the layer's own type.
"""

import torch
from torch import Tensor, nn

from ..errors import MergeError
from .adapters.series import norm_gain_and_shift
from .attach import Adapted, Domain, domain_of
from .sites import effective_weight
from .trace import following_norms
from .tree import Frozen, copy_tree, replace_module

ABSOLUTE = 1e-4  # of the largest logit: no merge may be further off
NOISE_FACTOR = 4  # times the network's own rounding noise


def merge(model: nn.Module, *, check: Tensor | None = None) -> nn.Module:
    """The ordinary network that computes what the domain's `model` computes in eval mode.

    Adapters fold into their layers; a batch norm that alone reads a layer's output folds into that
    layer; other norms stay, with the domain's values. The merged network shares no tensor with the
    backbone or the domain.

    Args:
        model: a domain's network; it is left as it was.
        check: images (b, c, h, w) on which both networks are compared, if given.

    Raises:
        MergeError: where a number is not finite, a layer's rule is unknown, or `check` shows a
            difference above 4 times the network's own rounding noise and above rounding to
            1e-4 of the largest logit.
    """
    domain = domain_of(model)
    _refuse_non_finite(model, domain)
    merged = copy_tree(model, own=[*model.parameters(), *model.buffers()]).eval()
    _unmark(merged)
    for name, module in list(merged.named_modules()):
        if isinstance(module, Adapted):
            replace_module(merged, name, _folded(name, module))
        elif isinstance(module, Frozen):
            replace_module(merged, name, module.layer)
    _fold_norms(merged, domain)
    merged.requires_grad_(True)
    if check is not None:
        _refuse_difference(model, merged, check)
    return merged


def _unmark(merged: nn.Module) -> None:
    del merged.domain
    merged.__dict__.pop("reset_classifier", None)


def _refuse_non_finite(model: nn.Module, domain: Domain) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise MergeError(
                f"{name} holds NaN or infinity: a merged network would hide it. "
                "Load or train the domain again."
            )


@torch.no_grad()
def _folded(name: str, adapted: Adapted) -> nn.Module:
    layer = adapted.layer
    bank = effective_weight(layer)
    weight_oikk = bank.double() if bank.ndim == 4 else bank.double()[:, :, None, None]
    bias_o = weight_oikk.new_zeros(len(bank)) if layer.bias is None else layer.bias.double()
    tap = (0, 0) if adapted.tap is None else adapted.tap.tap
    weight_oikk, bias_o = adapted.adapter.fold(weight_oikk, bias_o, tap)
    plain = _plain_layer(layer, with_bias=layer.bias is not None or bool(bias_o.any()))
    return _filled(plain, weight_oikk.view(bank.shape), bias_o, like=bank)


def _plain_layer(layer: nn.Module, with_bias: bool) -> nn.Module:
    """A fresh ordinary layer of the same geometry; a "same"-padded one keeps its class."""
    if isinstance(layer, nn.Linear):
        return nn.Linear(layer.in_features, layer.out_features, bias=with_bias, device="meta")
    cls = nn.Conv2d
    if getattr(layer, "same_pad", "Same" in type(layer).__name__):
        from timm.layers import Conv2dSame

        cls = Conv2dSame
    options = dict(
        stride=layer.stride, padding=layer.padding, dilation=layer.dilation, groups=layer.groups
    )
    with torch.device("meta"):
        plain = cls(
            layer.in_channels, layer.out_channels, layer.kernel_size, bias=with_bias, **options
        )
    plain.padding_mode = layer.padding_mode
    plain._reversed_padding_repeated_twice = layer._reversed_padding_repeated_twice
    return plain


def _filled(plain: nn.Module, weight: Tensor, bias_o: Tensor, like: Tensor) -> nn.Module:
    plain.weight = nn.Parameter(weight.to(like).contiguous())
    if plain.bias is not None:
        plain.bias = nn.Parameter(bias_o.to(like))
    return plain.eval()


@torch.no_grad()
def _fold_norms(merged: nn.Module, domain: Domain) -> None:
    layers = {n for n, m in merged.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    for name, norm_name in following_norms(merged, layers).items():
        layer, norm = merged.get_submodule(name), merged.get_submodule(norm_name)
        if "weight" not in layer._parameters:
            continue
        bank = effective_weight(layer)
        gain_o, shift_o = norm_gain_and_shift(norm, bank.double())
        weight = bank.double() * gain_o.view(-1, *[1] * (bank.ndim - 1))
        bias_o = shift_o if layer.bias is None else shift_o + gain_o * layer.bias.double()
        plain = _plain_layer(layer, with_bias=True)
        replace_module(merged, name, _filled(plain, weight, bias_o, like=bank))
        replace_module(merged, norm_name, _without_norm(norm))


def _without_norm(norm: nn.Module) -> nn.Module:
    """What is left of a norm once it is folded: the dropout and activation that timm fuses in."""
    rest = [getattr(norm, part) for part in ("drop", "act") if hasattr(norm, part)]
    rest = [module for module in rest if not isinstance(module, nn.Identity)]
    return nn.Identity() if not rest else rest[0] if len(rest) == 1 else nn.Sequential(*rest)


def difference(model: nn.Module, merged: nn.Module, images_bchw: Tensor) -> dict[str, float]:
    """How far apart two networks are, beside the first one's own rounding noise.

    Returns:
        `difference` (largest, relative to the largest logit of the float64 network), `noise` (the
        first network against itself in float64) and `limit` (what the laws allow).
    """
    with torch.no_grad():
        exact = _as_double(model)(images_bchw.double())
        scale = exact.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
        y = model_in_eval(model)(images_bchw).double()
        noise = float((y - exact).abs().max() / scale)
        found = float((merged(images_bchw).double() - y).abs().max() / scale)
    floor = 16 * torch.finfo(images_bchw.dtype).eps
    return {
        "difference": found,
        "noise": noise,
        "limit": min(max(NOISE_FACTOR * noise, floor), ABSOLUTE)
        if images_bchw.dtype is not torch.bfloat16
        else NOISE_FACTOR * noise,
    }


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

