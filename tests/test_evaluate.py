"""Scores: what is drawn, how it is summed up, the report and its curve. The images come from a painter that knows the truth."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from tim_core import Pipeline, TimError
from tim_core.evaluation.curve import (
    difference,
    draw_curve,
    eval_samples,
    evaluate,
    pack,
    read_report,
    regressions,
    score,
    summarise,
    unpack,
)
from tim_core.images import contact_sheet, step_label, to_pil, to_tensor
from tim_core.processes import Processes
from tim_core.shapes.scenes import TASKS, place, render, scoring_prompts
from tim_core.weights.defaults import Defaults


class Painter:
    """Stands in for a pipeline: paints what is asked in a share of the images that grows with the steps."""

    def __init__(self, share=lambda steps: 1.0, size=(64, 64)):
        self.share, self.calls, self.nfe, self.defaults = share, [], 0, Defaults(*size)
        self.prompts = {p.text: p for task in TASKS for seed in (0, 1) for p in scoring_prompts(task, 60, seed)}

    def noise(self, batch, width, height, seed):
        return torch.randn(batch, 4, height // 8, width // 8, generator=torch.Generator().manual_seed(seed))

    def __call__(self, prompts, *, steps, cfg, width, height, seed, **options):
        width, height = width or self.defaults.width, height or self.defaults.height
        noise = torch.cat([self.noise(1, width, height, one) for one in seed])
        self.calls.append((prompts, steps, cfg, noise, options))
        self.nfe = steps if cfg == 1 else 2 * steps - 1
        images = []
        for prompt, start in zip(prompts, noise):
            luck = (int(start[0, 0, 0] * 1000) % 1000) / 1000
            scene = place(np.random.default_rng(0), self.prompts[prompt], width, height) if luck < self.share(steps) else []
            images.append(torch.from_numpy(render(scene, width, height)))
        return torch.stack(images)


def test_draws_are_fixed_and_each_has_its_own_noise():
    samples = eval_samples()
    assert len(samples) == 6 * 60 * 4 and samples == eval_samples() and len({d.seed for d in samples}) == len(samples)
    assert [d.prompt for d in samples[:240:4]] == scoring_prompts("single", 60, 0)
    assert not {d.seed for d in samples} & {d.seed for d in eval_samples(seed=1)}
    some = eval_samples(("counting",))
    assert some == [d for d in samples if d.prompt.task == "counting"]


def test_scores_stay_with_their_draws():
    samples = eval_samples(("single", "position"), 5, 2)
    painter = Painter(lambda steps: 0.5)
    in_one, in_many = score(painter, samples, 4, 2.5), score(painter, samples, 4, 2.5, batch=3)
    assert np.array_equal(in_one, in_many) and 0 < in_one.mean() < 1
    backwards = score(painter, samples[::-1], 4, 2.5)
    assert np.array_equal(backwards[::-1], in_one)


def test_the_summary():
    samples = eval_samples(TASKS, 5, 2)
    right = np.array([k % 10 < 2 * TASKS.index(d.prompt.task) for k, d in enumerate(samples)])
    result = summarise(samples, right)
    shares = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert result["n"] == 60 and result["tasks"] == pytest.approx(dict(zip(TASKS, shares)))
    assert result["overall"] == pytest.approx(0.5)
    assert result["stderr"] == pytest.approx(math.sqrt(sum(p * (1 - p) / 10 for p in shares)) / 6)


def test_the_report(tmp_path):
    painter = Painter(lambda steps: {1: 0.3, 4: 0.8}[steps])
    report = evaluate(painter, [4, 1, 4], prompts_per_task=5, images=2, output=tmp_path / "new" / "scores", progress=False)
    assert json.loads((tmp_path / "new" / "scores" / "report.json").read_text()) == report
    one, four = report["curve"]
    assert set(one) == {"steps", "cfg", "nfe", "n", "overall", "stderr", "tasks", "correct"} and list(one["tasks"]) == list(TASKS)
    assert (one["steps"], one["cfg"], one["nfe"], one["n"]) == (1, 1.0, 1, 60)
    assert (four["steps"], four["cfg"], four["nfe"]) == (4, 2.5, 7)
    assert one["overall"] < four["overall"] and report["regressions"] == []
    noises = {steps: torch.cat([n for _, s, _, n, _ in painter.calls if s == steps]) for steps in (1, 4)}
    assert torch.equal(noises[1], noises[4])
    with Image.open(tmp_path / "new" / "scores" / "curve.png") as image:
        assert image.size == (900, 600) and len(image.convert("RGB").getcolors(900 * 600)) > 10
    assert sorted(p.name for p in (tmp_path / "new" / "scores").iterdir()) == ["curve.png", "report.json"]


def test_points_of_the_same_model_are_kept(tmp_path):
    few = {"cfg": 2.5, "prompts_per_task": 5, "images": 2, "output": tmp_path, "progress": False}
    painter = Painter(lambda steps: 0.9)
    first = evaluate(painter, (1, 4), model={"weights": "a", "name": "one"}, **few)
    calls = len(painter.calls)
    baseline = tmp_path / "baseline.json"
    baseline.write_text((tmp_path / "report.json").read_text())
    second = evaluate(painter, (2, 4), model={"weights": "a", "name": "a copy"}, baseline=baseline, **few)
    assert {steps for _, steps, *_ in painter.calls[calls:]} == {2} and [point["steps"] for point in second["curve"]] == [1, 2, 4]
    assert [point["correct"] for point in second["curve"][::2]] == [point["correct"] for point in first["curve"]]
    assert ["vs_baseline" in point for point in second["curve"]] == [True, False, True]
    assert json.loads((tmp_path / "report.json").read_text()) == second
    same = {"model": {"weights": "a"}}
    for other, named in (({"model": {"weights": "b"}}, "weights is a, .* b;"), ({**same, "seed": 1}, "seed is 0, .* 1;"),
                        ({**same, "shift": 2.0}, "shift is None, .* 2.0;"), ({**same, "cfg": 1.5}, "cfg is 2.5, .* 1.5;")):
        with pytest.raises(TimError, match=f"report.json: its {named} write to another folder"):
            evaluate(painter, (8,), **{**few, **other})
    assert json.loads((tmp_path / "report.json").read_text()) == second


def test_some_tasks_and_another_size():
    report = evaluate(Painter(), [2], prompts_per_task=2, images=1, tasks=["colors", "two"], width=96, height=64, progress=False)
    point = report["curve"][0]
    assert point["overall"] == 1.0 and set(point["tasks"]) == {"colors", "two"} and point["stderr"] == 0


def test_the_size_is_the_model_s_unless_given():
    painter = Painter(size=(96, 64))
    report = evaluate(painter, [2], prompts_per_task=1, images=1, tasks=["single"], progress=False)
    assert (report["protocol"]["width"], report["protocol"]["height"]) == (96, 64)
    assert score(painter, eval_samples(("single",), 1, 1), 2, 1.0).all()
    assert [tuple(noise.shape[2:]) for _, _, _, noise, _ in painter.calls] == [(8, 12), (8, 12)]
    given = evaluate(painter, [2], prompts_per_task=1, images=1, tasks=["single"], height=128, progress=False)
    assert (given["protocol"]["width"], given["protocol"]["height"]) == (96, 128)
    assert tuple(painter.calls[-1][3].shape[2:]) == (16, 12)


def test_a_real_pipeline(tiny):
    pipe = Pipeline.load(tiny, device="cpu")
    report = evaluate(pipe, [1, 2], prompts_per_task=1, images=2, progress=False, mode="diffusion", guidance_interval=(0, 2))
    assert report["sampling"] == {"mode": "diffusion", "guidance_interval": [0, 2], "cfg": 2.5}
    assert [p["nfe"] for p in report["curve"]] == [2, 4] and report["curve"][0]["n"] == 12  # the interval guides the first step too
    assert [p["cfg"] for p in report["curve"]] == [2.5, 2.5]
    unguided = evaluate(pipe, [1, 2], prompts_per_task=1, images=2, progress=False)["curve"]
    assert [(p["nfe"], p["cfg"]) for p in unguided] == [(1, 1.0), (3, 2.5)]
    samples = eval_samples(("single", "position"), 1, 1)
    seen = []

    def watch(*arguments, **keywords):
        seen.append(pipe(*arguments, **keywords))
        return seen[-1]

    score(watch, samples, 4, 2.5)
    for draw, image in zip(samples, seen[0]):  # what `tim sample` makes of the draw's prompt and seed
        assert torch.allclose(pipe(draw.prompt.text, seed=draw.seed)[0], image, atol=1e-5)


def test_bad_values_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for change, named in (({"steps": []}, "steps: none"), ({"steps": [0]}, "steps: 0"),
                         ({"tasks": ["drawing"]}, "tasks: 'drawing' is unknown; .*single"), ({"tasks": []}, "tasks: none"),
                         ({"images": 0}, "images: 0"), ({"prompts_per_task": 0}, "prompts per task: 0"), ({"batch": 0}, "batch: 0"),
                         ({"seed": -1}, "seed: -1"), ({"cfg": math.nan}, "cfg: nan"), ({"cfg": 0.0}, "cfg: 0 "),
                         ({"output": tmp_path / "file" / "folder"}, "file")):
        with pytest.raises(TimError, match=named):
            evaluate(Painter(), **{"steps": [1], "progress": False, **change})


@pytest.mark.parametrize("steps", [[1], [4], [1, 2, 4, 8, 16, 32, 64]])
def test_a_curve_of_any_length(steps):
    points = [{"steps": s, "nfe": max(1, 2 * s - 1), "overall": 1 - 0.5 / s, "stderr": 0.01} for s in steps]
    assert draw_curve(points).size == (900, 600)


# Contact sheets


def test_a_sheet_holds_crisp_images_and_labels():
    images = torch.rand(6, 64, 64, 3)
    sheet = contact_sheet(images, [step_label(s, 2 * s - 1, 0.1) for s in (1, 2, 4, 8, 16, 32)])
    pixels = np.asarray(sheet)
    assert np.array_equal(pixels[8 : 8 + 192, 8 : 8 + 192], np.asarray(to_pil(images[0])).repeat(3, 0).repeat(3, 1))
    below = pixels[200:220, 8:200]
    assert below.max() > 150 and below.min() < 40
    assert sheet.width == 3 * 192 + 4 * 8 and to_tensor(sheet).shape == (1, sheet.height, sheet.width, 3)


@pytest.mark.parametrize("columns, across", [(None, 3), (1, 1), (2, 2), (9, 3)])
def test_columns(columns, across):
    assert contact_sheet(torch.rand(3, 32, 200, 3), ["a", "b", "c"], columns).width == across * 200 + (across + 1) * 8


def test_long_labels_are_broken_and_large_images_kept():
    tall = contact_sheet(torch.rand(1, 64, 64, 3), ["a red circle left of a blue square and a good deal more"]).height
    assert tall > contact_sheet(torch.rand(1, 64, 64, 3), ["a circle"]).height + 20
    assert contact_sheet(torch.rand(1, 300, 500, 3), [""]).width == 516


@pytest.mark.parametrize("count, columns, share", [(6, None, 0.4), (36, 6, 0.9), (256, 16, 0.9)])
def test_sheets_of_large_images_are_bounded_and_legible(count, columns, share):
    images = torch.rand(1, 1024, 1024, 3).expand(count, -1, -1, -1)
    labels = [step_label(32, 63, 12.34)] * count
    sheet = contact_sheet(images, labels, columns)
    assert share * 2**24 < sheet.width * sheet.height <= 2**24
    across = columns or 3
    cell = sheet.width / across
    row = np.array(sheet)[: sheet.height // math.ceil(count / across), : int(cell)]
    text = (row > 200).all(-1)[int(cell * 0.98):]  # what stands under the image is bright
    assert np.ptp(np.nonzero(text.any(1))[0]) >= cell / 40


def test_a_cell_can_hold_several_images():
    one, four = torch.zeros(2, 64, 96, 3), torch.rand(2, 3, 64, 96, 3)
    small, large = contact_sheet(one, ["a", "b"]), contact_sheet(four, ["a", "b"])
    assert large.width == 2 * 192 + 3 * 8 == small.width  # both are 192 wide: two by two, and enlarged
    pixels = torch.from_numpy(np.array(large)).float() / 255
    assert (pixels[8:72, 8:104] - four[0, 0]).abs().max() < 0.01 and (pixels[72:136, 8:104] - four[0, 2]).abs().max() < 0.01
    assert pixels[72:136, 104:200].std() < 0.01  # three of four



def test_labels_and_images_go_together():
    with pytest.raises(ValueError, match="2 images and 1 labels"):
        contact_sheet(torch.rand(2, 8, 8, 3), ["one"])
    with pytest.raises(ValueError, match="at least one"):
        contact_sheet([], [])


def test_images_have_8_bits_as_comfyui_saves_them():
    image = torch.tensor([[[0.0, 0.5, 1.0], [0.999, 0.1, 1 / 255]]])
    assert np.asarray(to_pil(image)).tolist() == [[[0, 127, 255], [254, 25, 1]]]
    assert step_label(1, 1, 0.126) == "1 step · 1 NFE · 0.13 s" and step_label(4, 7, 2).startswith("4 steps · 7 NFE")


# Picture by picture


def test_the_paired_difference():
    samples = eval_samples(("single", "two"), 2, 2)
    before, after = np.array([1, 0, 0, 0, 1, 1, 1, 1], bool), np.array([1, 1, 1, 0, 1, 1, 1, 0], bool)
    change = difference(samples, before, after)
    assert change["difference"] == pytest.approx((0.5 - 0.25) / 2)
    assert change["stderr"] == pytest.approx(math.sqrt(0.25 / 4 + 0.1875 / 4) / 2)


def test_falls_are_found_and_noise_is_not():
    samples = eval_samples(("single",), 30, 4)
    good, bad, noisy = np.ones(120, bool), np.arange(120) % 2 == 0, np.arange(120) > 1
    curve = [{"steps": steps, "correct": pack(right)} for steps, right in ((1, good), (2, noisy), (4, bad))]
    assert [(fall["from"], fall["to"]) for fall in regressions(samples, curve)] == [(1, 4), (2, 4)]
    assert regressions(samples, curve[::-1]) == []
    assert np.array_equal(unpack(pack(bad)), bad)


def test_a_baseline_is_compared_image_by_image(tmp_path):
    options = dict(prompts_per_task=5, images=2, progress=False)
    other = evaluate(Painter(lambda steps: 0.3), [1, 4], output=tmp_path / "baseline", **options)
    baseline = tmp_path / "baseline" / "report.json"
    report = evaluate(Painter(lambda steps: 0.8), [1, 2, 4], output=tmp_path / "own", baseline=baseline, **options)
    for point, theirs in zip(report["curve"][::2], other["curve"]):
        assert point["vs_baseline"]["difference"] == pytest.approx(point["overall"] - theirs["overall"])
    assert "vs_baseline" not in report["curve"][1]
    grey = []
    for name in ("own", "baseline"):
        with Image.open(tmp_path / name / "curve.png") as image:
            grey.append((np.asarray(image.convert("RGB")) == 153).all(-1).sum())
    assert grey[0] > grey[1] + 1000  # the baseline's line
    with pytest.raises(TimError, match="report.json: .*seed.* 0.* 1"):
        evaluate(Painter(), [1], seed=1, baseline=baseline, **options)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(TimError, match="other.json: .*tim evaluate"):
        evaluate(Painter(), [1], baseline=tmp_path / "other.json", **options)


def test_processes_share_the_images(tmp_path):
    """Two processes' parts, added up as all_reduce would, are the whole."""
    samples = eval_samples(("single", "position"), 5, 2)
    painter = Painter(lambda steps: 0.5)
    whole = score(painter, samples, 4, 2.5)
    parts = [score(painter, samples, 4, 2.5, processes=Unshared(index, 2, torch.device("cpu"))) for index in (0, 1)]
    assert np.array_equal(parts[0] | parts[1], whole) and not (parts[0] & parts[1]).any() and all(part.any() for part in parts)


class Unshared(Processes):
    def total(self, value):
        return value


def test_a_report_without_what_a_curve_needs_is_no_report(tmp_path):
    path = tmp_path / "report.json"
    path.write_text(json.dumps({"protocol": {}, "curve": [{"correct": "01", "steps": 1}]}))
    with pytest.raises(TimError, match="report.json: .*tim evaluate"):
        read_report(path)
