"""What the test run says at its end."""

import importlib.util
import os
import shutil
from collections import Counter

import pytest

from tests import comfy_support
from tests.comfy_support import class_files, comfyui, lora_file, released_files  # noqa: F401 (fixtures)

REPLAYED = pytest.StashKey[Counter]()
DEVIATED = pytest.StashKey[Counter]()


def pytest_configure(config):
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: models this small lose more than they gain by threads
    config.stash[REPLAYED] = Counter()
    config.stash[DEVIATED] = Counter()


def pytest_report_header():
    return comfy_support.header()


def find_chromium() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def no_browser() -> str | None:
    """What the tests marked browser lack here."""
    if importlib.util.find_spec("playwright") is None:
        return "no playwright found (`pip install playwright` gets it)"
    return None if find_chromium() else "no chromium found (`apt-get install chromium` gets one; Chrome will do)"


def no_gpu() -> str | None:
    """Reason to skip the tests marked gpu; None if torch has a CUDA device."""
    import torch

    return None if torch.cuda.is_available() else "no CUDA device"


def pytest_collection_modifyitems(config, items):
    if "full" not in config.option.markexpr:  # by hand only, whatever other markers are asked for
        full = [item for item in items if item.get_closest_marker("full")]
        items[:] = [item for item in items if item not in full]
        config.hook.pytest_deselected(items=full)
    lacking = {"comfyui": None if comfy_support.find() else "no ComfyUI found", "browser": no_browser(), "gpu": no_gpu()}
    for item in items:
        for marker, reason in lacking.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_unconfigure(config):
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and comfy_support.find() is None:
        reporter.write_line(comfy_support.advice())
    if reporter is not None and no_browser():
        reporter.write_line(f"{no_browser()}: the tests marked browser were skipped")


@pytest.fixture(scope="session")
def chromium() -> str:
    return find_chromium()


@pytest.fixture
def replayed(request):
    """Count of the reference cases replayed, by kind."""
    return request.config.stash[REPLAYED]


@pytest.fixture
def deviated(request):
    """Count of the reference cases that met a declared deviation, by rule."""
    return request.config.stash[DEVIATED]


def pytest_terminal_summary(terminalreporter, config):
    counts = config.stash[REPLAYED]
    if counts:
        terminalreporter.write_sep("-", "reference cases replayed")
        for kind in sorted(counts):
            terminalreporter.write_line(f"{counts[kind]:5d} {kind}")
        terminalreporter.write_line(f"{sum(counts.values()):5d} in all")
    for rule, count in sorted(config.stash[DEVIATED].items()):
        terminalreporter.write_line(f"{count:5d} differ from the official code by rule: {rule}")


@pytest.fixture(scope="session")
def classes_256(tmp_path_factory):
    """What `tim download c2i-256 --to` makes, small and random: a folder of a class-conditional transformer and an SD VAE."""
    import torch
    from safetensors.torch import save_file

    from tim_core.models.config import TransformerConfig
    from tim_core.models.kl_autoencoder import KLAutoencoder, KLAutoencoderConfig
    from tim_core.models.transformer import TransitionTransformer
    from tim_core.weights.download import RELEASES

    torch.manual_seed(0)
    config = TransformerConfig(in_channels=4, patch_size=2, hidden_size=32, depth=1, num_heads=2, num_classes=1000, lora_hidden_size=8)
    parts = {"transformer": TransitionTransformer(config), "vae": KLAutoencoder(KLAutoencoderConfig((32, 32, 64, 64), 1))}
    folder = tmp_path_factory.mktemp("classes-256")
    for asset in RELEASES["c2i-256"]:
        path = folder / asset.standalone
        path.parent.mkdir()
        save_file(parts[path.parent.name].state_dict(), path)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A one-file text-to-image checkpoint with random weights: 16 latent channels, factor 8."""
    import torch

    from tim_core.models.autoencoder import Autoencoder
    from tim_core.models.config import AutoencoderConfig, StageConfig, TransformerConfig
    from tim_core.models.text_encoder import TextEncoder
    from tim_core.models.tokenizer import Tokenizer
    from tim_core.models.transformer import TransitionTransformer
    from tim_core.shapes.tokenizer import VOCABULARY_SIZE, shapes_tokenizer
    from tim_core.weights.save import pack

    torch.manual_seed(0)
    gemma = {
        "vocab_size": VOCABULARY_SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 512, "sliding_window_pattern": 2,
    }
    text_encoder = TextEncoder(gemma, Tokenizer.from_json(shapes_tokenizer()))
    config = TransformerConfig(in_channels=16, hidden_size=32, depth=2, num_heads=2, text_dim=32, lora_hidden_size=8)
    transformer = TransitionTransformer(config)
    stages = (StageConfig(8, 1), StageConfig(8, 1), StageConfig(16, 1), StageConfig(16, 1, "EfficientViTBlock", (5,)))
    autoencoder = Autoencoder(AutoencoderConfig(stages, stages, latent_channels=16, head_dim=8))
    parts = {"model": transformer, "text-encoder": text_encoder, "vae": autoencoder}
    return pack(parts, tmp_path_factory.mktemp("tiny") / "tiny.safetensors", metadata={"escape_prompts": False})
