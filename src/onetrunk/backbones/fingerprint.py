"""The fingerprint of a backbone: SHA-256 over its tensors' names, shapes, types and bytes."""

from torch import nn

from ..tensorfile import fingerprint_of


def fingerprint(backbone: nn.Module) -> str:
    """64 hex digits that change when any parameter or stored buffer of `backbone` does."""
    return fingerprint_of(backbone.state_dict())
