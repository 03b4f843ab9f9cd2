"""torch, timm, transformers and peft, each imported when a test first uses it.

timm and transformers import torchvision, which no test uses. A torchvision built for
CUDA cannot load its operators beside a torch built for CPUs, and then fails to import
for the lack of two of them; declaring these is enough.
"""

import functools
import importlib
import sys


class _Peer:
    def __init__(self, name):
        self._name = name

    def __getattr__(self, attribute):
        # Pytest asks every name of a test file for attributes of its own.
        if attribute.startswith("__") or attribute == "pytestmark":
            raise AttributeError(attribute)
        if self._name.partition(".")[0] != "torch":
            _without_torchvisions_operators()
        return getattr(importlib.import_module(self._name), attribute)


def import_peer(name):
    """The module called `name`, imported when an attribute is first asked for."""
    return _Peer(name)


torch = import_peer("torch")


@functools.cache
def _without_torchvisions_operators():
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        declared = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            declared.define(f"{name}(Tensor dets, Tensor scores, float t) -> Tensor")
        return declared  # kept by the cache: with the object its operators go


# A script that imports this file for its effect gets it at once; tests wait.
if "pytest" not in sys.modules:
    _without_torchvisions_operators()


def without_gradients(test):
    """The test under `torch.no_grad()`."""

    @functools.wraps(test)
    def wrapped(*arguments, **options):
        with torch.no_grad():
            return test(*arguments, **options)

    return wrapped


def drawn(model, seed=0):
    """The model with every parameter random, in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            weight = name.endswith("weight")
            if "lambda" in name or (weight and parameter.ndim == 1):
                parameter.copy_(1.0 + 0.3 * noise)
            elif weight and "position" not in name:
                parameter.copy_(noise * 0.7 / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.3 * noise)
    return model.eval()
