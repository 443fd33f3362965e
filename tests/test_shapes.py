"""Coloured shapes: their grammar, their scenes, and a detector that is right about them."""

from itertools import combinations

import numpy as np
import pytest

from tim_core.shapes.detector import detect, is_correct
from tim_core.shapes.scenes import (
    BACKGROUND,
    COLORS,
    COUNTS,
    RELATIONS,
    SHAPES,
    TASKS,
    TRAINING_FORMS,
    Placed,
    Prompt,
    Thing,
    coverage,
    place,
    render,
    sample_prompt,
    sample_training_prompt,
    scoring_prompts,
)

FORMS = {
    "single": {f"a {s}" for s in SHAPES},
    "two": {f"a {s} and a {t}" for s in SHAPES for t in SHAPES if s != t},
    "counting": {f"{n} {s}s" for n in ("two", "three", "four") for s in SHAPES},
    "colors": {f"a {c} {s}" for c in COLORS for s in SHAPES},
    "position": {f"a {s} {r} a {t}" for s in SHAPES for t in SHAPES if s != t for r in RELATIONS},
    "attribution": {f"a {c} {s} and a {d} {t}" for c in COLORS for d in COLORS if c != d for s in SHAPES for t in SHAPES if s != t},
    "full position": {
        f"a {c} {s} {r} a {d} {t}" for c in COLORS for d in COLORS if c != d for s in SHAPES for t in SHAPES if s != t for r in RELATIONS
    },
    "full counting": {f"{n} {c} {s}s" for n in ("two", "three", "four") for c in COLORS for s in SHAPES},
}


def scene(*things: tuple, width: int = 64, height: int = 64) -> np.ndarray:
    """An image of (shape, colour, x, y, radius)s, in 64ths of the width."""
    scale = width / 64
    return render([Placed(s, c, x * scale, y * scale, r * scale) for s, c, x, y, r in things], width, height)


def prompt(task: str, *things: str, relation: str | None = None) -> Prompt:
    """A prompt about things such as "red circle" or "circle"."""
    return Prompt(task, tuple(Thing(t.split()[-1], t.split()[0] if " " in t else None) for t in things), relation)


# Prompts


@pytest.mark.parametrize("task", FORMS)
def test_the_grammar(task):
    rng = np.random.default_rng(0)
    drawn = {sample_prompt(rng, task).text for _ in range(600)}
    assert drawn <= FORMS[task]
    if len(FORMS[task]) <= 36:
        assert drawn == FORMS[task]


@pytest.mark.parametrize("task", FORMS)
def test_two_named_shapes_and_colours_differ(task):
    rng = np.random.default_rng(1)
    for _ in range(200):
        things = sample_prompt(rng, task).things
        if "counting" in task:
            assert len(set(things)) == 1 and len(things) in COUNTS
        for a, b in combinations(things, 2):
            assert "counting" in task or (a.shape != b.shape and (a.color is None or a.color != b.color))


def test_scoring_prompts_are_fixed_by_the_seed():
    for task in TASKS:
        first, again, other = (scoring_prompts(task, 60, seed) for seed in (0, 0, 1))
        assert first == again != other and len(first) == 60 and {p.task for p in first} == {task}
    assert [p.text for p in scoring_prompts("colors", 3, 0)] == [p.text for p in scoring_prompts("colors", 60, 0)][:3]


def test_training_sees_every_form():
    rng = np.random.default_rng(0)
    seen = {sample_training_prompt(rng).task for _ in range(400)}
    assert seen == set(TRAINING_FORMS) == set(FORMS) and abs(sum(TRAINING_FORMS.values()) - 1) < 1e-9


# Scenes


@pytest.mark.parametrize("width, height", [(64, 64), (48, 96), (96, 64)])
def test_scenes_keep_the_rules(width, height):
    rng, side = np.random.default_rng(2), min(width, height)
    largest = {1: 0.30, 2: 0.24, 3: 0.20, 4: 0.17}
    for form in FORMS:
        for _ in range(20):
            asked = sample_prompt(rng, form)
            things = place(rng, asked, width, height)
            assert [t.shape for t in things] == [t.shape for t in asked.things]
            assert all(t.color == a.color for t, a in zip(things, asked.things) if a.color)
            assert "counting" not in form or len({t.color for t in things}) == 1
            for t in things:
                assert 0.12 * side <= t.radius <= largest[len(things)] * side
                assert t.radius <= t.x <= width - t.radius and t.radius <= t.y <= height - t.radius
            for a, b in combinations(things, 2):
                assert max(abs(a.x - b.x), abs(a.y - b.y)) - a.radius - b.radius >= 0.03 * side - 1e-9
            if asked.relation:
                first, second = things
                apart = {"left of": second.x - first.x, "right of": first.x - second.x,
                         "above": second.y - first.y, "below": first.y - second.y}[asked.relation]
                assert apart >= max(first.radius, second.radius) - 1e-9


def test_pixels():
    image = scene(("square", "red", 32, 32, 10))
    assert image.dtype == np.float32 and image.shape == (64, 64, 3)
    assert np.allclose(image[32, 32] * 255, COLORS["red"], atol=0.01) and np.allclose(image[0, 0] * 255, BACKGROUND, atol=0.01)
    assert render([], 40, 24).shape == (24, 40, 3)


@pytest.mark.parametrize("shape, share", [("circle", np.pi / 4), ("square", 1.0), ("triangle", 0.5)])
def test_shapes_cover_their_share_of_the_box(shape, share):
    alpha = coverage(shape, 64, 64, 40, 128, 128)
    assert alpha.sum() == pytest.approx(share * 80**2, rel=0.02)
    solid = alpha >= 0.5
    wide, high = np.flatnonzero(solid.any(0)), np.flatnonzero(solid.any(1))
    assert (wide[-1] - wide[0] + 1) / (high[-1] - high[0] + 1) == pytest.approx(1, abs=0.05)
    if shape == "triangle":
        assert solid[high[0]].sum() < 4 < solid[high[-1]].sum()  # apex up


# The detector


@pytest.mark.parametrize("width, height, n", [(64, 64, 200), (48, 48, 150), (128, 128, 40), (48, 96, 150)])
@pytest.mark.parametrize("task", TASKS)
def test_the_detector_is_right_about_the_truth(task, width, height, n):
    rng = np.random.default_rng([3, TASKS.index(task), width])
    right = 0
    for asked in scoring_prompts(task, n, 3):
        right += is_correct(asked, render(place(rng, asked, width, height), width, height))
    assert right / n >= 0.98


@pytest.mark.parametrize("task", ["full position", "full counting"])
def test_the_detector_is_right_about_the_full_forms(task):
    rng = np.random.default_rng(4)
    prompts = [sample_prompt(rng, task) for _ in range(100)]
    assert np.mean([is_correct(p, render(place(rng, p))) for p in prompts]) >= 0.98


def test_the_detector_reads_scenes():
    rng = np.random.default_rng(5)
    wrong = 0
    for form in FORMS:
        for _ in range(20):
            truth = place(rng, sample_prompt(rng, form))
            found = detect((render(truth) * 255).round().astype(np.uint8))
            wrong += sorted((t.shape, t.color) for t in truth) != sorted((str(f.shape), str(f.color)) for f in found)
    assert wrong <= 3


CIRCLE, SQUARE = ("circle", "red", 16, 20, 9), ("square", "blue", 46, 36, 10)
RIGHT = {
    "single": (prompt("single", "circle"), [CIRCLE]),
    "two": (prompt("two", "square", "circle"), [CIRCLE, SQUARE]),
    "counting": (prompt("counting", *["circle"] * 3), [("circle", "green", x, y, 9) for x, y in ((14, 14), (44, 20), (28, 46))]),
    "colors": (prompt("colors", "red circle"), [CIRCLE]),
    "left": (prompt("position", "circle", "square", relation="left of"), [CIRCLE, SQUARE]),
    "above": (prompt("position", "circle", "square", relation="above"), [CIRCLE, SQUARE]),
    "attribution": (prompt("attribution", "red circle", "blue square"), [CIRCLE, SQUARE]),
    "full": (prompt("full position", "blue square", "red circle", relation="right of"), [CIRCLE, SQUARE]),
}
WRONG = {
    "nothing": (prompt("single", "circle"), []),
    "a missing object": (prompt("two", "circle", "square"), [CIRCLE]),
    "an extra object": (prompt("colors", "red circle"), [CIRCLE, SQUARE]),
    "the other shape": (prompt("single", "triangle"), [CIRCLE]),
    "the same shape twice": (prompt("two", "circle", "square"), [CIRCLE, ("circle", "blue", 46, 36, 10)]),
    "the other colour": (prompt("colors", "green circle"), [CIRCLE]),
    "colours exchanged": (prompt("attribution", "blue circle", "red square"), [CIRCLE, SQUARE]),
    "one too few": (prompt("counting", *["circle"] * 4), RIGHT["counting"][1]),
    "one too many": (prompt("counting", *["circle"] * 2), RIGHT["counting"][1]),
    "colours mixed": (prompt("counting", "circle", "circle"), [CIRCLE, ("circle", "blue", 46, 36, 10)]),
    "shapes mixed": (prompt("counting", "circle", "circle"), [CIRCLE, ("square", "red", 46, 36, 10)]),
    "right of": (prompt("position", "circle", "square", relation="right of"), [CIRCLE, SQUARE]),
    "below": (prompt("position", "circle", "square", relation="below"), [CIRCLE, SQUARE]),
    "left of, exchanged": (prompt("position", "square", "circle", relation="left of"), [CIRCLE, SQUARE]),
}


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("asked, things", RIGHT.values(), ids=RIGHT)
def test_right_images(asked, things, width):
    assert is_correct(asked, scene(*things, width=width, height=width))


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("asked, things", WRONG.values(), ids=WRONG)
def test_wrong_images(asked, things, width):
    assert not is_correct(asked, scene(*things, width=width, height=width))


def with_patch(image: np.ndarray, color: tuple, width: int, height: int, x: int = 50, y: int = 50) -> np.ndarray:
    image = image.copy()
    image[y:y + height, x:x + width] = np.float32(color) / 255
    return image


def test_specks_are_ignored_and_larger_blots_are_not():
    asked, things = RIGHT["colors"]
    image = scene(*things)
    assert is_correct(asked, with_patch(image, COLORS["green"], 7, 1))  # 7 pixels
    assert not is_correct(asked, with_patch(image, COLORS["green"], 4, 2))  # 8 pixels
    large = scene(*things, width=128, height=128)
    assert is_correct(asked, with_patch(large, COLORS["green"], 31, 1, 90, 90))  # scaled with the area: 31 of 32
    assert not is_correct(asked, with_patch(large, COLORS["green"], 8, 4, 90, 90))


@pytest.mark.parametrize("color", [(0, 200, 200), (120, 120, 120), (255, 120, 0), (220, 40, 140)], ids=str)
def test_foreign_colours_are_wrong(color):
    asked, things = RIGHT["colors"]
    assert not is_correct(asked, with_patch(scene(*things), color, 10, 10))
    recoloured = scene(*things)
    solid = coverage("circle", 16, 20, 9, 64, 64) > 0.5
    recoloured[solid] = np.float32(color) / 255
    assert not is_correct(prompt("single", "circle"), recoloured)


def test_an_object_of_two_colours_is_wrong():
    asked = prompt("single", "square")
    image = scene(("square", "red", 32, 32, 14))
    assert is_correct(asked, image)
    assert not is_correct(asked, with_patch(image, COLORS["blue"], 14, 28, 32, 18))


@pytest.mark.parametrize("noise", [0.02, 0.04])
def test_a_little_noise_does_no_harm(noise):
    rng = np.random.default_rng(6)
    right = []
    for task in TASKS:
        for asked in scoring_prompts(task, 20, 7):
            image = render(place(rng, asked))
            right.append(is_correct(asked, np.clip(image + rng.normal(0, noise, image.shape), 0, 1).astype(np.float32)))
    assert np.mean(right) >= 0.95


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_flat_and_noisy_images_are_wrong(value):
    rng = np.random.default_rng(8)
    for image in (np.full((64, 64, 3), value, np.float32), rng.uniform(0, 1, (64, 64, 3)).astype(np.float32)):
        assert not any(is_correct(asked, image) for asked, _ in RIGHT.values())
