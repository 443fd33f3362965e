"""How sharp the edges of coloured shapes are, and how round their circles."""

import statistics

import numpy as np

from tim_core.shapes import scenes
from tim_core.shapes.detector import detect


def edges(image: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Lines across the edges that lie along the axes (the sides of squares and circles, the base of triangles).

    Each is (offsets in pixels from where it falls through 50 %, values from 1 on the object to 0 on the background).
    """
    found = []
    background = np.array(scenes.BACKGROUND) / 255
    for thing in detect(image):
        if thing.shape is None or thing.color is None:
            continue
        way = np.array(scenes.COLORS[thing.color]) / 255 - background
        reach = int(0.8 * thing.radius)
        x, y = int(thing.x), int(thing.y)
        across = (image[y] - background) @ way / (way @ way)
        down = (image[:, x] - background) @ way / (way @ way)
        lines = [(down, thing.y + thing.radius)]
        if thing.shape != "triangle":
            lines += [(across[::-1], image.shape[1] - thing.x + thing.radius), (across, thing.x + thing.radius)]
        for line, edge in lines:
            low, high = max(0, int(edge - reach)), min(len(line), int(edge + reach) + 1)
            falling = line[low:high]
            if (middle := crossing(falling, 0.5)) is not None:
                found.append((np.arange(len(falling)) - middle, falling))
    return found


def crossing(line: np.ndarray, level: float) -> float | None:
    """Where a line that falls from 1 to 0 goes below the level for the first time, between pixels."""
    below = np.flatnonzero(line < level)
    if not len(below) or below[0] == 0:
        return None
    i = int(below[0])
    return i - 1 + (line[i - 1] - level) / (line[i - 1] - line[i])


def width(lines: list[tuple[np.ndarray, np.ndarray]], cell: float = 0.125, reach: float = 8.0) -> float:
    """10-90 % width in pixels of the edge profile that the lines together sample finer than a pixel, as in ISO 12233."""
    offsets, values = (np.concatenate(parts) for parts in zip(*lines))
    cells = np.round(offsets / cell).astype(int)
    used = [k for k in range(int(-reach / cell), int(reach / cell) + 1) if (cells == k).any()]
    profile = np.array([np.median(values[cells == k]) for k in used])

    def at(level: float) -> float:
        place = crossing(profile, level)
        return cell * (used[int(place)] + place % 1 * (used[int(place) + 1] - used[int(place)]))

    return at(0.1) - at(0.9)


def line_width(lines: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """The median over lines of each one's own 10-90 % width, between pixels: an edge narrower than a pixel looks up to twice as wide."""
    places = [(crossing(line, 0.1), crossing(line, 0.9)) for _, line in lines]
    return statistics.median(ten - ninety for ten, ninety in places if ten is not None and ninety is not None)


def edge_width(images: list[np.ndarray]) -> float | None:
    """10-90 % width in pixels over the edges of all images; None where there are none or their profile never falls so far."""
    lines = [line for image in images for line in edges(image)]
    try:
        return float(width(lines)) if lines else None
    except TypeError:  # the profile crosses one of the two levels nowhere
        return None


def circle_overlaps(image: np.ndarray) -> list[float]:
    """Soft intersection over union of every detected circle with the ideal one in its bounding box.

    The best of a search of half a pixel, as the detector does it: 0.97 for the renderer's circles of radius 15.
    """
    found, (rows, columns) = [], image.shape[:2]
    for thing in detect(image):
        if thing.shape != "circle":
            continue
        way = np.float32(scenes.COLORS[thing.color]) - np.float32(scenes.BACKGROUND)
        reach = thing.radius + 2.5
        x0, y0 = max(0, int(thing.x - reach)), max(0, int(thing.y - reach))
        part = image[y0 : min(rows, int(thing.y + reach) + 1), x0 : min(columns, int(thing.x + reach) + 1)]
        alpha = np.clip((part * 255 - np.float32(scenes.BACKGROUND)) @ way / (way @ way), 0, 1)
        best = 0.0
        for radius in (thing.radius - 0.5, thing.radius, thing.radius + 0.5):
            for dy in (-0.5, 0.0, 0.5):
                ideal = scenes.coverage("circle", thing.x - x0, thing.y + dy - y0, radius, alpha.shape[1], alpha.shape[0])
                best = max(best, float(np.minimum(alpha, ideal).sum() / np.maximum(alpha, ideal).sum()))
        found.append(best)
    return found
