"""Replays the recorded numbers of the official implementation: every case of every kind under TIM_REFERENCE_DIR.

Where the official code is wrong by its own paper, RULES says so by transport and quantity; ours is then held against the formulas of
the paper, written down a second time in PAPER.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.support import official_config
from tim_core import schedule
from tim_core.errors import TimError
from tim_core.images import to_pil
from tim_core.models import rope
from tim_core.models.config import TransformerConfig
from tim_core.models.transformer import TransitionTransformer, time_features
from tim_core.sampler import sample
from tim_core.training.objectives.transition import ObjectiveConfig, guided_target, sample_times, time_weight, transition_loss
from tim_core.transport import TRANSPORTS, Transport

ROOT = Path(os.environ.get("TIM_REFERENCE_DIR") or Path(__file__).parent / "reference").resolve()
OURS = {"OT_FM": "ot_fm", "TrigFlow": "trigflow", "EDM": "edm", "VP_SDE": "vp", "VE_SDE": "ve"}
GUIDANCE = ("enhance_target", "w_gt", "w_cond", "w_start", "w_end")


# ---------------------------------------------------------------------------------------------------------------- declared deviations


@dataclass
class Facts:
    """What a rule may look at: times (B,), the first items with r = t, and the official numbers for the quantity, (B, ...) or ()."""

    transport: str
    sigma_d: float
    official: Tensor | None = None
    t: Tensor | None = None
    r: Tensor | None = None
    n_diffusion: int = 0
    epsilon: float | None = None  # of the finite difference, None for another derivative
    window: Tensor | None = None  # items under model guidance, None where there is none
    dtype: torch.dtype | None = None  # of the network


@dataclass(frozen=True)
class Rule:
    """`rows` tells which items of the batch the official code gets wrong; a bool for a quantity without items."""

    transports: tuple[str, ...]
    quantity: str
    reason: str
    rows: Callable[[Facts], Any]


def _non_finite(facts: Facts) -> Tensor:
    return ~facts.official.flatten(1).isfinite().all(1) if facts.official.ndim > 1 else ~facts.official.isfinite()


def _below_zero(facts: Facts) -> Tensor:
    item = torch.arange(len(facts.t))
    return (item >= facts.n_diffusion) & (facts.t <= facts.epsilon) if facts.epsilon else torch.zeros(len(facts.t), dtype=torch.bool)


def _guided(facts: Facts) -> Tensor:
    if facts.window is None:
        return torch.zeros(len(facts.t), dtype=torch.bool)
    return facts.window | _non_finite(facts)


CUBE = "sigma_d cubed where A and B of the paper have its square, so a jump leaves the interpolant unless sigma_d is 1"
TWICE = "c_noise applied to t twice in the EMA passes; for a logarithm that is NaN, which 0 * NaN carries outside the window too"
STEP = "the finite difference steps below t = 0, where log t or the noise level is NaN"
WEIGHT = "tan t or t / (1 - t) beyond its pole makes a negative interval, and its root a NaN weight; ours is 0"
ROUNDED = "the noise level that the network receives, 999 t and the like, is rounded to bfloat16, steps of 4 in 999; ours is float32"
ZERO = "log 0 reaches the time embedding and the picture is NaN; ours refuses the grid"

RULES = (
    Rule(("EDM",), "x_r", CUBE, lambda f: f.sigma_d != 1),
    Rule(("EDM",), "F_target", CUBE, lambda f: (f.t != f.r) & (f.sigma_d != 1)),
    Rule(("EDM", "VP_SDE", "VE_SDE"), "F_t_cond", TWICE, lambda f: torch.ones(len(f.t), dtype=torch.bool)),
    Rule(("EDM", "VP_SDE", "VE_SDE"), "F_t_uncond", TWICE, lambda f: torch.ones(len(f.t), dtype=torch.bool)),
    Rule(("EDM", "VP_SDE", "VE_SDE"), "F_target", TWICE, _guided),
    Rule(("EDM", "VP_SDE", "VE_SDE"), "dF_dv_dt", STEP, _below_zero),
    Rule(("EDM", "VP_SDE", "VE_SDE"), "F_target", STEP, _below_zero),
    Rule(("TrigFlow", "EDM", "VP_SDE", "VE_SDE"), "time_weight", WEIGHT, lambda f: f.official.isnan()),
    Rule(("VP_SDE",), "F", ROUNDED, lambda f: f.dtype == torch.bfloat16),
    Rule(("EDM", "VE_SDE"), "x_final", ZERO, lambda f: not bool(f.official.isfinite().all())),
)


def deviating(quantity: str, facts: Facts, deviated) -> Any:
    """The items (B,) of a quantity in which some rule says that the official numbers are wrong, or a bool."""
    found: Any = False
    for rule in RULES:
        if rule.quantity == quantity and facts.transport in rule.transports:
            rows = rule.rows(facts)
            if bool(torch.as_tensor(rows).any()):
                deviated[f"{facts.transport} {quantity}: {rule.reason}"] += 1
                found = found | rows
    return found


# ------------------------------------------------------------------------------------------------------- the paper's formulas, once more


def paper(transport: str, sigma_d: float) -> SimpleNamespace:
    """alpha, sigma, alpha_hat, sigma_hat and c_noise of table 7, for float64 times."""
    s = sigma_d
    one, zero = torch.ones_like, torch.zeros_like

    def beta(t):
        return (torch.exp(0.5 * 19.9 * t * t + 0.1 * t) - 1).sqrt()

    def root(t):
        return (t * t + s * s).sqrt()

    rows = {
        "OT_FM": (lambda t: 1 - t, lambda t: t, lambda t: -one(t), one, lambda t: t),
        "TrigFlow": (torch.cos, torch.sin, lambda t: -torch.sin(t), torch.cos, lambda t: t),
        "EDM": (lambda t: 1 / root(t), lambda t: t / root(t), lambda t: t / (s * root(t)), lambda t: -s / root(t), lambda t: t.log() / 4),
        "VP_SDE": (
            lambda t: 1 / (beta(t) ** 2 + 1).sqrt(), lambda t: beta(t) / (beta(t) ** 2 + 1).sqrt(), zero, one, lambda t: 999 * t,
        ),
        "VE_SDE": (one, lambda t: t, zero, lambda t: -one(t), lambda t: (t / 2).log()),
    }  # fmt: skip
    return SimpleNamespace(**dict(zip(("alpha", "sigma", "alpha_hat", "sigma_hat", "c_noise"), rows[transport])))


def paper_jump(p: SimpleNamespace, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """A and B of section 3.1, in x_r = A x_t + B F."""
    C = p.sigma_hat(t) * p.alpha(t) - p.alpha_hat(t) * p.sigma(t)
    A = (p.alpha(r) * p.sigma_hat(t) - p.sigma(r) * p.alpha_hat(t)) / C
    B = (p.sigma(r) * p.alpha(t) - p.alpha(r) * p.sigma(t)) / C
    return A, B


def slope(function: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    return torch.func.jvp(function, (t,), (torch.ones_like(t),))[1]


def paper_target(p: SimpleNamespace, x: Tensor, z: Tensor, t: Tensor, r: Tensor, dF: Tensor, plain: Tensor | None = None) -> Tensor:
    """Eq. 9."""
    if plain is None:
        plain = p.alpha_hat(t) * x + p.sigma_hat(t) * z
    B, dB = paper_jump(p, t, r)[1], slope(lambda time: paper_jump(p, time, r)[1], t)
    return plain + B / dB * (slope(p.alpha_hat, t) * x + slope(p.sigma_hat, t) * z - dF)


def paper_weight(t: Tensor, r: Tensor, n_diffusion: int, sigma_d: float, kind: str, mode: str, both: bool) -> Tensor:
    """w(t, r); `mode` none, tangent or sigmoid. Without a value where the formula has none: 0."""
    warp = {"none": lambda u: u, "tangent": torch.tan, "sigmoid": lambda u: u / (1 - u)}[mode]
    delta = warp(t) - warp(r) if both else warp(t)
    weight = {
        "constant": lambda: delta**0,
        "reciprocal": lambda: (delta + sigma_d) ** -1,
        "sqrt": lambda: (delta + sigma_d) ** -0.5,
        "square": lambda: (delta + sigma_d) ** -2,
        "Soft-Min-SNR": lambda: (delta**2 + sigma_d**2) ** -1,
    }[kind]()
    weight = torch.where(weight.isnan(), 0.0, weight)
    weight[:n_diffusion] = 1
    return weight


def paper_objective(case: Case, model: TransitionTransformer, ema: TransitionTransformer | None, n: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every quantity of one objective case from table 7, Eq. 9, 10, 12, 13 and 51, for the recorded t and r."""
    entry, settings = case.entry, case.entry["transition_loss"]
    own = transport_of(entry["transport"], entry["transport_params"])
    p = paper(entry["transport"], own.sigma_d)
    dtype, first = n["in/x"].dtype, entry["n_diffusion"]
    x, z, t, r = (n[name].double() for name in ("in/x", "in/z", "out/t", "out/r"))

    def network(net, time, interval_end, y, items=slice(None)):
        x_t = p.alpha(time) * x[items] + p.sigma(time) * z[items]
        return net(x_t.to(dtype), p.c_noise(time).flatten().to(dtype), p.c_noise(interval_end).flatten().to(dtype), y[items])

    out: dict[str, Tensor] = {}
    rest = slice(first, None)
    out["dF_dv_dt"] = torch.zeros_like(x)
    if first < len(x):
        with torch.no_grad():
            if entry["derivative_type"] == "dde":
                epsilon = torch.full_like(t[rest], settings["differential_epsilon"])
                if entry["transport"] in ("EDM", "VP_SDE", "VE_SDE"):
                    epsilon = torch.where(t[rest] > epsilon, epsilon, t[rest] / 2)
                up = network(model, t[rest] + epsilon, r[rest], n["in/y"], rest)
                down = network(model, t[rest] - epsilon, r[rest], n["in/y"], rest)
                out["dF_dv_dt"][rest] = (up.double() - down.double()) / (2 * epsilon)
            else:
                with sdpa_kernel(SDPBackend.MATH):
                    out["dF_dv_dt"][rest] = slope(lambda time: network(model, time, r[rest], n["in/y"], rest).double(), t[rest])
    plain = p.alpha_hat(t) * x + p.sigma_hat(t) * z
    guidance = guidance_of(entry["transport_params"])
    if guidance.get("enhance_target"):
        with torch.no_grad():
            w, v = guidance.get("w_gt", 1.0), guidance.get("w_cond", 0.0)
            out["F_t_uncond"] = network(ema, t, t, n["in/y_null"]).double()
            out["F_t_cond"] = network(ema, t, t, n["in/y"]).double() if v > 0 else torch.zeros_like(x)
            inside = (t >= guidance.get("w_start", 0.0)) & (t <= guidance.get("w_end", 1.0))
            plain = torch.where(inside, w * plain + v * out["F_t_cond"] + (1 - w - v) * out["F_t_uncond"], plain)
    target = out["F_target"] = paper_target(p, x, z, t, r, out["dF_dv_dt"], plain)

    x_t = (p.alpha(t) * x + p.sigma(t) * z).to(dtype)
    F, projection = model(x_t, p.c_noise(t).flatten().to(dtype), p.c_noise(r).flatten().to(dtype), n["in/y"], return_projection=True)
    F = F.double()
    loss = ((F - target) ** 2).mean((1, 2, 3))
    if entry["use_dir_loss"]:
        loss = loss + (1 - (F * target).sum(1) / (F.norm(dim=1) * target.norm(dim=1))).mean((1, 2))
    mode = "tangent" if settings.get("weight_time_tangent") else "sigmoid" if settings.get("weight_time_sigmoid") else "none"
    weight = paper_weight(
        t.flatten(), r.flatten(), first, own.sigma_d, settings["weight_time_type"], mode, settings.get("weight_t_and_r", True)
    )
    out["denoising_loss"], out["time_weight"], out["adaptive_weight"] = loss, weight, 1 / (loss.detach() + 1e-5)
    out["weighted_loss"] = (weight * out["adaptive_weight"] * loss).mean()
    h, target = projection.double(), n["in/h_target"].double()
    proj_loss = (1 - (h * target).sum(-1) / (h.norm(dim=-1) * target.norm(dim=-1))).mean()
    model.zero_grad()
    (out["weighted_loss"] + entry["proj_coeff"] * proj_loss).backward()
    return {"out/" + name: value.detach() for name, value in out.items()} | gradients(model)


# ------------------------------------------------------------------------------------------------------------------------------ the cases


@dataclass(frozen=True)
class Case:
    kind: str
    name: str
    entry: Any = field(default=None, repr=False)
    file: str = ""

    def tensors(self) -> dict[str, Tensor]:
        return dict(load(self.file))

    @property
    def id(self) -> str:
        return f"{self.kind}/{self.name}"


@lru_cache(maxsize=8)
def load(file: str) -> dict[str, Tensor]:
    return load_file(ROOT / file)


def read(file: str) -> Any:
    return json.loads((ROOT / file).read_text(encoding="utf-8"))


def collect() -> list[Case]:
    """One Case per recorded case. A file that belongs to none of them becomes a case of kind "unknown", which fails."""
    present = {path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*") if path.is_file()}
    known = {"README.md"} | {file for file in present if file.startswith("weights/")}
    cases: list[Case] = []

    def add(kind: str, name: str, entry: Any, *files: str) -> None:
        known.update(files)
        cases.append(Case(kind, name, entry, files[0]))

    for kind in ("forward", "sampler", "objective"):
        if f"{kind}/cases.json" in present:
            known.add(f"{kind}/cases.json")
            for name, entry in read(f"{kind}/cases.json").items():
                add(kind, name, entry, entry["file"])
    if (file := "forward/rope_tables.safetensors") in present:
        names = {key if key.startswith("grid/") else key.split("/")[0] for key in load(file)}
        for name in sorted(names):
            add("rope_tables", name, None, file)
    if (file := "objective/t_r_sampling.safetensors") in present:
        known.add("objective/t_r_sampling.json")
        for name, entry in read("objective/t_r_sampling.json").items():
            add("t_r_sampling", name, entry, file)
    if (file := "objective/time_weighting.safetensors") in present:
        known.add("objective/time_weighting.json")
        for name in read("objective/time_weighting.json")["keys"]:
            add("time_weighting", name, read("objective/time_weighting.json")["sigma_d"], file)
    if (file := "objective/transport_functions.safetensors") in present:
        for name in sorted({key.split("/")[0] for key in load(file)}):
            add("transport_functions", name, None, file)
    for file in sorted(present):
        if file.startswith("keys/") and file.endswith(".json"):
            add("keys", Path(file).stem, None, file)
    if (file := "text/encode_prompt.safetensors") in present:
        entry = read("text/encode_prompt.json")
        folder = next(path for path in sorted(present) if path.startswith("text/") and path.endswith("/config.json"))
        folder = folder.rsplit("/", 1)[0]
        support = [path for path in present if path.startswith(folder + "/")]
        for form, prompts in entry["forms"].items():
            for number in range(len(prompts)):
                add("text", f"{form}/{number}", (entry, folder), file, "text/encode_prompt.json", *support)
        for batch in entry["trim"]:
            add("text", f"trim/{batch}", (entry, folder), file, "text/encode_prompt.json", *support)
    if (file := "dcae/cases.safetensors") in present:
        entry = read("dcae/cases.json")
        for name in entry["cases"]:
            add("dcae", name, entry, file, "dcae/cases.json", entry["weights"])
        for name in ("norm", "image_to_uint8"):
            add("dcae", name, entry, file)
    for file in sorted(present):
        if file.startswith("dcae/keys") and file.endswith(".json"):
            add("dcae_keys", Path(file).stem, None, file)
    cases += [Case("unknown", file) for file in sorted(present - known)]
    return cases


CASES = collect()


def test_there_are_cases():
    assert CASES, f"no reference cases under {ROOT}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_replay(case: Case, replayed, deviated):
    REPLAY.get(case.kind, _unknown)(case, deviated)
    replayed[case.kind] += 1


def _unknown(case: Case, deviated):
    pytest.fail(f"{case.name} belongs to no kind of case that this test knows")


# ----------------------------------------------------------------------------------------------------------------------------- comparison


def close(name: str, ours: Tensor, official: Tensor, tolerance: float, floor: float = 0.0) -> None:
    """Largest error over the largest official value (at least `floor`) within tolerance, and everything finite."""
    ours, official = torch.broadcast_tensors(ours.detach().double(), official.double())
    if official.numel() == 0:
        return
    assert official.isfinite().all(), f"{name}: the recorded numbers are not finite and no rule says why"
    assert ours.isfinite().all(), f"{name}: not finite"
    scale = max(official.abs().max().item(), floor) or 1.0
    error = (ours - official).abs().max().item() / scale
    assert error <= tolerance, f"{name}: error {error:.2e} of the largest value {scale:.3g}, tolerance {tolerance:.0e}"


def compare(name: str, ours: Tensor, official: Tensor, correct: Tensor | None, rows: Any, tolerance: float) -> None:
    """Ours against the official numbers, but where `rows` says that these are wrong, against the paper's."""
    if not bool(torch.as_tensor(rows).any()):
        close(name, ours, official, tolerance)
    elif ours.ndim == 0 or not torch.is_tensor(rows):
        close(f"{name} (by the paper)", ours, correct, tolerance)
    else:
        scale = correct.abs().max().item()
        close(name, ours[~rows], official[~rows], tolerance, scale)
        close(f"{name} (by the paper)", ours[rows], correct[rows], tolerance, scale)


def dtype_of(text: str) -> torch.dtype:
    return getattr(torch, text.split()[0])


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    found = {f"grad/{name}": value.grad.clone() for name, value in model.named_parameters()}
    found["out/grad_global_norm"] = torch.stack([value.double().pow(2).sum() for value in found.values()]).sum().sqrt()
    return found


# -------------------------------------------------------------------------------------------------------------------------------- network


def hints_of(config: TransformerConfig) -> dict[str, Any]:
    """What shapes and defaults cannot tell of a network, and no more: the rest has to be read from the shapes."""
    hints: dict[str, Any] = {"new_condition": config.new_condition, "encoder_depth": config.encoder_depth}
    if not config.qk_norm:
        hints["num_heads"] = config.num_heads
    if not config.null_class:
        hints["null_class"] = False
    return hints


def build(network: dict[str, Any], weights: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> TransitionTransformer:
    """The network from an official configuration; the weights alone, with what they cannot tell, must describe the same one."""
    config = official_config(network)
    assert TransformerConfig.from_state_dict(weights, hints_of(config)) == replace(config, lora_hidden_size=config.modulation_rank)
    model = TransitionTransformer(config, dtype=dtype)
    model.load_state_dict(weights)
    return model


def build_file(file: str, dtype: torch.dtype = torch.float32) -> TransitionTransformer:
    entries = read("weights/models.json")
    return build(next(entry["config"] for entry in entries.values() if entry["file"] == file), load(file), dtype)


def condition(y: Tensor, dtype: torch.dtype) -> Tensor:
    return y if y.dtype == torch.int64 else y.to(dtype)


# Largest error over the largest value (at least 1).
# The frequencies of the times are float32 in float64 cases, too, and an exponential has another last bit on processors not Intel's, where
# the cases were recorded.
ON_INTEL = (cpuinfo := Path("/proc/cpuinfo")).exists() and "GenuineIntel" in cpuinfo.read_text()
FORWARD_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10 if ON_INTEL else 1e-8}
BFLOAT16_FORWARD = 0.06  # absolute, on values of standard deviation 1


def replay_forward(case: Case, deviated) -> None:
    n = case.tensors()
    weights = {name[2:]: n.pop(name) for name in list(n) if name.startswith("w/")} or load(case.entry["weights"])
    stored = n["in/x"].dtype
    dtype = dtype_of(case.entry["dtype"]) if "dtype" in case.entry else stored
    half = dtype not in (torch.float32, torch.float64)
    model = build(case.entry["config"], weights, dtype)
    seen = _watch(model)
    with torch.no_grad():
        want_projection = "out/h_proj" in n
        arguments = (n["in/x"].to(dtype), n["in/t"], n["in/r"], condition(n["in/y"], dtype))
        answer = model(*arguments, return_projection=want_projection)
    height, width = (side // model.config.patch_size for side in n["in/x"].shape[-2:])
    seen["out/v"], seen["out/h_proj"] = answer if want_projection else (answer, None)
    seen["in/rope_grid"] = rope.positions(height, width, order="official")
    cos, sin = rope.rotary_table(model.config.head_dim, height, width, torch.device("cpu"), torch.float32, "official").unbind(-1)
    seen["mid/rope_cos"], seen["mid/rope_sin"] = cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
    seen["mid/t_freq"] = time_features(n["in/t"])

    for name, official in n.items():
        if name in ("in/x", "in/t", "in/r", "in/y"):
            continue
        if name.startswith("ref/"):
            continue  # below
        ours = seen[name].reshape(official.shape)
        if half and name.startswith("out/"):
            close(name, ours, official, BFLOAT16_FORWARD / max(official.abs().max().item(), 1.0), 1.0)
        elif half and name.startswith("mid/"):
            close(name, ours, official, BFLOAT16_FORWARD / 2, 1.0)
        else:
            close(name, ours, official, FORWARD_TOLERANCE[stored], 1.0)
    if "ref/v_fp32_math_fp32_rope" in n:
        # The same rounded weights and inputs in float32 arithmetic, with the float32 angles that training had. (The recording with rounded
        # angles, ref/v_fp32_math_bf16_rope, is what we do not do.)
        exact = build(case.entry["config"], {name: value.to(dtype).float() for name, value in weights.items()})
        with torch.no_grad():
            ours = exact(n["in/x"], n["in/t"], n["in/r"], condition(n["in/y"], torch.float32))
        close("ref/v_fp32_math_fp32_rope", ours, n["ref/v_fp32_math_fp32_rope"], FORWARD_TOLERANCE[torch.float32], 1.0)


def _watch(model: TransitionTransformer) -> dict[str, Tensor]:
    """The intermediate results of the next call, under their recorded names."""
    seen: dict[str, Tensor] = {}

    def watch(module: torch.nn.Module, name: str) -> None:
        module.register_forward_hook(lambda module, inputs, output: seen.__setitem__(f"mid/{name}", output))

    watch(model.x_embedder, "x_embed")
    watch(model.y_embedder, "y_embed")
    watch(model.final_layer, "final_layer")
    for i, block in enumerate(model.blocks):
        watch(block, f"block{i}")
        watch(block.adaLN_modulation, f"block{i}_adaln")
        watch(block.attn, f"block{i}_self_attn")
        watch(block.mlp, f"block{i}_mlp")
        if block.cross_attn is not None:
            watch(block.cross_attn, f"block{i}_cross_attn")
    embed_times = model.embed_times

    def embed_and_keep(*arguments: Any) -> tuple[Tensor, Tensor]:
        seen["mid/t_embed"], seen["mid/delta_embed"] = embed_times(*arguments)
        return seen["mid/t_embed"], seen["mid/delta_embed"]

    model.embed_times = embed_and_keep
    return seen


def replay_rope_tables(case: Case, deviated) -> None:
    n = case.tensors()
    if case.name.startswith("grid/"):
        height, width = map(int, case.name.split("/")[1].split("x"))
        assert torch.equal(rope.positions(height, width, order="official"), n[case.name].long())
        return
    assert case.name.startswith("head"), f"unknown table {case.name}"
    head_dim = int(case.name.removeprefix("head"))
    for name, official in n.items():
        if not name.startswith(case.name + "/"):
            continue
        what = name.split("/")[1]
        if what == "inv_freq":
            close(name, rope.inverse_frequencies(head_dim), official, 1e-6)
        elif what == "angles_fp32":
            # One row of tokens: the second half of the channels counts them.
            angles = rope.angles(head_dim, 1, len(official), order="official")[:, head_dim // 4 :]
            close(name, angles.repeat_interleave(2, -1), official, 1e-6)
        elif what in ("angles_bf16", "cos_bf16", "sin_bf16"):
            # What we do not do: our angles are never rounded. They must be what the official ones were rounded from.
            angles = rope.angles(head_dim, 1, len(official), order="official")[:, head_dim // 4 :].repeat_interleave(2, -1)
            rounded = angles.bfloat16()
            close(name, {"angles": rounded, "cos": rounded.cos(), "sin": rounded.sin()}[what.split("_")[0]], official, 1e-2)
        else:
            function, size = what.split("_")
            height, width = map(int, size.split("x"))
            table = rope.rotary_table(head_dim, height, width, torch.device("cpu"), torch.float32, "official")
            close(name, table[..., ("cos", "sin").index(function)].repeat_interleave(2, -1), official, 1e-6)


def replay_keys(case: Case, deviated) -> None:
    entry = read(case.file)
    config = official_config(entry["config"])
    model = TransitionTransformer(config, device="meta")
    ours = {name: list(value.shape) for name, value in model.state_dict().items()}
    assert ours == entry["parameters"]
    counts = {name: value.numel() for name, value in model.named_parameters()}
    without = sum(count for name, count in counts.items() if not name.startswith("projector."))
    assert sum(counts.values()) == entry["param_count"] and without == entry["param_count_without_projector"]
    assert len(ours) == entry["n_tensors"] and not [name for name, _ in model.named_buffers() if name in ours]

    weights = {name: torch.empty(shape, device="meta") for name, shape in entry["parameters"].items()}
    hints, whole = hints_of(config), replace(config, lora_hidden_size=config.modulation_rank)
    assert TransformerConfig.from_state_dict(weights, hints) == whole
    bare = {name: value for name, value in weights.items() if not name.startswith("projector.")}
    assert TransformerConfig.from_state_dict(bare, hints) == replace(whole, z_dim=None, projector_dim=2048)
    params = {}
    if entry["transport"] is not None:  # a network alone names none
        params = entry["transport"]["params"]
        transport_of(entry["transport"]["target"].rsplit(".", 1)[1], params)
    objective_of(entry["transition_loss"] or {}, params)


# ------------------------------------------------------------------------------------------------------------------ transports, objective


def transport_of(name: str, params: dict[str, Any] | str) -> Transport:
    params = {} if isinstance(params, str) else params
    names = {"epsilon_t": "T_min", "sigma_min": "T_min", "sigma_max": "T_max"}
    return TRANSPORTS[OURS[name]](**{names.get(key, key): value for key, value in params.items() if key not in GUIDANCE})


def guidance_of(params: dict[str, Any] | str) -> dict[str, Any]:
    return {} if isinstance(params, str) else {key: value for key, value in params.items() if key in GUIDANCE}


def objective_of(transition_loss: dict[str, Any], params: dict[str, Any] | str, **more: Any) -> ObjectiveConfig:
    settings = {{"differential_epsilon": "epsilon", "derivative_type": "derivative"}.get(k, k): v for k, v in transition_loss.items()}
    return ObjectiveConfig(**{**settings, **guidance_of(params), **more})


def objective_tolerance(name: str, transport: str, derivative: str, dtype: torch.dtype) -> float:
    """Largest error over the largest value. A finite difference multiplies rounding by 1 / (2 epsilon) = 100."""
    if dtype == torch.float64:
        if ON_INTEL or name in ("out/t", "out/r", "out/x_t", "out/v_t", "out/time_weight"):
            return 1e-10
        return FORWARD_TOLERANCE[dtype] if name in ("out/F_pred", "out/h_proj") or derivative == "jvp" else 1e-6
    if name in ("out/t", "out/r", "out/x_t", "out/v_t"):
        return 1e-6
    if name in ("out/F_pred", "out/h_proj") or derivative == "jvp":
        return 1e-5
    if name == "out/dF_dv_dt":
        return 1e-3
    if name == "out/F_target":
        return 5e-3 if transport in ("EDM", "VE_SDE") else 1e-3  # intervals up to 80 or 100 multiply the derivative's error
    if name.startswith("grad/") or name == "out/grad_global_norm":
        return 1e-4
    return 2e-3 if transport in ("EDM", "VE_SDE") else 5e-4


def replay_objective(case: Case, deviated) -> None:
    entry, n = case.entry, case.tensors()
    dtype, name, params = dtype_of(entry["dtype"]), entry["transport"], entry["transport_params"]
    n = {key: condition(value, dtype) if key.startswith("in/") else value for key, value in n.items()}
    transport = transport_of(name, params)
    derivative = entry["derivative_type"]
    config = objective_of(
        entry["transition_loss"], params, derivative=derivative, use_dir_loss=entry["use_dir_loss"], proj_coeff=entry["proj_coeff"]
    )
    assert entry["draws"] == {"normal": "torch.randn", "uniform": "torch.rand"}[transport.time_distribution]
    model = build_file(entry["model"], dtype)
    ema = build_file(entry["ema_model"], dtype) if entry["ema_model"] else None

    def losses_of(model, ema, n):
        losses = transition_loss(
            model,
            n["in/x"],
            n["in/z"],
            n["in/y"],
            transport=transport,
            config=config,
            raw_times=(n["in/rnd_1"], n["in/rnd_2"]),
            y_null=n.get("in/y_null"),
            ema_model=ema,
            h_target=n["in/h_target"],
        )
        losses.total.backward()
        return losses

    losses = losses_of(model, ema, n)
    assert losses.n_diffusion == entry["n_diffusion"] and len(n["in/x"]) == entry["batch_size"]
    names = {"h_proj": "projection", "dF_dv_dt": "dF_dt", "F_t_cond": "F_cond", "F_t_uncond": "F_null"}
    fields = ("x_t", "v_t", "t", "r", "F_pred", "h_proj", "dF_dv_dt", "F_t_cond", "F_t_uncond", "F_target")
    fields += ("denoising_loss", "time_weight", "adaptive_weight", "weighted_loss", "proj_loss")
    ours = {f"out/{field}": getattr(losses, names.get(field, field)) for field in fields} | gradients(model)
    for key, official in entry["loss_dict"].items():
        if f"out/{key}" not in entry["non_finite"]:
            n[f"loss_dict/{key}"], ours[f"loss_dict/{key}"] = torch.tensor(official, dtype=torch.float64), ours[f"out/{key}"].mean()

    facts = Facts(name, transport.sigma_d, t=n["out/t"].flatten(), r=n["out/r"].flatten(), n_diffusion=losses.n_diffusion)
    facts.epsilon = config.epsilon if derivative == "dde" else None
    facts.window = (facts.t >= config.w_start) & (facts.t <= config.w_end) if config.enhance_target else None
    rows: dict[str, Any] = {}
    for key in ("dF_dv_dt", "F_t_cond", "F_t_uncond", "F_target", "time_weight"):
        if f"out/{key}" in n:
            rows[f"out/{key}"] = deviating(key, replace(facts, official=n[f"out/{key}"]), deviated)
    # What follows from a quantity differs with it.
    rows["out/denoising_loss"] = rows["out/adaptive_weight"] = rows["out/F_target"]
    everything = bool(torch.as_tensor(rows["out/F_target"] | rows["out/time_weight"]).any())
    correct = paper_objective(case, model, ema, n) if any(bool(torch.as_tensor(value).any()) for value in rows.values()) else {}
    correct |= {"loss_dict/denoising_loss": correct["out/denoising_loss"].mean()} if correct else {}
    correct |= {"loss_dict/weighted_loss": correct["out/weighted_loss"]} if correct else {}

    exact: dict[str, Tensor] = {}
    if name == "VE_SDE" and derivative == "dde" and dtype == torch.float32 and not everything:
        # The finite difference's float32 rounding, up to F_target's tolerance, is in these gradients: only float64 can hold them to more.
        model64 = build_file(entry["model"], torch.float64)
        ema64 = build_file(entry["ema_model"], torch.float64) if ema else None
        n64 = {key: condition(value, torch.float64) for key, value in n.items() if key.startswith("in/")}
        losses64 = losses_of(model64, ema64, n64)
        exact = gradients(model64)
        n64 |= {"out/t": losses64.t, "out/r": losses64.r}
        reference = paper_objective(case, model64, ema64, n64)
        exact = {key: value for key, value in exact.items() if key in n}
        for key, value in exact.items():
            close(f"{key} in float64 (by the paper)", value, reference[key], 1e-6)

    for key, official in n.items():
        if key.startswith("in/"):
            continue
        if key in exact:
            rounding = objective_tolerance("out/F_target", name, derivative, dtype)
            close(f"{key}: official against float64", official, exact[key], rounding)
            close(f"{key}: ours against float64", ours[key], exact[key], rounding)
            continue
        follows = key.startswith("grad/") or key in ("out/weighted_loss", "out/grad_global_norm")
        follows = follows or key in ("loss_dict/denoising_loss", "loss_dict/weighted_loss")
        compare(
            key, ours[key], official, correct.get(key), everything if follows else rows.get(key, False),
            objective_tolerance(key, name, derivative, dtype),
        )  # fmt: skip


def replay_t_r_sampling(case: Case, deviated) -> None:
    entry = case.entry
    n = {key.split("/")[1]: value for key, value in case.tensors().items() if key.startswith(case.name + "/")}
    transport = transport_of(entry["transport"], entry["params"])
    config = ObjectiveConfig(diffusion_ratio=entry["diffusion_ratio"], consistency_ratio=entry["consistency_ratio"])
    t, r, n_diffusion = sample_times((n["rnd_1"], n["rnd_2"]), transport, config)
    for name, ours in {"t": t, "r": r, "t_1": transport.times(n["rnd_1"]), "t_2": transport.times(n["rnd_2"])}.items():
        close(name, ours, n.pop(name), 1e-6)
    assert not n.keys() - {"rnd_1", "rnd_2"}
    assert (n_diffusion, len(t), transport.T_min) == (entry["n_diffusion"], entry["batch_size"], entry["r_floor"])
    assert int((r[len(r) - entry["n_consistency"] :] == transport.T_min).sum()) == entry["n_consistency"]


def replay_time_weighting(case: Case, deviated) -> None:
    n = case.tensors()
    name, kind, mode, operands = case.name.split("/")
    sigma_d = case.entry[name]
    config = ObjectiveConfig(
        weight_time_type=kind,
        weight_time_tangent=mode in ("tangent", "both"),
        weight_time_sigmoid=mode in ("sigmoid", "both"),
        weight_t_and_r={"t_and_r": True, "t_only": False}[operands],
    )
    t, r, count = n[f"{name}/t"].flatten(), n[f"{name}/r"].flatten(), int(n[f"{name}/n_diffusion"])
    official = n[case.name]
    rows = deviating("time_weight", Facts(name, sigma_d, official, t, r, count), deviated)
    plain = "tangent" if mode == "both" else mode
    correct = paper_weight(t.double(), r.double(), count, sigma_d, kind, plain, config.weight_t_and_r)
    compare(case.name, time_weight(t, r, count, sigma_d, config), official, correct, rows, 1e-5)


def replay_transport_functions(case: Case, deviated) -> None:
    n = {key.removeprefix(case.name + "/"): value for key, value in case.tensors().items() if key.startswith(case.name + "/")}
    transport = transport_of(case.name, "class defaults")
    x, z, t, r, F, dF = (n.pop(key) for key in ("x", "z", "t", "r", "F", "dF_dv_dt"))
    config = ObjectiveConfig(enhance_target=True, w_gt=0.9, w_cond=0.6, w_start=n.pop("w_start").item(), w_end=n.pop("w_end").item())
    F_cond, F_null = n.pop("F_t_cond"), n.pop("F_t_uncond")
    plain = transport.diffusion_target(x, z, t)
    guided = guided_target(plain, F_cond, F_null, t, config)
    zero = torch.zeros_like(dF)
    ours = {
        "alpha": transport.alpha(t),
        "sigma": transport.sigma(t),
        "d_alpha": transport.d_alpha(t),
        "d_sigma": transport.d_sigma(t),
        "c_noise_t": transport.c_noise(t),
        "x_t": transport.interpolate(x, z, t),
        "v_t": transport.velocity(x, z, t),
        "x_r": transport.step(n["x_t"], F, t, r),
        "F_target": transport.target(x, z, t, r, dF),
        "F_target_dF0_r_eq_t": transport.target(x, z, t, t, zero),
        "F_target_enhanced": transport.target(x, z, t, r, dF, guided),
    }
    p = paper(case.name, transport.sigma_d)
    x, z, t64, r64, dF, F = (value.double() for value in (x, z, t, r, dF, F))
    A, B = paper_jump(p, t64, r64)
    correct = {
        "x_r": A * n["x_t"].double() + B * F,
        "F_target": paper_target(p, x, z, t64, r64, dF),
        "F_target_enhanced": paper_target(p, x, z, t64, r64, dF, guided.double()),
        "F_target_dF0_r_eq_t": paper_target(p, x, z, t64, t64, zero.double()),
    }
    facts = Facts(case.name, transport.sigma_d, t=t.flatten(), r=r.flatten())
    for key, official in n.items():
        times = replace(facts, official=official, r=facts.t if key.endswith("r_eq_t") else facts.r)
        rows = deviating("F_target" if key.startswith("F_target") else key, times, deviated)
        compare(key, ours[key], official, correct.get(key), rows, 1e-5)
        if key in correct:
            close(f"{key} (by the paper)", ours[key], correct[key], 1e-5)


# -------------------------------------------------------------------------------------------------------------------------------- sampler

# Largest error over the largest value. The official bfloat16 sampler rounds times and rotary angles too, ours does not.
SAMPLER_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.04, torch.float64: 1e-10}


def replay_sampler(case: Case, deviated) -> None:
    entry, n = case.entry, case.tensors()
    dtype, name = dtype_of(entry["model_dtype"]), entry["transport"]
    transport = replace(transport_of(name, entry["transport_params"]), sigma_d=entry["sigma_d"])
    p = paper(name, transport.sigma_d)
    model = build_file(entry["model"], dtype)
    grid = schedule.uniform(entry["num_steps"], entry["T_max"], entry["T_min"])
    calls: list[tuple[Tensor, Tensor, int]] = []
    states: list[dict[str, Any]] = []
    noise = list(n["in/noise"]) if "in/noise" in n else []
    drawn: list[int] = []

    def network(x, t, r, y):
        assert x.dtype == dtype and t.dtype == r.dtype and t.dtype in (torch.float32, torch.float64)
        calls.append((t[0], r[0], len(x)))
        return model(x, t, r, y)

    def next_noise(t, r):
        drawn.append(states[-1]["i"])
        return noise[len(drawn) - 1]

    def run():
        return sample(
            network,
            n["in/z"].to(dtype),
            grid,
            condition(n["in/y"], dtype),
            condition(n["in/y_null"], dtype),
            transport=transport,
            mode={"transition": "transition", "ddiffusion": "diffusion"}[entry["sample_type"]],
            cfg=entry["cfg_scale"],
            guidance_interval=(entry["cfg_low"], entry["cfg_high"]),
            stochasticity=entry["stochasticity_ratio"],
            noise_sampler=next_noise,
            T_max=entry["T_max"],
            T_min=entry["T_min"],
            callback=states.append,
        )

    if deviating("x_final", Facts(name, transport.sigma_d, n["out/x_final"]), deviated):
        with pytest.raises(TimError):
            run()
        return
    final, nfe = run()

    guided = entry["cfg_applied_per_step"]
    assert [size == 2 * len(n["in/z"]) for _, _, size in calls] == guided
    assert nfe == len(guided) + sum(guided)
    assert drawn == entry["noise_drawn_steps"] and len(noise) == len(drawn)
    assert [ratio > 0 for ratio in n.pop("s_ratio").tolist()] == [i in drawn for i in range(len(guided))] or not transport.stochastic
    time_tolerance = 1e-6 if dtype != torch.bfloat16 else 2**-8
    for key, ours in (("t_cur", grid[:-1]), ("t_next", grid[1:])):
        close(key, ours, n.pop(key), time_tolerance, 1.0)
    for key, ours in (("t_model", [t for t, _, _ in calls]), ("r_model", [r for _, r, _ in calls])):
        close(key, torch.stack(ours), n[key], time_tolerance, 1.0)

    xs = torch.stack([state["x"] for state in states] + [final])
    Fs = torch.stack([state["F"] for state in states])
    tolerance = SAMPLER_TOLERANCE[dtype]
    recorded = {"out/xs": xs, "out/F": Fs, "out/x_final": final}
    rounded = deviating("F", Facts(name, transport.sigma_d, dtype=dtype), deviated)
    if deviating("x_r", Facts(name, transport.sigma_d), deviated) or rounded:
        # The paths part after the first network call: each step by the paper's formula, and our network on the official states.
        for i, (t, r) in enumerate(zip(grid[:-1], grid[1:])):
            A, B = paper_jump(p, t, r)
            close(f"step {i} (by the paper)", xs[i + 1], A * xs[i].double() + B * Fs[i].double(), tolerance)
        recorded = {"out/xs": None, "out/F": None, "out/x_final": None}
        for i in range(len(guided) if "out/F" in n else 0):
            with torch.no_grad():
                x = n["out/xs"][i].to(dtype)
                t, r = (n[key][i].to(torch.float32).expand(len(x)) for key in ("t_model", "r_model"))
                F = model(x, t, r, condition(n["in/y"], dtype))
                if guided[i]:
                    F_null = model(x, t, r, condition(n["in/y_null"], dtype))
                    F = F_null + entry["cfg_scale"] * (F - F_null)
            close(f"out/F[{i}] on the official state", F, n["out/F"][i], 4 * tolerance)
        if "out/F" in n and not rounded:
            close("out/F[0]", Fs[0], n["out/F"][0], tolerance)
    for key, official in n.items():
        if key.startswith("out/") and recorded[key] is not None:
            close(key, recorded[key], official, tolerance)
        else:
            assert key in ("in/z", "in/y", "in/y_null", "in/noise", "t_model", "r_model") or key.startswith("out/"), f"unknown tensor {key}"


# ------------------------------------------------------------------------------------------------------------------------------ text, VAE

TEXT_TOLERANCE = 5e-5  # absolute
BFLOAT16_TEXT = 0.15


@lru_cache(maxsize=4)
def text_encoder(folder: str, escape: bool, dtype: torch.dtype):
    from tim_core.models.text_encoder import TextEncoder
    from tim_core.models.tokenizer import Tokenizer, tokenizer_file

    tokenizer = Tokenizer.from_bytes(tokenizer_file(ROOT / folder).read_bytes())
    encoder = TextEncoder(json.loads((ROOT / folder / "config.json").read_text()), tokenizer, escape=escape)
    weights = {key.removeprefix("model."): value for key, value in load(f"{folder}/model.safetensors").items() if key != "lm_head.weight"}
    return encoder.load(weights, dtype)


def replay_text(case: Case, deviated) -> None:
    (entry, folder), n = case.entry, case.tensors()
    encoder = text_encoder(folder, False, torch.float32)
    form, name = case.name.split("/", 1)
    if form == "trim":
        batch = entry["trim"][name]
        y, y_null = encoder.conditioning(batch["prompts"])
        assert list(y.shape) == batch["y_shape"] and list(y_null.shape) == batch["y_null_shape"]
        for key, ours in (("y", y), ("y_null", y_null)):
            official = n[f"trim/{name}/{key}"]
            assert (ours[:, : official.shape[1]] - official).abs().max() <= TEXT_TOLERANCE
        return

    number, prompt = int(name), entry["forms"][form][int(name)]
    ids, mask = encoder.tokenize([prompt])
    length = int(n[f"{form}/lengths"][number])
    assert torch.equal(ids[0], n[f"{form}/input_ids"][number].long()) and torch.equal(mask[0], n[f"{form}/attention_mask"][number].bool())
    if form == "escaped" and "raw" in entry["forms"]:
        escaping = text_encoder(folder, True, torch.float32)
        assert torch.equal(escaping.tokenize([entry["forms"]["raw"][number]])[0], ids)
    before_last: list[Tensor] = []
    last = encoder.transformer.layers[-1]
    hook = last.register_forward_pre_hook(lambda module, args, kwargs: before_last.append(args[0]), with_kwargs=True)
    features = encoder.encode([prompt])
    hook.remove()
    assert features.lengths == [length]
    kinds = {key.split("/")[1] for key in n if key.startswith(form + "/") and key.endswith(f"/{number}")}
    for kind in kinds:
        official = n[f"{form}/{kind}/{number}"]
        ours, rows, tolerance = features.rows[0], len(official), TEXT_TOLERANCE
        if kind == "feats_sdpa":
            rows = min(rows, length)  # here a pad row attends to the prompt; in the official pipeline, and so in ours, it does not
        elif kind == "feats_fa2_bf16":
            ours, tolerance = text_encoder(folder, False, torch.bfloat16).encode([prompt]).rows[0], BFLOAT16_TEXT
        elif kind == "hidden_minus2_fa2":
            ours = before_last[0][0]
            ours = torch.cat((ours, ours[-1:].expand(max(rows - len(ours), 0), -1)))  # every pad row is the same
        else:
            assert kind == "feats_fa2", f"unknown tensor {form}/{kind}/{number}"
        assert (ours[:rows].float() - official[:rows]).abs().max() <= tolerance, kind


@lru_cache(maxsize=1)
def autoencoder(file: str):
    from tim_core.models.autoencoder import Autoencoder
    from tim_core.models.config import AutoencoderConfig

    entry = read(file)
    model = Autoencoder(AutoencoderConfig.from_diffusers(entry["config"]))
    model.load_state_dict(load(entry["weights"]))
    return model.eval()


IMAGE_TOLERANCE, LATENT_TOLERANCE = 5e-5, 1e-4  # absolute


@torch.no_grad()
def replay_dcae(case: Case, deviated) -> None:
    entry = case.entry
    model = autoencoder("dcae/cases.json")
    n = {key.removeprefix(case.name + "/"): value for key, value in case.tensors().items() if key.startswith(case.name + "/")}
    scale = model.config.scaling_factor
    if case.name == "norm":
        # latent = (raw - mean) / std
        assert (n["mean"] == 0).all() and (n["std"] * scale - 1).abs().max() < 1e-6
        return
    if case.name == "image_to_uint8":
        # A image is (x + 1) / 2 within [0, 1]; 8 bits are its 255-fold, truncated, as ComfyUI saves it.
        values = torch.tensor(entry["image_to_uint8"]["values"], dtype=torch.float64)
        image = ((values + 1) / 2).clamp(0, 1)[None, :, None].expand(1, -1, 3)
        bits = torch.from_numpy(np.asarray(to_pil(image)).copy())[0, :, 0]
        assert bits.tolist() == entry["image_to_uint8"]["other_scripts_x_plus_1_half_times_255"]
        return

    encode, decode = model.encode, model.decode
    settings = entry["cases"][case.name]
    if isinstance(settings, dict):
        tiles = settings["enable_tiling"]
        tile, stride = ((tiles[f"tile_sample_{what}_height"], tiles[f"tile_sample_{what}_width"]) for what in ("min", "stride"))
        encode = lambda x: model.tiled_encode(x, tile, stride)  # noqa: E731
        decode = lambda z: model.tiled_decode(z, tile, stride)  # noqa: E731
    ours = {}
    if "image" in n:
        ours["latent_normalised"] = encode(n["image"])
        ours["enc_raw"] = ours["latent_normalised"] / scale
    if "dec_in_normalised" in n:
        ours["dec_image"] = decode(n["dec_in_normalised"])
    assert not n.keys() - ours.keys() - {"image", "dec_in_normalised"}, "unknown tensors"
    for key in ours.keys() & n.keys():
        assert ours[key].shape == n[key].shape
        assert (ours[key] - n[key]).abs().max() <= (IMAGE_TOLERANCE if key == "dec_image" else LATENT_TOLERANCE), key


def replay_dcae_keys(case: Case, deviated) -> None:
    from tim_core.models.autoencoder import Autoencoder
    from tim_core.models.config import AutoencoderConfig

    entry = read(case.file)
    model = Autoencoder(AutoencoderConfig.from_diffusers(entry["config"]), device="meta")
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == entry["parameters"]
    assert sum(value.numel() for value in model.parameters()) == entry["param_count"]


REPLAY: dict[str, Callable[[Case, Any], None]] = {
    "forward": replay_forward,
    "rope_tables": replay_rope_tables,
    "keys": replay_keys,
    "sampler": replay_sampler,
    "objective": replay_objective,
    "t_r_sampling": replay_t_r_sampling,
    "time_weighting": replay_time_weighting,
    "transport_functions": replay_transport_functions,
    "text": replay_text,
    "dcae": replay_dcae,
    "dcae_keys": replay_dcae_keys,
}


def test_keys_of_a_network_alone(tmp_path, monkeypatch):
    """Another mlp_ratio, no qk-norm, no null class and no transport."""
    network = dict(in_channels=4, hidden_size=32, depth=2, num_heads=2, num_classes=5, class_dropout_prob=0, mlp_ratio=2, z_dim=None)
    model = TransitionTransformer(official_config(network), device="meta")
    parameters = {name: list(value.shape) for name, value in model.state_dict().items()}
    assert parameters["blocks.0.mlp.fc1_g.weight"] == [42, 32]
    count = sum(value.numel() for value in model.parameters())
    entry = {"config": network, "parameters": parameters, "n_tensors": len(parameters), "transport": None, "transition_loss": None}
    entry |= {"param_count": count, "param_count_without_projector": count}
    (tmp_path / "tiny.json").write_text(json.dumps(entry))
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    replay_keys(Case("keys", "tiny", None, "tiny.json"), {})
