"""Low-rank adapters (LoRA, arXiv 2106.09685): W x + alpha / rank * B (A x), of which only A and B are trained."""

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import TimError
from ..settings import shown
from ..weights.detect import TRANSFORMER
from ..weights.lora import Adapter, Lora
from .config import LoraConfig
from .writing import write_tensors


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
        out = self.base(x)
        if not torch.is_autocast_enabled(x.device.type):  # which casts to its own dtype
            x = x.to(self.lora_A.weight.dtype)
        return out + (self.lora_B(self.lora_A(x)) * self.scale).to(out.dtype)


def add_lora(network: nn.Module, config: LoraConfig) -> None:
    """Freezes the network and adds an adapter to every linear layer whose name matches a target. TimError if none does."""
    network.requires_grad_(False)
    found = [name for name, module in network.named_modules()
             if isinstance(module, nn.Linear) and any(re.search(target, name) for target in config.targets)]
    if not found:
        raise TimError(f"training config: lora.targets is {shown(config.targets)}, which matches no layer; use patterns such as attn.qkv")
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
    """Writes the adapters in `weights`, in bfloat16, as a LoRA for the transformer."""
    down, end = ".lora_A.weight", ".lora_B.weight"
    layers = {name.removesuffix(down): Adapter(value.to(torch.bfloat16), weights[name.removesuffix(down) + end].to(torch.bfloat16),
                                               config.alpha or float(config.rank))
              for name, value in weights.items() if name.endswith(down)}
    lora = Lora(str(path), {TRANSFORMER: layers}, {"tim_lora": record})
    write_tensors(path, lora.state_dict(), lora.metadata)
    return path
