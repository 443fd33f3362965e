"""Log lines of which each is said once in a run."""

import logging

import comfy.model_patcher

SAID = "tim_said"  # transformer option: the lines that this run has logged


class Said(set):
    """The lines that runs have logged; shared by all clones of a patcher, which version 0.3.64 makes with deepcopy."""

    def __deepcopy__(self, memo):
        return self


def say(options: dict, text: str) -> None:
    """Logs a line, once in the run that the transformer options belong to."""
    said = options.get(SAID, set())
    if text not in said:
        said.add(text)
        logging.warning(f"TiM: {text}")


def log_once(model: comfy.model_patcher.ModelPatcher) -> comfy.model_patcher.ModelPatcher:
    """A clone whose runs, several in one node, log each line once between them."""
    model = model.clone()
    model.model_options["transformer_options"][SAID] = Said()
    return model
