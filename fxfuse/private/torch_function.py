"""A block in which no ``TorchFunctionMode`` and no subclass's ``__torch_function__`` sees what is asked of a tensor.

Private: ``torch._C.DisableTorchFunction``. The public ``torch.overrides`` can leave out one mode for its own time, not those of others.
"""

from __future__ import annotations

import torch

DisableTorchFunction = torch._C.DisableTorchFunction
