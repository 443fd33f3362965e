"""What a run tells the user: log lines of which each is said once, and a line on the node."""

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


def show_progress(text: str) -> None:
    """Shows a line on the node that is running."""
    from comfy_execution.utils import get_executing_context
    from server import PromptServer  # there only in ComfyUI's own process

    node, server = get_executing_context(), getattr(PromptServer, "instance", None)
    if node is not None and server is not None:
        server.send_progress_text(text, node.node_id)


def log_once(model: comfy.model_patcher.ModelPatcher) -> comfy.model_patcher.ModelPatcher:
    """A clone whose runs, several in one node, log each line once between them."""
    model = model.clone()
    model.model_options["transformer_options"][SAID] = Said()
    return model
