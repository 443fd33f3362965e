"""Each node beyond the spine in the real ComfyUI: what it does, with which of core's nodes, what it says when it cannot."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.comfy_graph import BUNDLED_NAME, PROMPT, Graph, close, images_of, inside, latent_of, refusal, run_images, run_latents, same_image
from tests.comfy_support import events_of, probe
from tests.support import mentions, sd_vae_names_of_2022
from tim_core import Pipeline, schedule
from tim_core.models.transformer import peak_bytes
from tim_core.weights.load import load_text_encoder
from tim_core.weights.read import read_parts
from tim_core.weights.save import convert, pack

pytestmark = pytest.mark.comfyui


@pytest.fixture(scope="module")
def pipe(tiny):
    return Pipeline.load(tiny, device="cpu")


def custom(graph: Graph, latent: list | None = None, cfg: float = 2.5, mode="transition", stochasticity=0.0, **times) -> list:
    """SamplerCustom with TiM's sampler and times."""
    settings = dict(steps=4, start=1.0, end=0.0, shift=1.0, times="") | times
    parts = dict(
        sampler=graph.add("TiMSamplerSelect", mode=mode, stochasticity=stochasticity), sigmas=graph.add("TiMScheduler", **settings),
        positive=graph.text(PROMPT), negative=graph.text(""), latent_image=latent or graph.empty(),
    )
    return graph.add("SamplerCustom", model=graph.model, add_noise=True, noise_seed=0, cfg=cfg, **parts)


# One trajectory, several nodes


def test_nodes_share_a_trajectory(comfyui):
    graph = Graph()
    draft = graph.tim(steps=2, end=0.6)
    refined = graph.tim(draft, steps=6, start=0.6, add_noise=False)
    joined = custom(graph, times="1, 0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0")
    close(*run_latents(comfyui, graph, refined, joined))


def test_tim_sampler_goes_on_from_a_stock_sampler(comfyui):
    graph = Graph()
    rest = dict(add_noise="enable", start_at_step=0, end_at_step=2, return_with_leftover_noise="enable")
    half = graph.stock(kind="KSamplerAdvanced", steps=4, **rest)
    close(*run_latents(comfyui, graph, graph.tim(half, steps=2, start=0.5, add_noise=False), graph.tim(steps=4)))


def test_without_leftover_noise_the_last_step_ends_at_0(comfyui):
    graph = Graph()
    cut = graph.tim(steps=2, end=0.5, return_with_leftover_noise=False)
    close(*run_latents(comfyui, graph, cut, custom(graph, times="1, 0.75, 0")))


def test_stochasticity_equals_pipeline(comfyui, pipe):
    graph = Graph()
    ours, parts = graph.tim(steps=5, stochasticity=0.4), custom(graph, steps=5, stochasticity=0.4)
    close(*run_latents(comfyui, graph, ours, parts))
    images = run_images(comfyui, graph := Graph(), graph.tim(steps=5, stochasticity=0.4))
    same_image(images, pipe(PROMPT, steps=5, stochasticity=0.4))
    assert (images - 255 * pipe(PROMPT, steps=5)).abs().max() > 2


def test_diffusion_mode_equals_pipeline(comfyui, pipe):
    graph = Graph()
    same_image(run_images(comfyui, graph, custom(graph, mode="diffusion", steps=6)), pipe(PROMPT, steps=6, mode="diffusion"))


def test_shifted_times(comfyui, pipe):
    graph = Graph()
    images = run_images(comfyui, graph, custom(graph, steps=5, shift=3.0))
    same_image(images, pipe(PROMPT, times=schedule.shifted(5, 3.0).tolist()))


@pytest.mark.parametrize("shift", [0.4, 3.0])
@pytest.mark.parametrize("steps, start", [(4, 1.0), (8, 1.0), (4, 0.5)])
def test_a_sampler_s_shift_equals_ksampler_behind_model_sampling(comfyui, shift, steps, start):
    graph = Graph()
    first = graph.tim(seed=1) if start < 1 else None
    ours, plain = graph.tim(first, steps=steps, start=start, shift=shift), graph.tim(first, steps=steps, start=start)
    graph.model = graph.add("ModelSamplingSD3", model=graph.model, shift=shift)
    stock, kept = graph.stock(first, steps=steps, denoise=start), graph.tim(first, steps=steps, start=start)
    again = graph.tim(first, steps=steps, start=start, shift=1.7)
    ours, plain, stock, kept, again = run_latents(comfyui, graph, ours, plain, stock, kept, again)
    assert torch.equal(ours, kept)
    close(ours, stock, 1e-5)  # the same times; core's euler adds in float32, TiM Sampler in float64
    assert (ours - plain).abs().max() > 1e-3 < (ours - again).abs().max()


def times_of(model, clip, vae):
    """Times of TiM Sampler and of KSampler's scheduler, at several shifts, steps and starts."""
    import sys

    import comfy.samplers

    sampling = next(module for name, module in sys.modules.items() if name.endswith("ComfyUI-TiM.nodes.adapters.sampling"))
    found = []
    for shift in (0.3, 1.7, 3.0):
        shifted = sampling.with_shift(model, shift)
        for steps in (1, 2, 4, 5, 8, 20, 100):
            stock = comfy.samplers.calculate_sigmas(shifted.get_model_object("model_sampling"), "simple", steps)
            found.append(sampling.time_grid(shifted, steps).tolist() == stock.tolist())
    return found


def test_shifted_times_are_those_of_the_scheduler(comfyui):
    assert inside(comfyui, times_of) == [True] * 21


def test_sigmas_replace_the_grid(comfyui):
    graph = Graph()
    sigmas = graph.add("TiMScheduler", steps=1, start=1.0, end=0.0, shift=1.0, times="1, 0.9, 0.4, 0")
    basic = graph.add("BasicScheduler", model=graph.model, scheduler="simple", steps=4, denoise=1.0)
    first = graph.add("SplitSigmas", sigmas=basic, step=2)
    half = graph.tim(sigmas=first)
    rest = graph.tim(half, sigmas=[first[0], 1], add_noise=False, steps=9, start=0.1, shift=5.0)
    finished = graph.tim(sigmas=first, return_with_leftover_noise=False)
    results = run_latents(
        comfyui, graph, graph.tim(sigmas=sigmas), custom(graph, times="1, 0.9, 0.4, 0"), rest, graph.tim(), finished,
        custom(graph, times="1, 0.75, 0"))
    for ours, wanted in zip(results[::2], results[1::2]):
        close(ours, wanted)


@pytest.mark.parametrize("method, settings, said", [
    ("KarrasScheduler", dict(steps=4, sigma_max=14.5, sigma_min=0.03, rho=7.0), "sigmas: 14.5 .* 0 to 1"),
    ("FlipSigmas", {}, "sigmas: 0.5 follows 0"), ("ManualSigmas", dict(sigmas="1"), "sigmas: 1 .* two"),
])
def test_sigmas_that_are_no_times_are_refused(comfyui, method, settings, said):
    if method not in comfyui.object_info:
        pytest.skip(f"this version of ComfyUI has no {method}")
    graph = Graph()
    if method == "FlipSigmas":
        settings = dict(sigmas=graph.add("TiMScheduler", steps=2, start=1.0, end=0.0, shift=1.0, times=""))
    assert re.search(said, refusal(comfyui, graph, graph.tim(sigmas=graph.add(method, **settings))))


def test_sigmas_from_noise_need_noise(comfyui):
    graph = Graph()
    sigmas = graph.add("TiMScheduler", steps=2, start=1.0, end=0.0, shift=1.0, times="")
    message = refusal(comfyui, graph, graph.tim(sigmas=sigmas, add_noise=False))
    assert mentions(message, "add_noise", "off", "sigmas start at 1")


@pytest.mark.parametrize("times, said", [
    ("1, half, 0", "half"), ("1, 0.5, 0.5", "0.5"), ("1", "two"), ("2, 0", "0 (to|and) 1"),
])
def test_bad_times_are_refused(comfyui, times, said):
    graph = Graph()
    message = refusal(comfyui, graph, custom(graph, times=times))
    assert message.startswith("times: ") and re.search(said, message)


def test_the_interval_of_a_stock_sampler(comfyui):
    graph = Graph()
    wanted = graph.tim(steps=4, cfg=4.0, guidance_low=0.3, guidance_high=0.6)
    graph.model = graph.add("TiMGuidanceInterval", model=graph.model, guidance_low=0.3, guidance_high=0.6)
    inner, outer = run_latents(comfyui, graph, graph.stock(steps=4, cfg=4.0), wanted)
    close(inner, outer)
    plain = run_latents(comfyui, graph := Graph(), graph.stock(steps=4, cfg=4.0))[0]
    assert (plain - inner).abs().max() > 1e-3
    graph = Graph()
    message = refusal(comfyui, graph, graph.tim(guidance_low=0.6, guidance_high=0.3))
    assert all(word in message for word in ("guidance_low", "0.6", "guidance_high", "0.3", "cfg 1"))


# Core's conditionings, latents, models


def test_conditioning_nodes(comfyui):
    """Every stock node on conditionings changes the latent, and only as it should."""
    graph = Graph()
    a, b = graph.text(PROMPT), graph.text("two yellow triangles")
    mask = graph.add("SolidMask", value=1.0, width=64, height=64)
    made = {
        "Combine": graph.add("ConditioningCombine", conditioning_1=a, conditioning_2=b),
        "Average": graph.add("ConditioningAverage", conditioning_to=a, conditioning_from=b, conditioning_to_strength=0.5),
        "Concat": graph.add("ConditioningConcat", conditioning_to=a, conditioning_from=b),
        "SetArea": graph.add("ConditioningCombine", conditioning_1=a, conditioning_2=graph.add(
            "ConditioningSetArea", conditioning=b, width=64, height=64, x=64, y=0, strength=1.0)),
        "TimestepRange": graph.add("ConditioningCombine", conditioning_1=a, conditioning_2=graph.add(
            "ConditioningSetTimestepRange", conditioning=b, start=0.0, end=0.5)),
        "plain": a,
        "whole mask": graph.add("ConditioningSetMask", conditioning=a, mask=mask, strength=1.0, set_cond_area="default"),
    }
    wide = graph.empty(128, 64)
    latents = dict(zip(made, run_latents(comfyui, graph, *(graph.tim(wide, cond) for cond in made.values()))))
    plain = latents.pop("plain")
    close(latents.pop("whole mask"), plain)
    for name, latent in latents.items():
        assert latent.isfinite().all() and (latent - plain).abs().max() > 1e-3, name


def test_masks_divide_the_image(comfyui):
    """In one step without guidance every cell is what its own prompt makes of it."""
    graph = Graph()
    a, b = graph.text("three red squares"), graph.text("two yellow triangles")  # as long: neither is padded for the other
    left = graph.add("SolidMask", value=1.0, width=64, height=64)
    canvas = graph.add("SolidMask", value=0.0, width=128, height=64)
    left = graph.add("MaskComposite", destination=canvas, source=left, x=0, y=0, operation="add")
    right = graph.add("InvertMask", mask=left)
    masked = [graph.add("ConditioningSetMask", conditioning=c, mask=mask, strength=1.0, set_cond_area="default")
              for c, mask in ((a, left), (b, right))]
    both = graph.add("ConditioningCombine", conditioning_1=masked[0], conditioning_2=masked[1])
    wide = graph.empty(128, 64)
    only_a, only_b, divided = run_latents(comfyui, graph, *(graph.tim(wide, cond, steps=1, cfg=1.0) for cond in (a, b, both)))
    close(divided[..., :8], only_a[..., :8])
    close(divided[..., 8:], only_b[..., 8:])
    assert (only_a - only_b).abs().max() > 1e-3


def test_a_repeated_latent_and_one_of_a_batch(comfyui):
    graph = Graph()
    repeated = graph.add("RepeatLatentBatch", samples=graph.empty(), amount=3)
    whole = graph.tim(repeated, seed=7)
    one = graph.add("LatentFromBatch", samples=graph.empty(batch_size=3), batch_index=2, length=1)
    whole, batch, one = run_latents(comfyui, graph, whole, graph.tim(graph.empty(batch_size=3), seed=7), graph.tim(one, seed=7))
    assert whole.shape[0] == 3
    close(whole, batch)
    close(one, batch[2:])


def test_merged_and_saved_models(comfyui, tiny, tmp_path):
    weights = load_file(tiny)
    other = {key: value + 0.05 * torch.randn_like(value) if value.is_floating_point() else value for key, value in weights.items()}
    half = {key: (value + other[key]) / 2 if value.is_floating_point() else value for key, value in weights.items()}
    same = {key: half[key] if key.startswith("model.") else value for key, value in weights.items()}
    save_file(other, tmp_path / "other.safetensors")
    save_file(same, tmp_path / "half.safetensors")
    for name in ("other", "half"):
        comfyui.add("checkpoints", tmp_path / f"{name}.safetensors", f"{name}.safetensors")
    graph = Graph()
    second = graph.add("TiMCheckpointLoader", ckpt_name="other.safetensors")
    graph.model = graph.add("ModelMergeSimple", model1=graph.model, model2=second, ratio=0.5)
    graph.add("ModelSave", model=graph.model, filename_prefix="saved/merged")
    merged = run_latents(comfyui, graph, graph.tim())[0]
    expected = run_latents(comfyui, graph := Graph("half.safetensors"), graph.tim())[0]
    close(merged, expected)
    comfyui.add("diffusion_models", next((comfyui.base / "output" / "saved").glob("merged*")), "merged.safetensors")
    graph = Graph()
    graph.model = graph.add("TiMModelLoader", model_name="merged.safetensors", weight_dtype="default")
    close(run_latents(comfyui, graph, graph.tim())[0], merged)


# Loading part by part


@pytest.fixture(scope="module")
def parts(comfyui, tiny, tmp_path_factory):
    """The tiny model's parts as files in their folders, the text model also as a folder in Hugging Face layout."""
    weights, folder, models = load_file(tiny), tmp_path_factory.mktemp("parts"), comfyui.base / "models"
    for name, prefix, place in (("model", "model.diffusion_model.", "diffusion_models"), ("vae", "vae.", "vae")):
        save_file({key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}, folder / name)
        comfyui.add(place, folder / name, f"part-{name}.safetensors")
    encoder = load_text_encoder(tiny)
    pack({"text-encoder": encoder}, models / "text_encoders" / "part-text.safetensors", metadata={"escape_prompts": False})
    layout = models / "text_encoders" / "tiny-gemma"
    layout.mkdir()
    save_file(dict(encoder.transformer.state_dict()), layout / "model.safetensors")
    (layout / "config.json").write_text(json.dumps({**encoder.gemma_config, "model_type": "gemma3_text"}))
    (layout / "tokenizer.json").write_bytes(encoder.tokenizer.data)
    return models


def separately(text: str = "part-text.safetensors", weight_dtype: str = "default") -> Graph:
    graph = Graph()
    graph.model = graph.add("TiMModelLoader", model_name="part-model.safetensors", weight_dtype=weight_dtype)
    graph.clip = graph.add("TiMTextEncoderLoader", text_encoder_name=text)
    graph.vae = graph.add("TiMVAELoader", vae_name="part-vae.safetensors")
    return graph


def test_parts_are_listed(comfyui, parts):
    def options(node: str, name: str) -> list[str]:
        return comfyui.get(f"object_info/{node}")[node]["input"]["required"][name][1]["options"]

    text = options("TiMTextEncoderLoader", "text_encoder_name")
    assert {"part-text.safetensors", "tiny-gemma/"} <= set(text) and text[0] == "tim-shapes (bundled)"
    assert "part-model.safetensors" in options("TiMModelLoader", "model_name")
    assert "part-vae.safetensors" in options("TiMVAELoader", "vae_name")
    assert options("TiMModelLoader", "weight_dtype") == ["default", "bf16", "fp8_e4m3fn", "fp8_e4m3fn_fast"]


def names_on_systems(model, clip, vae):
    import sys

    portable = next(module.portable for name, module in sys.modules.items() if name.endswith("nodes.adapters.files"))
    return [portable("gemma\\model.safetensors", "\\"), portable("gemma/model.safetensors", "/"), portable("a\\b", "/")]


def test_files_in_subfolders_have_one_name_on_every_system(comfyui):
    assert inside(comfyui, names_on_systems) == ["gemma/model.safetensors", "gemma/model.safetensors", "a\\b"]


def test_parts_make_the_same_image(comfyui, parts):
    whole = run_images(comfyui, graph := Graph(), graph.tim())
    graph = separately()
    assert torch.equal(run_images(comfyui, graph, graph.tim()), whole)


def test_a_folder_of_hugging_face(comfyui, parts):
    """Its prompts are escaped, as for the released weights; a prompt without special characters is the same either way."""
    close(*(run_latents(comfyui, graph := separately(text), graph.tim())[0] for text in ("tiny-gemma/", "part-text.safetensors")))


def test_the_bundled_parts(comfyui):
    graph = Graph("tim-shapes (bundled)")
    whole = graph.picture(graph.tim())
    name = "tim-shapes (bundled)"
    graph.model = graph.add("TiMModelLoader", model_name=name, weight_dtype="default")
    graph.clip, graph.vae = graph.add("TiMTextEncoderLoader", text_encoder_name=name), graph.add("TiMVAELoader", vae_name=name)
    parts = graph.picture(graph.tim())
    outputs = comfyui.run(graph.prompt)
    assert torch.equal(*(images_of(comfyui, outputs, node) for node in (whole, parts)))


def weight_kinds(model):
    network = model.model.diffusion_model
    return [str(network.blocks[0].attn.qkv.weight.dtype), bool(model.model.model_config.optimizations.get("fp8"))]


@pytest.mark.parametrize("weight_dtype, kind, bound", [("bf16", "bfloat16", 0.05), ("fp8_e4m3fn", "float8_e4m3fn", 0.5),
                                                       ("fp8_e4m3fn_fast", "float8_e4m3fn", 0.5)])
def test_weight_dtypes(comfyui, parts, weight_dtype, kind, bound):
    from tests.comfy_support import probe

    exact = run_latents(comfyui, graph := separately(), graph.tim())[0]
    graph = separately(weight_dtype=weight_dtype)
    node = graph.add("TiMTestProbe", **probe(weight_kinds), model=graph.model)[0]
    save = graph.save(graph.tim())
    outputs = comfyui.run(graph.prompt)
    assert json.loads(outputs[node]["text"][0]) == [f"torch.{kind}", weight_dtype.endswith("fast")]
    difference = (latent_of(comfyui, outputs, save) - exact).std() / exact.std()
    assert 0 < difference < bound, difference


@pytest.mark.parametrize("kind, name, folder, wanted", [
    ("TiMModelLoader", "model_name", "diffusion_models", "transformer"),
    ("TiMTextEncoderLoader", "text_encoder_name", "text_encoders", "Gemma"),
    ("TiMVAELoader", "vae_name", "vae", "DC-AE"),
])
def test_a_loader_says_what_the_wrong_file_is(comfyui, tiny, tmp_path, kind, name, folder, wanted):
    strange = {"decoder.conv_in.weight": torch.zeros(4), "encoder.down.0.block.0.conv1.weight": torch.zeros(4)}
    save_file(strange, tmp_path / "kl.safetensors")
    weights = load_file(tiny)
    ours = {"TiMModelLoader": "vae.", "TiMTextEncoderLoader": "vae.", "TiMVAELoader": "model."}[kind]
    save_file({key: value for key, value in weights.items() if key.startswith(ours)}, tmp_path / "other.safetensors")
    for file, found in (("kl", "KL autoencoder"), ("other", "DC-AE" if ours == "vae." else "TiM transformer")):
        comfyui.add(folder, tmp_path / f"{file}.safetensors", f"wrong-{file}.safetensors")
        more = {"weight_dtype": "default"} if kind == "TiMModelLoader" else {}
        graph = Graph()
        loaded = graph.add(kind, **{name: f"wrong-{file}.safetensors"}, **more)
        setattr(graph, {"TiMModelLoader": "model", "TiMTextEncoderLoader": "clip", "TiMVAELoader": "vae"}[kind], loaded)
        result = graph.add("VAEEncode", pixels=graph.add("EmptyImage", width=64, height=64, batch_size=1, color=0), vae=graph.vae)
        message = refusal(comfyui, graph, result if kind == "TiMVAELoader" else graph.tim())
        assert f"wrong-{file}.safetensors" in message and found in message and wanted in message


@pytest.mark.parametrize("kind, name, listed, file, slot", [
    ("TiMCheckpointLoader", "ckpt_name", "deep/damaged.safetensors", "checkpoints/deep/damaged.safetensors", "model"),
    ("TiMModelLoader", "model_name", "damaged.safetensors", "diffusion_models/damaged.safetensors", "model"),
    ("TiMTextEncoderLoader", "text_encoder_name", "damaged/", "text_encoders/damaged/model.safetensors", "clip"),
    ("TiMVAELoader", "vae_name", "half.safetensors", "vae/half.safetensors", "vae"),  # found when the network is built
])
def test_errors_name_files_from_the_models_folder_on(comfyui, tiny, kind, name, listed, file, slot):
    """A shared error report holds neither the user's name nor where ComfyUI is installed."""
    damaged = comfyui.base / "models" / file
    damaged.parent.mkdir(exist_ok=True)
    if slot == "vae":
        save_file({key: value for key, value in load_file(tiny).items() if key.startswith("vae.decoder")}, damaged)
    else:
        damaged.write_text("{")
    if slot == "clip":
        damaged.with_name("config.json").write_text("{}")
    graph = Graph()
    more = {"weight_dtype": "default"} if kind == "TiMModelLoader" else {}
    setattr(graph, slot, graph.add(kind, **{name: listed}, **more))
    pixels = graph.add("EmptyImage", width=64, height=64, batch_size=1, color=0)
    message = refusal(comfyui, graph, graph.add("VAEEncode", pixels=pixels, vae=graph.vae) if slot == "vae" else graph.tim())
    assert message.startswith(f"{file.partition('/')[2]}: ") and str(comfyui.base) not in message, message


# Latents


def sizes_offered(model, clip, vae):
    """(native, ratio, area, width, height) of every preset, for models of several native sizes."""
    import dataclasses
    import sys

    latent = next(module for name, module in sys.modules.items() if name.endswith("ComfyUI-TiM.nodes.latent"))
    config, found = model.model.model_config, []
    before = config.defaults
    try:
        for native in ((64, 64), (256, 256), (1024, 1024), (96, 64)):
            config.defaults = dataclasses.replace(before, width=native[0], height=native[1])
            for ratio in ("native", *latent.RATIOS):
                for area in latent.AREAS:
                    made, width, height = latent.TiMEmptyLatent.execute(model, ratio, area, 0, 0, 1, False).result
                    assert list(made["samples"].shape) == [1, 16, height // 8, width // 8]
                    found.append([*native, ratio, int(area), width, height])
    finally:
        config.defaults = before
    return found


def test_presets_are_multiples_of_the_native_size(comfyui):
    found = inside(comfyui, sizes_offered)
    assert len(found) == 4 * 12 * 4
    for *native, ratio, area, width, height in found:
        across, down = native if ratio == "native" else map(int, ratio.split(":"))
        wanted = (native[0] * native[1] * area * across / down) ** 0.5, (native[0] * native[1] * area * down / across) ** 0.5
        if max(wanted) > 4096:
            wanted = [side * 4096 / max(wanted) for side in wanted]
        assert max(abs(width - wanted[0]), abs(height - wanted[1])) <= 4.5 and width % 8 == height % 8 == 0, (native, ratio, area)
    assert [row[4:] for row in found if row[2] == "native" and row[3] == 1] == [[64, 64], [256, 256], [1024, 1024], [96, 64]]


@pytest.mark.parametrize("settings, size", [
    (dict(), (64, 64)), (dict(area_factor="4"), (128, 128)), (dict(aspect_ratio="2:3"), (56, 80)),
    (dict(aspect_ratio="2:3", swap=True), (80, 56)), (dict(aspect_ratio="custom"), (64, 64)),
    (dict(aspect_ratio="custom", width=100), (104, 64)), (dict(aspect_ratio="custom", width=48, height=96, swap=True), (96, 48)),
])
def test_the_empty_latent_and_its_size(comfyui, settings, size):
    """The tiny model is made for 64x64."""
    graph = Graph()
    settings = dict(aspect_ratio="native", area_factor="1", width=0, height=0, batch_size=2, swap=False) | settings
    latent = graph.add("TiMEmptyLatent", model=graph.model, **settings)
    canvas = graph.add("EmptyImage", width=[latent[0], 1], height=[latent[0], 2], batch_size=1, color=0)
    empty, encoded = run_latents(comfyui, graph, latent, graph.add("VAEEncode", pixels=canvas, vae=graph.vae))
    assert empty.shape == (2, 16, size[1] // 8, size[0] // 8) and not empty.any() and encoded.shape[1:] == empty.shape[1:]


def test_an_aspect_ratio_that_is_not_offered_is_refused_once(comfyui):
    """The editor's first name for "custom" among them, which workflows saved with it still hold."""
    for ratio in ("as below", "7:5"):
        graph = Graph()
        sizes = dict(area_factor="1", width=64, height=64, batch_size=1)
        message = refusal(comfyui, graph, graph.add("TiMEmptyLatent", model=graph.model, aspect_ratio=ratio, **sizes))
        assert ratio in message and "custom" in message and "16:9" in message


# Upscaling


def upscaled(graph: Graph, **inputs) -> list:
    settings = dict(
        seed=0, steps="4", cfg=2.5, strength=0.5, factor=2.0, width=0, height=0, stages=1, guidance_low=0.0, guidance_high=1.0,
        stochasticity=0.0,
    ) | inputs
    links = dict(model=graph.model, vae=graph.vae, positive=graph.text(PROMPT), negative=graph.text(""))
    return graph.add("TiMNativeUpscale", **links, **settings)


@pytest.mark.parametrize("settings", [
    dict(), dict(factor=1.5, steps="2", strength=0.8), dict(width=96, stages=2, steps="2, 3"), dict(width=128, height=64, cfg=1.0),
])
def test_upscale_equals_pipeline(comfyui, pipe, settings):
    graph = Graph()
    small = graph.add("VAEDecode", samples=graph.tim(), vae=graph.vae)
    result = upscaled(graph, image=small, **settings)
    save = graph.add("SaveImage", images=result, filename_prefix="large")[0]
    latent = graph.save([result[0], 1])
    outputs = comfyui.run(graph.prompt)
    expected = pipe.upscale(pipe(PROMPT), PROMPT, **({"strength": 0.5} | settings))
    same_image(images_of(comfyui, outputs, save), expected)
    same_image(255 * pipe.decode(latent_of(comfyui, outputs, latent)), expected)


def test_upscale_takes_a_latent_or_an_image(comfyui):
    graph = Graph()
    sampled = graph.tim()
    image = graph.add("VAEDecode", samples=sampled, vae=graph.vae)
    a, b = upscaled(graph, image=image), upscaled(graph, latent=sampled)
    close(*run_latents(comfyui, graph, [a[0], 1], [b[0], 1]))
    for links, found in (({}, "neither is connected"), ({"image": image, "latent": sampled}, "both are connected")):
        fresh = Graph()
        fresh.prompt, fresh.model, fresh.vae = {**graph.prompt}, graph.model, graph.vae
        assert found in refusal(comfyui, fresh, [upscaled(fresh, **links)[0], 1])


def test_upscale_keeps_the_noise_of_a_image_of_a_batch(comfyui):
    graph = Graph()
    batch = graph.tim(graph.empty(batch_size=2))
    second = graph.add("LatentFromBatch", samples=batch, batch_index=1, length=1)
    both, one = run_latents(comfyui, graph, [upscaled(graph, latent=batch)[0], 1], [upscaled(graph, latent=second)[0], 1])
    close(both[1:], one, 1e-3)


STEPS = {"INT": ("PrimitiveInt", 3, "3"), "STRING": ("PrimitiveString", "2, 3", "2, 3")}  # type -> core's node, its value, the widget's


@pytest.mark.parametrize("kind", STEPS)
def test_steps_can_be_a_connected_number_or_text(comfyui, kind):
    node, value, text = STEPS[kind]
    graph = Graph()
    image, steps = graph.add("EmptyImage", width=32, height=32, batch_size=1, color=200), graph.add(node, value=value)
    large = [[upscaled(graph, image=image, stages=2, steps=given)[0], 1] for given in (steps, text)]
    a, b, swept_a, swept_b = run_latents(comfyui, graph, *large, sweep_images(graph, steps), sweep_images(graph, text))
    assert torch.equal(a, b) and torch.equal(swept_a, swept_b) and len(swept_a) == len(text.split())


def one_channel(model, clip, vae):
    """The shape of an upscaled image that had one channel, as masks and depth maps of some packs have."""
    import sys

    import torch

    node = next(module for name, module in sys.modules.items() if name.endswith("ComfyUI-TiM.nodes.upscale")).TiMNativeUpscale
    text = clip.encode_from_tokens_scheduled(clip.tokenize("a circle"))
    settings = dict(seed=0, steps="1", cfg=1.0, strength=0.5, factor=2.0, width=0, height=0, stages=1)
    limits = dict(guidance_low=0.0, guidance_high=1.0, stochasticity=0.0)
    done = node.execute(model, vae, text, text, image=torch.rand(1, 16, 16, 1), **settings, **limits)
    return list(done.result[0].shape)


def test_upscale_takes_a_image_of_one_channel(comfyui):
    assert inside(comfyui, one_channel) == [1, 32, 32, 3]


def upscale_model(server, folder: Path) -> str:
    """A small random upscaler of factor 3, of the kind that Real-ESRGAN's compact models are -> its name."""
    torch.manual_seed(3)
    weights = {"body.1.weight": torch.rand(8), "body.3.weight": torch.rand(8)}
    for i, (into, out) in {0: (3, 8), 2: (8, 8), 4: (8, 27)}.items():
        weights |= {f"body.{i}.weight": torch.randn(out, into, 3, 3) / 20, f"body.{i}.bias": torch.zeros(out)}
    save_file(weights, folder / "compact.safetensors")
    (server.base / "models" / "upscale_models").mkdir(exist_ok=True)
    return server.add("upscale_models", folder / "compact.safetensors", "compact.safetensors")


def by_hand(graph: Graph, image: list, sizes: list, *, steps=2, strength=0.6, resize_method="bicubic", mask=None, upscale_model=None):
    """What TiM Native Upscale does, in core's nodes and TiM Sampler -> IMAGE, LATENT."""
    latent = None
    for width, height in sizes:
        if upscale_model:
            image = graph.add("ImageUpscaleWithModel", upscale_model=upscale_model, image=image)
        scale = dict(upscale_method=resize_method, width=width, height=height, crop="center")
        large = graph.add("ImageScale", image=image, **scale)
        latent = graph.add("VAEEncode", pixels=large, vae=graph.vae)
        if mask:
            latent = graph.add("SetLatentNoiseMask", samples=latent, mask=mask)
        latent = graph.tim(latent, steps=steps, start=strength)
        image = graph.add("VAEDecode", samples=latent, vae=graph.vae)
        if mask:
            image = graph.add("ImageCompositeMasked", destination=large, source=image, x=0, y=0, resize_source=False, mask=mask)
    return image, latent


def test_upscale_equals_the_nodes_it_is_made_of(comfyui, tmp_path):
    graph = Graph()
    small = graph.add("VAEDecode", samples=graph.tim(), vae=graph.vae)
    enlarger = graph.add("UpscaleModelLoader", model_name=upscale_model(comfyui, tmp_path))
    black, white = (graph.add("SolidMask", value=value, width=32, height=64) for value in (0.0, 1.0))
    whole = graph.add("SolidMask", value=1.0, width=64, height=64)
    mask = graph.add("MaskComposite", destination=whole, source=black, x=0, y=0, operation="multiply")
    large, stages = [(128, 128)], [(88, 88), (128, 128)]
    cases = {method: ({}, large, dict(resize_method=method)) for method in ("bicubic", "lanczos", "bilinear", "area", "nearest-exact")}
    cases |= {
        "two stages": (dict(stages=2), stages, {}),
        "cropped": (dict(width=96, height=128), [(96, 128)], dict(resize_method="lanczos")),
        "model": ({}, large, dict(upscale_model=enlarger)),
        "model, cropped, lanczos": (dict(width=136, height=96), [(136, 96)], dict(upscale_model=enlarger, resize_method="lanczos")),
        "mask": ({}, large, dict(mask=mask)), "mask, two stages": (dict(stages=2), stages, dict(mask=mask)),
        "full mask": ({}, large, dict(mask=white)),
    }
    pairs = {}
    for name, (sizes, steps, options) in cases.items():
        node = upscaled(graph, image=small, steps=2, strength=0.6, **sizes, **options)
        pairs[name] = ((node, [node[0], 1]), by_hand(graph, small, steps, **options))
    saves = {name: [(graph.add("SaveImage", images=image, filename_prefix=name)[0], graph.save(latent)) for image, latent in pair]
             for name, pair in pairs.items()}
    plain = graph.add("ImageScale", image=small, upscale_method="bicubic", width=128, height=128, crop="disabled")
    plain = graph.add("SaveImage", images=plain, filename_prefix="plain")[0]
    outputs, found = comfyui.run(graph.prompt), {}
    for name, pair in saves.items():
        (image, latent), (hand_image, hand_latent) = pair
        close(latent_of(comfyui, outputs, latent), latent_of(comfyui, outputs, hand_latent))
        found[name] = images_of(comfyui, outputs, image)
        assert (found[name] - images_of(comfyui, outputs, hand_image)).abs().max() <= 1, name
    assert (found["bicubic"] - found["model"]).abs().max() > 2
    redrawn = (images_of(comfyui, outputs, plain) - found["mask"]).abs().amax(dim=(0, 1, 3))
    assert redrawn[:62].max() <= 1 < redrawn[66:].min()  # the right half


def test_masks_of_another_batch_and_shape_equal_the_nodes_it_is_made_of(comfyui):
    """Two masks, half as high as wide, for three square images."""
    graph = Graph()
    small = graph.add("VAEDecode", samples=graph.tim(graph.empty(batch_size=3)), vae=graph.vae)
    black, white = (graph.add("SolidMask", value=value, width=64, height=32) for value in (0.0, 1.0))
    halves = [graph.add("MaskComposite", destination=white, source=black, x=x, y=y, operation="multiply") for x, y in ((32, 0), (0, 16))]
    shown = [graph.add("MaskToImage", mask=half) for half in halves]
    mask = graph.add("ImageToMask", image=graph.add("ImageBatch", image1=shown[0], image2=shown[1]), channel="red")
    node = upscaled(graph, image=small, steps=2, strength=0.6, mask=mask)
    image, latent = by_hand(graph, small, [(128, 128)], mask=mask)
    saves = [graph.add("SaveImage", images=each, filename_prefix="masks")[0] for each in (node, image)]
    latents = [graph.save(each) for each in ([node[0], 1], latent)]
    outputs = comfyui.run(graph.prompt)
    close(*(latent_of(comfyui, outputs, each) for each in latents))
    assert (images_of(comfyui, outputs, saves[0]) - images_of(comfyui, outputs, saves[1])).abs().max() <= 1


def test_the_mask_of_an_upscale_keeps_the_enlargement(comfyui):
    graph = Graph()
    small = graph.add("VAEDecode", samples=graph.tim(), vae=graph.vae)
    nothing = graph.add("SolidMask", value=0.0, width=16, height=16)
    large = graph.add("ImageScale", image=small, upscale_method="bicubic", width=128, height=128, crop="disabled")
    redrawn = upscaled(graph, image=small, mask=nothing)
    saves = [graph.add("SaveImage", images=image, filename_prefix="kept")[0] for image in (redrawn, large)]
    outputs = comfyui.run(graph.prompt)
    kept, plain = (images_of(comfyui, outputs, save) for save in saves)
    assert torch.equal(kept, plain)


def tiled(model, clip, vae):
    """Largest differences of a tiled upscale from tim_core's sampler on blended tiles, and from the whole; sizes the network saw."""
    import sys

    import torch
    from comfy.patcher_extension import WrappersMP

    modules = {name.split("ComfyUI-TiM.")[1]: module for name, module in sys.modules.items() if "ComfyUI-TiM." in name}
    node = modules["nodes.upscale"].TiMNativeUpscale
    text = clip.encode_from_tokens_scheduled(clip.tokenize("a circle"))
    torch.manual_seed(0)
    image, seen = torch.rand(1, 64, 48, 3), []
    fixed = dict(seed=5, steps=3, cfg=1.0, strength=0.6, factor=2.0, width=0, height=0, stages=1)
    limits = dict(guidance_low=0.0, guidance_high=1.0, stochasticity=0.0, image=image)
    watched, latents = model.clone(), {}
    watched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", lambda run, x, *a, **k: seen.append(x.shape[2:]) or run(x, *a, **k))
    for side in (0, 64, 256):
        latents[side] = node.execute(watched, vae, text, text, tile_size=side, **fixed, **limits).result[1]["samples"]

    upscale, schedule, sampler = modules["tim_core.upscale"], modules["tim_core.schedule"], modules["tim_core.sampler"]
    network, context = model.model.diffusion_model, text[0][0]
    clean = vae.encode(upscale.enlarge(image, 96, 128))
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(5))

    def in_tiles(x, t, r, y):
        return upscale.in_tiles(lambda part: network(part, t, y, transformer_options={"tim_r": r}), x, 8)

    wanted, _ = sampler.sample(in_tiles, 0.6 * noise + 0.4 * clean, schedule.uniform(3, 0.6), context)
    gap = [float((latents[64] - wanted).abs().max()), float((latents[256] - latents[0]).abs().max()),
           float((latents[64] - latents[0]).abs().max())]
    return [*gap, sorted({tuple(shape) for shape in seen})]


def test_tiles_are_blended_in_every_step(comfyui):
    equal, whole, apart, sizes = inside(comfyui, tiled)
    assert equal < 1e-4 and whole == 0 and apart > 1e-3 and sizes == [[8, 8], [16, 12]]


def test_an_upscale_s_strength_defaults_to_the_record_s(comfyui, tiny, tmp_path):
    comfyui.add("checkpoints", convert(tiny, tmp_path / "strong.safetensors", metadata={"strength": 0.7}), "strong.safetensors")
    for checkpoint, strength in (("tiny.safetensors", 0.3), ("strong.safetensors", 0.7)):
        graph = Graph(checkpoint)
        small = graph.tim(steps=1)
        a, b = run_latents(comfyui, graph, *([upscaled(graph, latent=small, strength=s)[0], 1] for s in (0.0, strength)))
        assert torch.equal(a, b)


@pytest.mark.parametrize("settings, said", [
    (dict(tile_size=8), "tile_size: 8 .* 16"), (dict(width=100), "size: 100x100 .* 256x256"), (dict(factor=0.4), "0.4 .*0.5"),
    (dict(steps="4, 4"), "steps: .*4, 4"), (dict(steps="none"), "steps: .*none"), (dict(factor=16.0), "8192x8192 .*4096"),
    (dict(stages=2, steps="1, 2, 3"), "steps: .*1, 2, 3.* 2"),
])
def test_upscale_refuses(comfyui, settings, said):
    graph = Graph()
    image = graph.add("EmptyImage", width=512, height=512, batch_size=1, color=0)
    assert re.search(said, refusal(comfyui, graph, [upscaled(graph, image=image, **settings)[0], 1]))


def test_upscale_refuses_an_empty_latent(comfyui):
    graph = Graph()
    assert mentions(refusal(comfyui, graph, [upscaled(graph, latent=graph.empty())[0], 1]), "latent", "empty", "sampler")


# Looking


def swept(graph: Graph, steps: str | list, output: int = 0, batch_size: int = 1, **settings) -> list:
    links = dict(model=graph.model, vae=graph.vae, positive=graph.text(PROMPT), negative=graph.text(""))
    settings = dict(seed=0, cfg=2.5, guidance_low=0.0, guidance_high=1.0) | settings
    node = graph.add("TiMStepSweep", **links, latent_image=graph.empty(batch_size=batch_size), steps=steps, **settings)
    return [node[0], output]


def test_sweep_equals_pipeline(comfyui, pipe):
    graph = Graph()
    sweep = swept(graph, "1-2, 5", batch_size=2, seed=3)
    sheet = graph.add("SaveImage", images=sweep, filename_prefix="sheet")[0]
    each = graph.add("SaveImage", images=[sweep[0], 1], filename_prefix="each")[0]
    outputs = comfyui.run(graph.prompt)
    same_image(images_of(comfyui, outputs, each), torch.cat([pipe([PROMPT] * 2, steps=n, seed=3) for n in (1, 2, 5)]))
    found = images_of(comfyui, outputs, sheet)
    assert found.shape[0] == 1 and found.shape[2] == 3 * 256 + 4 * 8  # two images side by side in each cell, twice as large


AXES = {"cfg": ("1-3", [1, 2, 3]), "seed": ("7, 3", [7, 3]), "shift": ("0.5, 3", [0.5, 3]), "stochasticity": ("0-1 +0.5", [0, 0.5, 1])}


def test_the_second_axis_of_a_sweep_equals_tim_sampler(comfyui):
    graph, saves = Graph(), {}
    for axis, (text, values) in AXES.items():
        sweep = swept(graph, "2, 4", 1, seed=5, axis=axis, axis_values=text)
        hand = [graph.add("VAEDecode", samples=graph.tim(steps=steps, **({"seed": 5} | {axis: value})), vae=graph.vae)
                for value in values for steps in (2, 4)]
        sheet = graph.add("SaveImage", images=[sweep[0], 0], filename_prefix=f"{axis}-sheet")[0]
        saves[axis] = [graph.add("SaveImage", images=image, filename_prefix=axis)[0] for image in (sweep, *hand)], sheet
    outputs = comfyui.run(graph.prompt)
    for axis, ((sweep, *hand), sheet) in saves.items():
        found, wanted = images_of(comfyui, outputs, sweep), torch.cat([images_of(comfyui, outputs, each) for each in hand])
        assert torch.equal(found, wanted), axis
        assert (found[-2:] - found[:2]).abs().max() > 1, axis
        assert images_of(comfyui, outputs, sheet).shape[2] == 2 * 192 + 3 * 8, axis  # a column for each step count


@pytest.mark.parametrize("settings, said", [
    (dict(steps="1, x"), "steps: 'x'"), (dict(steps="0"), "steps: 0 "), (dict(steps="1-500"), "steps: '1-500' .* 100 "),
    (dict(axis="cfg", axis_values=""), "axis_values: ''"), (dict(axis="cfg", axis_values="0.5"), "cfg: 0.5 "),
    (dict(axis="stochasticity", axis_values="1, 2"), "stochasticity: 2 "), (dict(axis="shift", axis_values="0"), "shift: 0 "),
    (dict(axis="seed", axis_values="1.5"), "seed: 1.5 "),
    (dict(steps="1-100", axis="seed", axis_values="1-100", batch_size=50), "64x64.* 268 "),
])
def test_a_sweep_refuses(comfyui, settings, said):
    graph = Graph()
    sweep = swept(graph, **({"steps": "1"} | settings))
    message = refusal(comfyui, graph, graph.add("VAEEncode", pixels=sweep, vae=graph.vae))
    assert re.search(said, message), message


def test_a_sweep_says_where_it_is(comfyui):
    graph = Graph()
    graph.add("SaveImage", images=swept(graph, "1, 2", seed=31, axis="cfg", axis_values="1, 3"), filename_prefix="said")
    said = [event for event in events_of(comfyui, graph.prompt) if isinstance(event, bytes) and b" of 4" in event]
    assert [event[event.index(b" of 4") - 1 :].decode() for event in said] == [
        "1 of 4: 1 step, cfg 1", "2 of 4: 2 steps, cfg 1", "3 of 4: 1 step, cfg 3", "4 of 4: 2 steps, cfg 3", "4 of 4"]


def sweep_latent(graph: Graph, steps: str | list, output: int = 0) -> list:
    return graph.add("VAEEncode", pixels=swept(graph, steps, output), vae=graph.vae)


def sweep_images(graph: Graph, steps: str | list) -> list:
    """The sweep's images, which unlike its sheet do not say how long they took, encoded."""
    return sweep_latent(graph, steps, output=1)


def count_evaluations(model, clip, vae):
    """The labels under sweeps of two images a cell, read before they become pixels."""
    import sys

    sweep = next(module for name, module in sys.modules.items() if name.endswith("ComfyUI-TiM.nodes.sweep"))
    labels, real = [], sweep.contact_sheet
    sweep.contact_sheet = lambda images, texts, columns: labels.extend(texts) or real(images, texts, columns)
    try:
        conds = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in ("a red circle", "")]
        latent = sys.modules[sweep.__name__.replace(".sweep", ".adapters.sampling")].empty_latent(model, 64, 64, 2)
        sweep.TiMStepSweep.execute(model, vae, *conds, latent, 0, "1, 2, 5", 2.5, 0.0, 1.0)
        sweep.TiMStepSweep.execute(model, vae, *conds, latent, 0, 2, 2.5, 0.0, 1.0, "cfg", "1, 2.5")
    finally:
        sweep.contact_sheet = real
    return labels


def test_the_sweep_counts_evaluations(comfyui):
    labels = inside(comfyui, count_evaluations)
    assert [label.rpartition(" · ")[0] for label in labels] == [
        "1 step · 1 NFE", "2 steps · 3 NFE", "5 steps · 9 NFE", "cfg 1 · 2 steps · 2 NFE", "cfg 2.5 · 2 steps · 3 NFE"]


@pytest.mark.parametrize("kind", ["upscale", "sweep"])
def test_progress_covers_all_samplings(comfyui, kind):
    graph = Graph()
    image = graph.add("EmptyImage", width=64, height=64, batch_size=1, color=200)
    node = upscaled(graph, image=image, stages=2, steps="3, 4", seed=99) if kind == "upscale" else sweep_latent(graph, "2, 4")
    graph.save([node[0], 1] if kind == "upscale" else node)
    key = node[0] if kind == "upscale" else graph.prompt[node[0]]["inputs"]["pixels"][0]
    events = events_of(comfyui, graph.prompt)
    assert events[-1]["type"] == "execution_success", events[-1]
    steps = [e["data"] for e in events if isinstance(e, dict) and e["type"] == "progress" and e["data"].get("node") == key]
    values = [step["value"] for step in steps]
    assert values == sorted(values) and values[-1] == 7 and {step["max"] for step in steps} == {7}


def previews(server, graph: Graph, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The last live preview of a run, and the image that was made, both size x size pixels, (size * size, 3) in 0..255."""
    import io

    from PIL import Image

    def pixels(image) -> torch.Tensor:
        small = image.convert("RGB").resize((size, size), Image.Resampling.BOX)
        return torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).float().view(-1, 3)

    node = next(key for key, each in graph.prompt.items() if each["class_type"] == "SaveImage")
    events = events_of(server, graph.prompt)
    shown = [event for event in events if isinstance(event, bytes)]
    assert shown, "no preview was sent"
    last = shown[-1]
    start = next(i for i in range(len(last)) if last[i : i + 3] == b"\xff\xd8\xff" or last[i : i + 4] == b"\x89PNG")
    done = next(e for e in events if isinstance(e, dict) and e["type"] == "executed" and e["data"]["node"] == node)["data"]["output"]
    return pixels(Image.open(io.BytesIO(last[start:]))), pixels(Image.open(server.file(done["images"][0])))


@pytest.mark.parametrize("kind", ["tim", "stock"])
def test_previews_look_like_the_image(comfyui, kind):
    """The last preview of the bundled model is the image, where ComfyUI takes a decoder; in older versions it is a small one."""
    pairs = []
    for seed in range(77, 81):
        graph = Graph(BUNDLED_NAME)
        graph.picture(getattr(graph, kind)(seed=seed, steps=6))
        pairs.append(previews(comfyui, graph, 8))
    a, b = (torch.cat(parts) for parts in zip(*pairs))
    hues = [colours - colours.mean(1, keepdim=True) for colours in (a, b)]  # what a grey preview would have none of
    decodes = int(comfyui.stats["system"]["comfyui_version"].split(".")[1]) >= 25
    for seen, made, least in ((a, b, 0.99 if decodes else 0.7), (*hues, 0.99 if decodes else 0.6)):
        assert torch.corrcoef(torch.stack((seen.flatten(), made.flatten())))[0, 1] > least


def test_the_preview_of_a_large_latent_is_linear(comfyui):
    graph = Graph(BUNDLED_NAME)
    graph.picture(graph.tim(graph.empty(320, 320), seed=7, steps=2))
    seen, made = previews(comfyui, graph, 40)
    assert torch.corrcoef(torch.stack((seen.flatten(), made.flatten())))[0, 1] > 0.5


# Classes


@pytest.fixture(scope="module")
def classes(class_files):
    graph = Graph()
    graph.model = graph.add("TiMModelLoader", model_name="c2i_model_512.safetensors", weight_dtype="default")
    graph.vae = graph.add("TiMVAELoader", vae_name="dc-ae-f32c32-sana-1.1.safetensors")
    return graph


def copy(graph: Graph) -> Graph:
    other = Graph()
    other.prompt, other.model, other.clip, other.vae = {**graph.prompt}, graph.model, graph.clip, graph.vae
    return other


def labelled(graph: Graph, label: str, **settings) -> list:
    positive, negative = graph.add("TiMClassLabel", label=label), graph.add("TiMClassLabel", label="")
    return graph.tim(graph.empty(64, 64), positive, negative, **settings)


def test_a_name_and_its_number_are_one_class(comfyui, classes):
    graph = copy(classes)
    by_name, by_number, other, stock = run_latents(
        comfyui, graph, labelled(graph, "Golden_Retriever"), labelled(graph, "207"), labelled(graph, "tench"),
        graph.stock(graph.empty(64, 64), graph.add("TiMClassLabel", label="207"), graph.add("TiMClassLabel", label="null")),
    )
    assert torch.equal(by_name, by_number) and (by_name - other).abs().max() > 1e-3
    close(stock, by_name)


def test_classes_equal_pipeline(comfyui, classes, class_files):
    """Every way through the graph guides where Pipeline does: in the interval of the checkpoint's defaults, unless set."""
    models = comfyui.base / "models"
    model, vae = models / "diffusion_models" / "c2i_model_512.safetensors", models / "vae" / "dc-ae-f32c32-sana-1.1.safetensors"
    pipe = Pipeline.load({"model": model, "vae": vae}, device="cpu")
    assert pipe.defaults.guidance_interval == (0.0, 0.7)
    settings = dict(steps=6, cfg=3.0, seed=0, width=64, height=64)
    graph = copy(classes)
    label, null, empty = graph.add("TiMClassLabel", label="207"), graph.add("TiMClassLabel", label=""), graph.empty(64, 64)
    given = dict(steps=6, cfg=3.0, seed=0)
    ways = {"KSampler": graph.stock(empty, label, null, **given), "TiM Sampler": graph.tim(empty, label, null, **given)}
    ways["SamplerCustom"] = graph.add(
        "SamplerCustom", model=graph.model, add_noise=True, noise_seed=0, cfg=3.0, positive=label, negative=null, latent_image=empty,
        sampler=graph.add("TiMSamplerSelect", mode="transition", stochasticity=0.0),
        sigmas=graph.add("TiMScheduler", steps=6, start=1.0, end=0.0, shift=1.0, times=""),
    )
    below, above = (0.0, 0.4), (0.2, 0.7)
    ways["below"] = graph.tim(empty, label, null, **given, guidance_high=0.4)
    ways["above"] = graph.tim(empty, label, null, **given, guidance_low=0.2)
    graph.model = graph.add("TiMGuidanceInterval", model=graph.model, guidance_low=0.0, guidance_high=1.0)
    ways["whole"] = graph.stock(empty, label, null, **given)
    ways["whole, TiM Sampler"] = graph.tim(empty, label, null, **given)
    nodes = [graph.picture(way) for way in ways.values()]
    outputs = comfyui.run(graph.prompt)
    found = {name: images_of(comfyui, outputs, node) for name, node in zip(ways, nodes)}
    expected = {interval: pipe([207], **settings, guidance_interval=interval) for interval in (None, below, above, (0.0, 1.0))}
    for name in ("KSampler", "TiM Sampler", "SamplerCustom"):
        same_image(found[name], expected[None])
    same_image(found["below"], expected[below])
    same_image(found["above"], expected[above])
    for name in ("whole", "whole, TiM Sampler"):
        same_image(found[name], expected[0.0, 1.0])
    pairs = [(a, b) for a in expected for b in expected if a != b]
    assert all((255 * (expected[a] - expected[b])).abs().max() > 2 for a, b in pairs), "the intervals make no difference"


def test_limits_beyond_the_model_s_own_are_refused(comfyui, classes):
    graph = copy(classes)
    message = refusal(comfyui, graph, labelled(graph, "207", guidance_low=0.8))
    assert all(word in message for word in ("guidance_low", "0.8", "0.7", "cfg to 1", "model"))


def test_the_interval_of_a_record(comfyui, tiny, tmp_path):
    """An upper end above 1 guides the first step, too."""
    with safe_open(tiny, "pt") as file:
        record = json.loads(file.metadata()["tim"])
    save_file(load_file(tiny), tmp_path / "whole.safetensors", {"tim": json.dumps(record | {"guidance_interval": [0.3, 1.1]})})
    comfyui.add("checkpoints", tmp_path / "whole.safetensors", "whole.safetensors")
    graph = Graph("whole.safetensors")
    nodes = [graph.picture(graph.tim(steps=4, cfg=4.0)), graph.picture(graph.stock(steps=4, cfg=4.0))]
    outputs = comfyui.run(graph.prompt)
    pipe = Pipeline.load(tmp_path / "whole.safetensors", device="cpu")
    expected = pipe(PROMPT, steps=4, cfg=4.0)
    assert pipe.nfe == 7  # at the times 1, 0.75 and 0.5
    for node in nodes:
        same_image(images_of(comfyui, outputs, node), expected)
    assert (255 * (expected - pipe(PROMPT, steps=4, cfg=4.0, guidance_interval=(0.0, 1.0)))).abs().max() > 2


def test_a_replaced_file_is_loaded_by_the_next_run_and_an_untouched_one_is_not(comfyui, tiny, tmp_path):
    def loads_and_image() -> tuple[list[str], torch.Tensor]:
        graph = Graph("replaced.safetensors")
        node = graph.picture(graph.tim(steps=1))
        entry = comfyui.wait(comfyui.queue(graph.prompt))
        cached = next(message["nodes"] for kind, message in entry["status"]["messages"] if kind == "execution_cached")
        loaders = [key for key, value in graph.prompt.items() if value["class_type"] == "TiMCheckpointLoader"]
        return [key for key in loaders if key not in cached], images_of(comfyui, entry["outputs"], node)

    comfyui.add("checkpoints", tiny, "replaced.safetensors")
    first = loads_and_image()
    again = loads_and_image()
    with safe_open(tiny, "pt") as file:
        record = file.metadata()
    tensors = load_file(tiny)
    tensors["model.diffusion_model.final_layer.linear.weight"] *= -1
    save_file(tensors, tmp_path / "other.safetensors", record)
    (tmp_path / "other.safetensors").replace(comfyui.base / "models" / "checkpoints" / "replaced.safetensors")
    replaced = loads_and_image()
    assert [bool(loads) for loads, _ in (first, again, replaced)] == [True, False, True]
    assert torch.equal(first[1], again[1]) and (first[1] - replaced[1]).abs().max() > 2


def test_a_replaced_part_of_a_folder_is_loaded_by_the_next_run(comfyui, parts):
    layout = comfyui.base / "models" / "text_encoders" / "tiny-gemma"
    graph = Graph()
    graph.clip = graph.add("TiMTextEncoderLoader", text_encoder_name="tiny-gemma/")
    loader, latent = graph.clip[0], graph.tim(steps=1)
    graph.save(latent)

    def runs() -> bool:
        entry = comfyui.wait(comfyui.queue(graph.prompt))
        return loader not in next(message["nodes"] for kind, message in entry["status"]["messages"] if kind == "execution_cached")

    seen = [runs(), runs()]
    config = (layout / "config.json").read_text()
    (layout / "new.json").write_text(config)
    (layout / "new.json").replace(layout / "config.json")
    assert [*seen, runs(), runs()] == [True, False, True, False]


def test_a_record_that_cannot_be_used_is_refused_when_loaded(comfyui, tiny, tmp_path):
    with safe_open(tiny, "pt") as file:
        record = json.loads(file.metadata()["tim"])
    save_file(load_file(tiny), tmp_path / "bad.safetensors", {"tim": json.dumps(record | {"guidance_interval": [0.7, 0.1]})})
    comfyui.add("checkpoints", tmp_path / "bad.safetensors", "bad-record.safetensors")
    message = refusal(comfyui, graph := Graph("bad-record.safetensors"), graph.empty())
    assert "bad-record.safetensors" in message and "guidance_interval" in message and "0.7" in message


@pytest.fixture(scope="module")
def patched(comfyui, tmp_path_factory) -> str:
    """A class-conditional model as released for 256: four channels, patches of two cells."""
    from tim_core.models.config import TransformerConfig
    from tim_core.models.transformer import TransitionTransformer

    torch.manual_seed(0)
    config = TransformerConfig(in_channels=4, patch_size=2, hidden_size=32, depth=1, num_heads=2, num_classes=1000, lora_hidden_size=8)
    file = tmp_path_factory.mktemp("patched") / "model.safetensors"
    save_file(TransitionTransformer(config).state_dict(), file)
    return comfyui.add("diffusion_models", file, "c2i_model_256.safetensors")


def scale_of(model):
    return [model.model.latent_format.scale_factor, model.model.latent_format.latent_channels]


def test_classes_at_256_use_the_stock_vae_s_latents(comfyui, patched):
    graph = Graph()
    graph.model = graph.add("TiMModelLoader", model_name=patched, weight_dtype="default")
    node = graph.add("TiMTestProbe", **probe(scale_of), model=graph.model)[0]
    assert json.loads(comfyui.run(graph.prompt)[node]["text"][0]) == [0.18215, 4]


@pytest.fixture(scope="module")
def stock_vae(comfyui, tmp_path_factory) -> str:
    """Stable Diffusion's VAE with random weights, in the published sizes, which core expects, and under the published names of 2022."""
    from tim_core.models.kl_autoencoder import KLAutoencoder, KLAutoencoderConfig

    torch.manual_seed(0)
    weights = KLAutoencoder(KLAutoencoderConfig(), dtype=torch.bfloat16).state_dict()
    weights["decoder.conv_out.weight"] *= 4  # else the images are grey
    file = tmp_path_factory.mktemp("stock") / "vae.safetensors"
    save_file(sd_vae_names_of_2022(weights), file)
    return comfyui.add("vae", file, "sd-vae-ft-ema.safetensors")


def test_classes_at_256_equal_pipeline(comfyui, patched, stock_vae):
    """Core's Load VAE, and Pipeline with the same files: images, and latents of images, the mean of their distribution."""
    models = comfyui.base / "models"
    pipe = Pipeline.load({"model": models / "diffusion_models" / patched, "vae": models / "vae" / stock_vae}, "cpu", "float32")
    graph = Graph()
    graph.model = graph.add("TiMModelLoader", model_name=patched, weight_dtype="default")
    graph.vae = graph.add("VAELoader", vae_name=stock_vae)
    label, null = graph.add("TiMClassLabel", label="207"), graph.add("TiMClassLabel", label="")
    sampled = graph.tim(graph.empty(96, 64), label, null, steps=1)
    decoded = graph.add("VAEDecode", samples=sampled, vae=graph.vae)
    encoded = graph.save(graph.add("VAEEncode", pixels=decoded, vae=graph.vae))
    nodes = graph.picture(sampled), encoded
    outputs = comfyui.run(graph.prompt)
    image = pipe(["golden retriever"], steps=1, cfg=2.5, width=96, height=64)
    same_image(images_of(comfyui, outputs, nodes[0]), image)
    close(latent_of(comfyui, outputs, encoded) * 0.18215, pipe.encode(image), 1e-3)


def test_load_tim_vae_sends_the_stock_vae_to_load_vae(comfyui, stock_vae):
    graph = Graph()
    graph.vae = graph.add("TiMVAELoader", vae_name=stock_vae)
    pixels = graph.add("EmptyImage", width=64, height=64, batch_size=1, color=0)
    message = refusal(comfyui, graph, graph.add("VAEEncode", pixels=pixels, vae=graph.vae))
    assert mentions(message, stock_vae, "Stable Diffusion's VAE", "Load VAE")


def test_a_latent_that_is_no_multiple_of_the_patch(comfyui, patched):
    """Core makes latents of any number of cells; what is beyond the edge is padded, and cut off again."""
    graph = Graph()
    graph.model = graph.add("TiMModelLoader", model_name=patched, weight_dtype="default")
    label, null = graph.add("TiMClassLabel", label="207"), graph.add("TiMClassLabel", label="")
    odd, even = (graph.add("EmptyLatentImage", width=width, height=64, batch_size=1) for width in (72, 80))
    narrow, wide = run_latents(comfyui, graph, graph.tim(odd, label, null), graph.tim(even, label, null))
    assert narrow.shape == (1, 4, 8, 9) and wide.shape == (1, 4, 8, 10) and narrow.isfinite().all()


def labels_as_the_network_reads_them(model):
    """What becomes of every class, null first, on its way through the conditioning in the dtypes that networks compute in."""
    import sys

    import torch

    adapter = next(module for name, module in sys.modules.items() if name.endswith("ComfyUI-TiM.nodes.adapters.network"))
    labels = torch.cat([adapter.class_label(label) for label in range(-1, 1000)])
    return {str(dtype): model.model.diffusion_model._condition(labels.to(dtype)).tolist()
            for dtype in (torch.float32, torch.bfloat16, torch.float16)}


def test_every_class_survives_every_dtype(comfyui, classes):
    graph = copy(classes)
    node = graph.add("TiMTestProbe", **probe(labels_as_the_network_reads_them), model=graph.model)[0]
    for dtype, found in json.loads(comfyui.run(graph.prompt)[node]["text"][0]).items():
        assert found == [1000, *range(1000)], dtype


def computed_in_bfloat16(model):
    """The relative error of one evaluation that is computed in bfloat16, as on a GPU, and not cast to float32, as on a CPU."""
    import torch

    inner, config = model.model, model.model.diffusion_model.config
    torch.manual_seed(0)
    noise, time = torch.randn(2, config.in_channels, 6, 4), torch.tensor([0.7, 0.7])
    condition = torch.randn(2, 5, config.text_dim) if config.text_dim else torch.tensor([[[8.0, 1.0]], [[31.0, 7.0]]])
    answers, saved = [], inner.manual_cast_dtype
    for dtype in (torch.float32, None):
        inner.manual_cast_dtype = dtype
        with torch.no_grad():
            answers.append(inner.apply_model(noise, time, c_crossattn=condition, transformer_options={}))
    inner.manual_cast_dtype = saved
    exact, rounded = answers
    return {"error": float((exact - rounded).std() / exact.std()), "dtype": str(inner.get_dtype()), "same": torch.equal(exact, rounded)}


@pytest.mark.parametrize("name", ["part-model.safetensors", "c2i_model_512.safetensors"])
def test_computing_in_bfloat16(comfyui, parts, classes, name):
    graph = Graph()
    model = graph.add("TiMModelLoader", model_name=name, weight_dtype="bf16")
    node = graph.add("TiMTestProbe", **probe(computed_in_bfloat16), model=model)[0]
    found = json.loads(comfyui.run(graph.prompt)[node]["text"][0])
    assert found["dtype"] == "torch.bfloat16" and not found["same"] and found["error"] < 0.03


@pytest.mark.parametrize("label, said", [("golden retreiver", "golden retriever"), ("1000", "0 to 999")])
def test_unknown_classes_are_refused(comfyui, classes, label, said):
    graph = copy(classes)
    assert said in refusal(comfyui, graph, labelled(graph, label))


def test_text_and_classes_do_not_mix(comfyui, classes):
    graph = copy(classes)
    message = refusal(comfyui, graph, graph.tim(graph.empty(64, 64)))
    assert message.startswith("conditioning: text") and "connect TiM ImageNet Class" in message
    graph = Graph()
    message = refusal(comfyui, graph, labelled(graph, "207"))
    assert message.startswith("conditioning: a class label") and "connect CLIP Text Encode" in message


@pytest.mark.parametrize("place", ["models/diffusion_models/deep", "elsewhere/my_diffusion_models"])
def test_paths_of_other_folders(comfyui, parts, place):
    """What the loaders list is ComfyUI's: folders inside its own, and those that an extra_model_paths.yaml names."""
    folder = Path(comfyui.base) / place
    folder.mkdir(exist_ok=True)
    name = f"{place.split('/')[0]}.safetensors"
    shutil.copyfile(parts / "diffusion_models" / "part-model.safetensors", folder / name)
    listed = name if folder.parent == comfyui.elsewhere else f"deep/{name}"
    graph = separately()
    graph.model = graph.add("TiMModelLoader", model_name=listed, weight_dtype="default")
    if folder.parent == comfyui.elsewhere:  # a folder of Hugging Face, too
        shutil.copytree(parts / "text_encoders" / "tiny-gemma", comfyui.elsewhere / "my_text_encoders" / "other-gemma")
        graph.clip = graph.add("TiMTextEncoderLoader", text_encoder_name="other-gemma/")
    close(run_latents(comfyui, graph, graph.tim())[0], run_latents(comfyui, other := separately(), other.tim())[0])
    assert read_parts(folder / name).latent_factor == 8


def announced(model):
    """Bytes per latent cell, as core computes them, of a network in bfloat16: cast to float32, as on a CPU, and not, as on a GPU."""
    config, found = model.model.model_config, {}
    saved = config.manual_cast_dtype
    for config.manual_cast_dtype in (saved, None):
        del config.unet_config["model_channels"]  # which get_model adds
        network = config.get_model({})
        dtype = network.manual_cast_dtype or network.get_dtype()
        found[str(dtype)] = dtype.itemsize * 0.01 * 2**20 * network.memory_usage_factor
    config.manual_cast_dtype = saved
    return found


def test_the_network_announces_its_memory_in_the_dtype_it_computes_in(comfyui):
    graph = Graph()
    graph.model = graph.add("TiMModelLoader", model_name=BUNDLED_NAME, weight_dtype="bf16")
    node = graph.add("TiMTestProbe", **probe(announced), model=graph.model)[0]
    config = read_parts("tim-shapes")["transformer"].config
    wanted = {str(dtype): pytest.approx(peak_bytes(config, 1, dtype)) for dtype in (torch.float32, torch.bfloat16)}
    assert json.loads(comfyui.run(graph.prompt)[node]["text"][0]) == wanted
