"""Descriptors of methods, registration with PEFT in any import order, and a method from another package."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from torch import nn

from lvlm_clorae.adapters import register
from lvlm_clorae.adapters.config import AdapterConfig
from lvlm_clorae.adapters.layer import Adapter
from lvlm_clorae.adapters.model import AdapterModel
from lvlm_clorae.adapters.register import AdapterMethod, adapter_method, method_names, register_method
from lvlm_clorae.analysis.routing import check_gate
from lvlm_clorae.errors import UserError
from lvlm_clorae.models.loading import describe_model
from lvlm_clorae.models.parts import part_sizes
from lvlm_clorae.training.adapters import add_adapter
from lvlm_clorae.training.config import TrainConfig
from tests.helpers.adapters import batch, layers_of, randomise, t5

ORDERS = {
    "peft first": "import peft, lvlm_clorae",
    # finding the module peft is not importing it; and the submodule imports peft while it is itself incomplete
    "lvlm_clorae first": """
import lvlm_clorae, importlib.util
assert importlib.util.find_spec("peft") and "peft" not in sys.modules
import lvlm_clorae.adapters.methods.clorae.config
""",
    # peft is ready while two of our modules are incomplete: the method's own and a shared one
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
from lvlm_clorae.adapters.register import _PeftFinder
assert not [finder for finder in sys.meta_path if isinstance(finder, _PeftFinder)]
"""


FORK = """
import json, os, sys, traceback
# what takes long in the import of peft
import accelerate, bitsandbytes, torch, transformers.models.auto.modeling_auto, transformers.models.bloom.modeling_bloom
assert "peft" not in sys.modules
codes = {}
for name, code in json.loads(sys.argv[1]).items():
    child = os.fork()
    if not child:
        try:
            exec(code, {"sys": sys})
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    codes[name] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(json.dumps(codes))
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork")
def test_methods_are_registered_in_any_import_order():
    orders = {name: code + CHECK for name, code in ORDERS.items()}
    line = [sys.executable, "-c", FORK, json.dumps(orders)]
    process = subprocess.run(line, capture_output=True, text=True, check=True)
    assert json.loads(process.stdout.splitlines()[-1]) == dict.fromkeys(ORDERS, 0), process.stderr


@pytest.mark.integration
def test_import_is_fast_and_names_are_lazy():
    code = """
import sys, time
before = time.process_time()
import lvlm_clorae
from lvlm_clorae.adapters.register import method_names
assert {"clorae", "hydralora", "lora", "loramoe", "moslora", "mtllora"} <= set(method_names())
assert time.process_time() - before < 0.05
assert not {"torch", "peft", "transformers", "numpy"} & set(sys.modules)
assert {"CLoRAEConfig", "Extractor", "load_model"} <= set(dir(lvlm_clorae))
import lvlm_clorae.losses.achievement
assert "torch" not in sys.modules
assert not hasattr(lvlm_clorae, "nothing")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_built_in_method_has_a_descriptor_of_its_name():
    for name in method_names():
        method = adapter_method(name)
        assert method.name == name
        assert PEFT_TYPE_TO_CONFIG_MAPPING[name.upper()] is method.config_cls
        assert PEFT_TYPE_TO_TUNER_MAPPING[name.upper()] is method.model_cls
        assert PEFT_TYPE_TO_PREFIX_MAPPING[name.upper()] == method.model_cls.prefix
    with pytest.raises(UserError, match="clorae"):
        adapter_method("clora")


# A complete method of another package: y = W0 x + (alpha / r) b, a trained bias


@dataclass
class BiasConfig(AdapterConfig):
    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "TESTBIAS"


class Bias(Adapter):
    dict_name = "testbias_adapters"

    def __init__(self, d_in: int, d_out: int, config: AdapterConfig) -> None:
        super().__init__(d_in, d_out, config)
        self.bias = nn.Parameter(torch.zeros(d_out))

    def forward(self, output, x, task, valid=None, adder=None):
        return output + self.config.scaling * self.bias, None, None


class BiasModel(AdapterModel):
    prefix = "testbias_"
    adapter_cls = Bias


METHOD = AdapterMethod("testbias", BiasConfig, BiasModel, lambda common, run, tasks: BiasConfig(**common))


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(register, "_registered", {})
    register_method(METHOD)
    yield
    for mapping in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
        del mapping["TESTBIAS"]


@pytest.mark.usefixtures("registered")
def test_a_method_from_outside_saves_and_loads_through_peft(tmp_path: Path):
    assert "testbias" in method_names()
    model = randomise(peft.get_peft_model(t5(), BiasConfig(r=2))).eval()
    base, expected = t5().eval()(**batch()).logits, model(**batch()).logits
    assert not torch.allclose(base, expected)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(t5(), tmp_path).eval()
    assert isinstance(again.base_model, BiasModel)
    assert torch.equal(again(**batch()).logits, expected)


@pytest.mark.usefixtures("registered")
def test_a_method_from_outside_is_an_adapter_of_training():
    model = add_adapter(describe_model("demo"), TrainConfig(adapter="testbias", lora_rank=4), ["mner"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "testbias_" in name}
    assert len(trained) == len(layers_of(model)) > 0
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha) == (4, 8)


@pytest.mark.usefixtures("registered")
def test_sizes_of_a_model_count_the_adapter_of_a_method_from_outside():
    sizes = part_sizes(peft.get_peft_model(t5(), BiasConfig(r=2)))
    assert sizes["adapter"].trained == sizes["adapter"].parameters > 0
    assert sizes["language model"].trained == 0


def test_routing_refuses_a_method_from_outside_registered_or_not(registered: None, tmp_path: Path, monkeypatch):
    peft.get_peft_model(t5(), BiasConfig(r=2)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="testbias has no gate"):
        check_gate(tmp_path)
    with monkeypatch.context() as context:
        context.delitem(PEFT_TYPE_TO_CONFIG_MAPPING, "TESTBIAS")
        with pytest.raises(UserError, match=r"adapter_config\.json.*TESTBIAS.*[Ii]mport"):
            check_gate(tmp_path)


@pytest.mark.usefixtures("registered")
def test_a_taken_name_raises():
    register_method(METHOD)  # the same again is no error
    for name, config_cls in (("testbias", AdapterConfig), ("ia3", BiasConfig), ("clorae", BiasConfig)):
        with pytest.raises(ValueError, match=name):
            register_method(SimpleNamespace(name=name, config_cls=config_cls))


@pytest.mark.parametrize("name", ["", "full", "none", "Mine", "my-method", "my method", "2nd"])
def test_an_invalid_name_raises(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(register, "_register_with_peft", lambda method: None)
    monkeypatch.setattr(register, "_registered", {})
    with pytest.raises(ValueError, match=f'"{name}"'):
        register_method(replace(METHOD, name=name))
    assert not register._registered


def test_an_empty_prefix_raises(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(register, "_register_with_peft", lambda method: None)
    monkeypatch.setattr(register, "_registered", {})
    without = type("Without", (BiasModel,), {"prefix": ""})
    with pytest.raises(ValueError, match="prefix"):
        register_method(replace(METHOD, model_cls=without))
