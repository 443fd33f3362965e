"""The patches of other nodes: which of them a TiM network has a place for."""

import inspect

from .log import say

ATTENTIONS = ("attn1", "attn2")


def usable_patches(options: dict, depth: int, has_text: bool) -> dict:
    """The transformer options without the patches that a transformer of `depth` blocks has no place for; the log names their nodes."""
    lists, tables = options.get("patches", {}), options.get("patches_replace", {})
    if not lists and not tables and "rope_options" not in options:
        return options
    outputs = lists.get("attn1_output_patch", [])
    if guidance := [patch for patch in outputs if _owner(patch) == "NAGuidance"]:
        # It compares prompts, so it belongs where the image meets the text: in attn1 for core's joint transformers, in attn2 here.
        rest = [patch for patch in outputs if patch not in guidance]
        lists = {**lists, "attn1_output_patch": rest, "attn2_output_patch": [*lists.get("attn2_output_patch", []), *guidance]}
    foreign = {}  # owner -> the place it patches
    if "rope_options" in options:
        foreign["ScaleROPE"] = "rope_options"
    for name, patches in lists.items():
        if name != "double_block" and not name.startswith(ATTENTIONS):
            foreign |= {_owner(patch): name for patch in patches}
        elif name.startswith("attn2") and not has_text:
            foreign |= {_owner(patch): name for patch in patches}
        elif name in ("attn1_patch", "attn2_patch"):
            foreign |= {_owner(patch): name for patch in patches if not _is_for_transformers(patch)}
    kept = {name: [patch for patch in patches if _owner(patch) not in foreign] for name, patches in lists.items()}

    replaced = {name: dict(table) for name, table in tables.items()}
    for name, table in tables.items():
        known = {("double_block", i) for i in range(depth if has_text or name != "attn2" else 0)}
        known |= {("middle", 0), ("middle", 0, 0)} if name == "attn1" else set()
        if name in ("dit", *ATTENTIONS) and not known.isdisjoint(table):
            known |= {key for key in table if key[0] == "single_block"}  # nodes for any model name both kinds
        for key in table:
            if name not in ("dit", *ATTENTIONS) or key not in known:
                del replaced[name][key]
                foreign.setdefault(_owner(table[key]), f"{name} {' '.join(map(str, key))}")
    for owner, place in foreign.items():
        say(options, f"{owner} has no effect on {place}: this model has the blocks 0 to {depth - 1} and nothing else to patch")
    return {**options, "patches": kept, "patches_replace": replaced}


def _owner(patch) -> str:
    """The node that a patch comes from: the class that it was defined in, or its own."""
    return getattr(patch, "__qualname__", type(patch).__qualname__).split(".")[0]


def _is_for_transformers(patch) -> bool:
    """Whether an attention patch takes what core's transformers pass, and not what U-Nets or Wan pass."""
    try:
        inspect.signature(patch).bind(None, None, None, pe=None, attn_mask=None, extra_options={})
    except (TypeError, ValueError):
        return False
    return True
