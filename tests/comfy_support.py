"""The real ComfyUI for the tests marked `comfyui`: finding it, starting it on this tree, talking to it.

COMFYUI_PATH and COMFYUI_PYTHON say which one (comfy-cli's default workspace otherwise), COMFYUI_PYTHONPATH what its Python should
also see (an older version's front end).
"""

import asyncio
import inspect
import json
import os
import shutil
import socket
import subprocess
import textwrap
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDER = "ComfyUI-TiM"
RELEASED = ("text-to-image-1024", "staged-upscale-4096", "lora-1024")  # templates of the released text-to-image model
OWN_IMAGE = ("inpainting-1024", "outpainting-1024")  # the same, for an image in ComfyUI's input folder
START_SECONDS = 600  # the first start on a cold disk reads gigabytes
RUN_SECONDS = 300


def find() -> tuple[Path, Path] | None:
    """The checkout and its Python; None if there is none."""
    path = Path(os.environ.get("COMFYUI_PATH") or Path.home() / "comfy" / "ComfyUI")
    python = Path(os.environ.get("COMFYUI_PYTHON") or path / ".venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))
    return (path, python) if (path / "main.py").is_file() and python.is_file() else None


def header() -> str:
    """For the head of a test report."""
    if (found := find()) is None:
        return "ComfyUI: none found"
    version = (found[0] / "comfyui_version.py").read_text().split('"')[-2]
    return f"ComfyUI: {version} at {found[0]}"


def advice() -> str:
    return (
        "no ComfyUI found: the tests marked comfyui were skipped (`pip install comfy-cli && comfy install` gets one; "
        "COMFYUI_PATH and COMFYUI_PYTHON name another)"
    )


PROBE = """
import json

class TiMTestProbe:
    INPUT_TYPES = classmethod(lambda cls: {
        "required": {"source": ("STRING", {"multiline": True}), "name": ("STRING", {})},
        "optional": {"model": ("MODEL",), "clip": ("CLIP",), "vae": ("VAE",)},
    })
    RETURN_TYPES, FUNCTION, OUTPUT_NODE, CATEGORY = ("MODEL",), "run", True, "test"

    def run(self, source, name, **objects):
        scope = {}
        exec(source, scope)
        result = scope[name](**objects)
        shown = [] if hasattr(result, "model") else [json.dumps(result)]
        return {"ui": {"text": shown}, "result": (result,)}

NODE_CLASS_MAPPINGS = {"TiMTestProbe": TiMTestProbe}
"""


def probe(function) -> dict:
    """Inputs of the node TiMTestProbe, which calls this function, self-contained, with what else it is given, inside ComfyUI.

    The function returns a MODEL, the node's output, or something that JSON can say, which it shows.
    """
    return {"source": textwrap.dedent(inspect.getsource(function)), "name": function.__name__}


class Failed(Exception):
    """A prompt that ComfyUI refused or could not run; the text is what it said, `kind` the type of a node's exception as it named it."""

    def __init__(self, text: str, kind: str = ""):
        super().__init__(text)
        self.kind = kind


class Server:
    """ComfyUI on the CPU, with this tree and a probe as its only custom nodes and `base` as its only folder to write to."""

    def __init__(self, base: Path, path: Path, python: Path):
        self.base = base
        custom_nodes = base / "custom_nodes"
        models = ("checkpoints", "diffusion_models", "text_encoders", "vae", "loras")
        for folder in (custom_nodes, base / "output", base / "user", *(base / "models" / name for name in models)):
            folder.mkdir(parents=True)
        (base / "input").mkdir()
        shutil.copyfile(path / "input" / "example.png", base / "input" / "example.png")  # comes with every ComfyUI
        (custom_nodes / FOLDER).symlink_to(ROOT, target_is_directory=True)
        (custom_nodes / "probe.py").write_text(PROBE)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
        if os.environ.get("COMFYUI_PYTHONPATH"):
            environment["PYTHONPATH"] = os.environ["COMFYUI_PYTHONPATH"]
        for name in ("VIRTUAL_ENV", "PYTHONHOME"):
            environment.pop(name, None)
        self.elsewhere = base / "elsewhere"  # a second place for models, as extra_model_paths.yaml names it
        folders = ("diffusion_models", "text_encoders", "vae", "checkpoints")
        (extra := base / "extra.yaml").write_text(
            "\n".join(["elsewhere:", f"  base_path: {self.elsewhere}", *(f"  {name}: my_{name}" for name in folders)]))
        for name in folders:
            (self.elsewhere / f"my_{name}").mkdir(parents=True)
        options = ["--cpu", "--disable-auto-launch", "--preview-method", "latent2rgb", "--extra-model-paths-config", extra]
        command = [python, "main.py", "--listen", "127.0.0.1", "--port", str(self.port), "--base-directory", base, *options]
        self.log = base / "log.txt"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [str(word) for word in command], cwd=path, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        end = time.monotonic() + START_SECONDS
        while True:
            try:
                self.stats = self.get("system_stats")
                break
            except OSError:
                if self.process.poll() is not None or time.monotonic() > end:
                    self.stop()
                    raise RuntimeError(f"ComfyUI did not start:\n{self.log_text()[-4000:]}") from None
                time.sleep(0.5)
        self.object_info = self.get("object_info")

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")

    def add(self, folder: str, file: Path, name: str) -> str:
        """Copies a file into a models folder -> its name there."""
        shutil.copyfile(file, self.base / "models" / folder / name)
        return name

    def read(self, path: str, body: dict | None = None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/{path}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()

    def get(self, path: str) -> dict:
        return json.loads(self.read(path))

    def queue(self, prompt: dict) -> str:
        """Queues an API-format prompt -> its id; Failed if it does not validate."""
        try:
            answer = json.loads(self.read("prompt", {"prompt": prompt, "client_id": uuid.uuid4().hex}))
        except urllib.error.HTTPError as error:
            raise Failed(error.read().decode()) from None
        if answer["node_errors"]:  # the rest is queued all the same
            raise Failed(json.dumps(answer["node_errors"]))
        return answer["prompt_id"]

    def wait(self, prompt_id: str) -> dict:
        """The finished prompt's history entry."""
        end = time.monotonic() + RUN_SECONDS
        while time.monotonic() < end:
            entry = self.get(f"history/{prompt_id}").get(prompt_id)
            if entry and entry.get("status"):
                return entry
            time.sleep(0.05)
        raise TimeoutError(f"ComfyUI did not finish in {RUN_SECONDS} s:\n{self.log_text()[-4000:]}")

    def run(self, prompt: dict) -> dict[str, dict]:
        """Runs a prompt -> outputs by node id; Failed with the exception's text if a node raised one."""
        entry = self.wait(self.queue(prompt))
        for kind, message in entry["status"]["messages"]:
            if kind == "execution_error":
                raise Failed(message["exception_message"].strip(), message["exception_type"])
        assert entry["status"]["status_str"] == "success", entry["status"]
        return entry["outputs"]

    def file(self, result: dict) -> Path:
        """Where an output (an image, a latent) was written."""
        return self.base / result["type"] / result["subfolder"] / result["filename"]


@pytest.fixture(scope="session")
def comfyui(tmp_path_factory, tiny):
    """One server for the whole run; tiny.safetensors is in its models/checkpoints."""
    server = Server(tmp_path_factory.mktemp("comfyui"), *find())
    try:
        server.add("checkpoints", tiny, "tiny.safetensors")
        yield server
    finally:
        server.stop()


def make_class_files(server: Server, folder: Path) -> None:
    """What the template class-conditional asks for, small and random: a transformer for 1000 classes and a DC-AE of factor 32."""
    import torch
    from safetensors.torch import save_file

    from tim_core.models.autoencoder import Autoencoder
    from tim_core.models.config import AutoencoderConfig, StageConfig, TransformerConfig
    from tim_core.models.transformer import TransitionTransformer

    torch.manual_seed(0)
    folder.mkdir(exist_ok=True)
    config = TransformerConfig(in_channels=32, hidden_size=32, depth=2, num_heads=2, num_classes=1000, lora_hidden_size=8)
    stages = (StageConfig(8, 1),) * 4 + (StageConfig(32, 1), StageConfig(32, 1, "EfficientViTBlock", (5,)))
    vae = Autoencoder(AutoencoderConfig(stages, stages, latent_channels=32, head_dim=8, scaling_factor=0.41407))
    save_file(TransitionTransformer(config).state_dict(), folder / "model.safetensors")
    save_file(vae.state_dict(), folder / "vae.safetensors")
    server.add("diffusion_models", folder / "model.safetensors", "c2i_model_512.safetensors")
    server.add("vae", folder / "vae.safetensors", "dc-ae-f32c32-sana-1.1.safetensors")


@pytest.fixture(scope="session")
def class_files(comfyui, tmp_path_factory) -> None:
    make_class_files(comfyui, tmp_path_factory.mktemp("class"))


def make_lora(server: Server, folder: Path) -> None:
    """The LoRA that the template lora asks for, small and random, for the bundled model."""
    import torch
    from safetensors.torch import save_file

    from tim_core.weights.load import load_transformer

    torch.manual_seed(0)
    rows, columns = load_transformer("tim-shapes").blocks[0].attn.qkv.weight.shape
    key = "diffusion_model.blocks.0.attn.qkv"
    down, up = torch.randn(4, columns) / 8, torch.randn(rows, 4) / 8
    save_file({f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}, folder / "lora.safetensors")
    server.add("loras", folder / "lora.safetensors", "lora.safetensors")


@pytest.fixture(scope="session")
def lora_file(comfyui, tmp_path_factory) -> None:
    make_lora(comfyui, tmp_path_factory.mktemp("lora"))


def make_released_files(server: Server, folder: Path) -> dict[str, Path]:
    """What the templates of the released model ask for, small and random, with the DC-AE of make_class_files -> the parts, for Pipeline."""
    import torch
    from safetensors.torch import save_file

    from tim_core.models.config import TransformerConfig
    from tim_core.models.text_encoder import TextEncoder
    from tim_core.models.tokenizer import Tokenizer
    from tim_core.models.transformer import TransitionTransformer
    from tim_core.shapes.tokenizer import VOCABULARY_SIZE, shapes_tokenizer

    torch.manual_seed(1)
    folder.mkdir(exist_ok=True)
    gemma = {
        "vocab_size": VOCABULARY_SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "query_pre_attn_scalar": 16,
    }
    config = TransformerConfig(in_channels=32, hidden_size=32, depth=2, num_heads=2, text_dim=32, lora_hidden_size=8)
    network = TransitionTransformer(config)
    torch.save(network.state_dict(), folder / "t2i_model.bin")
    encoder = TextEncoder(gemma, Tokenizer.from_json(shapes_tokenizer()))
    text = server.base / "models" / "text_encoders" / "gemma-3-1b-it"
    text.mkdir(exist_ok=True)
    save_file(encoder.transformer.state_dict(), text / "model.safetensors")
    (text / "config.json").write_text(json.dumps({**gemma, "model_type": "gemma3_text"}))
    (text / "tokenizer.json").write_bytes(shapes_tokenizer())
    lora = {"lora_A": torch.randn(2, 32), "lora_B": torch.randn(96, 2)}
    save_file({f"diffusion_model.blocks.0.attn.qkv.{name}.weight": value for name, value in lora.items()}, folder / "lora.safetensors")
    server.add("diffusion_models", folder / "t2i_model.bin", "t2i_model.bin")
    server.add("loras", folder / "lora.safetensors", "lora-1024.safetensors")
    vae = server.base / "models" / "vae" / "dc-ae-f32c32-sana-1.1.safetensors"
    return {"model": folder / "t2i_model.bin", "text-encoder": text, "vae": vae}


@pytest.fixture(scope="session")
def released_files(comfyui, class_files, tmp_path_factory) -> dict[str, Path]:
    return make_released_files(comfyui, tmp_path_factory.mktemp("released"))


def to_api(workflow: dict, object_info: dict) -> dict:
    """A workflow as the editor saves it -> the prompt that the editor queues. No subgraphs, reroutes or bypassed nodes."""
    primitives = {node["id"]: node["widgets_values"][0] for node in workflow["nodes"] if node["type"] == "PrimitiveNode"}  # editor's own
    sources = {link[0]: primitives.get(link[1], [str(link[1]), link[2]]) for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in ("Note", "MarkdownNote", "PrimitiveNode"):
            continue
        info = object_info[node["type"]]
        values, inputs = list(node.get("widgets_values", [])), {}
        linked = {entry["name"]: sources[entry["link"]] for entry in node["inputs"] if entry.get("link") is not None}
        order = info["input_order"]
        for name in [*order.get("required", []), *order.get("optional", [])]:
            kind, options = ((info["input"].get("required", {}) | info["input"].get("optional", {}))[name] + [{}])[:2]
            if isinstance(kind, list) or options.get("widgetType", kind) in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"):
                if not values and name in order.get("optional", []):
                    continue  # saved before the input was there: the editor takes its default
                value = values.pop(0)
                if options.get("control_after_generate") or name in ("seed", "noise_seed"):
                    assert values.pop(0) in ("fixed", "increment", "decrement", "randomize")
                if options.get("image_upload"):
                    assert values.pop(0) == "image"  # the button
                inputs[name] = linked.get(name, value)
            elif name in linked:
                inputs[name] = linked[name]
        assert not values, f"{node['type']}: widget values left over: {values}"
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def events_of(server, prompt: dict) -> list:
    """Runs a prompt -> all that the server tells the editor of it: dicts, and bytes for previews."""
    aiohttp = pytest.importorskip("aiohttp")

    async def follow() -> list:
        events, address = [], f"http://127.0.0.1:{server.port}"
        async with aiohttp.ClientSession() as session, session.ws_connect(f"{address}/ws?clientId=editor", max_msg_size=0) as socket:
            async with session.post(f"{address}/prompt", json={"prompt": prompt, "client_id": "editor"}) as answer:
                assert answer.status == 200, await answer.text()
            while True:
                message = await asyncio.wait_for(socket.receive(), RUN_SECONDS)
                events.append(message.data if message.type == aiohttp.WSMsgType.BINARY else json.loads(message.data))
                if isinstance(events[-1], dict) and events[-1]["type"] in ("execution_success", "execution_error"):
                    return events

    return asyncio.run(follow())
