"""PyEngine: large language models in 4 bits, accurate and fast.

    import pyengine
    print(pyengine.generate("The capital of France is", max_new_tokens=16))

What is exported here is the interface; everything else may change. Names are imported when they are first used, so that
`import pyengine` costs nothing.
"""

import importlib

__version__ = "0.1.0"

# Modules are not called like these names: importing such a module would put it in the function's place.
_HOME = {
    "generate": "api",
    "load": "loader",
    "quantize": "quantizer",
    "Linear": "linear",
    "replace_linears": "linear",
    "CheckpointError": "errors",
}
__all__ = ["CheckpointError", "Linear", "generate", "load", "quantize", "replace_linears"]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'pyengine' has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
