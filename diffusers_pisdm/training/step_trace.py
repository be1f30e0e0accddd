"""The arithmetic and the memory of what runs, counted operator by operator."""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from .flop_formulas import FLOP_FORMULAS


class StepTrace(TorchDispatchMode):
    """
    Counts while it is entered (`with StepTrace() as trace:`); what it counted stays.

    `flops` (`int`) are those of the operators that ran, `live_bytes` (`int`) the size of the storages that these made
    and that are still alive, `peak_bytes` (`int`) the most that this ever was.
    """

    # FlopCounterMode would do for the FLOPs, but its hooks on every module keep tensors alive.
    def __init__(self):
        super().__init__()
        self.flops = self.live_bytes = self.peak_bytes = 0
        self._seen = WeakIdKeyDictionary()

    def ignore(self, tensor: torch.Tensor) -> None:
        """Leaves a tensor's storage out, whatever is done to it."""
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
        if storage in self._seen:  # a view, or in place
            return
        self._seen[storage] = True
        self.live_bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, num_bytes: int) -> None:
        self.live_bytes -= num_bytes
