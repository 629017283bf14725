"""Memory counted without a GPU: tensors on the meta device have a size and no memory."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels.arch import SM89

META = torch.device("meta")
LAYOUTS = {  # which cuDNN keeps, and the meta device does not
    (torch.ops.aten.conv2d.default, 4): torch.channels_last,
    (torch.ops.aten.conv3d.default, 5): torch.channels_last_3d,
}


class Live(TorchDispatchMode):
    """Counts the bytes of living storages on the meta device."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if layout := LAYOUTS.get((func, getattr(out, "ndim", None))):
            out = out.contiguous(memory_format=layout)
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor) and value.device == META:
                self._see(value.untyped_storage())
        return out

    def _see(self, storage):
        key, nbytes = id(storage), storage.nbytes()
        if key not in self._known:
            self._known[key] = weakref.ref(storage, lambda _: self._forget(key, nbytes))
            self.now += nbytes
            self.peak = max(self.peak, self.now)

    def _forget(self, key, nbytes):
        del self._known[key]
        self.now -= nbytes


class NoLaunches:
    """A bank for the real launchers: they allocate what they always do."""

    def launch(self, spec, grid, *arguments):
        pass

    def tuning(self, spec):
        return spec.tuning[SM89]


class Pool:
    """Records nothing, and keeps as much memory as PyTorch's pool for graphs would."""

    def __init__(self, live):
        self.live, self.held = live, None

    def __call__(self, run):
        kept = 0 if self.held is None else self.held.numel()
        self.held = None
        before, self.live.peak = (self.live.now, self.live.peak), self.live.now
        run()
        most = max(kept, self.live.peak - before[0])
        self.live.peak = max(self.live.peak, before[1])
        self.held = torch.empty(most, dtype=torch.uint8, device=META)
        return lambda: None
