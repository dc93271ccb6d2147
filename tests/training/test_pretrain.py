"""Pretraining: every number learns, the backbone alone is kept and reads back as written."""

import pytest
import torch
from safetensors import safe_open

import onetrunk as ot
from onetrunk.data import Preprocessing
from onetrunk.errors import AttachError, BackboneError, DamagedError, TrainingError
from onetrunk.training.pretrain import pretraining, trunk, write_trunk

SEEN = Preprocessing(size_px=16, crop_ratio=16 / 18)
CLASSES = ("ant", "bee", "cat")
FORM = "resnet26(width=0.125)"


@pytest.fixture(params=[None, ot.Series()], ids=["without adapters", "series in place"])
def model(request):
    net = ot.backbone(FORM, pretrained=False)
    return pretraining(net, CLASSES, request.param, preprocessing=SEEN)


def test_every_number_learns_and_the_given_backbone_stays(model):
    before = {n: t.clone() for n, t in model.domain.backbone.state_dict().items()}
    x, labels = torch.rand(6, 3, 16, 16), torch.tensor([0, 1, 2] * 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):  # the first step moves a zero adapter, the second what lies behind it
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
    still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still
    for name, tensor in model.domain.backbone.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_what_is_kept_has_the_plain_backbones_names_and_no_adapter(model):
    plain = ot.backbone("resnet26(width=0.125, num_classes=3)", pretrained=False)
    shapes = {name: t.shape for name, t in plain.state_dict().items()}
    assert {name: t.shape for name, t in trunk(model).items()} == shapes


def _seen(form, px):
    """A network of `form` with random series adapters whose norms have seen noise, in eval mode."""
    net, preprocessing = ot.backbone(form, pretrained=False), Preprocessing(size_px=px)
    model = pretraining(net, CLASSES, ot.Series(init="released"), preprocessing=preprocessing)
    model.train()(torch.randn(8, 3, px, px))
    return model.eval()


def test_with_its_adapters_folded_in_a_file_is_the_network_that_was_trained(tmp_path):
    model, path = _seen(FORM, 16), tmp_path / "trunk.safetensors"
    write_trunk(path, model, {}, half=False, merged=True)
    whole = ot.backbone(FORM, weights=path).eval()
    x = torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(whole(x), model(x), rtol=1e-4, atol=1e-4)
    write_trunk(path, model, {}, half=False)
    assert not torch.allclose(ot.backbone(FORM, weights=path).eval()(x), model(x), rtol=0.1)


@pytest.mark.parametrize("family", [ot.Norm(), ot.Head(), ot.Full()], ids=str)
def test_a_family_without_layers_of_its_own_is_refused(family):
    net = ot.backbone(FORM, pretrained=False)
    with pytest.raises(AttachError, match=f"{family} puts nothing in place beside the filters"):
        pretraining(net, CLASSES, family, preprocessing=SEEN)


def test_adapters_that_do_not_fold_into_the_backbones_own_layers_are_refused(tmp_path):
    model = _seen("timm:test_efficientnet_gn", 64)  # no norm takes their bias
    with pytest.raises(
        TrainingError, match=r"need blocks\.0\.0\.conv\.bias, which the backbone does"
    ):
        write_trunk(tmp_path / "trunk.safetensors", model, {}, half=False, merged=True)
    assert not list(tmp_path.iterdir())


def test_a_written_backbone_reads_back_with_its_classes(model, tmp_path):
    path = tmp_path / "trunk.safetensors"
    size = write_trunk(path, model, {"data": "invented"}, half=False)
    assert path.stat().st_size == size
    again = ot.backbone(FORM, weights=path)
    assert again.num_classes == 3
    assert again.written_form == "resnet26(width=0.125, num_classes=3)"
    for name, tensor in trunk(model).items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_half_a_file_is_float16_and_reads_back_within_its_rounding(model, tmp_path):
    path = tmp_path / "half.safetensors"
    write_trunk(path, model, {}, half=True)
    with safe_open(path, "pt") as file:
        assert file.get_tensor("stem.weight").dtype == torch.float16
    again = ot.backbone(FORM, weights=path).state_dict()
    for name, tensor in trunk(model).items():
        assert again[name].dtype == tensor.dtype
        torch.testing.assert_close(again[name], tensor, rtol=1e-3, atol=1e-6)


def test_numbers_beyond_float16_are_refused_and_nothing_is_written(model, tmp_path):
    with torch.no_grad():
        model.get_submodule("norm").bias.fill_(1e6)
    with pytest.raises(TrainingError, match=r"norm\.bias holds 1e\+06, beyond float16"):
        write_trunk(tmp_path / "half.safetensors", model, {}, half=True)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_told(model, tmp_path):
    with pytest.raises(TrainingError, match="cannot write"):
        write_trunk(tmp_path / "none" / "trunk.safetensors", model, {}, half=False)


def test_weights_of_another_architecture_and_damaged_ones_are_refused(tmp_path):
    net = ot.backbone(FORM, pretrained=False)
    path = tmp_path / "trunk.safetensors"
    write_trunk(path, pretraining(net, CLASSES, preprocessing=SEEN), {}, half=False)
    with pytest.raises(BackboneError, match=r"holds weights of resnet26.*timm:test_resnet"):
        ot.backbone("timm:test_resnet", weights=path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedError, match="its content does not match its own checksum"):
        ot.backbone(FORM, weights=path)


@pytest.mark.parametrize("form", ["torchvision:mobilenet_v3_small", "timm:test_resnet"])
def test_a_trunk_of_another_library_reads_back_by_the_name_it_was_asked_for(form, tmp_path):
    path = tmp_path / "trunk.safetensors"
    net = ot.backbone(form, pretrained=False)
    write_trunk(path, pretraining(net, CLASSES, preprocessing=SEEN), {}, half=False)
    again = ot.backbone(form, weights=path)
    assert again.written_form == f"{form}(num_classes=3)"
    trained = net.state_dict()
    kept = [name for name, t in again.state_dict().items() if torch.equal(t, trained[name])]
    assert len(kept) >= len(trained) - 2  # all but the classifier


def test_a_name_with_a_tag_is_the_same_architecture(tmp_path):
    path = tmp_path / "trunk.safetensors"
    net = ot.backbone("timm:test_resnet.r160_in1k", pretrained=False)
    write_trunk(path, pretraining(net, CLASSES, preprocessing=SEEN), {}, half=False)
    ot.backbone("timm:test_resnet", weights=path)
    with pytest.raises(BackboneError, match="holds weights of timm:test_resnet"):
        ot.backbone("timm:test_vit", weights=path)
