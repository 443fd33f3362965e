"""Guiders, and nodes that change how guidance acts."""

from tests.graphs.case import Case, Draws, Equals, Runs, refused


def guided(kind, **links):
    def build(g):
        named = {name: getattr(g, value) if isinstance(value, str) and hasattr(g, value) else value for name, value in links.items()}
        return g.advanced(g.node(kind, model=g.model, **named), g.simple())

    return build


def plain(g):
    return g.stock()


PATCHES = {
    "RescaleCFG": dict(multiplier=0.5), "CFGZeroStar": {}, "CFGNorm": {}, "TCFG": {}, "Mahiro": {}, "APG": dict(eta=0.5),
    "PerturbedAttentionGuidance": dict(scale=1.0), "SelfAttentionGuidance": dict(scale=0.3), "NAGuidance": {}, "Epsilon Scaling": {},
    "SkipLayerGuidanceDiT": dict(double_layers="3", single_layers="3", start_percent=0.0, end_percent=0.5),
    "SkipLayerGuidanceDiTSimple": dict(double_layers="3", single_layers="", start_percent=0.0, end_percent=1.0),
    "SkipLayerGuidanceSD3": dict(layers="3", start_percent=0.0, end_percent=0.5), "VideoLinearCFGGuidance": {},
    "VideoTriangleCFGGuidance": {}, "FreSca": dict(scale_high=1.1, freq_cutoff=3),
}
CACHES = {"EasyCache": dict(start_percent=0.5), "LazyCache": dict(start_percent=0.5)}
ONE_IMAGE = {"TemporalScoreRescaling": {}, "RenormCFG": dict(cfg_trunc=100.0, renorm_cfg=1.0)}

CASES = [
    Case("CFGGuider", guided("CFGGuider", positive="positive", negative="negative", cfg=2.5), Equals(plain)),
    Case("BasicGuider", guided("BasicGuider", conditioning="positive"), Equals(lambda g: g.stock(cfg=1.0))),
    Case("DualCFGGuider, the second prompt without weight", guided(
        "DualCFGGuider", cond1="positive", cond2="negative", negative="negative", cfg_conds=2.5, cfg_cond2_negative=1.0), Equals(plain)),
    Case("DualCFGGuider, nested", guided(
        "DualCFGGuider", cond1="positive", cond2="negative", negative="negative", cfg_conds=2.5, cfg_cond2_negative=1.0, style="nested"),
        Draws()),
    Case("PerpNegGuider", guided(
        "PerpNegGuider", positive="positive", negative="negative", empty_conditioning="negative", cfg=2.5, neg_scale=1.0), Draws()),
    Case("CFGOverride outside its part", lambda g: g.patch("CFGOverride", cfg=1.0, start_percent=0.0, end_percent=0.0).stock(),
         Equals(plain)),
    Case("CFGOverride", lambda g: g.patch("CFGOverride", cfg=1.0, start_percent=0.0, end_percent=1.0).stock(),
         Equals(lambda g: g.stock(cfg=1.0))),
    Case("TiM Guidance Interval", lambda g: g.patch("TiMGuidanceInterval", guidance_low=0.3, guidance_high=0.6).stock(),
         Equals(lambda g: g.tim(guidance_low=0.3, guidance_high=0.6))),
    refused("an empty interval", lambda g: g.patch("TiMGuidanceInterval", guidance_low=0.6, guidance_high=0.3).stock(),
            "guidance_low", "0.6", "0.3"),
    *(Case(kind, lambda g, kind=kind, settings=settings: g.patch(kind, **settings).stock(), Draws(4, unlike=plain))
      for kind, settings in PATCHES.items()),
    *(Case(kind, lambda g, kind=kind, settings=settings: g.patch(kind, **settings).stock(steps=8), Draws())
      for kind, settings in CACHES.items()),
    *(Case(kind, lambda g, kind=kind, settings=settings: g.patch(kind, **settings).stock(), Draws(1, count=1))  # core's fail with batches
      for kind, settings in ONE_IMAGE.items()),
    *(Case(f"cfg {cfg:g}, below 1", lambda g, cfg=cfg: g.stock(cfg=cfg), Runs(), (("cfg", f"{cfg:g}", "below 1"),)) for cfg in (0.0, 0.5)),
    *(Case(f"cfg {cfg:g}, {method}", lambda g, cfg=cfg, method=method: getattr(g, method)(cfg=cfg), Runs(),
           (("cfg", f"{cfg:g}", "made for 2.5"),)) for cfg in (16.0, 100.0) for method in ("stock", "tim")),
    Case("cfg 12", lambda g: g.stock(cfg=12.0), Draws(5)),
    Case("cfg 100 in CFGGuider", guided("CFGGuider", positive="positive", negative="negative", cfg=100.0), Runs(),
         (("cfg", "100", "made for 2.5"),)),
    *(Case(f"an interval between the steps, {low:g} to {high:g}", lambda g, low=low, high=high: g.tim(guidance_low=low, guidance_high=high),
           Equals(lambda g: g.tim(cfg=1.0)), (("cfg", "no effect", f"{low:g} to {high:g}"),)) for low, high in ((0.8, 0.9), (0.99, 1.0))),
    Case("TiM Guidance Interval between the steps", lambda g: g.patch("TiMGuidanceInterval", guidance_low=0.3, guidance_high=0.4).stock(),
         Equals(lambda g: g.stock(cfg=1.0)), (("cfg", "no effect", "0.3 to 0.4"),)),
    Case("an interval between the steps, without CFG", lambda g: g.tim(guidance_low=0.8, guidance_high=0.9, cfg=1.0),
         Equals(lambda g: g.tim(cfg=1.0))),
    Case("one step has no guidance", lambda g: g.stock(steps=1), Equals(lambda g: g.stock(steps=1, cfg=1.0))),
    Case("two patches", lambda g: g.patch("RescaleCFG").patch("PerturbedAttentionGuidance", scale=0.5).tim(), Draws(4)),
]
