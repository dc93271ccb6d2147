"""One training step: fine-tuning, head only, adapters beside their layers and folded, PEFT's LoRA.

The limit: a step multiplies forward, for the inputs' gradient and for the weights'. Adapters spare
the last but for their own numbers; a probe spares both, as nothing below the head is trained.
"""

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.adapters import Full, Head, LowRank, Norm, Parallel
from ...core.domain import domain_of
from ...core.trace import trace
from ...errors import OnetrunkError
from ...training.recomputed import recomputed
from .rounds import Call, Contest
from .subjects import CLASSES, Subject, peft, quiet, take_apart

BATCH, RANK = 32, 8
RECOMPUTED = 2  # blocks, the first: their maps are the largest
REFERENCE = "fine-tuning"


def contests(subject: Subject, batch: int = BATCH) -> Iterator[Contest]:
    """Training steps on one backbone."""
    default = subject.domain(None)
    dense = isinstance(next(iter(domain_of(default).plan.values())), Parallel)
    adapter = "parallel" if dense else str(domain_of(default).family)
    models = {
        REFERENCE: subject.domain(Full()),
        "head only": subject.domain(Head()),
        f"{adapter}, beside the layer": take_apart(subject.domain(None)),
        adapter: default,
        f"lowrank(rank={RANK})": subject.domain(LowRank(RANK), 1) if dense else None,
    }
    skipped: dict[str, str] = {}
    less = f"{adapter}, {RECOMPUTED} blocks recomputed"
    try:
        models[less] = recomputed(subject.domain(None, 2), RECOMPUTED)
    except OnetrunkError as error:
        skipped[less] = str(error)
    lora = "PEFT LoRA, equal numbers"
    try:
        models[lora] = _lora(subject, default)
    except OnetrunkError as error:
        skipped[lora] = str(error)
    present = {name: model for name, model in models.items() if model is not None}
    x_bchw = subject.images(batch)
    calls = {name: training_step(model, x_bchw) for name, model in present.items()}
    yield Contest(
        "step", f"{subject.title}, batch {batch}", REFERENCE, calls,
        limits=_limits(subject, adapter),
        bytes={name: peak_bytes(model, x_bchw) for name, model in present.items()},
        skipped=skipped,
    )  # fmt: skip


def _lora(subject: Subject, twin: nn.Module) -> nn.Module:
    """PEFT's LoRA at about as many numbers, norms and head trained as ours are."""
    from ..lora import matched_ranks

    library, ranks = peft(), matched_ranks(twin)
    model = subject.domain(Norm())
    own = {name for name, p in model.named_parameters() if p.requires_grad}
    config = library.LoraConfig(
        r=1, lora_alpha=1, target_modules=list(ranks), rank_pattern=ranks, alpha_pattern=ranks
    )
    with quiet():
        library.inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        if name in own:
            parameter.requires_grad_(True)
    return model


def training_step(model: nn.Module, x_bchw: Tensor) -> Call:
    """One step of AdamW on these images."""
    model.train()
    own = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(own, lr=1e-5)
    labels = (torch.arange(len(x_bchw)) % len(CLASSES)).to(x_bchw.device)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x_bchw), labels).backward()
        optimizer.step()

    return step


def peak_bytes(model: nn.Module, x_bchw: Tensor) -> int:
    """Bytes of weights, gradients, AdamW's two states and what a forward keeps for the backward.

    Counted over distinct storages: PyTorch has no peak for the CPU.
    """
    model.train()
    weights = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
               for t in (*model.parameters(), *model.buffers())}  # fmt: skip
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = model(x_bchw)
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    del y
    return sum(weights.values()) + 3 * trained + sum(kept.values())


def _limits(subject: Subject, adapter: str) -> Mapping[str, float]:
    """Multiply-adds of a step over those of fine-tuning, of the sites alone."""
    size = (3, subject.size_px, subject.size_px)
    sites = trace(subject.backbone, size).sites
    plan = domain_of(subject.domain(None)).plan
    whole = sum(site.multiply_adds for site in sites)
    own = sum(
        site.positions * plan[site.name].n_numbers(site) for site in sites if site.name in plan
    )
    return {"head only": 1 / 3, adapter: (2 * whole + own) / (3 * whole)}
