"""Training configurations: what they read as, what they refuse, and the files of this repository."""

import os
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import yaml

from tim_core.errors import TimError
from tim_core.models.attention import BACKENDS
from tim_core.shapes import scenes
from tim_core.training.autoencoder import architecture
from tim_core.training.config import FineTuning, FolderConfig, TransformerTraining, read, recorded
from tim_core.training.objectives.transition import ObjectiveConfig
from tim_core.training.shapes_config import TransformerShape
from tim_core.training.yaml_file import read_values

ROOT = Path(__file__).parent.parent
TIM = "kind: tim\noutput: x\nautoencoder: y\n"
FINETUNE = "kind: finetune\noutput: x\nmodel: y\ndata: {path: z}\n"


def written(folder, name, text):
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def message(path) -> str:
    """The error of a configuration, which is one line and names a file."""
    with pytest.raises(TimError) as error:
        read(path)
    assert "\n" not in str(error.value) and str(error.value).startswith(f"{path.parent}{os.sep}")
    return str(error.value)


@pytest.mark.parametrize("text, named", [
    ("kind: shapes", "kind"),
    ("kind: tim\noutput: x\nautoencoder: y\nlearning: 3", "learning"),
    ("kind: tim\noutput: x", "autoencoder"),
    ("kind: tim\noutput: x\nautoencoder: y\nloop: {steps: many}", "loop.steps"),
    ("kind: tim\noutput: x\nautoencoder: y\nloop: {steps: 0}", "loop.steps"),
    ("kind: tim\noutput: x\nautoencoder: y\nloop: {optimizer: sgd}", "loop.optimizer"),
    ("kind: tim\noutput: x\nautoencoder: y\nloop: {optimizer: muon, parallel: fsdp2}", "loop.optimizer"),
    ("kind: tim\noutput: x\nautoencoder: y\nobjective: {epsilon: fast}", "objective.epsilon"),
    ("kind: tim\noutput: x\nautoencoder: y\nobjective: {derivative: guess}", "derivative"),
    ("kind: tim\noutput: x\nautoencoder: y\nobjective: {target: guess}", "target"),
    ("kind: tim\noutput: x\nautoencoder: y\ninterpolate_start: 0.5", "interpolate_start"),
    ("kind: tim\noutput: x\nautoencoder: y\nmatching: {teacher: start}", "matching.teacher"),
    ("kind: tim\noutput: x\nautoencoder: y\nmatching: {critic_warmup_steps: 9}\nloop: {steps: 9}", "matching.critic_warmup_steps"),
    ("kind: tim\noutput: x\nautoencoder: y\nstart: z\nmatching: {teacher: none}", "teacher"),
    ("kind: tim\noutput: x\nautoencoder: y\ndistillation: {}", "start is null"),
    ("kind: tim\noutput: x\nautoencoder: y\nstart: z\ncheckpoint: z\ndistillation: {}", "checkpoint"),
    ("kind: tim\noutput: x\nautoencoder: y\nstart: z\nfreeze_text: true\nadd_embedding: {above: left}", "freeze_text"),
    ("kind: tim\noutput: x\nautoencoder: y\nobjective_from: {20: {target: teacher}}", "objective_from.20.target"),
    ("kind: tim\noutput: x\nautoencoder: y\nstart: z\ndistillation: {times: [1.0, 0.5, 0.75]}", "distillation.times"),
    ("kind: tim\noutput: x\nautoencoder: y\nfreeze_text: true", "freeze_text"),
    ("kind: tim\noutput: x\nautoencoder: y\nobjective: {target: teacher}", "objective.target"),
    ("kind: finetune\noutput: x\nmodel: y\ndata: {path: z}\nobjective: {target: teacher}", "objective.target"),
    ("kind: tim\noutput: x\nautoencoder: y\nadd_embedding: {above: higher}", "add_embedding"),
    ("kind: tim\noutput: x\nautoencoder: y\nadd_embedding: {above: above}", "add_embedding"),
    ("kind: tim\noutput: x\nautoencoder: y\nstart: z\ncheckpoint: z\ninterpolate_start: 0.5", "checkpoint"),
    ("kind: tim\noutput: x\nautoencoder: y\ndata: {relations: [beside]}", "data.relations"),
    ("kind: tim\noutput: x\nautoencoder: y\ndata: {relations: []}", "data.relations"),
    ("kind: tim\noutput: x\nautoencoder: y\nobjective: {adaptive_floor: 0}", "adaptive_floor"),
    ("kind: tim\noutput: x\nautoencoder: y\nobjective: {epsilon: 0}", "epsilon"),
    ("kind: tim\noutput: x\nautoencoder: y\nobjective: {shorten_above: 0}", "shorten_above"),
    ("kind: tim\noutput: x\nautoencoder: y\nobjective: {diffusion_ratio: 2.0}", "diffusion_ratio"),
    ("kind: tim\noutput: x\nautoencoder: y\nobjective: {consistency_ratio: .nan}", "consistency_ratio"),
    ("kind: tim\noutput: x\nautoencoder: y\nobjective_from: {soon: {}}", "objective_from"),
    ("kind: autoencoder\noutput: x\nlatent_channels: 24", "latent_channels"),
    ("kind: autoencoder\noutput: x\nloop: {compile: true}", "loop.compile"),
    ("kind: tim\noutput: x\nautoencoder: y\ndata: {sizes: {64: 1}}", "data.sizes"),
    ("kind: autoencoder\noutput: x\nencoder_widths: [8, 8]", "encoder_widths"),
    ("kind: autoencoder\noutput: x\nlatent_channels: 0", "latent_channels"),
    ("kind: autoencoder\noutput: x\nlatent_noise: .inf", "latent_noise"),
    ("kind: autoencoder\noutput: x\nlatent_weight: -1.0", "latent_weight"),
    ("kind: autoencoder\noutput: x\ndecoder_layers: [0, 1, 0, 1]", "decoder_layers"),
    ("kind: autoencoder\noutput: x\ndata: {sizes: {\u00b2x32: 1}}", "data.sizes"),
    ("kind: autoencoder\noutput: x\ndata: {sizes: {32x32: .inf}}", "data.sizes.32x32"),
    ("kind: [1]", "kind"),
    ("kind: tim\noutput: x\nautoencoder: y\nobjective: {epsilon: .inf}", "objective.epsilon"),
    ("kind: tim\noutput: x\nautoencoder: y\np_std: .inf", "p_std"),
    ("kind: tim\noutput: x\nautoencoder: y\nloop: {seed: 99999999999999999999}", "loop.seed"),
    ("kind: autoencoder\noutput: x\nencoder_layers: [0, -1, 1, 1]", "encoder_layers"),
    ("kind: autoencoder\noutput: x\ndata: {sizes: {60x60: 1}}", "data.sizes"),
    ("kind: tim\noutput: x\nautoencoder: y\ntext: {heads: 0}", "text.heads"),
    ("kind: tim\noutput: x\nautoencoder: y\ntransformer: {lora_hidden_size: 0}", "lora_hidden_size"),
    ("kind: tim\noutput: x\nautoencoder: y\nloop: {betas: [0.9, 1.0]}", "loop.betas"),
    ("kind: tim\noutput: x\nautoencoder: y\nloop: {final_lr: 2.0}", "loop.final_lr"),
    ("kind: tim\noutput: x\nautoencoder: y\nloop: {seed: -1}", "loop.seed"),
    ("kind: tim\noutput: x\nautoencoder: y\nloop: {lr: .inf}", "loop.lr"),
    ("kind: tim\noutput: x\nautoencoder: y\np_mean: .nan", "p_mean"),
    ("kind: tim\noutput: x\nautoencoder: y\nobjective: {w_start: 0.9, w_end: 0.1}", "w_start"),
    ("- a list", "keys and values"),
    ("kind: [", "not YAML"),
    ("kind: tim\noutput: x\nautoencoder: y\nloop: {steps: 3}\nloop: {batch: 4}", "loop is given twice"),
    ("kind: tim\noutput: x\nautoencoder: y\nloop: {steps: 3, steps: 4}", "steps is given twice"),
    ("kind: tim\noutput: x\nautoencoder: y\nobjective: {epsilon: 5000}", "epsilon"),
    ("kind: tim\noutput: x\nautoencoder: y\nobjective: {w_cond: -300}", "w_cond"),
    ("kind: tim\noutput: x\nautoencoder: y\nobjective_from: {\u00b2: {}}", "objective_from"),
    ("kind: tim\noutput: x\nautoencoder: y\np_mean: 1.0e+6", "p_mean"),
    ("kind: tim\noutput: x\nautoencoder: ''", "autoencoder"),
    ("kind: tim\noutput: x\nautoencoder: y\nattention: fast", "attention"),
    ("kind: tim\noutput: x\nautoencoder: y\nattention: flash\nobjective: {derivative: jvp}", "attention"),
])
def test_bad_configurations_name_the_key(tmp_path, text, named):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    assert named in message(path)


@pytest.mark.parametrize("text, key, value", [
    (TIM + "loop: {lr: -1}", "loop.lr", "-1"), (TIM + "loop: {seed: -3}", "loop.seed", "-3"), (TIM + "loop: 7", "loop", "7"),
    (TIM + "loop: {compile: 1}", "loop.compile", "1"), (TIM + "loop: {lr: '0.1'}", "loop.lr", '"0.1"'),
    (TIM + "loop: {steps: true}", "loop.steps", "true"), (TIM + "p_mean: 1e3", "p_mean", "1000.0"),
    (TIM + "loop: {steps: 99999999999999}", "loop.steps", "99999999999999"),
    (TIM + "data: {forms: {single: 0}}", "data.forms.single", "0"), (TIM + "data: {sizes: {64: 1}}", "data.sizes", '"64"'),
    (TIM + "data: {native: 32x64}", "data.native", '"32x64"'),
    (TIM + "objective_from: {20: {target: x}}", "objective_from.20.target", "'x'"),
    (TIM + "objective: {epsilon: 7}", "objective.epsilon", "7"),
    (TIM + "matching: {paths: [[0, 1]]}", "matching.paths", "[0.0, 1.0]"), (TIM + "text: {head_dim: 3}", "text.head_dim", "3"),
    (FINETUNE + "lora: {targets: [attn, '(']}", "lora.targets", '"("'), (FINETUNE + "loop: {batch: 2.5}", "loop.batch", "2.5"),
    (FINETUNE + "text_encoder: 2026", "text_encoder", "2026"),
])
def test_an_error_has_the_key_its_value_and_advice(tmp_path, text, key, value):
    said = message(written(tmp_path, "bad.yaml", text))
    assert said.startswith(f"{tmp_path / 'bad.yaml'}: {key}") and value in said and "use " in said


@pytest.mark.parametrize("text, key, near", [
    (TIM + "loop: {stps: 5}", "loop.stps", "loop.steps"), (TIM + "steps: 5", "steps", "loop.steps"),
    (TIM + "objectiv: {}", "objectiv", "objective"),
    (TIM + "objective_from: {20: {epsilo: 1}}", "objective_from.20.epsilo", "objective_from.20.epsilon"),
    (FINETUNE + "lora: {rnak: 3}", "lora.rnak", "lora.rank"),
    ("kind: finetune\noutputs: x\nmodel: y\ndata: {path: z}", "outputs", "output"),
])
def test_an_unknown_key_leads_to_the_nearest_known_one(tmp_path, text, key, near):
    said = message(written(tmp_path, "bad.yaml", text))
    assert f": {key} is" in said and said.endswith(f" {near}")


def test_an_unknown_key_near_to_none_leads_to_all(tmp_path):
    said = message(written(tmp_path, "bad.yaml", FINETUNE + "data: {}\n".replace("data", "lora") .replace("{}", "{zzz: 1}")))
    assert "lora.zzz" in said and all(name in said for name in ("rank", "alpha", "targets"))


HOSTILE = {
    "aliases": "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9 if i else 'x')}]\n" for i in range(12)),
    "merges": "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 12)),
    "recursive": "a: &a [*a]", "deep": "[" * 60_000, "deeper": "- " * 30_000, "mappings": "{a: " * 15_000,
    "many": "[" + "1," * 30_000 + "]",
    "huge": "# " + "x" * 10**7, "tab": TIM + "loop:\n\tsteps: 3", "python": FINETUNE + "lora: !!python/object/apply:os.getcwd []",
    "int": FINETUNE + "lora: !!int x", "bool": FINETUNE + "lora: !!bool x", "empty int": FINETUNE + "lora: !!int ''",
    "list key": "? [a]\n: b",
    "map of 3": FINETUNE + "lora: !!map 3", "empty": "", "two documents": "--- a\n--- b", "nul": "a: \0", "surrogate": 'a: "\\ud800"',
    "latin-1": b"a: \xe9", "digits": TIM + "loop: {steps: " + "9" * 5000 + "}", "long": TIM + "output: " + "9" * 4000, "anchor": "*x",
    "escape": TIM + '"\\e[31m": 1', "inf": FINETUNE + "dropout: 1e999", "nan": FINETUNE + "lora: {alpha: .nan}",
    "twice": FINETUNE + "lora: {rank: 4, alpha: 1, rank: 4}", "twice in two notations": TIM + "objective_from: {20: {}, '20': {}}",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_no_file_takes_long_or_more_than_a_line(tmp_path, text):
    path = written(tmp_path, "bad.yaml", text)
    started = time.process_time()
    said = message(path)
    assert time.process_time() - started < 10 and len(said) < 2500 and said.isprintable()


def test_a_tab_leads_to_spaces(tmp_path):
    said = message(written(tmp_path, "bad.yaml", HOSTILE["tab"]))
    assert "line 5" in said and "spaces" in said


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_what_is_no_regular_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "folder.yaml").mkdir()
    for name in ("pipe.yaml", "folder.yaml"):
        assert name in message(tmp_path / name)
    assert "zero" in message(Path("/dev/zero"))


def test_values_are_taken_as_they_are_written(tmp_path):
    text = "\ufeff" + FINETUNE.replace("output: x", "output: 2026-01-01") + "shift_base: null"
    config = read(written(tmp_path, "good.yaml", text))
    assert config.output == "2026-01-01" and config.shift_base is None


@pytest.mark.parametrize("written_as, value", [
    ("010", 10), ("-07", -7), ("0o17", 15), ("0x1F", 31), ("+3", 3), ("1:30", "1:30"), ("1_000", "1_000"), ("0b11", "0b11"), ("yes", "yes"),
    ("no", "no"), ("on", "on"), ("Off", "Off"), ("y", "y"), ("true", True), ("FALSE", False), ("tRue", "tRue"), ("~", None), ("Null", None),
    ("", None), ("nULL", "nULL"), ("1e3", 1000.0), ("1E-3", 0.001), (".5", 0.5), ("5.", 5.0), ("1_0.5", "1_0.5"),
    ("190:20:30.15", "190:20:30.15"),
    ("2026-01-01", "2026-01-01"), ("=", "="), ("'010'", "010"), ("!!str 010", "010"), ("!!float 1", 1.0), ("!!int 010", 10),
])
def test_plain_values_are_those_of_yaml_1_2(tmp_path, written_as, value):
    found = read_values(written(tmp_path, "a.yaml", f"a: {written_as}"))[0]["a"]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("tagged", ["!!bool yes", "!!int 1:30", "!!int 1_000", "!!float 1:30", "!!null x", "!!int 0o9"])
def test_a_tag_does_not_bring_back_yaml_1_1(tmp_path, tagged):
    assert "not YAML" in message(written(tmp_path, "a.yaml", f"{FINETUNE}lora: {tagged}"))


@pytest.mark.parametrize("text, key, value", [
    (TIM + "loop: {steps: true}", "loop.steps", "true"), ("kind: tim\noutput: null\nautoencoder: y", "output", "null"),
    ("kind: null", "kind", "null"),
    (TIM + "loop: {compile: no}", "loop.compile", '"no"'), (TIM + "base: false", "base", "false"),
    (FINETUNE + "lora: [true, null]", "lora", "[true, null]"), (TIM + "freeze_text: true", "freeze_text", "true"),
])
def test_an_error_writes_values_as_yaml_does(tmp_path, text, key, value):
    said = message(written(tmp_path, "bad.yaml", text))
    assert f"{key} is {value};" in said and not any(word in said for word in ("True", "None", "False"))


def test_attention_is_one_of_the_backends():
    assert set(get_args(get_type_hints(TransformerTraining)["attention"])) == set(BACKENDS)


def test_a_base_is_overridden_key_by_key(tmp_path):
    (tmp_path / "inner").mkdir()
    written(tmp_path, "root.yaml", TIM + "loop: {steps: 5, lr: 0.1}\ndata: {sizes: {32x32: 1}}\nmatching: {weight: 2.0}")
    written(tmp_path / "inner", "middle.yaml", "base: ../root.yaml\nloop: {steps: 6, batch: 3}\ndata: {sizes: {64x64: 1}}")
    config = read(written(tmp_path / "inner", "top.yaml", "base: middle.yaml\nloop: {batch: 4}\nmatching: null\noutput: other"))
    assert (config.loop.steps, config.loop.lr, config.loop.batch) == (6, 0.1, 4) and config.output == "other"
    assert config.data.sizes == {"32x32": 1, "64x64": 1} and config.matching is None


def test_an_error_names_the_file_that_the_key_is_from(tmp_path):
    root = written(tmp_path, "root.yaml", TIM + "loop: {steps: 0}")
    top = written(tmp_path, "top.yaml", "base: root.yaml\nloop: {batch: 4}")
    assert message(top).startswith(f"{root}: loop.steps")
    written(tmp_path, "top.yaml", "base: root.yaml\nloop: {steps: -1}")
    assert message(top).startswith(f"{top}: loop.steps is -1")


@pytest.mark.parametrize("base", ["none.yaml", "[a.yaml, b.yaml]", "''", "3", "null", "{a: b}", ".", '"\\0"', "n" * 5000, "~nobody/x.yaml"])
def test_a_base_that_is_not_one_file_is_named(tmp_path, base):
    said = message(written(tmp_path, "top.yaml", f"base: {base}\n{TIM}"))
    assert said.startswith(f"{tmp_path / 'top.yaml'}: base is ")


def test_a_circle_of_bases_is_named(tmp_path):
    for name, base in (("a", "b"), ("b", "c"), ("c", "../{}/a".format(tmp_path.name)), ("self", "self")):
        written(tmp_path, f"{name}.yaml", f"base: {base}.yaml\n{TIM}")
    said = message(tmp_path / "a.yaml")
    assert all(f"{name}.yaml" in said for name in "abc") and "base" in said
    assert "self.yaml" in message(tmp_path / "self.yaml")


def test_the_ablations_are_configurations(tmp_path):
    from benchmarks.ablations import VARIANTS, configuration

    for variant in VARIANTS:
        path = tmp_path / f"{variant}.yaml"
        path.write_text(yaml.safe_dump(configuration(variant, 0, tmp_path, 1200, 64, False)))
        assert type(read(path)).__name__ == "TransitionTraining", variant


def test_the_ready_configurations_are_read():
    files = [*(ROOT / "configs").rglob("*.yaml"), *(ROOT / "docs" / "research" / "configs").glob("*.yaml")]
    files.remove(ROOT / "configs" / "tim-shapes" / "base.yaml")
    kinds = {path.stem: type(read(path)).__name__ for path in files}
    assert len(kinds) == len(files) and kinds["tim-shapes"] == "TransitionTraining" and kinds["tim-shapes-decoder"] == "AutoencoderTraining"
    assert all(kinds[name] == "FineTuning" for name in ("t2i-finetune", "t2i-lora", "c2i-finetune", "lora"))
    first, baseline = (read(ROOT / "docs" / "research" / "configs" / f"{name}.yaml") for name in ("tim-shapes", "tim-shapes-baseline"))
    for name in ("loop", "data", "transformer", "text"):
        assert getattr(baseline, name) == getattr(first, name)
    assert baseline.objective.diffusion_ratio == 1
    research = {path.stem: read(path) for path in (ROOT / "docs" / "research" / "configs").glob("*.yaml")}
    positions = {name: config.transformer.positions for name, config in research.items() if hasattr(config, "transformer")}
    assert len(positions) > 13
    assert all(value == ("grid" if name.startswith("tim-shapes-2-") else "official") for name, value in positions.items())
    assert TransformerShape().positions == "grid"


RECIPE = ("1-autoencoder", "2-decoder", "3-flow", "4-above-below", "5-relations", "6-transitions", "7-sizes", "8-512x512",
          "9-counting", "10-matching")


def test_the_baseline_is_flow_matching_on_the_images_of_the_last_five_stages():
    before = read(ROOT / "configs" / "tim-shapes" / f"{RECIPE[4]}.yaml")
    for stage in RECIPE[5:]:
        own = read(ROOT / "configs" / "tim-shapes" / f"{stage}.yaml")
        baseline = read(ROOT / "docs" / "research" / "configs" / f"tim-shapes-2-baseline-{stage.split('-')[0]}.yaml")
        changed = {name for name, value in vars(own).items() if value != getattr(baseline, name)}
        assert changed <= {"output", "start", "objective", "matching"} and baseline.output != own.output, stage
        flow = replace(own.objective, target="differential", diffusion_ratio=1.0, consistency_ratio=0.0, shorten_above=1.0)
        assert baseline.objective == flow and baseline.matching is None, stage
        assert baseline.start == f"{before.output}/{before.export_name}", stage
        before = baseline


def test_every_stage_of_the_recipe_starts_from_one_before_it():
    files = [path.stem for path in (ROOT / "configs" / "tim-shapes").glob("[0-9]*.yaml")]
    assert sorted(files, key=lambda stage: int(stage.split("-")[0])) == list(RECIPE)
    stages, results = [read(ROOT / "configs" / "tim-shapes" / f"{stage}.yaml") for stage in RECIPE], []
    for stage, config in zip(RECIPE, stages):
        assert config.checkpoint is None  # the bundled model stays as it is
        for name in ("autoencoder", "start"):
            needed = getattr(config, name, None)
            assert needed is None or needed in results, f"{stage}: {name}"
        results.append(f"{config.output}/{config.export_name}")
    assert stages[-1].autoencoder == results[1] and [stage.start for stage in stages[2:]] == [None, *results[2:-1]]


def test_the_recipe_trains_one_architecture_and_holds_out_one_size():
    stages = [read(ROOT / "configs" / "tim-shapes" / f"{stage}.yaml") for stage in RECIPE]
    assert stages[1].freeze_encoder and architecture(stages[0]) == architecture(stages[1])
    assert architecture(stages[0]).factor == 32 and stages[2].transformer.positions == "grid"
    for config in stages:
        assert "320x320" not in config.data.sizes and config.data.native_size == (256, 256) and config.data.misfit(32) is None
    for config in stages[2:]:
        assert config.transformer == stages[2].transformer and config.text == stages[2].text
        assert config.shift_base == 256
    flow, above_below, relations, *rest = stages[2:]
    for config in (above_below, relations):
        assert config.data.sizes == flow.data.sizes and config.data.forms == flow.data.forms | {"full position": 4.0}
        assert config.objective == ObjectiveConfig(1.0, 0.0, adaptive_floor=1.0, use_dir_loss=False)
        assert (config.p_mean, config.p_std) == (1.8, 0.8)
    transitions, larger, largest, counting, matching = rest
    assert transitions.data.forms == flow.data.forms and transitions.data.sizes["256x256"] == 0.8
    assert transitions.data.sizes | {"256x256": 3.0} == flow.data.sizes
    assert larger.objective == transitions.objective and larger.cached_batches == 2 * transitions.cached_batches
    assert (2 * larger.loop.lr, 2 * larger.loop.muon_lr) == (transitions.loop.lr, transitions.loop.muon_lr)

    def frequency(config, size):
        return config.data.sizes[size] / sum(config.data.sizes.values())

    for config in (larger, largest, counting, matching):
        assert config.data.sizes.keys() == transitions.data.sizes.keys()
        assert all(frequency(config, size) > frequency(transitions, size) for size in ("384x384", "512x512"))
    assert largest.objective == counting.objective == larger.objective and frequency(largest, "512x512") > 0.5
    assert larger.data.forms == largest.data.forms == transitions.data.forms
    for config in (counting, matching):
        changed = {form for form, weight in config.data.forms.items() if weight != transitions.data.forms[form]}
        assert changed == {"counting", "full counting"}
    assert (largest.loop.lr, largest.loop.muon_lr) == (larger.loop.lr, larger.loop.muon_lr)
    assert [config.interpolate_start for config in stages[2:]] == [0, 0, 0, 0, 0, 0.5, 0, 0]
    assert len({config.loop.seed for config in stages[2:]}) == len(stages[2:])  # no stage trains on another's images
    assert above_below.add_embedding == {"above": "left", "below": "right"} and not relations.add_embedding
    assert set(above_below.data.relations) == {"above", "below"} == set(scenes.RELATIONS) - set(flow.data.relations)
    assert all(set(config.data.relations) == set(scenes.RELATIONS) for config in (relations, *rest))


@pytest.mark.parametrize("document", ["docs/training.md", "docs/research/tim-shapes-2.md"])
def test_the_documents_list_the_stages_of_the_recipe(document):
    text = (ROOT / document).read_text()
    steps = {stage: read(ROOT / "configs" / "tim-shapes" / f"{stage}.yaml").loop.steps for stage in RECIPE}
    assert {name: int(row) for name, row in re.findall(r"^\| `(\d+-[^`]+)` \|[^|]*\| (\d+) \|", text, re.M)} == steps
    assert f"configs/tim-shapes/[1-9]-*.yaml configs/tim-shapes/{len(RECIPE)}-*.yaml" in text


def test_missing_file_is_one_line(tmp_path):
    assert "nothing.yaml" in message(tmp_path / "nothing.yaml")


def test_numbers_may_be_written_as_yaml_writes_them(tmp_path):
    path = tmp_path / "good.yaml"
    path.write_text("kind: tim\noutput: x\nautoencoder: y\nloop: {lr: 1e-3, clip: 1, betas: [0.9, 0.99]}")
    config = read(path)
    assert config.loop.lr == 1e-3 and config.loop.clip == 1.0 and config.loop.betas == (0.9, 0.99)


def test_merge_keys_of_yaml(tmp_path):
    path = tmp_path / "merged.yaml"
    path.write_text("kind: tim\noutput: x\nautoencoder: y\nobjective: &base {epsilon: 0.01, target: composed}\n"
                    "objective_from: {100: {<<: *base, epsilon: 0.02}}\n")
    config = read(path)
    assert config.objective_from["100"].epsilon == 0.02 and config.objective_from["100"].target == "composed"
    path.write_text("kind: tim\nloop: !!map 3\n")
    assert "not YAML" in message(path)


def test_a_record_names_no_home():
    home = str(Path.home())
    config = FineTuning(output="x", model=f"{home}/m.safetensors", data=FolderConfig(f"{home}/pictures"))
    assert recorded(config)["model"] == "~/m.safetensors" and recorded(config)["data"]["path"] == "~/pictures"


def test_the_objective_may_change_at_a_step(tmp_path):
    path = tmp_path / "phases.yaml"
    path.write_text("kind: tim\noutput: x\nautoencoder: y\nobjective_from: {10: {diffusion_ratio: 0.7}, 20: {diffusion_ratio: 1}}")
    config = read(path)
    assert [config.objective_at(step).diffusion_ratio for step in (0, 9, 10, 19, 20, 99)] == [0.5, 0.5, 0.7, 0.7, 1.0, 1.0]
