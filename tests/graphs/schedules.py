"""Times: every scheduler, nodes that cut, turn and shift them, and runs that are split."""

from tests.graphs.case import Case, Draws, Equals, Runs, grey, refused

KARRAS = ("outside 0 to 1", "BasicScheduler")
SHIFTS = {
    "ModelSamplingSD3": dict(shift=3.0), "ModelSamplingAuraFlow": dict(shift=1.73), "ModelSamplingFlux": {}, "ModelSamplingLTXV": {},
    "MiniMaxH3SigmaShift": {},
}
LONG_STEP = {"MiniMaxH3SigmaShift": (("cfg", "0.8", "too long"),)}  # its shift is 12; said by each run
OTHER_KINDS = {
    "ModelSamplingDiscrete": {}, "ModelSamplingContinuousEDM": {}, "ModelSamplingContinuousV": {}, "ModelSamplingStableCascade": {},
}


def scheduled(name, steps):
    return lambda g: g.stock(scheduler=name, steps=steps)


def ours(g, sigmas):
    return g.custom(sigmas, g.node("TiMSamplerSelect"))


def ours_in(g, mode, steps):
    return g.custom(g.simple(steps), g.node("TiMSamplerSelect", mode=mode))


def shifted(kind, settings, method):
    return lambda g: getattr(g.patch(kind, **settings), method)()


def split(g):
    """Two samplers; the second continues the run of the first."""
    both = g.node("SplitSigmas", sigmas=g.simple(4), step=2)
    first = g.custom(both)
    return g.custom([both[0], 1], latent=first, add_noise=False)


def split_denoise(g):
    both = g.node("SplitSigmasDenoise", sigmas=g.simple(4), denoise=0.5)
    return g.custom([both[0], 1], latent=g.custom(both), add_noise=False)


def advanced(g, name="euler", steps=4, middle=2):
    half = g.stock(kind="KSamplerAdvanced", steps=steps, sampler_name=name, add_noise="enable", start_at_step=0, end_at_step=middle,
                   return_with_leftover_noise="enable")
    return g.stock(half, kind="KSamplerAdvanced", steps=steps, sampler_name=name, add_noise="disable", start_at_step=middle,
                   end_at_step=10000, return_with_leftover_noise="disable")


def manual(text):
    return lambda g: g.custom(g.node("ManualSigmas", sigmas=text))


def inverted(g, steps):
    """An image taken back to noise by rising times, and drawn again from there."""
    rising = g.node("FlipSigmas", sigmas=g.node("ManualSigmas", sigmas=", ".join(f"{0.98 * i / steps:.4f}" for i in range(steps, -1, -1))))
    return g.custom(rising, latent=g.tim(g.empty(), seed=1), add_noise=False)


CASES = [
    *(Case(f"{name}, 4 steps", scheduled(name, 4), Draws(4))
      for name in ("sgm_uniform", "karras", "exponential", "normal", "kl_optimal", "beta", "linear_quadratic")),
    *(Case(f"{name}, 1 step", scheduled(name, 1), Draws(4)) for name in ("simple", "sgm_uniform", "karras", "normal")),
    Case("ddim_uniform, 16 steps", scheduled("ddim_uniform", 16), Draws(1, count=2)),
    Case("ddim_uniform, 1 step begins near time 0", scheduled("ddim_uniform", 1), Runs(), (("empty", "0.002", "simple"),)),
    Case("ddim_uniform, 4 steps begins at 0.75", scheduled("ddim_uniform", 4), Runs(), (("empty", "0.752"),)),
    refused("kl_optimal, 1 step has no times", scheduled("kl_optimal", 1), "sigmas", "nan", "scheduler"),
    refused("kl_optimal, 1 step, TiM's sampler", lambda g: ours(g, g.node(
        "BasicScheduler", model=g.model, scheduler="kl_optimal", steps=1)), "sigmas", "nan"),
    *(Case(f"{kind} with a stock sampler", lambda g, kind=kind: g.custom(g.node(kind)), Runs(), (KARRAS,))
      for kind in ("KarrasScheduler", "ExponentialScheduler", "PolyexponentialScheduler", "LaplaceScheduler", "AlignYourStepsScheduler",
                   "GITSScheduler", "VPScheduler")),
    *(refused(f"{kind} with TiM's sampler", lambda g, kind=kind: ours(g, g.node(kind)), "sigmas", "outside 0 to 1", "TiM Scheduler")
      for kind in ("KarrasScheduler", "ExponentialScheduler", "AlignYourStepsScheduler", "VPScheduler")),
    Case("BetaSamplingScheduler", lambda g: g.custom(g.node("BetaSamplingScheduler", model=g.model, steps=8)), Draws(4)),
    Case("SDTurboScheduler", lambda g: g.custom(g.node("SDTurboScheduler", model=g.model, steps=4, denoise=1.0)), Runs(), (KARRAS,)),
    Case("LTXVScheduler", lambda g: g.custom(g.node("LTXVScheduler", steps=8)), Draws(4)),
    Case("OptimalStepsScheduler", lambda g: g.custom(g.node("OptimalStepsScheduler", steps=8)), Draws(4)),
    Case("Flux2Scheduler", lambda g: g.custom(g.node("Flux2Scheduler", steps=8)), Draws(4)),
    Case("simple times by hand", manual("1, 0.75, 0.5, 0.25, 0"), Equals(lambda g: g.tim())),
    Case("times by hand, uneven", manual("1, 0.8, 0.35, 0.1, 0"), Equals(lambda g: g.custom(
        g.node("TiMScheduler", times="1, 0.8, 0.35, 0.1, 0")))),
    Case("times by hand for another kind of model", manual("14.6, 3.1, 0.9, 0"), Runs(), (KARRAS,)),
    Case("SetFirstSigma", lambda g: g.custom(g.node("SetFirstSigma", sigmas=g.simple(4), sigma=0.99)), Draws()),
    Case("SetFirstSigma, another kind of model", lambda g: g.custom(g.node("SetFirstSigma", sigmas=g.simple(4), sigma=136.0)), Runs(),
         (("136", "outside 0 to 1"),)),
    Case("ExtendIntermediateSigmas", lambda g: g.custom(g.node("ExtendIntermediateSigmas", sigmas=g.simple(4), steps=2)), Draws()),
    Case("SplitSigmas", split, Equals(lambda g: g.tim())),
    Case("SplitSigmasDenoise", split_denoise, Equals(lambda g: g.tim())),
    Case("KSamplerAdvanced in two", advanced, Equals(lambda g: g.tim())),
    Case("heun in two", lambda g: advanced(g, "heun", 30, 15), Equals(
        lambda g: g.stock(sampler_name="heun", steps=30), count=1)),
    Case("KSamplerAdvanced without its noise", lambda g: g.stock(
        kind="KSamplerAdvanced", add_noise="disable", start_at_step=0, end_at_step=4, return_with_leftover_noise="disable"), Runs(),
        (("noise", "none is added", "add_noise"),)),
    Case("DisableNoise at time 1", lambda g: g.advanced(
        g.node("BasicGuider", model=g.model, conditioning=g.positive), g.simple(), noise=g.node("DisableNoise")), Runs(),
        (("noise", "none is added"),)),
    Case("DisableNoise on an image at time 1", lambda g: g.custom(g.simple(), latent=grey(g), add_noise=False), Runs(),
         (("noise", "none is added"),)),
    Case("KSamplerAdvanced from its middle, empty", lambda g: g.stock(
        kind="KSamplerAdvanced", add_noise="enable", start_at_step=2, end_at_step=4, return_with_leftover_noise="disable"), Runs(),
        (("empty", "0.5"),)),
    Case("denoise 0.5 on an empty latent", lambda g: g.stock(denoise=0.5), Runs(), (("empty", "0.5", "denoise 1"),)),
    Case("denoise 0.5 on an empty latent, TiM Sampler", lambda g: g.tim(start=0.5), Runs(), (("empty", "0.5"),)),
    Case("denoise 0.5 on an image", lambda g: g.stock(g.tim(seed=1), denoise=0.5, seed=2), Equals(lambda g: g.tim(
        g.tim(seed=1), start=0.5, seed=2))),
    Case("denoise 0.01 keeps the image", lambda g: g.stock(g.tim(seed=1), denoise=0.01, seed=2), Equals(lambda g: g.tim(seed=1), 0.5)),
    Case("rising times, few", lambda g: inverted(g, 4), Runs(), (("rise", "30 steps", "not 4"),)),
    Case("rising times, many", lambda g: inverted(g, 40), Runs()),
    refused("rising times to pure noise", lambda g: g.custom(g.node("FlipSigmas", sigmas=g.simple(4)), latent=grey(g), add_noise=False),
            "sigmas", "end at 1", "below 1"),
    refused("rising times, TiM's sampler", lambda g: g.custom(g.node("FlipSigmas", sigmas=g.node("ManualSigmas", sigmas="0.9, 0.5, 0.2")),
                                                              g.node("TiMSamplerSelect"), grey(g)), "sigmas", "0.5", "smaller"),
    *(Case(f"{kind}, TiM Sampler as KSampler", shifted(kind, settings, "tim"), Equals(shifted(kind, settings, "stock")),
           2 * LONG_STEP.get(kind, ())) for kind, settings in SHIFTS.items()),
    *(Case(f"{kind} draws", shifted(kind, settings, "stock"), Draws(4), LONG_STEP.get(kind, ())) for kind, settings in SHIFTS.items()),
    *(refused(f"{kind}, {method}", shifted(kind, settings, method), "model sampling", "remove")
      for kind, settings in OTHER_KINDS.items() for method in ("stock", "tim")),
    *(Case(f"a guided step of {times}", lambda g, times=times, method=method: g.custom(g.node("TiMScheduler", times=times), method(g)),
           Runs(), (("cfg", "too long", "more steps"),)) for times in ("1, 0.9, 0", "0.99, 0.1", "1, 0.8, 0")
      for method in (lambda g: None, lambda g: g.node("TiMSamplerSelect"))),
    Case("guided steps that are short enough", lambda g: g.custom(g.node("TiMScheduler", times="1, 0.7, 0")), Draws(5)),
    Case("a long step without CFG", lambda g: g.custom(g.node("TiMScheduler", times="1, 0.9, 0"), cfg=1.0), Draws(4)),
    *(Case(f"a shift of {shift:g}", lambda g, kind=kind, shift=shift: kind(g, shift), Runs(), (("cfg", "too long", "smaller shift"),))
      for shift in (20.0, 100.0) for kind in (lambda g, shift: g.tim(shift=shift), lambda g, shift: g.patch(
          "ModelSamplingSD3", shift=shift).stock())),
    Case("a shift of 100 in many steps", lambda g: g.tim(shift=100.0, steps=100), Draws(1, count=2)),
    *(refused(f"a shift of 0, {method}", shifted("ModelSamplingSD3", dict(shift=0.0), method), "shift", "0", "such as 3")
      for method in ("stock", "tim")),
    Case("SplitSigmas after the last step", lambda g: g.custom([g.node("SplitSigmas", sigmas=g.simple(4), step=4)[0], 1], latent=g.stock(),
         add_noise=False), Equals(lambda g: g.stock()), (("sigmas", "no step"),)),
    Case("diffusion mode, few steps", lambda g: ours_in(g, "diffusion", 4), Runs(), (("mode", "30 steps", "not 4", "transition"),)),
    Case("ModelNoiseScale 1", lambda g: g.patch("ModelNoiseScale", noise_scale=1.0).stock(), Equals(lambda g: g.stock())),
    Case("ModelNoiseScale 2", lambda g: g.patch("ModelNoiseScale", noise_scale=2.0).stock(), Runs(), (("noise scale", "2", "remove"),)),
]
