"""Torch files: zip archives and pickles that are damaged, that name code, or that expand without end."""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import torch

from tests import hostile
from tests.corpus.case import Case, Either, Fails, Gives, Outcome, fails, generator, gives
from tests.corpus.originals import SAMPLE, Originals, readers
from tests.hostile import Pickle, one_tensor, rezip

FILE = "model.bin"
READERS = readers(FILE)
CLEAN = gives("out.png", lambda originals: originals.result(*SAMPLE, "--model", originals.model))


def described(outcome: Outcome, originals: Originals) -> None:
    assert outcome.out.startswith(FILE) and not outcome.new and not outcome.changed


def refused(command: str) -> Fails | Either:
    """What holds no model is an error; `tim inspect` may also say what it is."""
    return Either(fails(FILE), Gives(described)) if command == "inspect" else fails(FILE)


def saved(originals: Originals, path: Path, new: bool = True) -> Path:
    torch.save({"model": originals.tensors}, path, _use_new_zipfile_serialization=new)
    return path


def written(make: Callable[[Path], object], command: str):
    """A builder: a file that is made without the model."""

    def build(folder: Path, originals: Originals) -> list[object]:
        made = make(Path(FILE))
        if isinstance(made, bytes):
            Path(FILE).write_bytes(made)
        return list(READERS[command])

    return build


def with_records(change: Callable[[str, bytes], bytes | None], command: str, compress: int = zipfile.ZIP_STORED):
    """A builder: the model as a torch file with other records. change(name below the top, data) -> data, or None for no record."""

    def build(folder: Path, originals: Originals) -> list[object]:
        saved(originals, Path("whole"))
        rezip(Path("whole"), Path(FILE), lambda name, data: change(name.partition("/")[2], data), compress)
        Path("whole").unlink()
        return list(READERS[command])

    return build


def with_bytes(change: Callable[[bytes], bytes], command: str, new: bool = True):
    def build(folder: Path, originals: Originals) -> list[object]:
        path = saved(originals, Path(FILE), new)
        path.write_bytes(change(path.read_bytes()))
        return list(READERS[command])

    return build


CUTS: dict[str, Callable[[bytes], bytes | None]] = {
    "half": lambda data: data[: len(data) // 2],
    "a byte less": lambda data: data[:-1],
    "nothing": lambda data: b"",
    "more": lambda data: data + bytes(4),
    "twice as much": lambda data: data * 2,
    "no record": lambda data: None,
}


@generator
def storages_of_another_length(random: Random) -> Iterator[Case]:
    for title, cut in CUTS.items():
        command, number = random.choice(list(READERS)), random.randrange(100)

        def change(name: str, data: bytes, cut=cut, number=number) -> bytes | None:
            return cut(data) if name == f"data/{number}" else data

        yield Case(f"{title} in a storage, {command}", with_records(change, command), fails(FILE))


RECORDS: dict[str, Callable[[str, bytes], bytes | None]] = {
    "no pickle": lambda name, data: None if name == "data.pkl" else data,
    "an empty pickle": lambda name, data: b"" if name == "data.pkl" else data,
    "half a pickle": lambda name, data: data[: len(data) // 2] if name == "data.pkl" else data,
    "a pickle of text": lambda name, data: pickle.dumps("weights", 2) if name == "data.pkl" else data,
    "a pickle of a list": lambda name, data: pickle.dumps([1, 2], 2) if name == "data.pkl" else data,
    "a pickle of a number": lambda name, data: pickle.dumps(7, 2) if name == "data.pkl" else data,
    "a pickle without end": lambda name, data: data[:-1] if name == "data.pkl" else data,
    "two pickles": lambda name, data: data + data if name == "data.pkl" else data,
    "the other byte order": lambda name, data: b"big" if name == "byteorder" else data,
    "no byte order that is known": lambda name, data: b"middle" if name == "byteorder" else data,
    "a version of text": lambda name, data: b"new" if name == "version" else data,
    "a version of the future": lambda name, data: b"99999\n" if name == "version" else data,
    "no version": lambda name, data: None if name == "version" else data,
}


@generator
def other_records(random: Random) -> Iterator[Case]:
    """An error, or the clean image where nothing that matters was changed; never the bytes in another order."""
    for title, change in RECORDS.items():
        yield Case(f"{title} in a torch file", with_records(change, "sample"), Either(fails(FILE), CLEAN))
    command = random.choice(list(READERS))
    yield Case(f"a compressed torch file, {command}", with_records(lambda name, data: data, command, zipfile.ZIP_DEFLATED), fails(FILE))


@generator
def archives_with_damage(random: Random) -> Iterator[Case]:
    """Flipped bits of the pickle, of the directory and of the storages, and cut files."""
    for number in range(8):
        place, bit = random.random(), random.randrange(8)

        def flip(name: str, data: bytes, place=place, bit=bit) -> bytes:
            at = int(place * len(data))
            return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :] if name == "data.pkl" else data

        yield Case(f"bit {bit} at {place:.3f} of a pickle ({number})", with_records(flip, "sample"), Either(fails(FILE), CLEAN))
    for number in range(6):
        place, bit, new = random.random(), random.randrange(8), number < 4

        def flip_end(data: bytes, place=place, bit=bit, new=new) -> bytes:
            start = data.rindex(b"PK\1\2") - 1000 if new else 0
            at = start + int(place * ((len(data) - start) if new else 5000))
            return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]

        where = "directory" if new else "old torch file's pickles"
        yield Case(f"bit {bit} at {place:.3f} of a {where} ({number})", with_bytes(flip_end, "sample", new), Either(fails(FILE), CLEAN))
    for command in READERS:
        number, place, bit = random.randrange(100), random.random(), random.randrange(8)

        def build_flipped(folder: Path, originals: Originals, number=number, place=place, bit=bit, command=command) -> list[object]:
            hostile.flip_storage(saved(originals, Path(FILE)), number, place, bit)
            return list(READERS[command])

        yield Case(f"bit {bit} at {place:.3f} of storage {number}, {command}", build_flipped, refused(command))
    for new in (True, False):
        for share in (random.uniform(0, 0.1), random.uniform(0.1, 0.9), random.uniform(0.99, 1)):
            command = random.choice(list(READERS))
            build = with_bytes(lambda data, share=share: data[: max(9, int(share * (len(data) - 1)))], command, new)
            yield Case(f"{share:.3f} of {'a' if new else 'an old'} torch file, {command}", build, fails(FILE))


def reduced(module: str, name: str, arguments: tuple) -> Pickle:
    """{"w": module.name(*arguments)}"""
    return Pickle().add(b"}", "w").name(module, name).add(arguments, b"Rs")


ATTACKS = [
    ("os", "system", ("touch ran",)), ("posix", "system", ("touch ran",)), ("subprocess", "check_output", ("touch ran",)),
    ("builtins", "exec", ("open('ran', 'w')",)), ("builtins", "eval", ("open('ran', 'w')",)), ("builtins", "open", ("ran", "w")),
    ("builtins", "__import__", ("antigravity",)), ("builtins", "getattr", ("x", "y")), ("os", "mkdir", ("ran",)),
    ("shutil", "rmtree", (".",)), ("webbrowser", "open", ("http://localhost",)), ("torch", "load", ("ran",)),
    ("torch.hub", "load", ("a/b", "c")), ("torch", "save", ("x", "ran")), ("torch.serialization", "load", ("ran",)),
    ("runpy", "run_path", ("ran",)), ("importlib", "import_module", ("antigravity",)), ("operator", "attrgetter", ("x",)),
    ("functools", "partial", ("x",)), ("numpy", "load", ("ran",)), ("numpy", "memmap", ("ran",)), ("pickle", "loads", ("x",)),
    ("torch.jit", "load", ("ran",)), ("torch._utils", "_rebuild_wrapper_subclass", ("x",)), ("timeit", "timeit", ("open('ran', 'w')",)),
    ("torch.storage", "_load_from_bytes", ("x",)), ("tim_core.files", "atomic_write", ("ran", "x")), ("pathlib", "Path", ("ran",)),
]  # fmt: skip


@generator
def pickles_that_call_code(random: Random) -> Iterator[Case]:
    for module, name, arguments in random.sample(ATTACKS, 14):
        command = random.choice(list(READERS))
        attack, old = reduced(module, name, arguments), random.random() < 0.3

        def make(path: Path, attack=attack, old=old) -> object:
            return attack.data + b"." if old else attack.zip(path, {"0": bytes(4)})

        yield Case(f"{module}.{name} in a pickle, {command}", written(make, command), fails(FILE))
    opcodes: dict[str, bytes] = {
        "INST": b"(S'touch ran'\nios\nsystem\n.",
        "OBJ": b"(cos\nsystem\nS'touch ran'\no.",
        "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x09touch ran\x85R.",
        "EXT1": b"\x80\x02\x82\x01.",
        "NEWOBJ_EX": b"\x80\x04cos\nsystem\n(S'touch ran'\nt}\x92.",
        "PERSID": b"Pstorage\n.",
        "FRAME": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N.",
        "BYTEARRAY8": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".",
        "BINBYTES8": b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b".",
        "LONG4": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b".",
        "LONG of digits": b"L" + b"9" * 10**5 + b"L\n.",
        "LONG_BINPUT": b"\x80\x02}r" + struct.pack("<I", 2**32 - 1) + b".",
        "no opcode": b"\x80\x02" + bytes([random.choice([0, 1, 255])]) + b".",
        "an empty stack": b"\x80\x02.",
        "a build of None": b"\x80\x02}(X\x01\0\0\0aNb.",
        "a mark alone": b"\x80\x02(((((.",
    }
    for title, data in opcodes.items():
        command, inside = random.choice(list(READERS)), random.random() < 0.5

        def make_opcode(path: Path, data=data, inside=inside) -> object:
            if not inside:
                return data if data[:1] == b"\x80" else b"\x80\x02" + data
            pickle_ = Pickle()
            pickle_.data = data[:-1]
            return pickle_.zip(path, {})

        yield Case(f"{title} in a pickle, {command}", written(make_opcode, command), fails(FILE))


@generator
def pickles_that_expand(random: Random) -> Iterator[Case]:
    bombs: dict[str, Callable[[Path], object]] = {
        "deep dicts": lambda path, depth=random.randrange(1000, 30_000): hostile.deep_dicts(depth).zip(path, {}),
        "a dict lattice": lambda path: hostile.dict_lattice().zip(path, {}),
        "a dict of itself": lambda path: hostile.dict_of_itself().zip(path, {}),
        "a tuple lattice": lambda path: hostile.tuple_lattice_key().zip(path, {}),
        "growing bytes": lambda path: hostile.growing_bytes().zip(path, {}),
        "a huge bytearray": lambda path, size=2 ** random.randrange(33, 60): hostile.huge_bytearray(size).zip(path, {}),
        "a meta tensor": lambda path: hostile.huge_meta_tensor().zip(path, {}),
        "a large memo": lambda path: hostile.large_memo_index().zip(path, {}),
        "zeros in a compressed pickle": lambda path: Pickle().add(b"}", "a", "x" * 2**24, b"s").zip(path, {}, zipfile.ZIP_DEFLATED),
        "zeros in a compressed storage": lambda path: Pickle().add(b"}", "w").tensor("0", 2**24, (2**24,), (1,)).add(b"s").zip(
            path, {"0": bytes(2**26)}, zipfile.ZIP_DEFLATED),
        "deep lists": lambda path: Pickle().add(b"}", "a", b"]" * 20_000 + b"a" * 19_999, b"s").zip(path, {}),
        "many names of one tensor": lambda path: torch.save(dict.fromkeys(map(str, range(200)), torch.zeros(2**19)), path),
    }  # fmt: skip
    for title, make in bombs.items():
        command = random.choice(list(READERS))
        yield Case(f"{title}, {command}", written(make, command), refused(command))


@generator
def tensors_that_lie(random: Random) -> Iterator[Case]:
    """Strides, offsets and sizes that leave the storage or repeat it."""
    side = random.randrange(10**4, 10**5)
    lies = {  # elements in the file, shape, strides, offset
        "expanded": (1, (side, side), (0, 0), 0), "one dimension expanded": (8, (10**9, 8), (0, 1), 0),
        "overlapping": (8, (7, 8), (0, 1), 0), "too large": (4, (5,), (1,), 0), "behind the end": (4, (2,), (1,), 3),
        "far away": (4, (2,), (2 ** random.randrange(40, 62),), 0), "a huge offset": (4, (2,), (1,), 2 ** random.randrange(40, 62)),
        "a shape of 2**62": (4, (2**62,), (1,), 0), "100 dimensions": (4, (1,) * 100, (1,) * 100, 0),
        "fewer strides": (4, (2, 2), (1,), 0),
    }  # fmt: skip
    for title, lie in lies.items():
        command = random.choice(list(READERS))
        yield Case(f"{title} in a tensor, {command}", written(lambda path, lie=lie: one_tensor(path, *lie), command), refused(command))
    others: dict[str, Callable[[], Pickle]] = {
        "an unknown storage": lambda: Pickle().add(b"}", "w", b"(", "storage").name("torch", "OddStorage").add("0", "cpu", 4, b"tQs"),
        "a storage on another device": lambda: Pickle().add(b"}", "w").name("torch._utils", "_rebuild_tensor_v2").add(b"(").add(
            b"(", "storage").name("torch", "FloatStorage").add("0", "cuda:7", 4, b"tQ").add(0, (4,), (1,), b"\x89NtRs"),
        "a storage of a path": lambda: Pickle().add(b"}", "w").tensor("../../etc/passwd", 4, (4,), (1,)).add(b"s"),
        "two sizes of one storage": lambda: Pickle().add(b"}", "w").tensor("0", 4, (4,), (1,)).add(b"s", "v").tensor(
            "0", 8, (8,), (1,)).add(b"s"),
        "a quantised tensor": lambda: Pickle().add(b"}", "w").name("torch._utils", "_rebuild_qtensor").add(b"(").storage("0", 4).add(
            0, (4,), (1,), b"tRs"),
        "a sparse tensor": lambda: Pickle().add(b"}", "w").name("torch._utils", "_rebuild_sparse_tensor").add(b"(", 1, b"tRs"),
        "a parameter of a number": lambda: Pickle().add(b"}", "w").name("torch._utils", "_rebuild_parameter").add((1, 2, 3), b"Rs"),
    }  # fmt: skip
    for title, make in others.items():
        command = random.choice(list(READERS))
        yield Case(f"{title}, {command}", written(lambda path, make=make: make().zip(path, {"0": bytes(16)}), command), refused(command))


def tar(path: Path) -> None:
    """Torch's format of 2016: a tar of pickles."""
    with tarfile.open(path, "w:") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            data = pickle.dumps({"a": 1}, 2)
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


@generator
def containers_of_something_else(random: Random) -> Iterator[Case]:
    def archive(names: dict[str, bytes]) -> Callable[[Path], object]:
        def make(path: Path) -> None:
            with zipfile.ZipFile(path, "w") as file:
                for name, data in names.items():
                    file.writestr(name, data)

        return make

    pickled = pickletools.optimize(pickle.dumps({"a": [1, 2]}, 2))
    others: dict[str, Callable[[Path], object]] = {
        "an empty archive": archive({}),
        "an archive of text": archive({"readme.txt": b"weights"}),
        "a TorchScript archive": archive({"m/data.pkl": pickled, "m/constants.pkl": pickled, "m/code/a.py": b"1", "m/version": b"3"}),
        "two data.pkl": archive({"a/data.pkl": pickled, "b/data.pkl": pickled}),
        "a state dict without tensors": archive({"a/data.pkl": pickled, "a/version": b"3\n", "a/byteorder": b"little"}),
        "an archive that climbs": archive({"../../data.pkl": pickled, "../../version": b"3\n"}),
        "an .npz": archive({"w.npy": b"\x93NUMPY\1\0" + bytes(100)}),
        "a tar": tar,
        "a pickle of numbers": lambda path: pickle.dumps({"w": 1}),
        "a module": lambda path: torch.save(torch.nn.Linear(2, 2), path),
        "a list of tensors": lambda path: torch.save([torch.zeros(2)], path),
        "a tensor": lambda path: torch.save(torch.zeros(2), path),
        "an optimiser's state": lambda path: torch.save(torch.optim.Adam([torch.nn.Parameter(torch.zeros(2))]).state_dict(), path),
    }
    for title, make in others.items():
        command = random.choice(list(READERS))
        yield Case(f"{title} as a torch file, {command}", written(make, command), refused(command))
