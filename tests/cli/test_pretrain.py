"""pretrain as a user types it: a file for `new`, a stop that goes on, nothing overwritten."""

import json
import shutil

import pytest

import onetrunk.cli.pretraining as pretraining_module
from onetrunk.backbones import backbone
from onetrunk.bank.bank import Bank
from onetrunk.cli.console import Screen
from onetrunk.data import Prepared, Preprocessing, load
from onetrunk.errors import DivergedError
from onetrunk.files import DISK

FORM = "resnet26(width=0.25)"


def words(photos, out, *more):
    return ("pretrain", FORM, "--data", photos, "--out", out, "--size", 16, "--epochs", 2, *more)


def test_a_pretrained_file_makes_a_bank(run, photos, tmp_path):
    out = tmp_path / "trunk.safetensors"
    done = run(*words(photos, out, "--adapter", "series", "--half", "--json"))
    assert done.status == 0, done.err
    report = json.loads(done.out)
    assert report["trained_with"] == "full with series"
    assert report["adapters"] == "left out: the accuracies are with them"
    assert report["bytes"] == out.stat().st_size
    assert list(tmp_path.iterdir()) == [out]
    assert run("new", tmp_path / "a.bank", "--backbone", FORM, "--weights", out).status == 0
    assert Bank.open(tmp_path / "a.bank").backbone_form == "resnet26(width=0.25, num_classes=2)"


def test_a_stopped_pretraining_goes_on_with_resume_only(run, photos, tmp_path, monkeypatch):
    out, fit = tmp_path / "trunk.safetensors", pretraining_module.fit

    def stopping(*args, **kwargs):
        for number, step in enumerate(fit(*args, **kwargs)):
            if number == 1:
                raise KeyboardInterrupt
            yield step

    monkeypatch.setattr(pretraining_module, "fit", stopping)
    assert run(*words(photos, out)).status == 1
    monkeypatch.setattr(pretraining_module, "fit", fit)
    assert [path.name for path in tmp_path.iterdir()] == ["trunk.safetensors.unfinished"]
    refused = run(*words(photos, out))
    assert refused.status == 1
    assert "is a pretraining that was stopped. Go on with --resume" in refused.err
    assert run(*words(photos, out, "--resume")).status == 0
    assert list(tmp_path.iterdir()) == [out]


def test_a_pretraining_that_diverges_is_not_in_the_way_of_the_next(
    run, photos, tmp_path, monkeypatch
):
    out, fit = tmp_path / "trunk.safetensors", pretraining_module.fit

    def diverging(*args, checkpoint, **kwargs):
        for step in fit(*args, checkpoint=checkpoint, **kwargs):
            yield step
            checkpoint.write_bytes(b"")
            raise DivergedError("the loss is not finite at step 2")

    with monkeypatch.context() as patch:
        patch.setattr(pretraining_module, "fit", diverging)
        assert "the loss is not finite" in run(*words(photos, out)).err
    assert list(tmp_path.iterdir()) == []
    assert run(*words(photos, out)).status == 0


def test_two_processes_do_not_pretrain_one_file(run, photos, tmp_path):
    out = tmp_path / "trunk.safetensors"
    with DISK.lock(tmp_path / "trunk.safetensors.unfinished.lock", 0.0):
        ran = run(*words(photos, out))
    assert ran.status == 1 and "is being pretrained by another process. Wait for it" in ran.err


def test_images_that_cannot_be_read_are_counted(run, photos, tmp_path):
    shutil.copytree(photos, tmp_path / "photos")
    broken = next(path for path in sorted((tmp_path / "photos").rglob("*.png")))
    broken.write_bytes(b"junk")
    (tmp_path / "photos" / "notes.txt").write_text("")
    ran = run(*words(tmp_path / "photos", tmp_path / "trunk.safetensors"))
    assert ran.status == 0 and "images left out; the first: " in ran.err and broken.name in ran.err
    assert "1 left out that are no images of a class: notes.txt" in ran.err


def test_merge_keeps_the_network_that_was_scored(run, photos, tmp_path):
    out = tmp_path / "trunk.safetensors"
    done = run(*words(photos, out, "--adapter", "series(init='released')", "--merge", "--json"))
    report = json.loads(done.out)
    assert report["adapters"] == "folded in"
    seen = Preprocessing.from_json(report["preprocessing"])
    images = Prepared(load(str(photos)).with_validation().val, seen)
    prepared, labels = images.batch(range(len(images)))
    logits = backbone(FORM, weights=out).eval()(seen.evaluation_view(prepared))
    assert float((logits.argmax(1) == labels).double().mean()) == report["val_accuracy"]


def test_merge_without_adapters_is_refused(run, photos, tmp_path):
    refused = run(*words(photos, tmp_path / "trunk.safetensors", "--merge"))
    assert refused.status == 1 and "there are none: give --adapter too" in refused.err


def test_a_file_that_cannot_be_written_is_refused_before_the_training(run, photos, tmp_path):
    refused = run(*words(photos, tmp_path / "nowhere" / "trunk.safetensors"))
    assert refused.status == 1 and "trunk.safetensors: No such file or directory" in refused.err
    assert "classes" not in refused.out


def test_of_several_processes_one_talks(capsys):
    beside = Screen(quiet=True)
    beside.say("epoch 1")
    beside.warn("odd")
    beside.table(("name",), [("flowers",)])
    with beside.bar("pretraining") as show:
        show(1, 2)
    beside.finish({})
    assert capsys.readouterr() == ("", "")


def test_a_file_is_never_overwritten(run, photos, tmp_path):
    out = tmp_path / "trunk.safetensors"
    out.write_bytes(b"mine")
    refused = run(*words(photos, out))
    assert refused.status == 1
    assert "is there already" in refused.err
    assert out.read_bytes() == b"mine"


@pytest.mark.parametrize("missing", [FORM.replace("resnet26", "resnet27"), "timm:none"])
def test_an_unknown_backbone_is_told_before_anything_is_read(run, photos, tmp_path, missing):
    refused = run("pretrain", missing, "--data", photos, "--out", tmp_path / "x.safetensors")
    assert refused.status == 1
    assert "unknown" in refused.err
    assert not list(tmp_path.iterdir())
