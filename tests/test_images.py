"""Reading images: every mode against its 8-bit version, orientation, transparency, and files that harm."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from tests.hostile import SPECIAL, png, png_bomb, postscript, special_file
from tim_core.cli import main
from tim_core.errors import TimError
from tim_core.images import MOST_PIXELS, TRANSPOSE, image_size, open_image

GREY = np.add.outer(np.arange(48), np.arange(64) * 3).clip(0, 255).astype(np.uint8)
COLOUR = np.stack([GREY, GREY[::-1], np.roll(GREY, 20)], -1)
COVER = np.where(np.arange(64) < 30, 0, 255).astype(np.uint8)[None].repeat(48, 0)  # the left part is transparent


def pfm(values: np.ndarray) -> bytes:
    return b"Pf\n%d %d\n-1.0\n" % values.shape[::-1] + values[::-1].astype("<f4").tobytes()


def pgm(values: np.ndarray, white: int) -> bytes:
    return b"P5\n%d %d\n%d\n" % (*values.shape[::-1], white) + values.astype(">u2" if white > 255 else np.uint8).tobytes()


wide = GREY.astype(np.uint16)
EIGHT_BIT = {  # name -> file of GREY in more than 8 bits: bytes, or an image to save
    "16.png": Image.fromarray(wide * 257),
    "shifted.png": Image.fromarray(wide * 256 + 128),
    "16.tif": Image.fromarray(wide * 257),
    "big-endian.tif": Image.fromarray((wide * 257).astype(">u2")),
    "unit-float.tif": Image.fromarray(GREY.astype(np.float32) / 255),
    "8-bit-float.tif": Image.fromarray(GREY.astype(np.float32)),
    "16-bit-float.tif": Image.fromarray(wide.astype(np.float32) * 257),
    "8-in-32.tif": Image.fromarray(GREY.astype(np.int32)),
    "16-in-32.tif": Image.fromarray(wide.astype(np.int32) * 257),
    "32.tif": Image.fromarray((GREY / 255 * (2**31 - 1)).astype(np.int32)),
    "8.pgm": pgm(GREY, 255),
    "16.pgm": pgm(wide * 257, 65535),
    "12.pgm": pgm(np.rint(GREY / 255 * 4095).astype(np.uint16), 4095),
    "unit.pfm": pfm(GREY / 255),
    "8.pfm": pfm(GREY),
}


@pytest.mark.parametrize("name", EIGHT_BIT)
def test_grey_of_many_bits_equals_its_8_bit_twin(name, tmp_path):
    path, expected = tmp_path / name, EIGHT_BIT[name]
    path.write_bytes(expected) if isinstance(expected, bytes) else expected.save(path)
    found = np.asarray(open_image(path))
    assert found.shape == (48, 64, 3) and np.abs(found.astype(int) - GREY[..., None]).max() <= 1


def test_highlights_of_a_float_image_are_clipped(tmp_path):
    values = GREY / 255
    values[0, 0] = 7.5
    (tmp_path / "a.pfm").write_bytes(pfm(values))
    found = np.asarray(open_image(tmp_path / "a.pfm"))[..., 0]
    assert found[0, 0] == 255 and np.abs(found[1:].astype(int) - GREY[1:]).max() <= 1


def test_tiff_in_which_zero_is_white(tmp_path):
    for name, values in {"8.tif": GREY, "16.tif": 65535 - wide * 257}.items():  # Pillow inverts 8 bits as it writes, 16 bits never
        Image.fromarray(values).save(tmp_path / name, tiffinfo={262: 0})
        with Image.open(tmp_path / name) as image:
            assert image.tag_v2[262] == 0
        assert np.abs(np.asarray(open_image(tmp_path / name))[..., 0].astype(int) - GREY).max() <= 1


def to_lab(image: Image.Image) -> Image.Image:
    return ImageCms.profileToProfile(image, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB")


MODES = {
    "RGB.png": (lambda image: image, 0),
    "RGB.bmp": (lambda image: image, 0),
    "RGB.ppm": (lambda image: image, 0),
    "RGB.jpg": (lambda image: image, 40),
    "RGB.webp": (lambda image: image, 60),
    "CMYK.tif": (lambda image: image.convert("CMYK"), 1),
    "CMYK.jpg": (lambda image: image.convert("CMYK"), 40),
    "YCbCr.tif": (lambda image: image.convert("YCbCr"), 3),
    "LAB.tif": (to_lab, 16),
    "RGBX.tif": (lambda image: image.convert("RGBX"), 0),
    "P.png": (lambda image: image.quantize(256), 60),
    "P.gif": (lambda image: image.quantize(256), 60),
}


@pytest.mark.parametrize("name", MODES)
def test_colours_of_every_mode(name, tmp_path):
    make, tolerance = MODES[name]
    smooth = np.stack([GREY, GREY[::-1], np.full_like(GREY, 90)], -1)
    make(Image.fromarray(smooth)).save(tmp_path / name)
    found = np.asarray(open_image(tmp_path / name)).astype(int)
    assert found.shape == smooth.shape and np.abs(found - smooth).max() <= tolerance and np.abs(found - smooth).mean() < 8


def with_cover(mode: str) -> Image.Image:
    rgba = Image.fromarray(np.dstack([COLOUR if mode == "RGBA" else np.dstack([GREY] * 3), COVER]), "RGBA")
    if mode == "P":
        palette = Image.fromarray(np.where(COVER == 0, 0, GREY // 2 + 1).astype(np.uint8)).convert("P")
        palette.putpalette([value for i in range(256) for value in [min(255, 2 * max(0, i - 1))] * 3])
        return palette
    return rgba if mode == "RGBA" else rgba.convert(mode)


@pytest.mark.parametrize("name", ["RGBA.png", "RGBA.tif", "RGBA.webp", "LA.png", "LA.tif", "P.png", "P.gif"])
def test_transparent_areas_are_white(name, tmp_path):
    mode = name.split(".")[0]
    options = {"transparency": 0} if mode == "P" else {"lossless": True} if name.endswith("webp") else {}
    with_cover(mode).save(tmp_path / name, **options)
    found = np.asarray(open_image(tmp_path / name)).astype(int)
    assert (found[:, :30] == 255).all()
    expected = COLOUR if mode == "RGBA" else GREY[..., None]
    assert np.abs(found - expected)[:, 30:].max() <= (2 if mode == "P" else 0)


def test_half_transparent_pixels_are_mixed_with_white(tmp_path):
    Image.new("RGBA", (8, 8), (255, 0, 0, 128)).save(tmp_path / "a.png")
    assert np.abs(np.asarray(open_image(tmp_path / "a.png"))[0, 0].astype(int) - (255, 127, 127)).max() <= 1


def test_a_transparent_grey_of_16_bits_is_white(tmp_path):
    values = wide * 257
    Image.fromarray(values).save(tmp_path / "a.png", transparency=int(values[10, 10]))
    found = np.asarray(open_image(tmp_path / "a.png"))[..., 0]
    assert (found[values == values[10, 10]] == 255).all()
    assert np.abs(found.astype(int) - GREY)[values != values[10, 10]].max() <= 1


@pytest.mark.parametrize("orientation", [*range(10), 99])
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif", "16.png"])
def test_every_orientation_is_turned_upright(orientation, name, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(wide * 257) if name == "16.png" else Image.fromarray(COLOUR)
    image.save(tmp_path / name, exif=exif, **({"quality": 95, "subsampling": 0} if name == "a.jpg" else {}))
    upright = Image.fromarray(GREY).convert("RGB") if name == "16.png" else Image.fromarray(COLOUR)
    upright = upright.transpose(TRANSPOSE[orientation]) if orientation in TRANSPOSE else upright
    tagged = Image.fromarray(COLOUR)
    tagged.getexif()[0x0112] = orientation
    assert ImageOps.exif_transpose(tagged).size == upright.size == image_size(tmp_path / name)
    found = open_image(tmp_path / name)
    assert found.size == upright.size
    assert np.abs(np.asarray(found).astype(int) - np.asarray(upright)).mean() < 3


def test_damaged_exif_does_not_hide_an_image(tmp_path):
    Image.fromarray(COLOUR).save(tmp_path / "a.png", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert np.array_equal(np.asarray(open_image(tmp_path / "a.png")), COLOUR)


# Files that harm


def refused(path) -> str:
    with pytest.raises(TimError) as error:
        open_image(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


def test_bombs_are_refused_by_their_size(tmp_path):
    (tmp_path / "bomb.png").write_bytes(png_bomb())
    assert (tmp_path / "bomb.png").stat().st_size < 20_000
    assert "12000x12000 pixels" in refused(tmp_path / "bomb.png")
    (tmp_path / "bomb.png").write_bytes(png_bomb(60_000, 60_000)[:100])
    assert "pixels" in refused(tmp_path / "bomb.png")
    side = int(MOST_PIXELS**0.5)
    (tmp_path / "large.png").write_bytes(png_bomb(side, side))
    assert image_size(tmp_path / "large.png") == (side, side)


@pytest.mark.parametrize("ending", ["png", "eps", "jpg"])
def test_postscript_is_never_run(ending, tmp_path):
    (tmp_path / f"a.{ending}").write_bytes(postscript(tmp_path / "ran"))
    assert "not an image" in refused(tmp_path / f"a.{ending}")
    assert main(["upscale", str(tmp_path / f"a.{ending}"), "a red circle", "-o", str(tmp_path / "out.png")]) == 1
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out.png").exists()


@pytest.mark.skipif(os.name != "posix", reason="special files of POSIX")
@pytest.mark.parametrize("kind", SPECIAL)
def test_special_files_are_refused_at_once(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kept = special_file(kind, Path("a.png"))
    assert "not a regular file" in refused("a.png")
    del kept


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.webp", "a.gif", "a.bmp", "a.ppm"])
def test_damaged_images_are_one_line(name, tmp_path):
    path = tmp_path / name
    Image.fromarray(COLOUR).save(path)
    data, rng = path.read_bytes(), np.random.default_rng(0)
    for share in (0, 0.01, 0.1, 0.5):
        path.write_bytes(data[: int(share * len(data))])
        refused(path)
    for _ in range(40):
        harmed = bytearray(data)
        for place in rng.integers(0, min(len(data), 200), 4):
            harmed[place] = rng.integers(256)
        path.write_bytes(harmed)
        try:
            assert open_image(path).mode == "RGB"
        except TimError as error:
            assert str(path) in str(error)


def test_no_changed_bit_of_a_png_changes_its_pixels(tmp_path):
    """It is noticed, or the image is as it was."""
    path, rng = tmp_path / "a.png", np.random.default_rng(1)
    Image.fromarray(COLOUR).save(path, compress_level=0)
    data, whole = path.read_bytes(), np.asarray(open_image(path))
    noticed = 0
    for place in rng.integers(0, len(data), 60):
        harmed = bytearray(data)
        harmed[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(harmed)
        try:
            assert np.array_equal(open_image(path), whole)
        except TimError as error:
            assert str(path) in str(error)
            noticed += 1
    assert noticed > 50


def test_damaged_tiff_writes_nothing_to_stderr(tmp_path, capfd, caplog):
    path = tmp_path / "a.tif"
    Image.fromarray(COLOUR).save(path, compression="tiff_lzw")
    data = path.read_bytes()
    middle = len(data) // 2
    path.write_bytes(data[: middle] + bytes(200) + data[middle + 200 :])
    refused(path)
    assert capfd.readouterr().err == "" and not caplog.records


@pytest.mark.parametrize("depth, kind, row, key, pixels", [
    (2, 0, b"\x1b", (1,), [0, 255, 170, 255]), (4, 0, b"\x05\xa0", (5,), [0, 255, 170, 0]),
    (16, 2, bytes.fromhex("010203040506 0a0b0c0d0e0f"), (0x0102, 0x0304, 0x0506), [255, 10]),
])
def test_the_transparent_colour_has_the_depth_of_the_file(depth, kind, row, key, pixels, tmp_path):
    (tmp_path / "a.png").write_bytes(png(len(pixels), 1, depth, kind, row, key))
    assert np.asarray(open_image(tmp_path / "a.png"))[0, :, 0].tolist() == pixels


def test_values_that_are_not_finite_are_refused(tmp_path):
    values = GREY / 255
    values[3, 3] = np.nan
    (tmp_path / "a.pfm").write_bytes(pfm(values))
    assert "not finite" in refused(tmp_path / "a.pfm")
