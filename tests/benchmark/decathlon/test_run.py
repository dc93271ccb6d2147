"""The whole road on a synthetic copy of the files: train, stop, go on, submit, score."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from onetrunk.backbones import resnet26
from onetrunk.bank.bank import Bank
from onetrunk.bank.lock import BusyError, one_training
from onetrunk.benchmark.decathlon import (
    FailedDomainsError,
    Settings,
    conclude,
    preprocessing,
    read_devkit,
    read_results,
    score_results,
    train,
)
from onetrunk.benchmark.decathlon.domains import DOMAINS
from onetrunk.benchmark.decathlon.protocol import WholeImages, training_examples
from onetrunk.benchmark.decathlon.run import steps_left
from onetrunk.core.adapters import Parallel, Series
from onetrunk.core.domain import delta
from onetrunk.data import Images
from onetrunk.data.decoding import BrokenImageError
from onetrunk.training.evaluate import evaluate
from onetrunk.training.fit import fit
from onetrunk.training.recipe import PAPER, RELEASED, Recipe

QUICK = Recipe(epochs=2, batch_size=6, precision="float32")


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return resnet26(width=0.125).eval()


def settings(**changes) -> Settings:
    return Settings(**{"family": Parallel(), "recipe": QUICK, "device": "cpu", **changes})


def numbers_of(work, name):
    return delta(Bank.open(work / "bank").load(name))


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_the_whole_road(kit, labels, backbone, tmp_path):
    devkit, work = read_devkit(kit, ["dtd", "gtsrb"]), tmp_path / "work"
    asked = settings(recipe=Recipe(epochs=5, batch_size=6, precision="float32"))
    steps = list(train(devkit, backbone, asked, work))
    assert [name for name, _ in steps] == ["dtd"] * 10 + ["gtsrb"] * 10
    report = conclude(devkit, asked, work, labels=labels)
    assert report.measured_on == "test" and report.score is None
    assert report.unofficial == ("dtd", "gtsrb")
    assert min(report.accuracies.values()) > 0.6  # three hues are easy
    assert report.to_json()["domains"][0]["n_train"] == 12
    answers = json.loads((work / "results.json").read_text())
    assert [answer["image_id"] for answer in answers] == [
        *devkit.domains["dtd"].test.ids, *devkit.domains["gtsrb"].test.ids,
    ]  # fmt: skip
    assert {answer["category_id"] // 10**7 for answer in answers} == {4, 5}
    scored = score_results(work / "results.json", labels)
    assert scored.accuracies == report.accuracies and scored.points == report.points


def test_the_bank_computes_the_accuracy_that_was_reported(kit, backbone, tmp_path):
    devkit, work = read_devkit(kit, ["dtd"]), tmp_path / "work"
    list(train(devkit, backbone, settings(), work))
    bank = Bank.open(work / "bank")
    found = evaluate(bank.load("dtd"), devkit.domains["dtd"].images("val"), device="cpu")
    reported = conclude(devkit, settings(), work).domains[0].val_accuracy
    assert found.accuracy == pytest.approx(reported)


def test_jointly_trained_networks_are_those_of_one_after_another(kit, backbone, tmp_path):
    devkit = read_devkit(kit, ["gtsrb", "aircraft"])
    list(train(devkit, backbone, settings(), tmp_path / "apart"))
    steps = list(train(devkit, backbone, settings(joint=True), tmp_path / "joint"))
    assert [name for name, _ in steps] == ["gtsrb", "aircraft"] * 4
    for name in devkit.domains:
        assert_same(numbers_of(tmp_path / "joint", name), numbers_of(tmp_path / "apart", name))


@pytest.mark.parametrize("joint", [False, True])
def test_a_stopped_run_goes_on_to_the_same_networks(kit, backbone, tmp_path, joint):
    devkit, asked = read_devkit(kit, ["dtd", "gtsrb"]), settings(joint=joint)
    list(train(devkit, backbone, asked, tmp_path / "whole"))
    work, n_steps = tmp_path / "stopped", 0
    for stop_after in (2, 4, 99):
        with_stop = train(devkit, backbone, asked, work)
        for place, _ in enumerate(with_stop, 1):
            n_steps += 1
            if place == stop_after:
                break
        with_stop.close()
    assert n_steps == 8
    for name in devkit.domains:
        assert_same(numbers_of(work, name), numbers_of(tmp_path / "whole", name))
    assert list(train(devkit, backbone, asked, work)) == []
    assert not (work / "bank" / "unfinished").exists()


def test_train_and_val_trains_on_both_and_measures_nothing(kit, backbone, tmp_path):
    devkit, asked = read_devkit(kit, ["dtd"]), settings(train_on="train+val")
    assert len(list(train(devkit, backbone, asked, tmp_path / "work"))) == 2 * 18 // 6
    report = conclude(devkit, asked, tmp_path / "work")
    assert report.measured_on is None and report.points == {} and report.domains[0].n_train == 18


def test_images_are_seen_as_the_released_code_sees_them():
    flips = {name for name in DOMAINS if preprocessing(name).hflip}
    assert DOMAINS.keys() - flips == {"gtsrb", "omniglot", "svhn"}
    for name in DOMAINS:
        assert preprocessing(name).prepared_px == 72
        assert preprocessing(name).size_px == (64 if name in flips else 72)


def test_domains_without_crops_are_not_augmented(kit):
    images = read_devkit(kit, ["gtsrb"]).domains["gtsrb"].images("train")
    examples, rows = training_examples(DOMAINS["gtsrb"], images), torch.arange(3)
    assert torch.equal(examples.training_views(rows, 1, 5, None), examples.views(rows))


def crops(images, limit=2**30, epoch=0):
    examples = WholeImages(images, preprocessing("aircraft"), limit)
    return examples.training_views(torch.arange(len(images)), 0, epoch, None)


def test_training_crops_are_windows_of_the_whole_image_mirrored_or_not(kit):
    images = read_devkit(kit, ["aircraft"]).domains["aircraft"].images("train")
    seen = preprocessing("aircraft")
    mean, std = torch.tensor(seen.mean)[:, None, None], torch.tensor(seen.std)[:, None, None]
    places, mirrored = set(), set()
    for epoch in range(2):
        for index, crop_chw in enumerate(crops(images, epoch=epoch)):
            pixels = (crop_chw * std + mean).mul(255).round()
            whole_hwc = torch.frombuffer(bytearray(images[index][0].tobytes()), dtype=torch.uint8)
            whole_chw = whole_hwc.view(72, 110, 3).permute(2, 0, 1).float()
            windows = whole_chw.unfold(1, 64, 1).unfold(2, 64, 1).permute(1, 2, 0, 3, 4)
            for flip in (False, True):
                wanted = pixels.flip(-1) if flip else pixels
                hits = (windows == wanted).flatten(2).all(-1).nonzero().tolist()
                places |= {tuple(hit) for hit in hits}
                mirrored |= {flip} if hits else set()
    assert len(places) > 15 and mirrored == {False, True}
    assert max(left for _, left in places) > 30 and min(left for _, left in places) < 15


def test_crops_do_not_depend_on_whether_images_are_held(kit):
    images = read_devkit(kit, ["aircraft"]).domains["aircraft"].images("train")
    assert not WholeImages(images, preprocessing("aircraft"), 1000).in_memory
    assert torch.equal(crops(images, limit=1000), crops(images))


def test_an_image_too_long_to_scale_is_named():
    images = Images.from_arrays([np.zeros((2, 90, 3), np.uint8)], [0], ["a", "b"])
    with pytest.raises(BrokenImageError, match="its 90 x 2 pixels are longer than 20 to 1"):
        WholeImages(images, preprocessing("aircraft"))


def test_the_recipe_never_crops_by_area():
    assert Settings(recipe=Recipe()).recipe.crop_scale is None
    assert Settings(recipe=PAPER).recipe == PAPER


def test_another_part_to_train_on_is_refused():
    with pytest.raises(ValueError, match=r"train_on='test': train on 'train', or on 'train\+val'"):
        Settings(train_on="test")


def test_a_folder_of_another_run_is_refused(kit, backbone, tmp_path):
    devkit, work = read_devkit(kit, ["dtd"]), tmp_path / "work"
    list(train(devkit, backbone, settings(), work))
    with pytest.raises(ValueError, match="has dtd trained with adapter parallel, and series was"):
        list(train(devkit, backbone, settings(family=Series()), work))
    with pytest.raises(ValueError, match=r"has dtd trained with train_on train, and train\+val"):
        conclude(devkit, settings(train_on="train+val"), work)
    with pytest.raises(ValueError, match="belongs to backbone"):
        list(train(devkit, resnet26(width=0.25), settings(), work))
    with pytest.raises(ValueError, match=r"gtsrb is not trained yet\. Run the training to its end"):
        conclude(read_devkit(kit, ["gtsrb"]), settings(), work)


def test_answers_that_are_gone_or_damaged_are_given_anew_by_the_banks_network(
    kit, backbone, tmp_path
):
    devkit, work = read_devkit(kit, ["dtd"]), tmp_path / "work"
    list(train(devkit, backbone, settings(), work))
    predictions = work / "predictions" / "dtd.json"
    answers = predictions.read_text()
    for damaged in ('[{"image_id": 1, "category_id": 2}]', "[", None):
        predictions.unlink() if damaged is None else predictions.write_text(damaged)
        with pytest.raises(ValueError, match=r"dtd is in the bank and will only answer anew\."):
            conclude(devkit, settings(), work)
        assert steps_left(devkit, settings(), work) == {}
        assert list(train(devkit, backbone, settings(), work)) == []
        assert predictions.read_text() == answers
        conclude(devkit, settings(), work)


def test_the_released_readings_keep_the_best_epoch_and_the_decay_of_the_training_images(
    kit, backbone, tmp_path, monkeypatch
):
    assert PAPER.keep == RELEASED.keep == "best"
    decays = []

    def noted(model, data, recipe, **more):
        decays.append((len(data), recipe.adapter_decay(len(data))))
        return fit(model, data, recipe, **more)

    monkeypatch.setattr("onetrunk.benchmark.decathlon.run.fit", noted)
    sized = dataclasses.replace(QUICK, decay_by_size=((12, 0.5), (18, 0.1)))
    devkit = read_devkit(kit, ["dtd"])
    for train_on in ("train", "train+val"):
        asked = settings(recipe=sized, train_on=train_on)
        list(train(devkit, backbone, asked, tmp_path / train_on))
    assert decays == [(12, 0.5), (18, 0.5)]


def test_results_hold_every_domain_that_is_finished_there(kit, labels, backbone, tmp_path):
    both, work = read_devkit(kit, ["dtd", "gtsrb"]), tmp_path / "work"
    for name in both.domains:
        devkit = read_devkit(kit, [name])
        assert steps_left(devkit, settings(), work) == {name: 4}
        list(train(devkit, backbone, settings(), work))
        assert steps_left(devkit, settings(), work) == {}
        report = conclude(devkit, settings(), work, labels=labels)
        assert [domain.name for domain in report.domains] == [name]
    assert report.answered == ("dtd", "gtsrb") and len(report.lacking) == 8
    assert len(read_results(work / "results.json")) == 12
    devkit, otherwise = read_devkit(kit, ["aircraft"]), settings(family=Series())
    list(train(devkit, backbone, otherwise, work))
    assert conclude(devkit, otherwise, work).answered == ("aircraft",)
    (work / "predictions" / "gtsrb.json").unlink()
    report = conclude(read_devkit(kit, ["dtd"]), settings(), work)
    assert report.answered == ("dtd",) and report.to_json()["left_out"] == {
        "aircraft": "trained with adapter series",
        "gtsrb": "its answers are gone or damaged",
    }
    list(train(both, backbone, settings(), tmp_path / "again"))
    conclude(both, settings(), tmp_path / "again")
    work = tmp_path / "again"
    assert set(score_results(work / "results.json", labels).accuracies) == {"dtd", "gtsrb"}


def test_labels_and_device_are_looked_at_before_anything_is_made(command, kit, labels, tmp_path):
    words = ("decathlon", kit, *COMMON, "--domains", "dtd", "--out", tmp_path / "work")
    ran = command(*words, "--device", "cuda:77")
    assert ran.status == 1 and ran.err.startswith("error: ") and "cuda:77" in ran.err
    file = labels / "dtd_test.json"
    table = json.loads(file.read_text())
    file.write_text(json.dumps({**table, "annotations": table["annotations"][1:]}))
    ran = command(*words, "--labels", labels)
    assert ran.status == 1 and "does not label exactly the images of dtd_test_stripped" in ran.err
    file.unlink()
    ran = command(*words, "--labels", labels)
    assert ran.status == 1 and "dtd_test.json is not there. Give the folder that" in ran.err
    assert not (tmp_path / "work").exists()


def test_a_broken_test_image_is_found_before_the_training(kit, backbone, tmp_path):
    devkit = read_devkit(kit, ["dtd"])
    broken = devkit.domains["dtd"].test.names[-1]
    (kit / "data" / broken).write_bytes(b"no image")
    with pytest.raises(FailedDomainsError, match=f"dtd: image '{broken}' cannot be read"):
        next(train(devkit, backbone, settings(), tmp_path / "work"))


@pytest.mark.parametrize("joint", [False, True])
def test_a_domain_that_fails_does_not_stop_the_others(kit, backbone, tmp_path, joint):
    devkit, asked, work = read_devkit(kit, ["dtd", "gtsrb"]), settings(joint=joint), tmp_path / "w"
    (kit / "data" / devkit.domains["dtd"].test.names[-1]).write_bytes(b"no image")
    seen = []
    with pytest.raises(ValueError, match="when that is repaired the same call trains what is"):
        for name, _ in train(
            devkit, backbone, asked, work, on_failure=lambda name, _: seen.append(f"{name} failed")
        ):
            seen.append(name)
    assert seen == ["dtd failed"] + ["gtsrb"] * 4  # told at once
    assert conclude(read_devkit(kit, ["gtsrb"]), asked, work).answered == ("gtsrb",)


def test_the_command_reports_what_is_finished_and_names_what_failed(command, kit, tmp_path):
    broken = kit / read_devkit(kit, ["dtd"]).domains["dtd"].images("test").names[0]
    (kit / "data" / broken.relative_to(kit)).write_bytes(b"no image")
    words = ("decathlon", kit, *COMMON, "--out", tmp_path / "work", "--domains")
    ran = command(*words, "dtd,gtsrb")
    assert ran.status == 1 and "dtd failed: image 'dtd/test/" in ran.err
    assert "dtd: not finished; the same command trains what is left" in ran.out
    assert "gtsrb" in ran.out and "answers for 1 of the ten domains" in ran.out
    assert json.loads(command(*words, "dtd,gtsrb", "--json").out)["failed"].keys() == {"dtd"}
    ran = command(*words, "dtd")
    assert ran.status == 1 and "error: none of dtd is finished in" in ran.err
    ran = command(*words, "aircraft", "--epochs", 2)
    assert ran.status == 0
    assert "gtsrb is there too, trained with recipe released(epochs=1): " in ran.err


def test_two_runs_do_not_train_one_domain_at_once(kit, backbone, tmp_path):
    devkit, work = read_devkit(kit, ["dtd", "gtsrb"]), tmp_path / "work"
    first = train(devkit, backbone, settings(), work)
    next(first)
    told = []
    second = train(devkit, backbone, settings(), work, on_failure=lambda *of: told.append(of))
    assert {name for name, _ in second} == {"gtsrb"}
    assert [name for name, _ in told] == ["dtd"] and isinstance(told[0][1], BusyError)
    assert {name for name, _ in first} == {"dtd"}
    assert conclude(devkit, settings(), work).answered == ("dtd", "gtsrb")


def test_the_command_leaves_alone_what_another_process_trains(command, kit, tmp_path):
    words = ("decathlon", kit, *COMMON, "--out", tmp_path / "work", "--domains")
    assert command(*words, "aircraft").status == 0
    with one_training(tmp_path / "work" / "bank", "dtd"):
        ran = command(*words, "dtd,gtsrb")
    assert ran.status == 0 and "dtd is left to another process" in ran.err
    assert "dtd: not finished; the same command trains what is left" in ran.out
    assert command(*words, "dtd,gtsrb").status == 0


def test_a_domain_that_diverged_may_be_trained_with_another_rate(kit, backbone, tmp_path):
    devkit, work = read_devkit(kit, ["dtd"]), tmp_path / "work"
    wild = dataclasses.replace(QUICK, lr=1e30, optimizer="sgd", clip_norm=None, epochs=9)
    steps = train(devkit, backbone, settings(recipe=wild), work)
    next(steps)
    steps.close()  # there is a checkpoint now
    with pytest.raises(FailedDomainsError, match=r"dtd: .* Lower the learning rate"):
        list(train(devkit, backbone, settings(recipe=wild), work))
    assert len(list(train(devkit, backbone, settings(), work))) == 4


def test_reading_shows_which_domain_is_read(kit, backbone, tmp_path):
    read = []
    devkit = read_devkit(kit, ["dtd"])
    list(train(devkit, backbone, settings(), tmp_path, progress=lambda *seen: read.append(seen)))
    assert read[0] == ("dtd", 1, 12) and ("dtd", 6, 6) in read and len(read) == 12 + 6 + 6


@pytest.mark.parametrize("width", [97, 99])
def test_a_side_that_is_longer_by_an_odd_number_is_cut_at_whole_pixels_as_released(width):
    pixels_hwc = np.random.default_rng(0).integers(0, 255, (72, width, 3), dtype=np.uint8)
    images = Images.from_arrays([pixels_hwc], [0], ["a", "b"])
    seen = dataclasses.replace(preprocessing("dtd"), mean=(0.0,) * 3, std=(1.0,) * 3)
    found_chw = seen.evaluation_view(seen.prepare(images[0][0])[None])[0] * 255
    left = round((width - 64) / 2)  # torchvision's CenterCrop
    released_hwc = pixels_hwc[4:68, left : left + 64]
    assert np.array_equal(found_chw.round().permute(1, 2, 0).numpy(), released_hwc)


def test_a_run_goes_on_where_the_bank_was_not_finished(kit, backbone, tmp_path):
    devkit, work = read_devkit(kit, ["dtd"]), tmp_path / "work"
    (work / "bank" / "blobs").mkdir(parents=True)
    list(train(devkit, backbone, settings(), work))
    assert list(Bank.open(work / "bank").domains) == ["dtd"]


def test_a_work_folder_that_is_a_file_is_refused(kit, backbone, tmp_path):
    (tmp_path / "work").write_text("")
    with pytest.raises(ValueError, match="work cannot be made or used"):
        list(train(read_devkit(kit, ["dtd"]), backbone, settings(), tmp_path / "work"))


COMMON = ("--backbone", "resnet26(width=0.125)", "--adapter", "parallel", "--epochs", 1)


def test_the_command_trains_submits_and_scores(command, kit, labels, tmp_path):
    words = ("decathlon", kit, *COMMON, "--domains", "dtd,gtsrb", "--out", tmp_path / "work")
    ran = command(*words, "--labels", labels, "--joint")
    assert ran.status == 0, ran.err
    assert "dtd: 3 classes, images: 12 train, 6 val, 6 test" in ran.out
    assert "mean test accuracy" in ran.out and "to submit:" not in ran.out
    assert "answers for 2 of the ten domains; a submission needs imagenet12, aircraft," in ran.out
    assert "this backbone is untrained" in ran.err and "the points mean nothing" in ran.err
    again = json.loads(command(*words, "--json").out)
    assert again["measured_on"] == "val" and again["adapter"] == "parallel"
    assert "points are of validation images" in command(*words).out
    results = tmp_path / "work" / "results.json"
    scored = json.loads(command("decathlon-score", results, "--labels", labels, "--json").out)
    assert set(scored["accuracies"]) == {"dtd", "gtsrb"} and scored["score"] is None
    assert "2 of the ten domains" in command("decathlon-score", results, "--labels", labels).out


def test_the_command_refuses_in_one_line(command, kit, tmp_path):
    ran = command("decathlon", kit, *COMMON, "--domains", "mnist", "--out", tmp_path / "work")
    assert ran.status == 1 and ran.err.startswith("error: 'mnist' is no domain of the decathlon")
    ran = command("decathlon", kit, *COMMON, "--out", tmp_path / "work")
    assert ran.status == 1 and "imagenet12_train.json is not there" in ran.err
