"""What an entry of the tables in this folder is: a graph, and what must come out of it in the real ComfyUI."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from tests.comfy_graph import BUNDLED_NAME, PROMPT, Graph, close, images_of, latent_of, lines_of
from tests.comfy_support import Failed, Server
from tests.support import mentions
from tim_core.shapes.detector import is_correct
from tim_core.shapes.scenes import Prompt, Thing

COMPLETE = "0.33.0"  # the version of ComfyUI from which on every node below is there
SEEDS = 8  # images of a batch where their number counts, each from noise of its own
SCENE = Prompt("full position", (Thing("circle", "red"), Thing("square", "blue")), "left of")  # of PROMPT
Builder = Callable[["CaseGraph"], list]


class Missing(Exception):
    """This version of ComfyUI lacks a node, or an option of one."""


class CaseGraph(Graph):
    """A graph on a checkpoint of the server, which starts with a prompt, an empty negative and an empty latent of `count` images."""

    def __init__(self, server: Server, checkpoint: str, count: int):
        super().__init__(checkpoint)
        self.server, self.info, self.count = server, server.object_info, count
        self.positive, self.negative, self.latent = self.text(PROMPT), self.text(""), self.empty(batch_size=count)

    def node(self, kind: str, **inputs) -> list:
        """Adds a node; widgets that are not given take its defaults. Missing if this version lacks it, or a value given."""
        if kind not in self.info:
            raise Missing(f"no {kind}")
        groups = self.info[kind]["input"]
        required = groups.get("required", {})
        for name, (kind_of, *options) in (required | groups.get("optional", {})).items():
            settings = options[0] if options else {}
            offered = kind_of if isinstance(kind_of, list) else settings.get("options") if kind_of == "COMBO" else None
            if name in inputs:
                if offered and isinstance(inputs[name], str) and inputs[name] not in offered and not name.endswith("_name"):
                    raise Missing(f"no {name} {inputs[name]} in {kind}")
            elif name in required and "default" in settings:
                inputs[name] = settings["default"]
            elif name in required and offered:
                inputs[name] = offered[0]
        return self.add(kind, **inputs)

    def patch(self, kind: str, **settings) -> CaseGraph:
        """Puts a node between the model and what comes after."""
        self.model = self.node(kind, model=self.model, **settings)
        return self

    def stock(self, latent=None, positive=None, negative=None, kind="KSampler", **settings) -> list:
        for name in ("sampler_name", "scheduler"):
            if name in settings and settings[name] not in options(self.info, "KSampler", name):
                raise Missing(f"no {name} {settings[name]}")
        return super().stock(latent or self.latent, positive or self.positive, negative or self.negative, kind, **settings)

    def tim(self, latent=None, positive=None, negative=None, **settings) -> list:
        return super().tim(latent or self.latent, positive or self.positive, negative or self.negative, **settings)

    def custom(self, sigmas: list, sampler: list | None = None, latent=None, **settings) -> list:
        """SamplerCustom, with euler unless a SAMPLER is given."""
        links = dict(model=self.model, sampler=sampler or self.node("KSamplerSelect", sampler_name="euler"), sigmas=sigmas)
        settings = dict(add_noise=True, noise_seed=0, cfg=2.5) | settings
        return self.add(
            "SamplerCustom", **links, positive=self.positive, negative=self.negative, latent_image=latent or self.latent, **settings)

    def advanced(self, guider: list, sigmas: list, sampler: list | None = None, noise: list | None = None, latent=None) -> list:
        """SamplerCustomAdvanced, with euler and random noise unless others are given."""
        noise = noise or self.node("RandomNoise", noise_seed=0)
        sampler = sampler or self.node("KSamplerSelect", sampler_name="euler")
        return self.add("SamplerCustomAdvanced", noise=noise, guider=guider, sampler=sampler, sigmas=sigmas,
                        latent_image=latent or self.latent)

    def simple(self, steps: int = 4, denoise: float = 1.0) -> list:
        return self.node("BasicScheduler", model=self.model, scheduler="simple", steps=steps, denoise=denoise)

    def flat(self, width: int = 64, height: int = 64, color: int = 0x808080, batch_size: int = 1) -> list:
        """An IMAGE of one colour."""
        return self.node("EmptyImage", width=width, height=height, batch_size=batch_size, color=color)

    def mask(self, value: float = 1.0, width: int = 64, height: int = 64) -> list:
        return self.node("SolidMask", value=value, width=width, height=height)

    def half_mask(self, width: int = 64, height: int = 64) -> list:
        """A mask of 1 on the right half."""
        left = self.mask(0.0, width // 2, height)
        return self.node("MaskComposite", destination=self.mask(1.0, width, height), source=left, x=0, y=0, operation="and")

    @contextmanager
    def kept(self):
        """What is built inside leaves the graph's model, clip, vae, conditionings and latent as they were."""
        names = ("model", "clip", "vae", "positive", "negative", "latent")
        saved = {name: getattr(self, name) for name in names}
        try:
            yield
        finally:
            vars(self).update(saved)


def options(info: dict, kind: str, name: str) -> list:
    """What a version offers in a combo."""
    first, *rest = info[kind]["input"]["required"][name]
    return first if isinstance(first, list) else rest[0]["options"]


@dataclass(frozen=True)
class Draws:
    """The detector finds PROMPT in at least `least` of `count` images. unlike: a graph whose images must differ."""

    least: int = 6
    unlike: Builder | None = None
    count: int = SEEDS

    def check(self, graph: CaseGraph, build: Builder) -> list[str]:
        with graph.kept():
            saves = [graph.picture(build(graph))]
        if self.unlike:
            saves.append(graph.picture(self.unlike(graph)))
        outputs: dict = {}
        lines = lines_of(graph.server, lambda: outputs.update(graph.server.run(graph.prompt)))
        images, *others = (images_of(graph.server, outputs, save) for save in saves)
        found = sum(is_correct(SCENE, (image / 255).numpy()) for image in images)
        assert len(images) == self.count and found >= self.least, f"{found} of {len(images)} are right"
        assert not others or (images - others[0]).abs().max() > 2, "nothing has changed"
        return lines


@dataclass(frozen=True)
class Equals:
    """The latent equals another graph's, within `bound` of its standard deviation."""

    other: Builder
    bound: float = 1e-4
    count: int = 2

    def check(self, graph: CaseGraph, build: Builder) -> list[str]:
        saves = []
        for each in (build, self.other):
            with graph.kept():
                saves.append(graph.save(each(graph)))
        outputs: dict = {}
        lines = lines_of(graph.server, lambda: outputs.update(graph.server.run(graph.prompt)))
        close(*(latent_of(graph.server, outputs, save) for save in saves), self.bound)
        return lines


@dataclass(frozen=True)
class Runs:
    """The latent has this shape; what it shows cannot be right, and the lines say why."""

    shape: tuple[int, ...] | None = None
    count: int = 1

    def check(self, graph: CaseGraph, build: Builder) -> list[str]:
        save, outputs = graph.save(build(graph)), {}
        lines = lines_of(graph.server, lambda: outputs.update(graph.server.run(graph.prompt)))
        latent = latent_of(graph.server, outputs, save)
        assert latent.isfinite().all() and self.shape in (None, tuple(latent.shape))
        return lines


@dataclass(frozen=True)
class Refused:
    """One line of ours that holds these words, and neither a path of the installation nor a module of it."""

    words: tuple[str, ...]
    count: int = 1

    def check(self, graph: CaseGraph, build: Builder) -> list[str]:
        graph.save(build(graph))
        with pytest.raises(Failed) as error:
            graph.server.run(graph.prompt)
        text = str(error.value)
        assert error.value.kind == "tim_core.errors.TimError", f"{error.value.kind}: {text}"
        assert "\n" not in text and "custom_nodes" not in text and mentions(text, *self.words), text
        return []


@dataclass(frozen=True)
class Case:
    """lines: what the log says, each as words in their order; nothing else of ours is logged. checkpoint: of the server's files."""

    name: str
    build: Builder
    expect: Draws | Equals | Runs | Refused
    lines: tuple[tuple[str, ...], ...] = ()
    checkpoint: str = BUNDLED_NAME

    def run(self, server: Server) -> None:
        """Builds the graph, runs it, and checks what it made and what was logged. Missing if this version lacks a node of it."""
        logged = self.expect.check(CaseGraph(server, self.checkpoint, self.expect.count), self.build)
        said = [re.sub(r".*?TiM: ", "", line) for line in logged]
        assert len(said) == len(self.lines), said
        for line, words in zip(said, self.lines):
            assert mentions(line, *words), f"{line!r} does not say {words}"


def refused(name: str, build: Builder, *words: str) -> Case:
    return Case(name, build, Refused(words))


def grey(graph: CaseGraph, *size: int) -> list:
    """A LATENT of a grey image."""
    return graph.node("VAEEncode", pixels=graph.flat(*size), vae=graph.vae)

