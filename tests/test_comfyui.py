"""The pack in the real ComfyUI, over HTTP, against tim_core: the common ways, core's own nodes, memory, errors."""

import json
import os
import re
import subprocess
import time
import urllib.error
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.comfy_graph import (
    BUNDLED_NAME,
    PROMPT,
    Graph,
    close,
    images_of,
    inside,
    latent_of,
    refusal,
    run_images,
    run_latents,
    same_image,
)
from tests.comfy_support import FOLDER, ROOT, events_of, find, probe
from tests.support import load_all
from tim_core import Pipeline, sampler, schedule
from tim_core.models.config import POSITIONS
from tim_core.weights.describe import describe
from tim_core.weights.save import pack

pytestmark = pytest.mark.comfyui

NODES = (
    "TiMCheckpointLoader", "TiMModelLoader", "TiMTextEncoderLoader", "TiMVAELoader", "TiMEmptyLatent", "TiMClassLabel", "TiMSampler",
    "TiMSamplerSelect", "TiMScheduler", "TiMGuidanceInterval", "TiMNativeUpscale", "TiMStepSweep",
)


@pytest.fixture(scope="module")
def pipe(tiny):
    return Pipeline.load(tiny, device="cpu")


# The editor's side


def checkpoint_options(comfyui) -> list[str]:
    return comfyui.get("object_info/TiMCheckpointLoader")["TiMCheckpointLoader"]["input"]["required"]["ckpt_name"][1]["options"]


def test_nodes(comfyui):
    assert set(NODES) <= set(comfyui.object_info), comfyui.log_text()
    for name in NODES:
        info = comfyui.object_info[name]
        inputs = info["input"]["required"] | info["input"].get("optional", {})
        assert info["category"] == "TiM" and info["description"] and info["display_name"]
        assert all(options["tooltip"] for _, options in inputs.values())
        assert len(info["output_tooltips"]) == len(info["output"]) and all(info["output_tooltips"])
    loader = comfyui.object_info["TiMCheckpointLoader"]
    assert loader["output"] == ["MODEL", "CLIP", "VAE"]
    options = checkpoint_options(comfyui)
    assert options == [BUNDLED_NAME, *sorted(options[1:])] and "tiny.safetensors" in options
    assert comfyui.object_info["TiMSampler"]["input"]["required"]["seed"][1]["control_after_generate"] is True
    assert comfyui.object_info["TiMSampler"]["output"] == ["LATENT"]


def test_templates_and_words_are_served(comfyui):
    assert "text-to-image" in comfyui.get("workflow_templates")[FOLDER]
    assert comfyui.get(f"api/workflow_templates/{FOLDER}/text-to-image.json")["nodes"]
    words = comfyui.get("i18n")["en"]
    assert words["nodeCategories"]["TiM"]
    for name in NODES:
        info = comfyui.object_info[name]
        inputs = info["input"]["required"] | info["input"].get("optional", {})
        entry = words["nodeDefs"][name]
        assert entry["description"] == info["description"]
        tooltips = {key: options["tooltip"] for key, (_, options) in inputs.items()}
        assert {key: value["tooltip"] for key, value in entry["inputs"].items()} == tooltips


@pytest.mark.parametrize("language", ["en", "ja", "ko", "zh", "fr"])
@pytest.mark.parametrize("name", NODES)
def test_help_is_served(comfyui, name, language):
    """The editor asks for the language's page, then for the fallback."""
    folder, info = f"extensions/{FOLDER}/docs", comfyui.object_info[name]
    try:
        page = comfyui.read(f"{folder}/{name}/{language}.md").decode()
    except urllib.error.HTTPError as error:
        assert error.code == 404 and language == "fr"
        page = comfyui.read(f"{folder}/{name}.md").decode()
    title = comfyui.get("i18n").get(language, {}).get("nodeDefs", {}).get(name, {}).get("display_name") or info["display_name"]
    assert title.startswith(page.splitlines()[0].removeprefix("# "))
    inputs = info["input"]["required"] | info["input"].get("optional", {})
    assert all(f"| {key} |" in page or f"(`{key}`)" in page for key in inputs)
    assert comfyui.read(f"{folder}/{name}/graph.jpg").startswith(b"\xff\xd8\xff") and f"({name}/graph.jpg)" in page


def test_notes_and_help_call_nodes_as_the_editor_does(comfyui):
    notes = [node["widgets_values"][0] for file in (ROOT / "workflows").glob("*.json") for node in json.loads(file.read_text())["nodes"]
             if node["type"] == "MarkdownNote"]
    pages = [file.read_text(encoding="utf-8") for file in (ROOT / "web" / "docs").glob("*/en.md")]
    words = {" ".join(word.split()) for text in (*notes, *pages) for word in re.findall(r"\*+([^*]+)\*+", text)}
    shown = {name: info["display_name"] or name for name, info in comfyui.object_info.items()}
    assert words & {*shown.values()} and {word: shown[word] for word in words & shown.keys() if shown[word] != word} == {}


# The same picture as tim_core


CASES = {
    "one step": dict(steps=1),
    "three steps": dict(steps=3, seed=2**63),
    "no guidance": dict(steps=2, cfg=1.0),
    "interval": dict(steps=6, cfg=4.0, interval=(0.3, 0.5)),
    "wide": dict(width=96, height=48),
    "batch": dict(batch=3, seed=7),
    "long negative": dict(positive="circle", negative="two yellow triangles above a purple square and something else entirely"),
    "long prompt": dict(positive="a word " * 300),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_pipeline(comfyui, pipe, name):
    case = dict(steps=4, cfg=2.5, seed=0, width=64, height=64, batch=1, positive=PROMPT, negative="", interval=(0.0, 1.0)) | CASES[name]
    low, high = case["interval"]
    graph = Graph()
    sampled = graph.tim(
        graph.empty(case["width"], case["height"], case["batch"]), graph.text(case["positive"]), graph.text(case["negative"]),
        steps=case["steps"], cfg=case["cfg"], seed=case["seed"], guidance_low=low, guidance_high=high,
    )
    images = run_images(comfyui, graph, sampled)
    settings = {key: case[key] for key in ("negative", "steps", "cfg", "width", "height", "seed")}
    same_image(images, pipe([case["positive"]] * case["batch"], **settings, guidance_interval=case["interval"]))


def test_image_to_image_equals_sampler(comfyui, pipe):
    graph = Graph()
    first = graph.tim(seed=1)
    before, after = run_latents(comfyui, graph, first, graph.tim(first, seed=2, start=0.6, steps=3))
    noise = pipe.noise(1, 64, 64, 2)
    cond, null = pipe.text_encoder.conditioning([PROMPT], [""])
    expected, _ = sampler.sample(pipe.transformer, 0.6 * noise + 0.4 * before, schedule.uniform(3, 0.6), cond, null, cfg=2.5)
    close(after, expected)


def test_vae_equals_autoencoder(comfyui, pipe):
    graph = Graph()
    sampled = graph.tim()
    image = graph.add("VAEDecode", samples=sampled, vae=graph.vae)
    encoded = graph.add("VAEEncode", pixels=image, vae=graph.vae)
    sampled, encoded = run_latents(comfyui, graph, sampled, encoded)
    with torch.no_grad():
        expected = pipe.autoencoder.encode(pipe.decode(sampled).movedim(-1, 1) * 2 - 1)
    close(encoded, expected)


# Core's own nodes


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_stock_ksampler_equals_tim_sampler(comfyui, steps):
    graph = Graph()
    close(*run_latents(comfyui, graph, graph.stock(steps=steps, seed=5), graph.tim(steps=steps, seed=5)))


def test_stock_image_to_image_equals_tim_sampler(comfyui):
    graph = Graph()
    first = graph.tim(seed=1)
    close(*run_latents(comfyui, graph, graph.stock(first, seed=2, denoise=0.5), graph.tim(first, seed=2, start=0.5)))


def test_stock_sampler_goes_on_from_tim_sampler(comfyui):
    graph = Graph()
    half = graph.tim(steps=2, end=0.5)
    rest = dict(add_noise="disable", start_at_step=2, end_at_step=4, return_with_leftover_noise="disable")
    close(*run_latents(comfyui, graph, graph.stock(half, kind="KSamplerAdvanced", **rest), graph.tim(steps=4)))


def test_other_stock_samplers_see_no_transition(comfyui):
    graph = Graph()
    heun, euler = run_latents(comfyui, graph, graph.stock(sampler_name="heun"), graph.stock())
    assert heun.isfinite().all() and (heun - euler).abs().max() > 1e-3


def test_noise_mask(comfyui):
    graph = Graph()
    first = graph.tim(seed=1)
    left = graph.add("SolidMask", value=0.0, width=32, height=64)
    right = graph.add("SolidMask", value=1.0, width=64, height=64)
    mask = graph.add("MaskComposite", destination=right, source=left, x=0, y=0, operation="and")
    masked = graph.add("SetLatentNoiseMask", samples=first, mask=mask)
    first, ours, stock = run_latents(comfyui, graph, first, graph.tim(masked, seed=2), graph.stock(masked, seed=2))
    close(ours, stock)
    assert (ours - first)[..., :4].abs().max() < 1e-4 < (ours - first)[..., 4:].abs().max()


def test_lora_equals_merged_weights(comfyui, tiny, tmp_path):
    torch.manual_seed(1)
    weights = load_file(tiny)
    lora, merged = {}, dict(weights)
    for key, name in (
        ("diffusion_model.blocks.1.attn.qkv", "model.diffusion_model.blocks.1.attn.qkv"),
        ("text_encoders.transformer.layers.0.mlp.down_proj", "text_encoders.transformer.layers.0.mlp.down_proj"),
    ):
        rows, columns = weights[f"{name}.weight"].shape
        up, down = torch.randn(rows, 2) / 4, torch.randn(2, columns) / 4
        lora |= {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down}
        merged[f"{name}.weight"] = weights[f"{name}.weight"] + 0.5 * up @ down
    save_file(lora, tmp_path / "lora.safetensors")
    save_file(merged, tmp_path / "merged.safetensors")
    comfyui.add("loras", tmp_path / "lora.safetensors", "merged-lora.safetensors")
    comfyui.add("checkpoints", tmp_path / "merged.safetensors", "merged.safetensors")
    plain = run_latents(comfyui, graph := Graph(), graph.tim())[0]
    graph = Graph()
    settings = dict(lora_name="merged-lora.safetensors", strength_model=0.5, strength_clip=0.5)
    loader = graph.add("LoraLoader", model=graph.model, clip=graph.clip, **settings)
    graph.model, graph.clip = loader, [loader[0], 1]
    patched = run_latents(comfyui, graph, graph.tim())[0]
    expected = run_latents(comfyui, graph := Graph("merged.safetensors"), graph.tim())[0]
    close(patched, expected)
    assert (patched - plain).abs().max() > 1e-2


def test_lora_loader_and_pipeline_agree(comfyui, tiny, tmp_path):
    torch.manual_seed(2)
    rows, columns = load_file(tiny)["model.diffusion_model.blocks.1.attn.qkv.weight"].shape
    key = "diffusion_model.blocks.1.attn.qkv"
    down, up = torch.randn(4, columns) / 2, torch.randn(rows, 4) / 2
    lora = {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up, f"{key}.alpha": torch.tensor(2.0)}
    save_file(lora, tmp_path / "agree.safetensors")
    comfyui.add("loras", tmp_path / "agree.safetensors", "agree.safetensors")
    plain = run_images(comfyui, graph := Graph(), graph.tim())
    graph = Graph()
    graph.model = graph.add("LoraLoaderModelOnly", model=graph.model, lora_name="agree.safetensors", strength_model=0.7)
    patched = run_images(comfyui, graph, graph.tim())
    same_image(patched, Pipeline.load(tiny, "cpu", lora={tmp_path / "agree.safetensors": 0.7})(PROMPT))
    assert (patched - plain).abs().max() > 10


@pytest.mark.parametrize("positions", POSITIONS)
def test_checkpoint_save_reloads(comfyui, tiny, tmp_path, positions):
    parts = load_all(tiny)
    parts.transformer.config = replace(parts.transformer.config, positions=positions)
    made = {"model": parts.transformer, "text-encoder": parts.text_encoder, "vae": parts.autoencoder}
    file = pack(made, tmp_path / f"{positions}.safetensors", metadata={"escape_prompts": False})
    comfyui.add("checkpoints", file, file.name)
    graph = Graph(file.name)
    graph.add("CheckpointSave", model=graph.model, clip=graph.clip, vae=graph.vae, filename_prefix=f"saved/{positions}")
    before = run_images(comfyui, graph, graph.tim(graph.empty(96, 64)))
    saved = next((comfyui.base / "output" / "saved").glob(f"{positions}*.safetensors"))
    wanted, found = describe(file), describe(saved)
    assert wanted.parts[0].architecture.positions == positions
    assert [(p.part, p.architecture) for p in found.parts] == [(p.part, p.architecture) for p in wanted.parts]
    assert (found.latent_factor, found.escape_prompts, found.tokenizer) == (wanted.latent_factor, wanted.escape_prompts, True)
    comfyui.add("checkpoints", saved, f"saved-{positions}.safetensors")
    graph = Graph(f"saved-{positions}.safetensors")
    assert torch.equal(before, run_images(comfyui, graph, graph.tim(graph.empty(96, 64))))
    same_image(before, Pipeline.load(saved, device="cpu")([PROMPT], width=96, height=64))
    other = next(order for order in POSITIONS if order != positions)
    parts.transformer.config = replace(parts.transformer.config, positions=other)
    pipe = Pipeline(parts.transformer, parts.text_encoder, parts.autoencoder)
    assert (before - 255 * pipe([PROMPT], width=96, height=64)).abs().max() > 4


GUIDERS = {
    "Basic": lambda graph, a, b, c: graph.add("BasicGuider", model=graph.model, conditioning=a),
    "CFG": lambda graph, a, b, c: graph.add("CFGGuider", model=graph.model, positive=a, negative=c, cfg=6.0),
    "Dual CFG": lambda graph, a, b, c: dual(graph, a, b, c, "regular"),
    "Dual CFG, nested": lambda graph, a, b, c: dual(graph, a, b, c, "nested"),
    "Perp-Neg": lambda graph, a, b, c: graph.add(
        "PerpNegGuider", model=graph.model, positive=a, negative=b, empty_conditioning=c, cfg=6.0, neg_scale=3.0
    ),
}


def dual(graph: Graph, cond1: list, cond2: list, negative: list, style: str) -> list:
    conds, strengths = dict(cond1=cond1, cond2=cond2, negative=negative), dict(cfg_conds=6.0, cfg_cond2_negative=4.0)
    return graph.add("DualCFGGuider", model=graph.model, **conds, **strengths, style=style)


@pytest.mark.parametrize("name", GUIDERS)
def test_every_guider_obeys_the_interval(comfyui, name):
    graph = Graph()
    guider = GUIDERS[name](graph, graph.text(PROMPT), graph.text("a yellow triangle"), graph.text(""))
    one, two = graph.guided(guider, 1), graph.guided(guider, 2)
    one, two, plain_one, plain_two = run_latents(comfyui, graph, one, two, graph.tim(steps=1, cfg=1.0), graph.tim(steps=2, cfg=1.0))
    close(one, plain_one)
    if name == "Basic":  # never guides
        close(two, plain_two)
    else:
        assert (two - plain_two).abs().max() > 1e-3


# Memory and devices


def test_loading_the_nodes_imports_nothing_else(comfyui):
    """Our nodes bring no module that ComfyUI has not loaded by itself, and none of the heavy parts of our own."""
    script = ROOT / "benchmarks" / "start.py"
    path, python = find()
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": os.environ.get("COMFYUI_PYTHONPATH", "")}
    run = subprocess.run([python, script, path], env=environment, capture_output=True, text=True, timeout=600)
    assert "loaded: True" in run.stdout, run.stdout + run.stderr
    lines = dict(line.split(": ", 1) for line in run.stdout.splitlines() if ": " in line)
    assert lines["new modules"] == "none but our own"
    heavy = {"tim_core.training", "tim_core.evaluation", "tim_core.pipeline", "tim_core.shapes", "tim_core.cli"}
    assert "tim_core.sampler" in lines["our own"].split(", ") and not heavy & set(lines["our own"].split(", "))


def load_little(model, clip, vae):
    """Where the text model's weights are after core gave them a byte of memory, and what a partial unload frees."""
    import torch

    patcher = clip.clone().patcher
    patcher.detach()
    patcher.partially_load(torch.device("meta"), 1)
    devices = sorted({weight.device.type for weight in patcher.model.parameters()})
    return [devices, patcher.partially_unload(torch.device("cpu"), 1)]


def test_text_model_loads_and_unloads_whole(comfyui, tiny):
    comfyui.add("checkpoints", tiny, "spent.safetensors")  # its weights are lost
    assert inside(comfyui, load_little, "spent.safetensors") == [["meta"], 0]


def reload(model, clip, vae):
    """Second patchers of the same file, as core makes them for another device, and a CLIP that has one."""
    import torch

    if not hasattr(model, "deepclone_multigpu"):
        return None
    found = {}
    for name, patcher in (("model", model), ("clip", clip.patcher), ("vae", vae.patcher)):
        function, arguments = patcher.cached_patcher_init
        for again in (function(*arguments), function(*arguments, disable_dynamic=True)):
            before, after = patcher.model.state_dict(), again.model.state_dict()
            equal = before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
            found[name] = [type(again) is type(patcher), again.model is not patcher.model, equal]
    moved = clip.clone()
    moved.patcher = moved.patcher.deepclone_multigpu(torch.device("cpu"))
    rows = [each.encode("a red circle") for each in (clip, moved)]
    found["moved"] = [moved.cond_stage_model is moved.patcher.model, moved.cond_stage_model is not clip.cond_stage_model]
    found["rows"] = torch.equal(*rows)
    return found


def test_core_can_make_second_patchers(comfyui):
    if (found := inside(comfyui, reload)) is None:
        pytest.skip("this version of ComfyUI makes none")
    whole = [True, True, True]
    assert found == {"model": whole, "clip": whole, "vae": whole, "moved": [True, True], "rows": True}


def attend(model, clip, vae):
    """Calls of an attention that itself runs the network once, without it; and the options that are left afterwards."""
    import torch

    network, calls = model.model.diffusion_model, []
    inputs = [torch.zeros(1, 16, 4, 4), torch.ones(1), torch.zeros(1, 3, network.config.text_dim)]

    def override(attention, *args, **kwargs):
        calls.append(1)
        if len(calls) == 1:
            network(*inputs, transformer_options={})
        return attention(*args, **kwargs)

    with torch.no_grad():
        network(*inputs, transformer_options={"optimized_attention_override": override})
    return [len(calls), network.config.depth, network.call.options]


def test_attention_forgets_the_options_of_a_call(comfyui):
    calls, depth, left = inside(comfyui, attend)
    assert calls >= depth > 1 and left == {}


def whole_vae(model, clip, vae):
    return [vae.disable_offload, type(vae.patcher).__name__]


def test_batch_norm_is_not_offloaded(comfyui, tmp_path):
    from tim_core.models.autoencoder import Autoencoder
    from tim_core.models.config import AutoencoderConfig, StageConfig
    from tim_core.weights.load import load_text_encoder, load_transformer
    from tim_core.weights.save import pack

    torch.manual_seed(0)
    source = comfyui.base / "models" / "checkpoints" / "tiny.safetensors"
    stages = (StageConfig(8, 1, norm="batch_norm", activation="relu"), *(StageConfig(8, 1),) * 3)
    vae = Autoencoder(AutoencoderConfig(stages, stages, latent_channels=16, head_dim=8))
    parts = {"model": load_transformer(source), "text-encoder": load_text_encoder(source), "vae": vae}
    comfyui.add("checkpoints", pack(parts, tmp_path / "norm.safetensors", metadata={"escape_prompts": False}), "norm.safetensors")
    assert inside(comfyui, whole_vae, "norm.safetensors") == [True, "WholePatcher"]
    assert inside(comfyui, whole_vae)[0] is False
    graph = Graph("norm.safetensors")
    latent = graph.tim()
    images = run_images(comfyui, graph, latent)
    assert images.shape == (1, 64, 64, 3) and images.std() > 0


# The full model's layout: 32 channels, factor 32


@pytest.fixture(scope="module")
def wide_vae(comfyui, tmp_path_factory):
    from tim_core.models.autoencoder import Autoencoder
    from tim_core.models.config import AutoencoderConfig, StageConfig, TransformerConfig
    from tim_core.models.transformer import TransitionTransformer
    from tim_core.weights.load import load_text_encoder
    from tim_core.weights.save import pack

    torch.manual_seed(0)
    config = TransformerConfig(in_channels=32, hidden_size=32, depth=1, num_heads=2, text_dim=32, lora_hidden_size=8)
    stages = (StageConfig(8, 1),) * 4 + (StageConfig(32, 1), StageConfig(32, 1, "EfficientViTBlock", (5,)))
    parts = {
        "model": TransitionTransformer(config),
        "text-encoder": load_text_encoder(comfyui.base / "models" / "checkpoints" / "tiny.safetensors"),
        "vae": Autoencoder(AutoencoderConfig(stages, stages, latent_channels=32, head_dim=8, scaling_factor=0.41407)),
    }
    file = pack(parts, tmp_path_factory.mktemp("f32") / "f32.safetensors", metadata={"escape_prompts": True})
    return comfyui.add("checkpoints", file, "f32.safetensors")


def test_layout_of_the_full_model(comfyui, wide_vae):
    graph = Graph(wide_vae)
    latent = graph.empty(128, 64, 2)
    area = graph.add("ConditioningSetArea", conditioning=graph.text("a circle"), width=64, height=64, x=64, y=0, strength=1.0)
    both = graph.add("ConditioningCombine", conditioning_1=graph.text(PROMPT), conditioning_2=area)
    nodes = [graph.save(latent), graph.picture(graph.tim(latent)), graph.picture(graph.stock(latent, positive=both))]
    outputs = comfyui.run(graph.prompt)
    assert latent_of(comfyui, outputs, nodes[0]).shape == (2, 32, 2, 4)
    assert images_of(comfyui, outputs, nodes[1]).shape == images_of(comfyui, outputs, nodes[2]).shape == (2, 64, 128, 3)
    expected = Pipeline.load(comfyui.base / "models" / "checkpoints" / wide_vae, device="cpu")([PROMPT] * 2, width=128, height=64)
    same_image(images_of(comfyui, outputs, nodes[1]), expected)


@pytest.mark.parametrize("name, size, shape", [("tiny.safetensors", (70, 51), (16, 6, 9)), ("f32.safetensors", (100, 40), (32, 1, 3))])
def test_sizes_are_rounded_with_one_line(comfyui, wide_vae, name, size, shape):
    graph = Graph(name)
    start = len(comfyui.log_text())
    latent = run_latents(comfyui, graph, graph.empty(*size))[0]
    assert latent.shape == (1, *shape) and not latent.any()
    lines = [line for line in comfyui.log_text()[start:].splitlines() if "Empty TiM Latent" in line]
    factor = 8 if name == "tiny.safetensors" else 32
    assert len(lines) == 1 and f"{size[0]}x{size[1]} rounded to {shape[2] * factor}x{shape[1] * factor}" in lines[0]


# When things go wrong


def test_wrong_file_is_one_line(comfyui, tiny, tmp_path):
    weights = load_file(tiny)
    files = {
        "sdxl.safetensors": {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(4, 4)},
        "lone.safetensors": {key: value for key, value in weights.items() if key.startswith("model.")},
        "cut.safetensors": {key: value for key, value in weights.items() if key != "model.diffusion_model.blocks.1.mlp.fc2.weight"},
        "bent.safetensors": weights | {"vae.decoder.conv_out.weight": torch.zeros(3, 8, 1, 1)},
    }
    wanted = {
        "sdxl.safetensors": "Stable Diffusion",
        "lone.safetensors": "Gemma",
        "cut.safetensors": "blocks.1.mlp.fc2.weight",
        "bent.safetensors": "decoder.conv_out.weight",
    }
    for name, tensors in files.items():
        save_file(tensors, tmp_path / name)
        comfyui.add("checkpoints", tmp_path / name, name)
        message = refusal(comfyui, graph := Graph(name), graph.empty())
        assert "\n" not in message and name in message and wanted[name] in message, message
    (comfyui.base / "models" / "checkpoints" / "text.safetensors").write_text("<html>")
    message = refusal(comfyui, graph := Graph("text.safetensors"), graph.empty())
    assert "\n" not in message and "web page" in message


def test_an_error_names_its_kind_without_the_path_of_the_pack(comfyui):
    graph = Graph()
    graph.save(graph.tim(start=0.2, end=0.8))
    messages = comfyui.wait(comfyui.queue(graph.prompt))["status"]["messages"]
    (error,) = (message for kind, message in messages if kind == "execution_error")
    assert error["exception_type"] == "tim_core.errors.TimError" and error["node_type"] == "TiMSampler"


def test_unknown_file_is_refused(comfyui):
    message = refusal(comfyui, graph := Graph("nowhere.safetensors"), graph.empty())
    options = checkpoint_options(comfyui)
    offered = BUNDLED_NAME if len(options) <= 20 else f"list of length {len(options)}"  # core shows no longer lists
    assert "nowhere.safetensors" in message and "ckpt_name" in message and offered in message


def test_exchanged_times_are_refused(comfyui):
    message = refusal(comfyui, graph := Graph(), graph.tim(start=0.2, end=0.8))
    assert "\n" not in message and all(word in message for word in ("start", "0.2", "end", "0.8"))


def another_model():
    import torch
    from comfy.model_patcher import ModelPatcher

    return ModelPatcher(torch.nn.Linear(1, 1), torch.device("cpu"), torch.device("cpu"))


def test_another_model_is_refused(comfyui):
    for sampled in (False, True):
        graph = Graph()
        latent = graph.empty()
        graph.model = graph.add("TiMTestProbe", **probe(another_model))
        message = refusal(comfyui, graph, graph.tim(latent) if sampled else graph.empty())
        assert "\n" not in message and "Linear" in message
        assert "Load TiM Checkpoint" in message and "Load TiM Model" in message


def test_interrupt(comfyui):
    graph = Graph()
    graph.save(graph.tim(steps=10000))
    start = len(comfyui.log_text())
    prompt_id = comfyui.queue(graph.prompt)
    end = time.monotonic() + 120
    while "/10000" not in comfyui.log_text()[start:]:  # the progress bar: it is sampling
        assert time.monotonic() < end, comfyui.log_text()[start:]
        time.sleep(0.05)
    comfyui.read("interrupt", {})
    asked = time.monotonic()
    kinds = [kind for kind, _ in comfyui.wait(prompt_id)["status"]["messages"]]
    assert "execution_interrupted" in kinds and time.monotonic() - asked < 30
    assert run_latents(comfyui, graph := Graph(), graph.tim(seed=11))[0].isfinite().all()


def decode_and_encode_in_tiles(model, clip, vae):
    """How far images and latents are from tim_core's tiles of 1024 pixels where little memory is left, and from whole ones."""
    import sys

    import torch

    memory = next(module for name, module in sys.modules.items() if name.endswith("tim_core.memory"))
    network, latent = vae.first_stage_model, torch.randn(1, 16, 136, 8)
    image = torch.rand(1, 1088, 64, 3)
    whole = vae.decode(latent), vae.encode(image)
    available, memory.available_bytes = memory.available_bytes, lambda device: 0
    try:
        tiles = vae.decode(latent), vae.encode(image)
    finally:
        memory.available_bytes = available
    with torch.no_grad():
        expected = (
            network.tiled_decode(latent).add(1).div(2).clamp(0, 1).movedim(1, -1),
            network.tiled_encode(image.movedim(-1, 1) * 2 - 1),
        )
    return {name: [float((a - b).abs().max()) for a, b in zip(tiles, others)] for name, others in (("tim", expected), ("whole", whole))}


def test_tiles_are_chosen_before_the_memory_runs_out(comfyui):
    found = inside(comfyui, decode_and_encode_in_tiles)
    assert max(found["tim"]) < 1e-6 and min(found["whole"]) > 1e-4


def decode_short_of_memory(model, clip, vae):
    """The sizes in latent cells that are decoded, the first without memory enough, and how far the image is from an untiled one."""
    import comfy.model_management as mm
    import torch

    decode, sizes = vae.first_stage_model.decoder.forward, []
    latent = torch.randn(1, 16, 136, 8)

    def short(z):
        sizes.append(list(z.shape[-2:]))
        if len(sizes) == 1:
            raise mm.OOM_EXCEPTION("out of memory")
        return decode(z)

    whole = vae.decode(latent)
    vae.first_stage_model.decoder.forward = short
    try:
        tiled = vae.decode(latent)
    finally:
        del vae.first_stage_model.decoder.forward
    return {"sizes": sizes, "difference": float((tiled - whole).abs().mean()), "spread": float(whole.std())}


def test_decoding_goes_on_in_large_tiles_where_memory_is_short(comfyui):
    """Tiles of 1024 pixels, as wide and as high, and twice and half of it: core blends three tilings."""
    found = inside(comfyui, decode_short_of_memory)
    first, *tiles = found["sizes"]
    assert first == [136, 8] and {height for height, _ in tiles} >= {128, 64} and min(height for height, _ in tiles) >= 8
    assert 0 < found["difference"] < 0.1 * found["spread"]


def cancelled_decode(model, clip, vae):
    """What is raised, and after how many of the 25 tiles and more, by a tiled decode that the user cancels in its third."""
    import comfy.model_management as mm
    import torch

    decode, tiles = vae.first_stage_model.decoder.forward, []

    def counted(z):
        tiles.append(z.shape)
        if len(tiles) == 3:
            mm.interrupt_current_processing(True)
        return decode(z)

    vae.first_stage_model.decoder.forward = counted
    try:
        vae.decode_tiled(torch.zeros(1, 16, 64, 64), tile_x=16, tile_y=16, overlap=4)
    except mm.InterruptProcessingException as error:
        return {"raised": type(error).__name__, "tiles": len(tiles)}
    finally:
        mm.interrupt_current_processing(False)
        del vae.first_stage_model.decoder.forward


def test_interrupt_between_tiles(comfyui):
    assert inside(comfyui, cancelled_decode) == {"raised": "InterruptProcessingException", "tiles": 3}


def test_progress(comfyui):
    """The editor receives the steps."""
    graph = Graph()
    sampled = graph.tim(steps=5, seed=123)
    graph.save(sampled)
    events = events_of(comfyui, graph.prompt)
    assert events[-1]["type"] == "execution_success"
    steps = [e["data"] for e in events if isinstance(e, dict) and e["type"] == "progress" and e["data"].get("node") == sampled[0]]
    values = [step["value"] for step in steps]  # newer versions leave some out when they come fast
    assert values == sorted(values) and values[-1] == 5 and all(step["max"] == 5 for step in steps)
