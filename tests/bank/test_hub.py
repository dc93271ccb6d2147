"""push and pull against a stand-in for the Hub on this machine; no test leaves it."""

import importlib.util
from pathlib import Path

import huggingface_hub
import pytest
import torch
from torch import nn

import onetrunk as ot
from onetrunk.backbones import fingerprint
from onetrunk.bank import hub as hub_module
from onetrunk.bank.bank import Bank
from onetrunk.bank.folder import MissingBlobError
from onetrunk.bank.manifest import encode
from onetrunk.bank.store import Store
from onetrunk.errors import BankError, DamagedError

_spec = importlib.util.spec_from_file_location(
    "hub_server", Path(__file__).parent / "hub_server.py"
)
hub_server = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(hub_server)

REPO = "me/garden"
NET = "resnet26(width=0.25)"


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.conv, self.norm = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8)
            self.fc = nn.Linear(8, 5)
        self.eval()

    def forward(self, x_bchw):
        return self.fc(self.norm(self.conv(x_bchw)).relu().mean((2, 3)))


def attached(net, seed=0):
    return ot.attach(net, ot.Norm(), ["daisy", "ro|se\n`x`"], input_size=(3, 16, 16), seed=seed)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.hf_api.is_xet_available", lambda: False, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    huggingface_hub.utils.disable_progress_bars()
    with hub_server.serving() as (hub, address):
        monkeypatch.setenv("HF_ENDPOINT", address)  # read at every call
        hub.address = address
        yield hub
    huggingface_hub.utils.enable_progress_bars()


@pytest.fixture
def bank(tmp_path):
    net = Tiny()
    bank = Bank.create(tmp_path / "garden", net)
    bank.add("flowers", attached(net), metrics={"test_accuracy": 0.9375, "note": "a|b", "n": [1]})
    bank.add("signs", attached(net, seed=1))
    return bank


@pytest.fixture
def pushed(hub, bank):
    bank.push(REPO, token="secret")
    return hub.files(REPO)


def pull(tmp_path, **options):
    return Bank.pull(REPO, tmp_path / "pulled", token="secret", **options)


def refused(tmp_path, match, error=DamagedError, **options):
    """The pull fails, and nothing of it is left."""
    before = sorted(x.name for x in tmp_path.iterdir())
    with pytest.raises(error, match=match) as caught:
        pull(tmp_path, **options)
    assert sorted(x.name for x in tmp_path.iterdir()) == before
    message = str(caught.value)
    assert "\n" not in message and REPO in message
    return message


def rewritten(files, change):
    """Puts another manifest in the repository, its seal right."""
    manifest = hub_module.decode(files["bank.json"], "bank.json")
    change(manifest)
    files["bank.json"] = encode(manifest)


def blobs_of(bank):
    return {f"blobs/{x.name}": x.read_bytes() for x in (bank.path / "blobs").iterdir()}


def test_a_bank_comes_back_as_it_was_pushed(hub, bank, tmp_path):
    url = bank.push(REPO, token="secret")
    assert url == f"{hub.address}/{REPO}"
    files = hub.files(REPO)
    assert {n: d for n, d in files.items() if n.startswith("blobs/")} == blobs_of(bank)
    assert files["bank.json"] == (bank.path / "bank.json").read_bytes()
    assert set(files) == {".gitattributes", "README.md", "bank.json", *blobs_of(bank)}
    found = pull(tmp_path, backbone=bank.backbone)
    assert found.path == tmp_path / "pulled" and list(found.domains) == ["flowers", "signs"]
    assert blobs_of(found) == blobs_of(bank) and found.verify().ok
    x_bchw = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(found.load("signs")(x_bchw), bank.load("signs")(x_bchw))
    assert {x.name for x in found.path.iterdir()} == {"bank.json", "blobs", "bank.lock"}
    assert {x.name for x in tmp_path.iterdir()} == {"garden", "pulled"}
    found.add("more", attached(found.backbone))  # an ordinary bank


def test_what_the_client_asks_for(hub, bank, tmp_path):
    bank.push(REPO, private=True)
    commits = [path for method, path in hub.log if "/commit/" in path]
    assert len(commits) == 1  # never a half-pushed bank
    assert "private" in (hub.asked[REPO].get("visibility"), *hub.asked[REPO])
    hub.log.clear()
    pull(tmp_path)
    fetched = {
        path.partition("/resolve/")[2].partition("/")[2] for m, path in hub.log if m == "GET"
    }
    assert fetched - {""} == {"bank.json", *blobs_of(bank)}


def test_pushing_again_deletes_what_is_gone(hub, bank, tmp_path):
    bank.push(REPO)
    hub.files(REPO)["LICENSE"] = b"mine"
    bank.remove("flowers")
    bank.push(REPO, message="without flowers")
    files = hub.files(REPO)
    assert {n for n in files if n.startswith("blobs/")} == set(blobs_of(bank))
    assert files["LICENSE"] == b"mine"
    assert list(pull(tmp_path).domains) == ["signs"]


def test_the_model_card(pushed):
    text = pushed["README.md"].decode()
    assert text.startswith("---\nlibrary_name: onetrunk\n") and "# garden\n" in text
    row = next(line for line in text.splitlines() if line.startswith("| flowers |"))
    assert row.count("|") == 7  # no name breaks out of its cell
    assert "2: daisy, ro se x" in row and "test_accuracy 0.9375, note a b" in row
    assert 'ot.Bank.pull("me/garden", "garden.bank")' in text and 'bank.load("flowers")' in text
    assert "over it 2 visual\ndomains" in text


def test_branches_and_revisions(hub, bank, tmp_path):
    bank.push(REPO)
    bank.remove("signs")
    bank.push(REPO, revision="small")
    assert list(pull(tmp_path, revision="small").domains) == ["flowers"]
    sha = hub.commit_of(hub.files(REPO))
    found = Bank.pull(REPO, tmp_path / "by-commit", revision=sha)
    assert list(found.domains) == ["flowers", "signs"]
    with pytest.raises(BankError, match=r"there is no such revision. Leave it out"):
        Bank.pull(REPO, tmp_path / "other", revision="nowhere")


def test_an_endpoint_is_an_argument_as_well(hub, bank, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert bank.push(REPO, endpoint=hub.address).startswith(hub.address)
    assert list(Bank.pull(REPO, tmp_path / "pulled", endpoint=hub.address).domains)


def test_an_empty_bank_and_an_empty_folder_will_do(hub, tmp_path):
    Bank.create(tmp_path / "empty", Tiny()).push(REPO)
    assert 'bank.load("NAME")' in hub.files(REPO)["README.md"].decode()
    (tmp_path / "pulled").mkdir()
    assert len(pull(tmp_path).domains) == 0


def test_a_bank_without_blobs_comes_back(hub, tmp_path):
    Bank.create(tmp_path / "named", NET, by_reference=True).push(REPO)
    assert fingerprint(pull(tmp_path).backbone) == fingerprint(ot.backbone(NET))


# Hostile and damaged repositories


def test_a_flipped_cut_or_missing_file_is_refused(pushed, tmp_path):
    name = next(name for name in pushed if name.startswith("blobs/"))
    data = pushed[name]
    pushed[name] = data[:-1] + bytes([data[-1] ^ 1])
    refused(tmp_path, "were altered")
    pushed[name] = data[:-1]
    refused(tmp_path, "it was cut short")
    pushed[name] = b"../../../etc/passwd"  # what git keeps of a symbolic link
    refused(tmp_path, "it was cut short")
    del pushed[name]
    assert name in refused(tmp_path, "lacks blobs/")
    pushed[name] = data
    pushed["bank.json"] = pushed["bank.json"].replace(b"daisy", b"dairy")
    refused(tmp_path, "not those that its first line's SHA-256")
    pushed["bank.json"] = b"bank.json"
    refused(tmp_path, "is damaged")
    del pushed["bank.json"]
    refused(tmp_path, r"holds no bank \(no bank.json\). Check the name", BankError)


@pytest.mark.parametrize(
    "name",
    [
        "../evil", "blobs/../../evil.safetensors", "/etc/evil", "blobs//x", "a\\b", "C:evil",
        "..", "blobs/..", "a/../b",
    ],
)  # fmt: skip
def test_names_that_lead_out_are_refused_before_anything_is_fetched(hub, pushed, tmp_path, name):
    pushed[name] = b"evil"
    hub.log.clear()
    message = refused(tmp_path, "leads out of its folder. Nothing was fetched")
    assert repr(name) in message and not [path for _, path in hub.log if "/resolve/" in path]


@pytest.mark.parametrize("name", ["blobs/evil.safetensors", "blobs/x.pkl", "blobs/a/b", "blobs"])
def test_odd_names_among_the_blobs_are_refused(pushed, tmp_path, name):
    pushed[name] = b"evil"
    refused(tmp_path, f"has '{name}' among its blobs")


def test_a_blob_that_nothing_needs_is_refused(pushed, tmp_path):
    pushed[f"blobs/{'0' * 64}.safetensors"] = b"evil"
    refused(tmp_path, "has a file that its manifest does not list, blobs/0000")


def test_other_files_are_never_fetched(hub, pushed, tmp_path):
    pushed["model.pkl"] = pushed["sub/pytorch_model.bin"] = b"\x80\x04N."
    found = pull(tmp_path)
    assert not [path for _, path in hub.log if path.endswith((".pkl", ".bin"))]
    assert not list(found.path.rglob("*.pkl"))


def test_a_whole_looking_bank_with_a_hostile_domain_is_refused(pushed, tmp_path):
    rewritten(pushed, lambda m: m.domains["flowers"].card.update(classes=["rose", "daisy"]))
    message = refused(tmp_path, "me/garden is not whole: domain 'flowers'")
    assert "describe it differently" in message and message.endswith("Nothing was kept.")
    rewritten(pushed, lambda m: m.backbone.update(fingerprint="0" * 64))
    assert "(and 2 more)" in refused(tmp_path, "is not whole: backbone")


def test_another_backbone_is_refused(pushed, tmp_path):
    other = Tiny()
    with torch.no_grad():
        other.fc.bias += 1
    with pytest.raises(BankError, match="the backbone that was given belongs to"):
        pull(tmp_path, backbone=other)
    assert not (tmp_path / "pulled").exists()


# What goes wrong on the way


def test_without_a_network_it_says_so_in_one_line(bank, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    refused(tmp_path, "^cannot pull me/garden: the Hub cannot be reached. Check", BankError)
    with pytest.raises(BankError, match=r"^cannot push to me/garden: the Hub cannot be reached"):
        bank.push(REPO)
    assert {x.name for x in tmp_path.iterdir()} == {"garden"}


def test_access_is_asked_for(hub, bank, tmp_path):
    bank.push(REPO)
    hub.token = "secret"
    for act in (
        lambda: bank.push(REPO, token="wrong"),
        lambda: Bank.pull(REPO, tmp_path / "pulled", token="wrong"),
    ):
        with pytest.raises(BankError, match=r"Log in with an account|is private. Check the name"):
            act()
    assert pull(tmp_path)


def test_what_is_not_there_or_has_no_name(hub, tmp_path):
    with pytest.raises(BankError, match="there is no such repository, or it is private"):
        Bank.pull("me/nothing", tmp_path / "pulled")
    with pytest.raises(BankError, match="A repository is called owner/name"):
        Bank.pull("me/no/thing", tmp_path / "pulled")


def test_a_hub_out_of_order(hub, bank, pushed, tmp_path):
    hub.broken = 418
    with pytest.raises(BankError, match=r"the Hub answers 418 \(.*\). Try later"):
        bank.push(REPO)
    refused(tmp_path, "the Hub answers 418", BankError)


def test_a_repository_that_moved_meanwhile(hub, bank, pushed, monkeypatch):
    asked = huggingface_hub.HfApi.repo_info

    def asked_too_early(self, *args, **options):
        info = asked(self, *args, **options)
        hub.files(REPO)["README.md"] = b"somebody else's"
        return info

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", asked_too_early)
    with pytest.raises(BankError, match="the Hub answers 412"):
        bank.push(REPO)
    assert hub.files(REPO)["README.md"] == b"somebody else's"


@pytest.mark.parametrize("occupied", ["file", "folder", "link", "nul"])
def test_a_place_that_is_taken_is_refused_before_the_network(hub, tmp_path, occupied):
    target = tmp_path / ("pu\0lled" if occupied == "nul" else "pulled")
    if occupied == "file":
        target.write_text("mine")
    if occupied == "folder":
        target.mkdir()
        (target / "mine").write_text("mine")
    if occupied == "link":
        target.symlink_to(tmp_path)
    says = r"has a NUL in it|cannot pull to .*: something is there. Use a new path"
    with pytest.raises(BankError, match=says):
        Bank.pull(REPO, target)
    assert not hub.log


def test_a_folder_that_cannot_be_made_is_named(hub, pushed, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(BankError, match=r"cannot pull me/garden: .*File exists at .*/file"):
        Bank.pull(REPO, tmp_path / "file" / "pulled")


def test_a_damaged_bank_is_not_pushed(hub, bank):
    blob = bank.path / "blobs" / f"{bank.domains['signs'].digest}.safetensors"
    blob.write_bytes(blob.read_bytes()[:-1])
    with pytest.raises(DamagedError, match=blob.name):
        bank.push(REPO)
    blob.unlink()
    with pytest.raises(DamagedError, match="is not there"):
        bank.push(REPO)
    assert not hub.log


def test_a_push_takes_the_generation_of_a_faster_writer(hub, bank, monkeypatch):
    read, waiting = Store.read_blob, [True]

    def read_late(self, digest, size):
        if waiting and digest == bank.domains["signs"].digest:
            waiting.clear()
            bank.remove("signs")
            bank.rename("flowers", "blossoms")
        return read(self, digest, size)

    monkeypatch.setattr(Store, "read_blob", read_late)
    bank.push(REPO)
    files = hub.files(REPO)
    assert {n for n in files if n.startswith("blobs/")} == set(blobs_of(bank))
    assert "| blossoms |" in files["README.md"].decode()


def test_a_bank_that_never_rests_is_not_pushed(hub, bank, monkeypatch):
    def gone(self, digest, size):
        bank.rename(*(("a", "b") if "a" in bank.domains else ("b", "a")))
        raise MissingBlobError("gone")

    bank.rename("flowers", "a")
    monkeypatch.setattr(Store, "read_blob", gone)
    with pytest.raises(BankError, match=r"changes all the time. Push it when"):
        bank.push(REPO)


def told(error):
    with pytest.raises(BankError) as caught, hub_module._explained("push to x/y"):
        raise error
    return str(caught.value)


def test_every_reason_is_one_line():
    library = huggingface_hub.errors.HTTPError.__module__.partition(".")[0]
    httpx = pytest.importorskip(library)  # httpx or its successor, or requests before
    if not hasattr(httpx, "ConnectTimeout") or library == "requests":
        pytest.skip("the client of another generation")
    response = httpx.Response(403, request=httpx.Request("GET", "http://x"))
    gated = huggingface_hub.errors.GatedRepoError("gated", response=response)
    assert "the repository is gated. Ask for access" in told(gated)
    forbidden = huggingface_hub.errors.HfHubHTTPError("No.\nmore", response=response)
    assert told(forbidden).endswith(
        "403 (No). Log in with an account that may do this (hf auth login)."
    )
    offline = huggingface_hub.errors.OfflineModeIsEnabled("offline")
    for error in (httpx.ConnectTimeout("x"), offline, ConnectionResetError(104, "reset")):
        assert "the Hub cannot be reached" in told(error)
    assert "no space left on the device" in told(OSError(28, "No space left on device"))
    assert told(RuntimeError("odd.\nmore")) == "cannot push to x/y: RuntimeError: odd."
    assert told(RuntimeError()) == "cannot push to x/y: RuntimeError: RuntimeError."
