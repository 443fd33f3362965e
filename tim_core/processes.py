"""The processes of a command that `accelerate launch` started several times, and which part of the work is whose."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import TimError


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
    """The processes that share a run: this one is number `index` of `count`."""

    index: int
    count: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.index == 0

    def own(self, items: Sequence) -> Sequence:
        """This process's share of independent items."""
        return items[self.index :: self.count]

    def parts(self, accumulate: int = 1) -> list[Part]:
        """The parts of every batch that are this process's."""
        return [Part(self.index + self.count * k, self.count * accumulate) for k in range(accumulate)]

    def total(self, value: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.count > 1:
            value = value.to(self.device, copy=True)
            torch.distributed.all_reduce(value)
        return value

    def mean(self, value: Tensor) -> Tensor:
        return self.total(value) / self.count

    def wait(self) -> None:
        if self.count > 1:
            torch.distributed.barrier()


ALONE = Processes(0, 1, torch.device("cpu"))


def find_processes() -> Processes:
    """Those that `accelerate launch` (or torchrun) started with this one; else this one alone, on the GPU if there is one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        from accelerate import PartialState
    except ImportError:
        raise TimError("several processes need accelerate: found none, expected it from: pip install accelerate") from None
    state = PartialState(cpu=not torch.cuda.is_available())
    return Processes(state.process_index, state.num_processes, state.device)
