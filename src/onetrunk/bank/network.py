"""A domain's network from the numbers of its file, and what makes a network fit for a file.

What cannot come back bit for bit is refused before it is written: shared weights, a basis or
buffers that are no longer what they were.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..core.basis import Basis
from ..core.domain import Domain, backbone_statistics, delta
from ..core.tree import frozen_pairs, same_bits
from ..errors import BankError, DamagedError, told
from .card import Blueprint

_N_LINES = 8


def network_of(
    blueprint: Blueprint,
    tensors: Mapping[str, Tensor],
    backbone: nn.Module,
    origin: str,
    basis: Basis | None = None,
) -> nn.Module:
    """The domain's network, in eval mode, filled with its own numbers."""
    try:
        blueprint.refuse_unborne(tensors, backbone)
        model = blueprint.build(backbone, basis)
    except Exception as error:  # whatever a hostile card brings about
        raise DamagedError(
            f"{origin}: no network can be built from its card ({told(error)}). "
            "Get it again from where it came from."
        ) from error
    own = delta(model)
    known = {} if blueprint.whole else backbone_statistics(model)
    whole = {**known, **tensors}  # the backbone's may lie on a GPU, the file's never do
    if unlike := differences(own, whole):
        raise DamagedError(
            f"{origin}: its numbers do not fit what its card describes (- expected, + found):\n"
            f"{unlike}"
        )
    if (bad := non_finite(tensors)) is not None:
        raise DamagedError(
            f"{origin}: {bad} holds NaN or infinity, which no bank stores. Train the domain again."
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(whole[name])
    return model.eval()


def differences(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """What differs in names, shapes and types, a `-` or `+` line each; empty where nothing does."""
    own = {name: (tuple(t.shape), t.dtype) for name, t in expected.items()}
    given = {name: (tuple(t.shape), t.dtype) for name, t in found.items()}
    if own == given:
        return ""
    lines = [
        f"- {n} {shape} {dtype}" for n, (shape, dtype) in own.items() if given.get(n) != own[n]
    ]
    lines += [
        f"+ {n} {shape} {dtype}" for n, (shape, dtype) in given.items() if own.get(n) != given[n]
    ]
    more = [f"  and {len(lines) - _N_LINES} more"] if len(lines) > _N_LINES else []
    return "\n".join(lines[:_N_LINES] + more)


def non_finite(tensors: Mapping[str, Tensor]) -> str | None:
    floats = {name: t for name, t in tensors.items() if t.is_floating_point()}
    together = torch.cat([t.flatten() for t in floats.values()]) if floats else torch.empty(0)
    if torch.isfinite(together).all():  # one look, as a load is made of hundreds of small tensors
        return None
    return next(name for name, t in floats.items() if not torch.isfinite(t).all())


def refuse_altered(name: str, model: nn.Module, domain: Domain) -> None:
    """Refuses a network whose shared numbers are no longer what every domain relies on.

    Raises:
        BankError: for a weight, a buffer that no file holds, or a basis that was written to.
    """
    _refuse_changed(name, model, domain)
    if domain.basis is not None:
        _refuse_changed_basis(name, model, domain, domain.basis)
    _refuse_unstored(name, model, domain)


def _refuse_changed(name: str, model: nn.Module, domain: Domain) -> None:
    """Refuses a network whose frozen tensors are not, bit for bit, its backbone's."""
    try:
        pairs = list(frozen_pairs(model, domain.backbone, domain.frozen))
    except KeyError as error:
        raise BankError(
            f"domain {name!r}: its network has no {error.args[0]}, so it was wrapped or rebuilt "
            "after attach. Give the network that attach returned."
        ) from None
    for own, theirs, tensor_name in pairs:
        if not same_bits(own, theirs):
            types = "" if own.dtype == theirs.dtype else f" ({own.dtype}, not {theirs.dtype})"
            raise BankError(
                f"domain {name!r}: its shared weight {tensor_name} is no longer the backbone's"
                f"{types}, and a bank stores only what is the domain's own. Train with fit, or "
                "attach Full() to train everything."
            )


def _refuse_unstored(name: str, model: nn.Module, domain: Domain) -> None:
    """Refuses a network with own numbers in buffers that no file would hold."""
    theirs, known = dict(domain.backbone.named_buffers()), model.state_dict()
    for key, buffer in model.named_buffers():
        own = key not in known and key in theirs and buffer.is_floating_point()
        if own and not same_bits(buffer, theirs[key].to(buffer.dtype)):
            raise BankError(
                f"domain {name!r}: its buffer {key} is not the backbone's any more, and it is not "
                "persistent, so no file would hold it. Register it with persistent=True in the "
                "backbone, which then is another one."
            )


def _refuse_changed_basis(name: str, model: nn.Module, domain: Domain, basis: Basis) -> None:
    """Refuses a network whose basis is not, bit for bit, the value that it was attached to."""
    state = model.state_dict()
    held = {
        f"{site}.adapter.{key}": tensor
        for site, factors in basis.factors.items()
        for key, tensor in factors.items()
    }
    moved = [key for key in sorted(domain.shared) if not same_bits(state[key], held[key])]
    if moved or basis.taken_now() != basis.fingerprint:
        raise BankError(
            f"domain {name!r}: its basis has been trained or written to since it was made"
            f"{f' ({moved[0]})' if moved else ''}, and other domains lie over it. Add what "
            "with_frozen_basis(models) gives."
        )
