"""A recorded step is the step; where nothing can be recorded, that is said."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import onetrunk as ot
import onetrunk.training.fit as fit_module
from onetrunk.core.domain import delta
from onetrunk.errors import TrainingError
from onetrunk.training.graphed import GraphedStep, cuda_graph

RECIPE = ot.Recipe(epochs=3, batch_size=4, norm_statistics="running")


def rerun(trained: Sequence[nn.Parameter]) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """What stands for a CUDA graph on a CPU: computes again, into the memory it had."""

    def record(compute: Callable[[], None]) -> Callable[[], None]:
        with torch.random.fork_rng(devices=[]):  # a recording draws nothing
            compute()
        held = [parameter.grad for parameter in trained]

        def replay() -> None:
            compute()
            for memory, parameter in zip(held, trained, strict=True):
                assert memory is not None and parameter.grad is not None
                memory.copy_(parameter.grad)

        return replay

    return record


@pytest.fixture
def recorded(monkeypatch):
    """Has `fit(graphed=True)` record on the CPU."""

    def record_steps(loop: fit_module.Loop) -> None:
        trained = [p for group in loop.optimizer.param_groups for p in group["params"]]
        loop.graphed = GraphedStep(loop._with_gradients, trained, rerun(trained))

    monkeypatch.setattr(fit_module.Loop, "record_steps", record_steps)


def trained_delta(model: nn.Module, images: TensorDataset, **options) -> dict[str, torch.Tensor]:
    losses = [step.loss for step in ot.fit(model, images, RECIPE, **options)]
    return {**{k: t.cpu() for k, t in delta(model).items()}, "losses": torch.tensor(losses)}


def furthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


@pytest.fixture
def images() -> TensorDataset:
    x_bchw = torch.rand(12, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x_bchw, torch.arange(12) % 3)


def test_recorded_steps_train_as_ordinary_ones(make_model, images, recorded):
    found = trained_delta(make_model(), images, graphed=True)
    assert furthest(found, trained_delta(make_model(), images)) == 0


def test_a_graph_is_refused_where_there_is_no_cuda(make_model, images):
    with pytest.raises(TrainingError, match=r"graphed=True\) on cpu with 1 process"):
        list(ot.fit(make_model(), images, RECIPE, graphed=True, device="cpu"))


def test_a_step_that_cannot_be_recorded_says_what_it_did(monkeypatch):
    @contextmanager
    def broken(_graph: object, **_options: object) -> Iterator[None]:
        try:
            yield
        finally:
            raise RuntimeError("operation failed due to a previous error")

    def waits() -> None:
        raise RuntimeError("it waited for the GPU\nand more")

    monkeypatch.setattr(torch.cuda, "graph", broken)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "Stream", object)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    with pytest.raises(TrainingError, match=r"\(it waited for the GPU\): train it without graphed"):
        cuda_graph(waits)
