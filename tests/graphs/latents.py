"""Latents: core's nodes on ours, latents of other models, masks, batches, sizes."""

from tests.graphs.case import Case, Draws, Equals, Runs, grey, refused

NOT_OURS = ("latent", "shape", "Empty TiM Latent")
VIDEO = ("EmptyHunyuanLatentVideo", "EmptyHunyuanVideo15Latent", "EmptyMochiLatentVideo", "EmptyLTXVLatentVideo", "EmptyCosmosLatentVideo")
AUDIO = {"EmptyLatentAudio": dict(seconds=1.0), "EmptyLatentHunyuan3Dv2": dict(resolution=64)}


def plain(g):
    return g.stock()


def image(g):
    return g.tim(g.empty(), seed=3)


def changed(kind, **settings):
    """The latent of an image through a node and back, without sampling."""
    return lambda g: g.node(kind, samples=image(g), **settings)


def again(g, latent):
    return g.stock(latent, seed=5, denoise=0.3)


def masked(g, mask):
    return g.stock(g.node("SetLatentNoiseMask", samples=image(g), mask=mask), seed=5)


def restored(g, samples, x=0):
    """The half of an image that a mask kept, laid over the image."""
    return g.node("LatentCompositeMasked", destination=samples, source=image(g), x=x, y=0, resize_source=False,
                  mask=g.node("InvertMask", mask=g.half_mask()))


SAVED = "graphs.latent"  # of `image`, saved by tests/test_graphs.py

CASES = [
    Case("EmptyLatentImage", lambda g: g.stock(g.node("EmptyLatentImage", width=64, height=64, batch_size=g.count)), Equals(plain)),
    Case("EmptyLatentImage, TiM Sampler", lambda g: g.tim(g.node("EmptyLatentImage", width=64, height=64, batch_size=g.count)),
         Equals(plain)),
    Case("EmptySD3LatentImage", lambda g: g.stock(g.node("EmptySD3LatentImage", width=64, height=64, batch_size=g.count)), Equals(plain)),
    Case("EmptyFlux2LatentImage at /16", lambda g: g.stock(g.node("EmptyFlux2LatentImage", width=128, height=128, batch_size=g.count)),
         Equals(plain)),
    Case("EmptyHunyuanImageLatent at /32", lambda g: g.stock(g.node("EmptyHunyuanImageLatent", width=64, height=64)), Runs((1, 16, 2, 2)),
         (("size", "16x16", "64x64"),)),
    *(refused(f"{kind}, {method}", lambda g, kind=kind, method=method: getattr(g, method)(
        g.node(kind, width=64, height=64, length=25)), *NOT_OURS) for kind in VIDEO for method in ("stock", "tim")),
    *(refused(f"{kind}, {method}", lambda g, kind=kind, settings=settings, method=method: getattr(g, method)(g.node(kind, **settings)),
              *NOT_OURS) for kind, settings in AUDIO.items() for method in ("stock", "tim")),
    Case("LatentConcat side by side", lambda g: again(g, g.node("LatentConcat", samples1=grey(g), samples2=grey(g), dim="x")),
         Runs((1, 16, 8, 16))),
    Case("LatentFlip twice", lambda g: g.node("LatentFlip", samples=changed("LatentFlip", flip_method="y-axis: horizontally")(g),
                                              flip_method="y-axis: horizontally"), Equals(image)),
    Case("LatentRotate around", lambda g: g.node("LatentRotate", samples=changed("LatentRotate", rotation="180 degrees")(g),
                                                 rotation="180 degrees"), Equals(image)),
    Case("LatentCrop", lambda g: g.node("LatentCrop", samples=g.node("LatentConcat", samples1=image(g), samples2=grey(g), dim="x"),
                                        width=64, height=64, x=0, y=0), Equals(image)),
    Case("LatentUpscale by pixels", lambda g: again(g, changed("LatentUpscale", width=128, height=128, crop="disabled")(g)),
         Runs((1, 16, 16, 16))),
    Case("LatentUpscaleBy", lambda g: again(g, changed("LatentUpscaleBy", scale_by=1.5)(g)), Runs((1, 16, 12, 12))),
    Case("LatentUpscaleBy, far too large", lambda g: g.stock(changed("LatentUpscaleBy", scale_by=4.0)(g), denoise=0.3, steps=1),
         Runs((1, 16, 32, 32)), (("size", "256x256"),)),
    Case("LatentBlend with itself", lambda g: g.node("LatentBlend", samples1=image(g), samples2=image(g), blend_factor=0.5), Equals(image)),
    Case("LatentInterpolate with itself", lambda g: g.node("LatentInterpolate", samples1=image(g), samples2=image(g), ratio=0.5),
         Equals(image)),
    Case("LatentAdd and LatentSubtract", lambda g: g.node("LatentSubtract", samples1=g.node(
        "LatentAdd", samples1=image(g), samples2=grey(g)), samples2=grey(g)), Equals(image)),
    Case("LatentMultiply", lambda g: g.node("LatentMultiply", samples=g.node("LatentMultiply", samples=image(g), multiplier=2.0),
                                            multiplier=0.5), Equals(image)),
    Case("LatentComposite over the whole", lambda g: g.node(
        "LatentComposite", samples_to=grey(g), samples_from=image(g), x=0, y=0, feather=0), Equals(image)),
    Case("LatentBatch", lambda g: again(g, g.node("LatentBatch", samples1=image(g), samples2=image(g))), Runs((2, 16, 8, 8))),
    Case("LatentBatch of two sizes", lambda g: again(g, g.node("LatentBatch", samples1=image(g), samples2=grey(g, 128, 128))),
         Runs((2, 16, 8, 8))),
    Case("RepeatLatentBatch", lambda g: g.stock(g.node("RepeatLatentBatch", samples=g.empty(), amount=g.count)), Equals(plain)),
    Case("LatentFromBatch", lambda g: g.stock(g.node("LatentFromBatch", samples=g.latent, batch_index=1, length=2)), Equals(
        lambda g: g.node("LatentFromBatch", samples=g.stock(), batch_index=1, length=2), count=3)),
    Case("RebatchLatents", lambda g: g.stock(g.node("RebatchLatents", latents=g.latent, batch_size=g.count)), Equals(plain)),
    Case("LatentBatchSeedBehavior", lambda g: g.stock(g.node(
        "LatentBatchSeedBehavior", samples=g.empty(batch_size=2), seed_behavior="fixed")),
        Equals(lambda g: g.node("RepeatLatentBatch", samples=g.stock(g.empty()), amount=2))),
    Case("LatentCut", lambda g: again(g, changed("LatentCut", dim="x", index=0, amount=4)(g)), Runs((1, 16, 8, 4))),
    Case("LatentApplyOperation", lambda g: g.node("LatentApplyOperation", samples=image(g), operation=g.node(
        "LatentOperationSharpen", alpha=0.0, sharpen_radius=1)), Equals(image, 1e-3)),
    Case("LatentApplyOperationCFG", lambda g: g.patch("LatentApplyOperationCFG", operation=g.node(
        "LatentOperationTonemapReinhard")).stock(), Draws(4)),
    Case("a mask of the whole", lambda g: masked(g, g.mask()), Equals(lambda g: g.stock(g.empty(), seed=5))),
    Case("an empty mask", lambda g: masked(g, g.mask(0.0)), Equals(image, 1e-3)),
    Case("a mask of half keeps the other half", lambda g: masked(g, g.half_mask()),
         Equals(lambda g: restored(g, masked(g, g.half_mask())))),
    Case("a mask of another size", lambda g: masked(g, g.half_mask(512, 512)), Equals(lambda g: masked(g, g.half_mask()))),
    Case("masks, TiM Sampler as KSampler", lambda g: g.tim(g.node("SetLatentNoiseMask", samples=image(g), mask=g.half_mask()), seed=5),
         Equals(lambda g: masked(g, g.half_mask()))),
    Case("DifferentialDiffusion with a soft mask", lambda g: masked(g.patch("DifferentialDiffusion"), g.mask(0.5)), Runs((1, 16, 8, 8))),
    Case("a mask of a batch", lambda g: g.stock(g.node("SetLatentNoiseMask", samples=g.node(
        "RepeatLatentBatch", samples=image(g), amount=2), mask=g.half_mask())), Runs((2, 16, 8, 8))),
    *(Case(f"a mask of {width}x{height}", lambda g, size=(width, height): masked(g, g.mask(1.0, *size)), Equals(
        lambda g: g.stock(g.empty(), seed=5))) for width, height in ((37, 91), (1, 1))),
    *(Case(f"a mask on an empty latent, {method}", lambda g, method=method: getattr(g, method)(g.node(
        "SetLatentNoiseMask", samples=g.latent, mask=g.half_mask())), Runs(), (("noise mask", "empty latent", "VAE Encode"),))
      for method in ("stock", "tim")),
    Case("a mask of the whole on an empty latent", lambda g: g.stock(g.node(
        "SetLatentNoiseMask", samples=g.latent, mask=g.mask())), Equals(plain)),
    Case("VAEEncodeForInpaint", lambda g: g.stock(g.node(
        "VAEEncodeForInpaint", pixels=g.flat(), vae=g.vae, mask=g.half_mask(), grow_mask_by=0)), Runs((1, 16, 8, 8))),
    *(Case(f"an odd size, {width}x{height}", lambda g, size=(width, height): g.stock(g.empty(*size)), Runs((1, 16, *cells)),
           (("size", f"{width}x{height}", "64x64"),))
      for width, height, cells in ((72, 56, (7, 9)), (96, 40, (5, 12)))),
    Case("a size of one cell", lambda g: g.stock(g.empty(8, 8)), Runs((1, 16, 1, 1)), (("size", "8x8"),)),
    Case("a long strip", lambda g: g.stock(g.empty(512, 16), steps=1), Runs((1, 16, 2, 64)), (("size", "512x16"),)),
    Case("SaveLatent and LoadLatent", lambda g: g.add("LoadLatent", latent=SAVED), Equals(image, 1e-9)),
    Case("one of a batch", lambda g: g.stock(g.empty()), Equals(lambda g: g.node(
        "LatentFromBatch", samples=g.stock(), batch_index=0, length=1))),
    Case("two samplers in a row", lambda g: g.stock(g.stock(), denoise=0.25, seed=9), Draws(4)),
]
