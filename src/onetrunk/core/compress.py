"""compress: many domains' adapters over one shared basis; Rebuffi et al., CVPR 2018, and beyond.

Per site the matrices on top of each other are U S V, and A_t = G_t B with r directions: B (r, i) is
shared by all, since a layer's inputs are alike in all domains, and G_t (o, r) is the domain's.
r (i + T o) numbers a site in the place of T o i: at r = i / 2 and T = 9 that is 0.56 of them. The
paper's side by side, A_t = B G_t, shares the output's directions; both may be shared (spectra.py).
One global budget is spread over the sites by their spectra, and the error may be that of the
outputs on real images. The domains given stay as they were; their compressed networks are new ones.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor, nn

from ..errors import CompressError
from ..tensorfile import fingerprint_of
from .activations import Activations, Covariances
from .activations import activation_covariances as activation_covariances
from .adapted import Adapted
from .adapters import Family, LowRank, Parallel, Series, Shared
from .adapters.shared import Of, Share
from .basis import Basis
from .budget import choose
from .cost import own_site_tensors
from .domain import domain_of
from .rebuild import adapted_at, adapter_at, rebuilt
from .sites import effective_weight
from .spectra import AS_IT_WAS, Directions, Spectrum, own_factors


@dataclass(frozen=True, eq=False)
class Compressed(Mapping[str, nn.Module]):
    """Domains over one basis: name -> new network; and what compressing them cost and saved.

    Args:
        models: the new networks, by the given names.
        basis: what they share; `attach(backbone, classes=[...], basis=basis)` adds a domain to it.
        directions: site -> (output, input) directions kept; (0, 0) where it stayed as it was.
        errors: site -> root of the lost share of the adapters' output energy; 0 is exact.
        left_out: site -> why its adapters were not factored; they are kept as they were.
        numbers_before, numbers_after: all the domains' adapters, the basis counted once.
        bytes_before, bytes_after: the same in bytes.
    """

    models: Mapping[str, nn.Module]
    basis: Basis
    directions: Mapping[str, Directions]
    errors: Mapping[str, float]
    left_out: Mapping[str, str]
    numbers_before: int
    numbers_after: int
    bytes_before: int
    bytes_after: int

    def __getitem__(self, name: str) -> nn.Module:
        return self.models[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.models)

    def __len__(self) -> int:
        return len(self.models)

    @property
    def kept(self) -> float:
        """Numbers after over numbers before."""
        return self.numbers_after / self.numbers_before

    def __repr__(self) -> str:
        return (
            f"Compressed({', '.join(self)}: {self.numbers_before:,} -> {self.numbers_after:,} "
            f"numbers, {self.kept:.1%})"
        )


def compress(
    models: Mapping[str, nn.Module],
    keep: float | None = None,
    *,
    numbers: int | None = None,
    n_bytes: int | None = None,
    rank_fraction: float | None = None,
    share: Share = "input",
    covariances: Covariances | None = None,
) -> Compressed:
    """Factors the adapters of `models` jointly; exactly one option says how far.

    A budget is spent where it keeps the most; where factors would cost more than the adapters
    themselves, a site stays as it was, so that `keep=1` changes nothing.

    Args:
        models: name -> a domain's network, all over one backbone with series, parallel or low-rank
            adapters at the same sites.
        keep: budget as a share of the adapters' numbers, the basis counted once: 0.5 halves them.
        numbers, n_bytes: the same as a count of numbers or bytes.
        rank_fraction: no budget but the same share of the possible directions everywhere: 0.5 is
            the paper's r = C / 2; where they would cost no less, a site stays as it was.
        share: the side whose factor all domains share: `input`, the best one measured
            (docs/results/compression.md), `output` (our reading of the paper), or `both`.
        covariances: from `activation_covariances`; the error is then that of the layers' outputs
            on those images, a share of each one's energy. Without, inputs count as white, and a
            site's error as a share of its frozen weights' energy.

    Raises:
        CompressError: where the domains do not fit together, were compressed already, or the
            budget is below the smallest plan.
        AttachError: where a model is no domain's network.

    >>> from onetrunk import Parallel, attach, backbone
    >>> net = backbone("resnet26(width=0.25)")
    >>> models = {n: attach(net, Parallel(init="released"), ["a", "b"], seed=s)
    ...           for s, n in enumerate(("flowers", "signs", "digits"))}
    >>> smaller = compress(models, keep=0.5)
    >>> list(smaller), smaller.kept <= 0.5
    (['flowers', 'signs', 'digits'], True)
    """
    given = {
        "keep": keep, "numbers": numbers, "n_bytes": n_bytes, "rank_fraction": rank_fraction,
    }  # fmt: skip
    said = {name: value for name, value in given.items() if value is not None}
    if len(said) != 1:
        raise CompressError(
            f"compress with {', '.join(said) or 'no budget'}: give exactly one of "
            f"{', '.join(given)}, for example keep=0.5."
        )
    _check_option(*next(iter(said.items())))
    task = _Task.of(models, share, covariances)
    if rank_fraction is not None:
        return task.carried_out({s: x.fraction(rank_fraction) for s, x in task.spectra.items()})
    if n_bytes is not None:
        return task.within(task.numbers_of_bytes(n_bytes), f"n_bytes={n_bytes:,}")
    if numbers is not None:
        return task.within(numbers, f"numbers={numbers:,}")
    assert keep is not None  # one of the four was given
    return task.within(task.numbers_of_share(keep), f"keep={keep:g}")


def sweep(
    models: Mapping[str, nn.Module],
    keeps: Sequence[float],
    *,
    share: Share = "input",
    covariances: Covariances | None = None,
) -> Iterator[Compressed]:
    """`compress` at several budgets; the spectra are taken once. Raises as it does."""
    for keep in keeps:
        _check_option("keep", keep)
    task = _Task.of(models, share, covariances)
    for keep in keeps:
        yield task.within(task.numbers_of_share(keep), f"keep={keep:g}")


def compress_within(
    models: Mapping[str, nn.Module],
    accuracy: Callable[[str, nn.Module], float],
    loss: float = 0.01,
    *,
    share: Share = "input",
    covariances: Covariances | None = None,
    n_tries: int = 6,
) -> Compressed:
    """The smallest plan found by which no domain loses more than `loss` of its accuracy.

    Halves the interval of budgets `n_tries` times, so it is within 2^-n_tries of a border between
    plans that hold and plans that do not; every try evaluates every domain.

    Args:
        accuracy: (name, network) -> accuracy in [0, 1] on data that is not the test's.
        loss: what each domain may lose; 0.01 is one point.

    Raises:
        CompressError: as `compress`, and for a loss out of range.
    """
    if not isinstance(loss, (int, float)) or not 0 <= loss < 1:
        raise CompressError(
            f"loss={loss!r}: give a share of accuracy from 0 to below 1, e.g. 0.01."
        )
    task = _Task.of(models, share, covariances)
    least = {name: accuracy(name, model) - loss - 1e-12 for name, model in models.items()}

    def holds(found: Compressed) -> bool:
        return all(accuracy(name, model) >= least[name] for name, model in found.items())

    low, high = task.smallest, task.numbers_before
    best = task.within(low, "the smallest plan")
    if holds(best):
        return best
    best = task.within(high, "keep=1")
    for _ in range(n_tries):
        middle = (low + high) // 2
        found = task.within(middle, f"numbers={middle:,}")
        if holds(found):
            best, high = found, middle
        else:
            low = middle
    return best


def project(
    models: Mapping[str, nn.Module], basis: Basis, *, covariances: Covariances | None = None
) -> Compressed:
    """The nearest networks of further domains over a basis that stays as it is.

    Raises:
        CompressError: where the basis belongs to another backbone, or the domains' adapters are not
            of its kind or not at its sites.
    """
    found = _Domains.of(models)
    if found.backbone != basis.backbone:
        raise CompressError(
            f"the basis was made over backbone {basis.backbone[:12]}..., these domains over "
            f"{found.backbone[:12]}...: its directions would be meaningless there. Use domains "
            "over the same backbone."
        )
    kinds = {s: f.of for s, f in basis.plan.items() if isinstance(f, Shared)}
    for name, sites in found.kinds.items():
        _refuse_other_sites("the basis", kinds, name, sites)
    plans = {name: dict(domain_of(model).plan) for name, model in models.items()}
    adapters: dict[str, dict[str, dict[str, Tensor]]] = {name: {} for name in models}
    errors = {}
    for site, factors in basis.factors.items():
        spectrum = found.spectrum(site, "output", covariances)
        exact = {key: t.detach().cpu().double() for key, t in factors.items()}
        own = own_factors(spectrum.a_doi, exact, spectrum.covariances_dii)
        errors[site] = spectrum.error(exact, own)
        for name, g in zip(models, own, strict=True):
            adapters[name][site] = {"g": g}
            plans[name][site] = _with_dropout(basis.plan[site], plans[name][site])
    made = {n: rebuilt(m, plans[n], basis, adapters[n]) for n, m in models.items()}
    ranks = {s: _ranks_of(f) for s, f in basis.plan.items() if isinstance(f, Shared)}
    return found.compressed(made, basis, ranks, errors)


def factorable(model: nn.Module) -> dict[str, str]:
    """The sites whose adapters can be factored, and what they are: `parallel` or `series`.

    Empty for a domain that is over a basis already. Domains with equal answers go together.
    """
    domain = domain_of(model)
    return {} if domain.basis is not None else dict(_kinds("", model)[0])


@dataclass(frozen=True)
class _Domains:
    """Several domains whose adapters can be taken together.

    Args:
        models: the networks.
        backbone: its fingerprint.
        kinds: domain -> site -> what the adapters there are: `parallel` or `series`.
        left_out: site -> why it has no part in it.
    """

    models: Mapping[str, nn.Module]
    backbone: str
    kinds: Mapping[str, Mapping[str, Of]]
    left_out: Mapping[str, str]

    @classmethod
    def of(cls, models: Mapping[str, nn.Module]) -> "_Domains":
        if not isinstance(models, Mapping) or not models:
            raise CompressError(
                "compress takes the domains' networks by name, and there are none: "
                'give compress({"flowers": flowers, "signs": signs}, keep=0.5).'
            )
        kinds: dict[str, dict[str, Of]] = {}
        left_out: dict[str, str] = {}
        for name, model in models.items():
            kinds[name], reasons = _kinds(name, model)
            left_out |= reasons
        return cls(models, _one_backbone(models), kinds, left_out)

    def numbers(self, models: Mapping[str, nn.Module], *, in_bytes: bool = False) -> int:
        """What the adapters of `models` hold, as `cost` counts them."""
        return sum(
            tensor.nbytes if in_bytes else tensor.numel()
            for model in models.values()
            for site, module in model.named_modules()
            if isinstance(module, Adapted)
            for tensor in own_site_tensors(model, site)
        )

    @torch.no_grad()
    def spectrum(self, site: str, share: Share, covariances: Covariances | None) -> Spectrum:
        """The matrices of all domains at one site, decomposed."""
        adapted = [adapted_at(model, site) for model in self.models.values()]
        a_doi = torch.stack([_matrix(module.adapter) for module in adapted])
        odd = [name for name, a in zip(self.models, a_doi, strict=True) if not a.isfinite().all()]
        if odd:
            raise CompressError(
                f"domain {odd[0]!r} has an adapter at {site} that holds NaN or infinity. Train the "
                "domain again."
            )
        held = sum(_n_matrix_numbers(module.adapter) for module in adapted)
        limit = sum(_max_rank(module.adapter) for module in adapted)
        scales_d, covariances_dii = self._scales(site, adapted, covariances)
        return Spectrum.of(share, a_doi, covariances_dii, scales_d, held, limit)

    def _scales(
        self, site: str, adapted: list[Adapted], covariances: Covariances | None
    ) -> tuple[Tensor, Tensor | None]:
        if covariances is None:
            mean = sum(_layer_energy(module) for module in adapted) / len(adapted)
            return torch.full((len(adapted),), 1 / mean, dtype=torch.float64), None
        found = [_found(covariances, name, site) for name in self.models]
        scales_d = torch.tensor([1 / max(a.energy, 1e-30) for a in found], dtype=torch.float64)
        return scales_d, torch.stack([a.covariance_ii.cpu().double() for a in found])

    def compressed(
        self,
        made: Mapping[str, nn.Module],
        basis: Basis,
        directions: Mapping[str, Directions],
        errors: Mapping[str, float],
    ) -> Compressed:
        return Compressed(
            made,
            basis,
            directions,
            errors,
            self.left_out,
            self.numbers(self.models),
            self.numbers(made) + basis.numbers,
            self.numbers(self.models, in_bytes=True),
            self.numbers(made, in_bytes=True) + basis.n_bytes,
        )


@dataclass(frozen=True)
class _Task:
    """Domains and the spectra of their sites: what every budget starts from."""

    domains: _Domains
    share: Share
    spectra: Mapping[str, Spectrum]
    numbers_before: int

    @classmethod
    def of(
        cls, models: Mapping[str, nn.Module], share: Share, covariances: Covariances | None
    ) -> "_Task":
        if share not in get_args(Share):
            raise CompressError(
                f"share={share!r}: the shared side is one of {', '.join(get_args(Share))}."
            )
        domains = _Domains.of(models)
        (first, sites), *others = domains.kinds.items()
        for name, own in others:
            _refuse_other_sites(f"domain {first!r}", sites, name, own)
        if not sites:
            raise CompressError(
                f"domain {first!r} has no adapters that can be factored ({domain_of(models[first])}"
                "): only dense series, parallel and low-rank ones are. Leave such domains out."
            )
        spectra = {site: domains.spectrum(site, share, covariances) for site in sites}
        return cls(domains, share, spectra, domains.numbers(models))

    @property
    def fixed(self) -> int:
        """Numbers that no plan changes: adapters that are left out, the norms of series ones."""
        return self.numbers_before - sum(x.n_numbers for x in self.spectra.values())

    @property
    def smallest(self) -> int:
        """Numbers of the smallest plan: one direction at each site, or the site as it was."""
        return self.fixed + sum(int(x.menu().prices.min()) for x in self.spectra.values())

    @property
    def smallest_share(self) -> float:
        """In thousandths, rounded up: a share that really suffices."""
        return math.ceil(1000 * self.smallest / self.numbers_before) / 1000

    def numbers_of_share(self, keep: float) -> int:
        return math.floor(keep * self.numbers_before + 1e-6)  # a share that is exact stays whole

    def numbers_of_bytes(self, n_bytes: int) -> int:
        """How many numbers fit into so many bytes: a series adapter's counter has eight."""
        held = self.domains.numbers(self.domains.models, in_bytes=True)
        adapter = adapter_at(next(iter(self.domains.models.values())), next(iter(self.spectra)))
        width = next(adapter.parameters()).element_size()
        factored = self.numbers_before - self.fixed
        return self.fixed + (n_bytes - (held - factored * width)) // width

    def within(self, budget: int, asked: str) -> Compressed:
        """The best plan of at most `budget` numbers."""
        menus = {site: spectrum.menu() for site, spectrum in self.spectra.items()}
        chosen = choose(menus, budget - self.fixed)
        if chosen is None:
            raise CompressError(
                f"{asked} leaves {max(0, budget):,} numbers for the adapters, and the smallest "
                f"plan has {self.smallest:,}: one direction at each of {len(self.spectra)} sites"
                f" and what cannot be factored. Keep that many or more, "
                f"{self.smallest_share:.3f} of {self.numbers_before:,}."
            )
        return self.carried_out({s: x.offer(chosen[s]) for s, x in self.spectra.items()})

    @torch.no_grad()
    def carried_out(self, directions: Mapping[str, Directions]) -> Compressed:
        """The networks that a plan describes."""
        models = self.domains.models
        of = next(iter(self.domains.kinds.values()))
        plans = {name: dict(domain_of(model).plan) for name, model in models.items()}
        adapters: dict[str, dict[str, dict[str, Tensor]]] = {name: {} for name in models}
        factors: dict[str, dict[str, Tensor]] = {}
        errors = {}
        for site, spectrum in self.spectra.items():
            if directions[site] == AS_IT_WAS:
                errors[site] = 0.0
                continue
            like = next(adapter_at(next(iter(models.values())), site).parameters())
            exact = spectrum.factors(directions[site])
            own = spectrum.own_factors(exact)
            errors[site] = spectrum.error(exact, own)
            factors[site] = {key: t.to(like.dtype).contiguous() for key, t in exact.items()}
            family = Shared(of[site], self.share, _rank(self.share, directions[site]))
            for name, g in zip(models, own, strict=True):
                adapters[name][site] = {"g": g}
                plans[name][site] = _with_dropout(family, plans[name][site])
        basis = Basis(factors, next(iter(plans.values())), self.domains.backbone)
        made = {n: rebuilt(m, plans[n], basis, adapters[n]) for n, m in models.items()}
        return self.domains.compressed(made, basis, directions, errors)


def _check_option(name: str, value: Any) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if name in ("keep", "rank_fraction"):
        if not (number and 0 < value <= 1):
            raise CompressError(f"{name}={value!r}: give a share above 0 and up to 1, e.g. 0.5.")
    elif type(value) is not int or value < 1:
        raise CompressError(f"{name}={value!r}: give a whole number of at least 1.")


def _one_backbone(models: Mapping[str, nn.Module]) -> str:
    """The fingerprint of the backbone that all domains are over."""
    prints: dict[int, str] = {}
    (first, expected), *others = (
        (name, _print(domain_of(model).backbone, prints)) for name, model in models.items()
    )
    for name, found in others:
        if found != expected:
            raise CompressError(
                f"domain {name!r} is over backbone {found[:12]}..., {first!r} over "
                f"{expected[:12]}...: their adapters have nothing in common. Compress the domains "
                "of one backbone."
            )
    return expected


def _print(backbone: nn.Module, known: dict[int, str]) -> str:
    if id(backbone) not in known:
        known[id(backbone)] = fingerprint_of(backbone.state_dict())
    return known[id(backbone)]


def _kinds(name: str, model: nn.Module) -> tuple[dict[str, Of], dict[str, str]]:
    """What the factorable adapters of a domain are, and why the others are none."""
    kinds: dict[str, Of] = {}
    reasons: dict[str, str] = {}
    for site, family in domain_of(model).plan.items():
        module = model.get_submodule(site)
        if isinstance(family, Shared):
            raise CompressError(
                f"domain {name!r} is over a basis already. Compress the networks that it was made "
                "from, or standalone(model)."
            )
        if not isinstance(family, (Series, Parallel, LowRank)):
            reasons[site] = f"{family} has no matrix to factor"
        elif getattr(module, "groups", 1) > 1:
            reasons[site] = f"{module.groups} groups: no dense matrix"
        else:
            kinds[site] = "series" if isinstance(family, Series) else "parallel"
    return kinds, reasons


def _refuse_other_sites(
    whose: str, expected: Mapping[str, str], name: str, found: Mapping[str, str]
) -> None:
    if expected.items() == found.items() or (
        whose == "the basis" and expected.items() <= found.items()
    ):
        return
    lines = [f"- {of} at {s}" for s, of in expected.items() if found.get(s) != of]
    lines += [f"+ {of} at {s}" for s, of in found.items() if expected.get(s) != of]
    more = [f"  and {len(lines) - 8} more"] if len(lines) > 8 else []
    raise CompressError(
        f"domain {name!r} has adapters at other sites than {whose} (- only {whose}, + only "
        f"{name!r}); compress domains with the same sites together:\n" + "\n".join(lines[:8] + more)
    )


def _found(covariances: Covariances, name: str, site: str) -> Activations:
    try:
        return covariances[name][site]
    except KeyError:
        raise CompressError(
            f"covariances say nothing of domain {name!r} at {site}. Collect them from these very "
            "models: activation_covariances(models, images)."
        ) from None


def _matrix(adapter: Any) -> Tensor:
    """A (o, i) in float64 on the CPU."""
    if hasattr(adapter, "u_or"):
        return adapter.u_or.detach().cpu().double() @ adapter.v_ri.detach().cpu().double()
    a_oi: Tensor = adapter.a_oo if hasattr(adapter, "a_oo") else adapter.a_oi
    return a_oi.detach().cpu().double()


def _n_matrix_numbers(adapter: nn.Module) -> int:
    """Numbers of the matrix, or of its two factors: a series adapter's norm is not among them."""
    return sum(p.numel() for p in adapter.parameters(recurse=False))


def _max_rank(adapter: nn.Module) -> int:
    return min(min(p.shape) for p in adapter.parameters(recurse=False))


def _layer_energy(module: Adapted) -> float:
    """What the layer's output has of energy for white inputs; a series adapter has measured it."""
    adapter: Any = module.adapter
    if hasattr(adapter, "norm"):
        return max(float(adapter.norm.running_var.cpu().double().sum()), 1e-30)
    return max(float(effective_weight(module.layer).cpu().double().square().sum()), 1e-30)


def _rank(share: Share, directions: Directions) -> int | tuple[int, int]:
    if share == "both":
        return directions
    return directions[0 if share == "output" else 1]


def _ranks_of(family: Shared) -> Directions:
    return family.rank if isinstance(family.rank, tuple) else (family.rank, family.rank)


def _with_dropout(family: Family, replaced: Family) -> Family:
    assert isinstance(family, Shared)
    return replace(family, dropout=getattr(replaced, "dropout", 0.0))
