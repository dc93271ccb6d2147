"""The studies as values: each method and domain once, labels that tell methods apart."""

import pytest

from onetrunk.benchmark.studies import Wish, mini, shown


def test_a_study_has_everything_once_in_one_form(tmp_path):
    (tmp_path / "signs").mkdir()
    methods = ("full", "full()", "lowrank( rank = 2 )")
    wish = Wish(
        tmp_path, tmp_path, ("resnet26(width=0.125)",) * 2, methods, ("signs",) * 2, (0, 1, 0)
    )
    (study,) = mini(wish)
    assert study.methods == ("full", "lowrank(rank=2)")
    assert study.domains == ("signs",) and study.seeds == (0, 1)


@pytest.mark.parametrize(
    ("methods", "labels"),
    [
        (["lora(like='parallel')", "full"], ["PEFT LoRA", "fine-tuning"]),
        (
            ["lora(like='parallel')", "lora(like='series')"],
            ["PEFT LoRA (parallel)", "PEFT LoRA (series)"],
        ),
        (
            ["compress(of='series', keep=0.5)", "compress(of='series', keep=0.5, weighted=False)"],
            [
                "compressed joint, keep 0.5 (series)",
                "compressed joint, keep 0.5 (series, unweighted)",
            ],
        ),
        (
            ["svd(of='series', keep=0.5)", "svd(of='series', keep=0.5, share='output')"],
            ["compressed alone, keep 0.5", "compressed alone by output, keep 0.5"],
        ),
        (
            ["compress(of='series', keep=0.5)", "compress(of='series', keep=0.5, tune='all')"],
            ["compressed joint, keep 0.5", "compressed joint, keep 0.5, basis tuned"],
        ),
    ],
)
def test_no_two_methods_have_one_label(methods, labels):
    assert [method.label for method in shown(methods)] == labels
