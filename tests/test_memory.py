"""Memory: what is announced against the live tensors that a run in the released sizes counts, on the meta device."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.measure import LiveTensors, counted_peak
from benchmarks.network import RELEASED
from tim_core import memory
from tim_core.models.autoencoder import Autoencoder
from tim_core.models.config import AutoencoderConfig
from tim_core.models.kl_autoencoder import KLAutoencoder, KLAutoencoderConfig
from tim_core.models.transformer import TransitionTransformer, peak_bytes

DTYPES = [torch.float32, torch.bfloat16]
DC_AE = json.loads((Path(__file__).parent / "reference/dcae/keys_dcae.json").read_text())["config"]


@pytest.fixture(scope="module", params=DTYPES, ids=["float32", "bfloat16"])
def dtype(request):
    return request.param


def test_the_counter_counts_storages_while_they_live():
    given = torch.zeros(1000)
    with LiveTensors() as live:
        view = given[:10]
        given.add_(1)
        assert live.bytes == 0  # made before
        kept = given + 1
        assert live.bytes == 4000
        half = kept[:500] * 2
        del kept
        assert live.bytes == 2000 and live.peak == 6000
        del half, view
    assert live.bytes == 0
    assert counted_peak(lambda: torch.empty(2**30, device="meta").mul(2)) == 2 * 4 * 2**30
    assert counted_peak(lambda: torch.ones(100).sum()) == 404


@torch.inference_mode()
@pytest.mark.parametrize("tokens, batch, text", [(1024, 1, 32), (1024, 2, 256), (16384, 2, 32)])
def test_the_network_announces_what_it_takes(dtype, tokens, batch, text):
    """From 1024 x 1024 to 4096 x 4096, within 5 %. Weights are not counted."""
    network = TransitionTransformer(RELEASED, dtype=dtype, device="meta").eval()
    side = round(tokens**0.5)
    x = torch.empty(batch, RELEASED.in_channels, side, side, dtype=dtype, device="meta")
    times, y = torch.empty(batch, device="meta"), torch.empty(batch, text, RELEASED.text_dim, dtype=dtype, device="meta")
    counted = counted_peak(lambda: network(x, times, times, y))
    assert peak_bytes(RELEASED, batch * tokens, dtype) == pytest.approx(counted, rel=0.05)


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["DC-AE", "SD VAE"])
@pytest.mark.parametrize("side", [1024, 4096])
def test_the_autoencoder_announces_what_it_takes(dtype, side, kind):
    network, config = (Autoencoder, AutoencoderConfig.from_diffusers(DC_AE)) if kind == "DC-AE" else (KLAutoencoder, KLAutoencoderConfig())
    model = network(config, dtype=dtype, device="meta").eval()
    z = torch.empty(1, config.latent_channels, side // config.factor, side // config.factor, dtype=dtype, device="meta")
    x = torch.empty(1, 3, side, side, dtype=dtype, device="meta")
    announced = model.peak_bytes(side, side, dtype)
    for counted in (counted_peak(lambda: model.decode(z)), counted_peak(lambda: model.encode(x))):
        assert 0.75 * counted < announced < 1.25 * counted


def test_a_cpu_keeps_memory_for_other_programs(monkeypatch):
    """A whole decode of 4096x4096 would take over 6 GiB of bfloat16."""
    monkeypatch.setattr(memory, "available_bytes", lambda device: 2**40)
    released = Autoencoder(AutoencoderConfig.from_diffusers(DC_AE), device="meta")
    cases = [(device, size) for device in ("cpu", "cuda") for size in (2048, 4096)]
    assert [released.needs_tiles(size, size, torch.bfloat16, torch.device(device)) for device, size in cases] == [False, True, False, False]


@torch.inference_mode()
def test_decoding_takes_at_most_six_tenths_of_diffusers_memory(dtype):
    """Live tensors of a decode in the released sizes, 1024 x 1024."""
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        oracle = diffusers.AutoencoderDC(**{name: value for name, value in DC_AE.items() if not name.startswith("_")}).to(dtype).eval()
    ours = Autoencoder(AutoencoderConfig.from_diffusers(DC_AE), dtype=dtype, device="meta").eval()
    z = torch.empty(1, 32, 32, 32, dtype=dtype, device="meta")
    theirs, own = counted_peak(lambda: oracle.decoder(z)), counted_peak(lambda: ours.decoder(z))
    assert own < 0.6 * theirs
