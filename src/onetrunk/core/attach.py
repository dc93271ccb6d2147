"""attach: one backbone and one family make the network of one domain, an ordinary module.

The domain's network is the backbone's own class over the backbone's own frozen tensors; what is the
domain's (adapters, norms, head) is really its own. Nothing marks a domain as active: which domain a
call computes is which object you call.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Generator, Tensor, nn
from torch.overrides import TorchFunctionMode

from ..data.preprocessing import Preprocessing
from ..errors import AttachError, BackboneError, DataError
from ..tensorfile import fingerprint_of
from .adapters import Adapter, Family, Full, LowRank, Norm, Shared
from .basis import Basis
from .fused import FOLDING_DEVICES, folded_product, folds, is_matrix, product
from .plan import Plan, Where, default_family, place
from .sites import Site, Tap, site_of
from .trace import Size, Trace, timm_classifier, trace
from .tree import (
    Frozen,
    copy_tree,
    is_norm,
    original_names,
    own_tensors,
    passed_on,
    replace_module,
    replace_modules,
    same_bits,
    storage_key,
)

Scope = Literal["adapters", "head", "everything"]
Norms = Literal["all", "placed", "none"]
MAX_RANKS_LISTED = 3  # in the text that names a plan


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
        preprocessing: from an image to the network's input; None where the backbone takes
            neither 1 nor 3 channels, so that images cannot be prepared for it.
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


class Adapted(nn.Module):
    """A frozen layer and the adapter that corrects its output."""

    layer: nn.Conv2d | nn.Linear
    adapter: Adapter

    def __init__(self, layer: nn.Conv2d | nn.Linear, adapter: Adapter, site: Site) -> None:
        super().__init__()
        self.layer, self.adapter = layer, adapter
        self.tap = Tap.of(layer, site) if isinstance(layer, nn.Conv2d) else None
        self.folds, self.is_matrix = folds(layer, adapter, site), is_matrix(layer, site)

    def forward(self, x: Tensor) -> Tensor:
        fused = (self.folds or self.is_matrix) and x.device.type in FOLDING_DEVICES
        if not (fused and self.training and torch.is_grad_enabled() and self._untouched()):
            return self.plain(x)
        a_oi = self.adapter.matrix() if self.folds else None
        if a_oi is not None:
            return folded_product(self.layer, a_oi, x, self.tap)
        return self.beside(x, product(self.layer, x) if self.is_matrix else self.layer(x))

    def plain(self, x: Tensor) -> Tensor:
        """The layer and the adapter beside it: what the fused step must equal."""
        return self.beside(x, self.layer(x))

    def beside(self, x: Tensor, y: Tensor) -> Tensor:
        """What the adapter makes of the layer's input and output."""
        if not self.adapter.reads_input:
            return _laid_out_as(y, self.adapter(y, y))
        x = x if self.tap is None else self.tap.pick(x, y.shape[-2:])
        return _laid_out_as(y, self.adapter(x, y))

    def _untouched(self) -> bool:
        """Whether the weight is frozen, and nobody listens to layer or adapter by a hook."""
        hooks = (
            hook
            for module in (self.layer, self.adapter)
            for hook in (
                module._forward_pre_hooks, module._forward_hooks,
                module._backward_pre_hooks, module._backward_hooks,
            )
        )  # fmt: skip
        return not self.layer.weight.requires_grad and not any(hooks)

    def __getattr__(self, name: str) -> Any:
        return passed_on(self, "layer", super().__getattr__, name)


def _laid_out_as(y: Tensor, corrected: Tensor) -> Tensor:
    """`corrected` with y's strides along axes of size 1, where strides mean nothing.

    The next layer picks its algorithm by them: on maps of 1x1 pixels a sum with other strides than
    y's moved EfficientViM's features by 3e-8 although nothing was added.
    """
    if corrected.stride() == y.stride() or corrected.shape != y.shape:
        return corrected
    axes = zip(y.shape, y.stride(), corrected.stride(), strict=True)
    if all(size == 1 or ours == theirs for size, ours, theirs in axes):
        return corrected.as_strided(y.shape, y.stride())
    return corrected


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


def attach(
    backbone: nn.Module,
    family: Family | Plan | None = None,
    classes: Sequence[str] = (),
    *,
    where: Where | None = None,
    preprocessing: Preprocessing | None = None,
    input_size: Size | None = None,
    head: str | None = None,
    seed: int = 0,
    basis: Basis | None = None,
    norms: Norms = "all",
) -> nn.Module:
    """The network of one domain: `backbone`'s class and frozen tensors, the domain's own rest.

    The backbone stays as it is, `requires_grad` included; any number of domains share its memory.
    Norms (affine and running statistics) and the classifier are the domain's. With `identity`
    initialisation the fresh domain computes the backbone's features bit for bit, as a backbone with
    `requires_grad_(False)` does: torch may take another matrix product where gradients are wanted.

    Args:
        backbone: any module from images (b, c, h, w) to class scores or features.
        family: what to add, e.g. `Parallel()`; a plan (site name -> family); or None for the family
            that fits the backbone (see `default_family`).
        classes: the names of the domain's classes, in the order of its logits.
        where: which sites; by default those where the backbone mixes channels.
        preprocessing: how images become inputs; by default the backbone's own.
        input_size: channels, rows, columns for the one dry run that finds the sites, and the side
            that images are prepared for; by default what the backbone says of itself.
        head: the classifier's module path, where it is not found by itself.
        seed: of the fresh head and adapters; the global generator is not touched.
        basis: what compressed domains share, `compressed.basis` or `model.domain.basis`: the new
            domain starts on it, as it is, with its plan (the first of those domains') where
            `family` is not the plan of another domain over it.
        norms: which are the domain's own: `all`; `placed`, those from the first adapted layer on;
            or `none`. The others stay the backbone's, in eval mode, so that what is below the
            first adapted layer is the same for every domain and epoch (see `cached`).

    Raises:
        AttachError: for classes, options or placements that do not fit, and a basis that was made
            over another backbone.
        BackboneError: where the backbone does not run or has no classifier to replace.

    >>> from torch import nn
    >>> net = nn.Sequential(
    ...     nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
    ... )
    >>> attach(net, classes=["daisy", "rose"]).domain.family
    'parallel'
    """
    names = _checked_classes(classes)
    _refuse_other_kinds(backbone, family, input_size)
    if isinstance(getattr(backbone, "domain", None), Domain):
        raise AttachError(
            "this is a domain's network already; attach to its backbone: model.domain.backbone."
        )
    if hasattr(backbone, "domain"):
        raise AttachError(
            f"{type(backbone).__name__} has a `domain` of its own, which is where the record of a "
            "domain's network goes: call it something else."
        )
    if basis is not None:
        _refuse_foreign_basis(backbone, basis, family, where)
        family = basis.plan if family is None else family
    traced = trace(backbone, input_size, head)
    scope, text, plan, skipped = _resolve(family, where, traced)
    held = _held_norms(backbone, norms, text, plan, traced)
    return build(
        backbone,
        scope=scope,
        family=text,
        plan=plan,
        skipped=skipped,
        classes=names,
        head=traced.head,
        head_features=traced.head_features,
        preprocessing=preprocessing or _default_preprocessing(backbone, traced.input_size),
        seed=seed,
        input_size=traced.input_size,
        basis=basis,
        held=held,
    )


def _refuse_other_kinds(backbone: object, family: object, input_size: object) -> None:
    if not isinstance(backbone, nn.Module):
        raise AttachError(
            f"attach was given {backbone!r}, and a backbone is a module: onetrunk.backbone(NAME) "
            "builds one."
        )
    texts = family.values() if isinstance(family, Mapping) else ()
    if text := next((value for value in texts if isinstance(value, str)), None):
        raise AttachError(
            f"a plan has families, and this one the text {text!r}: read each with read_family, or "
            "the whole plan with onetrunk.core.allocate.plan_by_hand(backbone, plan)."
        )
    if isinstance(input_size, int):
        raise AttachError(
            f"input_size={input_size}: give channels, rows and columns, (3, {input_size}, "
            f"{input_size})."
        )


def _held_norms(
    backbone: nn.Module, norms: Norms, family: str, plan: Plan, traced: Trace
) -> tuple[str, ...]:
    """Those that stay the backbone's; with `placed` what is done before an adapted layer starts."""
    if norms == "all":
        return ()
    if norms not in get_args(Norms):
        raise AttachError(f"norms={norms!r}: give 'all', 'placed' or 'none'.")
    places = [place for place, name in enumerate(traced.executed) if name in plan]
    if not places:
        raise AttachError(
            f"norms={norms!r} leaves norms to the backbone beside adapted layers, and {family} "
            "adapts no single layer: leave `norms` out, or place a family such as Parallel()."
        )
    if norms == "none":
        return tuple(name for name, module in backbone.named_modules() if is_norm(module))
    later = set(traced.executed[places[0] :])
    before = dict.fromkeys(traced.executed[: places[0]])
    return tuple(n for n in before if n not in later and is_norm(backbone.get_submodule(n)))


def _refuse_foreign_basis(
    backbone: nn.Module, basis: Basis, family: Family | Plan | None, where: Where | None
) -> None:
    if not isinstance(family, Mapping | None) or where is not None:
        raise AttachError(
            "a basis says which adapters go where: leave `where` out, and `family` too unless it "
            "is the plan of another domain over the basis; or leave the basis out."
        )
    found = fingerprint_of(backbone.state_dict())
    if found != basis.backbone:
        raise AttachError(
            f"the basis was made over backbone {basis.backbone[:12]}..., this is {found[:12]}...: "
            "its directions would be meaningless here. Attach to the backbone of the domains that "
            "the basis comes from."
        )


def _default_preprocessing(backbone: nn.Module, size: Size) -> Preprocessing | None:
    """The backbone's own, or None where it takes neither 1 nor 3 channels."""
    if size[0] not in (1, 3):  # a network without convolutions does not say so itself
        return None
    try:
        return Preprocessing.for_backbone(backbone, size_px=size[1] if size[1] == size[2] else None)
    except DataError:
        return None


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


def _checked_classes(classes: Sequence[str]) -> tuple[str, ...]:
    listed = isinstance(classes, Sequence) and not isinstance(classes, str)
    if not listed or not all(isinstance(name, str) for name in classes):
        raise AttachError(f"classes={classes!r}: give a list of names, e.g. ['daisy', 'rose'].")
    if len(classes) < 2:
        raise AttachError(f"classes={list(classes)!r}: a domain needs at least two classes.")
    twice = [name for name, count in Counter(classes).items() if count > 1]
    if twice:
        raise AttachError(f"classes: {twice[0]!r} is there twice; every class needs its own name.")
    return tuple(classes)


def _resolve(
    family: Family | Plan | None, where: Where | None, traced: Trace
) -> tuple[Scope, str, Plan, Mapping[str, str]]:
    if isinstance(family, Mapping):
        if where is not None:
            raise AttachError("a plan names its sites itself: leave `where` out.")
        return "adapters", plan_text(family), dict(family), traced.skipped
    family = family or default_family(traced, where)
    if not isinstance(family, Family):
        raise AttachError(
            f"family={family!r}: give a family such as Parallel() or LowRank(rank=8), or a plan."
        )
    if family.scope == "head" or isinstance(family, Norm):
        if where is not None:
            raise AttachError(f"{family} is placed at no layer: leave `where` out.")
        return family.scope, str(family), {}, {}
    if family.scope == "everything" and where is None:
        return "everything", str(family), {}, {}
    plan, skipped = place(family, where or Where(), traced)
    return "adapters", str(family), plan, skipped


def plan_text(plan: Plan) -> str:
    """The families of a plan; shared ones without their ranks, many ranks as one range."""
    families = {
        f"shared {family.of}, {family.share}" if isinstance(family, Shared) else str(family)
        for family in plan.values()
    }
    ranks = {str(f): f.rank for f in plan.values() if type(f) is LowRank and f == LowRank(f.rank)}
    if len(ranks) > MAX_RANKS_LISTED:
        low, high = min(ranks.values()), max(ranks.values())
        families = (families - ranks.keys()) | {f"lowrank(rank={low}..{high})"}
    return " + ".join(sorted(families)) or str(Norm())


def build(
    backbone: nn.Module,
    *,
    scope: Scope,
    family: str,
    plan: Plan,
    skipped: Mapping[str, str],
    classes: tuple[str, ...],
    head: tuple[str, ...],
    head_features: int,
    preprocessing: Preprocessing | None,
    seed: int = 0,
    input_size: Size | None = None,
    basis: Basis | None = None,
    held: tuple[str, ...] = (),
) -> nn.Module:
    """The network that a plan describes, without running the backbone; `attach` after its dry run.

    Raises:
        AttachError: where the plan names a layer that the backbone does not have, a family refuses
            one, the basis does not have what the plan shares, or `held` names no norm.
        BackboneError: where there is no classifier to replace.
    """
    generator = torch.Generator().manual_seed(seed)
    sites = _sites_of_plan(backbone, plan)
    _check_held(backbone, held)
    model = copy_tree(backbone, own=_own_tensors(backbone, scope, plan, held))
    _unfreeze(model, scope, plan, held)
    shared = {storage_key(t) for t in _all_tensors(backbone)}
    _replace_head(model, head, head_features, len(classes), generator)
    replace_modules(model, _adapted(model, plan, sites, generator, basis))
    if scope == "head" or held:
        _hold_norms(model, shared)
    state = model.state_dict(keep_vars=True)
    frozen = frozenset(name for name, t in state.items() if t.numel() and storage_key(t) in shared)
    of_basis = frozenset(
        f"{name}.adapter.{factor}"
        for name, family in plan.items()
        if isinstance(family, Shared)
        for factor in family.factor_shapes(sites[name])
    )
    for name in frozen:
        state[name].requires_grad_(False)  # timm's reset_classifier wakes some: EfficientViM's
    domain = Domain(
        classes, family, scope, dict(plan), dict(skipped), head, head_features, preprocessing,
        frozen, backbone, input_size, basis, of_basis, held,
    )  # fmt: skip
    mark(model, domain)
    return model


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


def _adapted(
    model: nn.Module,
    plan: Plan,
    sites: Mapping[str, Site],
    generator: Generator,
    basis: Basis | None,
) -> dict[str, nn.Module]:
    adapted: dict[str, nn.Module] = {}
    for name, site in sites.items():
        family = plan[name]
        adapter: Adapter | None
        if isinstance(family, Shared) and basis is not None:
            adapter = family.over(site, basis.factors.get(name, {}))
        else:
            adapter = family.build(site, generator)
        if adapter is not None:
            layer: Any = model.get_submodule(name)
            adapter.to(device=layer.weight.device, dtype=layer.weight.dtype)
            adapted[name] = Adapted(layer, adapter, site)
    return adapted


def _sites_of_plan(backbone: nn.Module, plan: Plan) -> dict[str, Site]:
    sites = {}
    for name in plan:
        try:
            site = site_of(name, backbone.get_submodule(name))
        except AttributeError:
            site = "the backbone has no layer of that name"
        if not isinstance(site, Site):
            raise AttachError(
                f"the plan puts {plan[name]} at {name!r}: "
                f"{site or 'it is neither Conv2d nor Linear'}. Plan for this backbone's own sites."
            )
        sites[name] = site
    return sites


def _check_held(backbone: nn.Module, held: tuple[str, ...]) -> None:
    norms = {name for name, module in backbone.named_modules() if is_norm(module)}
    odd = [name for name in held if name not in norms]
    if odd:
        raise AttachError(
            f"{odd[0]!r} is to stay the backbone's norm, and the backbone has no norm of that name."
        )


def _all_tensors(module: nn.Module) -> Iterable[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _own_tensors(
    backbone: nn.Module, scope: Scope, plan: Plan, held: tuple[str, ...]
) -> list[Tensor]:
    """The tensors that the domain gets copies of: its norms, and buffers a forward may write."""
    if scope == "everything":
        return list(_all_tensors(backbone))
    own: list[Tensor] = []
    for name, module in backbone.named_modules():
        if is_norm(module):
            own += [] if scope == "head" or name in held else own_tensors(module)
        else:
            buffers = (buffer for buffer in module._buffers.values() if buffer is not None)
            own += [b for b in buffers if b.is_floating_point() or _counts(b)]
        if isinstance(plan.get(name), Full):
            own += own_tensors(module)
    return own


def _counts(buffer: Tensor) -> bool:
    """A lone whole number may count calls; more of them are a table, which nobody writes to."""
    return buffer.numel() == 1 and not buffer.is_floating_point()


def _unfreeze(model: nn.Module, scope: Scope, plan: Plan, held: tuple[str, ...]) -> None:
    for name, module in model.named_modules():
        whole = scope == "everything" or isinstance(plan.get(name), Full)
        if whole or (scope == "adapters" and is_norm(module) and name not in held):
            for parameter in module._parameters.values():
                if parameter is not None and parameter.is_floating_point():
                    parameter.requires_grad_(True)


def _hold_norms(model: nn.Module, shared: set[tuple[torch.device, int]]) -> None:
    """Keeps every norm whose running statistics are the backbone's in eval mode."""
    held = {
        name: Frozen(module)
        for name, module in model.named_modules()
        if is_norm(module) and any(storage_key(b) in shared for b in module.buffers())
    }
    replace_modules(model, held)


def _replace_head(
    model: nn.Module, head: tuple[str, ...], features: int, n_classes: int, generator: Generator
) -> None:
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
        is_statistic = buffer is not None and (is_norm(modules[owner]) or _counts(buffer))
        if is_statistic and name not in domain.frozen and original in theirs:
            found[name] = theirs[original]
    return found


def _is_known(own: Tensor, theirs: Tensor | None) -> bool:
    return theirs is not None and same_bits(own, theirs)


def trains_basis(model: nn.Module) -> bool:
    """Whether the basis of a domain's network is trained with it."""
    shared = domain_of(model).shared
    return any(p.requires_grad for name, p in model.named_parameters() if name in shared)
