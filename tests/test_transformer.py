"""The network: its injected parts, its precision, and the reading of its shape from weights. Its numbers: test_reference.py."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.support import official_config
from tim_core.errors import TimError
from tim_core.models import attention, rope
from tim_core.models.config import CONDITIONS, POSITIONS, TransformerConfig
from tim_core.models.transformer import TransitionTransformer

TEXT = TransformerConfig(in_channels=4, hidden_size=32, depth=2, num_heads=2, text_dim=12)
CLASS = TransformerConfig(in_channels=4, hidden_size=32, depth=2, num_heads=2, patch_size=2, num_classes=5, encoder_depth=2)


def build(config=TEXT, seed=0, **settings):
    torch.manual_seed(seed)
    model = TransitionTransformer(config, **settings)
    for value in model.parameters():
        nn.init.normal_(value, std=0.2)
    return model


def inputs(config=TEXT, height=6, width=4, dtype=torch.float32, seed=1):
    torch.manual_seed(seed)
    y = torch.randn(2, 3, config.text_dim).to(dtype) if config.text_dim else torch.tensor([0, 5])
    return torch.randn(2, config.in_channels, height, width).to(dtype), torch.tensor([1.0, 0.6]), torch.tensor([0.5, 0.0]), y


@pytest.fixture(autouse=True)
def empty_tables():
    rope._tables.clear()


@pytest.mark.parametrize("config", [TEXT, CLASS, replace(TEXT, z_dim=6, projector_dim=10, encoder_depth=1)], ids=["text", "class", "repa"])
def test_shapes_and_a_state_dict_of_parameters_only(config):
    model = build(config)
    assert model(*inputs(config)).shape == (2, 4, 6, 4)
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}
    if config.z_dim:
        F_pred, h = model(*inputs(config), return_projection=True)
        assert F_pred.shape == (2, 4, 6, 4) and h.shape == (2, 24, 6)


def test_a_fresh_network_answers_zero_and_learns():
    torch.manual_seed(0)
    model = TransitionTransformer(TEXT)
    model.initialize_weights()
    out = model(*inputs())
    assert (out == 0).all()
    (out - 1).pow(2).mean().backward()
    assert model.final_layer.linear.weight.grad.abs().max() > 0
    assert model.t_embedder.mlp[0].weight.std().item() == pytest.approx(0.02, rel=0.1)
    for block in model.blocks:
        assert (block.adaLN_modulation.fc2.weight == 0).all() and block.attn.qkv.weight.abs().max() > 0


def test_layers_come_from_the_injected_operations_and_attention_from_the_function():
    made, calls = [], []

    def counted(base):
        class Layer(base):
            def __init__(self, *args, **kwargs):
                made.append(self)
                super().__init__(*args, **kwargs)

        return Layer

    operations = SimpleNamespace(**{name: counted(getattr(nn, name)) for name in ("Linear", "Conv2d", "LayerNorm", "Embedding")})

    def spy(q, k, v):
        calls.append((tuple(q.shape), tuple(k.shape)))
        return attention.sdpa(q, k, v)

    for config in (TEXT, CLASS):
        model = build(config, operations=operations, attention=spy)
        leaves = [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None]
        assert all(any(leaf is layer for layer in made) for leaf in leaves)
        model(*inputs(config))
    assert calls == [((2, 2, 24, 16), (2, 2, 24, 16)), ((2, 2, 24, 16), (2, 2, 3, 16))] * 2 + [((2, 2, 6, 16), (2, 2, 6, 16))] * 2


def test_weights_may_be_stored_in_fewer_bits_than_are_computed():
    """As ComfyUI's manual cast does it: fp8 storage, bfloat16 arithmetic. The network never asks the weights for a dtype."""

    class Linear(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    operations = SimpleNamespace(Linear=Linear, Conv2d=nn.Conv2d, LayerNorm=nn.LayerNorm, Embedding=nn.Embedding)
    model = build(operations=operations).to(torch.bfloat16)
    arguments = inputs(dtype=torch.bfloat16)
    for module in model.modules():
        if isinstance(module, Linear):
            module.weight.data = module.weight.data.to(torch.float8_e4m3fn).to(torch.bfloat16)
    expected = model(*arguments)
    for module in model.modules():
        if isinstance(module, Linear):
            module.weight = nn.Parameter(module.weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    assert torch.equal(model(*arguments), expected)
    assert TransitionTransformer(TEXT, dtype=torch.bfloat16, device="meta").dtype == torch.bfloat16


def test_times_and_angles_are_not_rounded_to_the_networks_dtype():
    model = build().bfloat16()
    x, t, r, y = inputs(dtype=torch.bfloat16)
    seen = []
    model.t_embedder.mlp[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.delta_embedder.mlp[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(x, t, t - 2**-12, y)
    assert not torch.equal(seen[1], model.delta_embedder.mlp[0](torch.zeros(1, 256).bfloat16()))
    assert (seen[1][:, 128:] > 0).any()  # an interval that bfloat16 times would have lost
    (table,) = rope._tables.values()
    assert table.dtype == torch.float32
    model.float()(x.float(), t, r, y.float())
    assert len(rope._tables) == 1


def test_positions_follow_the_official_order():
    assert rope.positions(2, 3, order="official").tolist() == [[0, 1, 0, 1, 0, 1], [0, 0, 1, 1, 2, 2]]
    model = build()
    x, t, r, y = inputs(height=4, width=4)
    square = model(x, t, r, y)
    assert not torch.allclose(model(x.transpose(2, 3), t, r, y).transpose(2, 3), square, atol=1e-4)


def test_positions_on_the_grid_are_column_and_row():
    assert rope.positions(2, 3, order="grid").tolist() == [[0, 1, 2, 0, 1, 2], [0, 0, 0, 1, 1, 1]]
    official, grid = build(), build(replace(TEXT, positions="grid"))
    square, oblong = inputs(height=4, width=4), inputs(height=2, width=3)
    assert torch.equal(grid(*square), official(*square))
    assert not torch.allclose(grid(*oblong), official(*oblong), atol=1e-4)


def test_the_rotary_table_outlives_inference_mode_but_not_a_function_transform():
    model, arguments = build(), inputs()
    with sdpa_kernel(SDPBackend.MATH):
        torch.func.jvp(lambda x: model(x, *arguments[1:]), (arguments[0],), (arguments[0],))
    assert not rope._tables
    with torch.inference_mode():
        model(*arguments)
    assert len(rope._tables) == 1
    model(*arguments).sum().backward()
    for size in range(1, 40):
        rope.rotary_table(8, size, 2, torch.device("cpu"), torch.float32, "official")
    assert len(rope._tables) <= 16


@pytest.mark.parametrize("positions", POSITIONS)
def test_it_compiles_as_one_graph(positions):
    model = build(replace(TEXT, positions=positions))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for size in ((6, 4), (4, 8)):
        arguments = inputs(height=size[0], width=size[1])
        assert torch.allclose(compiled(*arguments), model(*arguments), atol=1e-5)


def test_autocast_and_the_meta_device():
    with torch.autocast("cpu", torch.bfloat16):
        assert build()(*inputs()).isfinite().all()
    model = TransitionTransformer(TEXT, device="meta")
    assert model(*(value.to("meta") for value in inputs())).shape == (2, 4, 6, 4)


def test_attention_by_name(monkeypatch):
    assert attention.get_attention("auto") is attention.get_attention("sdpa") is attention.sdpa
    q, k, v = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 4)
    weights = (q @ k.transpose(-1, -2) / 2).softmax(-1)
    for kernel in (attention.sdpa, attention.eager):
        assert torch.allclose(kernel(q, k, v), (weights @ v).transpose(1, 2).reshape(2, 5, 12), atol=1e-6)
    with pytest.raises(TimError, match="'xformers'"):
        attention.get_attention("xformers")
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # as if it were not installed
    with pytest.raises(TimError, match="pip install flash-attn"):
        attention.get_attention("flash")
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_func=lambda q, k, v: q))
    assert attention.get_attention("flash") is attention.flash
    with pytest.raises(TimError, match="torch.float32 on cpu"):
        attention.flash(q, k, v)


@pytest.mark.parametrize(
    "config",
    [
        TEXT,
        CLASS,
        replace(TEXT, patch_size=2, qk_norm=False),
        replace(TEXT, use_new_embed=False, distance_aware=False, lora_hidden_size=7),
        replace(TEXT, z_dim=6, projector_dim=10, encoder_depth=2),
        replace(CLASS, null_class=False, new_condition="t,r"),
        replace(TEXT, positions="grid"),
    ],
    ids=["text", "class", "patch", "plain", "repa", "no_null", "grid"],
)
def test_the_configuration_is_read_from_the_weights(config):
    weights = TransitionTransformer(config, device="meta").state_dict()
    hints = {"encoder_depth": config.encoder_depth, **config.record()}
    assert TransformerConfig.from_state_dict(weights, hints) == replace(config, lora_hidden_size=config.modulation_rank)


def test_what_weights_cannot_tell_has_the_official_default():
    weights = TransitionTransformer(replace(TEXT, hidden_size=64, qk_norm=False), device="meta").state_dict()
    read = TransformerConfig.from_state_dict(weights)
    assert (read.num_heads, read.new_condition, read.encoder_depth, read.positions) == (16, "t-r", 2, "official")
    # Where qk-norm tells the heads, metadata does not.
    assert TransformerConfig.from_state_dict(TransitionTransformer(TEXT, device="meta").state_dict(), {"num_heads": 8}).num_heads == 2
    assert len(CONDITIONS) == 6
    with pytest.raises(TimError, match="num_heads is 'many'"):
        TransformerConfig.from_state_dict(weights, {"num_heads": "many"})
    with pytest.raises(TimError, match="new_condition is 't'"):
        TransformerConfig.from_state_dict(weights, {"new_condition": "t"})
    with pytest.raises(TimError, match="positions is 'rows'; use one of 'official', 'grid'"):
        TransformerConfig.from_state_dict(weights, {"positions": "rows"})


def _without(name):
    def change(weights):
        return {key: value for key, value in weights.items() if not key.startswith(name)}

    return change


def _shaped(name, *shape):
    return lambda weights: {**weights, name: torch.empty(shape, device="meta")}


@pytest.mark.parametrize(
    "change, found",
    [
        (lambda weights: {}, "'x_embedder.proj.weight' of shape [any, any, any, any] is missing (there are 0 tensors)"),
        (lambda weights: {"model.diffusion_model.input_blocks.0.0.weight": torch.empty(1)}, "there are 1 tensors"),
        (_without("blocks.0."), "'blocks.0.attn.qkv.weight' of shape [96, 32] is missing"),
        (_without("y_embedder."), "'y_embedder.norm.weight' of shape [any] is missing"),
        (_shaped("x_embedder.proj.weight", 32, 4), "has shape [32, 4]"),
        (_shaped("x_embedder.proj.weight", 32, 4, 1, 2), "has shape [32, 4, 1, 2] in place of [32, 4, 1, 1]"),
        (_shaped("final_layer.linear.weight", 5, 32), "has shape [5, 32] in place of [4, 32]"),
        (_shaped("blocks.0.attn.q_norm.weight", 9), "heads of width 9"),
        (_shaped("blocks.5.attn.qkv.weight", 96, 32), "3 of 6 blocks"),
        (_shaped("blocks.0.adaLN_modulation.fc2.weight", 192, 24), "in place of [288, 24]"),
        (_shaped("projector.0.weight", 7, 32), "'projector.4.weight' of shape [any, 7] is missing"),
        (lambda weights: {**weights, "x_embedder.proj.weight": "text"}, "has shape []"),
    ],
)
def test_what_is_no_tim_is_refused_in_one_line(change, found):
    weights = change(TransitionTransformer(TEXT, device="meta").state_dict())
    with pytest.raises(TimError) as error:
        TransformerConfig.from_state_dict(weights)
    assert found in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"num_heads": 3}, "32 with 3 heads"),
        ({"hidden_size": 12}, "12 with 2 heads"),
        ({"depth": 0}, "depth is 0"),
        ({"num_classes": 5}, "text_dim is 12 and num_classes is 5"),
        ({"text_dim": None}, "text_dim is None and num_classes is None"),
        ({"new_condition": "r,t"}, "new_condition is 'r,t'"),
        ({"z_dim": 4, "encoder_depth": 9}, "encoder_depth is 9"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(settings, said):
    with pytest.raises(TimError, match=said):
        replace(TEXT, **settings)


@pytest.mark.parametrize("ratio, width", [(2, 42), (4, 85), (2.7, 57)])
def test_the_mlp_width_is_read_from_the_weights(ratio, width):
    network = dict(in_channels=4, hidden_size=32, depth=2, num_heads=2, num_classes=5, class_dropout_prob=0)
    official = network | {"mlp_ratio": ratio, "z_dim": None, "encoder_depth": 2}
    config = official_config(official)
    weights = build(config).state_dict()
    assert weights["blocks.0.mlp.fc1_g.weight"].shape == (width, 32)
    read = TransformerConfig.from_state_dict(weights, {"num_heads": 2, "null_class": False})
    assert read == replace(config, lora_hidden_size=config.modulation_rank)
    TransitionTransformer(read).load_state_dict(weights)
