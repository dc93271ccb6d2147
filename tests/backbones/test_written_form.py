"""Written forms of backbones: what they build, when one is given, and what is refused."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from onetrunk.backbones import backbone, fingerprint, resnet26, written_form
from onetrunk.backbones.written_form import build_empty, size_of
from onetrunk.errors import BackboneError, OnetrunkError, SpecError


def forms() -> object:
    import importlib

    return importlib.import_module("onetrunk.backbones.written_form")


@pytest.mark.parametrize(
    "form",
    [
        "timm:resnet18",
        "timm:resnet18(in_chans=1, num_classes=7)",
        "timm:vit_tiny_patch16_224(img_size=64, num_classes=0)",
        "torchvision:resnet18",
        "torchvision:mobilenet_v3_small(num_classes=5)",
        "resnet26",
        "resnet26(width=0.25, num_classes=4)",
    ],
)
def test_a_form_builds_a_network_whose_form_it_is(form: str) -> None:
    module = backbone(form, pretrained=False)
    assert written_form(module) == form and not module.training
    twin = forms().build_empty(form)
    assert {n: t.shape for n, t in twin.state_dict().items()} == {
        n: t.shape for n, t in module.state_dict().items()
    }


def test_building_one_leaves_every_generator_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda _seed: pytest.fail("reseeds GPUs"))
    before = torch.get_rng_state()
    backbone("resnet26(width=0.125)", pretrained=False)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("module", "form"),
    [
        (lambda: timm.create_model("resnet18"), "timm:resnet18.a1_in1k"),
        (lambda: timm.create_model("resnet18.a1_in1k"), "timm:resnet18.a1_in1k"),
        (
            lambda: timm.create_model("resnet18", num_classes=10, in_chans=1),
            "timm:resnet18.a1_in1k(num_classes=10, in_chans=1)",
        ),
        (lambda: resnet26(0.5), "resnet26(width=0.5)"),
        (lambda: resnet26(0.25, 10, 1), "resnet26(width=0.25, num_classes=10, in_chans=1)"),
    ],
)
def test_a_network_made_without_us_is_written_by_what_it_says_of_itself(
    module: object, form: str
) -> None:
    assert written_form(module()) == form


@pytest.mark.parametrize(
    "module",
    [
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1)),
        lambda: timm.create_model("resnet18", block_args={"attn_layer": "se"}),
        lambda: _with_another_layer(timm.create_model("resnet18")),
        lambda: _with_another_layer(backbone("resnet26(width=0.25)")),
    ],
)
def test_a_guess_that_does_not_build_the_same_network_is_never_written(module: object) -> None:
    made = module()
    cls = type(made)
    assert written_form(made) == f"module:{cls.__module__}.{cls.__qualname__}"


def _with_another_layer(module: nn.Module) -> nn.Module:
    module.extra = nn.Linear(2, 2)
    return module


def test_forms_start_from_weights_of_a_fixed_seed_and_leave_the_global_one() -> None:
    state = torch.random.get_rng_state()
    one, same = (backbone("resnet26(width=0.25)") for _ in range(2))
    assert fingerprint(one) == fingerprint(same)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("name", ["stem.weight", "norm.running_mean", "fc.bias"])
def test_the_fingerprint_changes_with_any_single_number(name: str) -> None:
    module = backbone("resnet26(width=0.25)")
    before = fingerprint(module)
    with torch.no_grad():
        module.state_dict()[name].view(-1)[-1] += 1e-3
    assert fingerprint(module) != before
    assert len(before) == 64 and int(before, 16)


def test_every_tensor_and_its_last_bit_count_in_the_fingerprint() -> None:
    module = backbone("resnet26(width=0.25)")
    before = fingerprint(module)
    for tensor in module.state_dict().values():
        last = tensor.view(-1).view(torch.uint8)[-1:]
        last ^= 1
        assert fingerprint(module) != before
        last ^= 1
    assert fingerprint(module) == before


def test_weights_of_a_file_are_loaded_whole(tmp_path: Path) -> None:
    source = resnet26(0.25, 4)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    form = "resnet26(width=0.25, num_classes=4)"
    assert fingerprint(backbone(form, weights=tmp_path / "w.safetensors")) == fingerprint(source)


def test_weights_that_do_not_fit_are_refused_with_a_list_and_change_nothing(
    tmp_path: Path,
) -> None:
    save_file({"stem.weight": torch.ones(1), "odd": torch.ones(2)}, tmp_path / "w.safetensors")
    with pytest.raises(
        BackboneError,
        match=r"w\.safetensors does not fit ResNet26 \(- expected, \+ found\):\n"
        r"- stem\.weight \(8, 3, 3, 3\)\n(- .+\n){7}  and \d+ more",
    ):
        backbone("resnet26(width=0.25)", weights=tmp_path / "w.safetensors")
    module = nn.Linear(2, 1)
    before = fingerprint(module)
    with pytest.raises(BackboneError, match=r"- bias \(1,\)\n\+ weight2 \(1, 2\)$"):
        forms().load_tensors(
            module, {"weight": torch.ones(1, 2), "weight2": torch.ones(1, 2)}, "here"
        )
    assert fingerprint(module) == before


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt", ".pkl"])
def test_pickles_are_refused_unread(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(BackboneError, match=rf"\{suffix} files are pickles, which can run code"):
        backbone("resnet26(width=0.25)", weights=tmp_path / f"absent{suffix}")


def test_a_file_that_is_missing_or_no_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"not a header")
    for path in (tmp_path / "w.safetensors", tmp_path / "absent.safetensors", tmp_path):
        with pytest.raises(
            BackboneError, match=r"no readable safetensors file|the weights cannot be read: "
        ):
            backbone("resnet26(width=0.25)", weights=path)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("tim:resnet18", r"unknown backbone source 'tim:': .*Did you mean 'timm:'\?"),
        ("timm:", r"cannot read backbone 'timm:': write timm:NAME, torchvision:NAME or resnet26"),
        ("timm:res net", r"cannot read backbone 'timm:res net'"),
        ("timm:resnet18(1)", r"cannot read the options of backbone 'timm:resnet18\(1\)'.*in_chans"),
        ("timm:resnet18(in_chans=1", r"cannot read the options of backbone"),
        ("timm:resnet81", r"unknown timm model 'resnet81': none of the \d+ known.*mean 'resnet"),
        ("torchvision:resnet19", r"unknown torchvision model 'resnet19'.*Did you mean 'resnet"),
        ("resnet62", r"unknown backbone 'resnet62': known are .*Did you mean 'resnet26'\?"),
    ],
)
def test_a_form_that_cannot_be_read_is_refused(form: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        backbone(form, pretrained=False)


def test_options_that_an_architecture_does_not_have_are_refused() -> None:
    with pytest.raises(
        BackboneError, match=r"resnet18 could not be built \(TypeError: .*wdth.*\)\. Check the name"
    ):
        backbone("timm:resnet18(wdth=2)", pretrained=False)
    with pytest.raises(BackboneError, match=r"resnet26 could not be built \(TypeError"):
        backbone("resnet26(depth=2)")


def test_a_pretrained_name_that_does_not_exist_or_cannot_be_had_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(BackboneError, match=r"resnet18\.nope could not be built \(RuntimeError"):
        backbone("timm:resnet18.nope")

    def offline(*_args: object, **_fields: object) -> nn.Module:
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(
        BackboneError,
        match=r"resnet18 could not be built \(OSError: no route to host\)\. Without a network, "
        r"give a local file .*timm:tf_efficientnet_lite0",
    ):
        backbone("timm:resnet18")


@pytest.mark.parametrize("width", [0, 0.01, 0.26, 0.5001, -1])
def test_a_width_without_whole_channels_is_refused(width: float) -> None:
    with pytest.raises(
        BackboneError, match=r"resnet26\(width=.+\): its stages must double.*0\.25, 0\.5, 1\.0"
    ):
        resnet26(width)


def test_every_refusal_is_one_family_of_exceptions() -> None:
    assert issubclass(BackboneError, OnetrunkError)


def test_a_network_that_is_not_made_on_meta_is_known_all_the_same() -> None:
    form = "torchvision:regnet_y_400mf"  # its layers copy numbers as they are made
    assert written_form(build_empty(form)) == form and size_of(form) > 10_000_000
