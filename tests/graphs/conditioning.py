"""Conditionings: core's nodes on ours, prompts with syntax, text nodes of other models, hooks."""

from tests.graphs.case import Case, Draws, Equals, Runs, grey, refused


def plain(g):
    return g.stock()


def changed(kind, **settings):
    """The positive through a node."""
    return lambda g: g.stock(positive=g.node(kind, conditioning=g.positive, **settings))


def joined(g, *conds):
    first, *rest = conds
    for cond in rest:
        first = g.node("ConditioningCombine", conditioning_1=first, conditioning_2=cond)
    return first


def halves(g):
    """Two prompts, each on its half of the image."""
    right = g.half_mask()
    masks = (g.node("InvertMask", mask=right), right)
    conds = (g.text("a red circle"), g.text("a blue square"))
    return joined(g, *(g.node("ConditioningSetMask", conditioning=c, mask=m) for c, m in zip(conds, masks)))


def ranged(g, cond, start, end):
    return g.node("ConditioningSetTimestepRange", conditioning=cond, start=start, end=end)


def with_syntax(text, said=()):
    """A prompt with syntax, which reads as PROMPT without it."""
    return Case(f"prompt: {text}", lambda g: g.stock(positive=g.text(text)), Equals(plain), said)


def pair_of(kind, **links):
    """A node that gives positive, negative and latent."""
    def build(g):
        made = g.node(kind, positive=g.positive, negative=g.negative, **{name: make(g) for name, make in links.items()})[0]
        return g.stock([made, 2], [made, 0], [made, 1])

    return build


SYNTAX = (("prompt weights", "no effect"),)
NO_INPUT = ("no effect", "no input")
TEXT_NODES = {
    "CLIPTextEncodeSDXL": dict(text_g="a", text_l="a"), "CLIPTextEncodeFlux": dict(clip_l="a", t5xxl="a"),
    "CLIPTextEncodeSD3": dict(clip_l="a", clip_g="a", t5xxl="a"), "CLIPTextEncodeHunyuanDiT": dict(bert="a", mt5xl="a"),
    "CLIPTextEncodeHiDream": dict(clip_l="a", clip_g="a", t5xxl="a", llama="a"),
    "CLIPTextEncodeKandinsky5": dict(clip_l="a", qwen25_7b="a"), "TextEncodeAceStepAudio": dict(tags="a", lyrics="a"),
}

CASES = [
    Case("Combine with itself", lambda g: g.stock(positive=joined(g, g.positive, g.positive)), Equals(plain)),
    Case("Average with itself", lambda g: g.stock(positive=g.node(
        "ConditioningAverage", conditioning_to=g.positive, conditioning_from=g.positive, conditioning_to_strength=0.5)), Equals(plain)),
    Case("Average, mostly one", lambda g: g.stock(positive=g.node(
        "ConditioningAverage", conditioning_to=g.positive, conditioning_from=g.text("a green square"), conditioning_to_strength=0.95)),
        Draws(4)),
    Case("Concat", lambda g: g.stock(positive=g.node(
        "ConditioningConcat", conditioning_to=g.text("a red circle"), conditioning_from=g.text("left of a blue square"))), Runs()),
    Case("Multiply 1", changed("ConditioningMultiply", multiplier=1.0), Equals(plain)),
    Case("SetArea, whole", changed("ConditioningSetArea", width=64, height=64, x=0, y=0), Equals(plain)),
    Case("SetArea, larger than the image", changed("ConditioningSetArea", width=512, height=512, x=0, y=0), Equals(plain)),
    refused("SetArea, outside the image", changed("ConditioningSetArea", width=64, height=64, x=64, y=0), "area", "(64, 0)", "64x64"),
    Case("SetArea, half and nothing else", lambda g: g.stock(g.empty(128, 64), positive=g.node(
        "ConditioningSetArea", conditioning=g.positive, width=64, height=64, x=0, y=0)), Runs(),
        (("size", "128x64", "64x64"), ("positive", "50%", "Conditioning Combine"))),
    Case("SetAreaPercentage, a quarter over the whole", lambda g: g.stock(positive=joined(g, g.positive, g.node(
        "ConditioningSetAreaPercentage", conditioning=g.positive, width=0.5, height=0.5, x=0.0, y=0.0))), Draws(4)),
    Case("SetAreaPercentage, whole", changed("ConditioningSetAreaPercentage", width=1.0, height=1.0, x=0.0, y=0.0), Equals(plain)),
    Case("SetAreaPercentage, the right half and nothing else", changed(
        "ConditioningSetAreaPercentage", width=0.5, height=1.0, x=0.5, y=0.0), Runs(), (("positive", "50%"),)),
    Case("SetAreaPercentageVideo, whole", changed("ConditioningSetAreaPercentageVideo"), Equals(plain)),
    Case("SetAreaStrength", changed("ConditioningSetAreaStrength", strength=0.7), Equals(plain)),
    Case("SetAreaStrength 0", changed("ConditioningSetAreaStrength", strength=0.0), Runs(), (("positive", "anywhere"),)),
    Case("SetMask, whole", lambda g: g.stock(positive=g.node(
        "ConditioningSetMask", conditioning=g.positive, mask=g.mask())), Equals(plain)),
    Case("SetMask of another size", lambda g: g.stock(positive=g.node(
        "ConditioningSetMask", conditioning=g.positive, mask=g.mask(1.0, 500, 300))), Equals(plain)),
    Case("SetMask, empty", lambda g: g.stock(positive=g.node("ConditioningSetMask", conditioning=g.positive, mask=g.mask(0.0))), Runs(),
         (("positive", "anywhere"),)),
    Case("SetMask, half and nothing else", lambda g: g.stock(positive=g.node(
        "ConditioningSetMask", conditioning=g.positive, mask=g.half_mask())), Runs(), (("positive", "50%"),)),
    Case("SetMask, two halves", lambda g: g.stock(positive=halves(g)), Runs()),
    Case("the negative on half the image", lambda g: g.stock(negative=g.node(
        "ConditioningSetMask", conditioning=g.negative, mask=g.half_mask())), Runs(), (("negative", "50%"),)),
    Case("the negative on half the image, without CFG", lambda g: g.stock(cfg=1.0, negative=g.node(
        "ConditioningSetMask", conditioning=g.negative, mask=g.half_mask())), Equals(lambda g: g.stock(cfg=1.0))),
    Case("SetDefaultCombine", lambda g: g.stock(positive=g.node("ConditioningSetDefaultCombine", cond=g.node(
        "ConditioningSetMask", conditioning=g.positive, mask=g.half_mask()), cond_DEFAULT=g.positive)), Draws(4)),
    Case("SetProperties", lambda g: g.stock(positive=g.node("ConditioningSetProperties", cond_NEW=g.positive)), Equals(plain)),
    Case("PairConditioningSetProperties", lambda g: (lambda made: g.stock(positive=[made, 0], negative=[made, 1]))(g.node(
        "PairConditioningSetProperties", positive_NEW=g.positive, negative_NEW=g.negative)[0]), Equals(plain)),
    Case("SetTimestepRange, whole", lambda g: g.stock(positive=ranged(g, g.positive, 0.0, 1.0)), Equals(plain)),
    Case("SetTimestepRange, in two", lambda g: g.stock(steps=5, positive=joined(
        g, ranged(g, g.positive, 0.0, 0.5), ranged(g, g.positive, 0.5, 1.0))), Equals(lambda g: g.stock(steps=5))),
    Case("SetTimestepRange, the first half and nothing else", lambda g: g.stock(positive=ranged(g, g.positive, 0.0, 0.5)), Runs(),
         (("positive", "anywhere", "0.25"),)),
    Case("SetTimestepRange, the negative's first half", lambda g: g.stock(negative=ranged(g, g.negative, 0.0, 0.5)), Runs(),
         (("negative", "anywhere", "0.25"),)),
    Case("ZeroOut as the negative", lambda g: g.stock(negative=g.node("ConditioningZeroOut", conditioning=g.positive)), Draws(4)),
    Case("the prompt as its own negative", lambda g: g.stock(negative=g.positive), Equals(lambda g: g.stock(cfg=1.0), 1e-3)),
    Case("a long negative", lambda g: g.stock(negative=g.text("two yellow triangles above a purple square")), Draws(4)),
    with_syntax("a (red:1.3) circle left of a blue square", SYNTAX),
    with_syntax("a red circle left of a ((blue)) square", SYNTAX),
    with_syntax("a red circle left of a blue square embedding:easynegative", SYNTAX),
    with_syntax("a red circle left of a \\(blue\\) square"),
    with_syntax("  A RED circle,\nleft of a blue square. "),
    Case("an empty prompt", lambda g: g.stock(positive=g.text("")), Equals(lambda g: g.stock(cfg=1.0, positive=g.negative), 1e-3)),
    Case("a prompt of words it does not know", lambda g: g.stock(positive=g.text("a cat on a sofa")), Runs(), (("cat",),)),
    Case("a number it does not know", lambda g: g.stock(positive=g.text("nine red circles")), Runs(), (("nine",),)),
    Case("FluxGuidance", changed("FluxGuidance"), Equals(plain), (("FluxGuidance", *NO_INPUT),)),
    Case("ReferenceLatent", lambda g: g.stock(positive=g.node("ReferenceLatent", conditioning=g.positive, latent=grey(g))), Equals(plain),
         (("ReferenceLatent", *NO_INPUT),)),
    Case("ConditioningStableAudio", lambda g: (lambda made: g.stock(positive=[made, 0], negative=[made, 1]))(g.node(
        "ConditioningStableAudio", positive=g.positive, negative=g.negative)[0]), Equals(plain), (("seconds_start", *NO_INPUT),)),
    Case("CLIPTextEncodeSDXLRefiner", lambda g: g.stock(positive=g.node(
        "CLIPTextEncodeSDXLRefiner", clip=g.clip, text="a red circle left of a blue square")), Equals(plain),
        (("aesthetic_score", *NO_INPUT),)),
    Case("CLIPTextEncodeControlnet", lambda g: g.stock(positive=g.node(
        "CLIPTextEncodeControlnet", clip=g.clip, conditioning=g.positive, text="a circle")), Equals(plain),
        (("cross_attn_controlnet", *NO_INPUT),)),
    Case("CLIPTextEncodePixArtAlpha", lambda g: g.stock(positive=g.node(
        "CLIPTextEncodePixArtAlpha", clip=g.clip, text="a red circle left of a blue square")), Equals(plain),
        (("height", *NO_INPUT),)),
    Case("CLIPTextEncodeLumina2", lambda g: g.stock(positive=g.node(
        "CLIPTextEncodeLumina2", clip=g.clip, user_prompt="a red circle")), Runs(), (("assistant",),)),
    Case("T5TokenizerOptions", lambda g: g.stock(positive=g.add("CLIPTextEncode", text="a red circle left of a blue square", clip=g.node(
        "T5TokenizerOptions", clip=g.clip))), Equals(plain), (("tokenizer options", "no effect"),)),
    Case("CLIPSetLastLayer", lambda g: g.stock(positive=g.add("CLIPTextEncode", text="a red circle left of a blue square", clip=g.node(
        "CLIPSetLastLayer", clip=g.clip, stop_at_clip_layer=-2))), Equals(plain), (("CLIP Set Last Layer", "no effect"),)),
    *(refused(kind, lambda g, kind=kind, texts=texts: g.stock(positive=g.node(kind, clip=g.clip, **texts)), "CLIP", "use CLIP Text Encode")
      for kind, texts in TEXT_NODES.items()),
    refused("an image for the text encoder", lambda g: g.stock(positive=g.node(
        "TextEncodeQwenImageEdit", clip=g.clip, prompt="a circle", image=g.flat())), "CLIP", "images", "CLIP Text Encode"),
    Case("InpaintModelConditioning with its mask", pair_of(
        "InpaintModelConditioning", vae=lambda g: g.vae, pixels=lambda g: g.flat(), mask=lambda g: g.half_mask()),
        Equals(lambda g: g.stock(g.node("SetLatentNoiseMask", samples=grey(g), mask=g.half_mask())))),
    Case("InpaintModelConditioning without its mask", lambda g: (lambda made: g.stock([made, 2], [made, 0], [made, 1]))(g.node(
        "InpaintModelConditioning", positive=g.positive, negative=g.negative, vae=g.vae, pixels=g.flat(), mask=g.half_mask(),
        noise_mask=False)[0]), Runs(), (("image in the conditioning", *NO_INPUT),)),
    Case("InstructPixToPixConditioning", pair_of("InstructPixToPixConditioning", vae=lambda g: g.vae, pixels=lambda g: g.flat()), Runs(),
         (("image in the conditioning", *NO_INPUT),)),
    refused("another model's text features", lambda g: g.stock(positive=g.node("LotusConditioning")), "conditioning", "width", "CLIP"),
    refused("a class for a text model", lambda g: g.stock(positive=g.node("TiMClassLabel")), "class label", "CLIP Text Encode"),
]
