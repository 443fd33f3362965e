"""The parameters that a run trains, and their optimisers."""

from dataclasses import dataclass

import torch
from torch import nn

from ..errors import TimError
from .config import LoopConfig


@dataclass(frozen=True)
class ParamGroup:
    """Trained parameters, by name, with learning rates of their own; their gradients are clipped together.

    norm: the name of their gradient norm in metrics.csv. muon_lr: with loop.optimizer muon, for the weight matrices of blocks and layers.
    start_step: the step of their first update and of the start of their warm-up.
    """

    norm: str
    parameters: dict[str, nn.Parameter]
    lr: float
    muon_lr: float
    start_step: int = 0


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters of a model, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def optimizers(config: LoopConfig, groups: list[ParamGroup]) -> list[torch.optim.Optimizer]:
    """For each group AdamW, or Muon (Jordan et al. 2024) for the weight matrices of blocks and layers and AdamW for the rest.

    Modulation layers use AdamW, because they are zero at first and the size of Muon's steps does not depend on the gradient.
    """
    found: list[torch.optim.Optimizer] = []
    for group in groups:
        matrices, rest, made = [], [], []
        for name, parameter in group.parameters.items():
            inner = parameter.ndim == 2 and (".blocks." in f".{name}" or ".layers." in f".{name}") and "adaLN" not in name
            (matrices if config.optimizer == "muon" and inner else rest).append(parameter)
        if rest:
            made.append(torch.optim.AdamW(rest, group.lr, config.betas, 1e-8, config.weight_decay, fused=True))
        if matrices:
            if not hasattr(torch.optim, "Muon"):
                raise TimError(f"loop.optimizer: muon needs torch 2.9, this is {torch.__version__}; update torch, or use adamw")
            made.append(torch.optim.Muon(matrices, lr=group.muon_lr, weight_decay=config.weight_decay, adjust_lr_fn="original"))
        for options in (options for optimizer in made for options in optimizer.param_groups):
            options["base_lr"], options["start_step"] = options["lr"], group.start_step
        found += made
    return found
