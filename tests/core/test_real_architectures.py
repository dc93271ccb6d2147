"""Forty of timm's architectures keep the laws: the sweep's fixed sample, the families in turn.

`python benchmarks/sweep.py --all` runs every family over every small CNN; see docs/support.md.
"""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


def _sweep() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "sweep.py"
    spec = importlib.util.spec_from_file_location("sweep", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sweep = _sweep()


def test_the_sample_is_forty_different_models() -> None:
    assert len(set(sweep.SAMPLE)) == len(sweep.SAMPLE) == 40


ALTERNATING = [
    (name, tuple(sweep.TRIED)[k % len(sweep.TRIED)]) for k, name in enumerate(sweep.SAMPLE)
]


@pytest.mark.filterwarnings("ignore:Overwriting .* in registry:UserWarning")
@pytest.mark.parametrize(("name", "family"), ALTERNATING)
def test_a_real_architecture_keeps_the_laws(name: str, family: str) -> None:
    row = sweep.check(name, tried=(family,))
    assert sweep.problems(row) == []
    assert row["isolated"] and row["sites"] > 0
    placed = sweep.TRIED[family][1] is not None
    if placed and family != "lowrank(rank=4)":  # a rank that depthwise layers do not have
        assert row["families"][family]["n"] == row["sites"]
