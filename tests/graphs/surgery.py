"""Models, text encoders and VAEs changed by core's nodes: LoRAs, merges, hooks, other devices, and saved files."""

from tests.graphs.case import Case, Draws, Equals, Runs, refused


def plain(g):
    return g.stock()


def merged(kind, **settings):
    return lambda g: plain(_with_model(g, g.node(kind, model1=g.model, model2=g.model, **settings)))


def _with_model(g, model):
    g.model = model
    return g


def with_clip(kind, **settings):
    """A prompt through a CLIP that a node gives."""
    def build(g):
        links = {name: g.clip for name in g.info[kind]["input"]["required"] if name.startswith("clip")}
        return g.stock(positive=g.add("CLIPTextEncode", text="a red circle left of a blue square", clip=g.node(kind, **links, **settings)))

    return build


def lora(kind, name, **settings):
    def build(g):
        both = {"clip": g.clip} if "clip" in g.info.get(kind, {"input": {"required": {}}})["input"]["required"] else {}
        return g.patch(kind, lora_name=name, **both, **settings).stock()

    return build


def hooked(g):
    hook = g.node("CreateHookLoraModelOnly", lora_name=LORA, strength_model=1.0)
    made = g.node("PairConditioningSetProperties", positive_NEW=g.positive, negative_NEW=g.negative, hooks=hook)[0]
    return g.stock(positive=[made, 0], negative=[made, 1])


def decoded(kind, **settings):
    """The latent decoded by a node and encoded again."""
    return lambda g: g.node("VAEEncode", pixels=g.node(kind, samples=g.stock(), vae=g.vae, **settings), vae=g.vae)


def encoded(g, width, height, **settings):
    return g.stock(g.node("VAEEncode", pixels=g.flat(width, height), vae=g.vae), denoise=0.5, **settings)


def wide(g):
    """A latent of 136x72 pixels, which no tile divides."""
    return g.node("VAEEncode", vae=g.vae, pixels=g.node("ImageScale", image=g.node("VAEDecode", samples=g.stock(), vae=g.vae),
                                                        upscale_method="bicubic", width=136, height=72, crop="disabled"))


def wide_image(kind, **settings):
    """The latent of that one's image, decoded by a node."""
    return lambda g: g.node("VAEEncode", pixels=g.node(kind, samples=wide(g), vae=g.vae, **settings), vae=g.vae)


def upscaled_in_tiles(tile_size):
    return lambda g: [g.node("TiMNativeUpscale", model=g.model, vae=g.vae, positive=g.positive, negative=g.negative, latent=g.stock(),
                             tile_size=tile_size)[0], 1]


LORA, FOREIGN, MISSHAPEN = "graphs.safetensors", "foreign.safetensors", "misshapen.safetensors"  # made by tests/test_graphs.py

CASES = [
    Case("LoraLoaderModelOnly", lora("LoraLoaderModelOnly", LORA, strength_model=1.0), Draws(0, unlike=plain)),
    Case("LoraLoader", lora("LoraLoader", LORA, strength_model=1.0, strength_clip=1.0), Equals(lora(
        "LoraLoaderModelOnly", LORA, strength_model=1.0))),
    Case("LoraLoaderBypassModelOnly", lora("LoraLoaderBypassModelOnly", LORA, strength_model=1.0), Equals(lora(
        "LoraLoaderModelOnly", LORA, strength_model=1.0), 1e-3)),
    Case("LoraLoaderModelOnly at 0", lora("LoraLoaderModelOnly", LORA, strength_model=0.0), Equals(plain)),
    Case("another model's LoRA, of which core says what it leaves out", lora("LoraLoaderModelOnly", FOREIGN), Equals(plain)),
    Case("a LoRA of other shapes, of which core says that it fails", lora("LoraLoaderModelOnly", MISSHAPEN), Equals(plain)),
    Case("a shift in front of a LoRA or behind it", lambda g: g.patch("ModelSamplingSD3", shift=2.0).patch(
        "LoraLoaderModelOnly", lora_name=LORA).stock(), Equals(lambda g: g.patch("LoraLoaderModelOnly", lora_name=LORA).patch(
            "ModelSamplingSD3", shift=2.0).tim())),
    Case("CreateHookLora", hooked, Equals(lora("LoraLoaderModelOnly", LORA, strength_model=1.0), 1e-3)),
    *(Case(f"{kind} with itself", merged(kind), Equals(plain)) for kind in ("ModelMergeSimple", "ModelMergeBlocks", "ModelMergeFlux1")),
    Case("ModelMergeSubtract and ModelMergeAdd", lambda g: plain(_with_model(g, g.node("ModelMergeAdd", model1=g.node(
        "ModelMergeSubtract", model1=g.model, model2=g.model, multiplier=1.0), model2=g.model))), Equals(plain)),
    Case("CLIPMergeSimple with itself", with_clip("CLIPMergeSimple"), Equals(plain)),
    Case("SelectCLIPDevice", with_clip("SelectCLIPDevice"), Equals(plain)),
    Case("VAEDecodeTiled of one tile", decoded("VAEDecodeTiled", tile_size=512), Equals(decoded("VAEDecode"))),
    Case("VAEEncodeTiled of one tile", lambda g: g.node("VAEEncodeTiled", pixels=g.flat(), vae=g.vae, tile_size=512), Equals(
        lambda g: g.node("VAEEncode", pixels=g.flat(), vae=g.vae))),
    *(Case(f"VAEDecodeTiled in tiles of {tile}, overlap {overlap}", wide_image("VAEDecodeTiled", tile_size=tile, overlap=overlap),
           Equals(wide_image("VAEDecode"), 0.25, 1)) for tile, overlap in ((64, 4096), (96, 32))),
    Case("VAEDecodeTiled without overlap", wide_image("VAEDecodeTiled", tile_size=64, overlap=0), Runs((1, 16, 9, 17))),
    Case("VAEEncodeTiled in tiles of 96", lambda g: g.node("VAEEncodeTiled", vae=g.vae, tile_size=96, overlap=32, pixels=g.node(
        "VAEDecode", samples=wide(g), vae=g.vae)), Equals(wide_image("VAEDecode"), 0.8, 1)),
    Case("TiM Native Upscale in tiles of the model's size", upscaled_in_tiles(64), Runs((1, 16, 16, 16))),
    Case("TiM Native Upscale in smaller tiles", upscaled_in_tiles(32), Runs((1, 16, 16, 16)), (("tile_size", "32x32", "64x64"),)),
    Case("an image of odd size is cropped", lambda g: encoded(g, 71, 53), Runs((1, 16, 6, 8))),
    Case("an image scaled in between", lambda g: g.stock(g.node("VAEEncode", vae=g.vae, pixels=g.node(
        "ImageScale", image=g.flat(512, 512), upscale_method="area", width=64, height=64, crop="disabled")), denoise=0.5),
        Runs((1, 16, 8, 8))),
    Case("a batch of images", lambda g: g.stock(g.node("VAEEncode", vae=g.vae, pixels=g.node(
        "ImageBatch", image1=g.flat(), image2=g.flat(96, 96, 0xFF0000))), denoise=0.5), Runs((2, 16, 8, 8))),
    Case("a loop of tiles by hand", lambda g: g.node("LatentComposite", samples_to=g.stock(g.node(
        "VAEEncode", pixels=g.flat(128, 64), vae=g.vae), denoise=0.3), samples_from=g.stock(g.node(
            "VAEEncode", pixels=g.flat(), vae=g.vae), denoise=0.3), x=64, y=0, feather=8), Runs((1, 16, 8, 16))),
    refused("another model's latent for VAE Decode", lambda g: g.node("VAEEncode", vae=g.vae, pixels=g.node(
        "VAEDecode", samples=g.node("EmptyLatentImage", width=64, height=64, batch_size=1), vae=g.vae)), "latent", "Empty TiM Latent"),
    refused("a video latent for VAE Decode", lambda g: g.node("VAEEncode", vae=g.vae, pixels=g.node(
        "VAEDecode", samples=g.node("EmptyHunyuanLatentVideo", width=64, height=64, length=5), vae=g.vae)), "latent", "Empty TiM Latent"),
]
