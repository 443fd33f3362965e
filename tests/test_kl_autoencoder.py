"""Stable Diffusion's VAE against diffusers' AutoencoderKL: its names in every spelling, its values, its configuration."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support import mentions, sd_vae_names_of_2022
from tim_core.errors import TimError
from tim_core.models import kl_autoencoder
from tim_core.models.kl_autoencoder import KLAutoencoder, KLAutoencoderConfig, diffusers_names
from tim_core.models.released import SD_VAE
from tim_core.pipeline import Pipeline
from tim_core.weights.describe import describe
from tim_core.weights.load import load_autoencoder
from tim_core.weights.read import read_parts
from tim_core.weights.save import convert, pack

diffusers = pytest.importorskip("diffusers")

CONFIGS = {
    "two layers": {"block_out_channels": (32, 32, 64, 64), "layers_per_block": 2},
    "one layer, every width another": {"block_out_channels": (32, 64, 96, 128), "layers_per_block": 1},
}
LEVELS = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4, "latent_channels": 4}
MEMBERS = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out", "group_norm": "norm"}


@pytest.fixture(params=CONFIGS)
def pair(request):
    """The oracle and ours, with the same random weights."""
    torch.manual_seed(list(CONFIGS).index(request.param))
    oracle = diffusers.AutoencoderKL(**CONFIGS[request.param], **LEVELS).eval()
    for value in oracle.state_dict().values():
        value.normal_(0, 0.3 if value.ndim == 1 else value[0].numel() ** -0.5)
    ours = KLAutoencoder(KLAutoencoderConfig.from_diffusers(dict(oracle.config))).eval()
    ours.load_state_dict(oracle.state_dict())
    return oracle, ours


def near(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * max(1.0, expected.std().item()))


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 64), (8, 104), (72, 40)])
def test_float32_equals_diffusers(pair, size):
    """A batch of two; the latent is the mean of the distribution, times the scale."""
    oracle, ours = pair
    x = torch.randn(2, 3, *size).clamp(-1, 1)
    near(ours.encode(x), oracle.encode(x).latent_dist.mode() * 0.18215)
    z = torch.randn(2, 4, size[0] // 8, size[1] // 8)
    near(ours.decode(z), oracle.decode(z / 0.18215).sample)


@torch.no_grad()
def test_bfloat16_is_as_near_to_float32_as_diffusers(pair):
    oracle, ours = (model.bfloat16().float() for model in pair)
    z = torch.randn(2, 4, 8, 8).bfloat16()
    exact = oracle.decode(z.float() / 0.18215).sample
    errors = [(made.float() - exact).std() for made in (oracle.bfloat16().decode(z / 0.18215).sample, ours.bfloat16().decode(z))]
    assert 0 < errors[1] < 1.25 * errors[0] and errors[1] < 0.05 * exact.std()


@torch.no_grad()
def test_attention_in_parts_is_the_whole(pair, monkeypatch):
    _, ours = pair
    x = torch.randn(2, 3, 40, 64)
    whole = ours.encode(x)
    monkeypatch.setattr(kl_autoencoder, "GPU_BAND", 7 * 2 * 40 * 4)  # seven queries of 40
    near(ours.encode(x), whole)


@torch.no_grad()
def test_tiles_are_blended_and_equal_the_whole_far_from_their_edges(pair):
    _, ours = pair
    z = torch.randn(1, 4, 24, 16)
    whole, blended = ours.decode(z), ours.tiled_decode(z, 128, 96)
    assert blended.shape == whole.shape and 0 < (whole - blended).abs().mean() < 0.5 * whole.std()
    assert torch.equal(ours.tiled_decode(z, 192, 192), whole)
    with pytest.raises(TimError, match="20x64 is not a multiple of 8"):
        ours.encode(torch.zeros(1, 3, 64, 20))


@torch.no_grad()
def test_images_and_latents_are_not_overwritten(pair):
    _, ours = pair
    x, z = torch.randn(1, 3, 16, 16), torch.randn(1, 4, 2, 2)
    given = x.clone(), z.clone()
    ours.encode(x), ours.decode(z)
    assert torch.equal(x, given[0]) and torch.equal(z, given[1]) and ours.encode(x).is_contiguous()


def test_gradients_flow_through_both_ways(pair):
    _, ours = pair
    x = torch.randn(1, 3, 16, 16, requires_grad=True)
    ours.decode(ours.encode(x)).square().mean().backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0


# Names


def as_kernels(weights: dict) -> dict:
    """Attention's weights as 1x1 kernels."""
    return {name: value[..., None, None] if "attentions" in name and value.ndim == 2 else value for name, value in weights.items()}


def as_original(weights: dict) -> dict:
    """Names and shapes of the original code, made by the rules of diffusers' conversion script."""
    found = {}
    for name, value in weights.items():
        words = name.split(".")
        if "attentions" in words:
            member = next(new for new in MEMBERS if f".{new}." in name)
            side, kind = words[0], words[-1]
            name = f"{side}.mid.attn_1.{MEMBERS[member]}.{kind}"
            value = value[..., None, None] if value.ndim == 2 else value
        elif words[1] in ("down_blocks", "up_blocks"):
            level = words[2] if words[1] == "down_blocks" else str(3 - int(words[2]))
            place = ["block", words[4]] if words[3] == "resnets" else [words[3].removesuffix("rs").removesuffix("le") + "le"]
            name = ".".join([words[0], words[1].removesuffix("_blocks"), level, *place, *words[5:]])
        elif words[1] == "mid_block":
            name = ".".join([words[0], "mid", f"block_{int(words[3]) + 1}", *words[4:]])
        found[name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")] = value
    return found


SPELLINGS = {
    "present": dict,
    "of 2022": sd_vae_names_of_2022,
    "present, kernels": as_kernels,
    "of 2022, kernels": lambda weights: as_kernels(sd_vae_names_of_2022(weights)),
    "original": as_original,
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_gives_diffusers_present_names(pair, spelling):
    oracle, ours = pair
    weights = oracle.state_dict()
    given = SPELLINGS[spelling](weights)
    assert spelling.startswith("present") or given.keys() != weights.keys()
    found = diffusers_names(given)
    assert found.keys() == weights.keys() == ours.state_dict().keys()
    assert all(torch.equal(found[name], value) for name, value in weights.items())
    assert KLAutoencoderConfig.from_state_dict(found, ours.config.record()) == ours.config


def test_the_original_names_are_those_of_the_original_files():
    names = as_original(KLAutoencoder(KLAutoencoderConfig(), device="meta").state_dict()).keys()
    assert len(names) == 248 and {
        "encoder.conv_in.weight", "encoder.down.1.block.0.norm1.bias", "encoder.down.2.downsample.conv.weight",
        "encoder.mid.block_2.conv1.bias", "decoder.mid.attn_1.q.weight", "decoder.mid.attn_1.proj_out.bias",
        "decoder.mid.attn_1.norm.weight", "decoder.up.3.upsample.conv.bias", "decoder.up.0.block.0.nin_shortcut.weight",
        "decoder.norm_out.weight", "decoder.conv_out.bias", "quant_conv.weight",
    } <= names  # fmt: skip


def test_a_tensor_under_two_names_is_refused(pair):
    weights = pair[0].state_dict()
    name = "encoder.mid_block.attentions.0.to_q.weight"
    with pytest.raises(TimError) as caught:
        diffusers_names(weights | {name.replace("to_q", "query"): weights[name]})
    assert mentions(str(caught.value), name, "twice")


# Configuration


@pytest.mark.parametrize("name, value", [
    ("latent_channels", 16), ("scaling_factor", 0.13025), ("shift_factor", 0.1159), ("norm_num_groups", 16), ("use_quant_conv", False),
    ("act_fn", "gelu"), ("latents_mean", [0.0]),
])  # fmt: skip
def test_other_kl_autoencoders_are_refused_by_the_key_that_differs(name, value):
    with pytest.raises(TimError) as caught:
        KLAutoencoderConfig.from_diffusers(CONFIGS["two layers"] | {name: value})
    assert mentions(str(caught.value), "KL autoencoder", name, value, SD_VAE)


@pytest.mark.parametrize("name, value", [("block_out_channels", "3232"), ("block_out_channels", 32), ("layers_per_block", "1")])
def test_widths_and_layers_are_numbers(name, value):
    with pytest.raises(TimError) as caught:
        KLAutoencoderConfig.from_diffusers(CONFIGS["two layers"] | {name: value})
    assert mentions(str(caught.value), "SD VAE", name, value)


@pytest.mark.parametrize("name, value", [("shift_factor", 0.1159), ("latents_mean", [0.0])])
def test_a_record_of_other_latents_is_refused_and_a_shift_of_zero_is_none(pair, name, value):
    weights = pair[0].state_dict()
    with pytest.raises(TimError, match=name):
        KLAutoencoderConfig.from_state_dict(weights, {name: value})
    assert KLAutoencoderConfig.from_state_dict(weights, {"shift_factor": 0.0}) == KLAutoencoderConfig.from_state_dict(weights)


@pytest.mark.parametrize("change", [
    {"layers_per_block": 2}, {"block_out_channels": [64, 64, 64, 64]}, {"_class_name": "AutoencoderDC"}, {"_class_name": ["AutoencoderKL"]},
    {"_class_name": "VQModel", "block_out_channels": None},
])  # fmt: skip
def test_a_config_of_other_weights_is_refused(vae, tmp_path, change):
    save_file(vae, tmp_path / "diffusion_pytorch_model.safetensors")
    config = {"_class_name": "AutoencoderKL", "block_out_channels": [32, 32, 64, 64], "layers_per_block": 1} | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    name, value = next(iter(change.items()))
    shown = tuple(value) if isinstance(value, list) and name != "_class_name" else value
    assert mentions(refused(read_parts, tmp_path), tmp_path / "config.json", name, shown, "config.json of these weights")


def test_a_record_of_another_scale_is_refused(pair):
    weights = pair[0].state_dict()
    for scale in (0.13025, 1, "x", None, float("nan"), True):
        with pytest.raises(TimError, match="scaling_factor"):
            KLAutoencoderConfig.from_state_dict(weights, {"scaling_factor": scale})
    with pytest.raises(TimError, match="force_upcast"):
        KLAutoencoderConfig.from_state_dict(weights, {"force_upcast": "no"})


@pytest.mark.parametrize("change, named", [
    (lambda w: w | {"encoder.down_blocks.4.resnets.0.conv1.weight": torch.zeros(32, 32, 3, 3)}, "5 in place of 4"),
    (lambda w: {k: v for k, v in w.items() if "down_blocks.3." not in k}, "3 in place of 4"),
    (lambda w: w | {"encoder.down_blocks.1.resnets.0.conv1.weight": torch.zeros(7)}, "down_blocks.1.resnets.0.conv1.weight"),
    (lambda w: w | {"encoder.down_blocks.1.resnets.0.conv1.weight": torch.zeros(33, 32, 3, 3)}, "multiples of 32"),
    (lambda w: w | {"post_quant_conv.weight": torch.zeros(16, 16, 1, 1)}, "latent_channels is 16"),
    (lambda w: {k: v for k, v in w.items() if not k.startswith("encoder.")}, "0 in place of 4"),
])  # fmt: skip
def test_shapes_that_are_not_its_own(pair, change, named):
    with pytest.raises(TimError, match=named):
        KLAutoencoderConfig.from_state_dict(change(pair[0].state_dict()))


# Reading


@pytest.fixture
def vae(classes_256):
    """The weights of the folder's VAE, under diffusers' present names."""
    return load_file(classes_256 / "vae/sd-vae-ft-ema.safetensors")


def refused(function, *arguments, **options) -> str:
    with pytest.raises(TimError) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("wrap", ["", "first_stage_model.", "state_dict."])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_file_gives_the_same_image(classes_256, vae, tmp_path, spelling, wrap):
    given = {wrap + name: value.contiguous() for name, value in SPELLINGS[spelling](vae).items()}
    if spelling == "original":
        given |= {"model_ema.decay": torch.zeros(()), "loss.logvar": torch.zeros(())}  # as in files of the original code
        torch.save({"state_dict": given, "global_step": 1}, tmp_path / "vae.ckpt")
    else:
        save_file(given, tmp_path / "vae.safetensors")
    file = next(tmp_path.iterdir())
    model = load_autoencoder(file)
    assert all(torch.equal(value, vae[name]) for name, value in model.state_dict().items())
    found = describe(file)
    assert (
        found.kind == "Stable Diffusion VAE"
        and mentions(found.missing[0], "TiM transformer", "4 latent channels")
        and not found.parts[0].problem
    )
    assert mentions(found.advice, "tim convert" if found.parts[0].prefix else "tim download c2i-256")
    assert [place.node for place in found.places] == ([] if found.parts[0].prefix else ["Load VAE"])
    back = convert(file, tmp_path / "back.safetensors")
    assert load_file(back).keys() == vae.keys() and [place.node for place in describe(back).places] == ["Load VAE"]


def test_a_folder_makes_images_and_enlarges_them(classes_256):
    assert read_parts(classes_256).path == str(classes_256)
    """The latent of the network is that of the VAE times 0.18215."""
    pipe = Pipeline.load(classes_256, "cpu")
    assert (pipe.defaults.width, pipe.defaults.height, pipe.size_multiple) == (256, 256, 16)
    images = pipe(["golden retriever", 3], steps=1, cfg=1, width=128, height=144)
    assert images.shape == (2, 144, 128, 3) and images.isfinite().all() and images.std() > 0.02
    assert pipe.upscale(images, ["golden retriever", 3], factor=2, steps=1).shape == (2, 288, 256, 3)
    oracle = diffusers.AutoencoderKL(**{**LEVELS, "block_out_channels": (32, 32, 64, 64), "layers_per_block": 1}).eval()
    oracle.load_state_dict(pipe.autoencoder.state_dict())
    with torch.no_grad():
        latent = oracle.encode(images.movedim(-1, 1) * 2 - 1).latent_dist.mode()
        near(pipe.encode(images), 0.18215 * latent)
        near(pipe.decode(0.18215 * latent).movedim(-1, 1), oracle.decode(latent).sample.add(1).div(2).clamp(0, 1))


def test_the_command_line_takes_the_folder(classes_256, tmp_path, capsys):
    from tim_core.cli import main

    words = ["golden retriever", "--model", str(classes_256), "--steps", "1", "--size", "128x128"]
    assert main(["sample", *words, "-o", str(tmp_path / "a.png")]) == 0 and (tmp_path / "a.png").exists()
    assert main(["inspect", str(classes_256)]) == 0
    assert mentions(capsys.readouterr().out, "Stable Diffusion VAE", "4 latent channels", "256x256", "Load VAE")


def test_a_packed_file_makes_the_same_image_and_says_what_comfyui_lacks(classes_256, vae, tmp_path):
    file = pack(classes_256, tmp_path / "one.safetensors")
    assert {name for name in load_file(file) if name.startswith("vae.")} == {f"vae.{name}" for name in (*vae, "config_json")}
    images = [Pipeline.load(source, "cpu")(["golden retriever"], steps=1, width=128, height=128) for source in (classes_256, file)]
    near(*images)
    found = describe(file)
    assert not found.missing and [place.node for place in found.places] == ["Load TiM Model"]
    assert mentions(found.advice, "Load VAE", "a file of its own")


def test_other_autoencoders_are_refused_by_name(classes_256, vae, tmp_path):
    folder = tmp_path / "sdxl"
    folder.mkdir()
    save_file(vae, folder / "diffusion_pytorch_model.safetensors")
    config = {"_class_name": "AutoencoderKL", "block_out_channels": [32, 32, 64, 64], "layers_per_block": 1, "scaling_factor": 0.13025}
    (folder / "config.json").write_text(json.dumps(config))
    parts = {"model": classes_256 / "transformer", "vae": folder}
    assert mentions(refused(Pipeline.load, parts, "cpu"), folder / "config.json", "scaling_factor", 0.13025, "SDXL", 0.18215, SD_VAE)
    (folder / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.18215}))
    assert Pipeline.load(parts, "cpu").autoencoder.config.widths == (32, 32, 64, 64)

    flux = {name: value for name, value in vae.items() if "quant_conv" not in name} | {"decoder.conv_in.weight": torch.zeros(64, 16, 3, 3)}
    save_file(flux, tmp_path / "flux.safetensors")
    assert mentions(
        refused(read_parts, tmp_path / "flux.safetensors"), "flux.safetensors", "SD VAE", "KL autoencoder", "16 latent channels"
    )
    wide = vae | {"post_quant_conv.weight": torch.zeros(16, 16, 1, 1)}
    save_file(wide, tmp_path / "kl-f8-d16.safetensors")
    message = refused(load_autoencoder, tmp_path / "kl-f8-d16.safetensors")
    assert mentions(message, "kl-f8-d16.safetensors", "KL autoencoder", "latent_channels", 16, SD_VAE)


@pytest.mark.parametrize("key, title", [("label_emb.0.0.weight", "SDXL"), ("middle_block.0.in_layers.0.weight", "Stable Diffusion")])
def test_a_checkpoint_of_another_model_is_named_though_its_vae_is_alike(classes_256, vae, tmp_path, key, title):
    """SDXL's VAE has the names and shapes of Stable Diffusion's, and another scale."""
    others = {f"model.diffusion_model.{name}": torch.zeros(2, 2) for name in ("input_blocks.0.0.weight", key)}
    save_file({**{f"first_stage_model.{name}": value for name, value in vae.items()}, **others}, tmp_path / "whole.safetensors")
    parts = {"model": classes_256 / "transformer", "vae": tmp_path / "whole.safetensors"}
    assert mentions(refused(Pipeline.load, parts, "cpu"), "whole.safetensors", "SD VAE", title)
    assert describe(tmp_path / "whole.safetensors").kind.startswith(f"an {title}" if title == "SDXL" else f"a {title}")


def test_a_transformer_and_an_autoencoder_of_other_latents_do_not_fit(classes_256, tiny):
    assert mentions(refused(Pipeline.load, {"model": tiny, "text-encoder": tiny, "vae": classes_256 / "vae"}, "cpu"), 4, "channels", 16)
    assert mentions(refused(Pipeline.load, {"model": classes_256 / "transformer", "vae": tiny}, "cpu"), 16, "channels", 4)
    assert mentions(refused(Pipeline.load, classes_256 / "transformer", "cpu"), "SD VAE", "TiM transformer")


@pytest.mark.parametrize("name, stage", [
    ("quant_conv.weight", "encoder"), ("encoder.conv_in.bias", "encoder"), ("post_quant_conv.bias", "decoder"),
    ("decoder.conv_out.bias", "decoder"),
])  # fmt: skip
@pytest.mark.parametrize("value", [float("nan"), 1e20])
def test_a_damaged_weight_is_named_by_its_half_and_not_by_the_other(classes_256, vae, tmp_path, name, stage, value):
    vae[name].view(-1)[-1] = value
    save_file(vae, tmp_path / "vae.safetensors")
    pipe = Pipeline.load({"model": classes_256 / "transformer", "vae": tmp_path / "vae.safetensors"}, "cpu")
    halves = {"encoder": lambda: pipe.encode(torch.rand(1, 16, 16, 3)), "decoder": lambda: pipe.decode(torch.randn(1, 4, 2, 2))}
    assert mentions(refused(halves.pop(stage)), f"VAE {stage}", name)
    (other,) = halves.values()
    assert other().isfinite().all()


def test_float16_is_refused_or_computed_in_float32(classes_256, vae, tmp_path):
    save_file({name: value.half() for name, value in vae.items()}, tmp_path / "half.safetensors")
    assert load_autoencoder(tmp_path / "half.safetensors").encoder.conv_in.weight.dtype == torch.float32
    with pytest.raises(TimError, match="float16"):
        load_autoencoder(classes_256 / "vae", dtype=torch.float16)
    pipe = Pipeline.load(classes_256, "cpu", "float16")
    assert next(pipe.autoencoder.parameters()).dtype == torch.float32
