"""mix: several domains behind one forward, over a batch whose rows belong to different domains.

The shared layers run once over the whole batch; each row gets its own domain's corrections, norms
and classifier by an index. Mixing is for inference: a snapshot, which keeps the domains' numbers in
stacks and none of their modules. The law: a row's scores are those of its own domain's network.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import MixError
from .adapted import Adapted
from .adapters.base import Correction
from .adapters.series import norm_gain_and_shift
from .domain import Domain, domain_of, mark, own_size
from .merge import difference
from .mixable import base_tree, check_own, check_rows, check_shares
from .rowwise import (
    Affine,
    Classifier,
    Rows,
    Rowwise,
    RowwiseAffine,
    RowwiseHead,
    RowwiseModules,
    RowwiseSite,
)
from .sites import Site, package_and_class, site_of
from .trace import folds_into_a_layer, gone_through
from .tree import copy_tree, is_norm, rewired


def mix(models: Mapping[str, nn.Module], *, check: Tensor | None = None) -> "Mixed":
    """One network for batches whose rows belong to different domains of one backbone.

    Args:
        models: name -> a domain's network; they are left as they were, and what is trained in them
            later does not show in the mixture.
        check: images (b, c, h, w) on which every domain's rows are compared with its own network,
            if given.

    Raises:
        MixError: for domains that do not share a backbone, a family that does not share its
            layers (`full`), and where `check` shows a difference beyond rounding.
        AttachError: where a module is no domain's network.

    >>> import onetrunk as ot
    >>> net = nn.Sequential(
    ...     nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
    ... )
    >>> signs = ot.attach(net, ot.Parallel(), ["stop", "yield", "no entry"])
    >>> mixed = mix({"flowers": ot.attach(net, ot.LowRank(2), ["daisy", "rose"]), "signs": signs})
    >>> [len(scores) for scores in mixed(torch.rand(3, 3, 8, 8), ["signs", "flowers", "signs"])]
    [3, 2, 3]
    """
    if not isinstance(models, Mapping):
        raise MixError(
            f"mix was given a {type(models).__name__}: give names too, mix({{'flowers': flowers}})."
        )
    if not models:
        raise MixError("mix({}): give at least one domain, e.g. mix({'flowers': flowers}).")
    first = next(iter(models.values()))
    mixed = Mixed(first, [_read(name, model, first) for name, model in models.items()])
    if check is not None:
        _refuse_difference(mixed, models, check)
    return mixed


@dataclass(frozen=True)
class _Domain:
    """What a mixture takes of one domain, by the place where it has it."""

    name: str
    classes: tuple[str, ...]
    sites: Mapping[str, Correction | None]
    norms: Mapping[str, Affine | nn.Module]
    heads: Mapping[str, Classifier]


class _Places(NamedTuple):
    """Where domains differ: module paths."""

    sites: tuple[str, ...]
    norms: tuple[str, ...]
    heads: tuple[str, ...]


def _places(domains: Sequence[_Domain]) -> _Places:
    sites = dict.fromkeys(path for domain in domains for path in domain.sites)
    return _Places(tuple(sites), tuple(domains[0].norms), tuple(domains[0].heads))


class Mixed(nn.Module):
    """Several domains' networks as one; see `mix`. In eval mode always."""

    def __init__(self, first: nn.Module, domains: Sequence[_Domain]) -> None:
        super().__init__()
        self._rows = Rows()
        self._classes = {domain.name: domain.classes for domain in domains}
        self._places = _places(domains)
        base = base_tree(first)
        layers = {path for group in self._places for path in group}
        called = check_rows(base, layers, domain_of(first))
        self.network = _assembled(base, domains, self._places, self._rows)
        _refuse_passed_by(self.network, called, domain_of(first))
        mark(base, domain_of(first))
        self._base = (base,)  # a tuple: no submodule; its layers are the network's own
        n_classes_d = torch.tensor([len(domain.classes) for domain in domains])
        self.register_buffer("n_classes_d", n_classes_d.to(_device_of(first)), persistent=False)
        self.n_classes_d: Tensor
        super().train(False)

    @property
    def domains(self) -> tuple[str, ...]:
        """The names of the domains, in the order of the index."""
        return tuple(self._classes)

    def classes(self, name: str) -> tuple[str, ...]:
        """The names of a domain's classes, in the order of its scores."""
        return self._classes[self._known(name)]

    def forward(self, images_bchw: Tensor, rows: Sequence[str] | Tensor) -> list[Tensor]:
        """The scores of each image, (c,) with the classes of its own domain.

        Args:
            images_bchw: prepared as each row's own domain prepares them.
            rows: the domain of each image, by name or by index (b,) into `domains`.

        Raises:
            MixError: for an unknown domain, an index out of range, no images, or another number of
                rows than of images.
        """
        index_b = self.index(rows, images_bchw)
        counts = [len(classes) for classes in self._classes.values()]
        scores_bc = self._scores(images_bchw, index_b)
        return [
            scores_c[: counts[k]] for scores_c, k in zip(scores_bc, index_b.tolist(), strict=True)
        ]

    def padded(self, images_bchw: Tensor, index_b: Tensor) -> Tensor:
        """The scores as one tensor (b, c_max): -inf behind the classes of a row's own domain.

        For `torch.compile` and export: the index is an input like the images, so one graph serves
        every mixture. An index out of range is an error of PyTorch's there.
        """
        if not torch.compiler.is_compiling():
            index_b = self.index(index_b, images_bchw)
        return self._scores(images_bchw, index_b)

    def index(self, rows: Sequence[str] | Tensor, images_bchw: Tensor) -> Tensor:
        """The index (b,) that `rows` means, on the device of the images."""
        if isinstance(rows, str):
            raise MixError(f"rows={rows!r}: give one domain for each image, e.g. [{rows!r}].")
        if not isinstance(rows, Tensor):
            places = {name: k for k, name in enumerate(self._classes)}
            rows = torch.tensor([places[self._known(name)] for name in rows], dtype=torch.long)
        n_images = len(images_bchw)
        if rows.ndim != 1 or rows.is_floating_point() or rows.dtype == torch.bool:
            raise MixError(
                f"rows is a tensor of shape {tuple(rows.shape)} and type {rows.dtype}: give whole "
                "numbers (b,), places in `domains`, or names."
            )
        if len(rows) != n_images or not n_images:
            raise MixError(
                f"{n_images} images and {len(rows)} rows: give at least one image, and one domain "
                "for each."
            )
        low, high = int(rows.min()), int(rows.max())
        if low < 0 or high >= len(self._classes):
            raise MixError(
                f"row index {low if low < 0 else high}: this mixture has {len(self._classes)} "
                f"domains, so give 0 to {len(self._classes) - 1}."
            )
        return rows.to(images_bchw.device, torch.long)

    def with_domain(self, name: str, model: nn.Module) -> "Mixed":
        """A mixture with one domain more; this one stays as it is and may be in use.

        The others' numbers are copied as stacks; nothing of their networks is needed.

        Raises:
            MixError: where there is a domain of that name, and as `mix`.
        """
        if name in self._classes:
            raise MixError(f"there is a domain {name!r} already: take it out with without().")
        (base,) = self._base
        return Mixed(base, [*self._read(), _read(name, model, base)])

    def without(self, name: str) -> "Mixed":
        """A mixture with one domain less; this one stays as it is and may be in use.

        Raises:
            MixError: for an unknown domain, and where it is the last one.
        """
        left = [domain for domain in self._read() if domain.name != self._known(name)]
        if not left:
            raise MixError(f"{name!r} is the only domain: a mixture has at least one.")
        return Mixed(self._base[0], left)

    def train(self, mode: bool = True) -> "Mixed":
        """Refused: a mixture is a snapshot.

        Raises:
            MixError: where `mode` is true.
        """
        if mode:
            raise MixError(
                "a mixture is for inference: it holds the domains' numbers as they were. Train "
                "domains with fit or fit_together, then mix again."
            )
        return super().train(False)

    def _apply(self, fn: Any, recurse: bool = True) -> "Mixed":
        """`.to()`, `.half()` ...: what a later domain goes into is moved along."""
        self._base[0]._apply(fn)
        return super()._apply(fn, recurse)

    def _scores(self, images_bchw: Tensor, index_b: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # nothing to share; torch 2.6 traces no `with` of ours
            self._rows.traced = index_b
            scores: Tensor = self.network(images_bchw)
            self._rows.traced = None
        else:
            with self._rows.of(index_b):
                scores = self.network(images_bchw)
        places_c = torch.arange(scores.shape[1], device=scores.device)
        own_bc = places_c < self.n_classes_d.index_select(0, index_b)[:, None]
        own_bc = own_bc.view(*own_bc.shape, *[1] * (scores.ndim - 2))
        return scores.masked_fill(~own_bc, -torch.inf)  # an activation may have moved the head's

    def _known(self, name: str) -> str:
        if name in self._classes:
            return name
        near = difflib.get_close_matches(str(name), self._classes, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        shown = ", ".join(list(self._classes)[:8])
        more = f" and {len(self._classes) - 8} more" if len(self._classes) > 8 else ""
        raise MixError(f"no domain {name!r} in this mixture of {shown}{more}.{hint}")

    def _read(self) -> list[_Domain]:
        """The domains as they went in, over views of the stacks."""
        parts = {n: m.parts for n, m in self.network.named_modules() if isinstance(m, Rowwise)}
        return [
            _Domain(name, classes, *({n: parts[n][k] for n in names} for names in self._places))
            for k, (name, classes) in enumerate(self._classes.items())
        ]


def _read(name: str, model: nn.Module, first: nn.Module) -> _Domain:
    """What a mixture takes of a domain's network."""
    domain = domain_of(model)
    check_shares(name, model, first)
    base = base_tree(model)
    sites, norms, heads = {}, {}, {}
    for path, module in model.named_modules():
        if isinstance(module, Adapted):
            sites[path] = module.adapter.correction()
    for path, module in base.named_modules():
        if path in domain.head:
            heads[path] = _classifier(name, path, module)
        elif is_norm(module):
            norms[path] = _norm_part(module)
    check_own(name, model, {*sites, *norms, *heads})
    return _Domain(name, domain.classes, sites, norms, heads)


def _device_of(model: nn.Module) -> torch.device:
    return next(parameter.device for parameter in model.parameters())


def _classifier(name: str, path: str, module: nn.Module) -> Classifier:
    if isinstance(module, nn.Linear | nn.Conv2d):
        return Classifier(module.weight, module.bias)
    raise MixError(
        f"domain {name!r} has the classifier {type(module).__name__} at {path}: rows can have "
        "linear layers and 1x1 convolutions of their own only. Call it by itself."
    )


_AXES = {  # where the channels of norms with a known forward are
    **dict.fromkeys(
        [("torch", "LayerNorm"), ("torch", "RMSNorm"), ("timm", "LayerNorm"), ("timm", "RmsNorm")],
        -1,
    ),
    **dict.fromkeys(
        [
            ("torch", "GroupNorm"), ("timm", "GroupNorm"), ("timm", "GroupNorm1"),
            ("timm", "LayerNorm2d"), ("timm", "RmsNorm2d"), ("torchvision", "LayerNorm2d"),
        ],
        1,
    ),
}  # fmt: skip


def _norm_part(norm: nn.Module) -> Affine | nn.Module:
    """A norm's gain and shift; the norm itself where it is of a kind that is not known here."""
    if folds_into_a_layer(norm):
        gain, shift = norm_gain_and_shift(norm, torch.empty(0, dtype=torch.float64))
        like: Any = norm.running_mean
        return Affine(gain.detach().to(like), shift.detach().to(like))
    if _axis(norm) is not None:
        return Affine(norm._parameters.get("weight"), norm._parameters.get("bias"))
    return norm


def _axis(norm: nn.Module) -> int | None:
    if folds_into_a_layer(norm):
        return 1
    weight = norm._parameters.get("weight")
    if weight is None or weight.ndim != 1:
        return None
    return _AXES.get(package_and_class(norm))


def _assembled(
    base: nn.Module, domains: Sequence[_Domain], places: "_Places", rows: Rows
) -> nn.Module:
    """The base's tree with row-wise layers where the domains differ."""
    made: dict[str, nn.Module] = {}
    for path in places.sites:
        layer: Any = base.get_submodule(path)
        site = site_of(path, layer)
        assert isinstance(site, Site)  # a domain adapted it
        made[path] = RowwiseSite(layer, site, [d.sites.get(path) for d in domains], rows)
    for path in places.norms:
        made[path] = _rowwise_norm(base.get_submodule(path), [d.norms[path] for d in domains], rows)
    for path in places.heads:
        made[path] = RowwiseHead([d.heads[path] for d in domains], rows)
    network = rewired(base, {base.get_submodule(path): module for path, module in made.items()})
    return network.requires_grad_(False)


def _refuse_passed_by(network: nn.Module, layers: set[str], domain: Domain) -> None:
    """Refuses a network whose forward calls one of `layers` past what is by row there."""
    sizes = own_size(domain), domain.input_size
    _, called = gone_through(network, layers, sizes, _of_first)
    if passed_by := sorted(layers - called):
        raise MixError(
            f"the backbone's forward calls {passed_by[0]} past its place in the module tree (it "
            "holds it in a list or dict too), so rows cannot differ there. Hold modules in an "
            "nn.ModuleList or nn.ModuleDict, or call the domains one after another."
        )


@contextmanager
def _of_first(network: nn.Module) -> Iterator[None]:
    """While it is entered, the one row of a copied network is the first domain's."""
    rows = next(module.rows for module in network.modules() if isinstance(module, Rowwise))
    with rows.of(torch.zeros(1, dtype=torch.long, device=_device_of(network))):
        yield


def _rowwise_norm(norm: nn.Module, parts: Sequence[Affine | nn.Module], rows: Rows) -> nn.Module:
    axis = _axis(norm)
    affine = [part for part in parts if isinstance(part, Affine)]
    if axis is None or len(affine) < len(parts):
        return RowwiseModules([p for p in parts if isinstance(p, nn.Module)], rows)
    batch = folds_into_a_layer(norm)
    core, after = copy_tree(norm), nn.Sequential()
    for part in ("drop", "act"):
        module = getattr(norm, part, None)
        if isinstance(module, nn.Module) and not isinstance(module, nn.Identity):
            after.append(module)
    core._parameters["weight"] = core._parameters["bias"] = None
    return RowwiseAffine(None if batch else core, after, axis, affine, rows)


def _refuse_difference(mixed: Mixed, models: Mapping[str, nn.Module], images_bchw: Tensor) -> None:
    for k, (name, model) in enumerate(models.items()):
        others = (k + 1) % len(models)
        found = difference(model, _Between(mixed, k, others, len(mixed.classes(name))), images_bchw)
        if not found["difference"] <= found["limit"]:
            raise MixError(
                f"mixing changes the scores of {name!r} by {found['difference']:.1e} of the "
                f"largest, where {found['limit']:.1e} is the limit (rounding noise "
                f"{found['noise']:.1e}). Call the domains one after another."
            )


class _Between(nn.Module):
    """One domain's scores out of a batch in which every other row is another domain's."""

    def __init__(self, mixed: Mixed, k: int, other: int, n_classes: int) -> None:
        super().__init__()
        self.mixed, self.pair, self.n_classes = mixed, torch.tensor([k, other]), n_classes

    def forward(self, images_bchw: Tensor) -> Tensor:
        twice = images_bchw.repeat_interleave(2, dim=0)
        return self.mixed.padded(twice, self.pair.repeat(len(images_bchw)))[::2, : self.n_classes]
