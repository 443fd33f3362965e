"""The training loop: optimiser, EMA, metrics, checkpoints.

All random numbers of step k come from (seed, k), so a run that is killed and restarted gives the same results.
"""

import copy
import ctypes
import functools
import math
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
import torch._dynamo
from PIL import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from ..errors import TimError
from ..files import digest, make_folder
from ..models.transformer import Block
from ..processes import Processes, Shard, find_processes
from . import metrics
from .config import LoopConfig
from .optimizers import ParamGroup, optimizers, trained
from .parallel import distribute, full_tensor, local_shard, synchronise
from .resume import resume, save
from .writing import write_image


def learning_rate(config: LoopConfig, step: int, start_step: int = 0) -> float:
    """Factor on lr at a step: linear warm-up from `start_step`, then constant or a cosine that ends at `final_lr`."""
    step -= start_step
    if step < config.warmup:
        return (step + 1) / config.warmup
    if config.schedule == "constant":
        return 1.0
    progress = (step - config.warmup) / max(1, config.steps - start_step - config.warmup)
    return config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


Model = TypeVar("Model", bound=nn.Module)


class Task(Generic[Model]):
    """What a run trains and writes. Subclasses set the attributes and implement `loss`, `sample` and `export`.

    model: trained; its EMA is exported. batches[k]: the shards of batch k that this process computes, in order; each has as `total`
    the number of items in the whole batch. folder: of checkpoints, metrics.csv and sample images.
    settings: the configuration, for the record. not_averaged: submodules of the model that the EMA lacks.
    fixed: a hash of what must be the same when the run is resumed, beside the model's frozen weights. data: a hash of what it trains on,
    if that does not follow from the settings; it may change before the run is finished.
    """

    model: Model
    batches: torch.utils.data.Dataset
    folder: Path
    settings: dict
    not_averaged: tuple[str, ...] = ()
    fixed: str = ""
    data: str = ""

    def param_groups(self, config: LoopConfig) -> list[ParamGroup]:
        """The parameters to train, each in one group."""
        return [ParamGroup("grad_norm", trained(self.model), config.lr, config.muon_lr)]

    def networks(self, model: Model) -> list[nn.Module]:
        """The networks in the model or in its EMA that FSDP2 shards, after their blocks."""
        return []

    def loss(self, average: Model, part: Any, step: int, shard: Shard) -> dict[str, Tensor]:
        """Named means over `part`, a shard of the batch, of which "loss" is minimised. average: the EMA of the model."""
        raise NotImplementedError

    def sample(self, average: Model, step: int) -> Image.Image:
        """The sample image of a checkpoint."""
        raise NotImplementedError

    def export(self, average: dict[str, Tensor], record: dict) -> Path:
        """Writes the model file of a checkpoint, from the weights of the EMA; returns its path."""
        raise NotImplementedError


@dataclass
class Sums:
    """Sums of the losses of the steps since the last row of metrics.csv, in this process."""

    values: dict[str, Tensor | float]
    steps: int

    def add(self, losses: dict[str, Tensor]) -> None:
        for name, value in losses.items():
            self.values[name] = self.values.get(name, 0.0) + value
        self.steps += 1

    def means(self, processes: Processes, step: int) -> dict[str, float]:
        """Means over the steps and all processes. TimError if one is not finite."""
        means = {name: float(processes.mean(torch.as_tensor(value))) / self.steps for name, value in self.values.items()}
        if wrong := [name for name, value in means.items() if not math.isfinite(value)]:
            raise TimError(f"training: {wrong[0]} is {means[wrong[0]]} at step {step}; try a lower loop.lr. The last checkpoint is from "
                           "before")
        return means


class Batches(torch.utils.data.Dataset):
    """The batches of a task. An error is returned, not raised: a DataLoader worker would add its traceback to the message."""

    def __init__(self, batches: torch.utils.data.Dataset):
        self.batches = batches

    def __getitem__(self, step: int) -> Any:
        try:
            return self.batches[step]
        except Exception as error:
            return error


class Step(nn.Module):
    """A step's loss as a forward pass, which DDP and FSDP2 need."""

    def __init__(self, task: Task[Model], average: Model):
        super().__init__()
        self.model, self.task = task.model, task
        object.__setattr__(self, "average", average)  # not a submodule: the EMA has no gradients

    def forward(self, part: Any, step: int, shard: Shard) -> dict[str, Tensor]:
        return self.task.loss(self.average, part, step, shard)


def train(config: LoopConfig, task: Task) -> Path:
    """Trains a task to `config.steps`; returns the file that the last export wrote. TimError if `config.seconds` ended the run early.

    A run that is in the folder of the task is resumed, by any number of processes.
    """
    model, folder, settings = task.model, task.folder, task.settings
    processes = find_processes()
    keep_memory()
    make_folder(folder)
    model.to(processes.device)
    average = make_ema(model, share_fixed=processes.count == 1 or config.parallel == "ddp", without=task.not_averaged)
    units = [unit for one in (model, average) for unit in (*blocks_of(one), *task.networks(one))]
    if config.compile:
        compile_blocks(model)
        compile_blocks(average)
    if config.checkpointing:
        checkpoint_blocks(model)
    step_loss = distribute(Step(task, average), units, processes, config.parallel)
    groups = task.param_groups(config)
    optims = optimizers(config, groups)
    fixed = f"{digest((name, full_tensor(p)) for name, p in model.named_parameters() if not p.requires_grad)} {task.fixed}"
    resumed = resume(folder, config, model, optims, average, fixed, task.data, settings, processes)
    start, sums = resumed.step, Sums(resumed.totals, resumed.counted)

    def record(step: int) -> dict:
        return {"step": step, "configuration": settings, **({"changed": resumed.changed} if resumed.changed else {})}

    if start >= config.steps:  # killed between the last checkpoint and its export
        return _export(task, full_state_dict(average, processes), record(start), processes)
    loader = torch.utils.data.DataLoader(
        Batches(task.batches), batch_size=None, sampler=range(start, config.steps), num_workers=config.workers,
        prefetch_factor=4 if config.workers else None, pin_memory=processes.device.type == "cuda")
    shards = processes.shards(config.accumulate)
    parameters = trained(model)
    averaged = {name: p for name, p in average.named_parameters() if name in parameters}
    started, made, images = time.monotonic(), None, 0
    board = metrics.tensorboard(folder, start) if processes.is_main else None
    model.train()
    with tqdm(total=config.steps, initial=start, desc="train", unit="step", dynamic_ncols=True, disable=not processes.is_main) as bar:
        for step, batch in enumerate(loader, start):
            if isinstance(batch, Exception):
                raise batch
            losses: dict[str, Tensor] = {}
            for shard, part in zip(shards, batch, strict=True):
                torch.manual_seed(config.seed * 1_000_003 + step)  # every shard draws the numbers of the whole batch and takes its own
                synchronise(step_loss, units, shard is shards[-1])
                some = step_loss(part, step, shard)
                (some["loss"] / len(shards)).backward()
                for name, value in some.items():
                    losses[name] = losses.get(name, 0.0) + value.detach().float() / len(shards)
            for group in groups:
                losses[group.norm] = _clip(group.parameters.values(), config.clip)
            update(config, optims, step)
            update_ema(config, averaged, parameters, step)
            sums.add(losses)
            images += batch[0].total
            done = step + 1
            bar.update()
            late = config.seconds and bool(processes.mean(torch.tensor(float(time.monotonic() - started > config.seconds))) > 0)
            logs, saves = (done % every == 0 or done == config.steps for every in (config.log_every, config.save_every))
            if logs or saves or late:
                means = sums.means(processes, done)
            if logs:
                sums = Sums({}, 0)
                elapsed = resumed.seconds + time.monotonic() - started
                rate = images / (time.monotonic() - started)
                row = {"step": done, "seconds": round(elapsed, 1), "samples_per_second": round(rate, 1),
                       "lr_factor": learning_rate(config, step), **means}
                if processes.is_main:
                    metrics.log(folder, row, board)
                values = [f"{name} {row[name]:.4f}" for name in ("loss", "diffusion") if name in row]
                bar.set_postfix_str(f"{', '.join(values)}, {rate:.0f} samples/s")
            if saves or late:
                weights = full_state_dict(average, processes)
                totals = {name: value * sums.steps for name, value in means.items()} if sums.steps else {}
                progress = {"seconds": resumed.seconds + time.monotonic() - started, "counted": sums.steps, "totals": totals,
                            "fixed": fixed, "data": task.data, "settings": settings, "changed": resumed.changed}
                save(folder, config, done, progress, model, optims, weights, processes)
                image = task.sample(average, done)  # in every process: each holds a shard of the weights
                if processes.is_main:
                    write_image(folder / f"sample-{done:08d}.png", image)
                made = _export(task, weights, record(done), processes)
            if late and done < config.steps:
                raise TimError(f"training: stopped at step {done} of {config.steps} after {config.seconds} s; repeat the command to resume")
    return made


def update(config: LoopConfig, optims: list[torch.optim.Optimizer], step: int) -> None:
    """Updates the parameters that have started to train, at the learning rates of a step; clears all gradients."""
    for optimizer in optims:
        for options in optimizer.param_groups:
            options["lr"] = options["base_lr"] * learning_rate(config, step, options["start_step"])
        if step >= optimizer.param_groups[0]["start_step"]:  # with zero gradients, Muon's momentum would still move weights
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def update_ema(config: LoopConfig, averaged: dict[str, nn.Parameter], parameters: dict[str, nn.Parameter], step: int) -> None:
    """Moves the averaged parameters towards the trained ones; early steps have shorter averages."""
    decay = min(config.ema, (1 + step) / (10 + step))
    current = [local_shard(parameters[name].detach()) for name in averaged]
    torch._foreach_lerp_([local_shard(p) for p in averaged.values()], current, 1 - decay)


def keep_memory() -> None:
    """Stops glibc from returning freed memory: mapping large tensors again takes a sixth of a step on a CPU. Other C libraries: nothing."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(mmap_max, 0)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of the transformers in a model: the units of compiling, recomputing and sharding."""
    return [block for module in model.modules() if isinstance(module, nn.ModuleList) for block in module if isinstance(block, Block)]


def compile_blocks(model: nn.Module) -> None:
    """Compiles block by block: all blocks share one compiled function."""
    torch._dynamo.config.recompile_limit = 64
    for block in blocks_of(model):
        block.compile(dynamic=True)


def checkpoint_blocks(model: nn.Module) -> None:
    """Recomputes the activations of a block in the backward pass, to save memory."""
    for block in blocks_of(model):
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def _clip(parameters: Iterable[nn.Parameter], norm: float) -> Tensor:
    found = nn.utils.clip_grad_norm_(parameters, norm)
    return found.full_tensor() if hasattr(found, "full_tensor") else found


def _export(task: Task, weights: dict[str, Tensor], record: dict, processes: Processes) -> Path | None:
    """The file that the main process writes; None in the others."""
    made = task.export(weights, record) if processes.is_main else None
    processes.wait()
    return made


def make_ema(model: nn.Module, share_fixed: bool, without: Collection[str] = ()) -> nn.Module:
    """A copy for the averaged weights, in which the submodules `without` are None.

    With `share_fixed` it shares the model's frozen parameters instead of copying them.
    """
    memo: dict[int, Any] = {id(p): p for p in model.parameters() if not p.requires_grad} if share_fixed else {}
    memo |= {id(getattr(model, name)): None for name in without}
    return copy.deepcopy(model, memo).requires_grad_(False)


def full_state_dict(model: nn.Module, processes: Processes) -> dict[str, Tensor]:
    """All parameters, gathered, in the main process; nothing in the others, which must call it as well."""
    found = {}
    for name, p in model.named_parameters():
        value = full_tensor(p)
        if processes.is_main:
            found[name] = value
    return found
