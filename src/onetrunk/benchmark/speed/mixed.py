"""A batch of many domains: mix, PEFT's `adapter_names`, merged networks one after another.

The reference is the plain backbone over the whole batch. The limit counts multiply-adds: those of
the backbone, and of each row's own corrections.
"""

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ...core.adapters import LowRank, Parallel
from ...core.adapters.base import Family
from ...core.domain import domain_of
from ...core.merge import merge
from ...core.mix import mix
from ...core.trace import trace
from ...errors import OnetrunkError
from .rounds import Call, Contest
from .subjects import Subject, peft, quiet

REFERENCE = "plain backbone"
BATCH, RANK = 64, 8
N_DOMAINS = (1, 2, 4, 8, 16, 64, 256)
MOST_MERGED, MOST_PEFT = 16, 64  # copies of a network, PEFT's modules: their memory and time
FULL, LOW = "mix, parallel", f"mix, rank {RANK}"


def contests(
    subject: Subject, batch: int = BATCH, numbers: tuple[int, ...] = N_DOMAINS
) -> Iterator[Contest]:
    """Batches of a growing number of domains on one backbone."""
    x_bchw = subject.images(batch)
    limits = {FULL: _limit(subject, Parallel()), LOW: _limit(subject, LowRank(RANK))}
    for n in numbers:
        index_b = (torch.arange(batch) % n).to(x_bchw.device)
        calls: dict[str, Call] = {REFERENCE: _call(subject.backbone, x_bchw)}
        for name, family in ((FULL, Parallel()), (LOW, LowRank(RANK))):
            if name == FULL and n > MOST_PEFT:
                continue
            calls[name] = _mixed(subject, family, n, x_bchw, index_b)
        skipped: dict[str, str] = {}
        if n <= MOST_MERGED:
            calls["merged, one after another"] = _one_by_one(subject, n, x_bchw, index_b)
        if n <= MOST_PEFT:
            try:
                calls |= _peft(subject, n, x_bchw, index_b)
            except OnetrunkError as error:
                skipped["PEFT"] = str(error)
        there = f"{batch} of " if n > batch else ""  # a row each: the others wait for their turn
        title = f"{subject.title}, {there}{n} domain{'s' * (n > 1)} in a batch of {batch}"
        yield Contest("mixed", title, REFERENCE, calls, limits, skipped=skipped)


def _call(network: Callable[..., object], *args: object) -> Call:
    @torch.inference_mode()
    def forward() -> None:
        network(*args)

    return forward


def _mixed(subject: Subject, family: Family, n: int, x_bchw: Tensor, index_b: Tensor) -> Call:
    models = {f"domain {k}": subject.domain(family, k).eval() for k in range(n)}
    return _call(mix(models).padded, x_bchw, index_b)


def _one_by_one(subject: Subject, n: int, x_bchw: Tensor, index_b: Tensor) -> Call:
    merged = [merge(subject.domain(LowRank(RANK), k).eval()) for k in range(n)]
    networks = [network.to(memory_format=torch.channels_last) for network in merged]
    rows = [(index_b == k).nonzero().flatten() for k in range(n)]

    def run() -> None:
        for network, own in zip(networks, rows, strict=True):
            network(x_bchw[own])

    return _call(run)


def _peft(subject: Subject, n: int, x_bchw: Tensor, index_b: Tensor) -> dict[str, Call]:
    """PEFT over the same layers, mixed and split by domain; its networks share norms and head.

    At equal rank: its inner factor of a k x k convolution is k x k too, where ours is 1 x 1.
    """
    library = peft()
    sites = list(domain_of(subject.domain(LowRank(RANK))).plan)
    config = library.LoraConfig(r=RANK, target_modules=sites)
    with quiet():
        model = library.get_peft_model(copy.deepcopy(subject.backbone), config, "domain 0")
        for k in range(1, n):
            model.add_adapter(f"domain {k}", config)
    names = [f"domain {k}" for k in index_b.tolist()]
    model.eval()
    rows = {f"domain {k}": (index_b == k).nonzero().flatten() for k in range(n)}

    def split() -> None:
        for name, own in rows.items():
            if len(own):
                model.set_adapter(name)
                model(x_bchw[own])

    return {
        f"PEFT adapter_names, rank {RANK}": _call(lambda: model(x_bchw, adapter_names=names)),
        f"PEFT set_adapter and split, rank {RANK}": _call(split),
    }


def _limit(subject: Subject, family: Family) -> float:
    """Multiply-adds with corrections over those without."""
    plan = domain_of(subject.domain(family)).plan
    sites = trace(subject.backbone, (3, subject.size_px, subject.size_px)).sites
    whole = sum(site.multiply_adds for site in sites)
    own = sum(s.positions * plan[s.name].n_numbers(s) for s in sites if s.name in plan)
    return (whole + own) / whole


def network_bytes(*modules: nn.Module) -> int:
    """Bytes of the distinct storages that modules hold together."""
    tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
