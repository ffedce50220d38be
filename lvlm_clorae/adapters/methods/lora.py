"""LoRA as PEFT implements it (Hu et al., ICLR 2022), at the scale of two by default as our methods."""

from peft import LoraConfig, LoraModel

from lvlm_clorae.adapters.register import AdapterMethod

METHOD = AdapterMethod(
    "lora",
    LoraConfig,
    LoraModel,
    lambda common, run, tasks: LoraConfig(**common | {"lora_alpha": common["lora_alpha"] or 2 * common["r"]}),
)
