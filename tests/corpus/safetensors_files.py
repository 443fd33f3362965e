"""Safetensors files whose header lies or is none, and files that are no weights at all."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from tests.corpus.case import Case, Either, fails, generator, gives
from tests.corpus.originals import SAMPLE, Originals, readers
from tests.hostile import DEEP, deep_json

FILE = "model.safetensors"
READERS = {**readers(FILE), "previews": ("previews", FILE)}


def with_bytes(change: Callable[[bytes], bytes], command: tuple[str, ...]):
    """A builder: the bytes of the model, changed."""

    def build(folder: Path, originals: Originals) -> list[object]:
        Path(FILE).write_bytes(change(originals.model.read_bytes()))
        return list(command)

    return build


def with_header(change: Callable[[dict[str, Any], str, str], object], places: tuple[float, float]) -> Callable[[bytes], bytes]:
    """Changes the header: change(header, name of a tensor, name of another one) -> text in place of the header, or None."""

    def apply(data: bytes) -> bytes:
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        names = sorted(name for name in header if name != "__metadata__")
        one, other = (names[int(place * len(names))] for place in places)
        text = change(header, one, names[names.index(one) - 1] if other == one else other)
        new = (text if isinstance(text, str) else json.dumps(header)).encode("utf-8", "surrogatepass")
        return len(new).to_bytes(8, "little") + new + data[8 + size :]

    return apply


HEADERS: dict[str, Callable[[dict[str, Any], str, str], object]] = {
    "offsets beyond the end": lambda h, one, other: h[one].update(data_offsets=[0, 10**9]),
    "offsets of 2**63": lambda h, one, other: h[one].update(data_offsets=[2**63, 2**64 - 1]),
    "negative offsets": lambda h, one, other: h[one].update(data_offsets=[-4, 4]),
    "offsets that fall": lambda h, one, other: h[one].update(data_offsets=h[one]["data_offsets"][::-1]),
    "three offsets": lambda h, one, other: h[one]["data_offsets"].append(0),
    "offsets of text": lambda h, one, other: h[one].update(data_offsets=["0", "4"]),
    "no offsets": lambda h, one, other: h[one].pop("data_offsets"),
    "two tensors of the same bytes": lambda h, one, other: h[one].update(h[other]),
    "a hole": lambda h, one, other: h.pop(one) and None,
    "an unknown dtype": lambda h, one, other: h[one].update(dtype="F7"),
    "a wider dtype": lambda h, one, other: h[one].update(dtype="F64"),
    "a dtype that is a number": lambda h, one, other: h[one].update(dtype=32),
    "a shape of more elements": lambda h, one, other: h[one]["shape"].append(3),
    "a shape of 2**32 squared": lambda h, one, other: h[one].update(shape=[2**32, 2**32]),
    "a negative shape": lambda h, one, other: h[one].update(shape=[-1, -16]),
    "a shape of fractions": lambda h, one, other: h[one].update(shape=[1.5]),
    "no shape": lambda h, one, other: h[one].pop("shape") and None,
    "a tensor that is a list": lambda h, one, other: h.update({one: [1, 2]}),
    "a tensor that is null": lambda h, one, other: h.update({one: None}),
    "metadata of numbers": lambda h, one, other: h.update(__metadata__={"tim": 3}),
    "metadata that is a list": lambda h, one, other: h.update(__metadata__=["tim"]),
    "a list": lambda h, one, other: "[1, 2]",
    "text": lambda h, one, other: '{"a',
    "nothing": lambda h, one, other: "",
    "NaN": lambda h, one, other: '{"a": NaN}',
    "deep": lambda h, one, other: deep_json(DEEP),
    "no UTF-8": lambda h, one, other: '{"\udcff": 1}',
    "a name twice": lambda h, one, other: json.dumps(h).replace(json.dumps(other), json.dumps(one)),
    "nothing but metadata": lambda h, one, other: json.dumps({"__metadata__": h["__metadata__"]}),
}


@generator
def headers_that_lie(random: Random) -> Iterator[Case]:
    for title, change in HEADERS.items():
        command = random.choice(list(READERS))
        lie = with_header(change, (random.random(), random.random()))
        yield Case(f"a header with {title}, {command}", with_bytes(lie, READERS[command]), fails(FILE))


@generator
def lengths_that_lie(random: Random) -> Iterator[Case]:
    lengths: dict[str, Callable[[int], int]] = {
        "0": lambda size: 0, "1 less": lambda size: size - 1, "1 more": lambda size: size + 1, "half": lambda size: size // 2,
        "twice": lambda size: 2 * size, "2**24": lambda size: 2**24, "2**40": lambda size: 2**40, "2**63": lambda size: 2**63,
        "2**64 - 1": lambda size: 2**64 - 1,
    }  # fmt: skip
    for title, length in lengths.items():
        command = random.choice(list(READERS))

        def change(data: bytes, length=length) -> bytes:
            return struct.pack("<Q", length(int.from_bytes(data[:8], "little"))) + data[8:]

        yield Case(f"a header's length of {title}, {command}", with_bytes(change, READERS[command]), fails(FILE))


@generator
def files_of_another_length(random: Random) -> Iterator[Case]:
    for part in ("in the header", "behind the header", "in the tensors", "before the last byte"):
        command, place = random.choice(list(READERS)), random.random()

        def change(data: bytes, part=part, place=place) -> bytes:
            header = 8 + int.from_bytes(data[:8], "little")
            ends = {
                "in the header": int(8 + place * (header - 8)),
                "behind the header": header,
                "in the tensors": int(header + place * (len(data) - header - 1)),
                "before the last byte": len(data) - 1,
            }
            return data[: ends[part]]

        yield Case(f"cut {part}, {command}", with_bytes(change, READERS[command]), fails(FILE))
    count = random.randrange(1, 10**5)
    yield Case("bytes behind the tensors", with_bytes(lambda data: data + b"\0" * count, READERS["sample"]), fails(FILE))


OTHER_FILES: dict[str, Callable[[Random], bytes]] = {
    "nothing": lambda random: b"",
    "a few bytes": lambda random: random.randbytes(random.randrange(1, 9)),
    "noise": lambda random: random.randbytes(10**4),
    "zeros": lambda random: bytes(random.randrange(9, 10**5)),
    "a web page": lambda random: b"<!DOCTYPE html><html><body>404</body></html>",
    "an LFS pointer": lambda random: b"version https://git-lfs.github.com/spec/v1\noid sha256:%064d\nsize 3\n" % random.randrange(10**9),
    "JSON": lambda random: json.dumps({"weight_map": {"a": random.random()}}).encode(),
    "GGUF": lambda random: b"GGUF" + random.randbytes(1000),
    "ONNX": lambda random: b"\x08\x07\x12\x07pytorch" + random.randbytes(1000),
    "HDF5": lambda random: b"\x89HDF\r\n\x1a\n" + random.randbytes(1000),
    "a PNG": lambda random: b"\x89PNG\r\n\x1a\n" + random.randbytes(1000),
    "an ELF program": lambda random: b"\x7fELF\2\1\1" + random.randbytes(1000),
    "text": lambda random: b"weights\n" * random.randrange(1, 1000),
    "a shell script": lambda random: b"#!/bin/sh\ntouch ran\n",
    "NumPy": lambda random: b"\x93NUMPY\1\0" + random.randbytes(1000),
    "a tar": lambda random: b"weights" + bytes(250) + b"ustar" + bytes(10**4),
    "gzip": lambda random: b"\x1f\x8b\x08" + random.randbytes(1000),
    "7z": lambda random: b"7z\xbc\xaf\x27\x1c" + random.randbytes(1000),
}


@generator
def files_that_are_no_weights(random: Random) -> Iterator[Case]:
    for title, make in OTHER_FILES.items():
        command, data = random.choice(list(READERS)), make(random)
        yield Case(f"{title} as weights, {command}", with_bytes(lambda _, data=data: data, READERS[command]), fails(FILE))


@generator
def flipped_bits(random: Random) -> Iterator[Case]:
    """One flipped bit of a header: an error, or the clean image where it is in what is not used."""
    clean = gives("out.png", lambda originals: originals.result(*SAMPLE, "--model", originals.model))
    for number in range(12):
        place, bit = random.random(), random.randrange(8)

        def change(data: bytes, place=place, bit=bit) -> bytes:
            at = int(place * (8 + int.from_bytes(data[:8], "little")))
            return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]

        yield Case(f"bit {bit} at {place:.3f} of the header ({number})", with_bytes(change, READERS["sample"]), Either(fails(FILE), clean))
