"""Random weights in exactly the published shapes, names and formats, for tests/test_full_size.py. Writing needs 12 GB of disk."""

import json
import math
import os
from functools import partial
from pathlib import Path

import torch

from tests.support import official_config, sd_vae_names_of_2022
from tim_core.models.autoencoder import Autoencoder
from tim_core.models.config import AutoencoderConfig
from tim_core.models.gemma import gemma_shapes, normalise_config
from tim_core.models.kl_autoencoder import KLAutoencoder, KLAutoencoderConfig
from tim_core.models.transformer import TransitionTransformer
from tim_core.shapes.tokenizer import shapes_tokenizer
from tim_core.weights.write import Entry, write_safetensors

NETWORK = dict(
    depth=28, hidden_size=1152, num_heads=16, qk_norm=True, z_dim=768, new_condition="t-r", use_new_embed=True, distance_aware=True,
    lora_hidden_size=384,
)  # fmt: skip
NETWORKS = {
    "t2i": dict(**NETWORK, in_channels=32, patch_size=1, cap_feat_dim=1152),
    "c2i-256": dict(**NETWORK, in_channels=4, patch_size=2, num_classes=1000),
    "c2i-512": dict(**NETWORK, in_channels=32, patch_size=1, num_classes=1000),
}
GEMMA = {
    "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "vocab_size": 262144, "hidden_size": 1152, "num_hidden_layers": 26,
    "intermediate_size": 6912, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "query_pre_attn_scalar": 256,
    "sliding_window": 512, "sliding_window_pattern": 6, "rope_theta": 1000000, "rope_local_base_freq": 10000, "rope_scaling": None,
    "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "pad_token_id": 0, "bos_token_id": 2,
    "attention_bias": False, "attn_logit_softcapping": None, "torch_dtype": "bfloat16",
}  # fmt: skip
DC_AE = {
    "_class_name": "AutoencoderDC", "in_channels": 3, "latent_channels": 32, "attention_head_dim": 32, "scaling_factor": 0.41407,
    "encoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "decoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024], "decoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "encoder_layers_per_block": [2, 2, 2, 3, 3, 3], "decoder_layers_per_block": [3] * 6,
    "encoder_qkv_multiscales": [[], [], [], [5], [5], [5]], "decoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "downsample_block_type": "conv", "upsample_block_type": "interpolate", "decoder_norm_types": "rms_norm", "decoder_act_fns": "silu",
}  # fmt: skip
SD_VAE = {
    "_class_name": "AutoencoderKL", "act_fn": "silu", "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4, "in_channels": 3, "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 32,
    "out_channels": 3, "sample_size": 256, "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip
BASE = 2**22


def random_tensor(base: torch.Tensor, number: int, shape: tuple[int, ...], name: str, dtype: torch.dtype) -> torch.Tensor:
    """Values of a trained network's size: a stretch of `base`, repeated. Norms are near 1, or near 0 where the network adds 1."""
    count = math.prod(shape)
    start = number * 7919 % (BASE // 2)
    values = base[start:].repeat(-(-count // (BASE - start)))[:count].reshape(shape)
    if len(shape) == 1:
        is_norm = name.endswith(".weight") and "layernorm" not in name and name != "norm.weight" and not name.startswith("model.")
        return (1 + 0.05 * values if is_norm else 0.05 * values).to(dtype)
    gain = 0.3 if "adaLN" in name else 1.0
    return (values * (gain / math.sqrt(math.prod(shape[1:])))).to(dtype)


def entries(state: dict[str, torch.Tensor], dtype: torch.dtype, prefix: str = "") -> dict[str, Entry]:
    """Entries for the names and shapes of a state dict on the meta device."""
    base = torch.randn(BASE, generator=torch.Generator().manual_seed(0))
    return {
        prefix + name: Entry(tuple(value.shape), dtype, partial(random_tensor, base, number, tuple(value.shape), prefix + name, dtype))
        for number, (name, value) in enumerate(state.items())
    }


def write_transformer(release: str, path: Path) -> None:
    """t2i as a torch file, the others as safetensors, all in float32 with the projector."""
    made = entries(TransitionTransformer(official_config(NETWORKS[release]), device="meta").state_dict(), torch.float32)
    if path.suffix == ".bin":
        torch.save({name: one.make() for name, one in made.items()}, path)
    else:
        write_safetensors(path, made, {"format": "pt"})


def write_gemma(folder: Path) -> None:
    """In Hugging Face's layout, bfloat16. TIM_GEMMA_TOKENIZER names the real tokenizer.json; else that of the demo model is taken."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(GEMMA))
    real = os.environ.get("TIM_GEMMA_TOKENIZER")
    (folder / "tokenizer.json").write_bytes(Path(real).read_bytes() if real else shapes_tokenizer())
    state = {name: torch.empty(shape, device="meta") for name, shape in gemma_shapes(normalise_config(GEMMA)).items()}
    write_safetensors(folder / "model.safetensors", entries(state, torch.bfloat16, "model."), {"format": "pt"})


def write_dc_ae(folder: Path) -> None:
    """In diffusers' layout, float32."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(DC_AE))
    state = Autoencoder(AutoencoderConfig.from_diffusers(DC_AE), device="meta").state_dict()
    write_safetensors(folder / "diffusion_pytorch_model.safetensors", entries(state, torch.float32), {"format": "pt"})


def write_sd_vae(folder: Path) -> None:
    """In diffusers' layout of 2022, float32."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SD_VAE))
    state = sd_vae_names_of_2022(KLAutoencoder(KLAutoencoderConfig.from_diffusers(SD_VAE), device="meta").state_dict())
    write_safetensors(folder / "diffusion_pytorch_model.safetensors", entries(state, torch.float32), {"format": "pt"})
