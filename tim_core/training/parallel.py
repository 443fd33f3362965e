"""Data-parallel training in several processes: DDP and FSDP2."""

from collections.abc import Iterable

from torch import Tensor, nn

from ..processes import Processes


def distribute(step: nn.Module, units: Iterable[nn.Module], processes: Processes, how: str) -> nn.Module:
    """Wraps `step`, a module whose forward pass returns a loss, so that its backward pass averages gradients over all processes.

    how: "ddp", every process holds all weights; "fsdp2", every process holds a shard of the weights, the EMA and the optimiser state.
    units: the modules to shard one by one under fsdp2, inner ones before those that contain them; `step` itself is not sharded.
    """
    if processes.count == 1:
        return step
    if how == "ddp":
        # without device_ids: a task moves what it needs to the GPU
        return nn.parallel.DistributedDataParallel(step, broadcast_buffers=False)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(processes.device.type, (processes.count,))
    for unit in units:
        # by default a root module stays gathered until its backward pass, which the EMA never has: its weights would go stale
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    return step


def synchronise(step: nn.Module, units: Iterable[nn.Module], last: bool) -> None:
    """Turns the averaging of gradients on for the last accumulated part of a batch, and off for those before it."""
    if isinstance(step, nn.parallel.DistributedDataParallel):
        step.require_backward_grad_sync = last
    for unit in units:
        if hasattr(unit, "set_requires_gradient_sync"):
            unit.set_requires_gradient_sync(last, recurse=False)


def local_shard(tensor: Tensor) -> Tensor:
    """The shard of a distributed tensor that this process holds; other tensors as they are."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """A distributed tensor gathered on the CPU. Every process must call it."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().cpu()
