"""Live previews: what core's linear previewer, which KSampler has too, is given to show of a latent."""

import inspect

import latent_preview
import torch
from torch import Tensor

from ...tim_core.models.autoencoder import Autoencoder
from ...tim_core.weights.load import load_autoencoder
from ...tim_core.weights.parts import AUTOENCODER, Parts

MOST_PARAMETERS = 10e6  # of an autoencoder that decodes a preview in every step
MOST_CELLS = 16 * 16  # of a latent that it decodes, 75 ms for 8 * 8 on a CPU core; larger ones are shown by the linear map
PLAIN = torch.eye(3).tolist()


class DecodedPreview:
    """Latents (B, C, h, w) -> RGB (1, 3, H, W) in [-1, 1] of the first: decoded where that is quick, else by the linear map."""

    def __init__(self, autoencoder: Autoencoder, factors: list, bias: list):
        self.autoencoder, self.factors, self.bias = autoencoder, torch.tensor(factors), torch.tensor(bias)

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        first = latents[:1].float()
        if first.shape[-2] * first.shape[-1] <= MOST_CELLS:
            return self.autoencoder.to(first.device).decode(first)
        return torch.einsum("bchw,cr->brhw", first, self.factors.to(first)) + self.bias.to(first).view(1, 3, 1, 1)


def decoded_preview(parts: Parts, preview: dict | None) -> DecodedPreview | None:
    """What turns latents into RGB for a preview, if the checkpoint has a small autoencoder and this version of ComfyUI takes it.

    preview: the record's linear map, {"factors": (C, 3), "bias": (3)}.
    """
    takes = "latent_rgb_factors_reshape" in inspect.signature(latent_preview.Latent2RGBPreviewer.__init__).parameters
    if not takes or preview is None or AUTOENCODER not in parts:
        return None
    if sum(tensor.numel() for tensor in parts[AUTOENCODER].tensors.values()) > MOST_PARAMETERS:
        return None
    return DecodedPreview(load_autoencoder(parts, dtype=torch.float32), preview["factors"], preview["bias"])
