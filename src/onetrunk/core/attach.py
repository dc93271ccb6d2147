"""attach: one backbone and one family make the network of one domain, an ordinary module.

The domain's network is the backbone's own class over the backbone's own frozen tensors; what is the
domain's (adapters, norms, head) is really its own. Nothing marks a domain as active: which domain a
call computes is which object you call.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any, Literal, get_args

import torch
from torch import Generator, Tensor, nn

from ..data.preprocessing import Preprocessing
from ..errors import AttachError, DataError
from ..tensorfile import fingerprint_of
from .adapted import Adapted
from .adapters import Adapter, Family, Full, LowRank, Norm, Shared
from .basis import Basis
from .classifier import replace_head
from .domain import Domain, Scope, mark
from .plan import Plan, Where, default_family, place
from .sites import Site, site_of
from .trace import Size, Trace, gone_through, trace
from .tree import (
    Frozen,
    copy_tree,
    is_counter,
    is_norm,
    own_tensors,
    replace_modules,
    storage_key,
)

Norms = Literal["all", "placed", "none"]
MAX_RANKS_LISTED = 3  # in the text that names a plan


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
            over another backbone; where the forward does not go through what is attached.
        BackboneError: where the backbone does not run or has no classifier to replace.

    >>> from torch import nn
    >>> net = nn.Sequential(
    ...     nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
    ... )
    >>> attach(net, classes=["daisy", "rose"]).domain.family
    'parallel'
    """
    names = _checked_classes(classes)
    _refuse_other_kinds(backbone, family, input_size, head)
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
    if input_size is not None:
        channels, rows, columns = map(int, input_size)  # of a list, of numpy's
        input_size = channels, rows, columns
    traced = trace(backbone, input_size, head)
    scope, text, plan, skipped = _resolve(family, where, traced)
    held = _held_norms(backbone, norms, text, plan, traced)
    model = build(
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
    _refuse_passed_by(model, traced, len(names))
    return model


def _refuse_passed_by(model: nn.Module, traced: Trace, n_classes: int) -> None:
    """Refuses a network whose forward does not go through its adapters and its classifier."""
    names = {name for name, module in model.named_modules() if isinstance(module, Adapted)}
    y, called = gone_through(model, names, [traced.input_size])
    if passed_by := sorted(names - called):
        raise AttachError(
            f"the backbone's forward calls layer {passed_by[0]!r} past its adapter, so it holds it "
            "outside of the module tree too, in a list or dict: make that an nn.ModuleList or "
            "nn.ModuleDict, or leave the layer out, where=Where(pattern=...)."
        )
    if not isinstance(y, Tensor):
        raise AttachError(
            f"the backbone gives a {type(y).__name__}, and a domain's network gives the scores of "
            "its classes, (b, c): wrap it in a module that returns them alone."
        )
    if y.numel() != n_classes:
        raise AttachError(
            f"with a classifier of {n_classes} classes at {', '.join(traced.head)!r} the network "
            f"gives a tensor of shape {tuple(y.shape)} for one image: its scores come from another "
            "module, or the forward calls this one past its place in the module tree. Name the "
            "right one, head='fc'."
        )


def _refuse_other_kinds(backbone: object, family: object, input_size: object, head: object) -> None:
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
    listed = input_size if isinstance(input_size, Sequence) else ()
    whole = [isinstance(n, Integral) for n in listed] == [True] * 3
    if input_size is not None and not whole:
        side = input_size if isinstance(input_size, int) else 64
        raise AttachError(
            f"input_size={input_size}: give channels, rows and columns, (3, {side}, {side})."
        )
    if head is not None and not isinstance(head, str):
        raise AttachError(f"head={head!r}: give the module's path as a text, head='fc'.")
    if any(tensor.is_meta for tensor in _all_tensors(backbone)):
        raise AttachError(
            f"{type(backbone).__name__} has weights on the meta device, which holds no numbers: "
            "load them before attaching."
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
    """The backbone's own; None where it takes neither 1 nor 3 channels, or no square images."""
    n_channels, rows, columns = size
    if n_channels not in (1, 3) or rows != columns:  # a network may not say so itself
        return None
    try:
        return Preprocessing.for_backbone(backbone, size_px=rows)
    except DataError:
        return None


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
        if of_head := next((name for name, own in family.items() if own.scope == "head"), None):
            raise AttachError(
                f"the plan puts {family[of_head]} at {of_head!r}, and that is no family of a layer "
                "but of a whole domain: leave the layer out, or give the family instead of a plan."
            )
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
    replace_head(model, head, head_features, len(classes), generator)
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
            own += [b for b in buffers if b.is_floating_point() or is_counter(b)]
        if isinstance(plan.get(name), Full):
            own += own_tensors(module)
    return own


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
