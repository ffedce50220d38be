"""A shorter start: libraries that others import without using them are loaded at their first use."""

import importlib.util
import sys
from types import ModuleType
from typing import Any

RARELY_USED = ("bitsandbytes", "boto3")
"""Imported by peft and accelerate; needed for quantized bases, and on SageMaker. They take a second or more."""


class _AtFirstUse(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if type(self) is _AtFirstUse and self.__spec__ and self.__spec__.loader:
            # From here on an ordinary module, as its own imports expect
            self.__class__ = ModuleType  # type: ignore[assignment]
            self.__path__ = list(self.__spec__.submodule_search_locations or ())
            self.__spec__.loader.exec_module(self)
            return getattr(self, name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


def load_at_first_use(*names: str) -> None:
    """Let imports of these packages return a module that is executed when an attribute or a submodule is needed.

    Only for the process of a command: other code may expect what an import does. Packages that are absent, or imported
    already, stay as they are.
    """
    for name in names:
        spec = None if name in sys.modules else importlib.util.find_spec(name)
        if spec is not None:
            module = importlib.util.module_from_spec(spec)
            vars(module).pop("__path__", None)  # the import of a submodule reads it, which executes the package first
            module.__class__ = _AtFirstUse
            sys.modules[name] = module
