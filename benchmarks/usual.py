"""Does fine-tuning need its careful start? Adapters and fine-tuning as usual and as in the studies.

    python benchmarks/usual.py --workers 2          every cell that is missing, then the table

As usual: a fresh head, one rate for all, each batch's statistics. As in the studies: from the
linear probe's head, which learns at a fifth of the rate, at the backbone's statistics. Five images
a class on EfficientNet-Lite0; the studies' search over learning rates, by validation images.
Accuracy is that on images that no training or choice saw; test images are left alone. Needs
ONETRUNK_DATA; results are appended to benchmarks/results/usual.jsonl.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ratios import DATA, at_best_rates, compared, setting_and_rest
from rows import add_missing, known
from torch import nn

import onetrunk as ot
from onetrunk.benchmark import cells
from onetrunk.benchmark.methods import read_method
from onetrunk.benchmark.protocol import SMALL, Tuning
from onetrunk.benchmark.report.summary import interval
from onetrunk.benchmark.studies import BASE

RESULTS = Path(__file__).parent / "results" / "usual.jsonl"
PROTOCOL = dataclasses.replace(SMALL, per_class=5, keep="late")
LEFT_OUT = (BASE, "omniglot")
METHODS = ("full", "lowrank(rank=16)")


@dataclass(frozen=True)
class Cell:
    """A method on a domain, trained one way."""

    method: str
    domain: str
    usual: bool
    seed: int = 0

    def run(self) -> dict[str, object]:
        """The accuracy at the rates that did best on validation images."""
        setting, held_out = setting_and_rest(self.domain, protocol=PROTOCOL, seed=self.seed)
        start = dataclasses.replace(PROTOCOL.start, statistics="batch" if self.usual else "running")
        facts = at_best_rates(
            lambda tuning: self.trained(setting, tuning), start, PROTOCOL, setting, held_out
        )
        return {**dataclasses.asdict(self), **facts}

    def trained(self, setting: cells.Setting, tuning: Tuning) -> nn.Module:
        recipe = PROTOCOL.recipe(tuning, self.seed, PROTOCOL.n_epochs(len(setting.train)))
        if self.usual:
            model = read_method(self.method).make(setting)
            recipe = dataclasses.replace(recipe, head_lr_ratio=1.0, loraplus_lr_ratio=1.0)
        else:
            model = cells.fresh(read_method(self.method), setting)
        for _ in ot.fit(model, setting.train, recipe, val=setting.val):
            pass
        return model


def domains() -> list[str]:
    return sorted(p.name for p in DATA.iterdir() if p.is_dir() and p.name not in LEFT_OUT)


def table() -> Iterator[str]:
    """Means over the domains that both methods have, and adapters against fine-tuning."""
    found = {cell: row["accuracy"] for cell, row in known(RESULTS, Cell).items()}
    yield "| trained | domains | fine-tuning, % | low-rank, % | points | better on |"
    yield "|---|---:|---:|---:|---:|---:|"
    for usual in (True, False):
        pairs = [
            tuple(100 * found[Cell(method, domain, usual)] for method in METHODS)
            for domain in domains()
            if all(Cell(method, domain, usual) in found for method in METHODS)
        ]
        if len(pairs) > 1:
            trained = "as usual" if usual else "as in the studies"
            yield f"| {trained} | {len(pairs)} | {compared(pairs)} |"
    yield ""
    both = [
        domain
        for domain in domains()
        if all(
            Cell(method, domain, usual) in found for method in METHODS for usual in (True, False)
        )
    ]
    for method in METHODS if len(both) > 1 else ():
        gains = [100 * (found[Cell(method, d, False)] - found[Cell(method, d, True)]) for d in both]
        low, high = interval(gains) or (0.0, 0.0)
        yield (
            f"{method}, the studies' training over the usual one: {statistics.mean(gains):+.1f} "
            f"({low:+.1f} to {high:+.1f}), {len(both)} domains"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=1, help="processes, a cell each")
    arguments = parser.parse_args()
    every = [
        Cell(method, domain, usual)
        for domain in domains()
        for usual in (True, False)
        for method in METHODS
    ]
    add_missing(RESULTS, every, arguments.workers)
    print("\n".join(table()))


if __name__ == "__main__":
    main()
