"""A recorded step is the step; what cannot be recorded is trained as always, or refused."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import onetrunk as ot
import onetrunk.training.fit as fit_module
from onetrunk.core.attach import delta
from onetrunk.errors import TrainingError
from onetrunk.training.graphed import GraphedStep, may_be_recorded

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
    """recorded(record): from now on `fit` records by it, on the CPU."""

    def started(record=None):
        def graph(loop: fit_module.Loop, wanted: bool | None) -> None:
            trained = [p for group in loop.optimizer.param_groups for p in group["params"]]
            loop.graphed = GraphedStep(loop._loss_of, trained, record or rerun(trained))
            loop.must_graph = bool(wanted)

        monkeypatch.setattr(fit_module.Loop, "graph", graph)

    return started


def refusing(_compute: Callable[[], None]) -> Callable[[], None]:
    raise TrainingError("this network's step cannot be recorded")


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
    expected = trained_delta(make_model(), images)
    recorded()
    assert furthest(trained_delta(make_model(), images), expected) == 0


def test_what_cannot_be_recorded_is_trained_as_always_or_refused(make_model, images, recorded):
    expected = trained_delta(make_model(), images)
    recorded(refusing)
    assert furthest(trained_delta(make_model(), images), expected) == 0
    with pytest.raises(TrainingError, match="cannot be recorded"):
        trained_delta(make_model(), images, graphed=True)


def test_a_graph_is_refused_where_there_is_no_cuda(make_model, images):
    with pytest.raises(TrainingError, match=r"graphed=True\) on cpu with 1 process"):
        list(ot.fit(make_model(), images, RECIPE, graphed=True, device="cpu"))


def test_only_layers_of_known_packages_without_hooks_are_recorded_unasked(make_model):
    class Mine(nn.Identity):
        pass

    model = make_model()
    assert may_be_recorded(model)
    hook = model.register_forward_hook(lambda *_: None)
    assert not may_be_recorded(model)
    hook.remove()
    assert may_be_recorded(nn.Sequential(nn.ReLU()))
    assert not may_be_recorded(nn.Sequential(Mine()))
