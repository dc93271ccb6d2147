"""The rival: LoRA of Hugging Face's PEFT, on convolutions, through PEFT's own code.

The domain's norms and head are its own, as PEFT's documentation asks for with batch norm (its
`modules_to_save`), so the rival is not handicapped by statistics that are lost or shared. A
convolution's LoRA has r (k k i + o) numbers; ranks are chosen for as many numbers as ours has at
that site, and at least 1.
"""

import dataclasses
import warnings

from torch import nn

from ..core.adapted import Adapted
from ..core.adapters import Norm
from ..core.domain import domain_of
from ..core.tree import is_norm
from ..errors import MissingExtraError
from ..training.randomness import own_draws, reseed
from .setting import Setting


def peft_lora(setting: Setting, twin: nn.Module, *, train_norms: bool) -> nn.Module:
    """A network with PEFT's LoRA where `twin` has adapters, trained by the same loop.

    Args:
        twin: a domain's network of ours: its sites and its numbers a site are matched.
        train_norms: whether gains and biases of norms are trained; statistics follow either way.

    Raises:
        MissingExtraError: where PEFT is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise MissingExtraError(
            'the method lora(...) needs PEFT, which is missing: pip install "onetrunk[rivals]"'
        ) from error
    ranks = matched_ranks(twin)
    model = setting.attach(Norm())
    domain = domain_of(model)
    config = LoraConfig(
        r=1, lora_alpha=1, target_modules=list(ranks), rank_pattern=ranks, alpha_pattern=ranks
    )  # alpha = r: a scale of 1, as ours
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with own_draws(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's, about its own imports
        reseed(setting.seed)  # of its inner factors
        inject_adapter_in_model(config, model)
    norms = {id(p) for m in model.modules() if is_norm(m) for p in m.parameters(recurse=False)}
    for parameter in trained.values():
        parameter.requires_grad_(train_norms or id(parameter) not in norms)
    frozen = frozenset(
        name for name in model.state_dict() if name.replace(".base_layer.", ".") in domain.frozen
    )
    model.domain = dataclasses.replace(domain, family="lora", frozen=frozen)  # type: ignore[assignment]
    return model


def matched_ranks(twin: nn.Module) -> dict[str, int]:
    """Site -> the rank at which PEFT's LoRA has about as many numbers as `twin` has there."""
    ranks = {}
    for name, module in twin.named_modules():
        if isinstance(module, Adapted):
            numbers = sum(p.numel() for p in module.adapter.parameters())
            weight = module.layer.weight
            ranks[name] = max(1, round(numbers / (weight[0].numel() + weight.shape[0])))
    return ranks
