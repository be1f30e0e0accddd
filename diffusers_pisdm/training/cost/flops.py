"""Counts arithmetic and memory, operator by operator.

Floating point operations follow torch's formulas, and our own formulas for this package's operators.
"""

from __future__ import annotations

import math
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, register_flop_formula, sdpa_backward_flop_count, sdpa_flop_count
from torch.utils.weak import WeakIdKeyDictionary


# Floating point operations per time step, channel and state; an exponential counts as one.
# decay = exp(delta * A), h = decay * h + B * x, y += C * h
SCAN_FORWARD_FLOPS = 7
# decay and h again; the gradient of h from C and the next step; two each for C, B, x, delta * A, delta and A
SCAN_BACKWARD_FLOPS = 5 + 3 + 6 * 2


def _register_flop_formulas() -> None:
    """Registers this package's operators with torch, so its own FlopCounterMode counts them too."""
    ops = torch.ops.diffusers_pisdm  # all defined by now: `training` imports `models`, which imports `ops`

    def scan(flops: int, sequence: int, rates: int, states_axis: int):  # positions among the operator's arguments
        return lambda *shapes, out_shape: flops * math.prod(shapes[sequence]) * shapes[rates][states_axis]

    for name in ("selective_scan_numba", "selective_scan_triton"):
        register_flop_formula(getattr(ops, name))(scan(SCAN_FORWARD_FLOPS, 0, 2, 1))
        register_flop_formula(getattr(ops, f"{name}_backward"))(scan(SCAN_BACKWARD_FLOPS, 2, 4, 1))
    register_flop_formula(ops.selective_scan_torch)(scan(SCAN_FORWARD_FLOPS, 0, 2, 0))
    register_flop_formula(ops.selective_scan_torch_backward)(scan(SCAN_BACKWARD_FLOPS, 1, 3, 0))

    @register_flop_formula([ops.causal_conv_numba, ops.causal_conv_triton])
    def conv(x, weight, bias, activation, out_shape):
        return 2 * math.prod(x) * weight[1]

    @register_flop_formula([ops.causal_conv_numba_backward, ops.causal_conv_triton_backward])
    def conv_backward(grad, x, weight, bias, activation, out_shape):
        return 3 * 2 * math.prod(x) * weight[1]  # the activation's input again, x and the weight


_register_flop_formulas()


def _convolution_backward_flops(grad, x, weight, *options, out_val) -> int:
    # torch's formula treats a depthwise filter's gradient as that of a full filter: too large by the channel count.
    return sum(options[-1][:2]) * 2 * grad.numel() * weight[0].numel()  # the mask of wanted gradients: x, weight, bias


def _attention_flops(query, key, value, *options, out_val, **more_options) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward_flops(grad, query, key, value, *options, out_val, **more_options) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


# By operator, like torch's registry: called with the operator's arguments, and its result as `out_val`.
FLOP_FORMULAS = flop_registry | {
    torch.ops.aten.convolution_backward: _convolution_backward_flops,
    # torch only counts attention on GPUs.
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


class StepTrace(TorchDispatchMode):
    """
    Counts while entered: `flops` of the operators that ran, `live_bytes` of the storages they created that are still
    alive, and `peak_bytes`, the maximum of `live_bytes`.
    """

    # FlopCounterMode could count the FLOPs, but its hooks on every module keep tensors alive.
    def __init__(self):
        super().__init__()
        self.flops = self.live_bytes = self.peak_bytes = 0
        self._seen = WeakIdKeyDictionary()

    def ignore(self, tensor: torch.Tensor) -> None:
        """Excludes a tensor's storage from the count."""
        self._seen[tensor.untyped_storage()] = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.overloadpacket in FLOP_FORMULAS:
            self.flops += FLOP_FORMULAS[func.overloadpacket](*args, **kwargs, out_val=out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage in self._seen:  # a view or an in-place result
            return
        self._seen[storage] = True
        self.live_bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, num_bytes: int) -> None:
        self.live_bytes -= num_bytes
