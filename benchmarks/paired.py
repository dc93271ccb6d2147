"""Two methods over the cells that both have: the comparisons of docs/results.

    python benchmarks/paired.py tf_efficientnet_lite0 "allocate(budget='1%')" "uniform(budget='1%')"

Reads the cells below benchmarks/results/ (`--of full`: of the study with every image; `--of
FOLDER`: of your own) and trains nothing.
"""

import argparse
import math
from collections import Counter
from pathlib import Path

import numpy as np

from onetrunk.benchmark.ledger import Ledger
from onetrunk.benchmark.report import read_rows
from onetrunk.benchmark.report.summary import REFERENCE, common, over_domains, paired, score

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("backbone", help="a part of its name; with @ to mean weights of a file")
    parser.add_argument("method")
    parser.add_argument("other")
    parser.add_argument("--other-backbone", help="the other method's, where it is another one")
    parser.add_argument("--per-class", type=int, help="of transfer: images a class, 0: all")
    parser.add_argument("--without", default="", help="domains, with commas between")
    parser.add_argument("--of", default="mini", help="whose cells: mini, full, or a study's --out")
    arguments = parser.parse_args()
    records = [r for r in ledger_of(arguments.of).read().values() if r["kind"] == "cell"]
    n_images = arguments.per_class
    every = [r for r in read_rows(records) if (r.study == "transfer") == (n_images is not None)]
    every = [r for r in every if r.per_class == (n_images or None)]
    every = [r for r in every if r.domain not in arguments.without.split(",")]
    of = by_method(every, arguments.backbone)
    other = by_method(every, arguments.other_backbone or arguments.backbone)
    for method, found in ((arguments.method, of), (arguments.other, other)):
        if method not in found:
            parser.error(f"no cell of {method!r} there; there are {', '.join(sorted(found))}")
    mine, theirs = of[arguments.method], other[arguments.other]
    reference = of.get(REFERENCE) or other.get(REFERENCE, [])
    tell("all seeds", mine, theirs)
    for seed in sorted({row.seed for row in mine}):
        pairs = common([row for row in mine if row.seed == seed], theirs)
        if not pairs:
            continue
        tell(f"seed {seed}", *map(list, zip(*pairs, strict=True)))
        for side in zip(*pairs, strict=True):
            points = score(list(side), reference)
            if points is not None:
                print(f"  S {points.total:.0f} of {points.reference:.0f}")
    print("learning rates of seed 0:", Counter(f"{r.lr:g}" for r in mine if not r.seed and r.lr))
    gains = domain_means(common(reference, of.get("head", [])))  # fine-tuning over the probe
    mean = domain_means(common(mine, theirs))
    for domain, points in sorted(mean.items(), key=lambda item: -item[1]):
        print(f"  {domain:14} {100 * points:+.1f}")
    both = sorted(mean.keys() & gains.keys())
    if len(both) > 1:
        correlation = np.corrcoef([mean[d] for d in both], [gains[d] for d in both])[0, 1]
        print(f"correlation with fine-tuning's gain over the probe: {correlation:+.2f}")


def by_method(rows: list, backbone: str) -> dict[str, list]:
    of: dict[str, list] = {}
    for row in rows:
        if is_backbone(backbone, row.backbone):
            of.setdefault(row.method, []).append(row)
    return of


def ledger_of(asked: str) -> Ledger:
    """Of a study below benchmarks/results/, or of a folder of one's own."""
    folder = RESULTS / asked if (RESULTS / asked).is_dir() else Path(asked)
    if not any(folder.glob("*.jsonl")):
        raise SystemExit(f"{folder} has no cells. Give mini, full or a study's --out.")
    return Ledger(folder)


def is_backbone(asked: str, name: str) -> bool:
    """Whether a part of `name` means it: with the weights of a file where there is an @ only."""
    return asked in name and ("@" in asked) == ("@" in name)


def tell(what: str, mine: list, theirs: list) -> None:
    found = paired(mine, theirs)
    low, high = found.interval or (math.nan, math.nan)  # of a single domain's single cell
    pairs = common(mine, theirs)
    wins = sum(points > 0 for points in domain_means(pairs).values())
    mean, other = (over_domains(side).mean for side in zip(*pairs, strict=True))
    print(
        f"{what}: {100 * found.mean:+.2f} points ({100 * low:+.1f} to {100 * high:+.1f}), "
        f"{mean / other:.4f} of the other's mean, higher on {wins} of {found.n_domains} domains"
    )


def domain_means(pairs: list) -> dict[str, float]:
    points: dict[str, list[float]] = {}
    for row, other in pairs:
        points.setdefault(row.domain, []).append(row.test_accuracy - other.test_accuracy)
    return {domain: float(np.mean(values)) for domain, values in points.items()}


if __name__ == "__main__":
    main()
