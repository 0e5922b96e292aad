"""The tensors without data that ``torch.export`` and ``torch.compile`` trace with.

Private: ``torch._subclasses.fake_tensor``. A guard has to know their exact type to let them pass; no public name leads to it.
"""

from __future__ import annotations

from torch._subclasses.fake_tensor import FakeTensor

__all__ = ["FakeTensor"]
