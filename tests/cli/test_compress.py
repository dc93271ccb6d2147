"""compress as a user types it: a new bank with one basis, the old as it was, nothing half-made."""

import json
import shutil
from contextlib import contextmanager

import pytest

import onetrunk as ot
import onetrunk.cli.compressing as compressing
from onetrunk.bank.bank import Bank
from onetrunk.cli.console import Screen, size
from onetrunk.core.rebuild import with_frozen_basis, with_trainable_basis
from onetrunk.errors import DivergedError
from onetrunk.files import DISK


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A bank with three parallel domains, and one linear probe that cannot be factored."""
    net = ot.backbone("resnet26(width=0.25)", pretrained=False)
    bank = Bank.create(tmp_path_factory.mktemp("banks") / "a.bank", net)
    for seed, name in enumerate(("stripes", "signs", "digits")):
        family = ot.Parallel(init="released")
        bank.add(
            name,
            ot.attach(net, family, ["across", "down"], input_size=(3, 32, 32), seed=seed),
        )
    bank.add("probe", ot.attach(net, ot.Head(), ["a", "b"], input_size=(3, 32, 32)))
    return bank.path


def files(path):
    return {p.name: p.read_bytes() for p in path.rglob("*") if p.is_file() and p.suffix != ".lock"}


def test_domains_get_one_basis_and_the_old_bank_stays(run, stored, tmp_path):
    before, out = files(stored), tmp_path / "half.bank"
    done = run("compress", stored, "--keep", 0.5, "--out", out, "--json")
    assert done.status == 0, done.err
    report = json.loads(done.out)
    assert report["numbers_after"] <= 0.5 * report["numbers_before"]
    assert "no adapters to factor" in report["domains"]["probe"]["note"]
    new = Bank.open(out)
    assert list(new.domains) == ["stripes", "signs", "digits", "probe"]
    assert new.verify().ok
    assert len(list((out / "blobs").glob("*.safetensors"))) == 4 + 1 + 1  # domains, trunk, basis
    assert new.basis_bytes == report["basis_bytes"] > 0
    assert files(stored) == before
    assert [path.name for path in tmp_path.iterdir()] == ["half.bank"]


def test_a_domain_without_test_images_is_said_to_be_judged_on_validation(
    run, stored, photos, tmp_path
):
    for split in ("train", "val"):
        shutil.copytree(photos, tmp_path / "cut" / split)
    words = ("compress", stored, "--keep", 0.5, "--no-picture")
    data = (f"--data=stripes={tmp_path / 'cut'}", f"--data=signs={photos}")
    done = run(*words, *data, "--out", tmp_path / "a.bank")
    assert done.status == 0, done.err
    of = [line for line in done.out.splitlines() if "judged on" in line]
    assert len(of) == 1 and of[0].startswith("stripes")
    done = run(*words, *data, "--out", tmp_path / "b.bank", "--json")
    found = json.loads(done.out)["domains"]
    assert [found[name]["judged_on"] for name in ("stripes", "signs", "digits")] == [
        "val",
        "test",
        "",
    ]


def test_with_data_it_measures_tunes_and_draws(run, stored, photos, tmp_path):
    out = tmp_path / "half.bank"
    done = run(
        "compress", stored, "--keep", 0.3, "--out", out, "--tune", f"stripes={photos}",
        "--epochs", 1, "--share", "both", "--json",
    )  # fmt: skip
    assert done.status == 0, done.err
    row = json.loads(done.out)["domains"]["stripes"]
    assert all(0 <= row[key] <= 1 for key in ("before", "compressed", "tuned"))
    assert (tmp_path / "half.bank.png").read_bytes().startswith(b"\x89PNG")
    assert "errors are those of the matrices" in done.err
    assert Bank.open(out).domains["stripes"].metrics["test_accuracy"] == row["tuned"]


def test_a_folder_is_cut_as_it_was_for_training(run, stored, photos, tmp_path):
    own = tmp_path / "a.bank"
    shutil.copytree(stored, own)
    assert run(
        "train", own, "cut", "--data", photos, "--epochs", 1, "--size", 32, "--no-probe",
        "--split", "0.5,0.1,0.4",
    ).status == 0  # fmt: skip
    done = run(
        "compress", own, "--keep", 1.0, "--out", tmp_path / "b.bank", "--no-picture", "--json",
        "--data", f"cut={photos}",
    )  # fmt: skip
    assert done.status == 0, done.err
    trained = Bank.open(own).domains["cut"].metrics["test_accuracy"]
    assert json.loads(done.out)["domains"]["cut"]["before"] == trained


def test_the_basis_is_tuned_by_all_domains_or_stays(run, stored, photos, tmp_path, monkeypatch):
    tuned = tuple(f"--tune={name}={photos}" for name in ("stripes", "signs", "digits"))
    words = ("compress", stored, "--keep", 0.3, *tuned, "--tune-basis", "--epochs", 1)
    seen = []

    def tune_basis(models, train, val, recipe, *, progress):
        seen.append((set(models), set(train), set(val), recipe.epochs))
        for name in models:
            assert len(train[name]) > len(val[name])
        return dict(models) if len(seen) == 1 else moved(models)

    def moved(models):
        loose = with_trainable_basis(models)
        for name, parameter in loose["stripes"].named_parameters():
            if name.endswith("right_ri"):
                parameter.data *= 2
        return with_frozen_basis(loose)

    monkeypatch.setattr(compressing, "tune_basis", tune_basis)
    ran = run(*words, "--no-picture", "--out", tmp_path / "a.bank")
    assert ran.status == 0, ran.err
    assert "the basis stays as it was: tuning it did not help on validation images" in ran.out
    ran = run(*words, "--no-picture", "--out", tmp_path / "b.bank")
    assert ran.status == 0 and "stays as it was" not in ran.out
    every = {"stripes", "signs", "digits"}
    assert seen == [(every, every, every, 1)] * 2
    bases = [Bank.open(tmp_path / f"{x}.bank").load("stripes").domain.basis for x in "ab"]
    assert bases[0] != bases[1]
    provenance = [Bank.open(tmp_path / f"{x}.bank").domains["stripes"].provenance for x in "ab"]
    assert [known["basis_tuned"] for known in provenance] == [False, True]


@pytest.mark.parametrize("budget", ["8000", "32kB", "5%"])
def test_a_budget_in_numbers_bytes_or_shares_of_the_backbone(run, stored, tmp_path, budget):
    tensors = Bank.open(stored).backbone.state_dict().values()
    most = 0.05 * sum(tensor.numel() for tensor in tensors) if budget == "5%" else 8000
    words = ("compress", stored, "--budget", budget, "--out", tmp_path / "b.bank", "--json")
    done = run(*words)
    assert done.status == 0, done.err
    assert 0.5 * most < json.loads(done.out)["numbers_after"] <= most


def test_images_without_labels_weigh_the_errors(run, stored, photos, tmp_path, monkeypatch):
    given = []
    compress = compressing.compress

    def watched(models, *args, covariances, **options):
        given.append(covariances)
        return compress(models, *args, covariances=covariances, **options)

    shown, bar = [], Screen.bar

    @contextmanager
    def lone(screen, what):
        assert not shown, f"{what} within {shown}: older versions of rich allow one at a time"
        shown.append(what)
        with bar(screen, what) as show:
            yield show
        shown.remove(what)

    monkeypatch.setattr(Screen, "bar", lone)
    monkeypatch.setattr(compressing, "compress", watched)
    names = ("stripes", "signs", "digits")
    words = ("compress", stored, "--keep", 0.5, "--out", tmp_path / "b.bank")
    done = run(*words, *(f"--images={name}={photos / 'down'}" for name in names))
    assert done.status == 0, done.err
    assert set(given[0]) == set(names) and "errors are those of" not in done.err
    (tmp_path / "none").mkdir()
    refused = run(
        *words[:-1], tmp_path / "c.bank", *(f"--images={n}={tmp_path}/none" for n in names)
    )
    assert "there is no image below. Give a folder of images" in refused.err


def test_a_loss_instead_of_a_size(run, stored, photos, tmp_path):
    out = tmp_path / "b.bank"
    done = run(
        "compress", stored, "--max-loss", 0.5, "--out", out, "--no-picture", "--json",
        *(f"--data={name}={photos}" for name in ("stripes", "signs", "digits")),
    )  # fmt: skip
    assert done.status == 0, done.err
    row = json.loads(done.out)["domains"]["stripes"]
    assert row["tuned"] is None
    assert row["compressed"] >= row["before"] - 0.5 - 0.34  # the loss is on validation images


def test_a_stop_leaves_nothing(run, stored, tmp_path, monkeypatch):
    def stopping(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(compressing, "_add", stopping)
    stopped = run("compress", stored, "--keep", 0.5, "--out", tmp_path / "b.bank")
    assert (stopped.status, stopped.err.splitlines()[-1]) == (1, "error: stopped.")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "say how far: one of --keep 0.5, --budget 300kB, and --max-loss 0.01"),
        (("--keep", 0.5, "--max-loss", 0.1), "say how far: one of --keep 0.5, --budget"),
        (("--keep", 0.5, "--budget", "9kB"), "say how far: one of --keep 0.5, --budget"),
        (("--budget", "half"), "cannot read the budget 'half'"),
        (("--budget", "9B"), "--budget 9B: n_bytes=9 leaves"),
        (
            ("--keep", 0.5, "--images", "stripes=x", "--data", "stripes=y"),
            "'stripes' has --images and images of --data or --tune",
        ),
        (("--keep", 0.5, "--images", "stripes=x"), "--images x: there is no image below"),
        (("--keep", 0.5, "--tune-basis", "--tune", "stripes=x"), "and 'signs' has no --tune"),
        (("--keep", 0.5, "--images", "cats=photos"), "data was given for domain 'cats'"),
        (("--max-loss", 0.1), "--max-loss needs validation images"),
        (
            ("--max-loss", 0.1, "--data", "stripes=x"),
            "holds for domains whose images are given, and signs, digits have none. Give --data",
        ),
        (("--max-loss", 0.1, "--uniform"), "--uniform goes with --keep"),
        (("--max-loss", 1, "--data", "stripes=x"), "--max-loss 1: give a share of accuracy from 0"),
        (("--keep", 0.5, "--tune", "stripes"), "write DOMAIN=SOURCE"),
        (("--keep", 0.5, "--data", "cats=photos"), "data was given for domain 'cats'"),
        (("--keep", 0.5, "--share", "left"), "share='left': the shared side is one of"),
        (("--keep", 0.0001), "Keep that many or more, 0."),
        (("--keep", 2), "give a share above 0 and up to 1"),
    ],
)
def test_bad_requests_are_refused_and_nothing_is_written(run, stored, tmp_path, words, message):
    refused = run("compress", stored, "--out", tmp_path / "b.bank", *words)
    assert refused.status == 1
    assert message in refused.err
    assert not list(tmp_path.iterdir())


def test_a_bank_in_the_way_and_one_without_adapters_are_refused(run, stored, tmp_path):
    refused = run("compress", stored, "--keep", 0.5, "--out", stored)
    assert "is there already. Give another folder" in refused.err
    net = ot.backbone("resnet26(width=0.25)", pretrained=False)
    bank = Bank.create(tmp_path / "empty.bank", net)
    refused = run("compress", bank.path, "--keep", 0.5, "--out", tmp_path / "b.bank")
    assert "has no domains. Train some first" in refused.err
    bank.add("probe", ot.attach(net, ot.Head(), ["a", "b"], input_size=(3, 32, 32)))
    refused = run("compress", bank.path, "--keep", 0.5, "--out", tmp_path / "b.bank")
    assert "none of the 1 domains has series, parallel or low-rank adapters" in refused.err
    assert "'probe': no adapters to factor (head). Train some first" in refused.err


def test_a_compressed_bank_is_told_apart(run, stored, photos, tmp_path):
    out = tmp_path / "half.bank"
    ran = run("compress", stored, "--keep", 0.5, "--uniform", "--out", out)
    assert ran.status == 0, ran.err
    assert "adapters of 3 domains" in ran.out and "50.0 % of the directions at every" in ran.out
    Bank.open(out).remove("probe")
    refused = run("compress", out, "--keep", 0.5, "--out", tmp_path / "b.bank")
    assert "'stripes': it is over a basis already. Train some first" in refused.err


def test_a_basis_that_the_bank_has_already_counts_in_its_size(run, stored, tmp_path):
    once, twice = tmp_path / "once.bank", tmp_path / "twice.bank"
    assert run("compress", stored, "--keep", 0.5, "--out", once).status == 0
    bank = Bank.open(once)
    for seed in (1, 2):
        family = ot.Parallel(init="released")
        fresh = ot.attach(bank.backbone, family, ["a", "b"], input_size=(3, 32, 32), seed=seed)
        bank.add(f"new{seed}", fresh)
    ran = run("compress", once, "--keep", 0.5, "--out", twice)
    assert ran.status == 0, ran.err
    shared, every = (
        next(line for line in ran.out.splitlines() if line.startswith(start)).split()
        for start in ("basis, shared", "all")
    )
    assert f"{shared[2]} {shared[3]}" == size(bank.basis_bytes)
    held = bank.basis_bytes + sum(bank.domains[name].size for name in bank.domains)
    assert f"{every[1]} {every[2]}" == size(held)


def test_domains_of_which_no_two_share_their_layers_are_refused(run, stored, tmp_path):
    own = tmp_path / "own.bank"
    net = Bank.open(stored).backbone
    bank = Bank.create(own, net)
    for stage in ("early", "mid", "late"):
        where = ot.Where(stages=(stage,))
        fresh = ot.attach(net, ot.Parallel(), ["a", "b"], where=where, input_size=(3, 32, 32))
        bank.add(stage, fresh)
    refused = run("compress", own, "--keep", 0.5, "--out", tmp_path / "b.bank")
    assert refused.status == 1 and "no two of early, mid, late have adapters of one" in refused.err
    bank.add("later", bank.load("late"))
    ran = run("compress", own, "--keep", 0.5, "--out", tmp_path / "b.bank")
    assert ran.status == 0
    assert "its adapters are others, or at other layers, than those of 'late'" in " ".join(
        ran.out.split()
    )


def test_images_that_cannot_be_read_are_counted(run, stored, photos, tmp_path):
    shutil.copytree(photos, tmp_path / "photos")
    broken = next(path for path in sorted((tmp_path / "photos").rglob("*.png")))
    broken.write_bytes(b"junk")
    ran = run(
        "compress", stored, "--keep", 0.5, "--out", tmp_path / "b.bank", "--no-picture",
        f"--data=stripes={tmp_path / 'photos'}",
    )  # fmt: skip
    assert ran.status == 0 and f"images of {tmp_path / 'photos'} left out; the first: " in ran.err


def test_where_nothing_is_worth_sharing_no_basis_is_tuned(run, stored, photos, tmp_path):
    tuned = (f"--tune={name}={photos}" for name in ("stripes", "signs", "digits"))
    words = ("compress", stored, "--keep", 1, *tuned, "--tune-basis", "--epochs", 1)
    ran = run(*words, "--no-picture", "--out", tmp_path / "b.bank")
    assert ran.status == 0, ran.err
    assert "there is no basis to tune: every layer stays as it was" in ran.out
    assert Bank.open(tmp_path / "b.bank").domains["signs"].provenance["basis_tuned"] is False


def test_a_later_domain_is_trained_over_the_basis_that_is_there(run, stored, photos, tmp_path):
    out = tmp_path / "half.bank"
    assert run("compress", stored, "--keep", 0.5, "--out", out).status == 0
    blobs, size = len(list((out / "blobs").iterdir())), Bank.open(out).basis_bytes
    words = ("--data", photos, "--epochs", 1, "--size", 32, "--no-probe", "--plan-of", "stripes")
    ran = run("train", out, "next", *words)
    assert ran.status == 0, ran.err
    bank = Bank.open(out)
    assert bank.load("next").domain.basis == bank.load("stripes").domain.basis
    assert bank.load("next").domain.plan == bank.load("stripes").domain.plan
    assert run("train", out, "next", *words, "--replace").status == 0
    assert bank.basis_bytes == size and len(list((out / "blobs").iterdir())) == blobs + 1


def test_adapters_that_hold_nothing_are_said_to(run, stored, tmp_path):
    bank = Bank.open(stored)
    for name in ("stripes", "signs", "digits"):
        model = bank.load(name)
        for key, parameter in model.named_parameters():
            if ".adapter." in key:
                parameter.data.zero_()
        bank.replace(name, model)
    ran = run("compress", stored, "--keep", 0.5, "--out", tmp_path / "b.bank")
    assert ran.status == 0, ran.err
    assert "fewer than asked for: more directions would hold nothing" in ran.out


def test_a_picture_is_never_drawn_over_a_file(run, stored, photos, tmp_path):
    (tmp_path / "b.v1.png").write_text("mine")
    words = ("compress", stored, "--keep", 0.5, "--data", f"stripes={photos}")
    refused = run(*words, "--out", tmp_path / "b.v1")
    assert refused.status == 1 and "b.v1.png is there already, where the picture" in refused.err
    assert run(*words, "--out", tmp_path / "b.v2").status == 0
    assert (tmp_path / "b.v1.png").read_text() == "mine"
    assert (tmp_path / "b.v2.png").exists()


def test_what_cannot_be_written_is_known_before_the_work(run, stored, tmp_path):
    (tmp_path / "file").write_text("no folder")
    out = tmp_path / "file" / "b.bank"
    refused = run("compress", stored, "--keep", 0.5, "--out", out)
    assert refused.status == 1 and "cannot write beside" in refused.err


@pytest.fixture
def halved(run, stored, photos, tmp_path):
    """`compress` with two domains tuned, as a call with more words."""

    def call(out, *words):
        return run(
            "compress", stored, "--keep", 0.5, "--out", tmp_path / out, "--epochs", 2,
            "--no-picture", "--json", f"--tune=stripes={photos}", f"--tune=signs={photos}", *words,
        )  # fmt: skip

    return call


def test_a_stop_while_domains_are_tuned_goes_on_with_resume(halved, tmp_path, monkeypatch):
    whole = halved("whole.bank")
    assert whole.status == 0, whole.err
    trainings = []

    def stopping(model, *args, **options):
        trainings.append(options["checkpoint"].name)
        steps = ot.fit(model, *args, **options)
        for step in steps:
            yield step
            if len(trainings) == 2 and step.step == 2:
                steps.close()
                raise KeyboardInterrupt

    monkeypatch.setattr(compressing, "fit", stopping)
    unfinished = tmp_path / "b.bank.unfinished"
    assert f"what was tuned is in {unfinished}: go on with --resume." in halved("b.bank").err
    assert (unfinished / "unfinished" / "stripes.safetensors").exists()
    assert not (tmp_path / "b.bank").exists()
    refused = halved("b.bank")
    assert f"{unfinished} is a compression that was stopped. Go on with --resume" in refused.err
    refused = halved("b.bank", "--resume", "--share", "both")
    assert "is another compression (- its, + this one's): - --share 'input'; + --sh" in refused.err
    monkeypatch.setattr(compressing, "_make", None)  # nothing is factored again
    done = halved("b.bank", "--resume")
    assert done.status == 0, done.err
    assert trainings == ["signs.safetensors", "stripes.safetensors", "stripes.safetensors"]
    assert json.loads(done.out)["domains"] == json.loads(whole.out)["domains"]
    assert files(tmp_path / "b.bank").keys() == files(tmp_path / "whole.bank").keys()
    assert {path.name for path in tmp_path.iterdir()} == {"b.bank", "whole.bank"}
    assert Bank.open(tmp_path / "b.bank").verify().remarks == ()


def test_other_images_are_not_gone_on_with(run, stored, photos, tmp_path, monkeypatch):
    def stopping(*_, **__):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(compressing, "fit", stopping)
    own = shutil.copytree(photos, tmp_path / "photos")
    words = ("compress", stored, "--keep", 0.5, "--out", tmp_path / "b.bank", "--no-picture")
    assert run(*words, "--tune", f"stripes={own}").status == 1
    (own / "down" / "0.png").unlink()
    refused = run(*words, "--tune", f"stripes={own}", "--resume")
    assert "(- its, + this one's): - images of stripes" in refused.err


def test_resuming_nothing_starts_from_the_beginning(run, stored, tmp_path):
    done = run("compress", stored, "--keep", 0.5, "--out", tmp_path / "b.bank", "--resume")
    assert "nothing to resume: starting from the beginning" in done.out
    assert [path.name for path in tmp_path.iterdir()] == ["b.bank"]


def test_a_domain_whose_tuning_diverges_stays_as_it_was_compressed(halved, tmp_path, monkeypatch):
    def diverging(model, *args, checkpoint, **options):
        if checkpoint.stem == "signs":
            checkpoint.write_bytes(b"")
            raise DivergedError("the loss is not finite")
        yield from ot.fit(model, *args, checkpoint=checkpoint, **options)

    monkeypatch.setattr(compressing, "fit", diverging)
    done = halved("b.bank")
    assert "signs stays as it was compressed: the loss is not finite" in done.err
    known = json.loads(done.out)["domains"]
    assert known["signs"]["tuned"] is None and known["signs"]["note"] == "its tuning diverged"
    assert known["stripes"]["tuned"] is not None
    cards = Bank.open(tmp_path / "b.bank").domains
    assert [cards[name].provenance["tuned_epochs"] for name in ("signs", "stripes")] == [0, 2]


def test_what_is_no_stopped_compression_is_not_gone_on_from(halved, tmp_path):
    state = tmp_path / "b.bank.unfinished" / "unfinished" / "compress.json"
    state.parent.mkdir(parents=True)
    for content in (None, "[]", "{}", "{"):
        if content is not None:
            state.write_text(content)
        refused = halved("b.bank", "--resume")
        assert "b.bank.unfinished is no compression that was stopped. Move it" in refused.err


def test_two_processes_do_not_make_one_bank(halved, tmp_path):
    with DISK.lock(tmp_path / "b.bank.unfinished.lock", 0.0):
        assert "b.bank is being made by another process. Wait for it" in halved("b.bank").err
    assert halved("b.bank").status == 0
    assert [path.name for path in tmp_path.iterdir()] == ["b.bank"]


def test_a_name_that_is_too_long_is_known_before_the_work(halved):
    assert "File name too long" in halved("b" * 250).err


def test_a_name_that_is_taken_meanwhile_loses_nothing(halved, tmp_path, monkeypatch):
    real = compressing._tune

    def slow(*args):
        real(*args)
        (tmp_path / "b.bank" / "of mine").mkdir(parents=True)

    with monkeypatch.context() as patch:
        patch.setattr(compressing, "_tune", slow)
        assert f"cannot write {tmp_path / 'b.bank'}: Directory not empty" in halved("b.bank").err
    shutil.rmtree(tmp_path / "b.bank")
    assert halved("b.bank", "--resume").status == 0


def test_basis_tuned_is_not_said_of_domains_that_were_over_another(run, stored, photos, tmp_path):
    tuned = tmp_path / "tuned.bank"
    shutil.copytree(stored, tuned)
    bank = Bank.open(tuned)
    bank.add("old", bank.load("signs"), provenance={"basis_tuned": True})
    small = ot.compress({"old": bank.load("old")}, keep=0.5)
    bank.replace("old", small["old"], provenance={"basis_tuned": True})
    done = run("compress", tuned, "--keep", 0.5, "--out", tmp_path / "b.bank", "--json")
    assert json.loads(done.out)["basis_tuned"] is False
