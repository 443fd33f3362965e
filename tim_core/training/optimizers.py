"""The parameters that a run trains, and their optimisers."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import TimError
from .config import LoopConfig


@dataclass(frozen=True)
class ParamGroup:
    """Trained parameters, by name, with learning rates of their own; their gradients are clipped together.

    norm: the name of their gradient norm in metrics.csv. muon_lr: with loop.optimizer muon, for matrices and kernels of blocks and layers.
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


@contextmanager
def _flattened(parameters: Iterable[nn.Parameter], state: dict[nn.Parameter, dict[str, Tensor]]) -> Iterator[None]:
    """Within it kernels (out, in, height, width), their gradients and Muon's state are matrices (out, in * height * width)."""
    shapes = {p: p.shape for p in parameters if p.ndim > 2}

    def reshape(p: nn.Parameter, shape: tuple[int, ...]) -> None:
        gradient, p.grad = p.grad, None
        p.data = p.data.reshape(shape)
        p.grad = None if gradient is None else gradient.reshape(shape)
        if p in state:
            state[p]["momentum_buffer"] = state[p]["momentum_buffer"].view(shape)

    for p in shapes:
        reshape(p, (len(p), -1))
    try:
        yield
    finally:
        for p, shape in shapes.items():
            reshape(p, shape)


def muon(parameters: list[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """Muon of torch 2.9 for matrices and convolution kernels, which it takes as matrices. TimError if torch is older."""
    if not hasattr(torch.optim, "Muon"):
        raise TimError(f"loop.optimizer: muon needs torch 2.9, this is {torch.__version__}; update torch, or use adamw")

    class Muon(torch.optim.Muon):
        @torch.no_grad()
        def step(self, closure=None):
            with _flattened((p for group in self.param_groups for p in group["params"]), self.state):
                return super().step(closure)

    with _flattened(parameters, {}):
        return Muon(parameters, lr=lr, weight_decay=weight_decay, adjust_lr_fn="original")


def _is_inner(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon trains it: a matrix or kernel in a block or layer, but no depthwise kernel and no modulation, which is zero at first."""
    inner = any(part in f".{name}" for part in (".blocks.", ".layers.", "_blocks."))
    is_matrix = parameter.ndim == 2 or parameter.ndim > 2 and parameter.shape[1] > 1
    return inner and is_matrix and "adaLN" not in name


def optimizers(config: LoopConfig, groups: list[ParamGroup]) -> list[torch.optim.Optimizer]:
    """For each group AdamW, or Muon (Jordan et al. 2024) for the matrices and kernels of blocks and layers and AdamW for the rest.

    Modulation layers use AdamW, because they are zero at first and the size of Muon's steps does not depend on the gradient.
    """
    found: list[torch.optim.Optimizer] = []
    for group in groups:
        matrices, rest, made = [], [], []
        for name, parameter in group.parameters.items():
            (matrices if config.optimizer == "muon" and _is_inner(name, parameter) else rest).append(parameter)
        if rest:
            made.append(torch.optim.AdamW(rest, group.lr, config.betas, 1e-8, config.weight_decay, fused=True))
        if matrices:
            made.append(muon(matrices, group.muon_lr, config.weight_decay))
        for options in (options for optimizer in made for options in optimizer.param_groups):
            options["base_lr"], options["start_step"] = options["lr"], group.start_step
        found += made
    return found
