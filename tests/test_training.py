"""The trainer: configurations are checked, runs resume exactly, and what it writes loads."""

import csv
import json
import multiprocessing
import os
import random
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.support import load_all, mentions
from tim_core.cli import main
from tim_core.errors import TimError
from tim_core.models import attention
from tim_core.processes import Processes, Shard
from tim_core.shapes import scenes
from tim_core.shapes.batches import ShapesBatches
from tim_core.shapes.config import SizesConfig
from tim_core.shapes.tokenizer import WORD_START, vocabulary
from tim_core.training import autoencoder as training_autoencoder
from tim_core.training import loop as training_loop
from tim_core.training import metrics, run
from tim_core.training import resume as resuming
from tim_core.training.config import LoopConfig, read
from tim_core.training.transition import TransitionTask
from tim_core.training.writing import write_state
from tim_core.weights.describe import describe
from tim_core.weights.load import load_autoencoder
from tim_core.weights.open import open_state_dict
from tim_core.weights.read import read_parts

ROOT = Path(__file__).parent.parent
START = multiprocessing.get_context("spawn" if os.name == "nt" else "forkserver")
if os.name != "nt":
    START.set_forkserver_preload(["tim_core.training"])  # imported once for all processes that are killed
LOOP = "loop: {steps: 6, batch: 4, save_every: 2, log_every: 2, workers: 0, warmup: 2, keep: 2, optimizer: %s}\n"
HAS_MUON = hasattr(torch.optim, "Muon")
needs_muon = pytest.mark.skipif(not HAS_MUON, reason="torch.optim.Muon came with torch 2.9")


def autoencoder_yaml(folder, optimizer="adamw"):
    path = folder / "autoencoder.yaml"
    path.write_text(
        f"kind: autoencoder\noutput: {folder}/autoencoder\nencoder_widths: [8, 8, 8, 16]\ndecoder_widths: [8, 8, 8, 16]\n"
        "decoder_layers: [0, 1, 1, 1]\nhead_dim: 8\nlatent_channels: 4\ndata: {sizes: {32x32: 1}}\n" + LOOP % optimizer)
    return path


def tim_yaml(folder, optimizer="muon" if HAS_MUON else "adamw", output="tim"):
    path = folder / f"{output}.yaml"
    path.write_text(
        f"kind: tim\noutput: {folder}/{output}\nautoencoder: {folder}/autoencoder/autoencoder.safetensors\n"
        "transformer: {hidden_size: 16, depth: 2, num_heads: 2, lora_hidden_size: 4}\n"
        "text: {hidden_size: 16, layers: 2, heads: 1, head_dim: 16, intermediate_size: 16}\n"
        "objective: {epsilon: 0.01}\ndata: {sizes: {32x32: 0.5, 32x64: 0.5}}\n" + LOOP % optimizer)
    return path


@pytest.mark.parametrize("more", ["", "matching: {batch_fraction: 0.5, critic_warmup_steps: 3}\n"], ids=["", "matching"])
def test_a_run_killed_by_the_system_resumes_exactly(tmp_path, more):
    """kill -9 at three moments: as the first checkpoint is written, as it is renamed, and somewhere in a step after it."""
    config = autoencoder_yaml(tmp_path)
    run([config])
    whole, killed = tim_yaml(tmp_path, output="whole"), tim_yaml(tmp_path, output="killed")
    for path in (whole, killed):
        path.write_text(more + path.read_text().replace("log_every: 2", "log_every: 1"))
    run([whole])
    folder = tmp_path / "killed"
    for pattern, seconds in (("step-00000002.pt.*", 0), ("step-00000002.pt", 0), ("step-00000004.pt", 0.05)):
        process = START.Process(target=run, args=([killed],))
        process.start()
        end = time.monotonic() + 120
        while process.is_alive() and not any(folder.glob(pattern)) and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(seconds)
        assert process.is_alive()  # else there is nothing to kill
        process.kill()
        process.join()
    assert folder.is_dir() and not (folder / "step-00000006.pt").exists()
    run([killed])
    columns = [[{k: v for k, v in row.items() if "second" not in k} for row in csv.DictReader((tmp_path / name / "metrics.csv").open())]
               for name in ("whole", "killed")]
    assert columns[0] == columns[1] and [row["step"] for row in columns[0]] == list("123456")
    weights = [open_state_dict(tmp_path / name / "model.safetensors")[0] for name in ("whole", "killed")]
    assert weights[0].keys() == weights[1].keys() and all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not any("critic" in name for name in weights[0])


def test_batches_are_a_function_of_seed_and_step():
    data = ShapesBatches(SizesConfig({"64x64": 0.5, "48x96": 0.5}), 6, seed=3)
    for step in range(8):
        ((images, captions),), ((again, same),) = data[step], data[step]
        assert torch.equal(images, again) and captions == same
        assert images.shape[-2:] in [(64, 64), (96, 48)] and len(images) == len(captions)
        assert images.min() >= -1 and images.max() <= 1
    assert data[0][0].captions != ShapesBatches(SizesConfig({"64x64": 0.5, "48x96": 0.5}), 6, seed=4)[0][0].captions


def test_a_shard_renders_only_its_own_images(monkeypatch):
    """Together the shards of two processes with two parts each are the whole batch, whose images all differ."""
    rendered, render = [], scenes.render
    monkeypatch.setattr(scenes, "render", lambda *args: rendered.append(args) or render(*args))
    sizes = SizesConfig({"32x32": 1.0}, forms={"single": 1.0})
    (whole,) = ShapesBatches(sizes, 10, seed=3)[5]
    assert whole.total == len(rendered) == 10 and len({image.numpy().tobytes() for image in whole.images}) == 10
    for index in range(2):
        shards = Processes(index, 2, torch.device("cpu")).shards(accumulate=2)
        rendered.clear()
        parts = ShapesBatches(sizes, 10, seed=3, shards=shards)[5]
        assert len(rendered) == 5 == sum(len(part.images) for part in parts)
        for shard, part in zip(shards, parts, strict=True):
            assert torch.equal(part.images, shard.take(whole.images)) and part.captions == whole.captions and part.total == 10


def test_a_batch_has_an_image_for_every_shard():
    sizes = SizesConfig({"32x32": 0.9, "32x64": 0.1})
    assert ShapesBatches(sizes, 4, 0, [Shard(0, 2)]).count((32, 64)) == 2
    with pytest.raises(TimError, match="loop.batch: 2 images of 32x64 .* 3 parts"):
        ShapesBatches(sizes, 4, 0, [Shard(0, 3)])


def test_a_batch_is_for_the_most_frequent_size():
    sizes = SizesConfig({"32x64": 0.3, "32x32": 0.7})
    batches = ShapesBatches(sizes, 4, 0)
    assert sizes.native_size == (32, 32) and batches.count((32, 32)) == 4 and batches.count((32, 64)) == 2


def test_a_batch_is_for_the_native_size_if_one_is_given():
    sizes = SizesConfig({"32x64": 0.3, "32x32": 0.7}, native="32x64")
    batches = ShapesBatches(sizes, 4, 0)
    assert sizes.native_size == (32, 64) and batches.count((32, 32)) == 8 and batches.count((32, 64)) == 4


def test_relations_may_be_chosen():
    chosen = ShapesBatches(SizesConfig(forms={"position": 1.0}, relations=("above", "below")), 16, 0)
    ((_, captions),) = chosen[0]
    assert {word for caption in captions for word in ("above", "below", "left", "right") if word in caption} == {"above", "below"}


def test_training_captions_cover_every_form():
    captions = [c for step in range(60) for c in ShapesBatches(SizesConfig(), 4, seed=0)[step][0].captions]
    assert any(" and " in c for c in captions) and any(c.split()[0] in ("two", "three", "four") for c in captions)
    assert any("left of" in c for c in captions) and any(len(c.split()) == 2 for c in captions)


def test_learning_rate_warms_up_and_falls():
    config = LoopConfig(steps=100, warmup=10, final_lr=0.1)
    rates = [training_loop.learning_rate(config, k) for k in range(100)]
    assert rates[:10] == pytest.approx([(k + 1) / 10 for k in range(10)])
    assert all(a >= b for a, b in zip(rates[10:], rates[11:])) and 0.1 <= rates[-1] < 0.11


def killed(monkeypatch, config, function: str, at: int):
    """Runs `config` until `save` of the loop or `log` of the metrics has ended for step `at`. -> the steps that it was called for."""
    module = metrics if function == "log" else training_loop
    real, steps = getattr(module, function), []

    def dies(folder, *rest):
        real(folder, *rest)
        steps.append(int(rest[0]["step"]) if function == "log" else rest[1])
        if steps[-1] == at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, function, dies)
        with pytest.raises(KeyboardInterrupt):
            run([config])
    return steps


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=needs_muon)])
def test_a_killed_run_continues_as_if_nothing_happened(tmp_path, monkeypatch, optimizer):
    run([autoencoder_yaml(tmp_path)])
    whole = run([tim_yaml(tmp_path, optimizer)])[0]

    config = tim_yaml(tmp_path, optimizer, "killed")
    assert killed(monkeypatch, config, "save", at=4) == [2, 4]
    resumed = run([config])[0]

    a, b = open_state_dict(whole)[0], open_state_dict(resumed)[0]
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key
    rows = list(csv.DictReader((tmp_path / "killed" / "metrics.csv").open()))
    assert [int(row["step"]) for row in rows] == [2, 4, 6]
    assert len(list((tmp_path / "killed").glob("step-*.pt"))) == 2 and not list((tmp_path / "killed").glob("*.part"))


def test_a_run_killed_before_its_last_export_still_makes_its_file(tmp_path, monkeypatch):
    run([autoencoder_yaml(tmp_path)])
    killed(monkeypatch, tim_yaml(tmp_path), "save", at=6)
    file = tmp_path / "tim" / "model.safetensors"
    assert read_parts(file).metadata["training"]["step"] == 4
    assert run([tim_yaml(tmp_path)]) == [file]
    assert read_parts(file).metadata["training"]["step"] == 6


def test_metrics_hold_every_step_once_after_a_resume(tmp_path, monkeypatch):
    config = autoencoder_yaml(tmp_path)
    config.write_text(config.read_text().replace("log_every: 2", "log_every: 1").replace("save_every: 2", "save_every: 4"))
    whole = list(csv.DictReader((run([config])[0].parent / "metrics.csv").open()))
    config.write_text(config.read_text().replace(f"{tmp_path}/autoencoder", f"{tmp_path}/again"))
    killed(monkeypatch, config, "log", at=5)
    rows = list(csv.DictReader((run([config])[0].parent / "metrics.csv").open()))
    assert [row["step"] for row in rows] == ["1", "2", "3", "4", "5", "6"]
    assert [row["loss"] for row in rows] == [row["loss"] for row in whole]


def test_metrics_of_a_run_killed_between_two_rows_are_means_over_all_steps(tmp_path, monkeypatch):
    config = autoencoder_yaml(tmp_path)
    config.write_text(config.read_text().replace("log_every: 2", "log_every: 3"))
    whole = list(csv.DictReader((run([config])[0].parent / "metrics.csv").open()))
    config.write_text(config.read_text().replace(f"{tmp_path}/autoencoder", f"{tmp_path}/again"))
    killed(monkeypatch, config, "save", at=4)
    rows = list(csv.DictReader((run([config])[0].parent / "metrics.csv").open()))
    assert [row["step"] for row in rows] == ["3", "6"]
    assert [float(row["l1"]) for row in rows] == pytest.approx([float(row["l1"]) for row in whole], rel=1e-6)


def with_rate(monkeypatch, rate: float, which: slice = slice(None)) -> None:
    """Trains with a learning rate that no configuration takes; which: of the optimisers."""
    real = training_loop.optimizers

    def optimizers(*arguments):
        made = real(*arguments)
        for options in (options for optimizer in made[which] for options in optimizer.param_groups):
            options["base_lr"] = rate
        return made

    monkeypatch.setattr(training_loop, "optimizers", optimizers)


def test_weights_that_are_no_numbers_stop_the_run_and_are_not_kept(tmp_path, monkeypatch):
    run([autoencoder_yaml(tmp_path)])
    path = tim_yaml(tmp_path, "adamw")
    path.write_text(path.read_text().replace("warmup: 2", "warmup: 2, clip: 1.0e+6"))
    with_rate(monkeypatch, 1e10)
    with pytest.raises(TimError, match="(loss|diffusion|transition|grad_norm) is (nan|inf) at step [2-6]"):
        run([path])
    for file in (tmp_path / "tim").glob("step-*.pt"):
        assert all(value.isfinite().all() for value in torch.load(file, weights_only=True)["ema"].values())


@needs_muon
def test_a_resumed_run_lists_changed_values(tmp_path, monkeypatch, capsys):
    run([autoencoder_yaml(tmp_path), tim_yaml(tmp_path)])
    path = tim_yaml(tmp_path)
    path.write_text(path.read_text().replace("epsilon: 0.01", "epsilon: 0.02"))
    with pytest.raises(TimError, match="objective.epsilon 0.01, the configuration has 0.02"):
        run([path])
    path.write_text(path.read_text().replace("steps: 6", "steps: 8"))
    run([path])
    output = capsys.readouterr().err
    assert "objective.epsilon: 0.01 -> 0.02" in output and "loop.steps: 6 -> 8" in output
    path.write_text(path.read_text().replace("workers: 0", "workers: 1, weight_decay: 0.5"))
    with pytest.raises(TimError, match="loop.weight_decay"):
        run([path])
    path.write_text(path.read_text().replace("steps: 8", "steps: 10"))
    made_by, real = [], training_loop.optimizers
    monkeypatch.setattr(training_loop, "optimizers", lambda *a: made_by.extend(found := real(*a)) or found)
    (made,) = run([path])
    assert {group["weight_decay"] for optimizer in made_by for group in optimizer.param_groups} == {0.5}
    output = str(describe(made))
    assert '6: {"loop.steps": [6, 8], "objective.epsilon": [0.01, 0.02]}' in output and '"loop.weight_decay": [0.01, 0.5]' in output
    for before, now, key in (("optimizer: muon", "optimizer: adamw", "loop.optimizer"),
                             ("kind: tim", "kind: tim\nadd_embedding: {red: blue}", "add_embedding")):
        other = tmp_path / "other.yaml"
        other.write_text(path.read_text().replace(before, now).replace("steps: 10", "steps: 12"))
        with pytest.raises(TimError, match=f"its run has {key} .*, the configuration has "):
            run([other])


def test_keys_of_another_version_are_no_change():
    before = {"loop": {"steps": 6, "lr": 0.1}, "gone": 1, "data": {"sizes": {"32x32": 1.0}}}
    now = {"loop": {"steps": 6, "lr": 0.2, "new": True}, "data": {"sizes": {"32x32": 1.0, "64x64": 1.0}}}
    assert resuming.differences(before, now) == {
        "loop.lr": [0.1, 0.2], "data.sizes": [{"32x32": 1.0}, {"32x32": 1.0, "64x64": 1.0}]}


def test_a_native_size_is_a_change_of_a_run_from_before_there_was_a_key():
    before, now = {"data": {"sizes": {"32x32": 1.0}}}, {"data": {"sizes": {"32x32": 1.0}, "native": "32x32"}}
    assert resuming.differences(resuming._with_later_keys(before), now) == {"data.native": [None, "32x32"]}
    assert not resuming.differences(resuming._with_later_keys(before), {"data": before["data"] | {"native": None}})


def test_flash_attention_runs_where_its_numbers_are_half(tmp_path, monkeypatch):
    """Of its package, which is not here, only what it refuses."""
    def halves_only(q, k, v):
        assert q.dtype == k.dtype == v.dtype == torch.bfloat16
        return attention.sdpa(q, k, v)

    run([autoencoder_yaml(tmp_path)])
    path = tim_yaml(tmp_path)
    path.write_text("attention: flash\n" + path.read_text())
    with pytest.raises(TimError, match="flash-attn is not installed"):
        run([path])
    monkeypatch.setattr(attention, "_flash_attn_func", lambda: None)
    monkeypatch.setitem(attention.BACKENDS, "flash", halves_only)
    assert run([path])[0].is_file() and (tmp_path / "tim" / "sample-00000006.png").is_file()
    path.write_text(path.read_text().replace("steps: 6", "autocast: false, steps: 6"))
    with pytest.raises(TimError, match='attention is "flash"; use eager or sdpa without loop.autocast'):
        run([path])


def test_a_critic_with_nan_weights_is_not_saved(tmp_path, monkeypatch):
    run([autoencoder_yaml(tmp_path)])
    path = tim_yaml(tmp_path, "adamw")
    path.write_text("matching: {batch_fraction: 0.5}\n" + path.read_text())
    with_rate(monkeypatch, 1e30, slice(-1, None))
    with pytest.raises(TimError, match="is (nan|inf) at step"):
        run([path])
    for file in (tmp_path / "tim").glob("step-*.pt"):
        assert all(value.isfinite().all() for value in torch.load(file, weights_only=True)["model"].values())


@needs_muon
def test_a_critic_learns_first_and_by_its_own_optimiser(tmp_path, monkeypatch):
    """While critic_warmup_steps lasts nothing else moves, though Muon's steps are of one size whatever the gradient."""
    first = run([autoencoder_yaml(tmp_path), tim_yaml(tmp_path)])[1]
    before, real = {}, training_loop.optimizers

    def spied(config, groups):
        trained = {name: p for group in groups for name, p in group.parameters.items()}
        before.update({name: p.detach().clone() for name, p in trained.items()})
        found, names = real(config, groups), {id(p): name for name, p in trained.items()}
        for optimizer in found:
            (group,) = optimizer.param_groups
            own, muon = {names[id(p)] for p in group["params"]}, isinstance(optimizer, torch.optim.Muon)
            (of_critic,) = {name.startswith("critic.") for name in own}
            rates = (3e-4, 0.02) if of_critic else (config.lr, config.muon_lr)
            assert group["lr"] == rates[muon] and group["start_step"] == (0 if of_critic else 4)
            assert all(muon == ("blocks." in name and "adaLN" not in name and before[name].ndim == 2) for name in own)
        assert len(found) == 4
        return found

    monkeypatch.setattr(training_loop, "optimizers", spied)
    path = tim_yaml(tmp_path, "muon", "sharp")
    matching = "batch_fraction: 0.5, teacher: start, critic_warmup_steps: 4, critic_muon_lr: 0.02"
    text = path.read_text().replace("{epsilon: 0.01}", "{target: teacher}")
    path.write_text(f"start: {first}\nmatching: {{{matching}}}\nfreeze_text: true\n{text}")
    run([path])
    saved = [torch.load(tmp_path / "sharp" / f"step-0000000{step}.pt", weights_only=True)["model"] for step in (4, 6)]
    moved = [{name for name, value in before.items() if not torch.equal(value, model[name])} for model in saved]
    critic = {name for name in before if name.startswith("critic.")}
    assert moved[0] <= critic and any("blocks" in name for name in moved[0])
    assert any("blocks" in name for name in moved[1] - critic)


def test_a_checkpoint_of_other_optimisers_is_not_taken_up(tmp_path, monkeypatch):
    """Before the critic had Muon, the same configuration had another optimiser for its matrices."""
    run([autoencoder_yaml(tmp_path)])
    path = tim_yaml(tmp_path)
    path.write_text("matching: {batch_fraction: 0.5}\n" + path.read_text())
    killed(monkeypatch, path, "save", at=4)
    (tmp_path / "tim" / "step-00000006.pt").unlink(missing_ok=True)
    newest = max((tmp_path / "tim").glob("step-*.pt"))
    state = torch.load(newest, weights_only=True)
    adam = state["optimizers"]["state"]["critic.x_embedder.proj.bias"]
    for name, value in state["optimizers"]["state"].items():
        if "momentum_buffer" in value and name.startswith("critic."):
            state["optimizers"]["state"][name] = {**dict.fromkeys(adam, value["momentum_buffer"]), "step": adam["step"]}
    torch.save(state, newest)
    with pytest.raises(TimError, match="optimiser state does not fit"):
        run([path])


def test_metrics_of_an_older_version_keep_their_rows(tmp_path):
    rows = tmp_path / "metrics.csv"
    metrics.log(tmp_path, {"step": 1, "loss": 0.5})
    metrics.log(tmp_path, {"step": 2, "loss": 0.4, "diffusion": 3.0})
    metrics.log(tmp_path, {"step": 3, "loss": 0.3, "diffusion": 2.0})
    metrics.forget_after(tmp_path, 2)
    assert rows.read_text().split() == ["step,loss,diffusion", "1,0.5,", "2,0.4,3.0"]


def test_a_damaged_row_of_metrics_is_dropped(tmp_path):
    run([autoencoder_yaml(tmp_path)])
    rows = tmp_path / "autoencoder" / "metrics.csv"
    whole = rows.read_text()
    rows.write_text(whole + "\n8,1")
    path = autoencoder_yaml(tmp_path)
    path.write_text(path.read_text().replace("steps: 6", "steps: 8"))
    run([path])
    assert [row["step"] for row in csv.DictReader(rows.open())] == ["2", "4", "6", "8"] and rows.read_text().startswith(whole)


def test_a_run_out_of_time_says_so(tmp_path):
    config = autoencoder_yaml(tmp_path)
    config.write_text(config.read_text().replace("steps: 6", "steps: 100000, seconds: 1"))
    with pytest.raises(TimError, match="of 100000 after 1 s"):
        run([config])


def test_a_frozen_encoder_stays_as_it_is(tmp_path):
    first = run([autoencoder_yaml(tmp_path)])[0]
    more = tmp_path / "decoder.yaml"
    text = autoencoder_yaml(tmp_path).read_text().replace(f"output: {tmp_path}/autoencoder", f"output: {tmp_path}/decoder")
    more.write_text(text + f"start: {first}\nfreeze_encoder: true\n")
    before, after = (open_state_dict(file)[0] for file in (first, run([more])[0]))
    same = {key for key in before if torch.equal(before[key], after[key])}
    assert {key for key in before if key.startswith("encoder.")} <= same
    assert any(key.startswith("decoder.") for key in before.keys() - same)


def test_other_frozen_weights_are_noticed_at_a_resume(tmp_path):
    """They are in no checkpoint; the file that they come from may have been replaced."""
    first = run([autoencoder_yaml(tmp_path)])[0]
    text = autoencoder_yaml(tmp_path).read_text().replace(f"output: {tmp_path}/autoencoder", f"output: {tmp_path}/decoder")
    config = tmp_path / "decoder.yaml"
    config.write_text(text.replace("steps: 6", "steps: 4") + f"start: {first}\nfreeze_encoder: true\n")
    run([config])
    config.write_text(config.read_text().replace("steps: 4", "steps: 6"))
    tensors = open_state_dict(first)[0]
    with safe_open(first, "pt") as file:
        metadata = file.metadata()
    save_file({name: value + 1 for name, value in tensors.items()}, first, metadata)
    with pytest.raises(TimError, match="the frozen weights differ"):
        run([config])
    save_file(tensors, first, metadata)
    run([config])


def test_the_ema_shares_frozen_weights():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[0].requires_grad_(False)
    average = training_loop.make_ema(model, share_fixed=True)
    assert average[0].weight is model[0].weight and average[1].weight is not model[1].weight
    assert training_loop.make_ema(model, share_fixed=False)[0].weight is not model[0].weight


def test_a_checkpoint_of_an_earlier_version_resumes(tmp_path):
    """It lacks the sums of the steps not yet in metrics.csv, and has the EMA of frozen weights."""
    config = autoencoder_yaml(tmp_path)
    run([config])
    (last := tmp_path / "autoencoder" / "step-00000006.pt").unlink()
    earlier = last.with_name("step-00000004.pt")
    state = torch.load(earlier, weights_only=True)
    for name in ("totals", "counted", "fixed"):
        del state[name]
    torch.save(state, earlier)
    run([config])
    assert last.is_file()


@pytest.mark.parametrize("change, named", [
    ("sizes: {32x32: 0.5, 32x64: 0.5}", 'data.sizes is "40x32"; use multiples of 24 pixels'),
    ("num_heads: 2", "3 heads"),
])
def test_what_does_not_fit_is_said_before_the_first_step(tmp_path, change, named):
    run([autoencoder_yaml(tmp_path)])
    path = tim_yaml(tmp_path)
    other = {"sizes": "sizes: {48x48: 1, 40x32: 1}", "num_heads": "num_heads: 3"}[change.partition(":")[0]]
    text = path.read_text().replace(change, other)
    path.write_text(text.replace("depth: 2", "depth: 2, patch_size: 3") if "sizes" in change else text)
    with pytest.raises(TimError) as error:
        run([path])
    assert named in str(error.value) and not (tmp_path / "tim").exists()


def test_model_guidance_trains_with_the_averaged_network(tmp_path):
    """Eq. 51 at w_gt 1 is the plain target; below 1 the averaged network's answers for the text and for none are mixed in."""
    run([autoencoder_yaml(tmp_path)])
    losses = {}
    for w_gt, w_cond in ((1.0, 0.0), (0.5, 0.0), (0.5, 0.5)):
        path = tim_yaml(tmp_path, output=f"guided-{w_gt}-{w_cond}")
        text = path.read_text().replace("{epsilon: 0.01}", f"{{enhance_target: true, w_gt: {w_gt}, w_cond: {w_cond}}}")
        path.write_text(text.replace("warmup: 2", "warmup: 2, ema: 0, lr: 0.05"))  # fast enough for text to matter
        run([path])
        losses[w_gt, w_cond] = [row["loss"] for row in csv.DictReader((path.with_suffix("") / "metrics.csv").open())]
    plain = tim_yaml(tmp_path, output="plain")
    plain.write_text(plain.read_text().replace("{epsilon: 0.01}", "{}").replace("warmup: 2", "warmup: 2, ema: 0, lr: 0.05"))
    run([plain])
    assert losses[1.0, 0.0] == [row["loss"] for row in csv.DictReader((tmp_path / "plain" / "metrics.csv").open())]
    assert len({tuple(some) for some in losses.values()}) == 3


def test_the_export_is_interpolated_with_start(tmp_path):
    run([autoencoder_yaml(tmp_path)])
    (first,) = run([tim_yaml(tmp_path, output="first")])
    made = []
    for share in (0.0, 0.25):
        path = tim_yaml(tmp_path, output=f"kept-{share}")
        path.write_text(f"start: {first}\ninterpolate_start: {share}\n" + path.read_text().replace("warmup: 2", "warmup: 2, lr: 0.05"))
        made += run([path])
    before, after, mixed = (open_state_dict(file)[0] for file in (first, *made))
    name = "model.diffusion_model.blocks.0.attn.qkv.weight"
    before, after, mixed = (tensors[name].float() for tensors in (before, after, mixed))
    assert (after - before).abs().max() > 1e-2
    assert torch.allclose(mixed, 0.75 * after + 0.25 * before, atol=1e-2 * float(after.std()))


def test_a_made_file_does_not_name_the_home_of_its_maker(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    run([autoencoder_yaml(tmp_path)])
    made = read_parts(run([tim_yaml(tmp_path)])[0])
    assert made.metadata["training"]["configuration"]["autoencoder"] == "~/autoencoder/autoencoder.safetensors"
    assert str(tmp_path) not in str(made.metadata)


@pytest.mark.parametrize(
    "key, value, other", [("positions", '"grid"', '"official"'), ("new_condition", '"t,r"', '"t-r"'), ("num_heads", 4, 2)])
def test_what_tensors_do_not_show_is_recorded_and_kept(tmp_path, key, value, other):
    run([autoencoder_yaml(tmp_path)])
    first, more = tim_yaml(tmp_path, "adamw"), tim_yaml(tmp_path, "adamw", "more")
    text = first.read_text().replace("steps: 6", "steps: 1").replace("num_heads: 2,", "qk_norm: false, num_heads: 2,")

    def having(setting) -> str:
        return re.sub(f" {key}: [^,]*,", "", text).replace("depth: 2,", f"depth: 2, {key}: {setting},")

    first.write_text(having(value))
    made = run([first])[0]
    assert json.dumps(getattr(read_parts(made)["transformer"].config, key)) == str(value)
    more.write_text(f"start: {made}\n" + having(other).replace("/tim\n", "/more\n"))
    with pytest.raises(TimError, match=f"transformer.{key} is {other}; use {value}, as .*model.safetensors does"):
        run([more])
    first.write_text(having(other).replace("steps: 1", "steps: 2"))
    with pytest.raises(TimError, match=f"its run has transformer.{key} {value}, the configuration has {other}"):
        run([first])


@pytest.mark.parametrize("forget", [lambda s: s["settings"]["transformer"].pop("positions"), lambda s: s.update(settings=None)])
def test_a_run_from_before_positions_could_be_chosen_had_the_official_ones(tmp_path, forget):
    run([autoencoder_yaml(tmp_path)])
    path = tim_yaml(tmp_path, "adamw")
    path.write_text(path.read_text().replace("depth: 2,", "depth: 2, positions: official,").replace("steps: 6", "steps: 2"))
    run([path])
    file = tmp_path / "tim" / "step-00000002.pt"
    state = torch.load(file, weights_only=True)
    forget(state)
    write_state(file, state)
    run([path])
    path.write_text(path.read_text().replace("positions: official", "positions: grid"))
    with pytest.raises(TimError, match='finished, with transformer.positions "official", the configuration has "grid"'):
        run([path])


def test_the_embedding_of_another_word_is_added(tmp_path):
    first = run([autoencoder_yaml(tmp_path), tim_yaml(tmp_path)])[1]
    config = tim_yaml(tmp_path, "adamw", "add_embedding")
    config.write_text(f"start: {first}\nadd_embedding: {{above: left}}\n" + config.read_text().replace("steps: 6", "steps: 1").replace(
        "loop: {", "loop: {lr: 1.0e-9, "))
    name = "text_encoders.transformer.embed_tokens.weight"
    before, after = (open_state_dict(file)[0][name].float() for file in (first, run([config])[0]))
    ids = vocabulary()
    above, left, below = (ids[WORD_START + word] for word in ("above", "left", "below"))
    assert torch.allclose(after[above], before[above] + before[left], atol=1e-2) and after[above].norm() > 1.05 * before[above].norm()
    assert torch.allclose(after[below], before[below], atol=1e-3)


def test_composed_targets_come_from_the_averaged_network(tmp_path):
    """Two EMA rates: the same targets at the first step, other targets after it."""
    run([autoencoder_yaml(tmp_path)])
    transitions = []
    for ema in (0, 0.9):
        path = tim_yaml(tmp_path, output=f"ema-{ema}")
        text = path.read_text().replace("{epsilon: 0.01}", "{target: composed}")
        path.write_text(text.replace("log_every: 2", f"ema: {ema}, lr: 0.05, log_every: 1"))
        run([path])
        transitions.append([float(row["transition"]) for row in csv.DictReader((path.with_suffix("") / "metrics.csv").open())])
    same = [one == other for one, other in zip(*transitions, strict=True)]
    assert same[0] and not any(same[1:]) and len(same) >= 3


def test_the_teacher_of_the_matching_is_the_ema_or_start(tmp_path, monkeypatch):
    first = run([autoencoder_yaml(tmp_path), tim_yaml(tmp_path)])[1]
    files, found = {}, {}
    for name, teacher in (("average", "average"), ("start", "start"), ("killed", "start")):
        path = tim_yaml(tmp_path, "adamw", name)
        text = path.read_text().replace("log_every: 2", "log_every: 1, lr: 0.01, ema: 0.5")
        path.write_text(f"start: {first}\nmatching: {{batch_fraction: 0.5, teacher: {teacher}}}\n{text}")
        if name == "killed":
            killed(monkeypatch, path, "save", at=4)
        (files[name],) = run([path])
        found[name] = [row["matching"] for row in csv.DictReader((tmp_path / name / "metrics.csv").open())]
    same = [one == other for one, other in zip(found["average"], found["start"], strict=True)]
    assert same[0] and not any(same[2:]) and found["killed"] == found["start"]
    weights = [open_state_dict(files[name])[0] for name in ("start", "killed")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def distilling(folder, name, first, more=""):
    path = tim_yaml(folder, "adamw", name)
    text = path.read_text().replace("log_every: 2", "log_every: 1, lr: 0.01, ema: 0.5").replace("{epsilon: 0.01}", "{target: teacher}")
    path.write_text(f"start: {first}\ndistillation: {{batch_fraction: 0.5}}\n{more}{text}")
    return path


@pytest.mark.parametrize("freeze", [True, False])
def test_distilling_the_weights_in_start(tmp_path, monkeypatch, freeze):
    """The rest of the network stays near the teacher, and a killed run resumes with the same teacher."""
    first = run([autoencoder_yaml(tmp_path), tim_yaml(tmp_path)])[1]
    more, files, found = "freeze_text: true\n" if freeze else "", {}, {}
    for name in ("whole", "killed"):
        path = distilling(tmp_path, name, first, more)
        if name == "killed":
            killed(monkeypatch, path, "save", at=4)
        (files[name],) = run([path])
        found[name] = list(csv.DictReader((tmp_path / name / "metrics.csv").open()))
    assert [row["distillation"] for row in found["whole"]] == [row["distillation"] for row in found["killed"]]
    first_error, last_error = (float(found["whole"][step]["diffusion"]) for step in (0, -1))
    assert first_error < 1e-6 < 1e-3 < last_error  # the teacher has the weights in start, and keeps them
    before, whole, again = (open_state_dict(file)[0] for file in (first, files["whole"], files["killed"]))
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], whole[name])}
    assert changed == ({"model"} if freeze else {"model", "text_encoders"}), changed


def test_the_distillation_has_a_weight(tmp_path):
    first = run([autoencoder_yaml(tmp_path), tim_yaml(tmp_path)])[1]
    rows = []
    for weight in (1.0, 3.0):
        path = distilling(tmp_path, f"weight-{weight}", first)
        path.write_text(path.read_text().replace("{batch_fraction: 0.5}", f"{{batch_fraction: 0.5, weight: {weight}}}"))
        run([path])
        rows.append(next(csv.DictReader((path.with_suffix("") / "metrics.csv").open())))
    once, thrice = ({name: float(row[name]) for name in ("loss", "distillation")} for row in rows)
    assert once["distillation"] == thrice["distillation"] > 0
    assert thrice["loss"] - once["loss"] == pytest.approx(2 * once["distillation"], rel=1e-4)


def test_a_run_resumes_with_the_same_teacher_or_not_at_all(tmp_path, monkeypatch):
    """Other weights in `start`, or a text model that is no longer trained, are errors."""
    first, other = (run([autoencoder_yaml(tmp_path), tim_yaml(tmp_path, output=name)])[1] for name in ("first", "other"))
    path = distilling(tmp_path, "killed", first)
    killed(monkeypatch, path, "save", at=2)
    path.write_text("freeze_text: true\n" + (text := path.read_text()))
    with pytest.raises(TimError, match="its run has freeze_text false, the configuration has true"):
        run([path])
    path.write_text(text)
    first.write_bytes(changed(other))
    with pytest.raises(TimError, match="the frozen weights differ"):
        run([path])


@pytest.mark.parametrize("which", ["autoencoder", "start", "scaling_factor"])
def test_files_that_were_replaced_are_noticed_at_a_resume(tmp_path, monkeypatch, which):
    """The autoencoder, whose latents are learned, and start, which the export is interpolated with."""
    coder, first = run([autoencoder_yaml(tmp_path), tim_yaml(tmp_path, output="first")])
    path = tim_yaml(tmp_path, "adamw", "killed")
    path.write_text(f"start: {first}\ninterpolate_start: 0.25\n{path.read_text()}")
    killed(monkeypatch, path, "save", at=4)
    before = coder.read_bytes(), first.read_bytes()
    if which == "start":
        first.write_bytes(changed(first))
    else:
        tensors, metadata = open_state_dict(coder)
        if which == "autoencoder":
            tensors = {name: value + 0.01 for name, value in tensors.items()}
        else:
            metadata = {"tim": json.dumps({**json.loads(metadata["tim"]), "scaling_factor": 0.5})}
        save_file({name: value.clone() for name, value in tensors.items()}, coder, metadata)
    with pytest.raises(TimError) as error:
        run([path])
    assert mentions(str(error.value), "step-00000004.pt", "frozen weights differ", "another output")
    for file, content in zip((coder, first), before, strict=True):
        file.write_bytes(content)
    run([path])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The configuration and folder of a run with checkpoints of steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("finished")
    config = autoencoder_yaml(folder)
    config.write_text(config.read_text().replace("keep: 2", "keep: 9"))
    run([config])
    return config, folder / "autoencoder"


def copied(finished, folder):
    """The same run in another folder."""
    config, source = finished
    shutil.copytree(source, folder / "autoencoder")
    (folder / config.name).write_text(config.read_text().replace(str(source.parent), str(folder)))
    return folder / config.name


def flip(file, position, bit=0):
    data = bytearray(file.read_bytes())
    data[position] ^= 1 << bit
    file.write_bytes(data)


def flip_weight(file):
    """Changes a bit of a weight; other places of the file may be padding, which no reader looks at."""
    weight = next(p for p in torch.load(file, weights_only=True)["model"].values() if p.ndim == 1)
    flip(file, file.read_bytes().index(weight.numpy().tobytes()) + 3)


def test_a_changed_bit_in_a_checkpoint_leads_to_the_one_before(finished, tmp_path, capsys):
    """With one line; the run ends as it did. Without one before it, the run is refused."""
    config, place = copied(finished, tmp_path), tmp_path / "autoencoder"
    whole = open_state_dict(place / "autoencoder.safetensors")[0]
    flip_weight(place / "step-00000006.pt")
    run([config])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "damaged" in line]
    assert mentions(line, place / "step-00000006.pt", "damaged", "resuming from step-00000004.pt")
    again = open_state_dict(place / "autoencoder.safetensors")[0]
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    for file in place.glob("step-*.pt"):
        flip_weight(file)
    with pytest.raises(TimError) as error:
        run([config])
    assert mentions(str(error.value), place / "step-00000006.pt", "damaged", "another output")


def test_no_changed_bit_is_taken_for_a_weight(finished, tmp_path):
    """It is noticed, or the state is as it was."""
    file = Path(shutil.copy(finished[1] / "step-00000006.pt", tmp_path))
    whole, data, rng = resuming.load(file), file.read_bytes(), random.Random(0)
    noticed = 0
    for position in [*range(0, 200, 7), *(rng.randrange(len(data)) for _ in range(60)), *range(len(data) - 200, len(data), 7)]:
        file.write_bytes(data)
        flip(file, position, rng.randrange(8))
        try:
            found = resuming.load(file)
        except TimError as error:
            assert str(file) in str(error)
            noticed += 1
        else:
            assert all(torch.equal(found.model[name], value) for name, value in whole.model.items())
            assert all(torch.equal(found.ema[name], value) for name, value in whole.ema.items())
            assert found.step == 6 and found.settings == whole.settings and found.fixed == whole.fixed
    assert noticed > 50


def test_later_damaged_checkpoints_do_not_push_out_whole_ones(finished, tmp_path, monkeypatch):
    config, place = copied(finished, tmp_path), tmp_path / "autoencoder"
    config.write_text(config.read_text().replace("save_every: 2", "save_every: 1").replace("keep: 9", "keep: 1"))
    flip_weight(place / "step-00000006.pt")
    killed(monkeypatch, config, "save", at=5)
    assert resuming.load(place / "step-00000005.pt").step == 5


FOREIGN = {  # what an edited or foreign file holds, made from the state of a run
    "a tensor": lambda state: next(iter(state["model"].values())), "an empty dict": lambda state: {},
    "no step": lambda state: {key: value for key, value in state.items() if key != "step"},
    "a negative step": lambda state: {**state, "step": -6}, "a step in words": lambda state: {**state, "step": "six"},
    "another step": lambda state: {**state, "step": 4}, "no seconds": lambda state: {**state, "seconds": "many"},
    "endless totals": lambda state: {**state, "totals": {"loss": float("inf")}},
    "a list of totals": lambda state: {**state, "totals": [1.0]},
    "a list of settings": lambda state: {**state, "settings": []}, "a list of changes": lambda state: {**state, "changed": {"4": [1, 2]}},
    "a number for the model": lambda state: {**state, "model": 3}, "no model": lambda state: {**state, "model": {}},
    "numbers in the model": lambda state: {**state, "model": dict.fromkeys(state["model"], 1.0)},
    "no average": lambda state: {**state, "ema": {}}, "no optimisers": lambda state: {**state, "optimizers": {}},
    "a list of optimisers": lambda state: {**state, "optimizers": [1]},
    "moments of another shape": lambda state: {**state, "optimizers": {**state["optimizers"], "state": {
        name: {key: value if not value.ndim else value.flatten()[:2] for key, value in entries.items()}
        for name, entries in state["optimizers"]["state"].items()}}},
}


@pytest.mark.parametrize("name", FOREIGN)
def test_an_edited_or_foreign_checkpoint_is_one_line(finished, tmp_path, name):
    config, place = copied(finished, tmp_path), tmp_path / "autoencoder"
    config.write_text(config.read_text().replace("steps: 6", "steps: 8"))
    file = place / "step-00000006.pt"
    torch.save(FOREIGN[name](torch.load(file, weights_only=True)), file)
    with pytest.raises(TimError) as error:
        run([config])
    assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_other_files_in_the_folder_are_no_checkpoints(finished, tmp_path):
    config, place = copied(finished, tmp_path), tmp_path / "autoencoder"
    for name in ("step-00000004-copy.pt", "step-old.pt", "step-00000009.pt.bak"):
        (place / name).write_bytes(b"mine")
    assert run([config])[0].is_file() and len(list(place.glob("step-*"))) == 6


@pytest.mark.parametrize("more", ["lr: 0.5", "seed: 3", "batch: 5", "ema: 0.5"])
def test_a_finished_run_with_other_settings_is_an_error(finished, tmp_path, more):
    config = copied(finished, tmp_path)
    config.write_text(config.read_text().replace("batch: 4", more if "batch" in more else f"batch: 4, {more}"))
    key, value = more.split(": ")
    with pytest.raises(TimError) as error:
        run([config])
    assert mentions(str(error.value), "finished", f"loop.{key}", value, "another output")


def test_means_of_losses_that_only_earlier_steps_had(monkeypatch):
    """After a resume in two processes, whose sums are numbers; here both processes have the same."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.mul_(2))
    sums = training_loop.Sums({"loss": 3.0, "matching": 4.0}, 3)
    sums.add({"loss": torch.tensor(1.0)})
    assert sums.means(Processes(0, 2, torch.device("cpu")), 4) == {"loss": 1.0, "matching": 1.0}


@pytest.mark.parametrize("missing", [True, False])
def test_an_export_without_all_weights_is_an_error(tmp_path, missing):
    run([autoencoder_yaml(tmp_path)])
    task = TransitionTask(read(tim_yaml(tmp_path)), None)
    weights = {name: p.detach() for name, p in task.model.named_parameters()}
    weights = {name: p for name, p in weights.items() if "blocks.1" not in name} if missing else {**weights, "more": torch.ones(1)}
    with pytest.raises(TimError) as error:
        task.export(weights, {"step": 2})
    assert mentions(str(error.value), "averaged weights", "missing" if missing else "unknown")
    assert not (tmp_path / "tim").exists()


def changed(file):
    """The bytes of a checkpoint of the same architecture, with other weights in its transformer."""
    tensors, metadata = open_state_dict(file)
    tensors = {name: value + (name.endswith("final_layer.linear.bias")) for name, value in tensors.items()}
    save_file({name: value.contiguous() for name, value in tensors.items()}, file, metadata)
    return file.read_bytes()


@pytest.mark.parametrize("target, message", [("model.bin", "model.bin: .*safetensors"), ("", "is a folder"),
                                          ("nowhere/model.safetensors", "nowhere does not exist")])
def test_a_path_that_cannot_be_written_is_an_error_before_the_first_step(tmp_path, target, message):
    run([autoencoder_yaml(tmp_path)])
    path = tim_yaml(tmp_path)
    path.write_text(f"checkpoint: {tmp_path / target}\n" + path.read_text())
    with pytest.raises(TimError, match=message):
        run([path])
    assert not (tmp_path / "tim").exists()


def test_a_folder_where_a_file_is_to_be_written_is_an_error_before_the_first_step(tmp_path):
    """For every kind: `checkpoint` at the end, a name in `output` until then."""
    for name in ("autoencoder/autoencoder.safetensors", "tim/model.safetensors", "tuned/lora.safetensors"):
        (tmp_path / name).mkdir(parents=True)
    tuned = tmp_path / "tuned.yaml"
    tuned.write_text(f"kind: finetune\noutput: {tmp_path}/tuned\nmodel: none\ndata: {{path: none}}\nlora: {{rank: 2}}")
    for config in (autoencoder_yaml(tmp_path), tim_yaml(tmp_path), tuned):
        with pytest.raises(TimError, match="is a folder"):
            run([config])
        (tmp_path / "file").touch()
        text = config.read_text()
        for key, value in (("checkpoint", tmp_path / "tim" / "model.safetensors"), ("output", tmp_path / "file"),
                           ("output", tmp_path / "file" / "inside")):
            config.write_text(text.replace(f"output: {tmp_path}", f"output: {tmp_path}/new") + f"\ncheckpoint: {value}\n"
                              if key == "checkpoint" else text.replace(f"output: {tmp_path}/{config.stem}", f"output: {value}"))
            with pytest.raises(TimError) as error:
                run([config])
            assert mentions(str(error.value), value if key == "checkpoint" else tmp_path / "file", "is a")
    assert not list(tmp_path.rglob("step-*"))


def test_an_autoencoder_may_be_written_elsewhere(tmp_path):
    config = autoencoder_yaml(tmp_path)
    config.write_text(config.read_text() + f"checkpoint: {tmp_path}/last.safetensors\n")
    assert run([config]) == [tmp_path / "last.safetensors"] and load_autoencoder(tmp_path / "last.safetensors").config.factor == 8


def test_widths_that_fit_no_autoencoder_are_one_line(tmp_path):
    path = autoencoder_yaml(tmp_path)
    path.write_text(path.read_text().replace("head_dim: 8", "head_dim: 1000"))
    with pytest.raises(TimError, match="no DC-AE has these widths, layers and head_dim"):
        run([path])
    assert not (tmp_path / "autoencoder").exists()


def test_another_architecture_is_one_line_that_names_the_file(tmp_path):
    run([autoencoder_yaml(tmp_path), tim_yaml(tmp_path)])
    path = tim_yaml(tmp_path)
    path.write_text(path.read_text().replace("hidden_size: 16, depth", "hidden_size: 32, depth").replace("steps: 6", "steps: 8"))
    with pytest.raises(TimError) as error:
        run([path])
    assert "step-00000006.pt: another architecture" in str(error.value) and len(str(error.value)) < 500


def test_a_loss_that_is_no_number_stops_the_run(tmp_path, monkeypatch):
    real = training_autoencoder.losses

    def no_numbers(*args, **options):
        return {name: value * float("nan") for name, value in real(*args, **options).items()}

    monkeypatch.setattr(training_autoencoder, "losses", no_numbers)
    with pytest.raises(TimError, match="loss is nan at step 2"):
        run([autoencoder_yaml(tmp_path)])
    assert not list((tmp_path / "autoencoder").glob("step-*.pt"))


def test_the_error_is_a_line_of_its_own(tmp_path, capfd):
    path = autoencoder_yaml(tmp_path)
    path.write_text(path.read_text().replace("steps: 6", "steps: 100000, seconds: 1"))
    assert main(["train", str(path)]) == 1
    assert capfd.readouterr().err.splitlines()[-1].startswith("tim: error: training: stopped at step")


def test_a_run_may_be_initialised_from_another(tmp_path):
    first = run([autoencoder_yaml(tmp_path), tim_yaml(tmp_path)])[1]
    more = tim_yaml(tmp_path, output="more")
    text = more.read_text().replace(f"{tmp_path}/autoencoder/autoencoder.safetensors", str(first))  # bfloat16, as packed
    more.write_text(f"start: {first}\n" + text.replace("warmup: 2", "warmup: 2, lr: 1e-12, muon_lr: 1e-12, weight_decay: 0"))
    before, after = (open_state_dict(file)[0] for file in (first, run([more])[0]))
    assert all(torch.equal(before[key], after[key]) for key in before if not key.endswith("config_json"))


def test_the_made_file_is_a_whole_model(tmp_path):
    files = run([autoencoder_yaml(tmp_path), tim_yaml(tmp_path)])
    parts = load_all(files[1])
    made = parts.metadata["training"]["configuration"]
    assert made["objective"]["epsilon"] == 0.01 and made["p_std"] == 1.6 and made["loop"]["lr"] == 1e-3 and "output" not in made
    assert parts.latent_factor == 8 and parts.autoencoder.config.latent_channels == 4
    cond, null = parts.text_encoder.conditioning(["a red circle"])
    assert cond.shape == null.shape == (1, 4, 16)
    for image in (tmp_path / "autoencoder" / "sample-00000006.png", tmp_path / "tim" / "sample-00000006.png"):
        assert image.stat().st_size > 0


def test_the_world_is_the_one_of_the_facts():
    assert set(scenes.TRAINING_FORMS) >= set(scenes.TASKS) and abs(sum(scenes.TRAINING_FORMS.values()) - 1) < 1e-9


def test_muon_on_an_older_torch_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    first = autoencoder_yaml(tmp_path)
    with pytest.raises(TimError, match="muon.* 2.9.*adamw"):
        run([first, tim_yaml(tmp_path, "muon")])
