"""Guiders, and nodes that change how guidance acts."""

from tests.graphs.case import Case, Draws, Equals, refused


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
    "SkipLayerGuidanceSD3": dict(layers="3", start_percent=0.0, end_percent=0.5), "RenormCFG": dict(cfg_trunc=100.0, renorm_cfg=1.0),
    "VideoLinearCFGGuidance": {}, "FreSca": dict(scale_high=1.1, freq_cutoff=3), "LazyCache": dict(start_percent=0.5),
    "EasyCache": dict(start_percent=0.5),
}
GENTLE = {"SelfAttentionGuidance": 4, "NAGuidance": 4, "PerturbedAttentionGuidance": 4, "LazyCache": 4}

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
    *(Case(kind, lambda g, kind=kind, settings=settings: g.patch(kind, **settings).stock(steps=8), Draws(GENTLE.get(kind, 6)))
      for kind, settings in PATCHES.items()),
    *(Case(f"{kind} acts", lambda g, kind=kind, settings=settings: g.patch(kind, **settings).stock(), Draws(4, unlike=plain))
      for kind, settings in PATCHES.items() if "Cache" not in kind and kind not in ("FreSca",)),
    Case("TemporalScoreRescaling", lambda g: g.patch("TemporalScoreRescaling").stock(g.empty(), steps=8), Draws(1, count=1)),
    Case("two patches", lambda g: g.patch("RescaleCFG").patch("PerturbedAttentionGuidance", scale=0.5).tim(steps=8), Draws(4)),
]
