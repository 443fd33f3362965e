"""The patches of other nodes: which of them a TiM network has a place for."""

import inspect
import re
import weakref
from functools import partial

from .log import say

ATTENTIONS = ("attn1", "attn2")
MOVED = {  # (module, class) of a node -> where its patches of attn1's output belong in this network
    # It compares prompts, so it belongs where the image meets the text: in attn1 for core's joint transformers, in attn2 here.
    ("nodes_nag", "NAGuidance"): "attn2_output_patch",
}
_signatures: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # patch -> whether it is for transformers


def usable_patches(options: dict, depth: int, has_text: bool) -> dict:
    """The transformer options without the patches that a transformer of `depth` blocks has no place for; the log names their nodes.

    If one of a node's patches in `patches` has no place, all of them go, since half of a pair (ToMe merges tokens in one patch and
    unmerges them in another) would break the network. In `patches_replace`, where each entry replaces one block on its own, only the
    entries without a place go. A node is the class or function, in its module, that its patches were defined in.
    """
    lists, tables = options.get("patches", {}), options.get("patches_replace", {})
    if not lists and not tables and "rope_options" not in options:
        return options
    lists = _moved(lists)
    foreign = {}  # owner -> the place it patches
    if "rope_options" in options:
        foreign["", "ScaleROPE"] = "rope_options"
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
    for (_, owner), place in foreign.items():
        say(options, f"{owner} has no effect on {place}: this model has the blocks 0 to {depth - 1} and nothing else to patch")
    return {**options, "patches": kept, "patches_replace": replaced}


def _moved(lists: dict[str, list]) -> dict[str, list]:
    """The lists of patches with those of MOVED where they belong."""
    moved = dict(lists)
    for patch in lists.get("attn1_output_patch", ()):
        module, owner = _owner(patch)
        if place := MOVED.get((re.split(r"[./\\]", module)[-1], owner)):
            moved["attn1_output_patch"] = [other for other in moved["attn1_output_patch"] if other is not patch]
            moved[place] = [*moved.get(place, []), patch]
    return moved


def _owner(patch) -> tuple[str, str]:
    """The node that a patch comes from: the module, and the class or function in it, that the patch was defined in."""
    while isinstance(patch, partial):
        patch = patch.func
    named = patch if hasattr(patch, "__qualname__") else type(patch)
    return named.__module__ or "", named.__qualname__.split(".")[0]


def _is_for_transformers(patch) -> bool:
    """Whether an attention patch takes what core's transformers pass, and not what U-Nets or Wan pass. Asked at every step, so kept."""
    key = getattr(patch, "__func__", patch)  # a method is a new object each time
    try:
        if key not in _signatures:
            _signatures[key] = _fits(patch)
        return _signatures[key]
    except TypeError:  # an object without weak references, or without a hash
        return _fits(patch)


def _fits(patch) -> bool:
    try:
        inspect.signature(patch).bind(None, None, None, pe=None, attn_mask=None, extra_options={})
    except (TypeError, ValueError):
        return False
    return True
