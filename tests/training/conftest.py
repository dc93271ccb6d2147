"""A tiny network and tiny images that the training tests share; one thread, so that bits are."""

import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import onetrunk as ot
from onetrunk.core.adapters import Family
from onetrunk.core.domain import delta
from onetrunk.data import Images, Preprocessing

CLASSES = ("ant", "bee", "cat")


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def training() -> SimpleNamespace:
    """The functions of one_training.py, which is a script too."""
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "one_training.py")))


@pytest.fixture
def make_net(training: SimpleNamespace) -> Callable[..., nn.Module]:
    return training.net


@pytest.fixture
def make_model(training: SimpleNamespace) -> Callable[..., nn.Module]:
    """make_model(family, size_px=16, ...) -> a domain's network over a fresh, seeded backbone."""

    def made(family: Family | None = None, **options: Any) -> nn.Module:
        size = options.pop("size_px", 16)
        return ot.attach(
            options.pop("backbone", None) or training.net(),
            family or ot.Parallel(),
            classes=options.pop("classes", CLASSES),
            preprocessing=Preprocessing(size_px=size, crop_ratio=16 / 18),
            input_size=(3, size, size),
            **options,
        )

    return made


@pytest.fixture
def make_images(training: SimpleNamespace) -> Callable[..., Images]:
    return training.images


@pytest.fixture
def make_tensors() -> Callable[..., TensorDataset]:
    """make_tensors(n, seed, side) -> float images (3, side, side) whose channel is their class."""

    def made(n: int = 24, seed: int = 0, side: int = 16) -> TensorDataset:
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(n) % len(CLASSES)
        x_nchw = torch.randn(n, 3, side, side, generator=generator)
        x_nchw[torch.arange(n), labels] += 1.0
        return TensorDataset(x_nchw, labels)

    return made


@pytest.fixture
def bits() -> Callable[[nn.Module], dict[str, Tensor]]:
    """bits(model) -> copies of every tensor of its state."""
    return lambda model: {name: t.clone() for name, t in model.state_dict().items()}


@pytest.fixture
def own_bits() -> Callable[[nn.Module], dict[str, Tensor]]:
    """own_bits(model) -> copies of the domain's own tensors."""
    return lambda model: {name: t.clone() for name, t in delta(model).items()}


@pytest.fixture
def same() -> Callable[[dict[str, Tensor], dict[str, Tensor]], bool]:
    """same(a, b): the same names and the same bits."""
    return lambda a, b: a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def pictures() -> Callable[[int], np.ndarray[Any, np.dtype[np.uint8]]]:
    """pictures(n) -> n random uint8 pictures (n, 20, 24, 3)."""
    return lambda n: np.random.default_rng(5).integers(0, 256, (n, 20, 24, 3), dtype=np.uint8)
