"""Loads the parts of a checkpoint as models."""

from collections.abc import Callable, Iterable

import torch

from ..errors import TimError, one_line, state_dict_mismatch
from ..finite import DAMAGE, damaged_weight
from ..models.gemma import gemma_shapes, text_mismatch
from ..models.kl_autoencoder import KLAutoencoder, KLAutoencoderConfig
from ..models.text_encoder import TextEncoder
from ..models.tiles import TiledAutoencoder
from ..models.tokenizer import Tokenizer, check_ids
from .detect import AUTOENCODER, TEXT_ENCODER, TRANSFORMER
from .open import StateDict
from .parts import Part, naming
from .precision import Losses, cast, main_dtype
from .read import read_parts


def load_transformer(source, operations=torch.nn, attention=None, dtype=None, device="cpu", projector=False):
    """TransitionTransformer from whatever read_parts takes. dtype None keeps the stored one; `projector` loads REPA's projector too."""
    from ..models.attention import sdpa
    from ..models.transformer import TransitionTransformer

    part = read_parts(source)[TRANSFORMER]
    part = part.with_projector() if projector else part
    dtype = dtype or main_dtype(part.tensors)
    with naming(part.source, part.kind):
        model = TransitionTransformer(part.config, operations, attention or sdpa, device="meta", dtype=dtype)
    model.damaged_weight = damaged_weight(part.tensors)
    return _fill(model, part, dtype, device)


def load_autoencoder(source, operations=torch.nn, dtype=None, device="cpu"):
    """Autoencoder or KLAutoencoder from whatever read_parts takes. dtype None keeps the stored one. TimError for float16."""
    part = read_parts(source)[AUTOENCODER]
    if dtype == torch.float16:
        raise TimError("autoencoder: float16 overflows; use float32 or bfloat16")
    dtype = dtype or main_dtype(part.tensors)
    dtype = torch.float32 if dtype == torch.float16 else dtype
    with naming(part.source, part.kind):
        model = _autoencoder_class(part)(part.config, operations, device="meta", dtype=dtype)
    note_damage(model, part)
    return _fill(model, part, dtype, device)


def note_damage(autoencoder: TiledAutoencoder, part: Part) -> None:
    """Record a damaged weight of the encoder or the decoder; the other half can still run."""
    for half, modules in autoencoder.HALVES.items():
        own = {name: tensor for name, tensor in part.tensors.items() if name.partition(".")[0] in modules}
        autoencoder.damaged_weights[half] = damaged_weight(own)


def load_text_encoder(source, dtype=None, device="cpu", escape=None):
    """TextEncoder from whatever read_parts takes; the tokenizer is in the file or in its folder.

    escape None is the checkpoint's own setting (`Parts.escape`). TimError if there is no tokenizer, or transformers is missing or too old.
    """
    parts = read_parts(source)
    part = parts[TEXT_ENCODER]
    tokenizer, config = _open_tokenizer(part), part.config
    try:
        model = TextEncoder(config, tokenizer, parts.escape if escape is None else escape, device="meta")
    except TimError as error:
        raise TimError(f"{part.source}: {error}") from None
    except Exception as error:  # transformers raises many kinds
        raise TimError(f"{part.source}: transformers cannot build this Gemma config ({one_line(error)})") from None
    for token, own in {"pad": tokenizer.pad_id, "bos": tokenizer.bos_id}.items():
        if (wanted := model.gemma_config[f"{token}_token_id"]) is not None and own != wanted:
            use = "use the tokenizer and the config.json of this model"
            raise TimError(f"{tokenizer.name}: <{token}> is token {own}, the text model's {token}_token_id is {wanted}; {use}")
    damaged = damaged_weight(part.tensors)
    model.damaged_weight = None if damaged is None else f"transformer.{damaged}"
    try:
        # .to() moves what is not a weight: rotary tables and the embedding scale
        return model.load(_placed(part, dtype or main_dtype(part.tensors), device)).to(device).eval()
    except TimError as error:
        raise TimError(f"{part.source}: {error}") from None


def _open_tokenizer(part: Part) -> Tokenizer:
    """The tokenizer of a text model. TimError if there is none, or its special tokens are not in the model's vocabulary."""
    if part.tokenizer is None:
        raise TimError(f"{part.source}: no tokenizer; put tokenizer.json or tokenizer.model into the same folder")
    tokenizer = Tokenizer.from_bytes(part.tokenizer, f"{part.source}: tokenizer")
    check_ids(tokenizer([""])[0], tokenizer, part.config["vocab_size"])
    return tokenizer


def _autoencoder_class(part: Part) -> Callable[..., torch.nn.Module]:
    from ..models.autoencoder import Autoencoder

    return KLAutoencoder if isinstance(part.config, KLAutoencoderConfig) else Autoencoder


def check_loads(part: Part) -> None:
    """TimError for what loading a part would find: a bad record, wrong names or shapes, no tokenizer. Reads no weights, no transformers."""
    from ..models.transformer import TransitionTransformer

    if part.kind == TEXT_ENCODER:
        _open_tokenizer(part)
        expected = {name: torch.empty(shape, device="meta") for name, shape in gemma_shapes(part.config).items()}
        if wrong := state_dict_mismatch(expected, part.tensors):
            raise TimError(f"{part.source}: {text_mismatch(wrong)}")
        return
    with naming(part.source, part.kind):
        model = (TransitionTransformer if part.kind == TRANSFORMER else _autoencoder_class(part))(part.config, device="meta")
    check_tensors(part, model)


def check_undamaged(model: torch.nn.Module, source: object) -> None:
    """TimError if a loaded model has a damaged weight. Sampling names it by itself; training, where it would spread, asks here."""
    found = model.damaged_weights.values() if isinstance(model, TiledAutoencoder) else [model.damaged_weight]
    for damaged in found:
        if damaged is not None:
            raise TimError(f"{source}: the weight '{damaged}' has {DAMAGE}; download the file again")


def check_tensors(part: Part, model: torch.nn.Module) -> None:
    """TimError unless the part has the model's names and shapes. `model` may be on the meta device."""
    expected = model.state_dict()
    if wrong := state_dict_mismatch(expected, part.tensors, _counters(expected)):
        raise TimError(f"{part.source}: not a complete {part.title}: {wrong}; download the file again")


def _counters(names: Iterable[str]) -> set[str]:
    """Batch norm's counters, which a file may lack."""
    return {name for name in names if name.endswith("num_batches_tracked")}


def _fill(model: torch.nn.Module, part: Part, dtype, device) -> torch.nn.Module:
    """Moves the part's tensors into a model built on the meta device. TimError unless every name and shape agrees."""
    check_tensors(part, model)
    try:
        tensors = _placed(part, dtype, device)
    except TimError as error:
        raise TimError(f"{part.source}: {error}") from None
    tensors |= {name: torch.zeros((), dtype=torch.int64, device=device) for name in _counters(model.state_dict()) - tensors.keys()}
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def _placed(part: Part, dtype, device) -> StateDict:
    """A part's tensors on a device, floating ones in dtype. TimError naming a tensor that dtype cannot hold."""
    losses = Losses()
    tensors = {name: cast(name, part.weight(name), dtype, device, losses) for name in part.tensors}
    losses.report(part.source)
    return tensors
