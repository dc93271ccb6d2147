"""Methods by their written form: read back as written; what cannot be read is refused by name."""

import pytest

from onetrunk.benchmark.methods import read_method
from onetrunk.errors import AttachError, SpecError

FORMS = (
    "head", "full", "full@late", "scratch", "parallel", "lowrank(rank=4)", "parallel@late",
    "lowrank(rank=4)@early+mid", "series@first", "allocate(budget='1%')",
    "allocate(budget='1%', by='trained')", "allocate(budget='1%', layers='auto')",
    "allocate(budget='1%', norms='none')", "uniform(budget='2%')",
    "lora(like='parallel')", "lora(like='lowrank(rank=4)', norms=True)",
    "compress(of='parallel', keep=0.5)", "compress(of='parallel', keep=0.25, share='both')",
    "svd(of='lowrank(rank=4)', keep=0.5)",
)  # fmt: skip


def test_equal_methods_have_one_form():
    assert str(read_method(" full() ")) == "full"
    written = str(read_method("lora( like = 'lowrank( rank = 4 )' )"))
    assert written == "lora(like='lowrank(rank=4)')"
    assert str(read_method("svd(of='parallel()', keep=0.5)")) == "svd(of='parallel', keep=0.5)"


@pytest.mark.parametrize("form", FORMS)
def test_a_method_is_written_as_it_is_read(form):
    assert str(read_method(form)) == form


@pytest.mark.parametrize(
    ("form", "error", "message"),
    [
        ("paralel", SpecError, "unknown method 'paralel'.*Did you mean 'parallel'"),
        ("parallel@top", SpecError, "'top' is no place. Use stages"),
        ("scratch@late", SpecError, "only a family is placed"),
        ("lowrank(rank=0)", AttachError, "rank must be a whole number"),
        ("lora(like='scratch')", SpecError, "`like` names an adapter family"),
        ("lora()", SpecError, "like"),
        ("compress(of='scratch', keep=0.5)", SpecError, "`of` names a method with adapters"),
        ("compress(of='norm', keep=0.5)", SpecError, "`of` names a method with adapters"),
        ("compress(of=3, keep=0.5)", SpecError, "`of` names a method with adapters"),
        ("lora(like='norm')", SpecError, "`like` names an adapter family"),
        ("compress(of='parallel', keep=1.5)", SpecError, "keep is a share above 0"),
        ("compress(of='parallel', keep='x')", SpecError, "keep is a share above 0"),
        ("compress(of='parallel', keep=0.5, share='left')", SpecError, "`share` is one of"),
        ("svd(of='parallel', keep=0.5, tune='none')", SpecError, "`tune` is one of own, all"),
        ("allocate(budget='few%')", SpecError, "method .*: cannot read the budget 'few%'"),
        ("uniform(budget=0.5)", SpecError, "cannot read the budget 0.5: write numbers"),
        ("allocate(by='guess')", SpecError, "`by` is one of gradient, curvature, trained"),
        ("head@late", SpecError, "head is placed at no layer. Leave @late out"),
        ("norm@early", SpecError, "norm is placed at no layer"),
        ("lora(like='parallel', norms=1)", SpecError, "`norms` is True or False"),
        ("compress(of='parallel', keep=0.5, weighted='no')", SpecError, "`weighted` is True or F"),
        ("allocate(norms='some')", SpecError, "`norms` is one of all, placed, none"),
        ("allocate(layers='some')", AttachError, "known are auto, spatial, pointwise, all"),
        ("svd(of='parallel', keep=0.5, x=1)", SpecError, "unexpected keyword argument 'x'"),
    ],
)
def test_what_is_no_method_is_refused(form, error, message):
    with pytest.raises(error, match=message):
        read_method(form)
