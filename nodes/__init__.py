"""The ComfyUI side: core types in, core types out. All the work is done in tim_core."""

from comfy_api.latest import ComfyExtension, io

from .latent import TiMEmptyLatent
from .loaders import TiMCheckpointLoader
from .sampling import TiMSampler

NODES: list[type[io.ComfyNode]] = [TiMCheckpointLoader, TiMEmptyLatent, TiMSampler]


class TiMExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


def load_schemas() -> None:
    """Builds every schema once: core would only say in one line that a node is missing."""
    for node in NODES:
        node.GET_SCHEMA()
