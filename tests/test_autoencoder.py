"""Our DC-AE against diffusers' AutoencoderDC, and its tiles."""

import numpy as np
import pytest
import torch

from tim_core.errors import TimError
from tim_core.models import autoencoder, bands
from tim_core.models.autoencoder import Autoencoder
from tim_core.models.config import AutoencoderConfig

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
def test_bfloat16_is_as_near_to_float32_as_diffusers(pair):
    """Errors are medians over pixels and images: where the sum that the attention divides by is near zero, they are large, in both."""
    oracle, ours = (model.bfloat16().float() for model in pair)
    errors = {"encode": [], "decode": []}
    for _ in range(9):
        x = torch.randn(1, 3, 128, 128).clamp(-1, 1).bfloat16()
        latent = oracle.encode(x.float()).latent
        z = torch.randn_like(latent).bfloat16()
        image = oracle.decode(z.float()).sample
        oracle.bfloat16(), ours.bfloat16()
        for name, expected, theirs, own in (
            ("encode", latent, oracle.encode(x).latent, ours.encoder(x)), ("decode", image, oracle.decode(z).sample, ours.decoder(z)),
        ):
            errors[name].append([(made.float() - expected).abs().median() / expected.abs().median() for made in (theirs, own)])
        oracle.float(), ours.float()
    for name, pairs in errors.items():
        theirs, own = torch.tensor(pairs).T
        assert own.median() < 0.04 and (own / theirs).median() < 1.25, f"{name}: {own.median():.4f} against {theirs.median():.4f}"


@torch.no_grad()
@pytest.mark.parametrize("budget", [100, 3000, 20000])
def test_bands_of_rows_are_the_whole_image(pair, budget, monkeypatch):
    """From a few rows per band to several images in one; a batch of two, and the layout without channels last."""
    _, ours = pair
    x = torch.randn(2, 3, 96, 64)
    z = torch.randn(2, ours.config.latent_channels, 96 // ours.config.factor, 64 // ours.config.factor)
    with torch.enable_grad():
        encoded, decoded = ours.encoder(x).detach(), ours.decoder(z).detach()
    for layout in (autoencoder._as_computed, lambda x: x):
        monkeypatch.setattr(autoencoder, "_as_computed", layout)
        monkeypatch.setattr(bands, "CPU_BAND", budget)
        torch.testing.assert_close(ours.encoder(x), encoded, rtol=1e-4, atol=2e-5 * encoded.std().item())
        torch.testing.assert_close(ours.decoder(z), decoded, rtol=1e-4, atol=2e-5 * max(1.0, decoded.std().item()))


@torch.no_grad()
def test_images_and_latents_are_not_overwritten_and_latents_can_be_saved(pair):
    _, ours = pair
    x, z = torch.randn(1, 3, 64, 64), torch.randn(1, ours.config.latent_channels, 64 // ours.config.factor, 64 // ours.config.factor)
    given = x.clone(), z.clone()
    ours.encode(x), ours.decode(z), ours.encoder(x), ours.decoder(z)
    assert torch.equal(x, given[0]) and torch.equal(z, given[1])
    assert ours.encode(x).is_contiguous()  # safetensors writes no other layout


@torch.no_grad()
def test_batch_norm_learns_from_whole_batches(pair, monkeypatch):
    """In training mode there are no bands, which would be batches of their own."""
    _, ours = pair
    monkeypatch.setattr(bands, "CPU_BAND", 100)
    ours.train().decoder(torch.randn(2, ours.config.latent_channels, 8, 8))
    assert all(module.num_batches_tracked <= 1 for module in ours.modules() if isinstance(module, torch.nn.BatchNorm2d))


@torch.no_grad()
@pytest.mark.parametrize("tile, stride", [(64, 32), (96, 64), (64, 64), ((64, 96), (32, 64))])
def test_tiles_equal_diffusers(pair, tile, stride):
    oracle, ours = pair
    factor, scale = ours.config.factor, ours.config.scaling_factor
    sides = [(side, side) if isinstance(side, int) else side for side in (tile, stride)]
    oracle.enable_tiling(*sides[0], *sides[1])
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
@pytest.mark.parametrize("seed", range(3))
def test_overlap_leaves_no_seam(seed):
    """An image of coloured shapes, as the bundled model draws: blended tiles are the whole decode within 0.2 of its range of 2."""
    from tim_core.shapes import detector, scenes
    from tim_core.weights.load import load_autoencoder

    rng = np.random.default_rng(seed)
    prompt = scenes.sample_prompt(rng, "full counting")
    image = torch.from_numpy(scenes.render(scenes.place(rng, prompt, 256, 192), 256, 192)).movedim(-1, 0)[None] * 2 - 1
    model = load_autoencoder("tim-shapes").float()
    z = model.encode(image)
    whole, blended, cut = model.decode(z), model.tiled_decode(z, tile=128, stride=96), model.tiled_decode(z, tile=128, stride=128)
    assert 0 < (whole - blended).abs().max() < 0.2 and (whole - blended).abs().mean() < 0.003
    assert (whole - cut).abs().max() > 3 * (whole - blended).abs().max()   # what the overlap is for
    assert detector.is_correct(prompt, ((blended[0] + 1) / 2).clamp(0, 1).movedim(0, -1).numpy())


@torch.no_grad()
@pytest.mark.parametrize("task", ["single", "two", "counting", "colors", "position", "attribution"])
def test_the_bundled_autoencoder_keeps_images_right(task):
    """The detector finds at least 97 % of reconstructed scenes correct. n = 120 per task, seed 5, 64x64."""
    from tim_core.shapes import detector, scenes
    from tim_core.weights.load import load_autoencoder

    rng = np.random.default_rng(5)
    model = load_autoencoder("tim-shapes").float()
    prompts = [scenes.sample_prompt(rng, task) for _ in range(120)]
    truth = np.stack([scenes.render(scenes.place(rng, prompt)) for prompt in prompts])
    shown = model.decode(model.encode(torch.from_numpy(truth).movedim(-1, 1) * 2 - 1)).add(1).div(2).clamp(0, 1).movedim(1, -1).numpy()
    assert np.mean([detector.is_correct(prompt, image) for prompt, image in zip(prompts, shown)]) >= 0.97


def test_the_wrong_sizes_are_named(pair):
    _, ours = pair
    with pytest.raises(TimError, match=f"65x64 is not a multiple of {ours.config.factor}"):
        ours.encode(torch.zeros(1, 3, 64, 64 + 1))
    with pytest.raises(TimError, match="stride"):
        ours.tiled_decode(torch.zeros(1, ours.config.latent_channels, 8, 8), 64, 96)


def test_no_dcae_is_refused():
    with pytest.raises(TimError, match="DC-AE: .*encoder.conv_out.weight"):
        AutoencoderConfig.from_state_dict({"decoder.conv_in.weight": torch.zeros(1)})
