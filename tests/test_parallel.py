"""Several processes train as one does, on the same global batch: two on the CPU (gloo), started with torchrun."""

import csv
import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.test_training import autoencoder_yaml, needs_muon, tim_yaml
from tim_core.errors import TimError
from tim_core.processes import Shard, find_processes
from tim_core.shapes.batches import ShapesBatches
from tim_core.shapes.config import SizesConfig
from tim_core.training import run

SIZES = {"32x32": 0.5, "32x64": 0.5}  # as tim_yaml has them

# What is started twice. It runs the configurations named in its folder's files 0, 1, ... and answers with how much of the weights each
# process held, and how many images it rendered and encoded; an error ends both processes.
WORKER = """
import json, os, sys, threading, time
from pathlib import Path
from tim_core.models.autoencoder import Autoencoder
from tim_core.shapes import scenes
from tim_core.training import loop, run
from tim_core.training.transition import TransitionTask

def end_with_the_tests():
    os.read(0, 1)  # returns when pytest closes the pipe, or dies
    os._exit(0)

threading.Thread(target=end_with_the_tests, daemon=True).start()
folder, rank, counts = Path(sys.argv[1]), os.environ["RANK"], {}
wrap, render, encode, export = loop.distribute, scenes.render, Autoencoder.encode, TransitionTask.export

def counting_render(*args):
    counts["rendered"] += 1
    return render(*args)

def counting_encode(self, images):
    counts["encoded"] += len(images)
    return encode(self, images)

def uncounted_export(self, *args):  # it fits preview colours to images of its own
    before = dict(counts)
    made = export(self, *args)
    counts.update(before)
    return made

def watched(step, parts, processes, how):
    wrapped = wrap(step, parts, processes, how)
    weights = list(step.model.parameters())
    held = sum(loop.local_shard(weight).numel() for weight in weights) / sum(weight.numel() for weight in weights)
    counts.update(processes=processes.count, held=held, wrapper=type(wrapped).__name__)
    return wrapped

loop.distribute, scenes.render, Autoencoder.encode, TransitionTask.export = watched, counting_render, counting_encode, uncounted_export
for number in range(1000):
    while not (asked := folder / str(number)).exists():
        time.sleep(0.01)
    counts.update(rendered=0, encoded=0)
    run([asked.read_text()])
    answer = folder / f"{number}.{rank}.json"
    answer.with_suffix(".tmp").write_text(json.dumps(counts))
    answer.with_suffix(".tmp").rename(answer)
"""


class Pair:
    """Two processes that torchrun started, which run one configuration after another; started once, since their imports take longest."""

    def __init__(self, folder):
        self.folder, self.number = folder, 0
        (folder / "worker.py").write_text(WORKER)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", folder / "worker.py", folder]
        with (folder / "log").open("w") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment)

    def run(self, config) -> tuple[list[dict], str]:
        """What each process answered, and what they wrote on the terminal."""
        before, end = len(self.log()), time.monotonic() + 600
        answers = [self.folder / f"{self.number}.{rank}.json" for rank in (0, 1)]
        (self.folder / "next").write_text(str(config))
        (self.folder / "next").rename(self.folder / str(self.number))
        while not all(answer.exists() for answer in answers):
            assert self.process.poll() is None and time.monotonic() < end, self.log()
            time.sleep(0.02)
        self.number += 1
        return [json.loads(answer.read_text()) for answer in answers], self.log()[before:]

    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def stop(self):
        self.process.stdin.close()
        try:
            assert self.process.wait(60) == 0, self.log()
        finally:
            self.process.terminate()


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """launch(config, resumes=False) runs a configuration in two processes -> the report of each."""
    if os.name == "nt":
        pytest.skip("torchrun needs libuv, which torch for Windows may lack")
    pairs = []

    def launch(config, resumes=False) -> list[dict]:
        if not pairs or pairs[-1].process.poll() is not None:  # a pair ends where a run fails
            pairs.append(Pair(tmp_path_factory.mktemp("pair")))
        said, log = pairs[-1].run(config)
        assert ("resumed" in log) == resumes
        return said

    yield launch
    if pairs and pairs[-1].process.poll() is None:
        pairs[-1].stop()


def configuration(folder, name, target, more=""):
    path = tim_yaml(folder, "adamw", name)
    text = path.read_text().replace("{epsilon: 0.01}", f"{{target: {target}, adaptive_floor: 0.1}}")
    text = f"start: {folder}/start.safetensors\n{text}"
    path.write_text(text.replace("log_every: 2", f"autocast: false, log_every: 1{more}").replace("save_every: 2", "save_every: 4"))
    return path


def losses(config) -> list[float]:
    """Three a step."""
    rows = csv.DictReader((config.with_suffix("") / "metrics.csv").open())
    return [float(row[name]) for row in rows for name in ("loss", "diffusion", "transition")]


def state(config) -> dict[str, torch.Tensor]:
    """The weights in float32, which the exported ones are not."""
    return torch.load(config.with_suffix("") / "step-00000006.pt", weights_only=True)["model"]


def weights(config) -> torch.Tensor:
    return torch.cat([value.flatten().float() for _, value in sorted(state(config).items())])


def agree(config, other) -> bool:
    """Whether two runs made the same weights: every tensor in the root mean square, and all weights but one in a thousand, within 1e-4.

    AdamW's first step goes by the sign of the gradient, whatever its size. Of a weight whose first gradient is rounding (4e-8 one way, 3e-8
    the other, seen) that sign depends on the processor, and the weight is up to two steps off, 2e-3. A tensor that is not learned in step
    is off as a whole.
    """
    one, two = state(config), state(other)
    off = [(one[name].float() - two[name].float()).abs().flatten() for name in one]
    return all(distance.square().mean().sqrt() < 1e-4 for distance in off) and (torch.cat(off) < 1e-4).float().mean() > 0.999


def test_agree_allows_single_weights_only(monkeypatch):
    weights = {"large": torch.zeros(4000), "small": torch.zeros(4)}
    changed = {"none": ("large", slice(0), 0.0), "one weight's sign": ("large", slice(1), 2e-3), "a tensor": ("small", slice(None), 1e-3),
               "a hundredth": ("large", slice(40), 1e-3), "NaN": ("small", slice(None), torch.nan)}
    found = set()
    for name, (tensor, where, by) in changed.items():
        other = {key: value.clone() for key, value in weights.items()}
        other[tensor][where] += by
        monkeypatch.setitem(globals(), "state", {"one": weights, "other": other}.get)
        if agree("one", "other"):
            found.add(name)
    assert found == {"none", "one weight's sign"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An autoencoder, and a model to start from: its gates are open, else most gradients are so small that AdamW steps along rounding."""
    folder = tmp_path_factory.mktemp("parallel")
    first = tim_yaml(folder, "adamw", "first")
    first.write_text(first.read_text().replace("steps: 6", "steps: 1"))
    _, made = run([autoencoder_yaml(folder), first])
    torch.manual_seed(0)
    with safe_open(made, "pt") as file:
        metadata = file.metadata()
    tensors = {name: value + 0.1 * torch.randn_like(value) if name.startswith("model.") and value.is_floating_point() else value
               for name, value in load_file(made).items()}
    save_file(tensors, folder / "start.safetensors", metadata)
    return folder


@pytest.fixture(scope="module", params=["differential", "composed"])
def alone(folder, request):
    """The target, and the same run in one process."""
    config = configuration(folder, f"alone-{request.param}", request.param)
    run([config])
    return request.param, config


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_two_processes_train_as_one(launch, folder, alone, how):
    target, one = alone
    two = configuration(folder, f"{how}-{target}", target, f", parallel: {how}")
    reports = launch(two)
    assert [report["processes"] for report in reports] == [2, 2]
    if how == "ddp":
        assert all(report["held"] == 1 and report["wrapper"] == "DistributedDataParallel" for report in reports)
    else:
        assert all(0.4 < report["held"] < 0.6 for report in reports)
    images = sum(part.total for step in range(6) for part in ShapesBatches(SizesConfig(SIZES), 4, seed=0)[step])
    assert all(report["rendered"] == report["encoded"] == images / 2 for report in reports)
    assert losses(two) == pytest.approx(losses(one), rel=1e-3, abs=1e-6)
    assert agree(two, one)


PATHS = "paths: [[1, 0.5, 0], [1, 0]], rollout_cfg: 2.0"  # of two processes one has all of the longer ones
BY_START = f"matching: {{batch_fraction: 1.0, teacher: start, {PATHS}}}\ndistillation: {{batch_fraction: 1.0}}\nfreeze_text: true\n"


@pytest.mark.parametrize("target, setting", [("composed", "matching: {batch_fraction: 1.0}\n"), ("teacher", BY_START)])
def test_matching_and_distillation_in_two_processes_and_in_parts(launch, folder, target, setting):
    """The critic learns the same weights, too; every process has jumps and trajectories in every step."""
    made = {}
    for name, more in (("alone", ""), ("ddp", ", parallel: ddp"), ("fsdp2", ", parallel: fsdp2"), ("parts", ", accumulate: 2")):
        made[name] = configuration(folder, f"matched-{target}-{name}", target, more)
        made[name].write_text(setting + made[name].read_text())
        if name in ("alone", "parts"):
            run([made[name]])
        else:
            launch(made[name])
    for name in ("ddp", "fsdp2", "parts"):
        assert losses(made[name]) == pytest.approx(losses(made["alone"]), rel=1e-3, abs=1e-6), name
        assert agree(made[name], made["alone"]), name


def test_fewer_trajectories_than_parts_are_an_error(folder):
    config = configuration(folder, "few", "teacher", ", accumulate: 2")
    config.write_text("distillation: {batch_fraction: 0.1}\n" + config.read_text())
    with pytest.raises(TimError, match="distillation.batch_fraction is 0.1: 1 of 2 items .* 2 parts"):
        run([config])


def test_accumulated_parts_are_one_batch(folder, alone):
    target, one = alone
    parts = configuration(folder, f"parts-{target}", target, ", accumulate: 2, checkpointing: true")
    run([parts])
    assert losses(parts) == pytest.approx(losses(one), rel=1e-3, abs=1e-6)
    assert agree(parts, one)


def test_another_number_of_processes_resumes_a_run(launch, folder, alone):
    """Two processes that shard the weights resume the checkpoint of one process after four steps."""
    target, one = alone
    two = configuration(folder, f"handed-over-{target}", target, ", parallel: fsdp2")
    (place := two.with_suffix("")).mkdir()
    short = configuration(folder, f"short-{target}", target)
    short.write_text(short.read_text().replace("keep: 2", "keep: 9"))
    run([short])
    for name in ("step-00000004.pt", "metrics.csv"):
        (short.with_suffix("") / name).rename(place / name)
    launch(two, resumes=True)
    assert losses(two) == pytest.approx(losses(one), rel=1e-3, abs=1e-6)
    assert agree(two, one)


def test_shards_of_a_batch():
    shards = [Shard(index, 3) for index in range(3)]
    assert [shard.take(list(range(7))) for shard in shards] == [[0, 3, 6], [1, 4], [2, 5]]
    assert sum(shard.loss_weight(7) for shard in shards) == pytest.approx(3)
    means = [sum(shard.take(list(range(7)))) / len(shard.take(list(range(7)))) for shard in shards]
    assert sum(mean * shard.loss_weight(7) for mean, shard in zip(means, shards)) / 3 == pytest.approx(3)
    with pytest.raises(TimError, match="loop.batch: 2 items .* 3 parts .*loop.accumulate"):
        shards[0].loss_weight(2)


def lora_yaml(folder, place, name, more=""):
    """A LoRA on six images."""
    images = place / "images"
    images.mkdir(exist_ok=True)
    for k in range(6):
        if not (images / f"{k}.png").exists():
            Image.new("RGB", (64, 64), (40 * k, 90, 90)).save(images / f"{k}.png")
            (images / f"{k}.txt").write_text(f"image {k}")
    path = place / f"{name}.yaml"
    path.write_text(
        f"kind: finetune\noutput: {place / name}\nmodel: {folder / 'start.safetensors'}\ndata: {{path: {images}, base_pixels: 4096}}\n"
        "lora: {rank: 2}\nshift_base: 64\n"
        f"loop: {{steps: 6, batch: 4, save_every: 3, keep: 9, log_every: 1, workers: 0, warmup: 1, autocast: false{more}}}\n")
    return path


def test_a_lora_in_two_processes(launch, folder, tmp_path):
    """They resume the checkpoint of one process, which holds the trained weights only."""
    one = lora_yaml(folder, tmp_path, "alone")
    run([one])
    whole = torch.load(tmp_path / "alone" / "step-00000006.pt", weights_only=True)
    assert all("lora" in name for part in ("model", "ema") for name in whole[part])
    for how in ("ddp", "fsdp2"):
        two = lora_yaml(folder, tmp_path, how, f", parallel: {how}")
        (tmp_path / how).mkdir()
        for name in ("step-00000003.pt", "metrics.csv"):
            shutil.copy(tmp_path / "alone" / name, tmp_path / how)
        reports = launch(two, resumes=True)
        assert [report["processes"] for report in reports] == [2, 2]
        assert torch.allclose(weights(two), weights(one), atol=1e-5)
        made, expected = (load_file(tmp_path / name / "lora.safetensors") for name in (how, "alone"))
        assert all(torch.allclose(made[name], value, atol=1e-5) for name, value in expected.items())


def test_a_lora_on_a_bfloat16_base_in_two_processes(launch, folder, tmp_path):
    """FSDP2 shards weights of both dtypes; bfloat16 arithmetic agrees within its rounding."""
    one, two = (lora_yaml(folder, tmp_path, name, more) for name, more in (("alone", ""), ("fsdp2", ", parallel: fsdp2")))
    for config in (one, two):
        config.write_text(config.read_text().replace("autocast: false", "autocast: true"))
    run([one])
    reports = launch(two)
    assert all(0.4 < report["held"] < 0.6 for report in reports)
    assert losses(two) == pytest.approx(losses(one), rel=2e-2, abs=1e-3)


@pytest.mark.parametrize("change", [
    ("target: differential", "target: differential, derivative: jvp"),
    pytest.param(("optimizer: adamw", "optimizer: muon"), marks=needs_muon),
])
def test_forward_mode_and_muon_in_two_processes(launch, folder, change):
    name = change[1].split()[-1]
    one, two = (configuration(folder, f"{name}-{how}", "differential", more) for how, more in (("alone", ""), ("ddp", ", parallel: ddp")))
    for config in (one, two):
        assert change[0] in config.read_text()
        config.write_text(config.read_text().replace(*change))
    run([one])
    launch(two)
    assert losses(two) == pytest.approx(losses(one), rel=1e-3, abs=1e-6)
    apart = (weights(two) - weights(one)).abs()
    # Muon makes directions that a batch of four has no gradient in, but for rounding, as long as the others: compared in the mean
    assert apart.max() < 1e-4 if name == "jvp" else apart.mean() < 3e-4


@pytest.mark.parametrize("name", ["WORLD_SIZE", "LOCAL_RANK"])
def test_an_environment_without_numbers_is_one_line(monkeypatch, name):
    monkeypatch.setenv(name, "many")
    with pytest.raises(TimError, match=f"{name} is 'many'.*torchrun"):
        find_processes()


def test_processes_that_cannot_connect_are_one_line(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(TimError, match="WORLD_SIZE is 2.*RANK.*torchrun") as error:
        find_processes()
    assert "\n" not in str(error.value)
