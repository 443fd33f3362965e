"""What an evaluation in the graph must not do: wait for the device, or compile again."""

import json

import pytest

from tests.comfy_graph import Graph, inside, lines_of
from tests.comfy_support import probe

pytestmark = pytest.mark.comfyui


def with_classes(server, function):
    """As `inside`, with a class-conditional model and nothing else."""
    graph = Graph()
    model = graph.add("TiMModelLoader", model_name="c2i_model_512.safetensors", weight_dtype="default")
    node = graph.add("TiMTestProbe", **probe(function), model=model)[0]
    return json.loads(server.run(graph.prompt)[node]["text"][0])


def reads_by_steps(model, clip=None, vae=None):
    """Inside ComfyUI: what each sampler's guided run of 4 and of 8 steps reads back from "the device": tensors of a class that counts."""
    import sys
    from collections import Counter

    import comfy.sample
    import comfy.samplers
    import torch

    reads: Counter = Counter()
    waits = {"item", "tolist", "cpu", "numpy", "new_tensor", "nonzero", "equal", "__bool__", "__float__", "__int__", "__index__"}

    class OnDevice(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            name = getattr(function, "__name__", "")
            if name in waits:
                reads[name] += 1
                args = tuple(arg.as_subclass(torch.Tensor) if isinstance(arg, OnDevice) else arg for arg in args)
                return function(*args, **(kwargs or {}))
            return super().__torch_function__(function, types, args, kwargs)

    pack = {name: module for name, module in sys.modules.items() if "ComfyUI-TiM.nodes.adapters" in name}
    sampling, network = (next(module for name, module in pack.items() if name.endswith(end)) for end in ("adapters.sampling", ".network"))
    config = model.model.diffusion_model.config
    rows = [torch.randn(1, 5, config.text_dim) for _ in "ab"] if config.text_dim else [network.class_label(7), network.class_label(-1)]
    conds = [[[row.as_subclass(OnDevice), {}]] for row in rows]
    noise = torch.randn(2, config.in_channels, 4, 4).as_subclass(OnDevice)
    samplers = {
        "tim": sampling.transition_sampler(),
        "diffusion": sampling.transition_sampler("diffusion"),
        "euler": comfy.samplers.ksampler("euler"),
        "heun": comfy.samplers.ksampler("heun"),
    }
    found = {}
    for name, sampler in samplers.items():
        for steps in (4, 8):
            reads.clear()
            times = torch.linspace(1, 0, steps + 1).as_subclass(OnDevice)
            comfy.sample.sample_custom(model, noise, 2.5, sampler, times, *conds, torch.zeros_like(noise), disable_pbar=True, seed=0)
            found[f"{name} {steps}"] = dict(reads)
    return found


@pytest.mark.parametrize("kind", ["text", "classes"])
def test_no_evaluation_waits_for_the_device(comfyui, class_files, kind):
    """More steps read no more. Core's heun does, as it asks whether the next time is 0: the count sees it."""
    reads = (inside if kind == "text" else with_classes)(comfyui, reads_by_steps)
    assert reads["tim 4"] == reads["tim 8"] and reads["diffusion 4"] == reads["diffusion 8"] and reads["euler 4"] == reads["euler 8"]
    assert reads["tim 4"] and sum(reads["heun 8"].values()) > sum(reads["heun 4"].values())


def compiled(model, clip=None, vae=None):
    """Graphs so far and breaks after runs through core's compile wrapper, of other guidance, seeds and batch sizes."""
    import sys

    import comfy.samplers
    import torch
    import torch._dynamo
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from torch._dynamo.utils import counters

    graphs = []

    def backend(graph, inputs, **options):
        graphs.append(1)
        return graph.forward

    config = model.model.diffusion_model.config
    torch.manual_seed(0)
    network = next(module for name, module in sys.modules.items() if name.endswith("ComfyUI-TiM.nodes.adapters.network"))
    rows = [torch.randn(1, 5, config.text_dim) for _ in "ab"] if config.text_dim else [network.class_label(7), network.class_label(-1)]
    conds = [[[row, {}]] for row in rows]
    fast = model.clone()
    set_torch_compile_wrapper(
        model=fast,
        backend=backend,
        options={"guard_filter_fn": lambda entries: [("transformer_options" not in entry.name) for entry in entries]},
    )

    def run(patcher, cfg, seed, batch):
        noise = torch.randn(batch, config.in_channels, 4, 4, generator=torch.manual_seed(seed))
        sampler, sigmas = comfy.samplers.ksampler("euler"), torch.tensor([1.0, 0.7, 0.45, 0.2, 0.0])
        return comfy.samplers.sample(
            patcher, noise, *conds, cfg, torch.device("cpu"), sampler, sigmas, latent_image=torch.zeros_like(noise), seed=seed
        )

    torch._dynamo.reset()
    counters.clear()
    found, errors = [], []
    for settings in ((2.5, 0, 1), (2.5, 0, 1), (2.5, 1, 1), (1.0, 0, 1), (2.5, 0, 3), (1.0, 0, 2)):
        errors.append(float((run(fast, *settings) - run(model, *settings)).abs().max()))
        found.append(len(graphs))
    return {"graphs": found, "error": max(errors), "breaks": dict(counters["graph_break"]), "torch": torch.__version__}


@pytest.mark.parametrize("kind", ["text", "classes"])
def test_torch_compile_makes_one_graph(comfyui, class_files, kind):
    """For steps with guidance and without, whose batch is half as large, and for further runs, seeds and batch sizes."""
    found = (inside if kind == "text" else with_classes)(comfyui, compiled)
    assert found["graphs"] == [1] * 6 and not found["breaks"] and found["error"] < 1e-4


def compiled_after_failure(model, clip=None, vae=None):
    """Calls of a backend that fails with an open batch size, and the error against the plain network."""
    import comfy.samplers
    import torch
    import torch._dynamo
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    calls = []

    def backend(graph, inputs, **options):
        is_open = any(isinstance(value, torch.SymInt) and not value.node.has_hint() for value in inputs)
        calls.append(is_open)
        if is_open:
            raise RuntimeError("no kernel")
        return graph.forward

    torch.manual_seed(0)
    conds = [[[torch.randn(1, 5, model.model.diffusion_model.config.text_dim), {}]] for _ in "ab"]
    noise = torch.randn(1, model.model.diffusion_model.config.in_channels, 8, 8)
    fast = model.clone()
    set_torch_compile_wrapper(model=fast, backend=backend)

    def run(patcher):
        sampler, sigmas = comfy.samplers.ksampler("euler"), torch.tensor([1.0, 0.5, 0.0])
        return comfy.samplers.sample(
            patcher, noise, *conds, 2.5, torch.device("cpu"), sampler, sigmas, latent_image=torch.zeros_like(noise), seed=0
        )

    torch._dynamo.reset()
    return {"calls": calls, "error": float((run(fast) - run(model)).abs().max())}


def test_where_torch_fails_with_an_open_batch_size_it_compiles_each(comfyui):
    found = {}
    lines = lines_of(comfyui, lambda: found.update(inside(comfyui, compiled_after_failure)))
    assert found == {"calls": [True, False, False], "error": pytest.approx(0, abs=1e-4)}
    assert len(lines) == 1 and "torch.compile" in lines[0]
