"""Checkpoints of a run: written atomically, and resumed exactly or refused."""

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
from ..processes import Processes
from . import metrics
from .config import LoopConfig
from .writing import write_state

AVERAGED = "ema"
# Keys of the configuration that a resumed run may change silently, because they do not change what is computed,
LOOP_MAY_CHANGE = ("seconds", "log_every", "save_every", "keep", "workers", "parallel", "accumulate", "compile", "checkpointing")
MAY_CHANGE = {"attention", "interpolate_start", *(f"loop.{name}" for name in LOOP_MAY_CHANGE)}
# keys that it must not change, because they determine its first weights or its optimiser state,
MUST_MATCH = {"start", "add_embedding", "freeze_text", "model", "loop.optimizer"}
# and keys whose value is a mapping with keys of its own.
MAPS = {"sizes", "forms", "add_embedding", "objective_from"}


@dataclass
class ResumeState:
    """The progress of a run. totals: sums of the losses of the last `counted` steps, which are not in metrics.csv yet.

    changed: step -> key of the configuration -> [value before that step, value since].
    """

    step: int = 0
    seconds: float = 0.0
    totals: dict[str, float] = field(default_factory=dict)
    counted: int = 0
    changed: dict[str, dict[str, list]] = field(default_factory=dict)


def differences(before: dict, now: dict, where: str = "") -> dict[str, list]:
    """Dotted key -> [value before, value now], for keys of both configurations. Keys of only one belong to another version of the code."""
    found: dict[str, list] = {}
    for name in before.keys() & now.keys():
        a, b = before[name], now[name]
        if isinstance(a, dict) and isinstance(b, dict) and name not in MAPS:
            found |= differences(a, b, f"{where}{name}.")
        elif a != b:
            found[where + name] = [a, b]
    return found


def init_from(model: nn.Module, tensors: dict[str, Tensor], source: str, optional: Collection[str] = ()) -> None:
    """Loads weights into a model. TimError naming the source if it has another architecture; `optional` tensors may be missing."""
    if wrong := state_dict_mismatch(model.state_dict(), tensors, optional):
        raise TimError(f"{source}: another architecture than in the training configuration ({wrong}); use a file that fits it")
    set_model_state_dict(model, tensors, options=StateDictOptions(full_state_dict=True, strict=False))


def frozen(model: nn.Module) -> set[str]:
    """The names of the parameters that are not trained."""
    return {name for name, p in model.named_parameters() if not p.requires_grad}


def checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.pt"))


def save(folder: Path, config: LoopConfig, step: int, progress: dict, model, optims, weights: dict[str, Tensor],
         processes: Processes) -> None:
    """Writes the state of a run to step-N.pt, the same for any number of processes, without frozen weights. Keeps `config.keep` files."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    names = frozen(model)
    state = {"step": step, **progress, "model": get_model_state_dict(model, options=options),
             AVERAGED: {name: value for name, value in weights.items() if name not in names},
             "optimizers": get_optimizer_state_dict(model, optims, options=options)}
    if processes.is_main:
        write_state(folder / f"step-{step:08d}.pt", state)
        for old in checkpoints(folder)[:-config.keep]:
            old.unlink()
    processes.wait()


def resume(folder: Path, config: LoopConfig, model, optims, average, fixed: str, settings: dict, processes: Processes) -> ResumeState:
    """Loads the newest checkpoint, if there is one. TimError if it belongs to a run with another configuration or other frozen weights."""
    found = checkpoints(folder)
    if not found:
        if processes.is_main:
            metrics.forget_after(folder, 0)  # rows of a run that was killed before its first checkpoint
        return ResumeState()
    try:
        state = torch.load(found[-1], weights_only=True, map_location="cpu")
    except Exception as error:  # whatever a damaged file provokes
        raise TimError(f"{found[-1]}: damaged checkpoint ({one_line(error)}); delete it to resume from the one before") from None
    ended = state["step"] >= config.steps
    other = {key: both for key, both in sorted(differences(state.get("settings", settings), settings).items()) if key not in MAY_CHANGE}
    if ended:
        other.pop("loop.steps", None)
    if wrong := [key for key in other if ended or key in MUST_MATCH]:
        before, now = other[wrong[0]]
        raise TimError(f"{found[-1]}: its run has {wrong[0]} {before!r}, the configuration has {now!r}; restore it or choose another "
                       "output")
    if state.get("fixed", fixed) != fixed:
        raise TimError(f"{found[-1]}: the frozen weights differ from those of its run; restore the files that it was initialised from (and "
                       "the loop.autocast of a LoRA), or choose another output")
    init_from(model, state["model"], str(found[-1]), frozen(model))
    configured = [[{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
               for optimizer in optims]
    try:
        set_optimizer_state_dict(model, optims, state["optimizers"], options=StateDictOptions(full_state_dict=True))
    except (KeyError, RuntimeError) as error:  # for missing entries
        raise TimError(f"{found[-1]}: its optimiser state does not fit the configuration ({one_line(error)}); choose another "
                       "output") from None
    for optimizer, groups in zip(optims, configured):
        for group, options in zip(optimizer.param_groups, groups):
            group.update(options)  # of the configuration, not of the checkpoint
    set_model_state_dict(average, state[AVERAGED], options=StateDictOptions(full_state_dict=True, strict=False))
    if processes.is_main:
        metrics.forget_after(folder, state["step"])
        tqdm.write(f"{'already finished:' if ended else 'resumed'} {found[-1]}", file=sys.stderr)
        for key, (a, b) in other.items():
            tqdm.write(f"changed {key}: {a!r} -> {b!r}", file=sys.stderr)
    changed = state.get("changed", {}) | ({str(state["step"]): other} if other else {})
    return ResumeState(state["step"], state["seconds"], state.get("totals", {}), state.get("counted", 0), changed)
