"""Records of a checkpoint whose values are absurd, of another type, or that are no JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from tests.corpus.case import Case, fails, generator
from tests.corpus.originals import SAMPLE, Originals
from tim_core.weights.save import json_tensor

FILE = "model.safetensors"
CONFIGS = {"transformer": "model.diffusion_model.config_json", "text": "text_encoders.config_json", "vae": "vae.config_json"}

NO_NUMBERS: list[Any] = ["4", True, [], {}, [4], "\x1b[31m4", math.nan, math.inf, -math.inf]
NO_COUNTS = [*NO_NUMBERS, 0, -1, -(10**30), 2.5, 1e300]
NO_FLAGS: list[Any] = ["yes", 1, 0, [], {}, 0.5]
ABSURD = {  # by part and key: values to choose from
    "transformer": {
        "num_heads": NO_COUNTS,
        "new_condition": ["", "t+r", 3, [], {}, True, "x" * 10**5],
        "positions": ["", "rows", 3, [], {}, True, "x" * 10**5],
        "null_class": NO_FLAGS,
        "latent_factor": [*NO_COUNTS, 257, 2, 8, 10**30],
        "native_size": [
            *NO_NUMBERS,
            64,
            [64],
            [64, 64, 64],
            [0, 0],
            [-16, 16],
            [17, 16],
            [16.5, 16],
            [10**9, 10**9],
            [None, 16],
            ["16", "16"],
        ],
        "steps": [*NO_COUNTS, 10**9, 1001],
        "cfg": [*NO_NUMBERS, -1, 1e20, 101],
        "guidance_interval": [*NO_NUMBERS, 0.5, [0.5], [0.7, 0.3], [0.5, 0.5], [-1, 1], [math.nan, 1], ["0", "1"], [0, 1, 2], [0, None]],
        "escape_prompts": NO_FLAGS,
    },
    "vae": {
        "scaling_factor": [*NO_NUMBERS, 0, -0.5, 1e-300, 1e300, 5e-324, 10**30],
        "force_upcast": ["yes", 1, [1], {"a": 1}],
        "head_dim": [*NO_COUNTS, 3, 10**9],
        "in_shortcut": NO_FLAGS,
        "out_shortcut": NO_FLAGS,
        "out_activation": ["", "tanh", 3, True, ["relu"], {"relu": 1}],
        "encoder_activations": ["relu", ["silu"], ["silu"] * 9, 3, True, [["silu"]] * 3, {"a": "silu"}],
        "decoder_activations": ["silu", ["silu"], ["silu", 3, "silu"], 3, ["tanh"] * 3],
    },
    "text": {
        "num_hidden_layers": [*NO_COUNTS, 3, 10**9, 1],
        "vocab_size": [*NO_COUNTS, 2**31, 7],
        "hidden_size": [*NO_COUNTS, 2**31, 17],
        "head_dim": [*NO_COUNTS, 16, 10**9],
        "num_attention_heads": [*NO_COUNTS, 10**9, 4],
        "num_key_value_heads": [*NO_COUNTS, 10**9, 2],
        "intermediate_size": [*NO_COUNTS, 10**9, 25],
        "sliding_window": NO_COUNTS,
        "max_position_embeddings": [*NO_COUNTS, 10**30],
        "rms_norm_eps": [*NO_NUMBERS, -1, 0, 1e300, 5e-324],
        "query_pre_attn_scalar": [*NO_NUMBERS, 0, -8, 1e300, 1e-300],
        "rope_theta": [*NO_NUMBERS, -1, 1e300, 1e-300],
        "rope_local_base_freq": [*NO_NUMBERS, -1, 1e300, 1e-300],
        "rope_scaling": ["linear", 3, True, [1], {"rope_type": "none such", "factor": 8.0}, {"rope_type": "linear", "factor": -1}],
        "rope_parameters": ["default", 3, True, [1], {"full_attention": 3}, {"full_attention": {"rope_theta": -1}}],
        "layer_types": ["full_attention", ["full_attention"], ["full_attention", "x"], [1, 2], 3, True, ["full_attention"] * 10**4],
        "hidden_activation": ["", "none such", 3, True, ["silu"], {"a": 1}],
        "attention_bias": [True, "yes", 3],
        "attention_dropout": ["x", -1, 2, math.nan, [], True],
        "use_bidirectional_attention": [True, 1, "yes"],
        "pad_token_id": ["x", -5, 10**9, 1.5, [], True],
    },
}


def with_record(change: Callable[[dict[str, Any]], object], part: str, command=SAMPLE, metadata: bool = False):
    """A builder: the model with a changed record of a part, in its tensor, or only in the metadata."""

    def build(folder: Path, originals: Originals) -> list[object]:
        tensors = originals.tensors
        record = json.loads(tensors.pop(CONFIGS[part]).numpy().tobytes())
        if metadata:
            record = json.loads(originals.metadata["tim"])
        change(record)
        if not metadata:
            tensors[CONFIGS[part]] = json_tensor(record)
        return [*command, "--model", originals.save(tensors, Path(FILE), {"tim": json.dumps(record)} if metadata else None)]

    return build


@generator
def absurd_values(random: Random) -> Iterator[Case]:
    for part, keys in ABSURD.items():
        for key, values in keys.items():
            for number, value in enumerate(random.sample(values, 2)):
                metadata = part != "text" and random.random() < 0.3
                build = with_record(lambda record, key=key, value=value: record.update({key: value}), part, metadata=metadata)
                named = "k_proj.bias" if key == "attention_bias" and value is True else key  # the tensor that it asks for
                yield Case(f"{key} {number} of the {part}: {str(value)[:40]!r}", build, fails(FILE, named))
