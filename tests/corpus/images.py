"""Images in every mode that Pillow opens, which equal their 8-bit version, and files that are no images or that harm."""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image, ImageCms

from tests.corpus.case import Case, fails, generator, gives
from tests.corpus.originals import Originals
from tests.hostile import png, png_bomb, png_chunk, postscript
from tim_core.images import MOST_BYTES

UPSCALE = ("upscale", "--factor", "1", "--steps", "1", "--strength", "0.2", "-o", "out.png")  # then the image and the prompt
SIDE = 16


def grey(random: Random) -> np.ndarray:
    return np.random.default_rng(random.randrange(2**32)).integers(0, 256, (SIDE, SIDE)).astype(np.uint8)


def pfm(values: np.ndarray, order: str) -> bytes:
    scale = "-1.0" if order == "<" else "1.0"
    return f"Pf\n{values.shape[1]} {values.shape[0]}\n{scale}\n".encode() + values[::-1].astype(f"{order}f4").tobytes()


def pnm(values: np.ndarray, kind: str, white: int) -> bytes:
    head = f"{kind}\n# a comment\n{values.shape[1]} {values.shape[0]}\n{white}\n".encode()
    return head + (" ".join(map(str, values.flatten())).encode() if kind == "P2" else values.astype(">u2").tobytes())


def saved(image: Image.Image, ending: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format=ending, **options)
    return file.getvalue()


def to_lab(image: Image.Image) -> Image.Image:
    return ImageCms.profileToProfile(image, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB")


def from_lab(image: Image.Image) -> Image.Image:
    return ImageCms.profileToProfile(image, ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), outputMode="RGB")


# name -> (file name, makes it from 8-bit grey values)
Greys = dict[str, tuple[str, Callable[[np.ndarray], bytes]]]
GREYS: Greys = {
    "16-bit PNG": ("a.png", lambda v: saved(Image.fromarray(v.astype(np.uint16) * 257), "PNG")),
    "16-bit TIFF": ("a.tif", lambda v: saved(Image.fromarray(v.astype(np.uint16) * 257), "TIFF")),
    "big-endian TIFF": ("a.tiff", lambda v: saved(Image.fromarray((v.astype(np.uint16) * 257).astype(">u2")), "TIFF")),
    "LZW TIFF of 16 bits": ("a.tif", lambda v: saved(Image.fromarray(v.astype(np.uint16) * 257), "TIFF", compression="tiff_lzw")),
    "32-bit TIFF": ("a.tif", lambda v: saved(Image.fromarray(v.astype(np.int32)), "TIFF")),
    "float TIFF": ("a.tif", lambda v: saved(Image.fromarray((v / 255).astype(np.float32)), "TIFF")),
    "float TIFF of 8-bit values": ("a.tif", lambda v: saved(Image.fromarray(v.astype(np.float32)), "TIFF")),
    "PFM": ("a.pfm", lambda v: pfm(v / 255, "<")),
    "big-endian PFM": ("a.pfm", lambda v: pfm(v / 255, ">")),
    "16-bit PGM": ("a.pgm", lambda v: pnm(v.astype(np.uint16) * 257, "P5", 65535)),
    "plain PGM": ("a.pgm", lambda v: pnm(v, "P2", 255)),
    "L": ("a.bmp", lambda v: saved(Image.fromarray(v), "BMP")),
    "LA, opaque": ("a.png", lambda v: saved(Image.fromarray(v).convert("LA"), "PNG")),
    "a PNG named .jpg": ("a.jpg", lambda v: saved(Image.fromarray(v), "PNG")),
    "a TIFF named .png": ("a.png", lambda v: saved(Image.fromarray(v), "TIFF")),
    "no ending": ("a", lambda v: saved(Image.fromarray(v), "PNG")),
    "two pages": ("a.tif", lambda v: saved(Image.fromarray(v), "TIFF", save_all=True, append_images=[Image.fromarray(255 - v)])),
    "an animated PNG": ("a.png", lambda v: saved(Image.fromarray(v), "PNG", save_all=True, append_images=[Image.fromarray(255 - v)])),
    "an animated GIF": ("a.gif", lambda v: saved(Image.fromarray(v), "GIF", save_all=True, append_images=[Image.fromarray(255 - v)])),
    "metadata": ("a.png", lambda v: png(SIDE, SIDE, 8, 0, v.tobytes(), more=png_chunk(b"tEXt", b"Comment\0" + b"x" * 10**6))),
}
COLOURS: Greys = {  # the same of RGB values
    "RGB": ("a.ppm", lambda v: saved(Image.fromarray(v), "PPM")),
    "RGBA, opaque": ("a.webp", lambda v: saved(Image.fromarray(v).convert("RGBA"), "WEBP", lossless=True, exact=True)),
    "deflated TIFF": ("a.tif", lambda v: saved(Image.fromarray(v), "TIFF", compression="tiff_adobe_deflate")),
    "an orientation": ("a.png", lambda v: saved(Image.fromarray(v).transpose(Image.Transpose.ROTATE_90), "PNG", exif=orientation(6))),
    "another orientation": (
        "a.webp",
        lambda v: saved(Image.fromarray(v).transpose(Image.Transpose.ROTATE_180), "WEBP", lossless=True, exif=orientation(3)),
    ),
    "16-bit RGB": ("a.png", lambda v: png(SIDE, SIDE, 16, 2, (v.astype(">u2") * 257).astype(">u2").tobytes())),
    "an animated WebP": (
        "a.webp",
        lambda v: saved(Image.fromarray(v), "WEBP", lossless=True, save_all=True, append_images=[Image.fromarray(255 - v)]),
    ),
}
CONVERTED = {  # mode -> the RGB that it means
    "1": lambda image: image.convert("1").convert("RGB"),
    "P": lambda image: image.convert("P").convert("RGB"),
    "CMYK": lambda image: image.convert("CMYK").convert("RGB"),
    "LAB": lambda image: from_lab(to_lab(image)),
    "YCbCr": lambda image: image.convert("YCbCr").convert("RGB"),
}


def orientation(number: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


def of_file(name: str, data: bytes):
    """A builder: an upscale of a file with these bytes."""

    def build(folder: Path, originals: Originals) -> list[object]:
        (folder / name).write_bytes(data)
        return [*UPSCALE, "--model", originals.model, name, "a circle"]

    return build


def equals(values: np.ndarray, said: tuple[object, ...] = ()):
    """The result of the 8-bit PNG of these values."""

    def reference(originals: Originals) -> Path:
        clean = originals.folder / f"clean-{hash(values.tobytes())}.png"
        Image.fromarray(values).convert("RGB").save(clean)
        return originals.result(*UPSCALE, "--model", originals.model, clean, "a circle")

    return gives("out.png", reference, said)


@generator
def modes(random: Random) -> Iterator[Case]:
    for name, (file, make) in GREYS.items():
        values = grey(random)
        values[0, :2] = 0, 255
        yield Case(f"an image: {name}", of_file(file, make(values)), equals(values))
    for name, (file, make) in COLOURS.items():
        values = np.stack([grey(random) for _ in range(3)], -1)
        yield Case(f"an image: {name}", of_file(file, make(values)), equals(values))
    for mode, meant in CONVERTED.items():
        image = Image.fromarray(np.stack([grey(random) for _ in range(3)], -1))
        other = to_lab(image) if mode == "LAB" else image.convert(mode)
        yield Case(f"an image: {mode} TIFF", of_file("a.tif", saved(other, "TIFF")), equals(np.asarray(meant(image))))


@generator
def transparency(random: Random) -> Iterator[Case]:
    values, key = grey(random), random.randrange(256)
    values[:4] = key
    white = np.where(values == key, 255, values).astype(np.uint8)
    image = Image.fromarray(values)
    cover = Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))
    with_cover = Image.merge("LA", (image, cover))
    files = {
        "LA": ("a.png", saved(with_cover, "PNG")),
        "RGBA": ("a.tif", saved(with_cover.convert("RGBA"), "TIFF")),
        "grey key": ("a.png", saved(image, "PNG", transparency=key)),
        "16-bit grey key": ("a.png", png(SIDE, SIDE, 16, 0, (values.astype(">u2") * 257).astype(">u2").tobytes(), (key * 257,))),
        "16-bit colour key": (
            "a.png",
            png(SIDE, SIDE, 16, 2, (values.astype(">u2") * 257).astype(">u2").repeat(3).tobytes(), (key * 257,) * 3),
        ),
        "palette key": ("a.gif", saved(image, "GIF", transparency=key)),
    }
    for name, (file, data) in files.items():
        yield Case(f"a transparent image: {name}", of_file(file, data), equals(white))


def not_finite(value: float, place: int) -> bytes:
    values = np.full(SIDE * SIDE, 0.5, np.float32)
    values[place] = value
    return saved(Image.fromarray(values.reshape(SIDE, SIDE)), "TIFF")


@generator
def no_images(random: Random) -> Iterator[Case]:
    whole = saved(Image.fromarray(grey(random)), "PNG")
    files: dict[str, tuple[str, bytes]] = {
        "an empty file": ("a.png", b""),
        "text": ("a.png", b"hello"),
        "zeros": ("a.jpg", bytes(5000)),
        "a head alone": ("a.png", whole[:33]),
        "PDF": ("a.png", saved(Image.new("RGB", (8, 8)), "PDF")),
        "an icon": ("a.png", saved(Image.new("RGB", (16, 16)), "ICO")),
        "JPEG 2000": ("a.jpg", bytes.fromhex("0000000c6a5020200d0a870a") + bytes(60)),
        "XBM": ("a.bmp", b"#define a_width 8\n#define a_height 8\n"),
        "SVG": ("a.png", b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>"),
        "HTML": ("a.webp", b"<!DOCTYPE html><html>"),
        "a bomb": ("a.png", png_bomb(random.randrange(9000, 20_000), 12_000)),
        "a wide bomb": ("a.png", png(2**27, 1, 1, 0, bytes(2**24))),
        "no width": ("a.png", png(0, 8, 8, 0, bytes(8))),
        "a PPM that lies": ("a.ppm", b"P6 60000 60000 255\n" + bytes(100)),
        "PPM of no pixels": ("a.ppm", b"P6 0 0 255\n"),
        "a PGM of negative size": ("a.pgm", b"P5 -4 4 255\n" + bytes(16)),
        "a PFM that is not finite": ("a.pfm", pfm(np.full((8, 8), random.choice([np.nan, np.inf])), "<")),
        "a TIFF that is not finite": ("a.tif", not_finite(random.choice([np.nan, -np.inf]), random.randrange(SIDE * SIDE))),
        "a BMP that lies": ("a.bmp", saved(Image.new("RGB", (8, 8)), "BMP")[:18] + struct.pack("<ii", 2**30, 2**30) + bytes(60)),
        "a model": ("a.png", b"\x08\0\0\0\0\0\0\0{}      "),
        "a zip": ("a.png", b"PK\3\4" + bytes(60)),
        "a metadata bomb": ("a.png", png(8, 8, 8, 0, bytes(64), more=png_chunk(b"IHDR", bytes(13)))),
    }
    for name, (file, data) in files.items():
        yield Case(f"no image: {name}", of_file(file, data), fails(file))

    def program(folder: Path, originals: Originals) -> Sequence[object]:
        return of_file("a.png", postscript(folder / "made"))(folder, originals)

    yield Case("no image: PostScript", program, fails("a.png", "not an image"))


@generator
def damaged_images(random: Random) -> Iterator[Case]:
    values = np.stack([grey(random) for _ in range(3)], -1)
    image = Image.fromarray(values)
    for kind, file in (
        ("PNG", "a.png"),
        ("JPEG", "a.jpg"),
        ("WEBP", "a.webp"),
        ("TIFF", "a.tif"),
        ("GIF", "a.gif"),
        ("BMP", "a.bmp"),
        ("PPM", "a.ppm"),
    ):
        data = saved(image, kind)
        cut = data[: random.randrange(len(data) // 4, len(data) * 3 // 4)]
        yield Case(f"a cut {kind}", of_file(file, cut), fails(file))
    data = bytearray(saved(image, "PNG", compress_level=0))
    start = data.index(b"IDAT") + 4
    data[start + random.randrange(20, SIDE * SIDE)] ^= 1 << random.randrange(8)
    yield Case("a changed bit of a PNG", of_file("a.png", bytes(data)), fails("a.png", "damaged"))


SPECIAL = {
    "a FIFO": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a folder": Path.mkdir,
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nothing": lambda path: path.symlink_to("none"),
    "a missing file": lambda path: None,
    "the memory": lambda path: path.symlink_to("/proc/self/mem"),
}


@generator
def special_images(random: Random) -> Iterator[Case]:
    for name, make in SPECIAL.items():

        def build(folder: Path, originals: Originals, make=make) -> list[object]:
            make(folder / "a.png")
            return [*UPSCALE, "--model", originals.model, "a.png", "a circle"]

        yield Case(f"an image is {name}", build, fails("a.png"))
    for name in ("", "-", "a\0.png", "a" * 300, "~nobody-here/a.png", "https://example.org/a.png"):

        def build(folder: Path, originals: Originals, name=name) -> list[object]:
            return [*UPSCALE, "--model", originals.model, "--", name, "a circle"]

        yield Case(f"an image is named {name[:20]!r}", build, fails())

    def huge(folder: Path, originals: Originals) -> list[object]:
        with open(folder / "a.png", "wb") as file:  # without blocks on the disk
            file.write(originals.image.read_bytes()[:33])
            file.truncate(MOST_BYTES + random.randrange(1, 2**31))
        return [*UPSCALE, "--model", originals.model, "a.png", "a circle"]

    yield Case("an image of many bytes", huge, fails("a.png", "MiB"))


SIZES = {"one pixel": (1, 1), "a line": (40, 1), "a column": (1, 64), "odd sides": (17, 31)}


@generator
def odd_sizes(random: Random) -> Iterator[Case]:
    for name, (width, height) in SIZES.items():
        image = Image.new("RGB", (width, height), tuple(random.randrange(256) for _ in range(3)))
        file = of_file("a.png", saved(image, "PNG"))
        said = () if min(width, height) > 1 else ("size", "16x16")  # what the model is made for
        yield Case(f"an image of {name}", file, equals(np.asarray(image), said))
    image = saved(Image.new("L", (1, random.randrange(5000, 60_000))), "PNG")
    yield Case("an image that is too long", of_file("a.png", image), fails("size", "4096"))
