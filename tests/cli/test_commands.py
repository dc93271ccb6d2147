"""The commands, as a user meets them: the whole road, --json, and every refusal in one line."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import typer
from safetensors.torch import load_file

import onetrunk as ot
import onetrunk.backbones
from onetrunk.backbones import fingerprint, resnet26
from onetrunk.cli import quickstart
from onetrunk.cli.commands import upkeep
from onetrunk.cli.console import Screen
from onetrunk.cli.reading import name_of
from onetrunk.cli.training import Request, alone, load_as_trained
from onetrunk.data import Images, load
from onetrunk.errors import BankError, DataError, DivergedError
from onetrunk.export.base import N_CHECKED
from onetrunk.files import DISK

VERBS = ("quickstart", "new", "train", "evaluate", "predict", "list", "show", "verify", "remove")


def test_the_whole_road(run, photos, tmp_path):
    bank = tmp_path / "garden.bank"
    assert run("new", bank, "--backbone", "resnet26(width=0.25)").status == 0
    trained = run("train", bank, "stripes", "--data", photos, "--epochs", 60)
    assert trained.status == 0, trained.err
    assert "linear probe" in trained.out and "of a fine-tuned network" in trained.out
    evaluated = json.loads(run("evaluate", bank, "stripes", "--data", photos, "--json").out)
    assert evaluated["accuracy"] > 0.6 and set(evaluated["per_class"]) == {"across", "down"}
    predicted = run("predict", bank, "stripes", photos / "down", "--top-k", 1)
    assert predicted.status == 0 and predicted.out.count("\n") == 20
    listed = json.loads(run("list", bank, "--json").out)
    assert list(listed["domains"]) == ["stripes"]
    assert "parallel" in run("show", bank, "stripes").out
    assert "1 domain whole" in run("verify", bank).out
    assert run("remove", bank, "stripes", "--yes").status == 0
    assert json.loads(run("list", bank, "--json").out)["domains"] == {}


def test_images_that_cannot_be_read_are_counted_where_they_are_few_and_an_error_where_all(
    run, photos, bank, tmp_path
):
    good, bad = sorted((photos / "down").iterdir())[0], tmp_path / "bad.png"
    bad.write_text("no image")
    some = run("predict", bank, "stripes", good, bad)
    assert some.status == 0 and "1 of 2 images have no answer; the first: " in some.err
    assert "bad.png" in some.err and len(some.out.splitlines()) == 2
    none = run("predict", bank, "stripes", bad, bad)
    assert none.status == 1 and "none of the 2 images has an answer; the first: " in none.err


def test_a_folder_is_cut_for_evaluation_as_it_was_for_training(run, bank, photos):
    words = ("--data", photos, "--epochs", 1, "--no-probe", "--split", "0.8,0.1,0.1", "--json")
    trained = json.loads(run("train", bank, "cut", *words).out)
    assert ot.Bank.open(bank).domains["cut"].provenance["split"] == "0.8,0.1,0.1"
    evaluated = run("evaluate", bank, "cut", "--data", photos)
    assert (
        "cut: 4 test images" in evaluated.out
        and "cut by class into 0.8 / 0.1 / 0.1" in evaluated.out
    )
    again = json.loads(run("evaluate", bank, "cut", "--data", photos, "--json").out)
    assert again["accuracy"] == trained["accuracy"]


def test_json_is_all_that_goes_to_standard_output(run, photos, bank):
    ran = run("train", bank, "more", "--data", photos, "--epochs", 1, "--json")
    result = json.loads(ran.out)
    assert result["domain"] == "more" and result["linear_probe_accuracy"] is not None
    assert 0 < result["delta_share_of_backbone"] < 0.2
    assert json.loads(run("show", bank, "more", "--json").out)["cost"]["adapters"] > 0
    assert json.loads(run("verify", bank, "--json").out)["ok"] is True


def test_what_is_exported_loads_into_the_stock_architecture(run, bank, tmp_path):
    out = tmp_path / "stripes.safetensors"
    ran = run("export", bank, "stripes", "--out", out)
    assert ran.status == 0, ran.err
    assert "loads into resnet26(width=0.25, num_classes=2)" in ran.out
    stock = ot.backbones.resnet26(width=0.25, num_classes=2).eval()
    stock.load_state_dict(load_file(out))
    images_bchw = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    model = ot.Bank.open(bank).load("stripes")
    torch.testing.assert_close(stock(images_bchw), model(images_bchw), rtol=1e-4, atol=1e-4)


def test_a_domain_and_a_whole_bank_are_exported_as_onnx(run, bank, photos, tmp_path):
    words = ("--data", photos, "--epochs", 1, "--no-probe")
    assert run("train", bank, "more", *words, "--adapter", "lowrank(rank=2)").status == 0
    one, both = tmp_path / "one.onnx", tmp_path / "both.onnx"
    ran = run("export", bank, "more", "--out", one, "--data", photos)
    assert ran.status == 0, ran.err
    assert " images of " in ran.out and "differs from the domain's network" in ran.out
    report = json.loads(run("export", bank, "--all", "--out", both, "--json").out)
    assert report["domains"] == ["stripes", "more"] and report["checked_on"] == "builtin:photos"
    assert report["format"] == "onnx" and both.stat().st_size == report["bytes"]


def test_an_export_that_is_not_said_clearly_is_refused(run, bank, tmp_path):
    for words, message in (
        (("--out", tmp_path / "x.onnx"), "name the domains to export, or give --all"),
        (("stripes", "--all", "--out", tmp_path / "x.onnx"), "name the domains to export"),
        (("--all", "--out", tmp_path / "x.pt2"), "in one file are ONNX only"),
        (("stripes", "--out", tmp_path / "x.h5"), "the ending of x.h5 is none of"),
    ):
        ran = run("export", bank, *words)
        assert ran.status == 1 and message in ran.err
    assert not [path for path in tmp_path.iterdir() if path != bank]


def test_placement_options_reach_the_plan(run, photos, bank):
    words = ("train", bank, "late", "--data", photos, "--epochs", 1, "--no-probe", "--json")
    ran = run(*words, "--adapter", "lowrank(rank=2)", "--stages", "late", "--convs", "first")
    assert json.loads(ran.out)["sites"] == 4
    assert json.loads(ran.out)["family"] == "lowrank(rank=2)"


def test_what_lies_beside_the_images_is_named(run, photos, bank, tmp_path):
    shutil.copytree(photos, tmp_path / "photos")
    (tmp_path / "photos" / "notes.txt").write_text("from the garden")
    ran = run("train", bank, "noted", "--data", tmp_path / "photos", "--epochs", 1, "--no-probe")
    assert "1 left out that are no images of a class: notes.txt\n" in ran.err


def test_a_training_that_only_does_harm_is_told(run, photos, bank, monkeypatch):
    words = ("train", bank, "harmed", "--data", photos, "--epochs", 1)
    assert "no epoch did better" not in run(*words).err
    monkeypatch.setattr("onetrunk.cli.training.fit", lambda *_args, **_options: iter(()))
    ran = run(*words, "--replace")
    assert ran.status == 0
    assert "no epoch did better on validation images than the state that training" in ran.err


def test_a_domain_is_replaced_only_when_asked(run, photos, bank):
    words = ("train", bank, "stripes", "--data", photos, "--epochs", 1, "--no-probe")
    refused = run(*words)
    assert refused.status == 1
    assert "has a domain 'stripes' already. Use --replace" in refused.err
    assert run(*words, "--replace").status == 0


@pytest.mark.parametrize(
    "words, says",
    [
        (("list", "nowhere.bank"), "nowhere.bank"),
        (("show", "{bank}", "strips"), "no domain 'strips'. Did you mean 'stripes'?"),
        (("remove", "{bank}", "rose", "--yes"), "no domain 'rose'"),
        (("evaluate", "{bank}", "stripes", "--data", "nowhere"), "nowhere"),
        (
            ("evaluate", "{bank}", "stripes", "--data", "sklearn:digits"),
            "classes are not the domain's",
        ),
        (("predict", "{bank}", "stripes", "no.jpg"), "no.jpg: there is no such file"),
        (
            ("train", "{bank}", "x", "--data", "{photos}", "--device", "abacus"),
            "device='abacus' cannot be used",
        ),
        (
            (
                "pretrain",
                "resnet26(width=0.25)",
                "--data",
                "{photos}",
                "--out",
                "b.bank",
                "--device",
                "abacus",
            ),
            "device='abacus' cannot be used",
        ),
        (
            ("new", "b.bank", "--backbone", "resnet26(width=0.5)", "--weights", "w.safetensors"),
            "the weights cannot be read: No such file or directory at w.safetensors",
        ),
        (("train", "{bank}", "Two Words", "--data", "x"), "Use 'two-words'"),
        (("train", "{bank}", "x", "--data", "sklearn:digit"), "Did you mean"),
        (
            ("train", "{bank}", "x", "--data", "{photos}", "--adapter", "lora(rank=8)"),
            "unknown adapter family 'lora'",
        ),
        (
            ("train", "{bank}", "x", "--data", "{photos}", "--adapter", "lowrank(rank=999)"),
            "no matrix there has rank above",
        ),
        (
            ("train", "{bank}", "x", "--data", "{photos}", "--adapter", "lowrank(r=8)"),
            "has no field 'r': it takes rank",
        ),
        (
            ("train", "{bank}", "x", "--data", "{photos}", "--recipe", "papers"),
            "Did you mean 'paper'?",
        ),
        (
            ("train", "{bank}", "x", "--data", "{photos}", "--stages", "front"),
            "known are early, mid, late",
        ),
        (("new", "{bank}", "--backbone", "resnet26(width=0.25)"), "{bank}"),
        (("new", "b.bank", "--backbone", "timm:resnet81"), "unknown timm model 'resnet81'"),
        (("new", "b.bank", "--backbone", "resnet18"), "unknown backbone 'resnet18'"),
        (
            ("new", "b.bank", "--backbone", "resnet26(width=0.3)"),
            "32 width has to be a whole number",
        ),
        (
            ("new", "b.bank", "--backbone", "resnet26(width=0.5)", "--weights", "w.pth"),
            "nothing is unpickled",
        ),
    ],
)
def test_bad_input_gets_one_line_and_status_1(
    run, bank, photos, tmp_path, monkeypatch, words, says
):
    monkeypatch.chdir(tmp_path)
    before = sorted(os.walk(bank))
    names = {"bank": bank, "photos": photos}
    ran = run(*(word.format(**names) for word in words))
    assert ran.status == 1
    assert says.format(**names) in ran.err
    assert ran.err.startswith("error: ") and ran.err.count("\n") == 1
    assert sorted(os.walk(bank)) == before
    assert not (tmp_path / "b.bank").exists()


@pytest.mark.parametrize(
    "words, says",
    [
        (("frobnicate",), "No such command"),
        (("train", "b.bank"), "Missing"),
        (("train", "{bank}", "x", "--data", "d", "--split", "1,2"), "three shares"),
        (
            ("evaluate", "{bank}", "stripes", "--data", "d", "--split", "dev"),
            "none of train, val, test",
        ),
        (("remove", "{bank}", "stripes"), "--yes"),
        (("predict", "{bank}", "stripes", "x.png", "--top-k", "0"), "--top-k"),
    ],
)
def test_wrong_usage_gets_status_2(run, bank, words, says):
    ran = run(*(word.format(bank=bank) for word in words))
    assert ran.status == 2
    assert says in ran.err


def test_a_damaged_bank_is_found_and_named(run, bank):
    blob = max((bank / "blobs").iterdir(), key=lambda file: file.stat().st_size)
    data = bytearray(blob.read_bytes())
    data[len(data) // 2] ^= 1
    blob.write_bytes(data)
    ran = run("verify", bank)
    assert ran.status == 1 and "problem(s); the first:" in ran.err and blob.name[:12] in ran.err


LISTENING = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores Ctrl-C
from onetrunk.cli.app import main
main()
"""


def test_stopping_a_training_leaves_the_bank_whole_and_resuming_goes_on(run, bank, photos):
    words = ("train", str(bank), "more", "--data", str(photos), "--no-probe", "--epochs", "3000")
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", LISTENING, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while "sites" not in process.stdout.readline():
        assert process.poll() is None, process.stderr.read()
    time.sleep(2)  # into the training, or at its door
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert err.strip().endswith("A training goes on with --resume.")
    assert list(ot.Bank.open(bank).domains) == ["stripes"]
    assert ot.Bank.open(bank).verify().ok
    checkpoint = bank / "unfinished" / "more.safetensors"
    kept = checkpoint.read_bytes()
    anew = run(*words)
    assert anew.status == 1 and "is a training of 'more' that was stopped. Go on with" in anew.err
    assert checkpoint.read_bytes() == kept
    with DISK.lock(checkpoint.with_suffix(".lock"), 0.0):
        for more in ((), ("--resume",)):  # whether or not it has a checkpoint by now
            beside = run(*words, *more)
            assert beside.status == 1 and "'more' is being trained into" in beside.err
    checkpoint.unlink()
    assert run(*words[:-1], "1").status == 0
    assert not checkpoint.parent.exists()


def test_a_quickstart_removes_a_bank_of_its_own_only(bank, tmp_path):
    theirs = fingerprint(ot.Bank.open(bank).backbone)
    with pytest.raises(BankError, match=r"of this version\. Give another"):
        quickstart._clear(bank, theirs)  # a domain that it did not train
    empty = ot.Bank.create(tmp_path / "empty", resnet26(width=0.125))
    with pytest.raises(BankError, match="holds more than a quickstart"):
        quickstart._clear(empty.path, theirs)  # weights of somebody's own
    (empty.path / "unfinished").mkdir()
    (empty.path / "unfinished" / "mine.safetensors").touch()
    with pytest.raises(BankError, match="holds more than a quickstart"):
        quickstart._clear(empty.path, empty.backbone_fingerprint)
    (empty.path / "unfinished" / "mine.safetensors").unlink()
    (empty.path / "notes.txt").touch()
    with pytest.raises(BankError, match="holds more than a quickstart of this version"):
        quickstart._clear(empty.path, empty.backbone_fingerprint)
    (empty.path / "notes.txt").unlink()
    (empty.path / "unfinished" / ".onetrunk-0123456789abcdef.tmp").touch()  # of a kill
    quickstart._clear(empty.path, empty.backbone_fingerprint)
    assert bank.exists() and not empty.path.exists()


def test_a_training_that_diverged_leaves_nothing_to_resume(run, bank, photos, monkeypatch):
    def diverging(*_args, checkpoint, **_options):
        checkpoint.write_bytes(b"of a minute ago")
        raise DivergedError("step 9 has the loss nan")
        yield

    monkeypatch.setattr("onetrunk.cli.training.fit", diverging)
    ran = run("train", bank, "new", "--data", photos, "--no-probe")
    assert ran.status == 1 and "the loss nan" in ran.err
    assert not (bank / "unfinished").exists()


def test_a_name_that_was_taken_meanwhile_is_refused_before_the_images_are_read(bank):
    request = Request("stripes", None, "photos")
    with (
        pytest.raises(BankError, match="a domain 'stripes' already: it was trained just now"),
        alone(ot.Bank.open(bank), request),
    ):
        pass
    assert not (bank / "unfinished").exists()


@pytest.mark.parametrize(
    "cut", ["0.3333333333333333,0.3333333333333333,0.3333333333333334", "x", ""]
)
def test_a_cut_that_cannot_be_read_is_the_usual_one(photos, bank, cut):
    card = ot.Bank.open(bank).domains["stripes"]
    theirs = dataclasses.replace(card, provenance={"data": photos.name, "split": cut})
    found = load_as_trained(str(photos), theirs)
    assert found.cut == ((0.7, 0.15, 0.15) if len(cut) < 9 else tuple(map(float, cut.split(","))))
    elsewhere = dataclasses.replace(theirs, provenance={**theirs.provenance, "data": "other"})
    assert load_as_trained(str(photos), elsewhere).cut == found.cut  # it may be the same folder


def test_a_source_that_its_cut_does_not_fit_is_refused_and_not_cut_otherwise(
    photos, bank, tmp_path
):
    for name in ("across", "down"):
        few = tmp_path / photos.name / name
        few.mkdir(parents=True)
        for file in sorted((photos / name).iterdir())[:3]:
            shutil.copy(file, few)
    card = ot.Bank.open(bank).domains["stripes"]
    odd = dataclasses.replace(card, provenance={"data": photos.name, "split": "0.5,0.5,0.5"})
    assert load(tmp_path / photos.name).cut == (0.7, 0.15, 0.15)
    with pytest.raises(DataError, match="sum to 1"):
        load_as_trained(str(tmp_path / photos.name), odd)


def test_a_file_is_named_after_its_domain_by_default(run, bank, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("export", bank, "stripes").status == 0
    assert run("export", bank, "stripes", "--format", "onnx").status == 0
    assert {path.name for path in tmp_path.iterdir()} >= {"stripes.safetensors", "stripes.onnx"}


@pytest.mark.parametrize(
    ("verb", "says"),
    [
        ("train", "goes on with --resume."),
        ("compress", "error: stopped.\n"),  # it says itself what is left
        ("benchmark", "is kept: the same command goes on from there.\n"),
        ("new", "nothing half-written is"),
    ],
)
def test_ctrl_c_speaks_of_resuming_where_that_can_be_done(run, monkeypatch, verb, says):
    def stopped(**_options):
        raise KeyboardInterrupt

    monkeypatch.setattr("onetrunk.cli.app.app", stopped)
    ran = run(verb)
    assert ran.status == 1 and says in ran.err
    assert ("--resume" in ran.err) == (verb == "train")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "error: No space left on device: what"),
        (RuntimeError("operator torchvision::nms does not exist"), "come from different builds"),
        (
            PermissionError(errno.EACCES, "Permission denied", "x"),
            "permission denied at x. Ask its",
        ),
        (OSError(errno.EIO, "Input/output error"), "the device reported an input/output error."),
    ],
)
def test_what_the_machine_lacks_is_said_in_a_line(run, monkeypatch, error, says):
    def failing(**_options):
        raise error

    monkeypatch.setattr("onetrunk.cli.app.app", failing)
    ran = run("list")
    assert ran.status == 1 and says in ran.err


def test_other_errors_of_the_machine_are_not_hidden(run, monkeypatch):
    def failing(**_options):
        raise OSError("a library's own")

    monkeypatch.setattr("onetrunk.cli.app.app", failing)
    with pytest.raises(OSError, match="a library's own"):
        run("list")


def test_a_no_changes_nothing_and_says_so(run, monkeypatch):
    def declined(**_options):
        raise typer.Abort

    monkeypatch.setattr("onetrunk.cli.app.app", declined)
    assert run("remove").err == "error: nothing was changed.\n"


def test_what_an_encoding_cannot_say_is_replaced():
    code = "import onetrunk.cli.app as cli; cli.app = lambda **_: print('\\u2588'); cli.main()"
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, text=True,
    )  # fmt: skip
    assert (ran.returncode, ran.stdout) == (0, "?\n"), ran.stderr


def test_a_bank_that_cannot_be_written_is_refused_before_the_images_are_read(
    run, bank, photos, monkeypatch
):
    def refused(folder):
        raise PermissionError(errno.EACCES, "Permission denied", str(folder))

    monkeypatch.setattr("onetrunk.cli.training.check_writable", refused)
    ran = run("train", bank, "new", "--data", photos)
    assert ran.status == 1 and "cannot train into bank" in ran.err
    assert "permission denied" in ran.err and ran.out == ""


def test_every_verb_has_help_with_an_example(run):
    for verb in (*VERBS, "export"):
        ran = run(verb, "--help")
        assert ran.status == 0 and "Example: onetrunk " + verb in ran.out.replace("\n", " ")


def test_version_and_help_import_no_torch():
    heavy = "assert not {'torch', 'timm', 'numpy'} & set(sys.modules)"
    code = f"import sys; from onetrunk.cli.app import app; {heavy}"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (
        ot.__version__
        in subprocess.run(
            [sys.executable, "-m", "onetrunk", "--version"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )


def test_an_export_goes_over_no_file_unasked(run, bank, tmp_path):
    out = tmp_path / "stripes.safetensors"
    out.write_text("precious")
    ran = run("export", bank, "stripes", "--out", out)
    assert ran.status == 1 and "is there already. Say --replace" in ran.err
    assert out.read_text() == "precious"
    assert run("export", bank, "stripes", "--out", out, "--replace").status == 0
    assert out.stat().st_size > 1000


def test_an_export_of_nothing_says_what_there_is(run, tmp_path):
    run("new", tmp_path / "empty.bank", "--backbone", "resnet26(width=0.25)")
    ran = run("export", tmp_path / "empty.bank", "--all", "--format", "onnx")
    assert ran.status == 1 and "has no domains. Train some first" in ran.err


def test_an_export_looks_at_a_few_images_only(run, bank, photos, tmp_path, monkeypatch):
    def looked(few, *_rest):
        raise DataError(f"{len(few)} images")

    monkeypatch.setattr("onetrunk.cli.exporting.read", looked)
    ran = run("export", bank, "stripes", "--data", photos, "--out", tmp_path / "x.safetensors")
    assert int(ran.err.split()[1]) <= N_CHECKED


def test_a_source_is_cut_as_it_was_whatever_it_is_called(run, bank, photos, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(photos)
    monkeypatch.chdir(photos)
    found = [
        run("evaluate", bank, "stripes", "--data", s, "--json")
        for s in (photos, ".", tmp_path / "link")
    ]
    assert len({ran.out for ran in found}) == 1 and found[0].status == 0


def test_a_source_is_called_by_its_folder(photos, monkeypatch, tmp_path):
    monkeypatch.chdir(photos)
    assert name_of(".") == photos.name == name_of(str(photos) + "/")
    assert name_of("hf:a/b") == "hf:a/b" and name_of("sr\udcff") == "sr?"


def test_a_question_does_not_go_into_the_json(bank, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    asked = []
    monkeypatch.setattr("typer.confirm", lambda text, **how: asked.append(how))
    upkeep.remove(bank, "stripes", as_json=True)
    assert asked == [{"abort": True, "err": True}]
    assert json.loads(capsys.readouterr().out)["removed"] == "stripes"


def test_epochs_without_tuning_are_told(run, bank, tmp_path):
    ran = run("compress", bank, "--keep", "0.5", "--epochs", "9", "--out", tmp_path / "c.bank")
    assert ran.status == 2 and "it is for --tune" in ran.err


def test_a_compression_makes_no_folder_that_it_was_not_asked_for(run, bank, tmp_path):
    ran = run("compress", bank, "--keep", "0.5", "--out", tmp_path / "no" / "c.bank")
    assert ran.status == 1 and "there is no folder" in ran.err and not (tmp_path / "no").exists()


@pytest.mark.parametrize("option", ["--out", "--map"])
def test_a_folder_in_the_place_of_a_file_is_refused_at_once(run, bank, photos, tmp_path, option):
    place = tmp_path / "map.png"
    place.mkdir()
    ran = run("allocate", bank, "b", "--data", photos, "--budget", "2%", option, place)
    assert ran.status == 1 and f"{place} cannot be written: Is a directory" in ran.err
    assert "linear probe" not in ran.err


def test_a_path_without_a_name_is_refused(run, photos, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    ran = run("pretrain", "resnet26(width=0.25)", "--data", photos, "--out", ".")
    assert ran.status == 1 and "cannot write .: Is a directory" in ran.err
    ran = run("quickstart", "--out", ".")
    assert ran.status == 1 and "has no name that a bank could get" in ran.err


def test_a_quickstart_goes_over_no_picture_and_is_alone(tmp_path):
    out = tmp_path / "demo.bank"
    out.with_name("demo.bank.png").write_text("mine")
    with pytest.raises(BankError, match=r"demo.bank.png is there already, where the picture"):
        quickstart.run(out, Screen())
    out.with_name("demo.bank.png").unlink()
    with (
        DISK.lock(tmp_path / "demo.bank.lock", 0.0),
        pytest.raises(BankError, match="is being made by another quickstart"),
    ):
        quickstart.run(out, Screen())


def test_images_that_cannot_be_read_have_a_fingerprint(photos, tmp_path):
    files = sorted(photos.rglob("*.png"))[:2]
    there = Images.from_files([*files, tmp_path / "gone.png"], [0, 1, 1], ["a", "b"])
    assert there.fingerprint() != Images.from_files(files, [0, 1], ["a", "b"]).fingerprint()


@pytest.mark.parametrize("command", [("list",), ("show", "stripes")])
def test_a_command_speaks_of_one_generation(run, bank, monkeypatch, command):
    """Somebody removes the domain after it was first looked at."""
    before = ot.Bank.open(bank).domains
    looks = iter([before])
    gone = type(before)(dataclasses.replace(ot.Bank.open(bank)._store.manifest, domains={}), bank)
    monkeypatch.setattr(ot.Bank, "domains", property(lambda self: next(looks, gone)))
    verb, *names = command
    ran = run(verb, bank, *names)
    assert ran.status == 0 and "stripes" in ran.out
