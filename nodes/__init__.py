"""The ComfyUI side: core types in, core types out. All the work is done in tim_core."""

from comfy_api.latest import ComfyExtension, io

from .conditioning import TiMClassLabel
from .latent import TiMEmptyLatent
from .loaders import TiMCheckpointLoader, TiMModelLoader, TiMTextEncoderLoader, TiMVAELoader
from .sampling import TiMGuidanceInterval, TiMSampler, TiMSamplerSelect, TiMScheduler
from .sweep import TiMStepSweep
from .upscale import TiMNativeUpscale

NODES: list[type[io.ComfyNode]] = [
    TiMCheckpointLoader,
    TiMModelLoader,
    TiMTextEncoderLoader,
    TiMVAELoader,
    TiMEmptyLatent,
    TiMClassLabel,
    TiMSampler,
    TiMSamplerSelect,
    TiMScheduler,
    TiMGuidanceInterval,
    TiMNativeUpscale,
    TiMStepSweep,
]


class TiMExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


def load_schemas() -> None:
    """Builds every schema once: core would only say in one line that a node is missing."""
    for node in NODES:
        node.GET_SCHEMA()
