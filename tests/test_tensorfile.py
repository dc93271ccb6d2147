"""One file that checks itself: what goes in comes out, and nothing else is accepted."""

import json
import pickle

import pytest
import safetensors.torch
import torch

from onetrunk.errors import BackboneError, DamagedError
from onetrunk.tensorfile import fingerprint_of, is_ours, pack, unpack

DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.uint8, torch.bool,
)  # fmt: skip


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = {
        f"t{i}.{dtype}": torch.randint(0, 2, (3, 2), generator=generator).to(dtype)
        for i, dtype in enumerate(DTYPES)
    }
    return {**made, "scalar": torch.tensor(7), "empty": torch.zeros(0, 3)}


CARD = {
    "kind": "test",
    "nested": {"list": [1, 2.5, None, True], "text": "Straße \u2028 \U0001f33c"},
}


@pytest.mark.parametrize("trusted", [False, True])
def test_reads_back_bit_for_bit(trusted):
    found, card = unpack(pack(tensors(), CARD), "a file", trusted=trusted)
    assert card == CARD
    assert found.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)


def test_equal_content_gives_equal_bytes_in_any_order_and_layout():
    plain = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2)}
    twisted = {"b": torch.ones(4)[::2], "a": torch.arange(6.0).view(2, 3).t().contiguous().t()}
    assert pack(plain, {"x": 1, "y": 2}) == pack(twisted, {"y": 2, "x": 1})
    assert fingerprint_of(plain) == fingerprint_of(twisted)


def test_shared_memory_is_written_twice():
    tied = torch.arange(4.0)
    found, _ = unpack(pack({"a": tied, "b": tied, "c": tied[1:]}, {}), "a file")
    assert torch.equal(found["b"], tied) and torch.equal(found["c"], tied[1:])


def test_fingerprint_sees_names_shapes_types_and_bits():
    base = {"a": torch.zeros(4)}
    others = [
        {"b": torch.zeros(4)}, {"a": torch.zeros(2, 2)}, {"a": torch.zeros(4, dtype=torch.int32)},
        {"a": -torch.zeros(4)}, {"a": torch.zeros(4), "b": torch.zeros(0)}, {},
    ]  # fmt: skip
    assert len({fingerprint_of(x) for x in (base, *others)}) == len(others) + 1
    assert len(fingerprint_of(base)) == 64


def test_what_has_no_bytes_is_refused():
    with pytest.raises(BackboneError, match=r"norm._extra_state is of type dict, and only tensors"):
        fingerprint_of({"norm._extra_state": {}})
    with pytest.raises(BackboneError, match=r"w is on the meta device and holds no numbers"):
        fingerprint_of({"w": torch.zeros(1, device="meta")})


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_card_without_json_form_is_refused(number):
    with pytest.raises(ValueError, match="JSON"):
        pack({}, {"accuracy": number})


def test_every_flipped_bit_is_seen():
    data = pack(
        {"a": torch.arange(3.0), "b": torch.arange(4, dtype=torch.uint8)}, {"x": [1.5, "y"]}
    )
    for place in range(len(data) * 8):
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        with pytest.raises(DamagedError, match="the file"):
            unpack(bytes(flipped), "the file")


def test_every_truncation_and_extension_is_seen():
    data = pack({"a": torch.arange(3.0)}, {"x": 1})
    for end in range(len(data)):
        with pytest.raises(DamagedError, match="the file"):
            unpack(data[:end], "the file")
    for more in (b"\0", b" ", data, b"\x80\x04N."):
        with pytest.raises(DamagedError, match="the file"):
            unpack(data + more, "the file")


def changed_header(data, change):
    size = int.from_bytes(data[:8], "little")
    header = change(data[8 : 8 + size])
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def hostile_files():
    data = pack({"a": torch.arange(3.0)}, {"x": 1})
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])

    def meta(text):
        return changed_header(
            data, lambda _: json.dumps({**header, "__metadata__": {"onetrunk": text}}).encode()
        )

    yield "nothing", b""
    yield "short", b"\0" * 7
    yield "zeros", b"\0" * 64
    yield "huge header", b"\xff" * 8 + data[8:]
    yield "foreign", safetensors.torch.save({"a": torch.zeros(2)})
    yield "foreign metadata", safetensors.torch.save({"a": torch.zeros(2)}, {"format": "pt"})
    yield "pickle", pickle.dumps({"a": 1})
    yield "zip", b"PK\x03\x04" + b"\0" * 100
    yield "header is a list", changed_header(data, lambda _: b"[]")
    yield "header is deep", changed_header(data, lambda _: b"[" * 100_000)
    yield "header is no text", changed_header(data, lambda _: b"\xff\xfe")
    yield (
        "duplicate key",
        changed_header(
            data,
            lambda h: h.replace(
                b"{", b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,12]},', 1
            ),
        ),
    )
    yield (
        "duplicate metadata",
        changed_header(data, lambda h: h.replace(b"{", b'{"__metadata__":{"onetrunk":"{}"},', 1)),
    )
    yield "spaces", changed_header(data, lambda h: h.replace(b":", b": ", 1))
    yield "negative shape", changed_header(data, lambda h: h.replace(b"[3]", b"[-3]"))
    yield (
        "overflowing shape",
        changed_header(data, lambda h: h.replace(b"[3]", b"[4294967296,4294967296]")),
    )
    yield "overlap", changed_header(data, lambda h: h.replace(b"[0,12]", b"[0,24]"))
    yield "unknown type", changed_header(data, lambda h: h.replace(b"F32", b"Q32"))
    yield "other type", changed_header(data, lambda h: h.replace(b"F32", b"I32"))
    for text in (
        "",
        "null",
        "[]",
        "5",
        '"card"',
        "{}",
        '{"card": 5}',
        '{"card": [1]}',
        "[" * 100_000,
    ):
        yield f"metadata {text[:12]}", meta(text)
    yield "wrong seal", meta(json.dumps({"card": {"x": 1}, "sha256": "0" * 64}))
    yield "no seal", meta(json.dumps({"card": {"x": 1}}))
    yield "not a number", meta('{"card": {"x": NaN}, "sha256": ""}')
    yield "infinite", meta('{"card": {"x": 1e999}, "sha256": ""}')
    yield "long number", meta('{"card": {"x": ' + "9" * 5000 + '}, "sha256": ""}')


@pytest.mark.parametrize(("data",), [pytest.param(d, id=n) for n, d in hostile_files()])
def test_hostile_files_are_refused_by_name(data):
    with pytest.raises(DamagedError) as caught:
        unpack(data, "garden/flowers.safetensors")
    message = str(caught.value)
    assert message.startswith("garden/flowers.safetensors: ")
    assert "no onetrunk file, or a damaged one (" in message or "does not match its own" in message
    assert message.endswith("Get it again from where it came from.")


def test_a_header_of_many_brackets_is_none_of_ours() -> None:
    header = b"[" * 100_000
    assert not is_ours(len(header).to_bytes(8, "little") + header)
