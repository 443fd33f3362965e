"""The network as core calls it: tim_core's, with ComfyUI's attention, DIFFUSION_MODEL wrappers, and seams for block patches."""

import comfy.ldm.common_dit
import torch
from comfy.ldm.modules.attention import attention_pytorch, optimized_attention
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers
from torch import Tensor

from ...tim_core.errors import TimError
from ...tim_core.models.config import TransformerConfig
from ...tim_core.models.transformer import TransitionTransformer
from .compiling import BATCH_LIMIT

LABEL_BASE = 32


class Call:
    """The transformer options of the network's current call."""

    def __init__(self):
        self.options: dict = {}


def attention_keys(name: str, index: int, depth: int) -> list[tuple]:
    """The names of a block's attention in `patches_replace`: core's of a DiT, and for self-attention that of a U-Net's middle."""
    middle = [("middle", 0, 0), ("middle", 0)] if name == "attn1" and index == depth // 2 else []
    return [("double_block", index), *middle]


class ComfyAttention:
    """ComfyUI's selected attention with the options of the current call, and with the attention patches in them.

    name: "attn1" among the image tokens, "attn2" to the text, as in core.
    """

    def __init__(self, name: str, call: Call):
        self.name = name
        self.call = call

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        options = self.call.options
        if "patches" not in options and "patches_replace" not in options:
            return self.attend(q, k, v)
        patches, extra = options.get("patches", {}), {**options, "n_heads": q.shape[1], "dim_head": q.shape[3], "attn_precision": None}
        mask = None
        for patch in patches.get(f"{self.name}_patch", ()):
            out = patch(q, k, v, pe=None, attn_mask=mask, extra_options=extra)
            q, k, v, mask = out.get("q", q), out.get("k", k), out.get("v", v), out.get("attn_mask", mask)

        replacements = options.get("patches_replace", {}).get(self.name, {})
        keys = attention_keys(self.name, options.get("block_index", 0), options.get("total_blocks", 0)) if replacements else []
        replace = next((replacements[key] for key in keys if key in replacements), None)
        if replace is None:
            out = self.attend(q, k, v, mask)
        else:
            out = replace(*(x.transpose(1, 2).flatten(2) for x in (q, k, v)), extra)
        for patch in patches.get(f"{self.name}_output_patch", ()):
            out = patch(out, extra)
        return out

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        # What core selects for a CPU asks for the free memory, which breaks a compiled graph.
        compiled_for_cpu = torch.compiler.is_compiling() and q.device.type == "cpu"
        attention = attention_pytorch if compiled_for_cpu else optimized_attention
        return attention(q, k, v, q.shape[1], mask=mask, skip_reshape=True, transformer_options=self.call.options)


class TiMNetwork(TransitionTransformer):
    """tim_core's network with the signature that BaseModel calls; r is a transformer option."""

    def __init__(self, config: TransformerConfig, operations, device=None, dtype=None):
        super().__init__(config, operations, device=device, dtype=dtype)
        self.in_channels = config.in_channels  # as core's RenormCFG reads it
        self.call = Call()
        for block in self.blocks:
            block.attn.attention = ComfyAttention("attn1", self.call)
            if block.cross_attn is not None:
                block.cross_attn.attention = ComfyAttention("attn2", self.call)

    def forward(self, x, timesteps, context=None, control=None, transformer_options={}, **kwargs):
        wrappers = get_all_wrappers(WrappersMP.DIFFUSION_MODEL, transformer_options)
        if wrappers:
            x = x.clone()  # in float32 it is the sampler's own tensor, and core's EasyCache writes into it
        executor = WrapperExecutor.new_class_executor(self._forward, self, wrappers)
        return executor.execute(x, timesteps, context, transformer_options, **kwargs)

    def _forward(self, x, timesteps, context, transformer_options={}, **kwargs):
        if torch.compiler.is_compiling():
            torch._check(len(x) >= 1)
            torch._check(len(x) <= BATCH_LIMIT)
        context = self._condition(context)
        height, width = x.shape[-2:]
        x = comfy.ldm.common_dit.pad_to_patch_size(x, (self.config.patch_size,) * 2)
        call = self.call
        outer, call.options = call.options, {**transformer_options, "total_blocks": len(self.blocks), "block_type": "double"}
        try:
            return super().forward(x, timesteps, transformer_options.get("tim_r", timesteps), context)[..., :height, :width]
        finally:
            call.options = outer

    def run_block(self, index, block, x, y, condition, interval, table):
        """A block with core's seams: `block_index`, a replacement in patches_replace["dit"], and "double_block" patches after it."""
        call, options = self.call, self.call.options
        options["block_index"] = index
        replace = options.get("patches_replace", {}).get("dit", {}).get(("double_block", index))
        if replace is None:
            x = block(x, y, condition, interval, table)
        else:

            def original(args):
                call.options = args["transformer_options"]
                try:
                    return {"img": block(args["img"], args["txt"], args["vec"], interval, args["pe"])}
                finally:
                    call.options = options

            args = {"img": x, "txt": y, "vec": condition, "pe": table, "transformer_options": options}
            x = replace(args, {"original_block": original})["img"]
        for patch in options.get("patches", {}).get("double_block", ()):
            x = patch({"img": x, "txt": y, "vec": condition, "block_index": index, "transformer_options": options})["img"]
        return x

    def check_condition(self, context: Tensor | None) -> None:
        """TimError if this is no conditioning for the model: text for classes or the other way round, or no class of it."""
        config = self.config
        if context is None or context.shape[-1] != (config.text_dim or 2):
            width = 0 if context is None else context.shape[-1]
            found = {0: "missing", 2: "a class label"}.get(width, f"text features of width {width}")
            if config.text_dim:
                raise TimError(f"conditioning: {found}; connect CLIP Text Encode with this model's own CLIP, of width {config.text_dim}")
            raise TimError(f"conditioning: {found}; connect TiM ImageNet Class, this model takes classes")
        if config.text_dim:
            return
        if context.shape[1] != 1 or not torch.equal(context, context.round()):
            raise TimError("class label: mixed with another one; classes cannot be averaged or concatenated, use Conditioning (Combine)")
        label = _number(context)
        if int(label.max()) >= config.num_classes:
            raise TimError(f"class label: {int(label.max())} is not a class of this model; choose 0 to {config.num_classes - 1}")
        if int(label.min()) < 0 and not config.null_class:
            raise TimError("class label: empty, but this model has no null class; set cfg to 1 or choose a class")

    def _condition(self, context: Tensor) -> Tensor:
        """The network's condition: text features (B, L, text_dim) as they are, class numbers (B,) from the digits of `class_label`."""
        if self.config.text_dim:
            return context
        label = _number(context)
        return torch.where(label < 0, self.config.num_classes, label)


def class_label(label: int) -> Tensor:
    """A class as conditioning (1, 1, 2): the digits of label + 1 in base LABEL_BASE, exact in half precision.

    -1 is the null class, so that a conditioning set to zero is the null class, too.
    """
    return torch.tensor([[divmod(label + 1, LABEL_BASE)]], dtype=torch.float32)


def _number(context: Tensor) -> Tensor:
    """The inverse of class_label: (B, 1, 2) -> (B,) int64."""
    # The digits survive half precision, the number does not.
    high, low = context[:, 0].float().unbind(1)
    return (high * LABEL_BASE + low).round().long() - 1
