"""sensitivity: from a user's images to what each site could buy."""

import pytest
import torch
from torch.utils.data import TensorDataset

import onetrunk as ot
from onetrunk.backbones import resnet26
from onetrunk.core.sensitivity import by_curvature, by_gradient, by_training, measure
from onetrunk.errors import TrainingError
from onetrunk.training import sensitivity as room
from onetrunk.training.sensitivity import sensitivity

SIZE = (3, 16, 16)


@pytest.fixture(scope="module")
def images() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.rand(40, *SIZE, generator=generator), torch.arange(40) % 2)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return ot.attach(resnet26(0.25), ot.Parallel(), ["a", "b"], input_size=SIZE).eval()


def test_it_is_what_the_core_measures_over_all_images(model, images) -> None:
    with torch.no_grad():
        model.stem.adapter.a_oi.fill_(0.1)
    measured = measure(model, [(images.tensors[0], images.tensors[1])])
    expected = {
        "gradient": by_gradient(measured),
        "curvature": by_curvature(measured),
        "trained": by_training(model, measured),
    }
    shown: list[tuple[int, int]] = []
    for by, wanted in expected.items():
        found = sensitivity(model, images, by=by, progress=lambda *at: shown.append(at))
        assert found.how == by and found.sites == wanted.sites
        for name, energies in found.energies.items():
            assert energies == pytest.approx(wanted.energies[name], rel=1e-3, abs=1e-9)
    assert shown == [(32, 40), (40, 40)] * 3


def test_large_domains_are_sampled_evenly(model, images, monkeypatch) -> None:
    monkeypatch.setattr(room, "N_IMAGES", 4)
    rows = torch.tensor([0, 13, 26, 39])
    found = sensitivity(model, images, by="gradient")
    wanted = by_gradient(measure(model, [(images.tensors[0][rows], images.tensors[1][rows])]))
    assert found.energies["stem"] == pytest.approx(wanted.energies["stem"])


def test_an_unknown_measure_is_refused(model, images) -> None:
    with pytest.raises(TrainingError, match=r"by 'hessian' .* known are gradient, curvature"):
        sensitivity(model, images, by="hessian")  # type: ignore[arg-type]
