"""Core's own nodes around our MODEL, CLIP and VAE: what acts is right, what cannot act says so in one line, what is wrong is refused."""

import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.comfy_graph import BUNDLED_NAME, PROMPT, Graph, close, images_of, inside, lines_of, refusal, run_latents
from tests.comfy_support import probe
from tim_core import Pipeline, schedule
from tim_core.shapes.detector import is_correct
from tim_core.shapes.scenes import scoring_prompts

pytestmark = pytest.mark.comfyui

SD3 = dict(shift=3.0)
FLUX = dict(max_shift=1.15, base_shift=0.5, width=1024, height=1024)


@pytest.fixture(scope="module")
def pipe(tiny):
    return Pipeline.load(tiny, device="cpu")


def patched(graph: Graph, kind: str, **settings) -> Graph:
    graph.model = graph.add(kind, model=graph.model, **settings)
    return graph


def count_correct(comfyui, sample, kind: str | None = None, **settings) -> tuple[int, list[torch.Tensor]]:
    """How many of six prompts the bundled model draws right, with a node between loader and sampler, and the images."""
    prompts = [prompt for task in ("single", "position", "attribution") for prompt in scoring_prompts(task, 2, 5)]
    graph = Graph(BUNDLED_NAME)
    if kind:
        patched(graph, kind, **settings)
    saves = [graph.picture(sample(graph, positive=graph.text(prompt.text), seed=seed)) for seed, prompt in enumerate(prompts)]
    outputs = comfyui.run(graph.prompt)
    images = [images_of(comfyui, outputs, save)[0] for save in saves]
    return sum(is_correct(prompt, (image / 255).numpy()) for prompt, image in zip(prompts, images)), images


def ksampler(steps: int, **settings):
    return lambda graph, **links: graph.stock(steps=steps, **settings, **links)


def tim_sampler(steps: int):
    return lambda graph, **links: graph.tim(steps=steps, **links)


# Samplers


def test_stock_lcm_jumps_to_time_0_and_adds_noise_again(comfyui, pipe):
    seed, cfg, times = 5, 2.5, schedule.uniform(4).float()
    found = run_latents(comfyui, graph := Graph(), graph.stock(sampler_name="lcm", seed=seed, cfg=cfg))[0]
    old = comfyui.stats["system"]["comfyui_version"].startswith("0.3.")
    fresh = torch.Generator().manual_seed(seed if old else seed + 1)  # core's default_noise_sampler, on a CPU
    cond, null = pipe.text_encoder.conditioning([PROMPT], [""])
    x, zero = pipe.noise(1, 64, 64, seed), torch.zeros(1)
    with torch.no_grad():
        for t, r in zip(times[:-1, None], times[1:, None]):
            slope = pipe.transformer(x, t, zero, cond)
            if t < 1:
                without = pipe.transformer(x, t, zero, null)
                slope = without + cfg * (slope - without)
            x = x - t * slope
            if r > 0:
                x = r * torch.randn(x.shape, generator=fresh) + (1 - r) * x
    close(found, x)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_stock_lcm_draws(comfyui, steps):
    assert count_correct(comfyui, ksampler(steps, sampler_name="lcm"))[0] >= (3 if steps == 1 else 4)


@pytest.mark.parametrize("name, steps, denoise, said", [
    ("heun", 4, 1.0, True), ("dpmpp_2m", 29, 1.0, True), ("uni_pc", 2, 1.0, True), ("euler_ancestral", 4, 0.5, True),
    ("heun", 30, 1.0, False), ("dpm_adaptive", 4, 1.0, False),
    ("heun", 15, 0.5, False), ("euler", 1, 1.0, False), ("ddim", 2, 1.0, False), ("lcm", 1, 1.0, False),
])
def test_stock_samplers_with_few_steps_say_so_once(comfyui, name, steps, denoise, said):
    graph = Graph()
    result = graph.stock(graph.tim() if denoise < 1 else None, sampler_name=name, steps=steps, denoise=denoise, seed=31)
    lines = lines_of(comfyui, lambda: run_latents(comfyui, graph, result))
    assert len(lines) == said
    assert all(word in line for line in lines for word in (name.replace("uni_pc", "unipc"), "30 steps", f"not {steps};", "euler"))


def with_sigmas(graph: Graph, sampler: list) -> list:
    sigmas = graph.add("KarrasScheduler", steps=4, sigma_max=14.5, sigma_min=0.03, rho=7.0)
    links = dict(model=graph.model, sampler=sampler, sigmas=sigmas, positive=graph.text(PROMPT), negative=graph.text(""))
    return graph.add("SamplerCustom", **links, add_noise=True, noise_seed=0, cfg=2.5, latent_image=graph.empty())


def test_sigmas_of_another_kind_of_model(comfyui):
    graph = Graph()
    message = refusal(comfyui, graph, with_sigmas(graph, graph.add("TiMSamplerSelect", mode="transition", stochasticity=0.0)))
    assert message.startswith("sigmas: 14.5 ") and "TiM Scheduler" in message
    graph = Graph()
    stock = with_sigmas(graph, graph.add("KSamplerSelect", sampler_name="euler"))
    lines = lines_of(comfyui, lambda: run_latents(comfyui, graph, stock))
    assert len(lines) == 1 and "sigmas: 14.5 " in lines[0] and "BasicScheduler" in lines[0]


@pytest.mark.parametrize("kind, settings", [("ModelSamplingSD3", SD3), ("ModelSamplingAuraFlow", SD3), ("ModelSamplingFlux", FLUX)])
def test_shifts_act_in_tim_sampler_as_in_ksampler(comfyui, kind, settings):
    plain = run_latents(comfyui, graph := Graph(), graph.tim())[0]
    graph = patched(Graph(), kind, **settings)
    first = graph.tim(seed=1)
    ours, stock, again, stock_again = run_latents(
        comfyui, graph, graph.tim(), graph.stock(), graph.tim(first, seed=2, start=0.5), graph.stock(first, seed=2, denoise=0.5))
    close(ours, stock)
    close(again, stock_again)
    assert (ours - plain).abs().max() > 1e-3


def test_shifted_samplers_share_a_trajectory(comfyui):
    graph = patched(Graph(), "ModelSamplingSD3", **SD3)
    draft = graph.tim(steps=2, end=0.5)
    close(*run_latents(comfyui, graph, graph.tim(draft, steps=2, start=0.5, add_noise=False), graph.tim(steps=4)))


def test_a_shift_without_falling_times_is_refused(comfyui):
    graph = patched(Graph(), "ModelSamplingSD3", shift=0.0)
    assert refusal(comfyui, graph, graph.tim()).startswith("shift: 0 ")


@pytest.mark.parametrize("kind, settings, said", [
    ("ModelSamplingDiscrete", dict(sampling="v_prediction", zsnr=False), "ModelSamplingDiscrete"),
    ("ModelSamplingContinuousEDM", dict(sampling="edm", sigma_max=120.0, sigma_min=0.002), "ModelSamplingContinuousEDM"),
])
def test_sampling_of_another_kind_of_model_is_refused(comfyui, kind, settings, said):
    for method in ("tim", "stock"):
        graph = patched(Graph(), kind, **settings)
        message = refusal(comfyui, graph, getattr(graph, method)())
        assert message.startswith(f"model sampling: {said} ") and "remove" in message


# Caches and patches


@pytest.mark.parametrize("steps", [8, 20])
def test_caches_keep_the_quality(comfyui, steps):
    wanted, plain = count_correct(comfyui, ksampler(steps))
    assert wanted >= 4
    settings = dict(reuse_threshold=0.2, start_percent=0.15, end_percent=0.95, verbose=False)
    for kind, sample in (("EasyCache", ksampler(steps)), ("EasyCache", tim_sampler(steps)), ("LazyCache", ksampler(steps))):
        found, images = count_correct(comfyui, sample, kind, **settings)
        assert found >= wanted - 1, kind
        assert any((a - b).abs().max() > 2 for a, b in zip(images, plain)), "nothing was skipped"


ACTING = {
    "SkipLayerGuidanceDiT": dict(double_layers="3", single_layers="3", scale=3.0, start_percent=0.01, end_percent=0.5, rescaling_scale=0.0),
    "SkipLayerGuidanceDiTSimple": dict(double_layers="3", single_layers="", start_percent=0.0, end_percent=1.0),
    "PerturbedAttentionGuidance": dict(scale=3.0),
    "NAGuidance": dict(nag_scale=5.0, nag_alpha=0.5, nag_tau=1.5),
    "SelfAttentionGuidance": dict(scale=0.5, blur_sigma=2.0),
}


@pytest.fixture(scope="module")
def unpatched(comfyui):
    return count_correct(comfyui, ksampler(4))


@pytest.mark.parametrize("kind", ACTING)
def test_guidance_by_patches_acts(comfyui, unpatched, kind):
    if kind not in comfyui.object_info:
        pytest.skip(f"this version of ComfyUI has no {kind}")
    wanted, plain = unpatched
    found = []
    lines = lines_of(comfyui, lambda: found.extend(count_correct(comfyui, ksampler(4), kind, **ACTING[kind])))
    assert found[0] >= wanted - 1 and wanted >= 4
    assert all((a - b).abs().max() > 2 for a, b in zip(found[1], plain)) and not lines


SHRINK = dict(block_number=3, downscale_factor=2.0, start_percent=0.0, end_percent=0.35, downscale_after_skip=True,
              downscale_method="bicubic", upscale_method="bicubic")
IDLE = {
    "HyperTile": dict(tile_size=32, swap_size=2, max_depth=0, scale_depth=False),
    "TomePatchModel": dict(ratio=0.3),
    "PatchModelAddDownscale": SHRINK,
    "SkipLayerGuidanceDiTSimple": dict(double_layers="7, 8, 9", single_layers="7, 8, 9", start_percent=0.0, end_percent=1.0),
    "ScaleROPE": dict(scale_x=2.0, shift_x=0.0, scale_y=2.0, shift_y=0.0, scale_t=1.0, shift_t=0.0),
}


@pytest.mark.parametrize("kind", IDLE)
def test_patches_without_a_place_say_so_once(comfyui, kind):
    if kind not in comfyui.object_info:
        pytest.skip(f"this version of ComfyUI has no {kind}")
    plain = run_latents(comfyui, graph := Graph(), graph.stock(seed=7))[0]
    graph, found = patched(Graph(), kind, **IDLE[kind]), []
    result = graph.stock(seed=7)
    lines = lines_of(comfyui, lambda: found.extend(run_latents(comfyui, graph, result)))
    close(found[0], plain)
    assert len(lines) == 1 and f"{kind} has no effect" in lines[0] and "blocks 0 to 1" in lines[0]


def test_an_idle_patch_leaves_the_others_alone(comfyui):
    one = patched(Graph(), "PerturbedAttentionGuidance", scale=1.0)
    two = patched(patched(Graph(), "TomePatchModel", ratio=0.3), "PerturbedAttentionGuidance", scale=1.0)
    close(*(run_latents(comfyui, graph, graph.stock())[0] for graph in (one, two)))


def sorted_out(model, clip, vae):
    """Which patches of packs whose classes have one name are kept, what is said of the others, and whether a second step looks again."""
    import functools
    import inspect
    import sys

    patches = next(module for name, module in sys.modules.items() if name.endswith("ComfyUI-TiM.nodes.adapters.patches"))

    def pack(name):
        """A class Patcher in a module of that name, and three closures of its methods."""

        def fits(q, k, v, pe=None, attn_mask=None, extra_options={}):
            return {}

        def does_not(n, context_attn1, value_attn1, extra_options):
            return {}

        def output(out, extra_options):
            return out

        closures = (fits, does_not, output)
        for closure in closures:
            closure.__module__, closure.__qualname__ = name, f"Patcher.patch.<locals>.{closure.__name__}"

        def call(self, q, k, v, pe=None, attn_mask=None, extra_options={}):
            return {}

        call.__module__, call.__qualname__ = name, "Patcher.__call__"
        return type("Patcher", (), {"__module__": name, "__call__": call})(), *closures

    instance, fits, _, _ = pack("/custom_nodes/pack_a")
    _, _, does_not, output = pack("/custom_nodes/pack_b")
    method = instance.__call__
    given = [fits, functools.partial(fits), method, instance, does_not, functools.partial(does_not)]
    options = {patches.say.__globals__["SAID"]: (said := set()), "patches": {"attn1_patch": given, "attn1_output_patch": [output]}}
    looked, real = [], inspect.signature
    inspect.signature = lambda *args, **kwargs: looked.append(args) or real(*args, **kwargs)
    try:
        kept = [patches.usable_patches(options, 2, has_text=True)["patches"] for _ in range(3)]
        first = len(looked)
        patches.usable_patches(options, 2, has_text=True)
    finally:
        inspect.signature = real
    names = [[given.index(patch) for patch in each["attn1_patch"]] + [len(each["attn1_output_patch"])] for each in kept]
    return {"kept": names, "said": sorted(said), "looked": [0 < first <= 7, len(looked) - first]}


def test_patches_are_told_apart_by_their_pack(comfyui):
    """A node's patches work together, so all of them go or stay; another pack's, of a class of the same name, are not touched."""
    found = inside(comfyui, sorted_out)
    assert found["kept"] == [[0, 1, 2, 3, 0]] * 3
    assert len(found["said"]) == 1 and found["said"][0].startswith("Patcher has no effect on attn1_patch")
    assert found["looked"] == [True, 0]


def blocks_seen(model, clip, vae):
    """What patches of a pack are given: block numbers, shapes, and whether handing a block on to the original changes anything."""
    import torch

    network = model.model.diffusion_model
    x, t, y = torch.randn(1, 16, 4, 6), torch.ones(1), torch.randn(1, 3, network.config.text_dim)
    seen = {"dit": [], "attn1": [], "attn2": [], "after": []}

    def block(args, extra):
        seen["dit"].append([args["transformer_options"]["block_index"], list(args["img"].shape), list(args["txt"].shape)])
        return extra["original_block"](args)

    def queries(name):
        def patch(q, k, v, pe=None, attn_mask=None, extra_options={}):
            seen[name].append([extra_options["block_index"], extra_options["n_heads"], list(q.shape), list(k.shape)])
            return {"v": v}

        return patch

    def after(args):
        seen["after"].append(args["block_index"])
        return {"img": args["img"]}

    options = {
        "patches_replace": {"dit": {("double_block", i): block for i in range(network.config.depth)}},
        "patches": {"attn1_patch": [queries("attn1")], "attn2_patch": [queries("attn2")], "double_block": [after]},
    }
    with torch.no_grad():
        plain = model.model.apply_model(x, t, c_crossattn=y, transformer_options={})
        patched = model.model.apply_model(x, t, c_crossattn=y, transformer_options=options)
    return {**seen, "same": torch.equal(plain, patched)}


def test_block_seams(comfyui):
    found = inside(comfyui, blocks_seen)
    assert found["dit"] == [[i, [1, 24, 32], [1, 3, 32]] for i in (0, 1)] and found["after"] == [0, 1]
    assert found["attn1"] == [[i, 2, [1, 2, 24, 16], [1, 2, 24, 16]] for i in (0, 1)]
    assert found["attn2"] == [[i, 2, [1, 2, 24, 16], [1, 2, 3, 16]] for i in (0, 1)]
    assert found["same"]


def conditioned(model, clip, vae):
    """Latents with conditionings that carry what the model has no input for, and without."""
    import comfy.controlnet
    import torch

    from nodes import KSampler

    text = clip.encode_from_tokens_scheduled(clip.tokenize("a red circle"))
    extra = {"control": comfy.controlnet.ControlBase(), "control_apply_to_uncond": True, "guidance": 3.5, "reference_latents": [1]}
    more = [[text[0][0], {**text[0][1], **extra}]]
    latent = {"samples": torch.zeros(1, 16, 8, 8)}
    made = [KSampler().sample(model, 0, 2, 2.5, "euler", "simple", positive, text, latent)[0]["samples"] for positive in (text, more)]
    return [torch.equal(*made), "control" in more[0][1]]


def test_conditionings_without_effect_say_so_once(comfyui):
    found = []
    lines = lines_of(comfyui, lambda: found.extend(inside(comfyui, conditioned)))
    assert found == [True, True]
    assert len(lines) == 3 and all(sum(name in line for line in lines) == 1 for name in ("ControlNet", "FluxGuidance", "ReferenceLatent"))


# What is wired in wrongly


@pytest.mark.parametrize("kind, settings", [
    ("CLIPTextEncodeSDXL", dict(width=64, height=64, crop_w=0, crop_h=0, target_width=64, target_height=64, text_g="a", text_l="a")),
    ("CLIPTextEncodeFlux", dict(clip_l="a", t5xxl="a", guidance=3.5)),
    ("CLIPTextEncodeSD3", dict(clip_l="a", clip_g="a", t5xxl="a", empty_padding="none")),
    ("CLIPTextEncodeSD3", dict(clip_l="", clip_g="", t5xxl="", empty_padding="none")),
    ("CLIPTextEncodeHiDream", dict(clip_l="a", clip_g="a", t5xxl="a", llama="a")),
])
def test_text_nodes_of_other_models_are_refused(comfyui, kind, settings):
    graph = Graph()
    message = refusal(comfyui, graph, graph.tim(positive=graph.add(kind, clip=graph.clip, **settings)))
    assert message.startswith("CLIP: ") and message.endswith("use CLIP Text Encode")


def texts_read(model, clip, vae):
    """What the tokenizer is given for each prompt."""
    given, real = [], clip.tokenizer.encoder.tokenize
    clip.tokenizer.encoder.tokenize = lambda prompts: given.extend(prompts) or real(prompts)
    try:
        for text in ("a (red:1.3) circle", "a ((red)) circle", "((a:1.2) red:0.5) circle", "a \\(red\\) circle", "a (red circle",
                     "a red :)", "a red, embedding:bad:1.2 circle", "a [red] circle"):
            clip.tokenize(text)
        try:
            clip.tokenize("a red circle", images=[1])
        except ValueError as error:
            given.append(str(error))
    finally:
        del clip.tokenizer.encoder.tokenize
    return given


def test_prompt_weights_are_taken_off(comfyui):
    found = []
    lines = lines_of(comfyui, lambda: found.extend(inside(comfyui, texts_read)))
    assert found[:3] == ["a red circle"] * 3
    assert found[3:6] == ["a (red) circle", "a (red circle", "a red :)"]
    assert found[6:8] == ["a red,  circle", "a [red] circle"]
    assert "images" in found[8] and "CLIP Text Encode" in found[8]
    assert len(lines) == 4 and all("prompt weights" in line for line in lines) and "'a red circle'" in lines[0]


def test_weights_change_nothing(comfyui):
    graph = Graph()
    weighted, plain = (graph.tim(positive=graph.text(text)) for text in ("a (red:1.3) circle", "a red circle"))
    close(*run_latents(comfyui, graph, weighted, plain))


@pytest.mark.parametrize("layer, said", [(-1, 0), (-2, 1)])
def test_another_layer_of_the_text_model_has_no_effect(comfyui, layer, said):
    plain = run_latents(comfyui, graph := Graph(), graph.tim())[0]
    graph, found = Graph(), []
    graph.clip = graph.add("CLIPSetLastLayer", clip=graph.clip, stop_at_clip_layer=layer)
    result = graph.tim()
    lines = lines_of(comfyui, lambda: found.extend(run_latents(comfyui, graph, result)))
    close(found[0], plain)
    assert bool(lines) == bool(said) and all("CLIP Set Last Layer" in line for line in lines)


def wrong_latents(model, clip, vae):
    """What samplers and decoders say to latents of other models."""
    import sys
    from types import SimpleNamespace

    import torch

    from nodes import KSampler, VAEDecode, VAEDecodeTiled

    def node(name):
        return next(module for key, module in sys.modules.items() if key.endswith(f"ComfyUI-TiM.nodes.{name}"))

    text = clip.encode_from_tokens_scheduled(clip.tokenize("a red circle"))
    times = dict(stochasticity=0.0, start=1.0, end=0.0, add_noise=True, return_with_leftover_noise=True)
    ways = {
        "TiM Sampler": lambda latent: node("sampling").TiMSampler.execute(model, text, text, latent, 0, 2, 2.5, 0.0, 1.0, **times),
        "KSampler": lambda latent: KSampler().sample(model, 0, 2, 2.5, "heun", "simple", text, text, latent),
        "VAE Decode": lambda latent: VAEDecode().decode(vae, latent),
        "VAE Decode (Tiled)": lambda latent: VAEDecodeTiled().decode(vae, latent, 512),
    }
    found = {}
    for shape in ((1, 3, 8, 8), (1, 4, 8, 8), (1, 16, 2, 8, 8), (1, 16, 64)):
        for name, way in ways.items():
            try:
                way({"samples": torch.ones(shape)})
            except Exception as error:
                found[f"{name} {'x'.join(map(str, shape))}"] = [type(error).__name__, str(error)]
    other = SimpleNamespace(inner_model=SimpleNamespace(model_patcher=SimpleNamespace(model=torch.nn.Linear(1, 1))))
    try:
        node("adapters.sampling").sample_transitions(other, torch.zeros(1), torch.tensor([1.0, 0.0]))
    except Exception as error:
        found["sampler"] = [type(error).__name__, str(error)]
    return found


def test_latents_of_other_models_are_refused(comfyui):
    found = inside(comfyui, wrong_latents)
    kind, message = found.pop("sampler")
    assert kind == "TimError" and "Linear is not a TiM model" in message
    assert len(found) == 16
    for case, (kind, message) in found.items():
        shape = case.split()[-1]
        assert kind == "TimError" and message.startswith("latent: ") and shape in message, case
        assert re.search(r"\b16\b", message.replace(shape, "")), case  # the channels it should have
        assert "Empty TiM Latent" in message and "VAE Encode" in message


def test_a_video_latent_is_refused(comfyui):
    for method in ("tim", "stock"):
        graph = Graph()
        latent = graph.add("EmptyHunyuanLatentVideo", width=64, height=64, length=5, batch_size=1)
        message = refusal(comfyui, graph, getattr(graph, method)(latent))
        assert message.startswith("latent: ") and "1x16x2x8x8" in message and "Empty TiM Latent" in message


def test_sizes_far_from_the_model_s_say_so_once(comfyui):
    for side, said in ((64, 0), (80, 0), (128, 1), (512, 1)):
        graph = Graph(BUNDLED_NAME)
        result = graph.tim(graph.empty(side, side), steps=1)
        lines = lines_of(comfyui, lambda: run_latents(comfyui, graph, result))
        assert len(lines) == said and all(f"{side}x{side}" in line and "64x64" in line for line in lines)


def test_words_that_the_model_does_not_know_are_named(comfyui):
    def encode(graph: Graph, text: str) -> None:
        graph.add("SaveLatent", samples=graph.tim(positive=graph.text(text), steps=1), filename_prefix="latent")
        comfyui.run(graph.prompt)

    for text, words in (("a (red:1.2) circle above two blue squares", []), ("five cats on a red sofa", ["five", "cats", "on", "sofa"])):
        lines = [line for line in lines_of(comfyui, lambda: encode(Graph(BUNDLED_NAME), text)) if "does not know" in line]
        assert len(lines) == bool(words) and all(", ".join(words) in line and "circle" in line for line in lines)


def test_a_node_of_several_runs_says_a_line_once(comfyui):
    graph = Graph(BUNDLED_NAME)
    links = dict(model=graph.model, vae=graph.vae, positive=graph.text(PROMPT), negative=graph.text(""), latent_image=graph.empty(512, 512))
    sweep = graph.add("TiMStepSweep", **links, seed=0, steps="1, 2", cfg=1.0, guidance_low=0.0, guidance_high=1.0)
    graph.add("SaveImage", images=sweep, filename_prefix="sheet")
    lines = lines_of(comfyui, lambda: comfyui.run(graph.prompt))
    assert len(lines) == 1 and "512x512" in lines[0]


@pytest.fixture(scope="module")
def classes(comfyui, class_files):
    def graph() -> Graph:
        graph = Graph()
        graph.model = graph.add("TiMModelLoader", model_name="c2i_model_512.safetensors", weight_dtype="default")
        return graph

    return graph


def test_class_models_are_made_for_one_size(comfyui, classes):
    """512x512 for 32 channels; the reach of the released text-to-image model, 256 to 4096 pixels a side, is not theirs."""
    for side, said in ((512, 0), (416, 0), (640, 0), (384, 1), (672, 1)):
        graph = classes()
        label = graph.add("TiMClassLabel", label="207")
        result = graph.tim(graph.empty(side, side), label, label, steps=1, cfg=1.0)
        lines = lines_of(comfyui, lambda: run_latents(comfyui, graph, result))
        assert len(lines) == said and all(f"{side}x{side}" in line and "512x512" in line for line in lines), side


def test_a_class_out_of_range_fails_in_its_node(comfyui, classes):
    graph = classes()
    graph.save(graph.tim(graph.empty(64, 64), graph.add("TiMClassLabel", label="5000"), graph.add("TiMClassLabel", label="")))
    messages = comfyui.wait(comfyui.queue(graph.prompt))["status"]["messages"]
    (error,) = (message for kind, message in messages if kind == "execution_error")
    assert error["node_type"] == "TiMClassLabel" and "5000" in error["exception_message"] and "0 to 999" in error["exception_message"]


def test_classes_changed_by_core_s_nodes(comfyui, classes):
    """Zeroed out a class is the null class; what would be another class is refused."""
    graph = classes()
    a, b, null = (graph.add("TiMClassLabel", label=label) for label in ("207", "412", ""))
    zeroed = graph.add("ConditioningZeroOut", conditioning=a)
    empty = graph.empty(64, 64)
    close(*run_latents(comfyui, graph, graph.tim(empty, a, zeroed), graph.tim(empty, a, null)))
    mixed = {
        "ConditioningAverage": dict(conditioning_to=a, conditioning_from=b, conditioning_to_strength=0.3),
        "ConditioningConcat": dict(conditioning_to=a, conditioning_from=b),
    }
    for kind, links in mixed.items():
        graph = classes()
        a, b = (graph.add("TiMClassLabel", label=label) for label in ("207", "412"))
        links = {**links, "conditioning_to": a, "conditioning_from": b}
        message = refusal(comfyui, graph, graph.tim(graph.empty(64, 64), graph.add(kind, **links), graph.add("TiMClassLabel", label="")))
        assert message.startswith("class label: ") and "Combine" in message


# Values that are not finite


DAMAGED = {
    "text": "text_encoders.transformer.layers.1.mlp.down_proj.weight", "model": "model.diffusion_model.blocks.1.attn.qkv.weight",
    "decoder": "vae.decoder.conv_out.weight", "encoder": "vae.encoder.conv_in.weight",
}


@pytest.fixture(scope="module")
def damaged(comfyui, tiny, tmp_path_factory):
    """Checkpoints of which one element of one weight is NaN or infinite, by part."""
    folder, weights = tmp_path_factory.mktemp("damaged"), load_file(tiny)
    with safe_open(tiny, "pt") as file:
        metadata = file.metadata()
    for value, (part, name) in zip((torch.inf, torch.nan, torch.nan, torch.inf), DAMAGED.items()):
        assert name in weights
        broken = weights[name].clone()
        broken.view(-1)[5] = value
        save_file(weights | {name: broken}, folder / f"damaged-{part}.safetensors", metadata)
        comfyui.add("checkpoints", folder / f"damaged-{part}.safetensors", f"damaged-{part}.safetensors")
    return lambda part: Graph(f"damaged-{part}.safetensors")


def upscaled(graph: Graph) -> list:
    """The latent of Native Upscale, 64 to 128 pixels in four steps from time 0.5."""
    links = dict(model=graph.model, vae=graph.vae, positive=graph.text(PROMPT), negative=graph.text(""))
    image = graph.add("EmptyImage", width=64, height=64, batch_size=1, color=200)
    settings = dict(seed=0, factor=2.0, width=0, height=0, stages=1, steps="4", strength=0.5, cfg=2.5, guidance_low=0.0, guidance_high=1.0)
    return [graph.add("TiMNativeUpscale", **links, **settings, stochasticity=0.0, image=image)[0], 1]


def swept(graph: Graph) -> list:
    links = dict(model=graph.model, vae=graph.vae, positive=graph.text(PROMPT), negative=graph.text(""), latent_image=graph.empty())
    sweep = graph.add("TiMStepSweep", **links, seed=0, steps="2, 4", cfg=2.5, guidance_low=0.0, guidance_high=1.0)
    return graph.add("VAEEncode", pixels=sweep, vae=graph.vae)


def says_damage(message: str, part: str, *words: str) -> None:
    assert "\n" not in message and "NaN" in message and "float32" in message
    assert all(word in message for word in (*words, DAMAGED[part].removeprefix("model.diffusion_model.").removeprefix("vae.")))


def test_a_damaged_text_encoder_is_named(comfyui, damaged):
    graph = damaged("text")
    message = refusal(comfyui, graph, graph.tim())
    assert "NaN" in message and "text encoder" in message and "float32" in message
    assert DAMAGED["text"].removeprefix("text_encoders.transformer.") in message and "file" in message


@pytest.mark.parametrize("make, step", [
    (lambda graph: graph.tim(), "step 1 of 4 (t = 1, r = 0.75)"), (swept, "step 1 of 1 (t = 1, r = 0)"),
    (upscaled, "step 1 of 4 (t = 0.5, r = 0.375)"),
], ids=["TiM Sampler", "Step Sweep", "Native Upscale"])
def test_a_damaged_transformer_is_named(comfyui, damaged, make, step):
    graph = damaged("model")
    says_damage(refusal(comfyui, graph, make(graph)), "model", "transformer", step, "file")


def test_weights_that_a_lora_or_a_dtype_damages(comfyui, tiny, tmp_path):
    key, weights = "blocks.1.attn.qkv.weight", load_file(tiny)
    prefix = "model.diffusion_model."
    model = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    rows, columns = model[key].shape
    lora = {"diffusion_model.blocks.1.attn.qkv.lora_A.weight": torch.full((1, columns), torch.inf),
            "diffusion_model.blocks.1.attn.qkv.lora_B.weight": torch.ones(rows, 1)}
    save_file(lora, tmp_path / "lora.safetensors")
    comfyui.add("loras", tmp_path / "lora.safetensors", "infinite.safetensors")
    graph = patched(Graph(), "LoraLoaderModelOnly", lora_name="infinite.safetensors", strength_model=1.0)
    message = refusal(comfyui, graph, graph.tim())
    assert "step 1 of 4" in message and key in message and "LoRA" in message

    large = model[key].clone()
    large[0, 0] = 1e4  # beyond float8_e4m3fn
    save_file(model | {key: large}, tmp_path / "large.safetensors")
    comfyui.add("diffusion_models", tmp_path / "large.safetensors", "large.safetensors")
    for weight_dtype in ("default", "fp8_e4m3fn"):
        graph = Graph()
        graph.model = graph.add("TiMModelLoader", model_name="large.safetensors", weight_dtype=weight_dtype)
        if weight_dtype == "default":
            assert run_latents(comfyui, graph, graph.tim())[0].isfinite().all()
        else:
            message = refusal(comfyui, graph, graph.tim())
            assert "step 1 of 4" in message and key in message and "weight_dtype" in message


@pytest.mark.parametrize("sampler_name, r", [("euler", 0.75), ("heun", 1), ("lcm", 0)])
def test_a_stock_sampler_says_that_the_transformer_is_damaged(comfyui, damaged, sampler_name, r):
    graph = damaged("model")
    sampled = graph.stock(sampler_name=sampler_name)
    save = graph.save(sampled)
    lines = [line for line in lines_of(comfyui, lambda: comfyui.run(graph.prompt)) if "NaN" in line]
    assert save and len(lines) == 1
    says_damage(lines[0], "model", "transformer", f"step 1 of 4 (t = 1, r = {r:g})")
    graph = damaged("model")
    image = graph.add("VAEDecode", samples=graph.stock(sampler_name=sampler_name), vae=graph.vae)
    message = refusal(comfyui, graph, graph.add("VAEEncode", pixels=image, vae=graph.vae))
    assert message.startswith("latent before decoding: NaN") and "cfg" in message


def test_a_damaged_vae_is_named(comfyui, damaged):
    for node in ("VAEDecode", "VAEDecodeTiled"):
        graph = damaged("decoder")
        tiles = {name: value for name, value in dict(tile_size=512, overlap=64, temporal_size=64, temporal_overlap=8).items()
                 if name in comfyui.object_info[node]["input"]["required"]}
        image = graph.add(node, samples=graph.tim(), vae=graph.vae, **tiles)
        message = refusal(comfyui, graph, graph.add("VAEEncode", pixels=image, vae=graph.vae))
        says_damage(message, "decoder", "VAE decoder", "file")
    graph = damaged("encoder")
    image = graph.add("EmptyImage", width=64, height=64, batch_size=1, color=200)
    says_damage(refusal(comfyui, graph, graph.add("VAEEncode", pixels=image, vae=graph.vae)), "encoder", "VAE encoder", "file")
    graph = damaged("encoder")
    says_damage(refusal(comfyui, graph, upscaled(graph)), "encoder", "VAE encoder", "file")


def network_fails(model):
    """A model whose network gives one infinite value from time 0.5 on."""
    from comfy.patcher_extension import WrappersMP

    def fail(executor, x, timesteps, *args, **kwargs):
        out = executor(x, timesteps, *args, **kwargs)
        if float(timesteps[0]) < 0.6:
            out[0, 1, 2, 3] = float("inf")
        return out

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", fail)
    return model


def guidance_fails(model):
    """A model whose guidance gives one NaN at time 0.25."""

    def fail(args):
        out = args["input"] - (args["uncond_denoised"] + args["cond_scale"] * (args["cond_denoised"] - args["uncond_denoised"]))
        if float(args["sigma"][0]) < 0.3:
            out[0, 1, 2, 3] = float("nan")
        return out

    model = model.clone()
    model.set_model_sampler_cfg_function(fail)
    return model


@pytest.mark.parametrize("fails, stage", [
    (network_fails, "transformer, step 3 of 4 (t = 0.5, r = 0.25)"), (guidance_fails, "guidance or sampler, step 4 of 4 (t = 0.25, r = 0)"),
], ids=["network", "guidance"])
def test_the_first_bad_step_is_named(comfyui, fails, stage):
    messages = []
    for method in ("tim", "custom", "stock"):
        graph = Graph()
        graph.model = graph.add("TiMTestProbe", **probe(fails), model=graph.model)
        if method == "stock":
            result = graph.stock(seed=3)
            messages += [line for line in lines_of(comfyui, lambda: run_latents_anyway(comfyui, graph, result)) if "NaN" in line]
        elif method == "custom":
            sampler = graph.add("TiMSamplerSelect", mode="transition", stochasticity=0.0)
            sigmas = graph.add("TiMScheduler", steps=4, start=1.0, end=0.0, shift=1.0, times="")
            links = dict(model=graph.model, sampler=sampler, sigmas=sigmas, positive=graph.text(PROMPT), negative=graph.text(""))
            custom = graph.add("SamplerCustom", **links, add_noise=True, noise_seed=0, cfg=2.5, latent_image=graph.empty())
            messages.append(refusal(comfyui, graph, custom))
        else:
            messages.append(refusal(comfyui, graph, graph.tim()))
    assert len(messages) == 3
    for message in messages:
        assert f"{stage} in float32: NaN" in message and "lower cfg" in message and "weight" not in message


def run_latents_anyway(comfyui, graph: Graph, result: list) -> None:
    graph.save(result)
    comfyui.run(graph.prompt)


def test_guidance_that_fails_between_steps(comfyui):
    """The step is that of the guidance, not the next one, whose network is given its values."""
    graph = Graph()
    graph.model = graph.add("TiMTestProbe", **probe(guidance_fails), model=graph.model)
    message = refusal(comfyui, graph, graph.tim(steps=8))
    assert "guidance or sampler, step 7 of 8 (t = 0.25, r = 0.125)" in message


def given_nan(model, clip, vae):
    """What nodes say to latents, conditionings and images that are not finite, and whether a finite one passes."""
    import sys

    import torch

    from nodes import KSampler, VAEDecode, VAEEncode

    sampling = next(module for key, module in sys.modules.items() if key.endswith("ComfyUI-TiM.nodes.sampling"))
    text = clip.encode_from_tokens_scheduled(clip.tokenize("a red circle"))
    bad_text = [[text[0][0] * torch.inf, {key: value for key, value in text[0][1].items() if key != "tim_padded"}]]
    times = dict(stochasticity=0.0, start=0.5, end=0.0, add_noise=True, return_with_leftover_noise=True)
    good, bad = torch.zeros(1, 16, 8, 8), torch.zeros(1, 16, 8, 8)
    bad[0, 2, 3, 4] = torch.nan

    def tim(positive, samples):
        return sampling.TiMSampler.execute(model, positive, text, {"samples": samples}, 0, 2, 2.5, 0.0, 1.0, **times)

    def stock(positive, samples):
        return KSampler().sample(model, 0, 2, 2.5, "euler", "simple", positive, text, {"samples": samples}, 0.5)

    ways = {f"{name} {which}": lambda way=way, given=given: way(*given)
            for name, way in (("TiM Sampler", tim), ("KSampler", stock))
            for which, given in (("latent", (text, bad)), ("conditioning", (bad_text, good)), ("finite", (text, good)))}
    ways["VAE Decode latent"] = lambda: VAEDecode().decode(vae, {"samples": bad})
    ways["VAE Encode image"] = lambda: VAEEncode().encode(vae, torch.full((1, 64, 64, 3), torch.inf))
    found = {}
    for name, way in ways.items():
        try:
            way()
            found[name] = None
        except Exception as error:
            found[name] = f"{type(error).__name__} {error}"
    return found


def test_what_is_not_finite_is_refused_where_it_is_given(comfyui):
    found = inside(comfyui, given_nan)
    assert found.pop("TiM Sampler finite") is None and found.pop("KSampler finite") is None
    assert len(found) == 6
    for case, message in found.items():
        assert message and message.startswith(f"TimError {case.split()[-1]}") and "NaN" in message, case
