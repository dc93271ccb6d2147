"""linear_probe: the best linear classifier on the frozen backbone's features.

The yardstick for every family: what the backbone knows of a domain already. Multinomial logistic
regression by L-BFGS on standardised features, its decay chosen on validation data.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapters import Head
from ..core.attach import attach
from ..core.domain import domain_of
from ..data import Preprocessing
from ..errors import TrainingError
from .evaluate import logits_of
from .examples import Examples, Progress, examples_of
from .fit import fit
from .recipe import Recipe

CONSTANT = 1e-5  # of a feature's mean: what varies less is rounding
DECAYS = (1e-2, 1e-1, 1.0, 1e1, 1e2)
BY_STEPS = Recipe(epochs=20, lr=1e-2, head_lr_ratio=1.0)  # for heads of more than one linear layer


def linear_probe(
    backbone: nn.Module,
    train: Any,
    val: Any,
    classes: Sequence[str],
    *,
    preprocessing: Preprocessing | None = None,
    head: str | None = None,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
) -> nn.Module:
    """A domain of family `head`, trained to the optimum on evaluation views of the images.

    A head that is not one linear layer with a bias on one vector an image (two heads, a
    convolution) is trained by `fit` instead.

    Args:
        train, val: as for `fit`; the decay is chosen on `val`.
        head: the classifier's module path, as for `attach`.
        device: where to compute; by default where the backbone is.
        progress: called with (images done, images) while features are computed.

    Raises:
        AttachError, BackboneError: as `attach`.
        TrainingError, DataError: as `fit`, for data that does not fit, and where the backbone's
            features are not finite.
    """
    model = attach(
        backbone,
        Head(),
        classes,
        preprocessing=preprocessing,
        input_size=_size(preprocessing),
        head=head,
    )
    examples, val_examples = examples_of(model, train), examples_of(model, val)
    heads = domain_of(model).head
    layer = model.get_submodule(heads[0])
    if len(heads) == 1 and isinstance(layer, nn.Linear) and layer.bias is not None:
        x_nf = features_of(model, heads[0], examples, device, progress)
        if x_nf.shape == (len(examples), layer.in_features):
            val_x_nf = features_of(model, heads[0], val_examples, device, None)
            place = device or layer.weight.device
            weight, bias = best_logistic(
                x_nf.to(place), examples.labels.to(place),
                val_x_nf.to(place), val_examples.labels.to(place), len(classes),
            )  # fmt: skip
            with torch.no_grad():
                layer.weight.copy_(weight)
                layer.bias.copy_(bias)
            return model.eval()
    device = device or next(model.parameters()).device
    for _ in fit(model, examples, BY_STEPS, val=val_examples, device=device):
        pass
    return model


def _size(preprocessing: Preprocessing | None) -> tuple[int, int, int] | None:
    if preprocessing is None:
        return None
    return preprocessing.channels, preprocessing.size_px, preprocessing.size_px


@torch.no_grad()
def start_from_probe(model: nn.Module, probe: nn.Module) -> None:
    """Fills the head of `model` with that of a linear probe over the same backbone and classes.

    Training then starts from what the backbone knows already (linear probing before fine-tuning,
    Kumar et al., ICLR 2022), not from a random head whose first gradients disturb the features.
    """
    for name in domain_of(model).head:
        model.get_submodule(name).load_state_dict(probe.get_submodule(name).state_dict())


def features_of(
    model: nn.Module,
    head: str,
    examples: Examples,
    device: str | torch.device | None,
    progress: Progress | None,
) -> Tensor:
    """What goes into the head for every example: (n, f) where that is one vector an image.

    Raises:
        TrainingError: where a feature is not finite.
    """
    found: list[Tensor] = []
    hook = model.get_submodule(head).register_forward_pre_hook(
        lambda _module, args: found.append(args[0].detach().float().cpu())
    )
    try:
        logits_of(model.eval(), examples, device=device, progress=progress)
    finally:
        hook.remove()
    features = torch.cat(found)
    if not torch.isfinite(features).all():
        raise TrainingError(
            "the backbone's features are not finite (NaN or infinity) for these images: look for "
            "broken numbers in the images or in the backbone's weights."
        )
    return features


def best_logistic(
    x_nf: Tensor, labels_n: Tensor, val_x_nf: Tensor, val_labels_n: Tensor, n_classes: int
) -> tuple[Tensor, Tensor]:
    """Weight (c, f) and bias (c,) of the logistic regression that does best on validation."""
    mean_f, std_f = x_nf.mean(0), x_nf.std(0, correction=0)
    constant_f = std_f <= (CONSTANT * mean_f.abs()).clamp_min(1e-6)
    std_f = std_f.masked_fill(constant_f, torch.inf)
    z_nf, val_z_nf = (x_nf - mean_f) / std_f, (val_x_nf - mean_f) / std_f
    zeros = x_nf.new_zeros(n_classes, x_nf.shape[1]), x_nf.new_zeros(n_classes)
    best, best_loss = zeros, float("inf")
    weight, bias = best
    for decay in reversed(DECAYS):  # warm starts, from the smoothest
        weight, bias = _logistic(z_nf, labels_n, weight, bias, decay)
        loss = float(F.cross_entropy(F.linear(val_z_nf, weight, bias), val_labels_n))
        if loss < best_loss:
            best, best_loss = (weight, bias), loss
    weight = best[0] / std_f
    return weight, best[1] - weight @ mean_f


def _logistic(
    x_nf: Tensor, labels_n: Tensor, weight: Tensor, bias: Tensor, decay: float
) -> tuple[Tensor, Tensor]:
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=100, tolerance_grad=1e-5, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(x_nf, weight, bias), labels_n)
        loss = loss + 0.5 * decay * weight.square().sum() / x_nf.shape[1]
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()
