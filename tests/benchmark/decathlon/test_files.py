"""Reading the official layout, and every damaged or hostile file by its message."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from onetrunk.benchmark.decathlon import read_devkit, read_results, score_results, write_results
from onetrunk.benchmark.decathlon.files import TarBytes
from onetrunk.data.decoding import BrokenImageError


def edited(path: Path, change: Callable[[dict], object]) -> None:
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


def annotations(kit: Path, part: str = "train", name: str = "aircraft") -> Path:
    return kit / "annotations" / f"{name}_{part}.json"


def test_ids_labels_and_pixels_are_those_of_the_files(kit):
    for name, prefix in (("aircraft", 1), ("dtd", 4)):  # from a tar, from a folder
        files = read_devkit(kit, [name]).domains[name]
        assert files.classes == ("class 0", "class 1", "class 2")
        assert files.category_ids == tuple(prefix * 10**7 + label for label in (1, 2, 3))
        assert [len(files.rows(part)) for part in ("train", "val", "train+val", "test")] == [
            12, 6, 18, 6,
        ]  # fmt: skip
        assert files.test.ids[0] == prefix * 10**7 + 200_000 + 12 + 6 + 1
        images = files.images("train+val")
        for image, label in (images[index] for index in range(18)):
            mean_3 = np.asarray(image).mean((0, 1))
            assert mean_3.argmax() == label


def test_a_tar_and_its_unpacked_folder_are_the_same_domain(kit):
    packed = read_devkit(kit, ["gtsrb"]).domains["gtsrb"]
    with tarfile.open(kit / "data" / "gtsrb.tar") as tar:
        tar.extractall(kit / "data", filter="data")
    unpacked = read_devkit(kit, ["gtsrb"]).domains["gtsrb"]
    for part in ("train", "val", "test"):
        assert packed.rows(part) == unpacked.rows(part)
        ours, theirs = packed.images(part), unpacked.images(part)
        assert all(ours[i][0].tobytes() == theirs[i][0].tobytes() for i in range(len(ours)))


def test_imagenets_tar_may_keep_its_name(kit):
    for part in ("train", "val", "test_stripped"):
        text = annotations(kit, part).read_text().replace("aircraft", "imagenet12")
        annotations(kit, part, "imagenet12").write_text(
            text.replace('"id": 10', '"id": 60').replace('_id": 10', '_id": 60')
        )
    data = kit / "data"
    with (
        tarfile.open(data / "aircraft.tar") as old,
        tarfile.open(data / "decathlon-1.0-data-imagenet.tar", "w") as new,
    ):
        for member in old.getmembers():
            encoded = old.extractfile(member)
            member.name = "./" + member.name.replace("aircraft", "imagenet12")
            new.addfile(member, encoded)
    assert len(read_devkit(kit, ["imagenet12"]).domains["imagenet12"].train) == 12


def test_classes_of_one_name_are_told_apart_by_their_ids(kit):
    def same(found):
        for category in found["categories"][:2]:
            category["name"] = "crane"

    edited(annotations(kit), same)
    edited(annotations(kit, "val"), same)
    classes = read_devkit(kit, ["aircraft"]).domains["aircraft"].classes
    assert classes == ("crane (10000001)", "crane (10000002)", "class 2")


HOSTILE = "../../secret.jpg"
DAMAGE: dict[str, tuple[str, Callable[[dict], object], str]] = {
    "no images": ("train", lambda f: f.pop("images"), r"Field required at images \(1 such in all"),
    "a text id": ("val", lambda f: f["images"][3].update(id="7"), r"integer at images\.3\.id"),
    "an empty list": ("test_stripped", lambda f: f.update(images=[]), "lists no image"),
    "one category": (
        "train", lambda f: f.update(categories=f["categories"][:1]), "has 1 categories, and 2 are",
    ),
    "a category twice": (
        "train", lambda f: f["categories"].append(f["categories"][0]), "category 10000001 twice",
    ),
    "a foreign category": (
        "train", lambda f: f["categories"][0].update(id=40000001), r"id 40000001.* 1 \* 10\*\*7",
    ),
    "other categories": (
        "val", lambda f: f["categories"][0].update(name="x"), "list different categories",
    ),
    "a foreign image": (
        "test_stripped", lambda f: f["images"][0].update(id=20200019), r"has the id 20200019",
    ),
    "a label twice": (
        "train", lambda f: f["annotations"].append(f["annotations"][0]), "image 10000001 twice",
    ),
    "no label": (
        "train", lambda f: f["annotations"].pop(), "1 images without a label, the first 10000012",
    ),
    "a strange label": (
        "train", lambda f: f["images"].pop(), "labels image 10000012, which it does not list",
    ),
    "an unknown category": (
        "train", lambda f: f["annotations"][1].update(category_id=10000009),
        "gives image 10000002 category 10000009, which it does not list",
    ),
    "an image in two parts": (
        "test_stripped", lambda f: f["images"][0].update(id=10000001),
        "the image id 10000001 is there twice",
    ),
    "a file in two parts": (
        "test_stripped",
        lambda f: f["images"][0].update(file_name="data/aircraft/train/0001/000001.jpg"),
        "the image file 'aircraft/train/0001/000001.jpg' is there twice",
    ),
    "an image that is not there": (
        "test_stripped", lambda f: f["images"][0].update(file_name="data/aircraft/test/x.jpg"),
        r"aircraft.tar lacks 1 of the 24 images .* the first 'aircraft/test/x.jpg'",
    ),
    **{
        f"a name that leads out: {name}": (
            "train", lambda f, name=name: f["images"][0].update(file_name=name),
            r"images are at data/aircraft/\.\.\.: no path is followed out of there",
        )
        for name in (
            HOSTILE, "/etc/passwd", "data/aircraft/../../x.jpg", "data/dtd/train/1.jpg",
            "data/aircraft//x.jpg", "data/aircraft/./x.jpg", "data/aircraft/..\\x", "aircraft/\0",
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_annotations_are_refused(kit, what):
    part, change, message = DAMAGE[what]
    edited(annotations(kit, part), change)
    with pytest.raises(ValueError, match=message):
        read_devkit(kit, ["aircraft"])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            b'{"images": [',
            r"aircraft_train.json is no annotation file of the challenge: Invalid JSON",
        ),
        (b"[]", "is no annotation file of the challenge"),
        (b"\xff\xfe", "is no annotation file of the challenge"),
        (b"[" * 100_000, "is no annotation file of the challenge"),
        (b"", "is no annotation file of the challenge"),
    ],
)
def test_what_is_no_json_is_refused(kit, data, message):
    annotations(kit).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_devkit(kit, ["aircraft"])


def test_missing_files_are_named(kit):
    with pytest.raises(ValueError, match=r"has no folder 'annotations'.*Unpack decathlon"):
        read_devkit(kit / "data")
    (kit / "data" / "aircraft.tar").unlink()
    with pytest.raises(ValueError, match=r"neither a folder 'aircraft' nor aircraft\.tar"):
        read_devkit(kit, ["aircraft"])
    annotations(kit).unlink()
    with pytest.raises(ValueError, match=r"aircraft_train.json is not there. It comes with"):
        read_devkit(kit, ["aircraft"])


def test_a_tar_cut_short_is_refused(kit):
    path = kit / "data" / "aircraft.tar"
    whole = path.read_bytes()
    for n_bytes in (100, 700, len(whole) // 2, len(whole) // 2 // 512 * 512 + 100):
        path.write_bytes(whole[:n_bytes])
        with pytest.raises(ValueError, match=r"is no whole uncompressed tar|aircraft\.tar lacks"):
            read_devkit(kit, ["aircraft"])


@pytest.mark.timeout(20)
@pytest.mark.parametrize("n_bytes", [-1024, -1])
def test_a_tar_that_leads_back_is_refused(kit, n_bytes):
    members = [tarfile.TarInfo("a"), tarfile.TarInfo("b"), tarfile.TarInfo("c")]
    members[-1].size = n_bytes  # after it, the first one would come again, and again
    headers = [member.tobuf(tarfile.GNU_FORMAT) for member in members]
    (kit / "data" / "aircraft.tar").write_bytes(b"".join(headers) + bytes(1024))
    with pytest.raises(ValueError, match=f"no whole uncompressed tar .a member of {n_bytes} bytes"):
        read_devkit(kit, ["aircraft"])


def test_a_half_unpacked_folder_speaks_of_the_tar_beside_it(kit):
    with tarfile.open(kit / "data" / "gtsrb.tar") as tar:
        name = tar.getnames()[0]
        (kit / "data" / name).parent.mkdir(parents=True)
        (kit / "data" / name).write_bytes(tar.extractfile(name).read())
    with pytest.raises(ValueError, match=r"lacks 23 of .* Without that folder, gtsrb.tar beside"):
        read_devkit(kit, ["gtsrb"])


def test_a_compressed_tar_is_refused(kit):
    path = kit / "data" / "aircraft.tar"
    with tarfile.open(path, "w:gz"):
        pass
    with pytest.raises(ValueError, match="is no whole uncompressed tar"):
        read_devkit(kit, ["aircraft"])


def test_a_tar_that_shrinks_later_is_a_broken_image(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"12345")
    with pytest.raises(BrokenImageError, match=r"'one.jpg' cannot be read: .*x.tar is cut short"):
        TarBytes(tmp_path / "x.tar", ["one.jpg"], [(2, 9)])[0]
    with pytest.raises(BrokenImageError, match=r"'one.jpg' cannot be read: No such file"):
        TarBytes(tmp_path / "gone.tar", ["one.jpg"], [(2, 9)])[0]


def test_a_tar_with_other_names_says_one_of_them(kit):
    with tarfile.open(kit / "data" / "aircraft.tar", "w") as tar:
        for number in (1, 2):
            tar.addfile(tarfile.TarInfo(f"planes/{number}.jpg"))
    with pytest.raises(ValueError, match=r"lacks 24 of the 24 images.* it has 'planes/1.jpg', say"):
        read_devkit(kit, ["aircraft"])


def test_links_in_a_tar_do_not_count(kit):
    path = kit / "data" / "aircraft.tar"
    with tarfile.open(path, "w") as tar:
        for number in range(24):
            member = tarfile.TarInfo(f"aircraft/train/0001/{number:06d}.jpg")
            member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(member, io.BytesIO())
    with pytest.raises(ValueError, match=r"lacks 24 of .*links do not count.* it has no image"):
        read_devkit(kit, ["aircraft"])


def test_links_among_unpacked_images_do_not_count(kit, tmp_path):
    image = next((kit / "data" / "dtd" / "test").iterdir())
    image.rename(tmp_path / "elsewhere.jpg")
    image.symlink_to(tmp_path / "elsewhere.jpg")
    with pytest.raises(ValueError, match=rf"lacks 1 of the 24 images.*{image.name}"):
        read_devkit(kit, ["dtd"])
    (kit / "data" / "dtd").rename(tmp_path / "dtd")
    (kit / "data" / "dtd").symlink_to(tmp_path / "dtd")
    with pytest.raises(ValueError, match="neither a folder 'dtd'"):
        read_devkit(kit, ["dtd"])


def answers(kit, name="dtd"):
    files = read_devkit(kit, [name]).domains[name]
    return {image: files.category_ids[0] for image in files.test.ids}


def test_results_read_back(tmp_path):
    write_results(tmp_path / "results.json", {7: 8, 9: 10})
    assert read_results(tmp_path / "results.json") == {7: 8, 9: 10}
    assert json.loads((tmp_path / "results.json").read_text())[0] == {
        "image_id": 7, "category_id": 8,
    }  # fmt: skip


def test_a_submission_is_scored_by_counting(kit, labels, tmp_path):
    write_results(tmp_path / "results.json", answers(kit))  # the first of three classes each time
    found = score_results(tmp_path / "results.json", labels)
    assert found.accuracies == {"dtd": pytest.approx(1 / 3)} and found.score is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "has no answer"),
        ("{}", r"is no results.json: .*It is a list of"),
        ('[{"image_id": 1.5, "category_id": 2}]', r"integer at 0\.image_id"),
        ('[{"image_id": 10200000}]', r"Field required at 0\.category_id"),
        (
            '[{"image_id": 5, "category_id": 2}, {"image_id": 5, "category_id": 3}]',
            "answers image 5 twice. Give every image one category",
        ),
        ('[{"image_id": 5, "category_id": 2}]', "answers image 5, which is of no domain"),
        (
            '[{"image_id": 40000001, "category_id": 2}]',
            r"image 40000001 of \w+ with category 2, and .* Give the annotations' category ids",
        ),
    ],
)
def test_what_is_no_submission_is_refused(labels, tmp_path, text, message):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        score_results(tmp_path / "results.json", labels)


def test_missing_and_extra_answers_are_counted(kit, labels, tmp_path):
    path, whole = tmp_path / "results.json", answers(kit)
    write_results(path, dict(list(whole.items())[2:]))
    with pytest.raises(ValueError, match=r"lacks 2 image ids of dtd.*the first 40200019"):
        score_results(path, labels)
    write_results(path, {**whole, 40_999_999: 40_000_001})
    with pytest.raises(ValueError, match=r"answers 1 image ids of dtd.*the first 40999999"):
        score_results(path, labels)


def test_missing_or_damaged_labels_are_named(kit, labels, tmp_path):
    path = tmp_path / "results.json"
    with pytest.raises(ValueError, match=r"results.json is not there. Give a results.json"):
        score_results(path, labels)
    write_results(path, answers(kit))
    file = labels / "dtd_test.json"
    edited(file, lambda f: f["annotations"].append(f["annotations"][0]))
    with pytest.raises(ValueError, match=r"dtd_test.json labels image 40200019 twice"):
        score_results(path, labels)
    edited(file, lambda f: f["annotations"].pop())
    edited(file, lambda f: f["annotations"][0].update(category_id=1))
    with pytest.raises(ValueError, match=r"dtd_test.json has the id 1; those of dtd are 4"):
        score_results(path, labels)
    file.unlink()
    with pytest.raises(ValueError, match=r"dtd_test.json is not there.*labels_test.zip"):
        score_results(path, labels)


def test_results_that_cannot_be_written_are_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"results.json cannot be written: No such file"):
        write_results(tmp_path / "gone" / "results.json", {1: 2})
