"""fit_together: domains in one batch are trained as each alone is, and refuse what is not that."""

import itertools
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import onetrunk as ot
from onetrunk.backbones import resnet26
from onetrunk.core.attach import attach
from onetrunk.core.compress import compress
from onetrunk.core.domain import delta
from onetrunk.core.rebuild import with_trainable_basis
from onetrunk.core.together import Together
from onetrunk.errors import AttachError, DivergedError, MixError, TrainingError
from onetrunk.training.distributed import World

SIZES = {"a": 12, "b": 8, "c": 20, "d": 9}
RECIPE = ot.Recipe(epochs=2, batch_size=4)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return resnet26(0.125).double()


def domains(net: nn.Module, **changed: Any) -> dict[str, nn.Module]:
    families = {
        "a": ot.Parallel(dropout=0.3), "b": ot.LowRank(2, dropout=0.2), "c": ot.Series(),
        "d": ot.Head(), **changed,
    }  # fmt: skip
    names = {name: [str(c) for c in range(2 + k)] for k, name in enumerate(families)}
    return {
        name: attach(net, family, names[name], input_size=(3, 16, 16), seed=len(name))
        for name, family in families.items()
    }


@pytest.fixture
def data() -> dict[str, Any]:
    return {name: images(n) for name, n in SIZES.items()}


def images(n: int, side: int = 16, dtype: torch.dtype = torch.double) -> TensorDataset:
    generator = torch.Generator().manual_seed(n)
    x_bchw = torch.rand(n, 3, side, side, generator=generator, dtype=dtype)
    return TensorDataset(x_bchw, torch.arange(n) % 2)


def furthest(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(delta(one).values(), delta(other).values(), strict=True)
    return max(float((a.double() - b.double()).abs().max()) for a, b in pairs)


@pytest.mark.parametrize("statistics", ["batch", "running"])
def test_each_domain_is_trained_as_alone(net, data, statistics):
    recipe = ot.Recipe(epochs=2, batch_size=4, norm_statistics=statistics, label_smoothing=0.1)
    alone, together = domains(net), domains(net)
    expected = {n: list(ot.fit(alone[n], data[n], recipe, val=data[n])) for n in alone}
    found: dict[str, list[Any]] = {name: [] for name in together}
    for name, step in ot.fit_together(together, data, recipe, val=data):
        found[name].append(step)
    for name in alone:
        assert furthest(alone[name], together[name]) < 1e-12, name
        assert [(s.step, s.epoch, s.lr, s.val_accuracy, s.best) for s in found[name]] == [
            (s.step, s.epoch, s.lr, s.val_accuracy, s.best) for s in expected[name]
        ]
        assert [s.loss for s in found[name]] == pytest.approx([s.loss for s in expected[name]])


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("test_vit", {"img_size": 32, "proj_drop_rate": 0.1, "drop_path_rate": 0.2}),
        ("swin_tiny_patch4_window7_224", {"img_size": 32, "depths": (1, 1), "embed_dim": 24,
                                          "num_heads": (2, 2), "window_size": 4}),
        ("mobilevit_xxs", {}),
        ("test_convnext", {}),
    ],
)  # fmt: skip
def test_real_architectures_with_windows_and_random_depth(architecture, options):
    torch.manual_seed(0)
    net = timm.create_model(architecture, **options).double()
    size = (3, options.get("img_size", 64), options.get("img_size", 64))

    def made() -> dict[str, nn.Module]:
        return {
            name: attach(net, family, ["no", "yes", "perhaps"], input_size=size)
            for name, family in {"a": None, "b": ot.Norm(), "c": ot.LowRank(2)}.items()
        }

    recipe = ot.Recipe(epochs=1, batch_size=2)
    data = {name: images(n, size[1]) for name, n in {"a": 4, "b": 4, "c": 2}.items()}
    alone, together = made(), made()
    for name, model in alone.items():
        list(ot.fit(model, data[name], recipe))
    list(ot.fit_together(together, data, recipe))
    for name in alone:
        assert furthest(alone[name], together[name]) < 1e-9, name


def test_shared_layers_run_once_for_all(net):
    together = Together(domains(net))
    calls: list[int] = []
    for module in together.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _m, args, _y: calls.append(len(args[0])))
    together(torch.rand(5, 3, 16, 16, dtype=torch.double), [2, 0, 3, 0])
    n_convs = sum(isinstance(m, nn.Conv2d) for m in net.modules())
    assert calls.count(5) == n_convs


def test_the_longest_is_in_every_step_and_all_end_together(net, data):
    few = {name: data[name] for name in ("a", "c")}  # 3 and 5 steps
    models = {name: model for name, model in domains(net).items() if name in few}
    order = [name for name, _ in ot.fit_together(models, few, ot.Recipe(epochs=1, batch_size=4))]
    assert "".join(order) == "acaccacc"


def test_either_training_goes_on_from_the_others_checkpoint(net, data, tmp_path):
    whole, parts = domains(net), domains(net)
    files = {name: tmp_path / name for name in parts}
    list(ot.fit_together(whole, data, RECIPE))
    for _ in itertools.islice(ot.fit_together(parts, data, RECIPE, checkpoints=files), 7):
        pass
    again = domains(net)
    list(ot.fit(again.pop("a"), data["a"], RECIPE, checkpoint=files["a"]))
    rest = {name: data[name] for name in again}
    del files["a"]
    list(ot.fit_together(again, rest, RECIPE, checkpoints=files))
    for name, model in again.items():
        assert furthest(whole[name], model) < 1e-12, name


def test_networks_are_in_eval_mode_without_gradients_afterwards(net, data):
    models = domains(net)
    next(iter(ot.fit_together(models, data, RECIPE)))
    for model in models.values():
        assert not any(m.training for m in model.modules())
        assert all(p.grad is None for p in model.parameters())


def test_a_domain_that_diverges_is_named_and_the_others_stay_finite(net, data):
    bad = dict(data)
    bad["b"] = TensorDataset(torch.full((8, 3, 16, 16), torch.inf).double(), torch.arange(8) % 2)
    models = domains(net)
    with pytest.raises(DivergedError, match="domain 'b': the loss is nan at step 1 of 4"):
        list(ot.fit_together(models, bad, RECIPE))
    for model in models.values():
        assert all(t.isfinite().all() for t in delta(model).values() if t.is_floating_point())


class DrawsByItself(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).mean((2, 3))
        return self.fc(nn.functional.dropout(x, 0.5, self.training))


def test_random_numbers_outside_of_modules_are_refused():
    models = {n: attach(DrawsByItself(), None, ["no", "yes"], input_size=(3, 8, 8)) for n in "a"}
    with pytest.raises(MixError, match=r"outside of its dropout modules.*drop_rate=0"):
        list(ot.fit_together(models, {"a": images(4, 8, torch.float32)}, RECIPE))


def test_what_shares_no_forward_is_refused(net, data):
    with pytest.raises(MixError, match=r"domain 'b' has layers of its own \(full\)"):
        trained(domains(net, b=ot.Full()), data)
    other = domains(resnet26(0.125).double())
    with pytest.raises(MixError, match="domain 'b' is over backbone"):
        trained({**domains(net), "b": other["b"]}, data)
    with pytest.raises(MixError, match="give at least one"):
        trained({}, {})
    with pytest.raises(AttachError, match="is no domain's network"):
        trained({"a": net}, {"a": data["a"]})


def test_missing_and_unknown_names_are_refused(net, data):
    with pytest.raises(TrainingError, match=r"domain 'd' has no training data: give train\['d'\]"):
        trained(domains(net), {n: data[n] for n in "abc"})
    with pytest.raises(TrainingError, match="data or a file for 'e', which is none of the domains"):
        trained(domains(net), {**data, "e": data["a"]})


def test_several_processes_are_refused(net, data, monkeypatch):
    monkeypatch.setattr("onetrunk.training.together.world", lambda: World(rank=0, size=2))
    with pytest.raises(TrainingError, match="in one process: under torchrun, train each"):
        trained(domains(net), data)


def test_a_trained_basis_is_refused(net, data):
    ours = domains(net, b=ot.Parallel(init="released"), a=ot.Parallel(init="released"))
    models = with_trainable_basis(compress({"a": ours["a"], "b": ours["b"]}, rank_fraction=0.5))
    with pytest.raises(MixError, match="domain 'a' trains the basis that it shares"):
        trained(models, {name: data[name] for name in models})


def test_a_lone_image_is_too_few_for_batch_norm(net):
    recipe = ot.Recipe(epochs=1, batch_size=1, norm_statistics="batch")
    models = {"a": domains(net)["a"]}
    with pytest.raises(TrainingError, match="a batch of 1 image is too few for batch norm"):
        list(ot.fit_together(models, {"a": images(2, 8)}, recipe))


def test_sizes_must_be_those_of_the_batch(net):
    x_bchw = torch.rand(5, 3, 16, 16, dtype=torch.double)
    with pytest.raises(MixError, match=r"5 images for 4 domains with \[2, 2\] rows"):
        Together(domains(net))(x_bchw, [2, 2])


def trained(models: dict[str, nn.Module], data: dict[str, Any]) -> None:
    list(ot.fit_together(models, data, RECIPE))


@pytest.mark.parametrize("recipe", ["paper", {"a": RECIPE}])
def test_what_is_no_recipe_is_refused(recipe: Any, net: nn.Module) -> None:
    models = domains(net)
    with pytest.raises(TrainingError, match="is no recipe: give a Recipe, or read_recipe"):
        next(ot.fit_together(models, {}, recipe))
