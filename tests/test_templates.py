"""Every shipped workflow in the real ComfyUI, its images against tim_core's."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

from tests.comfy_graph import Template, same_image
from tests.comfy_support import OWN_IMAGE, RELEASED, ROOT
from tim_core import Pipeline, sampler, schedule
from tim_core.imagenet import class_number
from tim_core.images import MARGIN, contact_sheet, to_tensor
from tim_core.shapes.detector import is_correct
from tim_core.shapes.scenes import Prompt, Thing
from tim_core.weights.load import load_autoencoder, load_transformer

pytestmark = pytest.mark.comfyui
STEMS = sorted({file.stem for file in (ROOT / "workflows").glob("*.json")} - {*RELEASED, *OWN_IMAGE})


@pytest.fixture(scope="module")
def pipe():
    return Pipeline.load("tim-shapes", device="cpu")


def text_to_image(run: Template, pipe: Pipeline) -> dict:
    settings = run.settings("TiMSampler")
    return {"TiM": pipe(run.inputs["Positive"]["text"], steps=run.inputs["TiMSampler"]["steps"], **settings)}


def few_steps_to_many(run: Template, pipe: Pipeline) -> dict:
    """The labels say seconds, so only what stands above them is compared."""
    counts = [int(word) for word in run.inputs["TiMStepSweep"]["steps"].split(",")]
    images = [pipe(run.inputs["Positive"]["text"], steps=count, **run.settings("TiMStepSweep"))[0] for count in counts]
    expected, found = to_tensor(contact_sheet(images, ["1 step · 1 NFE · 0.00 s"] * len(counts))), run.pictures["TiM-sweep"]
    assert found.shape == expected.shape and len(counts) == 6  # two rows of three
    row = expected.shape[1] // 2
    above = [range(top + MARGIN, top + MARGIN + 192) for top in (0, row - MARGIN // 2)]
    rows = torch.tensor([y for some in above for y in some])
    run.pictures["TiM-sweep"] = found[:, rows]
    return {"TiM-sweep": expected[:, rows]}


def draft_and_refine(run: Template, pipe: Pipeline) -> dict:
    prompt, settings = run.inputs["Positive"]["text"], run.settings("Draft: 2 steps, time 1 to 0.6")
    draft, refine, look = (run.inputs[title] for title in run.inputs if "time" in title)
    assert draft["end"] == refine["start"] == look["start"] == 0.6

    def times(node):
        return [*schedule.uniform(draft["steps"], 1, 0.6).tolist()[:-1], *schedule.uniform(node["steps"], 0.6, 0).tolist()]

    return {"TiM-refined": pipe(prompt, times=times(refine), **settings), "TiM-draft": pipe(prompt, times=times(look), **settings)}


def native_upscale(run: Template, pipe: Pipeline) -> dict:
    prompt, node = run.inputs["Positive"]["text"], run.inputs["TiMNativeUpscale"]
    small = pipe(prompt, steps=run.inputs["TiMSampler"]["steps"], **run.settings("TiMSampler"))
    options = {name: node[name] for name in ("factor", "stages", "steps", "strength")}
    large = pipe.upscale(small, prompt, **options, **run.settings("TiMNativeUpscale"))
    assert large.shape[1:3] == (128, 128) and node["stages"] == 2
    return {"TiM-small": small, "TiM-large": large}


def sample_masked(pipe: Pipeline, node: dict, prompt: str, images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """TiM Sampler on the latents of images; core keeps the latent where the mask is 0. mask: (1, 1, h, w)."""
    latent, start = pipe.encode(images), node["start"]
    noise = pipe.noise(1, images.shape[2], images.shape[1], node["seed"])
    cond, null = pipe.text_encoder.conditioning([prompt], [""])

    def network(x, t, r, y):
        t4 = t.view(-1, 1, 1, 1)
        x_in = x * mask + (t4 * noise + (1 - t4) * latent) * (1 - mask)
        denoised = x_in - t4 * pipe.transformer(x_in, t, r, y)
        return (x - denoised * mask - latent * (1 - mask)) / t4

    x = start * noise + (1 - start) * latent
    after, _ = sampler.sample(network, x, schedule.uniform(node["steps"], start), cond, null, cfg=node["cfg"])
    return pipe.decode(after)


def first_image(run: Template, pipe: Pipeline) -> torch.Tensor:
    return pipe(run.inputs["Positive"]["text"], steps=run.inputs["First image"]["steps"], **run.settings("First image"))


def again(run: Template, pipe: Pipeline, before: torch.Tensor | None = None, mask: torch.Tensor | None = None) -> dict:
    """A first image, then a second sampler on its latent by a new prompt."""
    before = first_image(run, pipe) if before is None else before
    mask = torch.ones(1, 1, 8, 8) if mask is None else mask
    after = sample_masked(pipe, run.inputs["TiMSampler"], run.inputs["New prompt"]["text"], before, mask)
    return {"TiM-before": before, "TiM-after": after}


def padded(pad: dict, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What Pad Image for Outpainting makes: grey borders, and the mask (1, H, W), soft inside the image where that is large enough."""
    height, width = images.shape[1:3]
    left, top, right, bottom, feather = (pad[name] for name in ("left", "top", "right", "bottom", "feathering"))
    large = torch.full((len(images), top + height + bottom, left + width + right, 3), 0.5)
    large[:, top : top + height, left : left + width] = images
    y, x = torch.arange(height)[:, None].float(), torch.arange(width)[None].float()
    distances = [part for part, side in ((y, top), (height - y, bottom), (x, left), (width - x, right)) if side]
    nearest = torch.stack([part.expand(height, width) for part in distances]).amin(0)
    soft = feather > 0 and 2 * feather < min(height, width)
    mask = torch.ones(1, *large.shape[1:3])
    mask[:, top : top + height, left : left + width] = (1 - nearest / feather).clamp(min=0) ** 2 if soft else 0
    return large, mask


def inpainting(run: Template, pipe: Pipeline) -> dict:
    assert run.inputs["Left half, to keep"]["width"] == 32
    mask = torch.ones(1, 1, 8, 8)
    mask[..., :4] = 0
    expected = again(run, pipe, mask=mask)
    change = (expected["TiM-after"] - expected["TiM-before"]).abs()
    assert 5 * change[:, :, :24].mean() < change[:, :, 32:].mean()
    return expected


def outpainting(run: Template, pipe: Pipeline) -> dict:
    size = run.inputs["Half the size"]
    small = interpolate(first_image(run, pipe).movedim(-1, 1), (size["height"], size["width"]), mode="area").movedim(1, -1)
    before, mask = padded(run.inputs["ImagePadForOutpaint"], small)
    assert before.shape[1:3] == (64, 64) and mask.mean() == 0.75
    return again(run, pipe, before, mask[:, None, ::8, ::8])


def custom_sampling(run: Template, pipe: Pipeline) -> dict:
    interval = run.inputs["TiMGuidanceInterval"]["guidance_low"], run.inputs["TiMGuidanceInterval"]["guidance_high"]
    times, cfg, seed = run.inputs["TiMScheduler"]["times"], run.inputs["CFGGuider"]["cfg"], run.inputs["RandomNoise"]["noise_seed"]
    assert run.inputs["TiMSamplerSelect"] == {"mode": "transition", "stochasticity": 0.0}
    return {"TiM-custom": pipe(run.inputs["Positive"]["text"], times=times, cfg=cfg, seed=seed, guidance_interval=interval)}


def class_conditional(run: Template, pipe: Pipeline, server) -> dict:
    node, models = run.inputs["TiMSampler"], server.base / "models"
    transformer = load_transformer(models / "diffusion_models" / "c2i_model_512.safetensors", dtype=torch.float32)
    autoencoder = load_autoencoder(models / "vae" / "dc-ae-f32c32-sana-1.1.safetensors", dtype=torch.float32)
    noise = torch.randn(1, 32, 16, 16, generator=torch.Generator().manual_seed(node["seed"]))
    label = torch.tensor([class_number(run.inputs["Class"]["label"])])
    assert label == 207 and run.inputs["Null class"]["label"] == ""
    settings = dict(cfg=node["cfg"], guidance_interval=(node["guidance_low"], node["guidance_high"]), stochasticity=node["stochasticity"])
    fresh = sampler.fresh_noise(noise.shape, node["seed"])
    null = torch.full_like(label, transformer.config.num_classes)
    latent, _ = sampler.sample(transformer, noise, schedule.uniform(node["steps"]), label, null, noise_sampler=fresh, **settings)
    with torch.no_grad():
        return {"TiM-class": autoencoder.decode(latent).add(1).div(2).clamp(0, 1).movedim(1, -1)}


def ksampler(run: Template, pipe: Pipeline) -> dict:
    node = run.inputs["KSampler"]
    assert (node["sampler_name"], node["scheduler"], node["denoise"]) == ("euler", "simple", 1.0)
    return {"TiM-ksampler": pipe(run.inputs["Positive"]["text"], **{name: node[name] for name in ("steps", "cfg", "seed")})}


def lora(run: Template, pipe: Pipeline, server) -> dict:
    prompt, node = run.inputs["Positive"]["text"], run.inputs["LoraLoaderModelOnly"]
    patched = Pipeline.load("tim-shapes", device="cpu", lora={server.base / "models" / "loras" / node["lora_name"]: node["strength_model"]})
    made = {"TiM-lora": (patched, "With the LoRA"), "TiM-plain": (pipe, "Without")}
    assert run.settings("With the LoRA") == run.settings("Without")
    images = {prefix: model(prompt, steps=run.inputs[title]["steps"], **run.settings(title)) for prefix, (model, title) in made.items()}
    assert (images["TiM-lora"] - images["TiM-plain"]).abs().max() > 0.05
    return images


EXPECTED = {
    "text-to-image": text_to_image, "few-steps-to-many": few_steps_to_many, "draft-and-refine": draft_and_refine,
    "native-upscale": native_upscale, "image-to-image": again, "inpainting": inpainting, "outpainting": outpainting,
    "custom-sampling": custom_sampling, "class-conditional": class_conditional, "ksampler": ksampler, "lora": lora,
}


def two(first: str, relation: str, second: str) -> Prompt:
    things = [Thing(shape, color) for color, shape in (first.split(), second.split())]
    return Prompt("position", tuple(things), relation)


RED_LEFT_OF_BLUE = two("red circle", "left of", "blue square")
SQUARES, TRIANGLES = (Prompt("counting", (Thing(shape, "green"),) * 2) for shape in ("square", "triangle"))
SHOWN = {  # what the first run shows, by file name
    "TiM": RED_LEFT_OF_BLUE, "TiM-ksampler": TRIANGLES, "TiM-plain": RED_LEFT_OF_BLUE, "TiM-small": SQUARES, "TiM-large": SQUARES,
    "TiM-refined": two("yellow square", "above", "purple circle"), "TiM-custom": two("purple triangle", "right of", "white circle"),
}
SHOWN_AFTER = {
    "image-to-image": two("yellow circle", "left of", "blue square"), "inpainting": two("red circle", "left of", "green triangle"),
    "outpainting": RED_LEFT_OF_BLUE,
}


@pytest.mark.parametrize("stem", STEMS)
def test_template(comfyui, pipe, class_files, lora_file, stem):
    more = {"server": comfyui} if stem in ("class-conditional", "lora") else {}
    run = Template(comfyui, stem)
    expected = EXPECTED[stem](run, pipe, **more)
    assert run.pictures.keys() == expected.keys()
    for prefix, images in expected.items():
        same_image(run.pictures[prefix], images)
    shown = SHOWN | {"TiM-after": SHOWN_AFTER.get(stem)}
    for prefix in run.pictures.keys() & shown.keys():
        assert shown[prefix].text in [node.get("text") for node in run.inputs.values()]
        picture = run.pictures[prefix][0]
        assert is_correct(shown[prefix], picture.numpy() / 255), prefix
        edges = torch.cat([picture[[0, -1]].flatten(), picture[:, [0, -1]].flatten()])
        assert edges.max() < 100, f"{prefix}: a shape is cut off"


@pytest.mark.parametrize("stem", OWN_IMAGE)
def test_template_for_an_image_of_ones_own(comfyui, released_files, stem):
    """On small stand-ins; the image is wider than it is cropped, and its alpha channel is the mask that the editor paints."""
    rng, side = np.random.default_rng(0), 1024 if stem == "inpainting-1024" else 768
    pixels = rng.integers(0, 256, (side // 32, side // 32 + 8, 4), dtype=np.uint8).repeat(32, 0).repeat(32, 1)
    pixels[..., 3] = 255
    pixels[256:768, 384:640, 3] = 0
    Image.fromarray(pixels).save(comfyui.base / "input" / "own.png")
    run = Template(comfyui, stem, {"Your image": {"image": "own.png"}})
    node, prompt = run.inputs["TiMSampler"], run.inputs["Positive"]["text"]
    image = torch.from_numpy(pixels[None, :, 128:-128, :3] / np.float32(255))
    if "ImagePadForOutpaint" in run.inputs:
        image, mask = padded(run.inputs["ImagePadForOutpaint"], image)
    else:
        mask = torch.from_numpy(pixels[None, :, 128:-128, 3] == 0).float()
    assert image.shape[1:3] == mask.shape[1:3] == (1024, 1024) and 0.1 < mask.mean() < 0.5
    pipe = Pipeline.load(released_files, "cpu", "float32")
    drawn = sample_masked(pipe, node, prompt, image, interpolate(mask[:, None], (32, 32), mode="bilinear"))
    (found,) = run.pictures.values()
    same_image(found, torch.lerp(image, drawn, mask[..., None]))


@pytest.mark.parametrize("stem", RELEASED)
def test_template_of_the_released_model(comfyui, released_files, stem):
    """On small stand-ins under the released names; enlarged from 64 to 256 in place of 1024 to 4096."""
    small = {"TiMEmptyLatent": {"aspect_ratio": "custom", "width": 64, "height": 64}} if "upscale" in stem else {}
    run = Template(comfyui, stem, small)
    node, prompt = run.inputs["TiMSampler"], run.inputs["Positive"]["text"]
    lora = {comfyui.base / "models" / "loras" / run.inputs["LoraLoaderModelOnly"]["lora_name"]: 1.0} if "lora" in stem else None
    pipe = Pipeline.load(released_files, "cpu", "float32", lora=lora)
    assert (pipe.defaults.width, pipe.defaults.height, pipe.defaults.steps, pipe.defaults.cfg) == (1024, 1024, node["steps"], node["cfg"])
    size = dict(width=64, height=64) if small else {}
    first = pipe(prompt, steps=node["steps"], **size, **run.settings("TiMSampler"))
    expected = {"TiM-lora" if lora else "TiM-1024": first}
    if small:
        upscale = run.inputs["TiMNativeUpscale"]
        options = {name: upscale[name] for name in ("factor", "stages", "steps", "strength")}
        expected["TiM-4096"] = pipe.upscale(first, prompt, **options, **run.settings("TiMNativeUpscale"))
        assert (upscale["factor"], upscale["stages"]) == (4, 2) and expected["TiM-4096"].shape[1:3] == (256, 256)
    else:
        assert first.shape[1:3] == (1024, 1024)
    assert run.pictures.keys() == expected.keys()
    for prefix, images in expected.items():
        same_image(run.pictures[prefix], images)
