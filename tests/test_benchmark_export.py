"""Images for other benchmarks: the folders that their evaluators read, and that an interrupted run resumes."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support import mentions
from tim_core import TimError
from tim_core.evaluation.benchmark_export import export_images, read_prompts
from tim_core.processes import Processes
from tim_core.weights.defaults import Defaults

GENEVAL = [{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
           {"tag": "counting", "include": [{"class": "cow", "count": 2}], "prompt": "a photo of two cows"}]
DPG = [{"item_id": "partiprompts12", "text": "a bench"}, {"item_id": 7, "text": "two cows"}]


class Painter:
    """Every image is one grey, that of its prompt, and one column as bright as its noise."""

    def __init__(self):
        self.asked, self.defaults = [], Defaults(16, 16)

    def noise(self, batch, width, height, seed):
        return torch.full((batch, 1, height // 8, width // 8), seed % 200 / 255)

    def __call__(self, prompts, *, steps, cfg, width, height, seed, **options):
        noise = torch.cat([self.noise(1, width, height, one) for one in seed])
        self.asked += prompts
        images = torch.full((len(prompts), height, width, 3), len(prompts[0]) / 255)
        images[:, :, 0] = noise[:, 0, 0, 0].view(-1, 1, 1)
        return images


def write(folder, lines):
    folder.mkdir(exist_ok=True)
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def make(pipe, folder, lines, layout, **options):
    return export_images(pipe, write(folder, lines), layout, folder / "out", progress=False, **options)


def test_geneval(tmp_path):
    """As evaluation/evaluate_images.py reads it: digits, metadata.jsonl of one line, samples/ of digits.png."""
    folder = make(Painter(), tmp_path, GENEVAL, "geneval")
    subfolders = sorted(place.name for place in folder.iterdir() if place.is_dir() and place.name.isdigit())
    assert subfolders == ["00000", "00001"]
    for name, line in zip(subfolders, GENEVAL):
        with open(folder / name / "metadata.jsonl") as file:
            assert json.load(file) == line
        images = sorted((folder / name / "samples").iterdir())
        assert len(images) == 4 and all(re.match(r"\d+\.png", image.name) for image in images)
        shown = [np.asarray(Image.open(image)) for image in images]
        assert {image[0, 5, 0] for image in shown} == {len(line["prompt"])} and len({image[0, 0, 0] for image in shown}) == 4


def test_the_size_is_the_model_s_unless_given(tmp_path):
    for given, size in (({}, (16, 16)), ({"width": 24}, (24, 16))):
        folder = make(Painter(), tmp_path / f"{size[0]}", GENEVAL[:1], "geneval", images=1, **given)
        with Image.open(folder / "00000" / "samples" / "00000.png") as image:
            assert image.size == size
        settings = json.loads((folder / "settings.json").read_text())
        assert (settings["width"], settings["height"]) == size


def test_dpg(tmp_path):
    """As dpg_bench/compute_dpg_bench.py reads it: a folder with nothing but ITEM_ID.png, four squares in each."""
    folder = make(Painter(), tmp_path, DPG, "dpg")
    assert sorted(place.name for place in folder.iterdir()) == ["7.png", "partiprompts12.png"]
    square = np.asarray(Image.open(folder / "partiprompts12.png"))
    assert square.shape == (32, 32, 3)
    cells = [square[y : y + 16, x : x + 16] for y in (0, 16) for x in (0, 16)]
    assert [cell[0, 0, 0] - cells[0][0, 0, 0] for cell in cells] == [0, 1, 2, 3] and all(cell[3, 3, 0] == len("a bench") for cell in cells)
    assert json.loads((folder.parent / "metadata" / "7.json").read_text()) == DPG[1]


def test_a_prompt_without_all_of_its_images_is_made_again(tmp_path):
    folder = make(Painter(), tmp_path, GENEVAL, "geneval")
    (folder / "00001" / "samples" / "00002.png").unlink()
    make(Painter(), tmp_path, GENEVAL, "geneval")
    assert len(list((folder / "00001" / "samples").iterdir())) == 4


def test_lines_that_geneval_cannot_judge_are_told(tmp_path, caplog):
    make(Painter(), tmp_path, GENEVAL, "geneval")
    assert not caplog.text
    make(Painter(), tmp_path / "more", [*GENEVAL, {"prompt": "a bare one"}], "geneval")
    assert mentions(caplog.text, 1, "tag", "include", "a bare one")


@pytest.mark.parametrize("line", [{"text": "no name"}, {"item_id": "with.dot", "text": "its evaluator cuts at the dot"}])
def test_dpg_wants_names_that_its_evaluator_finds(tmp_path, line):
    with pytest.raises(TimError, match='line 1: .*"item_id", a name without dots'):
        make(Painter(), tmp_path, [line], "dpg")


@pytest.mark.parametrize("layout, lines, last", [("geneval", GENEVAL, "00001/metadata.jsonl"), ("dpg", DPG, "pictures/7.png")])
def test_a_stopped_run_goes_on(tmp_path, layout, lines, last):
    make(Painter(), tmp_path, lines, layout)
    (tmp_path / "out" / last).unlink()
    painter = Painter()
    make(painter, tmp_path, lines, layout)
    assert set(painter.asked) == {lines[1].get("prompt") or lines[1]["text"]} and (tmp_path / "out" / last).is_file()
    with pytest.raises(TimError, match="steps.* 4.* 8.*another folder"):
        make(painter, tmp_path, lines, layout, steps=8)
    with pytest.raises(TimError, match="model.* another;"):
        make(painter, tmp_path, lines, layout, model="another")
    with pytest.raises(TimError, match="prompts.*another folder"):
        make(painter, tmp_path, lines[:1], layout)


def test_processes_share_the_prompts(tmp_path):
    asked = []
    for index in (0, 1):
        painter = Painter()
        make(painter, tmp_path, GENEVAL, "geneval", processes=Waiting(index, 2, torch.device("cpu")))
        asked.append(set(painter.asked))
    assert asked == [{GENEVAL[0]["prompt"]}, {GENEVAL[1]["prompt"]}]


class Waiting(Processes):
    def wait(self):
        pass


@pytest.mark.parametrize("text, named", [
    ("", "no prompts"), ("[1]", "line 1"), ('{"prompt": 3}', "line 1"), ('{"prompt": "a"}\n\n{"text"', "line 3"),
])
def test_bad_prompt_files_are_named(tmp_path, text, named):
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(TimError, match=named) as error:
        read_prompts(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("text, said", [
    ('{"prompt": "a", "item_id": "../x"}', "line 1"), ('{"prompt": "a", "id": 1}\n{"prompt": "b", "id": 1}', "twice"),
])
def test_names_matter_where_files_have_them(tmp_path, text, said):
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    assert read_prompts(path)[0].name == "0"
    with pytest.raises(TimError, match=said) as error:
        read_prompts(path, "dpg")
    assert str(path) in str(error.value)


def test_bad_settings_are_refused(tmp_path):
    with pytest.raises(TimError, match="square"):
        make(Painter(), tmp_path, DPG, "dpg", images=3)
    with pytest.raises(TimError, match="layout"):
        make(Painter(), tmp_path, DPG, "t2i-compbench")
    with pytest.raises(TimError, match="nothing.jsonl"):
        read_prompts(tmp_path / "nothing.jsonl")
    assert not (tmp_path / "out").exists()
