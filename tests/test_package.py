"""The package as a user gets it: the wheel, the front door, what an import costs."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import onetrunk as ot

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))


def test_the_wheel_works_outside_the_checkout(tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    assert (tmp_path / "site" / "onetrunk" / "py.typed").exists()
    code = (
        "import onetrunk as ot; print(ot.__file__); print(ot.backbone('resnet26(width=0.25)').fc)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.startswith(str(tmp_path)) and "out_features=1000" in ran.stdout


def test_every_name_at_the_front_door_is_there():
    assert len(ot.__all__) < 30
    for name in ot.__all__:
        assert getattr(ot, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'attatch'"):
        _ = ot.attatch


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, onetrunk; assert not {'torch', 'timm', 'numpy', 'PIL'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_attaching_imports_neither_timm_nor_datasets_nor_torchvision():
    code = (
        "import sys, onetrunk as ot; net = ot.backbone('resnet26(width=0.25)');"
        "ot.merge(ot.attach(net, ot.Parallel(), ['a', 'b']).eval());"
        "heavy = {'datasets', 'torchvision', 'pyarrow', 'sklearn', 'matplotlib'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_nothing_is_unpickled_and_no_text_is_run(source):
    tree = ast.parse(source.read_text())
    imports = {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    calls = {ast.unparse(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)}
    assert not imports & {"pickle", "shelve", "joblib", "dill", "marshal", "yaml"}
    assert not calls & {"torch.load", "torch.save", "eval", "exec", "pickle.loads"}


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_a_file_opens_with_what_it_is(source):
    assert source.read_text().startswith('"""') or source.stat().st_size == 0
