"""Low-rank adapters (LoRA, arXiv 2106.09685): W x + alpha / rank * B (A x), of which only A and B are trained."""

import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import TimError
from ..files import atomic_write
from .config import LoraConfig


class LoraLinear(nn.Module):
    """A frozen linear layer with an adapter that is zero at first."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        super().__init__()
        where = {"device": base.weight.device, "dtype": torch.float32}
        self.base, self.scale = base, alpha / rank
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, **where)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, **where)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.lora_B(self.lora_A(x.to(self.lora_A.weight.dtype))).to(x.dtype) * self.scale


def add_lora(network: nn.Module, config: LoraConfig) -> None:
    """Freezes the network and adds an adapter to every linear layer whose name matches a target. TimError if none does."""
    network.requires_grad_(False)
    found = [name for name, module in network.named_modules()
             if isinstance(module, nn.Linear) and any(re.search(target, name) for target in config.targets)]
    if not found:
        raise TimError(f"training config: lora.targets is {list(config.targets)}, which matches no layer; use patterns such as attn.qkv")
    for name in found:
        parent, _, leaf = name.rpartition(".")
        holder = network.get_submodule(parent)
        setattr(holder, leaf, LoraLinear(getattr(holder, leaf), config.rank, config.alpha or float(config.rank)))


def round_base(network: nn.Module) -> None:
    """Keeps the frozen linear and convolutional layers in bfloat16. Autocast rounds them at every use, so results stay the same."""
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and not any(p.requires_grad for p in module.parameters()):
            module.to(torch.bfloat16)


def save_lora(weights: dict[str, Tensor], config: LoraConfig, path: Path, record: str) -> Path:
    """Writes the adapters in `weights` under the names ComfyUI reads: diffusion_model.<layer>.lora_A.weight, .lora_B.weight, .alpha."""
    tensors = {}
    for name, value in weights.items():
        layer, found, rest = name.partition(".lora_")
        if found:
            tensors[f"diffusion_model.{layer}.lora_{rest}"] = value.to(torch.bfloat16).contiguous()
            tensors[f"diffusion_model.{layer}.alpha"] = torch.tensor(config.alpha or float(config.rank))
    atomic_write(path, lambda tmp: save_file(tensors, tmp, metadata={"tim_lora": record}))
    return path
