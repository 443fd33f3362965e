"""Files to MODEL, CLIP and VAE."""

import folder_paths
from comfy_api.latest import io

from ..tim_core.checkpoint import AUTOENCODER, BUNDLED, TEXT_ENCODER, TRANSFORMER, read_parts
from ..tim_core.errors import TimError
from .clip import build_clip
from .compat import schema
from .model import build_model
from .vae import TiMVAE

BUNDLED_NAMES = {f"{name} (bundled)": name for name in BUNDLED}


class TiMCheckpointLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TiMCheckpointLoader",
            display_name="Load TiM Checkpoint",
            category="TiM",
            description="Loads a TiM text-to-image model from one file. The MODEL, CLIP and VAE work with every core node.",
            search_aliases=["transition models", "tim model", "load checkpoint"],
            inputs=[
                io.Combo.Input(
                    "ckpt_name",
                    options=[*BUNDLED_NAMES, *folder_paths.get_filename_list("checkpoints")],
                    tooltip="The bundled model, which draws simple shapes at 64x64, or a one-file TiM checkpoint in models/checkpoints "
                    "(`tim pack` makes one of the released weights).",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The transformer, for TiMSampler, or for KSampler with euler and simple."),
                io.Clip.Output(display_name="CLIP", tooltip="The Gemma-3 text encoder, for CLIPTextEncode."),
                io.Vae.Output(display_name="VAE", tooltip="The DC-AE, for VAEDecode and VAEEncode."),
            ],
        )

    @classmethod
    def execute(cls, ckpt_name) -> io.NodeOutput:
        source = BUNDLED_NAMES.get(ckpt_name) or folder_paths.get_full_path("checkpoints", ckpt_name)
        if source is None:
            raise TimError(f"{ckpt_name}: found no such file, expected one in models/checkpoints or {', '.join(BUNDLED_NAMES)}")
        parts = read_parts(source)
        for part in (TRANSFORMER, TEXT_ENCODER, AUTOENCODER):
            parts.tensors(part)
        parts.check_fit()
        return io.NodeOutput(build_model(parts), build_clip(parts), TiMVAE(parts))
