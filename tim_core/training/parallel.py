"""How the processes of a run share weights and gradients: DDP and FSDP2."""

from collections.abc import Iterable

from torch import Tensor, nn

from ..processes import Processes


def share(step: nn.Module, parts: Iterable[nn.Module], processes: Processes, how: str) -> nn.Module:
    """`step`, whose forward is a loss, such that its backward pass leaves the mean gradient of all processes -> what to call.

    how: "ddp", every process holds everything; "fsdp2", every process holds a slice of the weights, and of what the optimiser keeps of
    them. `parts`: the modules to slice, inner ones before those that hold them (fsdp2); `step` itself is not sliced.
    """
    if processes.count == 1:
        return step
    if how == "ddp":
        # no device_ids: with them all of a batch would go to every GPU, and not only its part
        return nn.parallel.DistributedDataParallel(step, broadcast_buffers=False)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(processes.device.type, (processes.count,))
    for part in parts:
        # by default an outermost module stays gathered until its backward pass: the averaged weights, which have none, would go stale
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    return step


def synchronise(step: nn.Module, parts: Iterable[nn.Module], last: bool) -> None:
    """Whether the next backward pass shares its gradients: only that of the last accumulated part has to."""
    if isinstance(step, nn.parallel.DistributedDataParallel):
        step.require_backward_grad_sync = last
    for part in parts:
        if hasattr(part, "set_requires_gradient_sync"):
            part.set_requires_gradient_sync(last, recurse=False)


def local(tensor: Tensor) -> Tensor:
    """The slice of a shared tensor that this process holds."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Tensor) -> Tensor:
    """All slices of a shared tensor, on the CPU. Every process has to call it."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().cpu()
