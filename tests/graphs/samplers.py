"""Every kind of stock sampler: with enough steps, and with too few, which the log says."""

from tests.graphs.case import Case, Draws, Equals, Runs, refused

FLOW = 30  # steps from time 1 to 0 that samplers without an end time need
ENOUGH = (
    "euler_ancestral", "heun", "heunpp2", "dpm_2", "lms", "dpm_fast", "dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_2m", "dpmpp_2m_sde",
    "dpmpp_3m_sde", "ddpm", "ipndm", "deis", "res_multistep", "gradient_estimation", "er_sde", "seeds_2", "sa_solver", "uni_pc",
    "uni_pc_bh2", "exp_heun_2_x0",
)
CFG_PP = ("euler_cfg_pp", "euler_ancestral_cfg_pp", "dpmpp_2m_cfg_pp", "res_multistep_cfg_pp", "gradient_estimation_cfg_pp")
NAMED_OTHERWISE = {"uni_pc": "unipc", "uni_pc_bh2": "unipc_bh2"}  # in the log, as core's function is
TOO_FEW = {name: 4 for name in ENOUGH} | {"seeds_3": 8, "sa_solver_pece": 29, "ipndm_v": 8}
SAMPLER_NODES = {
    "SamplerEulerAncestral": {}, "SamplerLMS": {}, "SamplerDPMPP_3M_SDE": {},
    "SamplerDPMPP_2M_SDE": {}, "SamplerDPMPP_SDE": {}, "SamplerDPMPP_2S_Ancestral": {}, "SamplerER_SDE": {}, "SamplerSEEDS2": {},
}


def stock(name, steps, **settings):
    return lambda g: g.stock(sampler_name=name, steps=steps, **settings)


def few(name, steps, *advice):
    return ((NAMED_OTHERWISE.get(name, name), f"{FLOW} steps", f"not {steps}", *(advice or ("TiM Sampler",))),)


def select(kind, **settings):
    """SamplerCustom with a SAMPLER from a node of its own, in 30 steps."""
    return lambda g: g.custom(g.simple(FLOW), g.node(kind, **settings))


CASES = [
    Case("plain", lambda g: g.stock(), Draws()),
    Case("plain, TiM Sampler", lambda g: g.tim(), Draws()),
    *(Case(f"euler, {n} steps", stock("euler", n), Equals(lambda g, n=n: g.tim(steps=n))) for n in (1, 2, 5, 8)),
    Case("ddim", stock("ddim", 4), Equals(lambda g: g.tim())),
    *(Case(f"lcm, {n} steps", stock("lcm", n), Draws(4)) for n in (1, 2, 4)),
    *(Case(f"{name}, {FLOW} steps", stock(name, FLOW), Draws(1, count=2)) for name in ENOUGH),
    *(Case(f"{name}, {steps} steps", stock(name, steps), Runs(), few(name, steps)) for name, steps in TOO_FEW.items()),
    *(Case(f"{name}, {FLOW} steps, cfg 1", stock(name, FLOW, cfg=1.0), Draws(4)) for name in CFG_PP),
    *(Case(f"{name}, 8 steps, cfg 2.5", stock(name, 8), Runs(), ((name, "CFG++", "1"), *few(name, 8))) for name in CFG_PP),
    Case("dpm_adaptive chooses its steps", stock("dpm_adaptive", 4), Draws(1, count=2)),
    *(Case(kind, select(kind, **settings), Draws(1, count=2)) for kind, settings in SAMPLER_NODES.items()),
    Case("SamplerSASolver", lambda g: g.custom(g.simple(FLOW), g.node(
        "SamplerSASolver", model=g.model, use_pece=False, simple_order_2=False)), Draws(1, count=2)),
    Case("SamplerDPMAdaptative", select("SamplerDPMAdaptative"), Draws(1, count=2)),
    Case("SamplerLCM", lambda g: g.custom(g.simple(4), g.node("SamplerLCM")), Draws(4)),
    Case("no steps are too few after half the time", stock("heun", 15, denoise=0.5), Runs(), (("empty", "0.5"),)),
    Case("cfg 1", stock("euler", 4, cfg=1.0), Equals(lambda g: g.tim(cfg=1.0))),
    Case("cfg 8", stock("euler", 8, cfg=8.0), Equals(lambda g: g.tim(steps=8, cfg=8.0))),
    Case("stock sampler with TiM's times", lambda g: g.custom(g.node("TiMScheduler")), Equals(lambda g: g.tim())),
    Case("TiM's sampler with stock times", lambda g: g.custom(g.simple(), g.node("TiMSamplerSelect")), Equals(lambda g: g.stock())),
    Case("diffusion mode", lambda g: g.custom(g.simple(FLOW), g.node("TiMSamplerSelect", mode="diffusion")),
         Draws(1, count=2)),
    Case("a seed beyond 63 bits", stock("euler", 2, seed=2**64 - 1), Equals(lambda g: g.tim(steps=2, seed=2**64 - 1))),
    refused("add_noise off at time 1", lambda g: g.tim(add_noise=False), "add_noise", "off", "1"),
]
