"""A network as one graph, for any number of images of one size: torch.export's program."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ..errors import ExportError


def traced(network: nn.Module, examples: tuple[Tensor, ...]) -> ExportedProgram:
    """The program of a network, whose inputs share one free first axis.

    Args:
        examples: inputs of two images each: with one, torch would take 1 for a constant.

    Raises:
        ExportError: where the network's own code cannot be made into one graph.
    """
    shapes = tuple({0: Dim("batch")} for _ in examples)
    try:
        with quietly(), contextlib.redirect_stderr(io.StringIO()):  # torch prints what failed
            program = torch.export.export(network, examples, dynamic_shapes=shapes)
    except Exception as error:  # whatever the network's own code raises is only reported
        raise ExportError(
            f"{type(network).__name__} cannot be made into one graph for any number of images "
            f"({first_cause(error)}). Export its weights: --format safetensors."
        ) from error
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # paths and lines of this machine's Python files
    return program


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without the exporters' warnings and log lines: what they made is checked."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def first_cause(error: BaseException) -> str:
    """What an exporter's complaint comes down to: the first line of its first cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = f"{type(error).__name__}: {error}".splitlines()
    return lines[0].rstrip(". ")[:200]
