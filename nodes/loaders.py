"""Loaders: files to MODEL, CLIP and VAE."""

from comfy_api.latest import io

from ..tim_core.errors import TimError
from ..tim_core.weights.parts import AUTOENCODER, TEXT_ENCODER, TRANSFORMER
from .adapters.clip import build_clip
from .adapters.compat import Schema
from .adapters.files import fingerprint, list_files, list_folders, open_parts
from .adapters.model import WEIGHT_DTYPES, build_model
from .adapters.vae import TiMVAE


class TiMCheckpointLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="TiMCheckpointLoader",
            display_name="Load TiM Checkpoint",
            category="TiM",
            description="Loads a text-to-image TiM model from one file, as MODEL, CLIP and VAE.",
            search_aliases=["few step", "transition models", "tim model", "load checkpoint"],
            inputs=[
                io.Combo.Input(
                    "ckpt_name",
                    options=list_files("checkpoints"),
                    tooltip="The included demo model, which draws coloured shapes at 64x64, or a one-file TiM checkpoint in "
                    "models/checkpoints. The command tim pack makes one from the released weights.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The transformer, for TiM Sampler, or for KSampler with euler and simple."),
                io.Clip.Output(display_name="CLIP", tooltip="The Gemma 3 text encoder, for CLIP Text Encode."),
                io.Vae.Output(display_name="VAE", tooltip="The DC-AE autoencoder, for VAE Decode and VAE Encode."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, ckpt_name=None, **kwargs):
        return fingerprint("checkpoints", ckpt_name)

    @classmethod
    def execute(cls, ckpt_name) -> io.NodeOutput:
        parts = open_parts("checkpoints", ckpt_name, TRANSFORMER, TEXT_ENCODER, AUTOENCODER)
        parts.check_fit()
        return io.NodeOutput(build_model(parts), build_clip(parts), TiMVAE(parts))


class TiMModelLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="TiMModelLoader",
            display_name="Load TiM Model",
            category="TiM",
            description="Loads the transformer of a TiM model, text-to-image or class-conditional, without text encoder and VAE.",
            search_aliases=["transition models", "diffusion model", "tim model", "unet loader"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=list_files("diffusion_models"),
                    tooltip="A transformer in models/diffusion_models: t2i_model.bin or c2i_model_*.safetensors as released, or a file "
                    "written by the command tim convert. The demo model is listed first.",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(WEIGHT_DTYPES),
                    tooltip="Precision of the weights in memory. default: ComfyUI's choice. bf16: half the memory of float32. fp8: half "
                    "the memory of bf16, with some loss of quality; the fast variant also computes in fp8 on GPUs that support it.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The transformer, for TiM Sampler, or for KSampler with euler and simple."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, model_name=None, **kwargs):
        return fingerprint("diffusion_models", model_name)

    @classmethod
    def execute(cls, model_name, weight_dtype) -> io.NodeOutput:
        if weight_dtype not in WEIGHT_DTYPES:
            raise TimError(f"weight_dtype: '{weight_dtype}' is not offered; choose {', '.join(WEIGHT_DTYPES)}")
        return io.NodeOutput(build_model(open_parts("diffusion_models", model_name, TRANSFORMER), WEIGHT_DTYPES[weight_dtype]))


class TiMTextEncoderLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="TiMTextEncoderLoader",
            display_name="Load TiM Text Encoder",
            category="TiM",
            description="Loads the Gemma 3 text encoder of a text-to-image TiM model.",
            search_aliases=["gemma", "transition models", "load clip"],
            inputs=[
                io.Combo.Input(
                    "text_encoder_name",
                    options=[*list_files("text_encoders"), *list_folders("text_encoders")],
                    tooltip="In models/text_encoders: the folder gemma-3-1b-it as downloaded from Hugging Face, or one file with the "
                    "tokenizer inside or beside it.",
                ),
            ],
            outputs=[io.Clip.Output(display_name="CLIP", tooltip="The text encoder, for CLIP Text Encode.")],
        )

    @classmethod
    def fingerprint_inputs(cls, text_encoder_name=None, **kwargs):
        return fingerprint("text_encoders", text_encoder_name)

    @classmethod
    def execute(cls, text_encoder_name) -> io.NodeOutput:
        return io.NodeOutput(build_clip(open_parts("text_encoders", text_encoder_name, TEXT_ENCODER)))


class TiMVAELoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="TiMVAELoader",
            display_name="Load TiM VAE",
            category="TiM",
            description="Loads the DC-AE autoencoder of a TiM model. "
            "Class-conditional models at 256x256 use Stable Diffusion's VAE, in Load VAE.",
            search_aliases=["dc-ae", "transition models", "load vae"],
            inputs=[
                io.Combo.Input(
                    "vae_name",
                    options=[*list_files("vae"), *list_folders("vae")],
                    tooltip="In models/vae: the folder dc-ae-f32c32-sana-1.1-diffusers, or its diffusion_pytorch_model.safetensors.",
                ),
            ],
            outputs=[io.Vae.Output(display_name="VAE", tooltip="The DC-AE autoencoder, for VAE Decode and VAE Encode.")],
        )

    @classmethod
    def fingerprint_inputs(cls, vae_name=None, **kwargs):
        return fingerprint("vae", vae_name)

    @classmethod
    def execute(cls, vae_name) -> io.NodeOutput:
        return io.NodeOutput(TiMVAE(open_parts("vae", vae_name, AUTOENCODER)))
