"""One vision network, many domains: a frozen backbone shared by every domain, a few numbers each.

    import timm, onetrunk as ot

    backbone = timm.create_model("resnet18.a1_in1k", pretrained=True)
    flowers = ot.attach(backbone, ot.Parallel(), classes=["daisy", "rose"])
    for step in ot.fit(flowers, train_set):
        ...
    ot.Bank.create("garden.bank", backbone).add("flowers", flowers)
    plain = ot.merge(flowers)

Nothing happens on import: each name loads its module when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "OnetrunkError": "errors",
    "backbone": "backbones",
    "attach": "core.attach",
    "merge": "core.merge",
    "mix": "core.mix",
    "compress": "core.compress",
    "allocate": "core.allocate",
    "cost": "core.cost",
    "Where": "core.plan",
    "Series": "core.adapters",
    "Parallel": "core.adapters",
    "LowRank": "core.adapters",
    "Channelwise": "core.adapters",
    "Norm": "core.adapters",
    "Full": "core.adapters",
    "Head": "core.adapters",
    "read_family": "core.adapters",
    "fit": "training.fit",
    "fit_together": "training.together",
    "cached": "training.cached",
    "recomputed": "training.recomputed",
    "Recipe": "training.recipe",
    "PAPER": "training.recipe",
    "RELEASED": "training.recipe",
    "read_recipe": "training.recipe",
    "evaluate": "training.evaluate",
    "predict": "training.predict",
    "Bank": "bank.bank",
}

__all__ = ["__version__", *_WHERE]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'onetrunk' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    from .backbones import backbone as backbone
    from .bank.bank import Bank as Bank
    from .core.adapters import Channelwise as Channelwise
    from .core.adapters import Full as Full
    from .core.adapters import Head as Head
    from .core.adapters import LowRank as LowRank
    from .core.adapters import Norm as Norm
    from .core.adapters import Parallel as Parallel
    from .core.adapters import Series as Series
    from .core.adapters import read_family as read_family
    from .core.allocate import allocate as allocate
    from .core.attach import attach as attach
    from .core.compress import compress as compress
    from .core.cost import cost as cost
    from .core.merge import merge as merge
    from .core.mix import mix as mix
    from .core.plan import Where as Where
    from .errors import OnetrunkError as OnetrunkError
    from .training.cached import cached as cached
    from .training.evaluate import evaluate as evaluate
    from .training.fit import fit as fit
    from .training.predict import predict as predict
    from .training.recipe import PAPER as PAPER
    from .training.recipe import RELEASED as RELEASED
    from .training.recipe import Recipe as Recipe
    from .training.recipe import read_recipe as read_recipe
    from .training.recomputed import recomputed as recomputed
    from .training.together import fit_together as fit_together
