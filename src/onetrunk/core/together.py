"""Several domains' own networks behind one forward in training: `mix` in train mode.

The shared layers run once over the whole batch, whose rows are sorted by domain. Adapters, norms
and classifiers are the domains' own live modules, each over its own rows: batch norms take their
statistics there, and gradients arrive where each domain's optimiser looks for them.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import MixError
from .adapted import Adapted
from .domain import domain_of, trains_basis
from .mixable import base_tree, check_own, check_rows, check_shares
from .tree import Frozen, draws, is_norm, replace_modules

Drawing = Callable[[int], AbstractContextManager[None]]  # of a domain: its own random numbers


class Together(nn.Module):
    """The networks of several domains of one backbone as one, to be trained in one batch.

    It holds their own modules: to train it is to train them. What is random in a domain is drawn
    by itself, over its own rows, in the order in which its own network would draw it.

    Args:
        models: name -> a domain's network.

    Raises:
        MixError: for domains that do not share a backbone, a family that does not share its layers
            (`full`), and domains over a basis that is trained with them.
        AttachError: where a module is no domain's network.
    """

    def __init__(self, models: Mapping[str, nn.Module]) -> None:
        super().__init__()
        if not models:
            raise MixError("there is no domain to train: give at least one.")
        networks = list(models.values())
        first, heads = networks[0], set(domain_of(networks[0]).head)
        base = base_tree(first)
        norms = {path for path, module in base.named_modules() if is_norm(module)} - heads
        drawn = {
            path
            for path, module in base.named_modules()
            if draws(module) and next(module.children(), None) is None
        }
        sites = {
            path
            for model in networks
            for path, module in model.named_modules()
            if isinstance(module, Adapted)
        }
        for name, model in models.items():
            check_shares(name, model, first)
            check_own(name, model, sites | norms | heads)
            if trains_basis(model):
                raise MixError(
                    f"domain {name!r} trains the basis that it shares, which one step of several "
                    "optimisers would move several times: train such domains with fit_jointly."
                )
        check_rows(base, sites | norms | heads, domain_of(first))
        self._batch = _Batch()
        n_classes = [len(domain_of(model).classes) for model in networks]
        made: dict[str, nn.Module] = {}
        for path in sites | norms | heads | drawn:
            own = [model.get_submodule(path) for model in networks]
            if path in sites:
                made[path] = _Site(base.get_submodule(path), own, self._batch)
            elif path in heads:
                made[path] = _Heads(own, self._batch, max(n_classes))
            elif all(isinstance(module, Frozen) for module in own):
                made[path] = own[0]  # the backbone's own, in eval mode
            else:
                made[path] = _Own(own, self._batch)
        replace_modules(base, made)
        self.network, self._n_classes = base, n_classes
        modes = [(module, module.training) for model in networks for module in model.modules()]
        self.network.train()
        for module, mode in modes:  # the domains' own modules have their own
            module.training = mode

    def forward(
        self, images_bchw: Tensor, sizes: Sequence[int], drawing: Drawing | None = None
    ) -> list[Tensor]:
        """The scores of each domain's rows: (size, classes) for every domain that has rows.

        Args:
            images_bchw: the domains' images one after another.
            sizes: how many rows each domain has, in the domains' order; 0 where it has none.
            drawing: entered, by place of the domain, around whatever draws random numbers.

        Raises:
            MixError: where the sizes are not those of the batch, and where something random was
                drawn that cannot be told apart by domain.
        """
        if len(sizes) != len(self._n_classes) or sum(sizes) != len(images_bchw) or min(sizes) < 0:
            raise MixError(
                f"{len(images_bchw)} images for {len(self._n_classes)} domains with {list(sizes)} "
                "rows: give each domain's number of rows, which together are the batch."
            )
        self._batch.sizes, self._batch.drawing = tuple(sizes), drawing or _as_it_comes
        before = _random_state(images_bchw)
        scores_bc = self.network(images_bchw)
        if drawing is not None and not torch.equal(before, _random_state(images_bchw)):
            raise MixError(
                "the network draws random numbers outside of its dropout modules, so no domain's "
                "are its own. Build the backbone without (drop_rate=0), or train with fit."
            )
        scores_bc = scores_bc if isinstance(scores_bc, Tensor) else scores_bc[0]
        parts = self._batch.parts(scores_bc)
        return [part[:, : self._n_classes[k]] for k, part in parts]


def _random_state(like: Tensor) -> Tensor:
    if like.device.type == "cuda":
        return torch.cuda.get_rng_state(like.device)
    return torch.mps.get_rng_state() if like.device.type == "mps" else torch.get_rng_state()


def _as_it_comes(_place: int) -> AbstractContextManager[None]:
    return nullcontext()


class _Batch:
    """The rows of the batch that is under way, by domain."""

    sizes: tuple[int, ...] = ()
    drawing: Drawing = staticmethod(_as_it_comes)

    def parts(self, x: Tensor) -> list[tuple[int, Tensor]]:
        """(place of the domain, its rows) for those that have any; windows stay with their image.

        Raises:
            MixError: where the rows are no multiple of the batch.
        """
        n_images = sum(self.sizes)
        factor, rest = divmod(len(x), n_images)
        if rest:
            raise MixError(
                f"inside the network a batch of {n_images} becomes {len(x)} rows, which is no "
                "multiple: which domain a row belongs to is unknown there. Train this backbone's "
                "domains one after another."
            )
        pieces = x.split([size * factor for size in self.sizes])
        return [(k, piece) for k, piece in enumerate(pieces) if self.sizes[k]]


class _Own(nn.Module):
    """The domains' own modules at one place, each over its own rows."""

    def __init__(self, own: Sequence[nn.Module], batch: _Batch) -> None:
        super().__init__()
        self.own, self.batch = nn.ModuleList(own), batch
        self.draws = [
            any(draws(m) or getattr(m, "dropout", 0) for m in module.modules()) for module in own
        ]

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.called(k, self.own[k], x_k) for k, x_k in self.batch.parts(x)])

    def called(self, k: int, module: Any, *args: Tensor) -> Tensor:
        """`module` of domain `k`, which draws its own random numbers if any."""
        if not self.draws[k]:
            return module(*args)
        with self.batch.drawing(k):
            return module(*args)


class _Heads(_Own):
    """The domains' classifiers; zeros behind the classes of those that have fewer."""

    def __init__(self, own: Sequence[nn.Module], batch: _Batch, n_most: int) -> None:
        super().__init__(own, batch)
        self.n_most = n_most

    def called(self, k: int, module: Any, *args: Tensor) -> Tensor:
        y = super().called(k, module, *args)
        conv = isinstance(module, nn.Conv2d)
        missing = self.n_most - y.shape[1 if conv else -1]
        return F.pad(y, (0, 0, 0, 0, 0, missing) if conv else (0, missing))


class _Site(_Own):
    """A shared layer over the whole batch, and each domain's adapter over its own rows."""

    def __init__(self, layer: nn.Module, own: Sequence[nn.Module], batch: _Batch) -> None:
        super().__init__(own, batch)
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        corrected = []
        for (k, x_k), (_, y_k) in zip(self.batch.parts(x), self.batch.parts(y), strict=True):
            own = self.own[k]
            adapted = isinstance(own, Adapted)
            corrected.append(self.called(k, own.beside, x_k, y_k) if adapted else y_k)
        return torch.cat(corrected)
