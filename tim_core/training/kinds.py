"""The kinds of runs: what configures each, and what it trains."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Kind:
    """A kind of run. config, task: "module.Class" in this package, imported when used: fine-tuning loads nothing of coloured shapes.

    takes_image_encoder: whether the task takes the image encoder of REPA.
    """

    config: str
    task: str
    takes_image_encoder: bool = True

    def config_class(self) -> type:
        """The dataclass of its configurations."""
        return _find(self.config)

    def make_task(self, config: Any, image_encoder: Callable[[Tensor], Tensor] | None) -> Any:
        """The task of a configuration."""
        return _find(self.task)(config, image_encoder) if self.takes_image_encoder else _find(self.task)(config)


KINDS = {
    "finetune": Kind("config.FineTuning", "finetune.FineTuningTask"),
    "tim": Kind("shapes_config.TransitionTraining", "transition.TransitionTask"),
    "autoencoder": Kind("shapes_config.AutoencoderTraining", "autoencoder.AutoencoderTask", takes_image_encoder=False),
}


def kind_of(config: Any) -> Kind:
    """The kind that a configuration is of."""
    return next(kind for kind in KINDS.values() if kind.config.endswith(f".{type(config).__name__}"))


def _find(name: str) -> Any:
    module, _, found = name.partition(".")
    return getattr(import_module(f".{module}", __package__), found)
