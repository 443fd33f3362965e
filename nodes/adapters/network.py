"""The network as core calls it: tim_core's, with ComfyUI's attention and DIFFUSION_MODEL wrappers."""

import comfy.ldm.common_dit
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers
from torch import Tensor

from ...tim_core.errors import TimError
from ...tim_core.models.config import TransformerConfig
from ...tim_core.models.transformer import TransitionTransformer

LABEL_BASE = 32


class ComfyAttention:
    """ComfyUI's selected attention, called with the transformer options of the current call (other packs override it there)."""

    def __init__(self):
        self.options: dict = {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return optimized_attention(q, k, v, q.shape[1], skip_reshape=True, transformer_options=self.options)


class TiMNetwork(TransitionTransformer):
    """tim_core's network with the signature that BaseModel calls; r is a transformer option."""

    def __init__(self, config: TransformerConfig, operations, device=None, dtype=None):
        attention = ComfyAttention()
        super().__init__(config, operations, attention, device, dtype)
        self.comfy_attention = attention

    def forward(self, x, timesteps, context=None, control=None, transformer_options={}, **kwargs):
        wrappers = get_all_wrappers(WrappersMP.DIFFUSION_MODEL, transformer_options)
        executor = WrapperExecutor.new_class_executor(self._forward, self, wrappers)
        return executor.execute(x, timesteps, context, transformer_options, **kwargs)

    def _forward(self, x, timesteps, context, transformer_options={}, **kwargs):
        context = self._condition(context)
        height, width = x.shape[-2:]
        x = comfy.ldm.common_dit.pad_to_patch_size(x, (self.config.patch_size,) * 2)
        attention = self.comfy_attention
        outer, attention.options = attention.options, transformer_options
        try:
            return super().forward(x, timesteps, transformer_options.get("tim_r", timesteps), context)[..., :height, :width]
        finally:
            attention.options = outer

    def _condition(self, context: Tensor | None) -> Tensor:
        """The network's condition: text features (B, L, text_dim) as they are, class numbers (B,) from the digits of `class_label`."""
        config = self.config
        if context is None or context.shape[-1] != (config.text_dim or 2):
            width = 0 if context is None else context.shape[-1]
            found = {0: "missing", 2: "a class label"}.get(width, f"text features of width {width}")
            if config.text_dim:
                raise TimError(f"conditioning: {found}; connect CLIP Text Encode with this model's own CLIP, of width {config.text_dim}")
            raise TimError(f"conditioning: {found}; connect TiM Class Label, this model takes classes")
        if config.text_dim:
            return context
        # The digits survive half precision, the number does not.
        label = (context[:, 0].float() @ context.new_tensor([LABEL_BASE, 1], dtype=torch.float32)).round().long()
        if int(label.max()) >= config.num_classes:
            raise TimError(f"class label: {int(label.max())} is not a class of this model; choose 0 to {config.num_classes - 1}")
        if int(label.min()) < 0 and not config.null_class:
            raise TimError("class label: empty, but this model has no null class; set cfg to 1 or choose a class")
        return torch.where(label < 0, config.num_classes, label)
