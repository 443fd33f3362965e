"""Which optimiser trains which weights, and Muon on convolution kernels."""

import pytest
import torch
from torch import nn

from tests.test_training import autoencoder_yaml, killed, needs_muon
from tim_core.models.autoencoder import Autoencoder
from tim_core.models.config import AutoencoderConfig, StageConfig
from tim_core.training import run
from tim_core.training.config import LoopConfig
from tim_core.training.optimizers import ParamGroup, optimizers, trained
from tim_core.weights.open import open_state_dict

pytestmark = needs_muon


def make(parameters, **loop):
    return optimizers(LoopConfig(optimizer="muon", **loop), [ParamGroup("grad_norm", parameters, 1e-3, 0.01)])


def test_a_kernel_moves_like_the_matrix_that_it_is():
    torch.manual_seed(0)
    kernel = nn.Parameter(torch.randn(8, 4, 3, 3))
    matrix = nn.Parameter(kernel.detach().flatten(1).clone())
    (ours,) = make({"up_blocks.0.conv.weight": kernel}, weight_decay=0.1)
    theirs = torch.optim.Muon([matrix], lr=0.01, weight_decay=0.1, adjust_lr_fn="original")
    for _ in range(3):
        kernel.grad = torch.randn_like(kernel)
        matrix.grad = kernel.grad.flatten(1).clone()
        ours.step()
        theirs.step()
        assert kernel.shape == kernel.grad.shape == ours.state[kernel]["momentum_buffer"].shape == (8, 4, 3, 3)
        assert torch.equal(kernel.flatten(1), matrix)


def test_a_kernel_in_channels_last_moves_like_others():
    torch.manual_seed(0)
    kernel, gradient = torch.randn(2, 8, 4, 3, 3)
    moved = []
    for layout in (torch.contiguous_format, torch.channels_last):
        parameter = nn.Parameter(kernel.clone(memory_format=layout))
        (optimizer,) = make({"up_blocks.0.conv.weight": parameter})
        parameter.grad = gradient.clone(memory_format=layout)
        optimizer.step()
        moved.append(parameter.detach())
    assert torch.equal(*moved) and not torch.equal(moved[0], kernel)


def test_a_failed_step_leaves_kernels_in_their_shape(monkeypatch):
    kernel = nn.Parameter(torch.randn(8, 4, 3, 3))
    (optimizer,) = make({"up_blocks.0.conv.weight": kernel})
    kernel.grad = gradient = torch.randn_like(kernel)
    monkeypatch.setattr(torch.optim.Muon, "step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    assert kernel.shape == (8, 4, 3, 3) and torch.equal(kernel.grad, gradient)


def test_a_kernel_without_a_gradient_stays():
    kernel = nn.Parameter(torch.randn(8, 4, 3, 3))
    before, (optimizer,) = kernel.detach().clone(), make({"up_blocks.0.conv.weight": kernel})
    optimizer.step()
    assert torch.equal(kernel, before) and kernel.grad is None


def test_muon_trains_the_inner_kernels_of_an_autoencoder():
    stages = (StageConfig(8, 1), StageConfig(16, 1, "EfficientViTBlock", (5,)))
    model = Autoencoder(AutoencoderConfig(stages, stages, latent_channels=4, head_dim=8))
    names = {id(p): name for name, p in model.named_parameters()}
    by_kind = {type(o).__name__: {names[id(p)] for group in o.param_groups for p in group["params"]} for o in make(trained(model))}
    assert by_kind["Muon"] | by_kind["AdamW"] == set(names.values()) and not by_kind["Muon"] & by_kind["AdamW"]
    for kernel in ("down_blocks.0.0.conv1.weight", "down_blocks.1.0.attn.to_q.weight", "down_blocks.1.0.conv_out.conv_inverted.weight"):
        assert f"encoder.{kernel}" in by_kind["Muon"]
    for other in ("encoder.conv_in.weight", "decoder.conv_out.weight", "encoder.down_blocks.0.0.norm.weight",
                  "encoder.down_blocks.1.0.conv_out.conv_depth.weight"):
        assert other in by_kind["AdamW"]


@pytest.mark.parametrize("name, shape", [("blocks.0.adaLN_modulation.1.weight", (8, 8)), ("x_embedder.proj.weight", (8, 8)),
                                         ("blocks.0.norm.weight", (8,))])
def test_other_weights_are_adamws(name, shape):
    (found,) = make({name: nn.Parameter(torch.randn(shape))})
    assert isinstance(found, torch.optim.AdamW)


def test_a_killed_autoencoder_run_continues_as_if_nothing_happened(tmp_path, monkeypatch):
    config = autoencoder_yaml(tmp_path, "muon")
    whole = open_state_dict(run([config])[0])[0]
    config.write_text(config.read_text().replace(f"{tmp_path}/autoencoder", f"{tmp_path}/again"))
    killed(monkeypatch, config, "save", at=4)
    resumed = open_state_dict(run([config])[0])[0]
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], resumed[key]) for key in whole)
