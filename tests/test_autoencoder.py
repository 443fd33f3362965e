"""Our DC-AE against diffusers' AutoencoderDC, and its tiles."""

import pytest
import torch

from tim_core.autoencoder import Autoencoder
from tim_core.config import AutoencoderConfig
from tim_core.errors import TimError

diffusers = pytest.importorskip("diffusers")

RES, VIT = "ResBlock", "EfficientViTBlock"
CONFIGS = {
    "f4, residual only, shuffled": {
        "latent_channels": 4, "attention_head_dim": 8, "encoder_block_types": RES, "decoder_block_types": RES,
        "encoder_block_out_channels": (8, 16, 16), "decoder_block_out_channels": (8, 16, 32),
        "encoder_layers_per_block": (1, 2, 1), "decoder_layers_per_block": (2, 1, 1),
        "encoder_qkv_multiscales": ((), (), ()), "decoder_qkv_multiscales": ((), (), ()),
    },
    "f8, first stage empty, as bundled": {
        "latent_channels": 4, "attention_head_dim": 8,
        "encoder_block_types": (RES, RES, RES, VIT), "decoder_block_types": (RES, RES, RES, VIT),
        "encoder_block_out_channels": (8, 8, 16, 32), "decoder_block_out_channels": (8, 8, 16, 32),
        "encoder_layers_per_block": (0, 1, 1, 1), "decoder_layers_per_block": (0, 2, 2, 1),
        "encoder_qkv_multiscales": ((), (), (), (5,)), "decoder_qkv_multiscales": ((), (), (), (5,)),
    },
    "f32, strided and interpolated, two scales": {
        "latent_channels": 8, "attention_head_dim": 4, "encoder_block_types": (RES, RES, RES, VIT, VIT, VIT),
        "decoder_block_types": (RES, RES, RES, VIT, VIT, VIT), "encoder_block_out_channels": (4, 8, 8, 8, 16, 16),
        "decoder_block_out_channels": (4, 8, 8, 8, 16, 16), "encoder_layers_per_block": (1, 1, 1, 1, 2, 1),
        "decoder_layers_per_block": (1, 1, 1, 1, 1, 2), "encoder_qkv_multiscales": ((), (), (), (), (3,), (3, 5)),
        "decoder_qkv_multiscales": ((), (), (), (5,), (5,), (5,)), "downsample_block_type": "Conv", "upsample_block_type": "interpolate",
        "scaling_factor": 0.41407,
    },
    "f8, batch norm and relu in the decoder": {
        "latent_channels": 4, "attention_head_dim": 8, "encoder_block_types": RES, "decoder_block_types": (RES, RES, VIT),
        "encoder_block_out_channels": (8, 8, 16), "decoder_block_out_channels": (8, 8, 16), "encoder_layers_per_block": (1, 1, 1),
        "decoder_layers_per_block": (1, 1, 1), "encoder_qkv_multiscales": ((), (), ()), "decoder_qkv_multiscales": ((), (), (5,)),
        "decoder_norm_types": ("batch_norm", "batch_norm", "rms_norm"), "decoder_act_fns": ("relu", "relu", "silu"),
        "downsample_block_type": "conv", "upsample_block_type": "interpolate",
    },
}


@pytest.fixture(params=CONFIGS)
def pair(request):
    """The oracle and ours, with the same random weights."""
    torch.manual_seed(list(CONFIGS).index(request.param))
    oracle = diffusers.AutoencoderDC(**CONFIGS[request.param]).eval()
    for name, value in oracle.state_dict().items():
        if value.is_floating_point():
            value.normal_(0, 0.3 if value.ndim == 1 else value[0].numel() ** -0.5)
            if value.ndim == 1 and (name.endswith("norm.weight") or "running_var" in name or "norm_out.weight" in name):
                value.abs_().add_(0.7)
    ours = Autoencoder(AutoencoderConfig.from_diffusers(CONFIGS[request.param])).eval()
    ours.load_state_dict(oracle.state_dict())
    return oracle, ours


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 64), (32, 96)])
def test_float32_equals_diffusers(pair, size):
    oracle, ours = pair
    x = torch.randn(2, 3, *size).clamp(-1, 1)
    scale = ours.config.scaling_factor
    raw = oracle.encode(x).latent
    torch.testing.assert_close(ours.encode(x), raw * scale, rtol=1e-4, atol=1e-5 * raw.std().item())
    z = torch.randn_like(raw)
    expected = oracle.decode(z / scale).sample
    torch.testing.assert_close(ours.decode(z), expected, rtol=1e-4, atol=2e-5 * max(1.0, expected.std().item()))


@torch.no_grad()
def test_bfloat16_equals_diffusers(pair):
    oracle, ours = (model.to(torch.bfloat16) for model in pair)
    x = torch.randn(1, 3, 64, 64).clamp(-1, 1).bfloat16()
    scale = ours.config.scaling_factor
    raw = oracle.encode(x).latent.float()
    assert (ours.encode(x).float() / scale - raw).abs().max() <= 0.03 * raw.abs().max()
    z = torch.randn_like(raw).bfloat16()
    expected = oracle.decode(z / scale).sample.float()
    assert (ours.decode(z).float() - expected).abs().max() <= 0.03 * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("tile, stride", [(64, 32), (96, 64), (64, 64)])
def test_tiles_equal_diffusers(pair, tile, stride):
    oracle, ours = pair
    factor, scale = ours.config.factor, ours.config.scaling_factor
    oracle.enable_tiling(tile, tile, stride, stride)
    x = torch.randn(1, 3, 128, 160).clamp(-1, 1)
    raw = oracle.encode(x).latent
    torch.testing.assert_close(ours.tiled_encode(x, tile, stride), raw * scale, rtol=1e-4, atol=1e-5 * raw.std().item())
    z = torch.randn(1, ours.config.latent_channels, 128 // factor, 160 // factor)
    expected = oracle.decode(z / scale).sample
    torch.testing.assert_close(ours.tiled_decode(z, tile, stride), expected, rtol=1e-4, atol=2e-5 * max(1.0, expected.std().item()))


def test_shapes_tell_the_architecture(pair):
    oracle, ours = pair
    record = {"scaling_factor": ours.config.scaling_factor, "head_dim": ours.config.head_dim}
    found = AutoencoderConfig.from_state_dict(oracle.state_dict(), record)
    again = Autoencoder(found).eval()
    again.load_state_dict(oracle.state_dict())
    assert found.factor == ours.config.factor and found.latent_channels == ours.config.latent_channels
    with torch.no_grad():
        x = torch.randn(1, 3, 64, 64)
        assert torch.equal(again.decode(again.encode(x)), ours.decode(ours.encode(x)))


@torch.no_grad()
def test_overlap_leaves_no_seam():
    """On a smooth latent the bundled decoder's tiles are one picture: no step between neighbours that the whole decode does not have."""
    from tim_core.checkpoint import load_autoencoder

    model = load_autoencoder("tim-shapes").float()
    y, x = torch.meshgrid(torch.linspace(-1, 1, 128), torch.linspace(-1, 1, 192), indexing="ij")
    z = model.encode(torch.stack([0.5 * x, 0.5 * y, 0.3 * x * y])[None])
    whole, tiled = model.decode(z), model.tiled_decode(z, tile=96, stride=64)
    assert not torch.equal(whole, tiled)   # tiling took place
    assert (whole - tiled).abs().max() < 0.06
    steps = (tiled[..., 1:] - tiled[..., :-1]).abs().amax((0, 1, 2))
    assert steps[63::64].max() < 1.5 * (whole[..., 1:] - whole[..., :-1]).abs().max()


def test_the_wrong_sizes_are_named(pair):
    _, ours = pair
    with pytest.raises(TimError, match="multiples of"):
        ours.encode(torch.zeros(1, 3, 64, 64 + 1))
    with pytest.raises(TimError, match="stride"):
        ours.tiled_decode(torch.zeros(1, ours.config.latent_channels, 8, 8), 64, 96)


def test_no_dcae_is_refused():
    with pytest.raises(TimError, match="AutoencoderDC"):
        AutoencoderConfig.from_state_dict({"decoder.conv_in.weight": torch.zeros(1)})
