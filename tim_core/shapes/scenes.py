"""Coloured shapes: scenes, captions and a renderer."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BACKGROUND = (25, 25, 30)
COLORS = {
    "red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 220),
    "yellow": (235, 210, 50), "purple": (150, 60, 190), "white": (240, 240, 240),
}
SHAPES = ("circle", "square", "triangle")
COUNTS = {1: "a", 2: "two", 3: "three", 4: "four"}
RELATIONS = ("left of", "right of", "above", "below")
TASKS = ("single", "two", "counting", "colors", "position", "attribution")
# what training sees: the six scored forms and the two full ones
TRAINING_FORMS = {
    "single": 0.08, "two": 0.12, "counting": 0.18, "colors": 0.12, "position": 0.14, "attribution": 0.14,
    "full position": 0.14, "full counting": 0.08,
}

MIN_RADIUS, MAX_RADIUS = 0.12, {1: 0.30, 2: 0.24, 3: 0.20, 4: 0.17}  # of the shorter side, by number of objects
GAP = 0.03                                                           # between bounding boxes, of the shorter side


@dataclass(frozen=True)
class Thing:
    """One object that a prompt asks for; `color` is None when the prompt leaves it free."""
    shape: str
    color: str | None = None

    @property
    def words(self) -> str:
        return f"{self.color} {self.shape}" if self.color else self.shape


@dataclass(frozen=True)
class Prompt:
    """A caption of coloured shapes, taken apart."""
    task: str
    things: tuple[Thing, ...]
    relation: str | None = None

    @property
    def text(self) -> str:
        first = self.things[0]
        if "counting" in self.task:
            return f"{COUNTS[len(self.things)]} {first.words}s"
        if len(self.things) == 1:
            return f"a {first.words}"
        return f"a {first.words} {self.relation or 'and'} a {self.things[1].words}"


@dataclass(frozen=True)
class Placed:
    """One object in an image: centre and radius (half the bounding box) in pixels; shape or color None where it is not a clean object."""
    shape: str | None
    color: str | None
    x: float
    y: float
    radius: float


def sample_prompt(rng: np.random.Generator, task: str, relations: Sequence[str] = RELATIONS) -> Prompt:
    """Draws a prompt of one task (of TASKS, or one of the full forms of TRAINING_FORMS), with one of `relations` where it has any."""
    shapes = [str(s) for s in rng.permutation(SHAPES)]
    colors = [str(c) for c in rng.permutation(list(COLORS))]
    if "counting" in task:
        color = colors[0] if task.startswith("full") else None
        return Prompt(task, (Thing(shapes[0], color),) * int(rng.integers(2, 5)))
    if task in ("single", "colors"):
        return Prompt(task, (Thing(shapes[0], colors[0] if task == "colors" else None),))
    named = task in ("attribution", "full position")
    things = tuple(Thing(s, c if named else None) for s, c in zip(shapes[:2], colors))
    return Prompt(task, things, str(rng.choice(relations)) if "position" in task else None)


def sample_training_prompt(
    rng: np.random.Generator, forms: dict[str, float] = TRAINING_FORMS, relations: Sequence[str] = RELATIONS
) -> Prompt:
    """Draws a caption as training sees them: the six tasks and the full forms, by their weights."""
    return sample_prompt(rng, str(rng.choice(list(forms), p=np.array(list(forms.values())) / sum(forms.values()))), relations)


def place(rng: np.random.Generator, prompt: Prompt, width: int = 64, height: int = 64) -> list[Placed]:
    """Draws a scene that the prompt describes; the whole scene is redrawn until it fits the canvas."""
    side, n = min(width, height), len(prompt.things)
    free = rng.choice(list(COLORS), n).tolist()
    if "counting" in prompt.task:
        free = free[:1] * n
    while True:
        r = side * rng.uniform(MIN_RADIUS, MAX_RADIUS[n], (32, n))  # 32 scenes at once, of which the first that fits is taken
        x, y = rng.uniform(r, width - r), rng.uniform(r, height - r)
        fits = _apart(x, y, r, side * GAP)
        if prompt.relation is not None:
            fits &= relation_holds(prompt.relation, x, y, r.max(-1))
        if fits.any():
            i = fits.argmax()
            return [Placed(t.shape, t.color or c, *map(float, p)) for t, c, *p in zip(prompt.things, free, x[i], y[i], r[i])]


def _apart(x, y, r, gap: float) -> np.ndarray:
    i, j = np.triu_indices(x.shape[-1], 1)
    distance = np.maximum(abs(x[..., i] - x[..., j]), abs(y[..., i] - y[..., j]))
    return np.all(distance - (r[..., i] + r[..., j]) >= gap, axis=-1)


def relation_holds(relation: str, x, y, margin):
    """Whether the first two centres x, y (..., N) have the relation by at least `margin` pixels -> (...,) bool."""
    dx, dy = x[..., 1] - x[..., 0], y[..., 1] - y[..., 0]
    return {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[relation] >= margin


def coverage(shape: str, x: float, y: float, radius: float, width: int, height: int) -> np.ndarray:
    """Anti-aliased share (height, width) of each pixel that the shape covers; the edge falls off over one pixel."""
    dx, dy = np.arange(width) + 0.5 - x, (np.arange(height) + 0.5 - y)[:, None]
    if shape == "square":
        return np.clip(radius + 0.5 - abs(dx), 0, 1) * np.clip(radius + 0.5 - abs(dy), 0, 1)
    if shape == "circle":
        distance = np.hypot(dx, dy) - radius
    else:  # apex (0, -radius), base from (-radius, radius) to (radius, radius)
        distance = np.maximum((2 * abs(dx) - dy - radius) / 5 ** 0.5, dy - radius)
    return np.clip(0.5 - distance, 0, 1)


def render(scene: list[Placed], width: int = 64, height: int = 64) -> np.ndarray:
    """Paints a scene: (height, width, 3) float32 in [0, 1], sRGB."""
    image = np.full((height, width, 3), BACKGROUND, np.float32)
    for thing in scene:
        alpha = coverage(thing.shape, thing.x, thing.y, thing.radius, width, height)[..., None].astype(np.float32)
        image += alpha * (np.float32(COLORS[thing.color]) - image)
    return image / 255


def scoring_prompts(task: str, n: int, seed: int) -> list[Prompt]:
    """The fixed prompts of a score: n draws of a task with replacement, the same for the same seed."""
    rng = np.random.default_rng([seed, TASKS.index(task)])
    return [sample_prompt(rng, task) for _ in range(n)]
