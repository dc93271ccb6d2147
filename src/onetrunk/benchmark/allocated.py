"""Plans that are made for one cell: by measured sensitivity, and the uniform one beside it."""

import functools

from ..core.allocate import allocate, uniform
from ..core.plan import Plan
from ..training.probe import linear_probe
from ..training.sensitivity import By, sensitivity
from .setting import Setting


@functools.lru_cache(maxsize=2)  # a cell's trials share one plan
def allocated_plan(setting: Setting, budget: str, by: By) -> Plan:
    """The plan that `allocate` makes for the cell's domain, measured on its training images."""
    probed = linear_probe(
        setting.backbone, setting.train, setting.val, setting.classes,
        preprocessing=setting.preprocessing,
    )  # fmt: skip
    found = sensitivity(probed, setting.train, by=by)
    return allocate(setting.backbone, found, budget).plan


def uniform_plan(setting: Setting, budget: str) -> Plan:
    """One rank everywhere at that budget."""
    return uniform(setting.backbone, budget, input_size=setting.input_size).plan
