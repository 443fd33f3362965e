"""Prompts for the real ComfyUI, built node by node, and what comes out of them."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.comfy_support import ROOT, Failed, probe, to_api

BUNDLED_NAME = "tim-shapes (bundled)"
PROMPT = "a red circle left of a blue square"


class Graph:
    """A prompt in API format, built node by node; what a method returns is a link."""

    def __init__(self, checkpoint: str = "tiny.safetensors"):
        self.prompt = {}
        self.model, self.clip, self.vae = ([self.add("TiMCheckpointLoader", ckpt_name=checkpoint)[0], i] for i in range(3))

    def add(self, kind: str, **inputs) -> list:
        self.prompt[str(len(self.prompt) + 1)] = {"class_type": kind, "inputs": inputs}
        return [str(len(self.prompt)), 0]

    def text(self, text: str) -> list:
        return self.add("CLIPTextEncode", text=text, clip=self.clip)

    def empty(self, width: int = 64, height: int = 64, batch_size: int = 1) -> list:
        preset = dict(aspect_ratio="custom", area_factor="1")
        return self.add("TiMEmptyLatent", model=self.model, **preset, width=width, height=height, batch_size=batch_size)

    def tim(self, latent=None, positive=None, negative=None, **settings) -> list:
        settings = dict(
            seed=0, steps=4, cfg=2.5, guidance_low=0.0, guidance_high=1.0, stochasticity=0.0, start=1.0, end=0.0, add_noise=True,
            return_with_leftover_noise=True,
        ) | settings
        links = dict(model=self.model, positive=positive or self.text(PROMPT), negative=negative or self.text(""))
        return self.add("TiMSampler", **links, latent_image=latent or self.empty(), **settings)

    def stock(self, latent=None, positive=None, negative=None, kind: str = "KSampler", **settings) -> list:
        settings = dict(steps=4, cfg=2.5, sampler_name="euler", scheduler="simple") | settings
        settings = (dict(seed=0, denoise=1.0) if kind == "KSampler" else dict(noise_seed=0)) | settings
        links = dict(model=self.model, positive=positive or self.text(PROMPT), negative=negative or self.text(""))
        return self.add(kind, **links, latent_image=latent or self.empty(), **settings)

    def guided(self, guider: list, steps: int) -> list:
        """Core's sampler by parts: euler, simple."""
        sigmas = self.add("BasicScheduler", model=self.model, scheduler="simple", steps=steps, denoise=1.0)
        parts = dict(noise=self.add("RandomNoise", noise_seed=0), sampler=self.add("KSamplerSelect", sampler_name="euler"), sigmas=sigmas)
        return self.add("SamplerCustomAdvanced", **parts, guider=guider, latent_image=self.empty())

    def save(self, latent: list) -> str:
        return self.add("SaveLatent", samples=latent, filename_prefix="latent")[0]

    def picture(self, latent: list) -> str:
        image = self.add("VAEDecode", samples=latent, vae=self.vae)
        return self.add("SaveImage", images=image, filename_prefix="picture")[0]


def latent_of(server, outputs: dict, node: str) -> torch.Tensor:
    return load_file(server.file(outputs[node]["latents"][0]))["latent_tensor"]


def images_of(server, outputs: dict, node: str) -> torch.Tensor:
    """(B, H, W, 3) in 0..255."""
    from PIL import Image

    images = [Image.open(server.file(image)) for image in outputs[node]["images"]]
    return torch.stack([torch.frombuffer(bytearray(i.tobytes()), dtype=torch.uint8).view(i.height, i.width, 3) for i in images]).float()


def run_latents(server, graph: Graph, *latents: list) -> list[torch.Tensor]:
    nodes = [graph.save(latent) for latent in latents]
    outputs = server.run(graph.prompt)
    return [latent_of(server, outputs, node) for node in nodes]


def run_images(server, graph: Graph, latent: list) -> torch.Tensor:
    node = graph.picture(latent)
    return images_of(server, server.run(graph.prompt), node)


def inside(server, function, checkpoint: str = "tiny.safetensors"):
    """What the function returns when it is called inside ComfyUI with the checkpoint's model, clip and vae."""
    graph = Graph(checkpoint)
    node = graph.add("TiMTestProbe", **probe(function), model=graph.model, clip=graph.clip, vae=graph.vae)[0]
    return json.loads(server.run(graph.prompt)[node]["text"][0])


def close(a: torch.Tensor, b: torch.Tensor, bound: float = 1e-4) -> None:
    assert a.shape == b.shape
    assert b.isfinite().all() and b.std() > 0
    assert (a - b).abs().max() <= bound * b.std(), f"{(a - b).abs().max()} against a deviation of {b.std()}"


def same_image(a: torch.Tensor, b: torch.Tensor) -> None:
    """a from the graph, in 0..255; b from Pipeline, in [0, 1]."""
    assert a.shape == b.shape and (a - 255 * b).abs().max() <= 2
    assert b.std() > 0.02


def lines_of(server, run) -> list[str]:
    """What our pack logs while `run` is called."""
    start = len(server.log_text())
    run()
    return [line for line in server.log_text()[start:].splitlines() if "TiM: " in line]


def refusal(server, graph: Graph, result: list) -> str:
    """The one line with which a prompt is refused that asks for `result`, a LATENT."""
    graph.save(result)
    with pytest.raises(Failed) as error:
        server.run(graph.prompt)
    assert "\n" not in str(error.value)
    return str(error.value)


class Template:
    """A workflow, run: images by the SaveImage's prefix, and what its nodes are set to."""

    def __init__(self, server, stem: str):
        workflow = json.loads((ROOT / "workflows" / f"{stem}.json").read_text())
        titles = {str(node["id"]): node.get("title", node["type"]) for node in workflow["nodes"]}
        prompt = to_api(workflow, server.object_info)
        self.inputs = {titles[key]: node["inputs"] for key, node in prompt.items()}
        outputs = server.run(prompt)
        saves = {key: node["inputs"]["filename_prefix"] for key, node in prompt.items() if node["class_type"] == "SaveImage"}
        self.pictures = {prefix: images_of(server, outputs, key) for key, prefix in saves.items()}

    def settings(self, title: str) -> dict:
        """The sampler's settings as Pipeline names them."""
        node = self.inputs[title]
        return {"cfg": node["cfg"], "seed": node["seed"], "guidance_interval": (node["guidance_low"], node["guidance_high"])}
