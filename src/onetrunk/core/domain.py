"""The record that makes a module a domain's network, and which of its tensors are the domain's."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..data.preprocessing import Preprocessing
from ..errors import AttachError
from .basis import Basis
from .plan import Plan
from .trace import Size, Trace, trace
from .tree import is_counter, is_norm, original_names, same_bits

Scope = Literal["adapters", "head", "everything"]


@dataclass(frozen=True)
class Domain:
    """What a domain's module says about itself: `model.domain`.

    Args:
        classes: names of the classes, in the order of the logits.
        family: the written form of what was attached.
        scope: what of the network is the domain's besides its head: `adapters` (and norms),
            `head` (nothing), `everything`.
        plan: site name -> family.
        skipped: layer -> why it has no adapter although it was asked for or holds weights.
        head: the classifier's module paths, as given to or found by `attach`.
        head_features: features that go into the head; 0 where timm builds the head.
        preprocessing: from an image to the network's input; None where the backbone takes neither
            1 nor 3 channels, or images that are not square: they cannot be prepared for it.
        frozen: names in `state_dict()` that are the backbone's own tensors.
        backbone: the backbone itself; the record never copies it.
        input_size: channels, rows, columns that the backbone is known to run at; None where only
            its own word counts.
        basis: what the adapters share with those of other domains, where they were compressed.
        shared: names in `state_dict()` that are the basis' tensors.
        held: the norms that stay the backbone's, in eval mode, by their names there; with `head`
            they all do, and none is listed.
    """

    classes: tuple[str, ...]
    family: str
    scope: Scope
    plan: Plan
    skipped: Mapping[str, str]
    head: tuple[str, ...]
    head_features: int
    preprocessing: Preprocessing | None
    frozen: frozenset[str]
    backbone: nn.Module
    input_size: Size | None = None
    basis: Basis | None = None
    shared: frozenset[str] = frozenset()
    held: tuple[str, ...] = ()

    def __deepcopy__(self, memo: object) -> "Domain":
        return self  # a value: copies of the model share it

    def __repr__(self) -> str:
        return f"Domain({self.family}, {len(self.plan)} sites, {len(self.classes)} classes)"


def domain_of(model: nn.Module) -> Domain:
    """The record of a domain's module.

    Raises:
        AttachError: where `model` is no domain's module.
    """
    domain = getattr(model, "domain", None)
    if not isinstance(domain, Domain):
        raise AttachError(
            f"{type(model).__name__} is no domain's network: it has no `.domain`. "
            "Make one with attach(backbone, family, classes), or load it from a bank."
        )
    return domain


def own_size(domain: Domain) -> Size | None:
    """Channels, rows, columns of the domain's own images; None where only the backbone can say."""
    if domain.preprocessing is None:
        return domain.input_size
    side = domain.preprocessing.size_px
    return domain.preprocessing.channels, side, side


def trace_of(domain: Domain, size: Size | None = None) -> Trace:
    """The domain's backbone as it runs at `size`; by default at that of the domain's own images.

    Raises:
        BackboneError: where it does not run.
    """
    head = domain.head[0] if len(domain.head) == 1 else None
    return trace(domain.backbone, size or own_size(domain), head)


def mark(model: nn.Module, domain: Domain) -> None:
    """Marks `model`, in place, as a domain's network."""
    model.domain = domain  # type: ignore[assignment]
    if hasattr(model, "reset_classifier"):
        model.reset_classifier = _RESET  # type: ignore[assignment]
    model.register_load_state_dict_pre_hook(_refuse_other_backbone)


def unmark(model: nn.Module) -> None:
    """Takes off `model`, in place, what `mark` put there."""
    del model.domain
    model.__dict__.pop("reset_classifier", None)
    hooks = model._load_state_dict_pre_hooks
    for key, hook in list(hooks.items()):
        if getattr(hook, "hook", None) is _refuse_other_backbone:
            del hooks[key]


@dataclass(frozen=True)
class _Refusal:
    """A method that a domain's module cannot honour."""

    method: str
    instead: str

    def __call__(self, *_args: object, **_fields: object) -> None:
        raise AttachError(f"{self.method} would break this domain: {self.instead}")


def _refuse_other_backbone(
    model: nn.Module, state: Mapping[str, Any], prefix: str, *_rest: object
) -> None:
    """Before `load_state_dict`: it copies in place, so it would write into every domain at once."""
    domain = getattr(model, "domain", None)
    if not isinstance(domain, Domain):
        return
    own = model.state_dict()
    given_names = {key.removeprefix(prefix) for key in state}
    for name in sorted((domain.frozen | domain.shared) & given_names):
        given = state[prefix + name]
        if given.shape == own[name].shape and not torch.equal(given.to(own[name]), own[name]):
            whose = "backbone" if name in domain.frozen else "basis"
            raise AttachError(
                f"load_state_dict: {name!r} is the {whose}'s, which its domains share, and the "
                "given numbers differ from it: every domain would change. Load the domain's own "
                f"tensors only (strict=False), or attach to a {whose} with those numbers."
            )


_RESET = _Refusal(
    "reset_classifier",
    "its head belongs to its classes. attach(backbone, family, classes=[...]) makes another "
    "domain; merge(model) gives an ordinary network whose head you may reset.",
)


def delta_names(model: nn.Module) -> list[str]:
    """The names in `state_dict()` that are the domain's own, in order."""
    return list(delta(model))


def delta(model: nn.Module) -> dict[str, Tensor]:
    """The domain's own tensors by name, detached, not copied."""
    domain = domain_of(model)
    others = domain.frozen | domain.shared
    return {name: t for name, t in model.state_dict().items() if name not in others}


def stored(model: nn.Module) -> dict[str, Tensor]:
    """The delta but for norm statistics that are the backbone's bit for bit: what a bank stores.

    Where norms kept the backbone's statistics in training, gains and shifts are all that is new.
    """
    theirs = backbone_statistics(model)
    own = delta(model)
    return {name: t for name, t in own.items() if not _is_known(t, theirs.get(name))}


def backbone_statistics(model: nn.Module) -> dict[str, Tensor]:
    """The backbone's own values of the norm statistics that are the domain's, by name in `model`.

    Statistics are a norm's buffers, and lone whole numbers anywhere; those of an adapter's own norm
    have no counterpart.
    """
    domain, modules = domain_of(model), dict(model.named_modules())
    theirs, found = domain.backbone.state_dict(), {}
    for name, original in original_names(model).items():
        owner, _, key = name.rpartition(".")
        module = modules.get(owner)
        buffer = None if module is None else module._buffers.get(key)
        is_statistic = buffer is not None and (is_norm(modules[owner]) or is_counter(buffer))
        if is_statistic and name not in domain.frozen and original in theirs:
            found[name] = theirs[original]
    return found


def _is_known(own: Tensor, theirs: Tensor | None) -> bool:
    return theirs is not None and same_bits(own, theirs)


def trains_basis(model: nn.Module) -> bool:
    """Whether the basis of a domain's network is trained with it."""
    shared = domain_of(model).shared
    return any(p.requires_grad for name, p in model.named_parameters() if name in shared)
