"""PEFT knows our methods whichever package comes first, and importing ours alone costs nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

ORDERS = {
    "peft first": "import peft, lvlm_clorae",
    # looking peft up is not importing it; and the submodule's own import of peft must find itself half loaded
    "ours first": """
import lvlm_clorae, importlib.util
assert importlib.util.find_spec("peft") and "peft" not in sys.modules
import lvlm_clorae.adapters.clorae.config
""",
    # peft is ready while modules of ours are half loaded: the method's own and one that all of them share
    "a configuration first": "import lvlm_clorae; lvlm_clorae.MoSLoRAConfig",
}
CHECK = """
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
assert PEFT_TYPE_TO_CONFIG_MAPPING["CLORAE"] is lvlm_clorae.CLoRAEConfig
assert PEFT_TYPE_TO_TUNER_MAPPING["CLORAE"] is lvlm_clorae.CLoRAEModel
assert PEFT_TYPE_TO_PREFIX_MAPPING["CLORAE"] == "clorae_"
for name, config in (("MOSLORA", lvlm_clorae.MoSLoRAConfig), ("LORAMOE", lvlm_clorae.LoRAMoEConfig)):
    assert PEFT_TYPE_TO_CONFIG_MAPPING[name] is config
    assert PEFT_TYPE_TO_TUNER_MAPPING[name].prefix == PEFT_TYPE_TO_PREFIX_MAPPING[name] == f"{name.lower()}_"
from lvlm_clorae.adapters.registration import _PeftFinder
assert not [finder for finder in sys.meta_path if isinstance(finder, _PeftFinder)]
"""


def start(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", f"import sys\n{code}"], stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def orders() -> dict[str, subprocess.Popen[str]]:
    """Importing peft takes seconds: both orders at once."""
    return {name: start(code + CHECK) for name, code in ORDERS.items()}


@pytest.mark.parametrize("order", ORDERS)
def test_registered_in_either_order(orders, order):
    _, errors = orders[order].communicate()
    assert orders[order].returncode == 0, errors


def test_import_is_light_and_names_are_lazy():
    process = start("""
import time; before = time.process_time()
import lvlm_clorae
assert time.process_time() - before < 0.05
assert not {"torch", "peft", "transformers", "numpy"} & set(sys.modules)
assert {"CLoRAEConfig", "Extractor", "load_model"} <= set(dir(lvlm_clorae))
import lvlm_clorae.losses.achievement
assert "torch" not in sys.modules
assert not hasattr(lvlm_clorae, "nothing")
""")
    _, errors = process.communicate()
    assert process.returncode == 0, errors
