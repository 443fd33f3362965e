"""The training loop: optimiser, averaged weights, progress; `resuming` has its checkpoints.

Everything random in step k comes from (seed, k), so a run that is killed and started again goes on as if nothing had happened.
"""

import copy
import ctypes
import functools
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch._dynamo
from PIL import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from ..errors import TimError
from ..files import digest
from ..models.text_encoder import TextEncoder
from ..models.transformer import Block, TransitionTransformer
from ..processes import Processes, Shard, find_processes
from . import metrics
from .config import LoopConfig
from .objectives.matching import MatchingConfig
from .parallel import local, share, synchronise, whole
from .resume import resume, save


def learning_rate(config: LoopConfig, step: int, begins: int = 0) -> float:
    """The factor on lr at a step, from that on at which learning begins: linear warm-up, then constant or a cosine down to `final_lr`."""
    step -= begins
    if step < config.warmup:
        return (step + 1) / config.warmup
    if config.schedule == "constant":
        return 1.0
    progress = (step - config.warmup) / max(1, config.steps - begins - config.warmup)
    return config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def optimizers(config: LoopConfig, model: nn.Module, matching: MatchingConfig | None = None) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon (Jordan et al. 2024) for the matrices of `blocks` and `layers` and AdamW for the rest.

    The modulation stays with AdamW: it starts at zero, and Muon's steps are of one size whatever the gradient. A `critic` has its own,
    at the rates of `matching`, and the others begin to learn after the steps in which it learns alone.
    """
    matrices, rest, critic, critic_matrices = [], [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        inner = parameter.ndim == 2 and (".blocks." in f".{name}" or ".layers." in f".{name}") and "adaLN" not in name
        with_muon = config.optimizer == "muon" and inner
        if name.startswith("critic."):
            (critic_matrices if with_muon else critic).append(parameter)
        else:
            (matrices if with_muon else rest).append(parameter)
    found: list[torch.optim.Optimizer] = []
    kinds = [(rest, matrices, config.lr, config.muon_lr, matching.critic_first if matching else 0)]
    if matching:
        kinds.append((critic, critic_matrices, matching.critic_lr, matching.critic_muon_lr, 0))
    for others, inner, lr, muon_lr, begins in kinds:
        made = []
        if others:
            made.append(torch.optim.AdamW(others, lr, config.betas, 1e-8, config.weight_decay, fused=True))
        if inner:
            made.append(torch.optim.Muon(inner, lr=muon_lr, weight_decay=config.weight_decay, adjust_lr_fn="original"))
        for group in (group for optimizer in made for group in optimizer.param_groups):
            group["base_lr"], group["begins"] = group["lr"], begins  # the step at which it begins to learn
        found += made
    return found


class Step(nn.Module):
    """A step's loss as a forward pass, which is where DDP and FSDP2 do their work."""

    def __init__(self, model: nn.Module, average: nn.Module, loss_of: "LossOf"):
        super().__init__()
        self.model, self.loss_of = model, loss_of
        object.__setattr__(self, "average", average)  # not a submodule: it has no gradients

    def forward(self, batch, step: int, shard: Shard) -> dict[str, Tensor]:
        return self.loss_of(self.model, self.average, batch, step, shard)


LossOf = Callable[[nn.Module, nn.Module, object, int, Shard], dict[str, Tensor]]
Export = Callable[[dict[str, Tensor], dict], Path]


def train(config: LoopConfig, model: nn.Module, batches: torch.utils.data.Dataset, loss_of: LossOf, folder: Path,
          sample: Callable[[nn.Module, int], Image.Image], export: "Export", settings: dict,
          matching: MatchingConfig | None = None, teacher: nn.Module | None = None) -> Path:
    """Trains `model` to `config.steps` and returns what the last export wrote. TimError where `config.seconds` ended the run before.

    batches[k] is the batch of step k; loss_of(model, averaged model, batch, k, shard) gives named scalars, means over that part of the
    batch, of which "loss" is minimised. At every checkpoint sample(averaged model, k) draws pictures and export(averaged weights, record)
    writes the model. `settings`, the configuration, goes into that record. Checkpoints and metrics.csv go to `folder`; a run found there
    is resumed, by as many processes as there are now, if its `teacher` was the same.
    """
    processes = find_processes()
    keep_memory()
    folder.mkdir(parents=True, exist_ok=True)
    model.to(processes.device)
    average = follower(model, share_fixed=processes.count == 1 or config.parallel == "ddp")
    pieces = [*slices(model), *slices(average)]
    if config.compile:
        compile_blocks(model)
        compile_blocks(average)
    if config.checkpointing:
        checkpoint_blocks(model)
    step_loss = share(Step(model, average, loss_of), pieces, processes, config.parallel)
    optims = optimizers(config, model, matching)
    held = [*model.named_parameters(), *(teacher.named_parameters(prefix="teacher") if teacher is not None else ())]
    fixed = digest((name, whole(p)) for name, p in held if not p.requires_grad)
    begun = resume(folder, config, model, optims, average, fixed, settings, processes)
    start, totals, counted = begun.step, begun.totals, begun.counted

    def record(step: int) -> dict:
        return {"step": step, "configuration": settings, **({"changed": begun.changed} if begun.changed else {})}

    if start >= config.steps:  # the last checkpoint is there, its export may not be
        return _export(export, gathered(average, processes), record(start), processes)
    loader = torch.utils.data.DataLoader(
        batches, batch_size=None, sampler=range(start, config.steps), num_workers=config.workers,
        prefetch_factor=4 if config.workers else None, persistent_workers=False)
    shards = processes.shards(config.accumulate)
    critic = [p for name, p in model.named_parameters() if p.requires_grad and name.startswith("critic.")]
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad and not name.startswith("critic.")}
    followers = [p for name, p in average.named_parameters() if name in parameters]
    began, made, pictures = time.monotonic(), None, 0
    board = metrics.tensorboard(folder, start) if processes.is_main else None
    model.train()
    with tqdm(total=config.steps, initial=start, desc="train", unit="step", dynamic_ncols=True, disable=not processes.is_main) as bar:
        for step, batch in enumerate(loader, start):
            factor = learning_rate(config, step)
            for optimizer in optims:
                for group in optimizer.param_groups:
                    group["lr"] = group["base_lr"] * learning_rate(config, step, group["begins"])
            losses: dict[str, Tensor] = {}
            for shard in shards:
                torch.manual_seed(config.seed * 1_000_003 + step)  # of the whole batch: every part draws it, and takes its own
                synchronise(step_loss, pieces, shard is shards[-1])
                some = step_loss(batch, step, shard)
                (some["loss"] / len(shards)).backward()
                for name, value in some.items():
                    losses[name] = losses.get(name, 0.0) + value.detach().float() / len(shards)
            losses["grad_norm"] = _clip(parameters.values(), config.clip)
            if critic:
                losses["critic_norm"] = _clip(critic, config.clip)
            for optimizer in optims:
                if step >= optimizer.param_groups[0]["begins"]:  # else not even momentum: Muon's steps are of one size
                    optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            decay = min(config.ema, (1 + step) / (10 + step))
            torch._foreach_lerp_([local(p) for p in followers], [local(p.detach()) for p in parameters.values()], 1 - decay)
            for name, value in losses.items():
                totals[name] = totals.get(name, 0.0) + value
            counted += 1
            pictures += len(batch[0])
            done = step + 1
            bar.update()
            late = config.seconds and bool(processes.mean(torch.tensor(float(time.monotonic() - began > config.seconds))) > 0)
            logs, saves = (done % every == 0 or done == config.steps for every in (config.log_every, config.save_every))
            if logs or saves or late:
                means = {name: float(processes.mean(value)) / counted for name, value in totals.items()}
                if wrong := [name for name, value in means.items() if not math.isfinite(value)]:
                    raise TimError(f"training: {wrong[0]} is {means[wrong[0]]} at step {done}, expected a number; no checkpoint holds what "
                                   "led to it, and a lower loop.lr may help")
            if logs:
                row, totals, counted = means, {}, 0
                elapsed = begun.seconds + time.monotonic() - began
                rate = pictures / (time.monotonic() - began)
                row = {"step": done, "seconds": round(elapsed, 1), "samples_per_second": round(rate, 1), "lr_factor": factor, **row}
                if processes.is_main:
                    metrics.log(folder, row, board)
                values = [f"{name} {row[name]:.4f}" for name in ("loss", "diffusion") if name in row]
                bar.set_postfix_str(f"{', '.join(values)}, {rate:.0f} samples/s")
            if saves or late:
                weights = gathered(average, processes)
                progress = {"seconds": begun.seconds + time.monotonic() - began, "counted": counted, "fixed": fixed, "settings": settings,
                            "changed": begun.changed, "totals": {name: value * counted for name, value in means.items()} if counted else {}}
                save(folder, config, done, progress, model, optims, weights, processes)
                shown = sample(average, done)  # every process draws: slices of the weights are everywhere
                if processes.is_main:
                    shown.save(folder / f"sample-{done:08d}.png")
                made = _export(export, weights, record(done), processes)
            if late and done < config.steps:
                raise TimError(f"training: stopped at step {done} of {config.steps} after {config.seconds} s; run it again to go on")
    return made


def keep_memory() -> None:
    """Has glibc hold on to freed memory: else every large tensor is mapped, zeroed and unmapped again, a sixth of a step on a CPU."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    trim_threshold, mmap_max = -1, -4  # of malloc.h
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(mmap_max, 0)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a transformer: what is compiled, recomputed and sliced one at a time."""
    return [block for module in model.modules() if isinstance(module, nn.ModuleList) for block in module if isinstance(block, Block)]


def slices(model: nn.Module) -> list[nn.Module]:
    """What FSDP2 slices, inner modules first: every block, and the networks."""
    networks = [module for module in model.modules() if isinstance(module, TransitionTransformer)]
    texts = [module.transformer for module in model.modules() if isinstance(module, TextEncoder)]
    return [*blocks_of(model), *networks, *texts]


def compile_blocks(model: nn.Module) -> None:
    """One block at a time: they share their code, so it is compiled once for all of them."""
    torch._dynamo.config.recompile_limit = 64
    for block in blocks_of(model):
        block.compile(dynamic=True)


def checkpoint_blocks(model: nn.Module) -> None:
    """Activations inside a block are computed again in the backward pass instead of being kept."""
    for block in blocks_of(model):
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def _clip(parameters: Iterable[nn.Parameter], norm: float) -> Tensor:
    found = nn.utils.clip_grad_norm_(parameters, norm)
    return found.full_tensor() if hasattr(found, "full_tensor") else found


def _export(export: Export, weights: dict[str, Tensor], record: dict, processes: Processes) -> Path | None:
    """The file that the first process writes; None in the others."""
    made = export(weights, record) if processes.is_main else None
    processes.wait()
    return made


def follower(model: nn.Module, share_fixed: bool) -> nn.Module:
    """A copy for the averaged weights; what does not learn is the model's own, not a second one, where `share_fixed`."""
    memo = {id(p): p for p in model.parameters() if not p.requires_grad} if share_fixed else {}
    average = copy.deepcopy(model, memo).requires_grad_(False)
    if hasattr(average, "critic"):
        average.critic = None  # nobody asks for its average
    return average


def gathered(model: nn.Module, processes: Processes) -> dict[str, Tensor]:
    """All of its parameters, whole, on the first process; none on the others, which have to call it, too."""
    found = {}
    for name, p in model.named_parameters():
        value = whole(p)
        if processes.is_main:
            found[name] = value
    return found
