"""A domain's network anew: by another plan, over another basis, none, or one that trains."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..errors import CompressError
from .adapted import Adapted
from .adapters import Family, LowRank, Parallel, Series, Shared
from .adapters.shared import SharedAdapter
from .attach import build, plan_text
from .basis import Basis
from .domain import delta, domain_of
from .tree import first_names

Adapters = Mapping[str, Mapping[str, Tensor]]  # site -> name in the adapter -> numbers


@torch.no_grad()
def rebuilt(
    model: nn.Module, plan: Mapping[str, Family], basis: Basis | None, adapters: Adapters
) -> nn.Module:
    """A new network of the same domain with another plan, on its backbone's device.

    Args:
        adapters: site -> numbers of its new adapter by name; what is not named there is copied.

    Raises:
        CompressError: where the network was altered after attach.
    """
    domain = domain_of(model)
    new = build(
        domain.backbone,
        scope=domain.scope,
        family=domain.family if plan == domain.plan else plan_text(plan),
        plan=plan,
        skipped=domain.skipped,
        classes=domain.classes,
        head=domain.head,
        head_features=domain.head_features,
        preprocessing=domain.preprocessing,
        input_size=domain.input_size,
        basis=basis if basis is not None and basis.factors else None,
        held=domain.held,
    )
    values, own = ({n: t for n, t in delta(m).items() if n in first_names(m)} for m in (model, new))
    given = {f"{s}.adapter.{n}": t for s, found in adapters.items() for n, t in found.items()}
    changed = tuple(f"{site}.adapter." for site in adapters)
    outside = {name for name in values if not name.startswith(changed)} if changed else {*values}
    if outside - own.keys() or own.keys() - values.keys() - given.keys():
        odd = sorted((outside - own.keys()) | (own.keys() - values.keys() - given.keys()))
        raise CompressError(
            f"a domain's network was altered after attach: {odd[0]} has no counterpart in a new "
            "one. Give networks as attach made them."
        )
    for name, tensor in own.items():
        if name in values and values[name].dtype != tensor.dtype:
            raise CompressError(
                f"{name} is {values[name].dtype}, and {tensor.dtype} in a network over the "
                "backbone: bring the domain back to its backbone's type with .to() first."
            )
        tensor.copy_(given[name] if name in given else values[name])
    return new.train(model.training)


def standalone(model: nn.Module) -> nn.Module:
    """The same network without a shared basis: low-rank, parallel and series adapters of its own.

    Raises:
        AttachError: where `model` is no domain's network.
    """
    domain = domain_of(model)
    plan, adapters = dict(domain.plan), dict[str, dict[str, Tensor]]()
    for site, family in domain.plan.items():
        if isinstance(family, Shared):
            adapter = adapter_at(model, site)
            assert isinstance(adapter, SharedAdapter)
            plan[site], adapters[site] = _unshared(family, adapter)
    return rebuilt(model, plan, None, adapters)


def with_trainable_basis(models: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """New networks over a new basis that is trained with them: one parameter in all of them.

    Training one then moves the basis under all the others; `with_frozen_basis` ends it.

    Raises:
        CompressError: where the networks are not over one basis.
    """
    basis = _one_basis(models)
    loose = replace(
        basis, factors={s: {n: t.clone() for n, t in f.items()} for s, f in basis.factors.items()}
    )
    made = {n: rebuilt(m, domain_of(m).plan, loose, {}) for n, m in models.items()}
    for site, factors in loose.factors.items():
        for name in factors:
            first: nn.Parameter = getattr(adapter_at(next(iter(made.values())), site), name)
            first.requires_grad_(True)
            for model in made.values():
                setattr(adapter_at(model, site), name, first)
    return made


def with_frozen_basis(models: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """New networks over the basis as it was trained, a value again that nothing moves.

    Raises:
        CompressError: where the networks do not share one trained basis.
    """
    old = _one_basis(models)
    factors: dict[str, dict[str, Tensor]] = {}
    for site, names in old.factors.items():
        held = [{n: getattr(adapter_at(m, site), n) for n in names} for m in models.values()]
        if any(other[n] is not held[0][n] for other in held for n in names):
            raise CompressError(
                f"the domains' factors at {site} are not one parameter, so they were not trained "
                "together. Give the networks that with_trainable_basis returned."
            )
        factors[site] = {n: t.detach().to(names[n]).clone() for n, t in held[0].items()}
    basis = replace(old, factors=factors)
    return {n: rebuilt(m, domain_of(m).plan, basis, {}) for n, m in models.items()}


def adapted_at(model: nn.Module, site: str) -> Adapted:
    """The layer of a domain's plan with its adapter."""
    module = model.get_submodule(site)
    assert isinstance(module, Adapted)  # its plan has an adapter there
    return module


def adapter_at(model: nn.Module, site: str) -> nn.Module:
    """The adapter of a layer of a domain's plan."""
    return adapted_at(model, site).adapter


def _one_basis(models: Mapping[str, nn.Module]) -> Basis:
    bases = {name: domain_of(model).basis for name, model in models.items()}
    first = next(iter(bases.values()), None)
    for name, basis in bases.items():
        if basis is None or basis != first:
            raise CompressError(
                f"domain {name!r} is over {basis or 'no basis'}, the first over "
                f"{first or 'no basis'}: a basis is trained by the domains over it. Give the "
                "networks of one compress."
            )
    if first is None:
        raise CompressError("there are no networks: give those of one compress, by name.")
    return first


def _unshared(family: Shared, adapter: SharedAdapter) -> tuple[Family, dict[str, Tensor]]:
    """The ordinary family that computes the same with the fewest numbers, and its numbers."""
    a_oi = adapter.product(torch.empty(0, dtype=torch.float64))
    if family.of == "series":
        return Series(), {"a_oo": a_oi}
    o, i = a_oi.shape
    u_or, v_ri = _two_factors(adapter)
    rank = u_or.shape[1]
    if rank * (o + i) >= o * i:
        return Parallel(dropout=family.dropout), {"a_oi": a_oi}
    return LowRank(rank, dropout=family.dropout), {"u_or": u_or, "v_ri": v_ri}


def _two_factors(adapter: SharedAdapter) -> tuple[Tensor, Tensor]:
    """U, V with U V = A and as few directions as there are: of three, G joins the larger."""
    factors = [factor.detach().cpu().double() for factor in adapter.factors()]
    if len(factors) == 2:
        return factors[0], factors[1]
    left_or, g_rq, right_qi = factors
    if g_rq.shape[0] <= g_rq.shape[1]:
        return left_or, g_rq @ right_qi
    return left_or @ g_rq, right_qi
