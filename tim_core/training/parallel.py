"""The processes of a run, started by `accelerate launch`: which part of a batch is whose, and how weights and gradients are shared."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import TimError


@dataclass(frozen=True)
class Part:
    """One of `count` parts of a batch: every count-th item, from `index` on. The first items of the batch are the first of its parts."""

    index: int = 0
    count: int = 1

    def of(self, items: Sequence | Tensor):
        return items[self.index :: self.count]

    def share(self, total: int) -> float:
        """What the mean over this part counts in a mean of the parts' means, so that every item of `total` counts alike."""
        if total < self.count:
            raise TimError(f"training: found a batch of {total} for {self.count} processes or accumulated parts, expected at least as many")
        return len(range(self.index, total, self.count)) * self.count / total


@dataclass(frozen=True)
class Processes:
    """The processes that share a run."""

    index: int
    count: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.index == 0

    def parts(self, accumulate: int = 1) -> list[Part]:
        """The parts of every batch that are this process's."""
        return [Part(self.index + self.count * k, self.count * accumulate) for k in range(accumulate)]

    def mean(self, value: Tensor) -> Tensor:
        """Over all processes."""
        if self.count == 1:
            return value
        total = value.clone()
        torch.distributed.all_reduce(total)
        return total / self.count

    def wait(self) -> None:
        if self.count > 1:
            torch.distributed.barrier()


def find_processes() -> Processes:
    """Those that `accelerate launch` (or torchrun) started with this one; else this one alone, on the GPU if there is one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        from accelerate import PartialState
    except ImportError:
        raise TimError("training: several processes need accelerate: found none, expected it from: pip install accelerate") from None
    state = PartialState(cpu=not torch.cuda.is_available())
    return Processes(state.process_index, state.num_processes, state.device)


def share(step: nn.Module, parts: Iterable[nn.Module], processes: Processes, how: str) -> nn.Module:
    """`step`, whose forward is a loss, such that its backward pass leaves the mean gradient of all processes -> what to call.

    how: "ddp", every process holds everything; "fsdp2", every process holds a slice of the weights, and of what the optimiser keeps of
    them. `parts`: the modules to slice, inner ones before those that hold them (fsdp2); `step` itself is not sliced.
    """
    if processes.count == 1:
        return step
    if how == "ddp":
        devices = [processes.device] if processes.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(step, device_ids=devices, broadcast_buffers=False)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(processes.device.type, (processes.count,))
    for part in parts:
        fully_shard(part, mesh=mesh)
    return step


def synchronise(step: nn.Module, parts: Iterable[nn.Module], last: bool) -> None:
    """Whether the next backward pass shares its gradients: only that of the last accumulated part has to."""
    if isinstance(step, nn.parallel.DistributedDataParallel):
        step.require_backward_grad_sync = last
    for part in parts:
        if hasattr(part, "set_requires_gradient_sync"):
            part.set_requires_gradient_sync(last, recurse=False)


def local(tensor: Tensor) -> Tensor:
    """The slice of a shared tensor that this process holds."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Tensor) -> Tensor:
    """All slices of a shared tensor, on the CPU. Every process has to call it."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().cpu()
