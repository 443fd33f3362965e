"""Make the registry's icon and banner from images of the demo model: `python docs/artwork.py` writes docs/icon.png and docs/banner.png."""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from tim_core import Pipeline
from tim_core.images import to_pil

PROMPT, SEED, STEPS = "a red circle left of a blue square", 0, (1, 2, 4, 16)
PAPER, INK, FAINT = (25, 25, 30), (240, 240, 240), (150, 150, 160)


def enlarged(image: Image.Image, side: int) -> Image.Image:
    return image.resize((side, side), Image.Resampling.NEAREST)


def icon(first: Image.Image, last: Image.Image, side: int = 400) -> Image.Image:
    """Noise above the diagonal, the image below it."""
    noise = Image.effect_noise((64, 64), 90).convert("RGB")
    noise = Image.blend(noise, first, 0.35)
    mask = Image.new("L", (side, side))
    ImageDraw.Draw(mask).polygon([(0, side), (side, side), (side, 0)], fill=255)
    sheet = Image.composite(enlarged(last, side), enlarged(noise, side), mask)
    ImageDraw.Draw(sheet).line([(0, side), (side, 0)], INK, 10)
    return sheet


def banner(images: list[Image.Image], width: int = 1260) -> Image.Image:
    """21:9: the title, and one image at several step counts."""
    height, gap = width * 9 // 21, 36
    sheet = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((gap, 40), "Transition Models", INK, ImageFont.load_default(size=68))
    pen.text((gap, 124), "one checkpoint, any number of steps, in ComfyUI", FAINT, ImageFont.load_default(size=34))
    side = (width - gap * (len(images) + 1)) // len(images) // 64 * 64
    across = (width - side * len(images)) // (len(images) + 1)
    for i, (steps, image) in enumerate(zip(STEPS, images)):
        left = across + i * (side + across)
        sheet.paste(enlarged(image, side), (left, 200))
        label = f"{steps} step{'s' if steps > 1 else ''}"
        pen.text((left + side // 2, 200 + side + 12), label, INK, ImageFont.load_default(size=30), "mt")
    return sheet


if __name__ == "__main__":
    pipe = Pipeline.load("tim-shapes", device="cpu")
    made = [to_pil(pipe(PROMPT, steps=steps, seed=SEED)[0]) for steps in STEPS]
    icon(made[0], made[-1]).save(Path(__file__).with_name("icon.png"))
    banner(made).save(Path(__file__).with_name("banner.png"))
