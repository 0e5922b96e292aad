"""``module_tree`` names the modules of a model as torch does: order, paths, modules met twice, cycles, methods of a class's own."""

import pytest
from torch import nn

from fxfuse.models.module_tree import all_modules, named_modules


class Counted(nn.Module):
    """Names its modules by a method of its own, with ``memo`` passed on."""

    def __init__(self):
        super().__init__()
        self.a, self.hidden = nn.ReLU(), nn.Tanh()

    def named_modules(self, memo=None, prefix="", remove_duplicate=True):
        for name, module in super().named_modules(memo, prefix, remove_duplicate):
            if not name.endswith("hidden"):
                yield name, module


class Others(nn.Module):
    def modules(self):
        return iter([self])


def shared():
    twice, deep = nn.Linear(2, 2), nn.Sequential(nn.ReLU(), nn.Sequential(nn.Tanh()))
    model = nn.Sequential(twice, nn.Sequential(twice, deep), deep, nn.ModuleDict({"x": nn.ReLU(), "y": twice}))
    model.register_module("none", None)
    model[3].register_module("up", model[1])
    return model


def cyclic():
    model = nn.Sequential(nn.ReLU(), nn.Sequential(nn.Tanh()))
    model[1].register_module("top", model)
    return model


@pytest.mark.parametrize("make", [shared, cyclic, Counted, Others, nn.ReLU, lambda: nn.Sequential(nn.ReLU(), Counted(), nn.Tanh())])
def test_as_torch_names_them(make):
    model = make()
    assert [(path, id(m)) for path, m in named_modules(model)] == [(path, id(m)) for path, m in model.named_modules()]
    assert list(map(id, all_modules(model))) == list(map(id, model.modules()))
