"""Memory against the number of domains: bytes of distinct storages, beside one backbone."""

from collections.abc import Mapping
from typing import Any

from ...core.adapters import LowRank
from ...core.domain import delta
from ...core.merge import merge
from ...core.mix import mix
from .mixed import RANK, network_bytes
from .subjects import Subject

N_DOMAINS = (1, 4, 16, 64, 256)


def records(subject: Subject, numbers: tuple[int, ...] = ()) -> list[dict[str, Any]]:
    """Bytes by number of domains: attached, mixed, and as many merged networks."""
    numbers = numbers or N_DOMAINS
    every = {f"domain {k}": subject.domain(LowRank(RANK), k).eval() for k in range(max(numbers))}
    model = every["domain 0"]
    own = sum(t.numel() * t.element_size() for t in delta(model).values())
    merged = network_bytes(merge(model))
    backbone = network_bytes(subject.backbone)
    found = []
    for n in numbers:
        models = dict(list(every.items())[:n])
        held: Mapping[str, int] = {
            "attached": network_bytes(subject.backbone, *models.values()),
            "mixed": network_bytes(subject.backbone, mix(models)),
            "merged networks": n * merged,
        }
        found.append(
            {
                "kind": "memory", "title": subject.title, "n_domains": n, "bytes": dict(held),
                "backbone": backbone, "deltas": n * own,
            }
        )  # fmt: skip
    return found
