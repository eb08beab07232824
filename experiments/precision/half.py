"""float16 as a GPU multiplies it, on a CPU: products are summed in float32 and rounded once to float16.

A CPU's own float16 products are some fifty times slower. All else (sums, norms, softmax, AdamW) is float16 as it is.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
PRODUCTS = {  # each with the one that returns its result
    aten.mm: aten.mm,
    aten.bmm: aten.bmm,
    aten.addmm: aten.addmm,
    aten.addmm_: aten.addmm,
    aten.baddbmm: aten.baddbmm,
    aten.baddbmm_: aten.baddbmm,
}


class HalfProducts(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, packet = kwargs or {}, function.overloadpacket
        if packet not in PRODUCTS or args[0].dtype != torch.float16:
            return function(*args, **kwargs)
        out = kwargs.pop("out", args[0] if packet in (aten.addmm_, aten.baddbmm_) else None)
        wide = (arg.float() if isinstance(arg, torch.Tensor) else arg for arg in args)
        rounded = PRODUCTS[packet](*wide, **kwargs).half()
        return rounded if out is None else out.copy_(rounded)
