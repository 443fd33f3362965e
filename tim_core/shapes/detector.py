"""An exact detector for images of coloured shapes, which scores them as GenEval does."""

import numpy as np

from .scenes import BACKGROUND, COLORS, SHAPES, Placed, Prompt, Thing, coverage, relation_holds

SPECK = 8 / (64 * 64)  # components below this fraction of the image are ignored


def detect(image: np.ndarray) -> list[Placed]:
    """Finds every component of an image (height, width, 3; float in [0, 1] or uint8) larger than a speck.

    A component that is not a clean object (a foreign or mixed colour, no shape that fits) has shape or color None.
    """
    from scipy import ndimage

    pixels = np.asarray(image, np.float32) * (1.0 if image.dtype == np.uint8 else 255.0) - np.float32(BACKGROUND)
    palette = np.float32(list(COLORS.values())) - np.float32(BACKGROUND)
    alpha = np.clip(pixels @ palette.T / (palette ** 2).sum(1), 0, 1)                        # (H, W, colours)
    residual = np.linalg.norm(pixels[..., None, :] - alpha[..., None] * palette, axis=-1)    # (H, W, colours)
    nearest = residual.argmin(-1)
    share = np.take_along_axis(alpha, nearest[..., None], -1)[..., 0]
    solid = (share >= 0.5) | (np.linalg.norm(pixels, axis=-1) > 100)
    labels, n = ndimage.label(solid, np.ones((3, 3)))
    found = []
    for i, box in enumerate(ndimage.find_objects(labels), 1):
        part = labels == i
        if part.sum() < SPECK * part.size:
            continue
        (y0, y1), (x0, x1) = [(s.start, s.stop) for s in box]
        x, y, radius = (x0 + x1) / 2, (y0 + y1) / 2, (x1 - x0 + y1 - y0) / 4
        color = _color(pixels, nearest, part, palette)
        shape = None
        if color is not None and abs((x1 - x0) - (y1 - y0)) <= max(2.0, 0.2 * radius):
            near = ndimage.binary_dilation(part, np.ones((3, 3)), 2)
            shape = _shape(alpha[..., list(COLORS).index(color)] * near, x, y, radius)
        found.append(Placed(shape, color, x, y, radius))
    return found


def _color(pixels, nearest, part, palette) -> str | None:
    from scipy import ndimage
    core = ndimage.binary_erosion(part, np.ones((3, 3)))
    core = core if core.sum() >= 4 else part
    index = np.bincount(nearest[core], minlength=len(palette)).argmax()
    clean = np.linalg.norm(pixels[core] - palette[index], axis=-1) < 60
    return list(COLORS)[index] if clean.mean() >= 0.9 else None


def _shape(alpha, x, y, radius) -> str | None:
    height, width = alpha.shape

    def overlap(shape):  # soft intersection over union, best of a small search round the bounding box
        best = 0.0
        for r in (radius - 0.5, radius, radius + 0.5):
            for dy in (-0.5, 0.0, 0.5):
                truth = coverage(shape, x, y + dy, r, width, height)
                best = max(best, float(np.minimum(alpha, truth).sum() / np.maximum(alpha, truth).sum()))
        return best

    score, shape = max((overlap(s), s) for s in SHAPES)
    return shape if score >= 0.86 else None


def is_correct(prompt: Prompt, image: np.ndarray) -> bool:
    """Whether the image holds exactly the objects of the prompt, with the right colours and relation."""
    found = detect(image)
    if len(found) != len(prompt.things) or any(f.shape is None or f.color is None for f in found):
        return False
    if "counting" in prompt.task:
        same = {(f.shape, f.color) for f in found}
        return len(same) == 1 and all(_fits(t, f) for t, f in zip(prompt.things, found))
    for order in (found, found[::-1]):
        if all(_fits(t, f) for t, f in zip(prompt.things, order)):
            x, y = np.array([f.x for f in order]), np.array([f.y for f in order])
            return prompt.relation is None or relation_holds(prompt.relation, x, y, 1e-6)
    return False


def _fits(thing: Thing, found: Placed) -> bool:
    return found.shape == thing.shape and thing.color in (None, found.color)
