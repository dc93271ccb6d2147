"""How fast should an inner factor learn on ResNet-26, where PEFT's is a whole bank of 3x3 filters?

    python benchmarks/inner.py --workers 2          every cell that is missing, then the table

The small study's trainings (32 pixels, at most 320 images, from the linear probe's head); rates are
climbed as there, by its validation images. Accuracy is that on images that no training or choice
saw; test images are left alone. Needs ONETRUNK_DATA; results are appended to
benchmarks/results/inner.jsonl.
"""

import argparse
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ratios import at_best_rates, compared, setting_and_rest
from rows import add_missing, known
from torch import nn

import onetrunk as ot
from onetrunk.benchmark import cells
from onetrunk.benchmark.methods import read_method
from onetrunk.benchmark.protocol import SMALL, Tuning

RESULTS = Path(__file__).parent / "results" / "inner.jsonl"
TRUNK = "resnet26(width=0.5)"
PROTOCOL = dataclasses.replace(SMALL, size_px=32)
METHODS = ("lora(like='parallel', norms=True)", "lowrank(rank=12)")
RATIOS = (16.0, 1.0)  # the outer factor's rate over the inner one's: the studies', and one rate
DOMAINS = (
    "brain_mri", "clothing", "dtd", "gtsrb", "meter_digits", "satellite", "scene_chars",
    "sign_digits", "sketch", "trash",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """A method on a domain with its inner factor so many times slower."""

    method: str
    domain: str
    ratio: float
    seed: int = 0

    def run(self) -> dict[str, object]:
        """The accuracy at the rates that did best on validation images."""
        setting, held_out = setting_and_rest(self.domain, TRUNK, PROTOCOL, self.seed)

        def trained(tuning: Tuning) -> nn.Module:
            model = cells.fresh(read_method(self.method), setting)
            recipe = dataclasses.replace(
                PROTOCOL.recipe(tuning, self.seed, PROTOCOL.n_epochs(len(setting.train))),
                loraplus_lr_ratio=self.ratio,
            )
            for _ in ot.fit(model, setting.train, recipe, val=setting.val):
                pass
            return model

        facts = at_best_rates(trained, PROTOCOL.start, PROTOCOL, setting, held_out)
        return {**dataclasses.asdict(self), **facts}


def table() -> Iterator[str]:
    """Means over the domains that both ratios have."""
    found = {cell: 100 * row["accuracy"] for cell, row in known(RESULTS, Cell).items()}
    yield "| method | domains | 16 times slower, % | one rate, % | points | better on |"
    yield "|---|---:|---:|---:|---:|---:|"
    for method in METHODS:
        pairs = [
            tuple(found[Cell(method, domain, ratio)] for ratio in RATIOS)
            for domain in DOMAINS
            if all(Cell(method, domain, ratio) in found for ratio in RATIOS)
        ]
        if len(pairs) > 1:
            yield f"| `{method}` | {len(pairs)} | {compared(pairs)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=1, help="processes, a cell each")
    arguments = parser.parse_args()
    every = [Cell(m, domain, ratio) for m in METHODS for domain in DOMAINS for ratio in RATIOS]
    add_missing(RESULTS, every, arguments.workers)
    print("\n".join(table()))


if __name__ == "__main__":
    main()
