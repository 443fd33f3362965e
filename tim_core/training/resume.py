"""Checkpoints of a run: written whole, and taken up again exactly or not at all."""

import sys
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from tqdm import tqdm

from ..errors import TimError, one_line, state_dict_mismatch
from ..files import atomic_write
from ..processes import Processes
from . import metrics
from .config import LoopConfig

AVERAGED = "ema"
# Of the configuration, when a run goes on: what may be another value without a word, since it changes how the same is computed; what may
# not be, since it is about what the run began from; and what has keys of its own.
FREE = {"attention", "keep_start", *(f"loop.{name}" for name in ("seconds", "log_every", "save_every", "keep", "workers", "parallel",
                                                                 "accumulate", "compile", "checkpointing"))}
BEGUN_WITH = {"start", "alike", "freeze_text", "model", "loop.optimizer"}
MAPS = {"sizes", "forms", "alike", "objective_from"}


@dataclass
class Begun:
    """How far a run is: steps and seconds, the sums of what is not in metrics.csv yet, of `counted` steps.

    changed: step -> key of the configuration -> what it was before that step, and since.
    """

    step: int = 0
    seconds: float = 0.0
    totals: dict[str, float] = field(default_factory=dict)
    counted: int = 0
    changed: dict[str, dict[str, list]] = field(default_factory=dict)


def differences(before: dict, now: dict, where: str = "") -> dict[str, list]:
    """Dotted key -> [value before, value now], of what two configurations both have and is not the same.

    What only one has is a key of another version of the code.
    """
    found: dict[str, list] = {}
    for name in before.keys() & now.keys():
        a, b = before[name], now[name]
        if isinstance(a, dict) and isinstance(b, dict) and name not in MAPS:
            found |= differences(a, b, f"{where}{name}.")
        elif a != b:
            found[where + name] = [a, b]
    return found


def begin_from(model: nn.Module, tensors: dict[str, Tensor], source: str, optional: Collection[str] = ()) -> None:
    """The model takes over another run's weights; TimError naming the source unless it has the same architecture.

    `optional` ones may be missing, and stay as they are.
    """
    if wrong := state_dict_mismatch(model.state_dict(), tensors, optional):
        raise TimError(f"{source}: found another architecture ({wrong}), expected that of the training configuration")
    set_model_state_dict(model, tensors, options=StateDictOptions(full_state_dict=True, strict=False))


def frozen(model: nn.Module) -> set[str]:
    """The names of the parameters that do not learn."""
    return {name for name, p in model.named_parameters() if not p.requires_grad}


def checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.pt"))


def save(folder: Path, config: LoopConfig, step: int, progress: dict, model, optims, weights: dict[str, Tensor],
         processes: Processes) -> None:
    """The whole state of a run, the same file whatever the number of processes; the first of them writes it.

    What does not learn is not in it: it comes from where the run began.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    names = frozen(model)
    state = {"step": step, **progress, "model": get_model_state_dict(model, options=options),
             AVERAGED: {name: value for name, value in weights.items() if name not in names},
             "optimizers": get_optimizer_state_dict(model, optims, options=options)}
    if processes.is_main:
        atomic_write(folder / f"step-{step:08d}.pt", lambda path: torch.save(state, path))
        for old in checkpoints(folder)[:-config.keep]:
            old.unlink()
    processes.wait()


def resume(folder: Path, config: LoopConfig, model, optims, average, fixed: str, settings: dict, processes: Processes) -> Begun:
    """Takes up the newest checkpoint, if any. TimError where it is none of this run."""
    found = checkpoints(folder)
    if not found:
        if processes.is_main:
            metrics.forget_after(folder, 0)  # of a run that was killed before its first checkpoint
        return Begun()
    try:
        state = torch.load(found[-1], weights_only=True, map_location="cpu")
    except Exception as error:  # whatever a damaged file provokes
        raise TimError(f"{found[-1]}: found a damaged checkpoint ({one_line(error)}), expected a whole one; remove it to go on") from None
    ended = state["step"] >= config.steps
    other = {key: both for key, both in sorted(differences(state.get("settings", settings), settings).items()) if key not in FREE}
    if ended:
        other.pop("loop.steps", None)
    if wrong := [key for key in other if ended or key in BEGUN_WITH]:
        before, now = other[wrong[0]]
        raise TimError(f"{found[-1]}: {wrong[0]}: found {before!r} in the run that is here, expected {now!r} as in the configuration; take "
                       "another output")
    if state.get("fixed", fixed) != fixed:
        raise TimError(f"{found[-1]}: found other weights that do not learn than this run began with, expected the same; put the files "
                       "back that it began from, or take another output")
    begin_from(model, state["model"], str(found[-1]), frozen(model))
    options = [[{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
               for optimizer in optims]
    try:
        set_optimizer_state_dict(model, optims, state["optimizers"], options=StateDictOptions(full_state_dict=True))
    except (KeyError, RuntimeError) as error:  # a state or a part of it is missing
        raise TimError(f"{found[-1]}: found the state of other optimisers ({one_line(error)}), expected those of this version; take "
                       "another output") from None
    for optimizer, groups in zip(optims, options):
        for group, own in zip(optimizer.param_groups, groups):
            group.update(own)  # the configuration's, not those of the checkpoint
    set_model_state_dict(average, state[AVERAGED], options=StateDictOptions(full_state_dict=True, strict=False))
    if processes.is_main:
        metrics.forget_after(folder, state["step"])
        tqdm.write(f"{'finished already:' if ended else 'resumed'} {found[-1]}", file=sys.stderr)
        for key, (a, b) in other.items():
            tqdm.write(f"from here on {key} is {b!r}, no longer {a!r}", file=sys.stderr)
    changed = state.get("changed", {}) | ({str(state["step"]): other} if other else {})
    return Begun(state["step"], state["seconds"], state.get("totals", {}), state.get("counted", 0), changed)
