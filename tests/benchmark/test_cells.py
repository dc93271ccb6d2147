"""A cell: the same tuning for every method, resumed and never computed twice, test scored once."""

import dataclasses
import functools
import io
import json
import math
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import onetrunk.benchmark.cells as cells_module
import onetrunk.benchmark.compressed as compressed
import onetrunk.training.jointly as jointly
from onetrunk.bank.bank import Bank
from onetrunk.bank.names import is_name
from onetrunk.benchmark import protocol
from onetrunk.benchmark.cells import Cell, Trunk, bank_name, bank_path, run_cell, subset
from onetrunk.benchmark.ledger import Ledger
from onetrunk.benchmark.methods import read_method
from onetrunk.benchmark.protocol import Protocol, Tuning
from onetrunk.benchmark.report import read_rows
from onetrunk.benchmark.studies import Wish, mini
from onetrunk.benchmark.study import Study, domains_in, known, run
from onetrunk.core.domain import domain_of
from onetrunk.data import load
from onetrunk.errors import DataError, DivergedError, TrainingError
from onetrunk.training.recipe import Recipe

TINY = Protocol(
    images=16, val_images=12, size_px=16, epochs=2, least_steps=1, batch_size=8, tune_epochs=1
)
TRUNK = Trunk("resnet26(width=0.125)")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def domains(tmp_path_factory) -> Path:
    """stripes (across, down) and shades (dark, light): train, val and test of each class."""
    root, rng = tmp_path_factory.mktemp("domains"), np.random.default_rng(0)
    counts = {"train": 12, "val": 6, "test": 6}
    for domain, classes in (("stripes", ("across", "down")), ("shades", ("dark", "light"))):
        for split, count in counts.items():
            for name in classes:
                folder = root / domain / split / name
                folder.mkdir(parents=True)
                for number in range(count):
                    Image.fromarray(picture(name, rng)).save(folder / f"{number}.png")
    return root


def picture(kind: str, rng: np.random.Generator) -> np.ndarray:
    noise = rng.normal(0, 20, (20, 20))
    if kind in ("dark", "light"):
        return np.clip(noise + (60 if kind == "dark" else 190), 0, 255).astype(np.uint8)
    wave = 127 + 90 * np.sin(np.arange(20) + rng.uniform(0, 6))
    grey = np.tile(wave, (20, 1))
    return np.clip((grey.T if kind == "across" else grey) + noise, 0, 255).astype(np.uint8)


@pytest.fixture
def make_cell(domains):
    def made(method="parallel", domain="stripes", seed=0, **protocol) -> Cell:
        changed = dataclasses.replace(TINY, **protocol)
        return Cell("mini", TRUNK, str(domains), domain, method, seed, changed)

    return made


def test_a_record_says_what_was_tried_and_what_came_of_it(make_cell, tmp_path):
    record = run_cell(make_cell(), Ledger(tmp_path), tmp_path)
    names = ("lr", "decay", "norm_statistics")
    tried = {tuple(t[name] for name in names): t["val_accuracy"] for t in record["trials"]}
    assert len(tried) == len(record["trials"]) >= 5
    assert record["n_train"] == 16
    assert 0 <= record["test_accuracy"] <= 1
    assert record["site_numbers"].keys() == record["site_change"].keys()
    assert max(record["site_change"].values()) > 0
    chosen = tried[tuple(record[name] for name in names)]
    assert chosen == max(tried.values()) == record["val_accuracy"]


def test_the_best_trial_is_the_result_and_other_seeds_train_once_as_it_says(
    make_cell, tmp_path, monkeypatch
):
    recipes, fit = [], cells_module.fit

    def listening(model, train, recipe, **rest):
        recipes.append(recipe)
        return fit(model, train, recipe, **rest)

    monkeypatch.setattr(cells_module, "fit", listening)
    first = run_cell(make_cell(), Ledger(tmp_path), tmp_path)
    assert len(recipes) == len(first["trials"])
    assert {recipe.seed for recipe in recipes} == {0}
    second = run_cell(make_cell(seed=1), Ledger(tmp_path), tmp_path)
    assert [recipe.seed for recipe in recipes[len(first["trials"]) :]] == [1]
    assert second["trials"] == first["trials"]
    assert recipes[-1].lr == first["lr"] == second["lr"]


@pytest.mark.parametrize("by", ["curvature", "trained"])
def test_a_measured_plan_and_the_uniform_one_keep_to_one_budget(make_cell, tmp_path, by):
    methods = (f"allocate(budget='900', by='{by}')", "uniform(budget='900')")
    spent = [
        sum(run_cell(make_cell(m), Ledger(tmp_path), tmp_path)["site_numbers"].values())
        for m in methods
    ]
    assert all(0 < numbers <= 900 for numbers in spent)


def test_a_finished_cell_is_not_computed_again(make_cell, tmp_path, monkeypatch):
    first = run_cell(make_cell("head"), Ledger(tmp_path), tmp_path)
    monkeypatch.setattr(cells_module, "setting_of", None)
    assert run_cell(make_cell("head"), Ledger(tmp_path), tmp_path) == first


def test_a_cell_stopped_in_its_trials_goes_on_to_the_same_result(make_cell, tmp_path, monkeypatch):
    whole = run_cell(make_cell(), Ledger(tmp_path / "whole"), tmp_path / "whole")
    trainings, fit = [], cells_module.fit

    def stopping(*args, **kwargs):
        trainings.append(1)
        if len(trainings) == 3:
            raise KeyboardInterrupt
        return fit(*args, **kwargs)

    monkeypatch.setattr(cells_module, "fit", stopping)
    with pytest.raises(KeyboardInterrupt):
        run_cell(make_cell(), Ledger(tmp_path / "cut"), tmp_path / "cut")
    trials = list(Ledger(tmp_path / "cut").read().values())
    assert [r["kind"] for r in trials] == ["trial", "trial"]
    lines = [json.dumps({**trial, "seconds": 1000.0}) for trial in trials]
    Ledger(tmp_path / "cut").path.write_text("\n".join(lines) + "\n")
    again = run_cell(make_cell(), Ledger(tmp_path / "cut"), tmp_path / "cut")
    chosen = [t["val_accuracy"] for t in whole["trials"]].index(whole["val_accuracy"])
    of_the_first = chosen < 2  # its network went with the process: it is trained again
    assert len(trainings) == 3 + len(whole["trials"]) - 2 + of_the_first
    assert 2000 < again["seconds"] < 2500  # those of the trials before the stop count
    volatile = ("seconds",)
    assert {k: v for k, v in again.items() if k not in volatile} == {
        k: v for k, v in whole.items() if k not in volatile
    }


def test_what_a_key_depends_on(make_cell, monkeypatch):
    cells = [
        make_cell(), make_cell(seed=1), make_cell("series"), make_cell(domain="shades"),
        make_cell(epochs=3), make_cell(per_class=2),
    ]  # fmt: skip
    keys = [cell.key for cell in cells]
    assert len(set(keys)) == len(keys)
    assert make_cell().key == keys[0]
    monkeypatch.setattr(protocol, "Recipe", functools.partial(Recipe, label_smoothing=0.3))
    assert make_cell().key != keys[0]  # what is not tuned is the default recipe's


@pytest.mark.parametrize("change", ["pixels", "flip_ok"])
def test_a_key_depends_on_the_images_and_on_whether_they_are_flipped(tmp_path, change):
    pq = pytest.importorskip("pyarrow.parquet")
    pa = pytest.importorskip("pyarrow")

    def key_of(grey: int, info: str) -> str:
        buffer = io.BytesIO()
        Image.new("L", (8, 8), grey).save(buffer, "PNG")
        rows = [{"bytes": buffer.getvalue(), "path": None}] * 4
        for split in ("train", "val", "test"):
            table = pa.table({"image": rows, "label": ["a", "b", "a", "b"]})
            pq.write_table(table, tmp_path / "greys" / f"{split}.parquet")
        (tmp_path / "greys" / "info.json").write_text(info)
        cells_module._splits.cache_clear()
        cells_module._digest_of_splits.cache_clear()
        return Cell("mini", TRUNK, str(tmp_path), "greys", "parallel", 0, TINY).key

    (tmp_path / "greys").mkdir()
    first = key_of(7, '{"flip_ok": true}')
    changed = (8, '{"flip_ok": true}') if change == "pixels" else (7, '{"flip_ok": false}')
    assert key_of(*changed) != first == key_of(7, '{"flip_ok": true}')


@pytest.mark.parametrize(
    ("accuracies", "best", "asked"),
    [
        ([0.1, 0.5, 0.6, 0.5, 0.1], 1.0, [1, 1 / 3, 3]),
        ([0.1, 0.5, 0.6, 0.7, 0.6], 3.0, [1, 1 / 3, 3, 9]),
        ([0.6, 0.7, 0.6, 0.9, 0.9], 1 / 3, [1, 1 / 3, 1 / 9]),
        ([0.5, 0.5, 0.5, 0.5, 0.5], 1.0, [1, 1 / 3, 3]),
        ([0.1, 0.2, 0.3, 0.4, 0.5], 9.0, [1, 1 / 3, 3, 9]),
    ],
)
def test_the_rates_climb_while_each_is_better_and_stop_after_so_many_steps(accuracies, best, asked):
    of_factor = dict(zip([-2, -1, 0, 1, 2], accuracies, strict=True))
    factors = []

    def accuracy(tuning: Tuning) -> float:
        if tuning.factor not in factors:
            factors.append(tuning.factor)
        return of_factor[round(math.log(tuning.factor, 3))]

    protocol = Protocol(most_steps=2)
    assert protocol.climbed(accuracy, protocol.start).factor == pytest.approx(best)
    assert factors == pytest.approx(asked)


def test_the_search_goes_where_each_choice_before_it_led():
    asked = []

    def accuracy(tuning: Tuning) -> float:
        asked.append((tuning.statistics, round(tuning.factor, 2), tuning.decay))
        best_factor, height = {"running": (1 / 3, 0.2), "batch": (3.0, 3.0)}[tuning.statistics]
        return height - abs(math.log(tuning.factor / best_factor)) - abs(tuning.decay - 1.0)

    assert Protocol().search(accuracy) == Tuning(3.0, 1.0, "batch")
    assert list(dict.fromkeys(asked)) == [
        ("running", 1.0, 0.05), ("running", 0.33, 0.05), ("running", 0.11, 0.05),
        ("batch", 1.0, 0.05), ("batch", 3.0, 0.05), ("batch", 9.0, 0.05),
        ("batch", 3.0, 1.0), ("batch", 3.0, 5.0),
    ]  # fmt: skip


def test_every_method_but_scratch_starts_at_the_probe(make_cell):
    setting = cells_module.setting_of(make_cell())
    probe = cells_module.probed(setting)
    logits = {
        method: cells_module.fresh(read_method(method), setting)(torch.ones(1, 3, 16, 16))
        for method in ("parallel", "full", "norm", "scratch")
    }
    expected = probe(torch.ones(1, 3, 16, 16))
    assert all(torch.equal(logits[m], expected) for m in ("parallel", "full", "norm"))
    assert not torch.equal(logits["scratch"], expected)


def test_a_trial_that_diverges_counts_nothing(make_cell, tmp_path, monkeypatch):
    def diverging(model, train, recipe, **rest):
        if recipe.norm_statistics == "running":
            raise DivergedError("the loss is nan")
        return fit(model, train, recipe, **rest)

    fit = cells_module.fit
    monkeypatch.setattr(cells_module, "fit", diverging)
    record = run_cell(make_cell(), Ledger(tmp_path), tmp_path)
    assert record["norm_statistics"] == "batch"
    assert record["trials"][0]["val_accuracy"] == 0.0


def test_a_subset_keeps_every_class_and_is_drawn_by_its_seed(domains):
    images = load(domains / "stripes").train
    few = subset(images, 6, 2, None, 0)
    assert few.labels.bincount().tolist() == [3, 3]
    assert subset(images, 6, 2, 2, 0).labels.bincount().tolist() == [2, 2]
    assert subset(images, 6, 2, None, 0).names == few.names != subset(images, 6, 2, None, 1).names
    assert subset(images, 10**9, 2, None, 0) is images


def test_a_protocol_refuses_what_is_none():
    for count in ("epochs", "batch_size", "size_px", "tune_epochs"):
        with pytest.raises(TrainingError, match=rf"{count}=0\): give at least 1"):
            Protocol(**{count: 0})
    with pytest.raises(TrainingError, match="a ratio of learning rates above 1"):
        Protocol(ratio=1.0)
    with pytest.raises(TrainingError, match=r"most_steps=0\): give at least 1"):
        Protocol(most_steps=0)
    with pytest.raises(TrainingError, match="give decays that rise"):
        Protocol(decays=(1.0, 0.1))
    with pytest.raises(TrainingError, match="give 'batch', 'running' or both"):
        Protocol(statistics=("running", "none"))


@pytest.fixture
def make_study(domains, tmp_path):
    def made(*methods, seeds=(0,)) -> Study:
        found = domains_in(domains)
        return Study("mini", domains, ((TRUNK, TINY),), found, methods, seeds, tmp_path)

    return made


def test_a_compression_of_what_nobody_trains_is_refused_before_the_work(make_study, tmp_path):
    study = make_study("head", "compress(of='series', keep=0.5)")
    with pytest.raises(DataError, match=r"needs domains trained with series.*Add 'series' to --me"):
        run(study)
    assert not Ledger(tmp_path).read()


def test_a_finished_compression_needs_its_sources_no_more(make_study):
    whole = run(make_study("parallel", "compress(of='parallel', keep=0.5)"))
    study = make_study("compress(of='parallel', keep=0.5)")
    for file in study.work.glob("*.jsonl"):
        lines = [line for line in file.read_text().splitlines() if '"compress' in line]
        file.write_text("\n".join(lines) + "\n")
    assert run(study).records == [r for r in whole.records if r["method"].startswith("compress")]


def test_a_record_has_the_name_of_the_weights_file_that_is_asked_for(make_study, tmp_path):
    study = make_study("head")
    for name in ("old", "new"):
        file = tmp_path / f"{name}.safetensors"
        state = cells_module.backbone_of(TRUNK).state_dict()
        save_file({key: t.contiguous() for key, t in state.items()}, file)
        trunk = Trunk(TRUNK.form, str(file))
        found = run(dataclasses.replace(study, trunks=((trunk, TINY),))).records
        assert {record["backbone"] for record in found} == {f"{TRUNK.form}@{name}.safetensors"}
    assert len(Ledger(study.work).read()) == 2


def test_a_compression_of_a_training_that_failed_says_so(make_study, monkeypatch):
    def broken(cell, *_args):
        raise DataError(f"{cell.domain} is broken")

    monkeypatch.setattr("onetrunk.benchmark.study.run_cell", broken)
    failures = run(make_study("series", "compress(of='series', keep=0.5)")).failures
    assert "and the training of 'shades' failed" in failures[-1] and len(failures) == 3


def test_a_probe_on_all_images_is_computed_once(make_study):
    study = make_study("head", "norm", seeds=(3, 4))
    seeds = [(cell.method, cell.seed) for cell in study.cells() if cell.domain == "shades"]
    assert seeds == [("head", 3), ("norm", 3), ("norm", 4)]


def test_a_record_counts_the_classes_with_fewer_images_than_were_asked_for(make_study):
    few, many = (dataclasses.replace(TINY, per_class=n) for n in (4, 50))
    for limited, short in ((few, 0), (many, 2)):
        study = dataclasses.replace(make_study("head"), trunks=((TRUNK, limited),))
        assert {r["short_classes"] for r in run(study).records} == {short}


def test_a_record_says_how_long_its_training_was(make_study):
    epochs = {r["method"]: r["epochs"] for r in run(make_study("head", "norm")).records}
    assert epochs == {"head": None, "norm": TINY.n_epochs(16)}
    longer = dataclasses.replace(TINY, least_steps=7)
    study = make_study("norm")
    study = dataclasses.replace(study, trunks=((TRUNK, longer),))
    assert [r["epochs"] for r in run(study).records] == [4, 4]


def test_a_study_compresses_what_it_trained(make_study):
    study = make_study(
        "parallel", "compress(of='parallel', keep=0.5)", "svd(of='parallel', keep=0.5)",
    )  # fmt: skip
    outcome = run(study)
    assert [r["method"] for r in outcome.records].count("compress(of='parallel', keep=0.5)") == 2
    assert not outcome.failures
    assert {row.place for row in read_rows(outcome.records)} == set(study.places())
    by_method = {record["method"]: record for record in outcome.records}
    joint = by_method["compress(of='parallel', keep=0.5)"]
    alone = by_method["svd(of='parallel', keep=0.5)"]
    assert joint["shared_numbers"] > 0 == alone["shared_numbers"]
    assert joint["numbers"] < by_method["parallel"]["numbers"]
    again = run(study)
    assert again.records == outcome.records == known(study)


@pytest.mark.parametrize("form", ["compress", "svd"])
@pytest.mark.parametrize("better", [True, False])
def test_a_basis_is_tuned_with_its_domains_where_validation_images_say_so(
    make_study, monkeypatch, form, better
):
    study = make_study("parallel", f"{form}(of='parallel', keep=0.5, tune='all')")
    before, after = {}, {}
    tuned = compressed._basis_tuned

    def watched(cells, models, *rest):
        before.update({cell.domain: domain_of(models[cell.domain]).basis for cell in cells})
        accuracies = iter([0.5] * len(cells) + [1.0 if better else 0.5] * 9)
        with monkeypatch.context() as patch:
            patch.setattr(
                jointly, "evaluate", lambda *_, **__: SimpleNamespace(accuracy=next(accuracies))
            )
            found = tuned(cells, models, *rest)
        after.update({name: domain_of(model).basis for name, model in found.items()})
        return found

    monkeypatch.setattr(compressed, "_basis_tuned", watched)
    outcome = run(study)
    assert not outcome.failures
    assert {"shades", "stripes"} == set(before) == set(after)
    assert all((after[name] != before[name]) is better for name in before)
    assert (after["shades"] == after["stripes"]) is (form == "compress")


def test_domains_of_a_bank_keep_apart_names_that_differ_in_more_than_a_bank_allows():
    names = ("flowers", "Flowers", "flowers!", "flowers ", "Ж")
    assert bank_name("flowers") == "flowers"
    assert len({bank_name(name) for name in names}) == len(names)
    assert all(is_name(bank_name(name)) for name in (*names, "x" * 200))


def test_a_compressed_key_depends_on_the_images_of_every_domain(make_study, domains, tmp_path):
    (group,) = make_study("compress(of='parallel', keep=0.5)").compressions()
    other = tmp_path / "domains"
    shutil.copytree(domains, other)
    file = next((other / "stripes" / "train" / "down").iterdir())
    Image.fromarray(np.zeros((20, 20), np.uint8)).save(file)
    changed = [dataclasses.replace(cell, data=str(other)) for cell in group]
    for before, after in zip(group, changed, strict=True):
        assert compressed.compressed_key(before, group) != compressed.compressed_key(after, changed)
    shades = [cell.domain for cell in group].index("shades")
    assert group[shades].key == changed[shades].key


def test_a_rate_that_diverges_leaves_a_compressed_domain_as_it_was(make_study, monkeypatch):
    def diverging(*_args, **_options):
        raise DivergedError("the loss is nan")

    monkeypatch.setattr(compressed, "fit", diverging)
    monkeypatch.setattr(jointly, "fit_jointly", diverging)
    outcome = run(make_study("parallel", "compress(of='parallel', keep=0.5, tune='all')"))
    found = [r for r in outcome.records if r["method"].startswith("compress")]
    assert not outcome.failures and len(found) == 2
    for record in found:
        assert (record["lr"], record["epochs"]) == (0.0, 0)
        assert [trial["val_accuracy"] for trial in record["trials"][1:]] == [0.0, 0.0]


def test_what_another_run_finished_meanwhile_is_in_the_report(make_study, monkeypatch):
    study = make_study("parallel", "compress(of='parallel', keep=0.5)")

    def factored_by_both(group, ledger, work):
        monkeypatch.setattr("onetrunk.benchmark.study.factor", compressed.factor)
        run(study)  # to its end, so that nothing factored is left

    monkeypatch.setattr("onetrunk.benchmark.study.factor", factored_by_both)
    assert len(run(study).records) == 4


def test_where_results_go_is_no_domain(domains, tmp_path):
    root = tmp_path / "domains"
    shutil.copytree(domains, root)
    (root / "results" / "mini").mkdir(parents=True)
    assert domains_in(root, out=root / "results" / "mini") == ("shades", "stripes")
    assert domains_in(root) == ("results", "shades", "stripes")


def test_a_folder_with_nothing_but_the_base_domain_is_refused(tmp_path):
    (tmp_path / "tiny_imagenet").mkdir()
    with pytest.raises(DataError, match=r"has no domain but tiny_imagenet, .* or name it: --dom"):
        mini(Wish(tmp_path, tmp_path / "out", methods=("head",)))


@pytest.mark.skipif(sys.platform != "linux", reason="names there are any bytes")
def test_a_name_that_is_no_text_is_refused(tmp_path):
    os.mkdir(os.fsencode(tmp_path) + b"/caf\xe9")
    with pytest.raises(DataError, match=r"the name of domain 'caf.*' is not valid UTF-8"):
        domains_in(tmp_path)


def test_folders_that_hold_no_domains_are_refused(domains, tmp_path):
    with pytest.raises(DataError, match="has no domain 'x': it has shades, stripes"):
        domains_in(domains, ["x"])
    with pytest.raises(DataError, match="has no folders below it"):
        domains_in(tmp_path)
    with pytest.raises(DataError, match="is no folder"):
        domains_in(tmp_path / "none")


def test_a_backbone_counts_without_its_own_classifier():
    backbone = cells_module.backbone_of(TRUNK)
    whole = sum(t.numel() for t in backbone.state_dict().values())
    own = backbone.fc.weight.numel() + backbone.fc.bias.numel()
    assert cells_module.shared_numbers(backbone, ("fc",)) == whole - own


def test_a_compression_is_of_the_cells_own_networks(make_study, monkeypatch):
    study = make_study("parallel", "compress(of='parallel', keep=0.5)")
    run(study)
    again = []
    real = cells_module.train_again
    monkeypatch.setattr(
        "onetrunk.benchmark.study.train_again", lambda *a: again.append(a[0]) or real(*a)
    )
    (bank,) = (path for path in (study.work / "banks").iterdir() if path.is_dir())
    opened = Bank.open(bank)
    model = opened.load("stripes")
    opened.replace("stripes", model)  # of other images, say: the cell that it is of is not known
    for file in study.work.glob("*.jsonl"):
        kept = [line for line in file.read_text().splitlines() if "compress" not in line]
        file.write_text("\n".join(kept) + "\n")
    shown = []
    assert not run(study, progress=lambda *bar: shown.append(bar)).failures
    assert [cell.domain for cell in again] == ["stripes"]
    words = [words.partition(" ")[2] for _, _, words in shown[2:4]]
    assert words == ["parallel stripes, once more", f"{study.methods[1]} on 2 domains"]
    assert [done for done, *_ in shown] == [1, 2, 3, 4, 5, 6]
    assert shown[-1][:2] == (6, 6)


def test_a_compression_that_was_stopped_goes_on_where_it_was(make_study, monkeypatch):
    study = make_study("parallel", "compress(of='parallel', keep=0.5)")
    tuned = compressed._tuned

    def stopped(cell, *rest):
        if cell.domain == "stripes":
            raise KeyboardInterrupt
        return tuned(cell, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(compressed, "_tuned", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(study)
    assert len(known(study)) == 3
    monkeypatch.setattr(compressed, "compress", None)  # nothing is factored again
    assert not run(study).failures
    assert len(known(study)) == 4
    assert not list((study.work / "banks").glob("factored-*"))  # of use until then


def test_a_compression_of_a_network_that_cannot_be_trained_again_says_so(make_study, monkeypatch):
    study = make_study("parallel", "compress(of='parallel', keep=0.5)")
    run(make_study("parallel"))
    (bank,) = (path for path in (study.work / "banks").iterdir() if path.is_dir())
    opened = Bank.open(bank)
    opened.replace("stripes", opened.load("shades"))  # of other images

    def broken(*_args):
        raise MemoryError("none is left")

    monkeypatch.setattr("onetrunk.benchmark.study.train_again", broken)
    shown = []
    failures = run(study, progress=lambda *bar: shown.append(bar[:2])).failures
    assert shown[-1] == (4, 4)
    assert "parallel stripes, once more: MemoryError: none is left" in failures[0]
    assert "that of 'stripes' could not be trained again" in failures[1] and len(failures) == 2
    assert len(known(study)) == 2


def test_two_processes_compress_as_one_does(make_study, tmp_path):
    study = make_study("parallel", "compress(of='parallel', keep=0.5)")
    other = dataclasses.replace(study, work=tmp_path / "other")
    found = [
        {(r["method"], r["domain"]): (r["test_accuracy"], r["trials"]) for r in records}
        for records in (run(study).records, run(other, workers=2).records)
    ]
    assert found[0] == found[1] and len(found[0]) == 4


def test_a_creation_of_the_studys_bank_that_was_killed_is_in_nobodys_way(make_study):
    study = make_study("parallel")
    cell = study.cells()[0]
    (bank_path(study.work, cell) / "blobs").mkdir(parents=True)
    assert not run(study).failures


def test_what_is_not_ours_fails_one_cell_and_not_the_study(make_study, monkeypatch):
    def broken(*_args):
        raise ZeroDivisionError("out of luck")

    monkeypatch.setattr("onetrunk.benchmark.study.run_cell", broken)
    outcome = run(make_study("head"))
    assert len(outcome.failures) == 2
    assert "head stripes: ZeroDivisionError: out of luck" in " ".join(outcome.failures)


def test_a_broken_image_fails_its_cell(domains, tmp_path):
    shutil.copytree(domains / "shades", tmp_path / "shades")
    (tmp_path / "shades" / "test" / "dark" / "0.png").write_bytes(b"no picture")
    cell = Cell("mini", TRUNK, str(tmp_path), "shades", "head", 0, TINY)
    with pytest.raises(DataError, match=r"0\.png"):
        run_cell(cell, Ledger(tmp_path / "out"), tmp_path / "out")


def test_a_trunk_with_weights_keeps_an_at_sign_in_their_path():
    assert Trunk.read("resnet26(width=0.5)@a@b/w.safetensors").weights == "a@b/w.safetensors"
    assert Trunk.read("timm:resnet18") == Trunk("timm:resnet18")
