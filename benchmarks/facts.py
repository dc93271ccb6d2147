"""What the small study's cells say beside test accuracy, method by method.

    python benchmarks/facts.py tf_efficientnet_lite0 "allocate(budget='8%')" "lowrank(rank=16)"

Mean validation accuracy, of compressed domains before their tuning too (seed 0), and the share of
the adapters' numbers that each block has (all seeds). Reads benchmarks/results/mini/cells.jsonl and
trains nothing.
"""

import argparse
from collections import Counter

import numpy as np
from paired import LEDGER

from onetrunk.benchmark.ledger import Ledger


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("backbone", help="a part of its name")
    parser.add_argument("methods", nargs="+")
    arguments = parser.parse_args()
    cells = [r for r in Ledger(LEDGER).read().values() if r["kind"] == "cell"]
    cells = [r for r in cells if arguments.backbone in r["backbone"] and r["study"] != "transfer"]
    for method in arguments.methods:
        tell(method, [r for r in cells if r["method"] == method])


def tell(method: str, cells: list[dict]) -> None:
    first = [r for r in cells if r["seed"] == 0]
    print(f"{method}: {len(cells)} cells, {len(first)} of seed 0")
    for key in ("untuned_val_accuracy", "val_accuracy"):
        if known := [100 * r[key] for r in first if key in r]:
            print(f"  {key:20} {np.mean(known):.1f}")
    shares: Counter[str] = Counter()
    for record in cells:
        sites = record["site_numbers"] or {}
        for site, numbers in sites.items():
            shares[".".join(site.split(".")[:2])] += numbers / sum(sites.values()) / len(cells)
    for block, share in shares.items():
        print(f"  {block:20} {share:.1%}")


if __name__ == "__main__":
    main()
