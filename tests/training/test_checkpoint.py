"""The checkpoint file: what is in it, what it refuses, and that nothing is ever unpickled."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import onetrunk
from onetrunk.errors import DamagedError, TrainingError
from onetrunk.tensorfile import pack
from onetrunk.training.checkpoint import Checkpoint, read_checkpoint, write_checkpoint

IDENTITY = {"recipe.epochs": 3, "classes": ["a", "b"], "crop": None}
THREADS = {"threads": 1, "torch": "2.9"}


def some_tensors(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "fc.weight": torch.randn(3, 4, generator=generator),
        "norm.num_batches_tracked": torch.tensor(seed),
        "half.w": torch.randn(5, generator=generator).bfloat16(),
    }


def checkpoint(**changed: Any) -> Checkpoint:
    values: dict[str, Any] = {
        "identity": IDENTITY,
        "computed_with": THREADS,
        "step": 5,
        "epochs": 2,
        "start_accuracy": 0.7 / 3,
        "best_accuracy": 0.1 + 0.2,
        "network": some_tensors(1),
        "best": some_tensors(2),
        "good": some_tensors(3),
        "optimizer": {"0.momentum_buffer": torch.ones(3)},
    }
    return Checkpoint(**{**values, **changed})


@pytest.mark.parametrize("best", [some_tensors(2), {}])
def test_it_reads_back_bit_for_bit(best: dict[str, Tensor], tmp_path: Path) -> None:
    written = checkpoint(best=best)
    write_checkpoint(tmp_path / "new" / "run", written)
    found = read_checkpoint(tmp_path / "new" / "run", IDENTITY, THREADS)
    assert (found.step, found.epochs) == (5, 2)
    assert (found.start_accuracy, found.best_accuracy) == (0.7 / 3, 0.1 + 0.2)
    for part in ("network", "best", "good", "optimizer"):
        theirs, ours = getattr(found, part), getattr(written, part)
        assert theirs.keys() == ours.keys()
        assert all(
            torch.equal(theirs[n], t) and theirs[n].dtype == t.dtype for n, t in ours.items()
        )


def test_equal_states_are_equal_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_checkpoint(tmp_path / name, checkpoint())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_every_damaged_byte_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "run"
    write_checkpoint(path, checkpoint())
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(DamagedError, match=re.escape(str(path))):
            read_checkpoint(path, IDENTITY, THREADS)
    for size in (0, 7, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(DamagedError, match=re.escape(str(path))):
            read_checkpoint(path, IDENTITY, THREADS)


@pytest.mark.parametrize(
    "card",
    [
        {"checkpoint": 2},
        {"checkpoint": 2, "identity": 3, "computed_with": {}, "step": 1, "epochs": 1},
        {"checkpoint": 2, "identity": {}, "computed_with": {}, "step": "x", "epochs": 1},
    ],
)
def test_a_whole_file_without_the_parts_is_damaged(card: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "run").write_bytes(pack({}, card))
    with pytest.raises(DamagedError, match=r"run: a checkpoint without its parts.*Remove it"):
        read_checkpoint(tmp_path / "run", IDENTITY, THREADS)


def test_a_foreign_part_is_damaged(tmp_path: Path) -> None:
    card = {"checkpoint": 2, "identity": {}, "computed_with": {}, "step": 1, "epochs": 1}
    accuracies = {"start_accuracy": 0.5, "best_accuracy": 0.5}
    data = pack({"surprise.x": torch.ones(1)}, {**card, **accuracies})
    (tmp_path / "run").write_bytes(data)
    with pytest.raises(DamagedError, match=r"without its parts.*surprise"):
        read_checkpoint(tmp_path / "run", {}, {})


def test_another_file_of_ours_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "run").write_bytes(pack({"w": torch.ones(1)}, {"domain": "flowers"}))
    with pytest.raises(
        TrainingError, match=r"run is no checkpoint of a training.*another file name"
    ):
        read_checkpoint(tmp_path / "run", IDENTITY, THREADS)


def test_a_link_and_a_folder_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run", checkpoint())
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with pytest.raises(DamagedError, match="symbolic link"):
        read_checkpoint(tmp_path / "link", IDENTITY, THREADS)
    with pytest.raises(DamagedError, match="a folder"):
        read_checkpoint(tmp_path, IDENTITY, THREADS)
    with pytest.raises(TrainingError, match=r"cannot read the checkpoint .*missing"):
        read_checkpoint(tmp_path / "missing", IDENTITY, THREADS)


def test_a_file_system_that_refuses_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(TrainingError, match=r"cannot write the checkpoint .*folder: "):
        write_checkpoint(tmp_path / "folder", checkpoint())
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_what_differs_is_listed_once_and_short(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run", checkpoint())
    other = {"recipe.epochs": 4, "classes": [f"class {k}" for k in range(1000)], "crop": None}
    with pytest.raises(TrainingError) as error:
        read_checkpoint(tmp_path / "run", other, THREADS)
    lines = str(error.value).splitlines()
    assert lines[1:3] == ["- classes ['a', 'b']", lines[2]] and len(lines[2]) < 230
    assert lines[3:5] == ["- recipe.epochs 3", "+ recipe.epochs 4"] and len(lines) == 6


def test_a_tuple_is_the_list_that_was_written(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run", checkpoint(identity={"drops": (0.5, 2 / 3)}))
    assert read_checkpoint(tmp_path / "run", {"drops": (0.5, 2 / 3)}, THREADS).step == 5


def test_another_build_is_a_warning(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run", checkpoint())
    with pytest.warns(UserWarning, match=r"not bit for bit:\n- torch '2.9'\n\+ torch '3.0'$"):
        read_checkpoint(tmp_path / "run", IDENTITY, {**THREADS, "torch": "3.0"})


def test_nothing_in_the_package_pickles() -> None:
    modules = "pickle|dill|joblib|shelve|marshal"
    unsafe = re.compile(rf"(?<!safetensors\.)torch\.(save|load)\(|\b(import|from) ({modules})\b")
    sources = list(Path(onetrunk.__file__).parent.rglob("*.py"))
    assert len(sources) > 20
    found = [str(path) for path in sources if unsafe.search(path.read_text(encoding="utf-8"))]
    assert found == []
