"""What libraries do that looks as if a forward rested on it.

Comes in: the libraries that are imported. Goes out: code that asks an object by names which it makes up, but no object other than a result
that it just made (``transformers.utils.ModelOutput`` goes through its own fields with ``getattr``); and what a configuration holds that is
no setting: ``save_pretrained`` writes the class and the dtype of the model into it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import CodeType, FunctionType

_CLASSES = (("transformers.utils.generic", "ModelOutput"),)
_CONFIGURATIONS = frozenset(("PreTrainedConfig", "PretrainedConfig"))
_BOOKS = frozenset(("architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "_commit_hash"))
_SETTINGS = frozenset(("use_cache",))  # the Trainer sets it; no book where forward asks for it


def of_own_fields() -> frozenset[CodeType]:
    """The code of such classes, of those libraries that are imported."""
    found: set[CodeType] = set()
    for module, name in _CLASSES:
        kind = getattr(sys.modules.get(module), name, None)
        for function in vars(kind).values() if isinstance(kind, type) else ():
            if isinstance(function, FunctionType):
                found.update(_nested(function.__code__))
    return frozenset(found)


def books_of(kind: type, spelled: frozenset[str]) -> frozenset[str]:
    """The attributes of objects of this class that say nothing of what a forward computes whose code has spelled these names.

    >>> books_of(dict, frozenset())
    frozenset()
    """
    ours = any(base.__name__ in _CONFIGURATIONS and base.__module__.startswith("transformers.") for base in kind.__mro__)
    return _BOOKS | (_SETTINGS - spelled) if ours else frozenset()


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)
