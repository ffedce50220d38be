"""Descriptors of the adapter methods and their registration with PEFT.

A built-in method is a module or package in ``methods/`` that defines ``METHOD``; other packages call
:func:`register_method`. Listing the names imports neither torch nor PEFT.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lvlm_clorae.errors import UserError, nearest

if TYPE_CHECKING:
    from peft import PeftConfig
    from peft.tuners.tuners_utils import BaseTuner


@dataclass(frozen=True)
class AdapterMethod:
    """Description of an adapter method for training, PEFT and the tests.

    Args:
        name: value of ``--adapter``; in upper case, the ``peft_type`` of its configuration.
        config_cls, model_cls: configuration and tuner class; see ``TaskModel`` and ``AuxLossModel`` in
            ``adapters/model.py`` for the methods ``set_task`` (with ``knows_tasks``) and ``aux_loss`` of the tuner.
        make_config: builds the configuration of a training run from the keyword arguments that all methods share
            (``r``, ``lora_alpha`` or None, ``lora_dropout``, ``target_modules`` ...), the run's ``TrainConfig`` and the
            names of its tasks.
        knows_tasks: the model needs ``set_task`` before a training forward.
        aux_loss: name of the auxiliary loss in the metrics; None where there is none.
        aux_numbers: fp32 numbers per adapted layer that the ranks sum for the auxiliary loss in each micro-step.
    """

    name: str
    config_cls: type[PeftConfig]
    model_cls: type[BaseTuner]
    make_config: Callable[[dict[str, Any], Any, list[str]], PeftConfig]
    knows_tasks: bool = False
    aux_loss: str | None = None
    aux_numbers: int = 0


_registered: dict[str, AdapterMethod] = {}  # methods of other packages


def method_names() -> list[str]:
    """Names of the built-in and registered methods."""
    return list(dict.fromkeys([*_built_in(), *_registered]))


def _built_in() -> list[str]:
    return [module.name for module in pkgutil.iter_modules([str(Path(__file__).parent / "methods")])]


def adapter_method(name: str) -> AdapterMethod:
    """Return the descriptor of a method; imports PEFT and torch. Raises UserError if there is no such method."""
    if name in _registered:
        return _registered[name]
    if name not in _built_in():
        hint = f"{nearest(name, method_names())} If another package registers it, import that package first."
        raise UserError(f'There is no adapter method "{name}".{hint}')
    return importlib.import_module(f"{__package__}.methods.{name}").METHOD


def register_method(method: AdapterMethod) -> None:
    """Add a method of another package, and register it with PEFT.

    Raises:
        ValueError: the name is taken or not in lower case letters, digits and ``_``, or the tuner has no prefix.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    if not re.fullmatch("[a-z][a-z0-9_]*", method.name) or method.name in ("full", "none", "projector"):
        raise ValueError(f'"{method.name}" cannot name an adapter method. Use lower case letters, digits and "_".')
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(method.name.upper(), method.config_cls)
    if known is not method.config_cls or (method.name in method_names() and adapter_method(method.name) != method):
        raise ValueError(f'The adapter method "{method.name}" exists already. Choose another name.')
    if not getattr(method.model_cls, "prefix", ""):
        raise ValueError(f"{method.model_cls.__name__}.prefix is empty. Set it to a prefix of the method's parameters.")
    _registered[method.name] = method
    _register_with_peft(method)


def register_built_in() -> None:
    """Register the built-in methods with PEFT. Calling it again changes nothing."""
    for name in _built_in():
        _register_with_peft(adapter_method(name))


def _register_with_peft(method: AdapterMethod) -> None:
    """Add a method to PEFT's mappings. ``register_peft_method`` refuses names outside its enum; the dicts do not."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTuner
    from peft.utils.peft_types import PeftType

    name = method.name.upper()
    if PEFT_TYPE_TO_CONFIG_MAPPING.get(name) is not method.config_cls:  # PEFT has its own entry for LoRA
        PEFT_TYPE_TO_CONFIG_MAPPING[name] = method.config_cls
        PEFT_TYPE_TO_TUNER_MAPPING[name] = method.model_cls
        PEFT_TYPE_TO_PREFIX_MAPPING[name] = method.model_cls.prefix
        # PEFT before 0.21 saves the members of its enum only
        if not hasattr(BaseTuner, "_get_adapter_state_dict") and name not in PeftType.__members__:
            member = str.__new__(PeftType, name)
            member._name_ = member._value_ = name
            PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
            PeftType._member_names_.append(name)


def register_when_peft_is_imported() -> None:
    """Register the built-in methods now if PEFT is imported, else at the end of its import."""
    if "peft" in sys.modules:
        register_built_in()
    elif not any(isinstance(finder, _PeftFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PeftFinder())


class _PeftFinder(MetaPathFinder):
    """Import finder that adds :func:`register_built_in` to the end of the import of ``peft``.

    If one of our adapter modules is imported first and imports PEFT itself, it is still incomplete when PEFT is ready.
    So our modules are found here too, and registration waits for the end of the outermost import.
    """

    depth = 0  # of nested imports

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != "peft" and not fullname.startswith("lvlm_clorae.adapters."):
            return None
        finders = (finder for finder in sys.meta_path if finder is not self)
        spec = next((spec for finder in finders if (spec := finder.find_spec(fullname, path, target))), None)
        if spec is not None and hasattr(spec.loader, "exec_module"):  # not a namespace package called peft
            spec.loader.exec_module = partial(self._execute, spec.loader.exec_module)  # type: ignore[union-attr,method-assign]
        return spec

    def _execute(self, exec_module: Callable[[ModuleType], None], module: ModuleType) -> None:
        self.depth += 1
        try:
            exec_module(module)
        finally:
            self.depth -= 1
        if not self.depth and "peft" in sys.modules:
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            register_built_in()
