"""Plans that are made for one cell: by measured sensitivity, and the uniform one beside it."""

import functools

from torch import nn

from ..core.adapters import Parallel
from ..core.allocate import allocate, uniform
from ..core.plan import Layers, Plan, Where
from ..training.fit import fit
from ..training.probe import linear_probe, start_from_probe
from ..training.sensitivity import By, sensitivity
from .setting import Setting


@functools.lru_cache(maxsize=2)  # a cell's trials share one plan
def allocated_plan(setting: Setting, budget: str, by: By, layers: Layers) -> Plan:
    """The plan that `allocate` makes for the cell's domain, measured on its training images."""
    where = Where(layers=layers)
    model = _trained_in_full(setting, where) if by == "trained" else probed(setting)
    found = sensitivity(model, setting.train, by=by, where=where)
    return allocate(setting.backbone, found, budget, where).plan


def uniform_plan(setting: Setting, budget: str) -> Plan:
    """One rank everywhere at that budget."""
    return uniform(setting.backbone, budget, input_size=setting.input_size).plan


@functools.lru_cache(maxsize=2)  # a cell's trainings start from one probe
def probed(setting: Setting) -> nn.Module:
    """The linear probe on the cell's images."""
    return linear_probe(
        setting.backbone, setting.train, setting.val, setting.classes,
        preprocessing=setting.preprocessing,
    )  # fmt: skip


def _trained_in_full(setting: Setting, where: Where) -> nn.Module:
    """A domain with a whole matrix beside every layer, trained to its last epoch.

    Not to the best one on validation images: where that is the start, every matrix is zero.
    """
    model = setting.attach(Parallel(), where)
    start_from_probe(model, probed(setting))
    for _ in fit(model, setting.train, setting.recipe):
        pass
    return model
