"""Which measure should spend a budget? Plans by each measure and one rank everywhere, at 1 %.

    python benchmarks/rules.py --workers 2          every cell that is missing, then the table

The small study's trainings at the recipe's rates, from the linear probe's head (at most 320
images; validation images choose the epoch), three seeds. Accuracy is that on images that no
training or choice saw; test images are left alone. Needs ONETRUNK_DATA; results are appended to
benchmarks/results/rules.jsonl.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ratios import accuracy_on, setting_and_rest
from rows import add_missing, known
from usual import domains

import onetrunk as ot
from onetrunk.benchmark import cells
from onetrunk.benchmark.methods import read_method
from onetrunk.benchmark.protocol import SMALL
from onetrunk.benchmark.report.summary import interval

RESULTS = Path(__file__).parent / "results" / "rules.jsonl"
SIZES_PX = {"resnet26(width=0.5)": 32, "timm:tf_efficientnet_lite0": 48}
DEFAULT = "allocate(budget='1%')"
PLANS = (
    DEFAULT,
    "allocate(budget='1%', by='gradient')",
    "allocate(budget='1%', by='trained')",
    "uniform(budget='1%')",
)
POINTWISE = "allocate(budget='1%', layers='auto')"  # ResNet-26 has no other layers than its own


def methods(backbone: str) -> tuple[str, ...]:
    return (*PLANS, POINTWISE) if backbone.startswith("timm:") else PLANS


@dataclass(frozen=True)
class Cell:
    """One plan on a domain of a backbone, trained once."""

    backbone: str
    method: str
    domain: str
    seed: int

    def run(self) -> dict[str, object]:
        """The accuracy on held-out images, how many they are, and the adapters' numbers."""
        protocol = dataclasses.replace(SMALL, size_px=SIZES_PX[self.backbone])
        setting, held_out = setting_and_rest(self.domain, self.backbone, protocol, self.seed)
        model = cells.fresh(read_method(self.method), setting)
        recipe = protocol.recipe(protocol.start, self.seed, protocol.n_epochs(len(setting.train)))
        for _ in ot.fit(model, setting.train, recipe, val=setting.val):
            pass
        return {
            **dataclasses.asdict(self),
            "accuracy": round(accuracy_on(model, held_out), 4),
            "images": sum(map(len, held_out)),
            "numbers": ot.cost(model).adapters,
        }


def table(backbone: str) -> Iterator[str]:
    """Means over the default's domains and seeds, of the measures that have them all."""
    found = {c: row for c, row in known(RESULTS, Cell).items() if c.backbone == backbone}
    places = sorted((c.domain, c.seed) for c in found if c.method == DEFAULT)
    shown = [
        method
        for method in methods(backbone)
        if all(Cell(backbone, method, *place) in found for place in places)
    ]
    n_domains = len({domain for domain, _ in places})
    if n_domains < 2:
        return
    yield f"{backbone}: {n_domains} domains, seeds {sorted({seed for _, seed in places})}"
    yield "| plan | adapters' numbers | accuracy, % | against the default, points | better on |"
    yield "|---|---:|---:|---:|---:|"
    for method in shown:
        rows = {place: found[Cell(backbone, method, *place)] for place in places}
        gains = list(_gains(rows, {p: found[Cell(backbone, DEFAULT, *p)] for p in places}))
        low, high = interval(gains) or (0.0, 0.0)
        against = f"{statistics.mean(gains):+.1f} ({low:+.1f} to {high:+.1f})"
        better = f"{sum(gain > 0 for gain in gains)} of {len(gains)}"
        numbers = statistics.mean(row["numbers"] for row in rows.values())
        yield (
            f"| `{method}` | {numbers:,.0f} | {_mean(rows):.1f} "
            f"| {'' if method == DEFAULT else against} | {'' if method == DEFAULT else better} |"
        )


def _gains(rows: dict, default: dict) -> Iterator[float]:
    """Points over the default measure, a domain each: means over its seeds."""
    for domain in dict.fromkeys(domain for domain, _ in rows):
        of_domain = [place for place in rows if place[0] == domain]
        yield _mean({p: rows[p] for p in of_domain}) - _mean({p: default[p] for p in of_domain})


def _mean(rows: dict) -> float:
    return 100 * statistics.mean(row["accuracy"] for row in rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=1, help="processes, a cell each")
    parser.add_argument("--backbone", choices=SIZES_PX, action="append", help="default: both")
    parser.add_argument("--seeds", default="0,1,2", help="0,1,2")
    arguments = parser.parse_args()
    backbones = arguments.backbone or list(SIZES_PX)
    every = [
        Cell(backbone, method, domain, int(seed))
        for seed in arguments.seeds.split(",")
        for backbone in backbones
        for domain in domains()
        for method in methods(backbone)
    ]
    add_missing(RESULTS, every, arguments.workers)
    for backbone in backbones:
        print("\n".join(table(backbone)))


if __name__ == "__main__":
    main()
