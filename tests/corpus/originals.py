"""The whole files that hostile ones are made from: tiny models with random weights, a LoRA, an image."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from tim_core.cli import main
from tim_core.models.autoencoder import Autoencoder
from tim_core.models.config import AutoencoderConfig, StageConfig, TransformerConfig
from tim_core.models.kl_autoencoder import KLAutoencoder, KLAutoencoderConfig
from tim_core.models.text_encoder import TextEncoder
from tim_core.models.tokenizer import Tokenizer
from tim_core.models.transformer import TransitionTransformer
from tim_core.shapes.tokenizer import VOCABULARY_SIZE, shapes_tokenizer
from tim_core.weights.save import pack

PROMPT = "a red circle"
SAMPLE = ("sample", PROMPT, "--size", "16x16", "--steps", "2", "-o", "out.png")  # what most cases run, with --model


def readers(file: str) -> dict[str, tuple[str, ...]]:
    """The commands that read a weight file, by name."""
    return {
        "sample": (*SAMPLE, "--model", file),
        "inspect": ("inspect", file),
        "convert": ("convert", file, "out.safetensors"),
        "pack": ("pack", "--model", file, "out.safetensors"),
        "lora": (*SAMPLE, "--lora", file),
    }
GEMMA = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": 512,
    "sliding_window_pattern": 2,
}
TIM = {"in_channels": 4, "hidden_size": 16, "depth": 2, "num_heads": 2, "lora_hidden_size": 4}
PREFIXES = {"transformer": "model.diffusion_model.", "text": "text_encoders.transformer.", "vae": "vae."}


class Originals:
    """Each is made when it is first asked for, in a folder of the session, and is only read."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.results: dict[tuple[str, ...], Path] = {}

    @cached_property
    def modules(self) -> dict[str, torch.nn.Module]:
        torch.manual_seed(0)
        stages = (StageConfig(4, 1), StageConfig(8, 1), StageConfig(8, 1, "EfficientViTBlock", (5,)))
        return {
            "model": TransitionTransformer(TransformerConfig(**TIM, text_dim=16)),
            "text-encoder": TextEncoder(GEMMA, Tokenizer.from_json(shapes_tokenizer())),
            "vae": Autoencoder(AutoencoderConfig(stages, stages, latent_channels=4, head_dim=8)),
        }

    @cached_property
    def model(self) -> Path:
        """A one-file text-to-image checkpoint: 4 latent channels, 4 pixels per latent cell."""
        return pack(self.modules, self.folder / "model.safetensors", metadata={"escape_prompts": False, "native_size": [16, 16]})

    @cached_property
    def classes(self) -> Path:
        """A one-file class-conditional checkpoint of 10 classes and the null class."""
        torch.manual_seed(1)
        parts = {"model": TransitionTransformer(TransformerConfig(**TIM, num_classes=10)), "vae": self.modules["vae"]}
        return pack(parts, self.folder / "classes.safetensors", metadata={"native_size": [16, 16]})

    @cached_property
    def parts(self) -> Path:
        """A folder of three parts in Hugging Face layout."""
        folder = self.folder / "parts"
        tensors = self.tensors
        for name, part in (("transformer", "transformer"), ("text_encoder", "text"), ("vae", "vae")):
            (folder / name).mkdir(parents=True)
            own = {key.removeprefix(PREFIXES[part]): value for key, value in tensors.items() if key.startswith(PREFIXES[part])}
            save_file(own, folder / name / "model.safetensors")
        (folder / "text_encoder" / "config.json").write_text(json.dumps(GEMMA | {"model_type": "gemma3_text"}))
        (folder / "text_encoder" / "tokenizer.json").write_bytes(shapes_tokenizer())
        return folder

    @cached_property
    def stock_vae(self) -> Path:
        """Stable Diffusion's VAE of one layer and narrow, under diffusers' names."""
        torch.manual_seed(3)
        save_file(KLAutoencoder(KLAutoencoderConfig((32, 32, 32, 32), 1)).state_dict(), self.folder / "sd-vae.safetensors")
        return self.folder / "sd-vae.safetensors"

    @cached_property
    def lora(self) -> Path:
        """A LoRA of rank 2 of the model's attention, under ComfyUI's names."""
        torch.manual_seed(2)
        tensors = {}
        for block in range(2):
            key = f"diffusion_model.blocks.{block}.attn.qkv"
            tensors |= {f"{key}.lora_A.weight": torch.randn(2, 16), f"{key}.lora_B.weight": torch.randn(48, 2)}
            tensors[f"{key}.alpha"] = torch.tensor(2.0)
        save_file(tensors, self.folder / "lora.safetensors")
        return self.folder / "lora.safetensors"

    @cached_property
    def image(self) -> Path:
        """An RGB PNG of 16 x 16 pixels."""
        image = Image.new("RGB", (16, 16), "white")
        image.paste((200, 30, 30), (4, 4, 12, 12))
        image.save(self.folder / "image.png")
        return self.folder / "image.png"

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors of `model`, free to be changed."""
        return load_file(self.model)

    @cached_property
    def metadata(self) -> dict[str, str]:
        """The safetensors metadata of `model`."""
        from safetensors import safe_open

        with safe_open(self.model, "pt") as file:
            return dict(file.metadata())

    def save(self, tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> Path:
        """Writes tensors as safetensors, with the metadata of `model` unless others are given."""
        save_file(dict(tensors), path, metadata=dict(self.metadata if metadata is None else metadata))
        return path

    def result(self, *arguments: object, name: str = "out.png") -> Path:
        """The file `name` that a command with clean inputs writes; `-o name` is among the arguments, or the last is `name`."""
        words = tuple(map(str, arguments))
        if words not in self.results:
            target = self.folder / f"result-{len(self.results)}-{name}"
            assert main([str(target) if word == name else word for word in words]) == 0, words
            self.results[words] = target
        return self.results[words]

    def copy(self, source: Path, target: Path) -> Path:
        return Path(shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target))
