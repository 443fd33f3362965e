"""The training loop: optimiser, averaged weights, checkpoints that resume exactly, progress.

Everything random in step k comes from (seed, k), so a run that is killed and started again goes on as if nothing had happened.
"""

import csv
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import TimError, misfits, one_line
from ..files import write_whole
from .config import LoopConfig

AVERAGED = "ema"


def learning_rate(config: LoopConfig, step: int) -> float:
    """The factor on lr at a step: linear warm-up, then constant or a cosine down to `final_lr`."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    if config.schedule == "constant":
        return 1.0
    part = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, part)))


def optimizers(config: LoopConfig, model: nn.Module) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon (Jordan et al. 2024) for the matrices of `blocks` and `layers` and AdamW for the rest.

    The modulation stays with AdamW: it starts at zero, and Muon's steps are of one size whatever the gradient.
    """
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        inner = parameter.ndim == 2 and (".blocks." in f".{name}" or ".layers." in f".{name}") and "adaLN" not in name
        (matrices if config.optimizer == "muon" and inner else rest).append(parameter)
    found = [torch.optim.AdamW(rest, config.lr, config.betas, 1e-8, config.weight_decay, fused=True)]
    if matrices:
        found.append(torch.optim.Muon(matrices, lr=config.muon_lr, weight_decay=config.weight_decay, adjust_lr_fn="original"))
    for optimizer in found:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return found


LossOf = Callable[[object, int, dict[str, Tensor]], dict[str, Tensor]]


def train(config: LoopConfig, model: nn.Module, batches: torch.utils.data.Dataset, loss_of: LossOf, folder: Path,
          sample: Callable[[nn.Module, int], None], export: Callable[[dict[str, Tensor], int], Path]) -> Path:
    """Trains `model` to `config.steps` and returns what the last export wrote. TimError where `config.seconds` ended the run before.

    batches[k] is the batch of step k; loss_of(batch, k, averaged weights) gives named scalars, of which "loss" is minimised. At every
    checkpoint sample(model, k) draws pictures and export(averaged weights, k) writes the model. Checkpoints and metrics.csv go to
    `folder`; a run found there is resumed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    optims = optimizers(config, model)
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    parameters = list(model.parameters())
    start, seconds = _resume(folder, model, optims, average)
    if start >= config.steps:  # the last checkpoint is there, its export may not be
        return export(average, start)
    loader = torch.utils.data.DataLoader(
        batches, batch_size=None, sampler=range(start, config.steps), num_workers=config.workers,
        prefetch_factor=4 if config.workers else None, persistent_workers=False)
    began, totals, counted = time.monotonic(), {}, 0
    model.train()
    with tqdm(total=config.steps, initial=start, desc="train", unit="step", dynamic_ncols=True) as bar:
        for step, batch in enumerate(loader, start):
            factor = learning_rate(config, step)
            for optimizer in optims:
                for group in optimizer.param_groups:
                    group["lr"] = group["base_lr"] * factor
            torch.manual_seed(config.seed * 1_000_003 + step)
            losses = loss_of(batch, step, average)
            losses["loss"].backward()
            losses["grad_norm"] = nn.utils.clip_grad_norm_(parameters, config.clip)
            for optimizer in optims:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            decay = min(config.ema, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(average.values()), [p.detach() for p in parameters], 1 - decay)
            for name, value in losses.items():
                totals[name] = totals.get(name, 0.0) + value.detach().float()
            counted += 1
            done = step + 1
            bar.update()
            late = config.seconds and time.monotonic() - began > config.seconds
            logs, saves = (done % every == 0 or done == config.steps for every in (config.log_every, config.save_every))
            if (logs or saves or late) and not bool(losses["loss"].isfinite()):
                raise TimError(f"training: the loss is {losses['loss'].item()} at step {done}, expected a number")
            if logs:
                row = {name: float(value) / counted for name, value in totals.items()}
                totals, counted = {}, 0
                elapsed = seconds + time.monotonic() - began
                rate = (done - start) * config.batch / (time.monotonic() - began)
                _log(folder, {"step": done, "seconds": round(elapsed, 1), "samples_per_second": round(rate, 1), "lr_factor": factor, **row})
                bar.set_postfix_str(f"loss {row['loss']:.4f}, {rate:.0f} samples/s")
            if saves or late:
                _save(folder, config, done, seconds + time.monotonic() - began, model, optims, average)
                sample(model, done)
                made = export(average, done)
                model.train()
            if late and done < config.steps:
                raise TimError(f"training: stopped at step {done} of {config.steps} after {config.seconds} s; run it again to go on")
    return made


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.pt"))


def _save(folder: Path, config: LoopConfig, step: int, seconds: float, model, optims, average) -> None:
    state = {"step": step, "seconds": seconds, "model": model.state_dict(), AVERAGED: average}
    state["optimizers"] = [optimizer.state_dict() for optimizer in optims]
    write_whole(folder / f"step-{step:08d}.pt", lambda path: torch.save(state, path))
    for old in _checkpoints(folder)[:-config.keep]:
        old.unlink()


def begin_from(model: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """The model takes over another run's weights; TimError naming the source unless it has the same architecture."""
    if wrong := misfits(model.state_dict(), tensors):
        raise TimError(f"{source}: found another architecture ({wrong}), expected that of the training configuration")
    model.load_state_dict(tensors)


def _resume(folder: Path, model, optims, average) -> tuple[int, float]:
    found = _checkpoints(folder)
    if not found:
        return 0, 0.0
    try:
        state = torch.load(found[-1], weights_only=True, map_location="cpu")
    except Exception as error:  # whatever a damaged file provokes
        raise TimError(f"{found[-1]}: found a damaged checkpoint ({one_line(error)}), expected a whole one; remove it to go on") from None
    begin_from(model, state["model"], str(found[-1]))
    for optimizer, saved in zip(optims, state["optimizers"], strict=True):
        base = [group["base_lr"] for group in optimizer.param_groups]
        optimizer.load_state_dict(saved)
        for group, lr in zip(optimizer.param_groups, base):
            group["base_lr"] = lr
    for name, value in state[AVERAGED].items():
        average[name].copy_(value)
    _forget_after(folder / "metrics.csv", state["step"])
    tqdm.write(f"resumed {found[-1]}", file=sys.stderr)
    return state["step"], state["seconds"]


def _forget_after(path: Path, step: int) -> None:
    """Drops the rows of metrics.csv that the resumed run will write again."""
    if path.exists():
        with path.open(newline="") as file:
            header, *rows = list(csv.reader(file))
        kept = [row for row in rows if int(row[0]) <= step]

        def write(beside: Path) -> None:
            with beside.open("w", newline="") as file:
                csv.writer(file).writerows([header, *kept])

        write_whole(path, write)


def _log(folder: Path, row: dict) -> None:
    path = folder / "metrics.csv"
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)
