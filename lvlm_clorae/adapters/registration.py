"""Make PEFT know our methods, whichever of the two packages is imported first.

PEFT's ``register_peft_method`` refuses names outside its enum, but its mapping dicts accept a plain string as key.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def register() -> None:
    """Enter our methods into PEFT's mappings. Imports peft and torch; calling it again changes nothing."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    from lvlm_clorae.adapters.clorae.config import CLoRAEConfig
    from lvlm_clorae.adapters.clorae.model import CLoRAEModel
    from lvlm_clorae.adapters.loramoe import LoRAMoEConfig, LoRAMoEModel
    from lvlm_clorae.adapters.moslora import MoSLoRAConfig, MoSLoRAModel

    for name, config, tuner in (
        ("CLORAE", CLoRAEConfig, CLoRAEModel),
        ("MOSLORA", MoSLoRAConfig, MoSLoRAModel),
        ("LORAMOE", LoRAMoEConfig, LoRAMoEModel),
    ):
        PEFT_TYPE_TO_CONFIG_MAPPING[name] = config
        PEFT_TYPE_TO_TUNER_MAPPING[name] = tuner
        PEFT_TYPE_TO_PREFIX_MAPPING[name] = tuner.prefix
        _admit_to_enum(name)


def _admit_to_enum(name: str) -> None:
    """Before 0.21, PEFT saves only methods that are members of its enum: add one where that is so."""
    from peft.tuners.tuners_utils import BaseTuner
    from peft.utils.peft_types import PeftType

    if hasattr(BaseTuner, "_get_adapter_state_dict") or name in PeftType.__members__:
        return
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
    PeftType._member_names_.append(name)


def register_when_peft_is_imported() -> None:
    """Register now if PEFT is imported already; otherwise when its import ends, see :class:`_PeftFinder`."""
    if "peft" in sys.modules:
        register()
    elif not any(isinstance(finder, _PeftFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PeftFinder())


class _PeftFinder(MetaPathFinder):
    """Finds ``peft`` where it would be found anyway and adds :func:`register` to the end of its import.

    Where a module of ours is imported first and imports peft on its way, that module is half loaded when peft is ready.
    So ours are found here too, and the end that counts is that of the outermost import.
    """

    def __init__(self) -> None:
        self.importing = 0  # modules, one inside the other

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "peft" and not fullname.startswith("lvlm_clorae.adapters."):
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                self._then_register(spec.loader)
                return spec
        return None

    def _then_register(self, loader: Loader | None) -> None:
        execute = getattr(loader, "exec_module", None)
        if execute is None:  # a namespace folder that happens to be called peft
            return

        def exec_module(module: ModuleType) -> None:
            self.importing += 1
            try:
                execute(module)
            finally:
                self.importing -= 1
            if not self.importing and "peft" in sys.modules:
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                register()

        loader.exec_module = exec_module  # type: ignore[union-attr,method-assign]
