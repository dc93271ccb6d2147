"""attach refuses a forward that passes by what is attached; its dry runs write nothing."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import onetrunk as ot
from onetrunk.backbones import fingerprint
from onetrunk.core.tree import is_norm
from onetrunk.errors import AttachError, BackboneError

CLASSES = ["daisy", "rose"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.aux, self.fc = nn.Linear(4, 5), nn.Linear(4, 5)

    def features(self, x: Tensor) -> Tensor:
        return self.c2(self.c1(x).relu()).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        z = self.features(x)
        aside = self.aux(z)
        return self.fc(z) + 0 * aside.sum()


class Listed(Net):
    def __init__(self) -> None:
        super().__init__()
        self.steps = [self.c1, self.c2]

    def features(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x.mean((2, 3))


class Headed(Net):
    def __init__(self) -> None:
        super().__init__()
        self.parts = {"head": self.fc}

    def forward(self, x: Tensor) -> Tensor:
        return self.parts["head"](self.features(x))


class Pair(Net):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.features(x)
        return self.fc(z), z


class Grouped(Net):
    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Sequential(
            nn.Dropout(0.1), nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 9)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))


class Noting(nn.Module):
    """Keeps what went through it, in eval mode too; it does not run on meta."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("least", torch.ones(3))
        self.register_buffer("n_calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.least.copy_(torch.minimum(self.least, x.amin((0, 2, 3))))
        self.n_calls += 1
        return x * float(x.isfinite().any())


def test_an_adapter_that_the_forward_passes_by_is_refused() -> None:
    with pytest.raises(AttachError, match=r"layer 'c1' past its adapter.*nn.ModuleList"):
        ot.attach(Listed(), ot.Parallel(), CLASSES)


def test_a_classifier_that_the_forward_passes_by_is_refused() -> None:
    with pytest.raises(AttachError, match=r"2 classes at 'fc'.*\(1, 5\).*past its place"):
        ot.attach(Headed(), ot.Parallel(), CLASSES)


def test_a_head_whose_scores_are_not_the_networks_is_refused() -> None:
    with pytest.raises(AttachError, match=r"2 classes at 'aux'.*come from another module"):
        ot.attach(Net(), ot.Parallel(), CLASSES, head="aux")


def test_a_network_of_several_outputs_is_refused() -> None:
    with pytest.raises(AttachError, match=r"gives a tuple.*wrap it in a module that returns them"):
        ot.attach(Pair(), ot.Parallel(), CLASSES)


def test_a_head_of_several_layers_is_replaced_whole() -> None:
    model = ot.attach(Grouped(), ot.Parallel(), CLASSES, head="classifier")
    assert model.domain.head_features == 4
    assert model(torch.rand(2, 3, 8, 8)).shape == (2, 2)


def test_a_layer_that_looks_at_its_class_is_told_of() -> None:
    class Picky(Net):
        def features(self, x: Tensor) -> Tensor:
            assert type(self.c1) is nn.Conv2d, "only a plain convolution"
            return super().features(x)

    with pytest.raises(BackboneError, match=r"does not run with.*only a plain convolution.*where="):
        ot.attach(Picky(), ot.Parallel(), CLASSES)


def test_dry_runs_write_to_no_buffer() -> None:
    net = nn.Sequential(Noting(), Net()).eval()
    before = fingerprint(net)
    models = {name: ot.attach(net, ot.Parallel(), CLASSES) for name in "ab"}
    ot.cost(models["a"])
    own = [fingerprint(model) for model in models.values()]
    ot.mix(models)
    assert fingerprint(net) == before
    assert [fingerprint(model) for model in models.values()] == own


def test_weights_on_meta_are_refused() -> None:
    with torch.device("meta"):
        net = Net()
    with pytest.raises(AttachError, match="meta device, which holds no numbers: load them"):
        ot.attach(net, ot.Parallel(), CLASSES)


@pytest.mark.parametrize("size", [(3, 16), "big", (3, 16.0, 16)])
def test_an_odd_input_size_is_refused(size: object) -> None:
    with pytest.raises(AttachError, match=r"give channels, rows and columns, \(3, 64, 64\)"):
        ot.attach(Net(), ot.Parallel(), CLASSES, input_size=size)


def test_an_input_size_may_be_a_list() -> None:
    for size in ([3, 8, 8], (3, np.int64(8), 8)):
        model = ot.attach(Net(), classes=CLASSES, input_size=size)
        assert model.domain.input_size == (3, 8, 8) and ot.mix({"a": model}).domains == ("a",)


def test_a_head_is_named_by_a_text() -> None:
    with pytest.raises(AttachError, match=r"head=\['fc'\]: give the module's path as a text"):
        ot.attach(Net(), ot.Parallel(), CLASSES, head=["fc"])


def test_images_that_are_not_square_stay_so() -> None:
    net = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten(), nn.Linear(2 * 8 * 16, 3))
    model = ot.attach(net, ot.Parallel(), CLASSES, input_size=(3, 8, 16))
    assert model.domain.preprocessing is None
    assert ot.cost(model).sites[0].multiply_adds == 3 * 2 * 8 * 16
    assert ot.merge(model, check=torch.rand(2, 3, 8, 16))(torch.rand(1, 3, 8, 16)).shape == (1, 2)


def test_a_normalisation_of_the_input_is_no_norm() -> None:
    class Normalize(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.std = nn.Parameter(torch.full((3, 1, 1), 0.2), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return x / self.std

    model = ot.attach(nn.Sequential(Normalize(), Net()), ot.Parallel(), CLASSES)
    assert not model.get_submodule("0").std.requires_grad
    assert "0.std" in model.domain.frozen


def test_modules_under_two_names_cost_and_compress() -> None:
    class Aliased(Net):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(4)
            self.steps = nn.ModuleList([self.c1, self.bn, self.c2])

        def features(self, x: Tensor) -> Tensor:
            for step in self.steps:
                x = step(x)
            return x.mean((2, 3))

    net = Aliased()
    models = {n: ot.attach(net, ot.Parallel(), CLASSES, seed=k) for k, n in enumerate("ab")}
    for model in models.values():
        nn.init.normal_(model.c1.adapter.a_oi, std=0.1)
    assert ot.cost(models["a"]).adapters > 0
    whole = ot.compress(models, 1.0)
    x = torch.rand(2, 3, 8, 8)
    for name, model in models.items():
        assert torch.allclose(whole[name].eval()(x), model.eval()(x), atol=1e-5)


@pytest.mark.parametrize("name", ["Normalize", "Normalise", "NormalizeInput", "InputNormalizer"])
def test_what_standardises_the_input_is_no_norm(name: str) -> None:
    held = type(name, (nn.Module,), {})()
    held.std = nn.Parameter(torch.ones(3))
    assert not is_norm(held)


@pytest.mark.parametrize("name", ["L2Normalize", "LayerNormalization", "NormAct", "EvoNorm2dS0"])
def test_what_is_called_a_norm_is_one(name: str) -> None:
    norm = type(name, (nn.Module,), {})()
    norm.weight = nn.Parameter(torch.ones(3))
    assert is_norm(norm)
