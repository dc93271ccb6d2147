"""Rates of the head and of an adapter's inner factor: candidates x domains, 200 steps each.

    python benchmarks/ratios.py --workers 2         every cell that is missing, then the table

The small study's trainings (EfficientNet-Lite0, 48 pixels, at most 320 images, from the linear
probe's head; its validation images choose the epoch). Accuracy is that on images that neither
saw: at most 400 each of the rest of a domain's training and validation images. Test images are
left alone. Needs ONETRUNK_DATA; results are appended to benchmarks/results/ratios.jsonl.
"""

import argparse
import dataclasses
import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from rows import add_missing, known

import onetrunk as ot
from onetrunk.benchmark import cells
from onetrunk.benchmark.allocated import probed
from onetrunk.benchmark.methods import read_method
from onetrunk.benchmark.protocol import SMALL, Protocol, Tuning
from onetrunk.benchmark.report.summary import interval
from onetrunk.benchmark.setting import Setting
from onetrunk.benchmark.studies import BASE
from onetrunk.data import Prepared
from onetrunk.errors import DivergedError

DATA = Path(os.environ.get("ONETRUNK_DATA", "../shared/data/mini-decathlon"))
RESULTS = Path(__file__).parent / "results" / "ratios.jsonl"
TRUNK = "timm:tf_efficientnet_lite0"
N_HELD_OUT = 400


@dataclass(frozen=True)
class Candidate:
    """One way of training: the rates of head and U, over the recipe's and over V's."""

    method: str
    head: float = 1.0
    inner: float = 1.0
    domain: str = ""

    def on(self, domain: str) -> "Candidate":
        return dataclasses.replace(self, domain=domain)

    def run(self) -> dict[str, object]:
        """The accuracy on held-out images, and how many they are."""
        setting, held_out = setting_and_rest(self.domain)
        if self.method == "head":
            model = probed(setting)
        else:
            model = cells.fresh(read_method(self.method), setting)
            epochs = SMALL.n_epochs(len(setting.train))
            recipe = dataclasses.replace(
                SMALL.recipe(SMALL.start, 0, epochs),
                head_lr_ratio=self.head, loraplus_lr_ratio=self.inner,
            )  # fmt: skip
            graphed = torch.cuda.is_available()
            for _ in ot.fit(model, setting.train, recipe, val=setting.val, graphed=graphed):
                pass
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        facts = {"accuracy": round(accuracy_on(model, held_out), 4), "machine": device}
        return {**dataclasses.asdict(self), **facts, "images": sum(map(len, held_out))}


ADAPTERS = "lowrank(rank=16)"
CANDIDATES = [
    Candidate("head"),
    *(
        Candidate(ADAPTERS, *ratios)
        for ratios in ((1.0, 1.0), (0.2, 16.0), (0.2, 4.0), (1.0, 16.0))
    ),
]


def accuracy_on(model: torch.nn.Module, parts: list[Prepared]) -> float:
    right = sum(ot.evaluate(model, part).accuracy * len(part) for part in parts)
    return right / sum(map(len, parts))


@lru_cache(maxsize=4)
def setting_and_rest(
    domain: str, trunk: str = TRUNK, protocol: Protocol = SMALL, seed: int = 0
) -> tuple[Setting, list[Prepared]]:
    """What a cell of a study starts from, and some of the images that it does not use."""
    cell = cells.Cell("ratios", cells.Trunk(trunk), str(DATA), domain, "head", seed, protocol)
    setting, splits = cells.setting_of(cell), cells._splits(cell.data, domain)
    drawn = seed if protocol.per_class is not None else 0
    held_out = []
    for split, images in (("train", splits.train), ("val", splits.val)):
        names = set(cells.subset(images, *cells._subset_size(protocol, split), drawn).names)
        rest = [row for row, name in enumerate(images.names) if name not in names]
        order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(1))
        rows = sorted(rest[place] for place in order[:N_HELD_OUT].tolist())
        held_out += [Prepared(images.subset(rows), setting.preprocessing)] if rows else []
    return setting, held_out


def at_best_rates(
    trained: Callable[[Tuning], torch.nn.Module],
    start: Tuning,
    protocol: Protocol,
    setting: Setting,
    held_out: list[Prepared],
) -> dict[str, float]:
    """The accuracy on held-out images at the rates that a climb on validation images comes to."""
    found: dict[Tuning, tuple[float, float]] = {}

    def val_accuracy(tuning: Tuning) -> float:
        if tuning not in found:
            found[tuning] = 0.0, 0.0  # of a training that diverges
            with suppress(DivergedError):
                model = trained(tuning)
                val = ot.evaluate(model, setting.val).accuracy
                found[tuning] = val, accuracy_on(model, held_out)
        return found[tuning][0]

    best = protocol.climbed(val_accuracy, start)
    val, accuracy = found[best]
    facts = {"factor": best.factor, "val_accuracy": val, "accuracy": round(accuracy, 4)}
    return {**facts, "images": sum(map(len, held_out))}


def compared(pairs: list[tuple[float, float]]) -> str:
    """Both means, the second's gain over the first with its interval, and on how many it is one."""
    gains = [other - one for one, other in pairs]
    low, high = interval(gains) or (0.0, 0.0)
    means = " | ".join(f"{statistics.mean(side):.1f}" for side in zip(*pairs, strict=True))
    return (
        f"{means} | {statistics.mean(gains):+.1f} ({low:+.1f} to {high:+.1f}) "
        f"| {sum(gain > 0 for gain in gains)}"
    )


def table(domains: list[str]) -> Iterator[str]:
    """Means over the domains that a candidate has, and against the same method at one rate."""
    found = {job: row["accuracy"] for job, row in known(RESULTS, Candidate).items()}
    probe, plain = CANDIDATES[0], CANDIDATES[1]
    yield "| method | head | U over V | domains | mean | against one rate | worst to the probe |"
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for candidate in CANDIDATES:
        there = {d: 100 * found[candidate.on(d)] for d in domains if candidate.on(d) in found}
        if there:
            gains = [there[d] - 100 * found[plain.on(d)] for d in there]
            low, high = interval(gains) or (0.0, 0.0)
            worst = min(there[d] - 100 * found[probe.on(d)] for d in there)
            yield (
                f"| {candidate.method} | {candidate.head:g} | {candidate.inner:g} | {len(there)} "
                f"| {statistics.mean(there.values()):.1f} "
                f"| {statistics.mean(gains):+.1f} ({low:+.1f} to {high:+.1f}) | {worst:+.1f} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=1, help="processes, a domain each")
    arguments = parser.parse_args()
    domains = sorted(p.name for p in DATA.iterdir() if p.is_dir() and p.name != BASE)
    add_missing(RESULTS, [c.on(d) for d in domains for c in CANDIDATES], arguments.workers)
    print("\n".join(table(domains)))


if __name__ == "__main__":
    main()
