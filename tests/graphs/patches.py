"""Patches of the model that have no place in it, which the log says, and those that leave the image as it is."""

from tests.graphs.case import Case, Draws, Equals, refused


def plain(g):
    return g.stock()


def patched(kind, settings):
    return lambda g: g.patch(kind, **settings).stock()


IDLE = {
    "TomePatchModel": {}, "HyperTile": {}, "PatchModelAddDownscale": {}, "FluxKVCache": {}, "FreeU": {}, "FreeU_V2": {},
    "ScaleROPE": dict(scale_x=2.0),
    "SkipLayerGuidanceDiTSimple": dict(double_layers="7, 8, 9", single_layers="", start_percent=0.0, end_percent=1.0),
}
NEUTRAL = {  # nodes of other models, or that only move or trade the same work
    "ModelComputeDtype": {}, "ModelMergeSimple": {}, "DifferentialDiffusion": {}, "MultiGPU_WorkUnits": {}, "SelectModelDevice": {},
    "ContextWindowsManual": {}, "ChromaRadianceOptions": {}, "HiDreamO1PatchSeamSmoothing": {},
}

CASES = [
    *(Case(f"{kind} has no place", patched(kind, settings), Equals(plain), ((kind, "no effect", "blocks 0 to"),))
      for kind, settings in IDLE.items()),
    *(Case(f"{kind} changes nothing", patched(kind, settings), Equals(plain, 1e-3)) for kind, settings in NEUTRAL.items()
      if kind != "ModelMergeSimple"),
    Case("ModelComputeDtype bf16", patched("ModelComputeDtype", dict(dtype="bf16")), Draws(5)),
    Case("ModelComputeDtype fp16", patched("ModelComputeDtype", dict(dtype="fp16")), Draws(5)),
    Case("ModelAttentionBackend", patched("ModelAttentionBackend", {}), Draws()),
    Case("ContextWindowsManual that cuts the image", lambda g: g.patch(
        "ContextWindowsManual", context_length=4, context_overlap=1, dim=2).stock(), Equals(plain), (("context windows", "no effect"),)),
    refused("a patch of another kind of sampling in between", lambda g: g.patch("TomePatchModel").patch("ModelSamplingDiscrete").stock(),
            "model sampling"),
]
