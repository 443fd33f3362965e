"""The processes of a distributed command, and which part of the work each of them does."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import TimError, one_line


@dataclass(frozen=True)
class Shard:
    """One of `count` interleaved parts of a batch: items index, index + count, index + 2 count, ..."""

    index: int = 0
    count: int = 1

    def take(self, items: Sequence | Tensor):
        """The items of this shard, in their order."""
        return items[self.index :: self.count]

    def loss_weight(self, total: int) -> float:
        """Weight of this shard's mean in the mean over shards, such that all `total` items count equally. TimError for an empty shard."""
        if total < self.count:
            raise TimError(f"loop.batch: {total} items cannot be split over {self.count} parts (processes x loop.accumulate); increase it")
        return len(range(self.index, total, self.count)) * self.count / total


@dataclass(frozen=True)
class Processes:
    """The processes of a run; this one is number `index` of `count` and computes on `device`."""

    index: int
    count: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and messages."""
        return self.index == 0

    def shard(self, items: Sequence) -> Sequence:
        """The items of independent work that this process does."""
        return items[self.index :: self.count]

    def shards(self, accumulate: int = 1) -> list[Shard]:
        """The shards of a batch that this process computes, one after another."""
        return [Shard(self.index + self.count * k, self.count * accumulate) for k in range(accumulate)]

    def total(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        if self.count > 1:
            value = value.to(self.device, copy=True)
            torch.distributed.all_reduce(value)
        return value

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over all processes."""
        return self.total(value) / self.count

    def wait(self) -> None:
        """Blocks until every process has called it."""
        if self.count > 1:
            torch.distributed.barrier()


ALONE = Processes(0, 1, torch.device("cpu"))


def find_processes() -> Processes:
    """The processes that torchrun started with this one; else this one alone. TimError if they cannot connect."""
    has_gpu = torch.cuda.is_available()
    count, local = (_from_environment(name, default) for name, default in (("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if count == 1:
        return Processes(0, 1, torch.device("cuda" if has_gpu else "cpu"))
    if has_gpu and local >= torch.cuda.device_count():
        raise TimError(f"process {local} has no GPU: this machine has {torch.cuda.device_count()}; start as many processes as it has GPUs")
    device = torch.device("cuda", local) if has_gpu else torch.device("cpu")
    if not torch.distributed.is_initialized():
        if has_gpu:
            torch.cuda.set_device(device)
        try:
            torch.distributed.init_process_group("nccl" if has_gpu else "gloo", device_id=device if has_gpu else None)
        except (ValueError, RuntimeError) as error:  # for missing variables, and for processes that do not answer
            raise TimError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but the processes cannot connect ({one_line(error)}); "
                           "start them with torchrun") from error
    return Processes(torch.distributed.get_rank(), torch.distributed.get_world_size(), device)


def _from_environment(name: str, default: int) -> int:
    """A whole number in an environment variable. TimError if it is none."""
    text = os.environ.get(name, str(default))
    if not text.isascii() or not text.isdecimal():
        raise TimError(f"{name} is {text!r}; unset it, or start the processes with torchrun")
    return int(text)
