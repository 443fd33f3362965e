"""Load the parts of a checkpoint as models."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import TimError, misfits, one_line
from ..models.text_encoder import TextEncoder, Tokenizer
from .detect import AUTOENCODER, TEXT_ENCODER, TITLES, TRANSFORMER
from .open import StateDict
from .parts import read_parts


@dataclass
class Checkpoint:
    """The loaded parts of a model; None for a part that the file does not have."""

    transformer: torch.nn.Module
    text_encoder: torch.nn.Module | None
    autoencoder: torch.nn.Module | None
    latent_factor: int
    metadata: dict


def load_transformer(source, operations=torch.nn, attention=None, dtype=None, device="cpu", projector=False):
    """TransitionTransformer from a file, a bundled name or Parts. dtype None keeps the stored one. REPA's `projector.*` only if asked."""
    from ..models.attention import sdpa
    from ..models.transformer import TransitionTransformer

    parts = read_parts(source)
    tensors = {key: tensor for key, tensor in parts.tensors(TRANSFORMER).items() if projector or not key.startswith("projector.")}
    config = replace(parts, transformer=tensors).config(TRANSFORMER)
    dtype = dtype or _main_dtype(tensors)
    model = TransitionTransformer(config, operations, attention or sdpa, device="meta", dtype=dtype)
    return _fill(model, tensors, dtype, device, parts.source, TRANSFORMER)


def load_autoencoder(source, operations=torch.nn, dtype=None, device="cpu"):
    """Autoencoder from a file, a folder in diffusers' layout, a bundled name or Parts. Never float16: the deep stages overflow."""
    from ..models.autoencoder import Autoencoder

    parts = read_parts(source)
    tensors = parts.tensors(AUTOENCODER)
    if dtype == torch.float16:
        raise TimError("autoencoder: float16 overflows in its deep stages, expected float32 or bfloat16")
    dtype = dtype or _main_dtype(tensors)
    dtype = torch.float32 if dtype == torch.float16 else dtype
    model = Autoencoder(parts.config(AUTOENCODER), operations, device="meta", dtype=dtype)
    return _fill(model, tensors, dtype, device, parts.source, AUTOENCODER)


def load_text_encoder(source, dtype=None, device="cpu", escape=None):
    """TextEncoder from a file with the tokenizer in it (or beside it), a folder in Hugging Face layout, a bundled name or Parts.

    escape None takes what the file says, and True where it says nothing (the released weights were trained so).
    """
    parts = read_parts(source)
    tensors = parts.tensors(TEXT_ENCODER)
    if parts.tokenizer is None:
        raise TimError(f"{parts.source}: found no tokenizer in the file or beside it, expected tokenizer.json or tokenizer.model")
    tokenizer = Tokenizer.from_bytes(parts.tokenizer, f"{parts.source}: tokenizer")
    config = parts.config(TEXT_ENCODER)
    try:
        model = TextEncoder(config, tokenizer, parts.escape if escape is None else escape, device="meta")
    except TimError:
        raise
    except Exception as error:  # transformers' own checks, of many kinds
        raise TimError(f"{parts.source}: found a Gemma config that cannot be built ({one_line(error)}), expected gemma3_text's") from None
    try:
        # .to, for what is no weight: the rotary tables and the embedding scale
        return model.load(_placed(tensors, dtype or _main_dtype(tensors), device)).to(device).eval()
    except TimError as error:
        raise TimError(f"{parts.source}: {error}") from None


def load_checkpoint(source, operations=torch.nn, attention=None, dtype=None, device="cpu") -> Checkpoint:
    """All parts of a one-file checkpoint (or of a dict of parts); text encoder and autoencoder are None where there is none."""
    parts = read_parts(source)
    parts.tensors(TRANSFORMER)
    parts.check_fit()
    return Checkpoint(
        load_transformer(parts, operations, attention, dtype, device),
        load_text_encoder(parts, dtype, device) if TEXT_ENCODER in parts else None,
        load_autoencoder(parts, operations, dtype, device) if AUTOENCODER in parts else None,
        parts.latent_factor,
        parts.metadata,
    )


def _fill(model: torch.nn.Module, tensors: StateDict, dtype, device, source: str, part: str) -> torch.nn.Module:
    """A model built on the meta device takes over the tensors; TimError unless every key and shape agrees."""
    own = model.state_dict()
    optional = {key for key in own if key.endswith("num_batches_tracked")}
    if wrong := misfits(own, tensors, optional):
        raise TimError(f"{source}: found {wrong}, expected the tensors of the {TITLES[part]} that its shapes describe")
    tensors = _placed(tensors, dtype, device)
    tensors |= {key: torch.zeros((), dtype=torch.int64, device=device) for key in optional - tensors.keys()}
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def _placed(tensors: StateDict, dtype, device) -> StateDict:
    """Tensors on the device; floating ones in dtype."""
    return {key: tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else tensor.dtype) for key, tensor in tensors.items()}


def _main_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype of most of the weights; bfloat16 for 8-bit floats, in which torch's own layers do not compute."""
    counts = Counter()
    for tensor in tensors.values():
        if tensor.is_floating_point():
            counts[tensor.dtype] += tensor.numel()
    dtype = counts.most_common(1)[0][0] if counts else torch.float32
    return torch.bfloat16 if dtype.itemsize == 1 else dtype
