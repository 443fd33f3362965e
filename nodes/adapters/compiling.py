"""What torch.compile needs of our network, as core's TorchCompileModel applies it: one graph for every batch size."""

import inspect
import logging
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache

import comfy.model_management as mm
import torch
from torch import Tensor

from ...tim_core.errors import TimError

BATCH_LIMIT = 2**15  # above it core's attention runs in parts
_sharing: weakref.WeakSet = weakref.WeakSet()  # compiled networks that have one graph for all batch sizes
_not_sharing: weakref.WeakSet = weakref.WeakSet()  # those for which torch could not make it


def call_for_any_batch(network: torch.nn.Module, call: Callable[[], Tensor]) -> Tensor:
    """Runs call(); a compiled `network` makes one graph for all batch sizes in it, since guided and unguided steps differ in batch size.

    If the network is not compiled, torch cannot leave the size open, or the first compilation fails, call() runs as it is.
    """
    if not hasattr(network, "_orig_mod") or network in _not_sharing or not _can_share_sizes():
        return call()
    import torch._inductor.config  # only here: it loads the whole compiler

    # With an open batch size the compiler does not foresee the memory format that this option gives convolutions on a CPU.
    plain = torch._inductor.config.patch(layout_optimization=False) if mm.is_device_cpu(mm.get_torch_device()) else nullcontext()
    hook = network.register_forward_pre_hook(_open_batch, with_kwargs=True)
    try:
        with plain:
            result = call()
        _sharing.add(network)
        return result
    except (TimError, mm.InterruptProcessingException, mm.OOM_EXCEPTION):
        raise
    except Exception as error:
        if network in _sharing:
            raise
        _not_sharing.add(network)
        logging.warning(f"TiM: torch.compile: failed with an open batch size ({type(error).__name__}); compiling once per batch size")
    finally:
        hook.remove()
    return call()


@cache
def _can_share_sizes() -> bool:
    """Whether this torch can leave a size open that several inputs share."""
    from torch._dynamo import decorators

    mark = getattr(decorators, "mark_unbacked", None)
    return mark is not None and "shape_id" in inspect.signature(mark).parameters


def _open_batch(network: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The network's inputs, as new tensors whose batch size is open to the compiler: it would make a graph of its own for size 1."""
    from torch._dynamo.decorators import mark_unbacked

    def opened(value):
        if isinstance(value, Tensor):
            mark_unbacked(value := value.detach(), 0, shape_id="batch")
        return value

    options = kwargs["transformer_options"]
    return tuple(map(opened, args)), {
        **kwargs,
        "context": opened(kwargs["context"]),
        "transformer_options": {**options, "tim_r": opened(options["tim_r"])},
    }
