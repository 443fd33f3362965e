"""Checkpoints of a run: written atomically, and resumed exactly or refused."""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from ..errors import TimError, one_line, state_dict_mismatch
from ..files import check_file
from ..processes import Processes
from ..settings import Count, WholeNumber, shown
from ..weights.torch_file import check_torch_file
from . import metrics
from .config import LoopConfig
from .writing import say, write_state

AVERAGED = "ema"
# Keys of the configuration that a resumed run may change silently, because they do not change what is computed,
LOOP_MAY_CHANGE = ("seconds", "log_every", "save_every", "keep", "workers", "parallel", "accumulate", "compile", "checkpointing")
PATHS = ("autoencoder", "text_encoder", "data.path", "data.cache")  # what they hold is compared, not where it is
MAY_CHANGE = {"attention", "interpolate_start", *PATHS, *(f"loop.{name}" for name in LOOP_MAY_CHANGE)}
# keys that it must not change, because they determine its first weights, what weights compute or its optimiser state,
MUST_MATCH = {"start", "add_embedding", "freeze_text", "model", "loop.optimizer",
              "transformer.num_heads", "transformer.new_condition", "transformer.positions"}
# and keys whose value is a mapping with keys of its own.
MAPS = {"sizes", "forms", "add_embedding", "objective_from"}


@dataclass(config=ConfigDict(strict=True, allow_inf_nan=False), kw_only=True)
class ResumeState:
    """The progress of a run. totals: sums of the losses of the last `counted` steps, which are not in metrics.csv yet.

    changed: step -> key of the configuration -> [value before that step, value since].
    """

    step: WholeNumber = 0
    seconds: Annotated[float, Field(ge=0)] = 0.0
    totals: dict[str, float] = Field(default_factory=dict)
    counted: WholeNumber = 0
    changed: dict[str, dict[str, list]] = Field(default_factory=dict)


@dataclass(config=ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True), kw_only=True)
class SavedState(ResumeState):
    """What step-N.pt holds. fixed and data: as in `Task`; they and settings are None in files of an earlier version."""

    step: Count
    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizers: dict[str, Any]
    settings: dict[str, Any] | None = None
    fixed: str | None = None
    data: str | None = None


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
    """The checkpoints in a folder, in the order of their steps."""
    return sorted((file for file in folder.glob("step-*.pt") if re.fullmatch(r"step-[0-9]{8,12}\.pt", file.name)), key=step_of)


def step_of(file: Path) -> int:
    """The step in the name of a checkpoint."""
    return int(file.stem.removeprefix("step-"))


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
        for old in [file for file in checkpoints(folder) if step_of(file) <= step][:-config.keep]:  # later ones are damaged
            old.unlink()
    processes.wait()


class DamagedCheckpoint(TimError):
    """A checkpoint whose bytes are not those that were written."""


def load(file: Path) -> SavedState:
    """Reads a checkpoint. DamagedCheckpoint for damaged bytes, TimError for a file of another program or an edited one."""
    try:
        check_file(file)
        check_torch_file(file)
        values = torch.load(file, weights_only=True, map_location="cpu")
    except MemoryError:
        raise
    except Exception as error:  # whatever a damaged file provokes
        reason = one_line(error, limit=None).removeprefix(f"{file}: ")[:160]
        raise DamagedCheckpoint(f"{file}: damaged checkpoint ({reason})") from None
    advice = "remove it to resume from the one before, or choose another output"
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise TimError(f"{file}: is no checkpoint of a run; {advice}")
    try:
        state = SavedState(**values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise TimError(f"{file}: is no checkpoint of a run ({where}: {first['msg']}); {advice}") from None
    if wrong := _not_finite({"model": state.model, AVERAGED: state.ema, "optimizers": state.optimizers}):
        raise TimError(f"{file}: {wrong} has values that are not finite; {advice}")
    if state.step != step_of(file):
        raise TimError(f"{file}: holds step {state.step}; {advice}")
    return state


def _with_later_keys(settings: dict) -> dict:
    """The settings of a checkpoint, with what newer keys stand for in older ones.

    Networks were trained with the official positions before `transformer.positions` was a key, and the native size was the most frequent
    one before `data.native` was.
    """
    later = {"transformer": {"positions": "official"}, "data": {"native": None}}
    return settings | {key: values | settings.get(key, {}) for key, values in later.items() if isinstance(settings.get(key, {}), dict)}


def _not_finite(state: dict, where: str = "") -> str | None:
    """The place of a tensor in nested mappings that has NaN or infinite values."""
    for name, value in state.items():
        place = f"{where}{name}"
        if isinstance(value, Tensor) and not bool(value.isfinite().all()):
            return place
        if isinstance(value, dict) and (found := _not_finite(value, f"{place}.")):
            return found
    return None


def newest(folder: Path, processes: Processes) -> tuple[Path, SavedState] | None:
    """The newest checkpoint that is not damaged; None in a folder without checkpoints. TimError if all are damaged."""
    damaged: list[str] = []
    for file in reversed(checkpoints(folder)):
        try:
            state = load(file)
        except DamagedCheckpoint as error:
            damaged.append(str(error))
            continue
        if processes.is_main:
            for line in damaged:
                say(f"{line}; resuming from {file.name}")
        return file, state
    if damaged:
        raise TimError(f"{damaged[0]}, and none before it is whole; restore one, or choose another output")
    return None


def resume(folder: Path, config: LoopConfig, model, optims, average, fixed: str, data: str, settings: dict,
           processes: Processes) -> ResumeState:
    """Loads the newest checkpoint, if there is one. fixed, data: as in `Task`.

    TimError if it belongs to a run with another configuration or other frozen weights, or to a finished run on other data.
    """
    if (found := newest(folder, processes)) is None:
        if processes.is_main:
            metrics.forget_after(folder, 0)  # rows of a run that was killed before its first checkpoint
        return ResumeState()
    file, state = found
    ended = state.step >= config.steps
    run = "this run is finished, with" if ended else "its run has"
    before = _with_later_keys({} if state.settings is None else state.settings)
    other = {key: both for key, both in sorted(differences(before, settings).items()) if key not in MAY_CHANGE}
    if ended:
        other.pop("loop.steps", None)
    if wrong := [key for key in other if ended or key in MUST_MATCH]:
        old, new = map(shown, other[wrong[0]])
        raise TimError(f"{file}: {run} {wrong[0]} {old}, the configuration has {new}; choose another output, or restore it")
    if state.fixed not in (None, fixed):
        raise TimError(f"{file}: the frozen weights differ from those of its run; restore the files that it was initialised from (and "
                       "the loop.autocast of a LoRA), or choose another output")
    if state.data not in (None, data):
        if ended:
            raise TimError(f"{file}: this run is finished, on other images or captions; choose another output to train on these")
        other["images and captions"] = [state.data[:12], data[:12]]
    init_from(model, state.model, str(file), frozen(model))
    _load_optimizers(file, model, optims, state.optimizers)
    averaged = {name for name, _ in average.named_parameters()} - frozen(model)
    init_from(average, state.ema, str(file), average.state_dict().keys() - averaged)
    if processes.is_main:
        metrics.forget_after(folder, state.step)
        say(f"{'already finished:' if ended else 'resumed'} {file}")
        for key, (old, new) in other.items():
            say(f"changed {key}: {shown(old)} -> {shown(new)}")
    changed = state.changed | ({str(state.step): other} if other else {})
    return ResumeState(step=state.step, seconds=state.seconds, totals=state.totals, counted=state.counted, changed=changed)


def _load_optimizers(file: Path, model: nn.Module, optims: list[torch.optim.Optimizer], state: dict[str, Any]) -> None:
    """Loads the state of the optimisers; their options stay those of the configuration. TimError if it does not fit."""
    configured = [[{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
                  for optimizer in optims]
    try:
        set_optimizer_state_dict(model, optims, state, options=StateDictOptions(full_state_dict=True))
    except Exception as error:  # of many kinds, for missing and for unknown entries
        raise TimError(f"{file}: its optimiser state does not fit the configuration ({one_line(error)}); choose another output") from None
    for optimizer, groups in zip(optims, configured):
        for group, options in zip(optimizer.param_groups, groups):
            group.update(options)
        for parameter, entries in optimizer.state.items():
            for name, value in entries.items():
                if isinstance(value, Tensor) and value.ndim and value.shape != parameter.shape:
                    raise TimError(f"{file}: its optimiser state does not fit the configuration ({name} has shape {list(value.shape)}, a "
                                   f"weight {list(parameter.shape)}); choose another output")
