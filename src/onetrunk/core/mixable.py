"""What domains must have in common so that one forward serves a batch of them all."""

from collections.abc import Collection

from torch import nn

from ..errors import MixError
from ..tensorfile import fingerprint_of
from .adapters import Full
from .domain import Domain, delta, domain_of, own_size, unmark
from .trace import rows_astray, rows_per_image
from .tree import copy_tree, original_names, same_bits, unwrap


def base_tree(model: nn.Module) -> nn.Module:
    """An ordinary tree over a domain's tensors, no adapters: where the others' numbers go in."""
    base = copy_tree(model).eval()
    unmark(base)
    unwrap(base)
    return base


def check_shares(name: str, model: nn.Module, first: nn.Module) -> None:
    """Refuses a domain that shares no forward with `first`.

    Raises:
        MixError: for layers of its own, another backbone, and another type or device.
    """
    domain = domain_of(model)
    if domain.scope == "everything" or any(isinstance(f, Full) for f in domain.plan.values()):
        raise MixError(
            f"domain {name!r} has layers of its own ({domain.family}), so it shares no forward "
            "with others. Leave it out and call it by itself, or merge it."
        )
    _refuse_other_backbone(name, model, first)
    _refuse_other_kind(name, model, first)
    if domain.head != domain_of(first).head:
        raise MixError(
            f"domain {name!r} has its classifier at {', '.join(domain.head)}, the others at "
            f"{', '.join(domain_of(first).head)}: attach them with one `head`."
        )


def _refuse_other_backbone(name: str, model: nn.Module, first: nn.Module) -> None:
    ours, theirs = domain_of(first).backbone, domain_of(model).backbone
    if ours is theirs:
        return
    prints = [fingerprint_of(backbone.state_dict()) for backbone in (ours, theirs)]
    if prints[0] != prints[1]:
        raise MixError(
            f"domain {name!r} is over backbone {prints[1][:12]}..., the others over "
            f"{prints[0][:12]}...: there is no forward to share. Mix the domains of one backbone."
        )


def _refuse_other_kind(name: str, model: nn.Module, first: nn.Module) -> None:
    ours, theirs = (next(m.parameters()) for m in (first, model))
    if (ours.dtype, ours.device) != (theirs.dtype, theirs.device):
        raise MixError(
            f"domain {name!r} is {theirs.dtype} on {theirs.device}, the first one {ours.dtype} on "
            f"{ours.device}: bring them to one type and device with .to() first."
        )


def check_own(name: str, model: nn.Module, taken: Collection[str]) -> None:
    """Everything that is the domain's must be in the modules `taken`, or as the backbone has it.

    Raises:
        MixError: where it has something else of its own.
    """
    theirs, original = domain_of(model).backbone.state_dict(), original_names(model)
    own = delta(model)
    inside = {key for key in own for path in taken if key == path or key.startswith(f"{path}.")}
    places = {own[key].data_ptr() for key in inside}  # a module may have several names
    for key, tensor in own.items():
        stays = original.get(key)
        if (
            key in inside
            or tensor.data_ptr() in places
            or (stays in theirs and same_bits(tensor, theirs[stays]))
        ):
            continue
        raise MixError(
            f"domain {name!r} has {key} of its own, which rows of one batch cannot have. "
            "Call it by itself."
        )


def check_rows(base: nn.Module, layers: set[str], domain: Domain) -> set[str]:
    """A row of every layer must belong to an image that its place tells; those that are called.

    Raises:
        MixError: where one of `layers` gets rows that are not the batch's (a table of positions),
            or several of each image that do not lie together.
        BackboneError: where the backbone does not run.
    """
    sizes = own_size(domain), domain.input_size  # of its images, and that it was attached at
    per_image = rows_per_image(base, layers, sizes)
    for path, n_rows in per_image.items():
        if not n_rows:
            raise MixError(
                f"{path} gets a number of rows that does not follow the batch, so no row there "
                "belongs to an image, and domains that differ there cannot be mixed. Call them "
                "one after another, or leave that layer out of their plans."
            )
    several = {path for path, n_rows in per_image.items() if n_rows > 1}
    if several and (astray := rows_astray(base, several, sizes)):
        raise MixError(
            f"{min(astray)} gets several rows of each image that do not lie one image after the "
            "other (torch.cat([x, x.flip(-1)]) makes such), so which domain a row belongs to is "
            "unknown there. Call the domains one after another, or lay the views of an image "
            "together."
        )
    return set(per_image)
