"""Small random causal language models and LLaVAs in the layout of the hub, and their tokenizers."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from tests.helpers.tiny import TOWER

WORDS = [
    "USER: entities. text: Mara Novotny leaves Tamsk for the Winter Cup ASSISTANT: person, Mara <spot> location, Tamsk",
    "event arguments. objects: O1 O2 text: guards struck the harbour types: attack roles: target, attacker none",
]
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The essence of llava-hf's template, which takes messages in parts.
LLAVA_CHAT = (
    "{% for m in messages %}{{ m.role.upper() }}: "
    "{% for part in m.content | selectattr('type', 'equalto', 'image') %}<image>\n{% endfor %}"
    "{% for part in m.content | selectattr('type', 'equalto', 'text') %}{{ part.text }} {% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@cache
def _llama_json() -> str:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(WORDS * 20, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if not token["content"].startswith("<0x")]
    return json.dumps(content)


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer like LLaMA's: pieces with a leading space, byte fallback, a bos token, no padding token."""
    tokenizer = Tokenizer.from_str(_llama_json())
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer like Qwen's: byte-level pieces, a chat template, no bos token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(WORDS * 20, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token="<|im_end|>", chat_template=CHAT
    )


TOKENIZERS = {"llama": llama_tokenizer, "qwen2": qwen_tokenizer, "gpt2": qwen_tokenizer}


def language_config(model_type: str, vocab_size: int) -> Any:
    """Build a configuration of two layers, 32 wide; Qwen's has fewer key heads, GPT-2 learned positions."""
    if model_type == "gpt2":
        return GPT2Config(vocab_size=vocab_size, n_embd=32, n_layer=2, n_head=4, n_positions=512)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    configs: dict[str, Any] = {"llama": LlamaConfig, "qwen2": Qwen2Config}
    return configs[model_type](vocab_size=vocab_size, num_key_value_heads=2 if model_type == "qwen2" else 4, **shape)


def randomize(model: PreTrainedModel, seed: int = 0) -> Any:
    """Give the model weights large enough that its answers depend on its input, and return it in eval mode."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
            elif "bias" in name:
                parameter.normal_(std=0.1)
    return model.eval()


def save_language(directory: Path, model_type: str = "llama") -> Any:
    """Save a causal language model and its tokenizer in the layout of the hub; return the model."""
    tokenizer = TOKENIZERS[model_type]()
    config = language_config(model_type, len(tokenizer) + 8)
    return save(directory, AutoModelForCausalLM.from_config(config), tokenizer)


def save(directory: Path, model: Any, processor: Any) -> Any:
    """Save a model with random weights and its tokenizer or processor; return the model."""
    model = randomize(model)
    model.generation_config.eos_token_id = getattr(processor, "tokenizer", processor).eos_token_id
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return model


def save_llava(directory: Path, act: str = "quick_gelu") -> LlavaForConditionalGeneration:
    """Save a LLaVA-1.5 of three CLIP and two LLaMA layers in the layout of llava-hf; return the model."""
    tokenizer = llama_tokenizer()
    tokenizer.add_tokens(["<image>", "<pad>"], special_tokens=True)
    tokenizer.pad_token = "<pad>"
    tokenizer.chat_template = LLAVA_CHAT
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
        hidden_act=act,
        projection_dim=24,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=language_config("llama", len(tokenizer) + 8),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
    )
    return save(directory, LlavaForConditionalGeneration(config), tokenizer)


def save_tower(directory: Path) -> str:
    """Save a small random CLIP of open_clip; return its name for ``load_model(vision=...)``."""
    torch.manual_seed(1)
    text = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 16, "vision_cfg": TOWER, "text_cfg": text}
    directory.mkdir(parents=True)
    about = {"model_cfg": config, "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}}
    (directory / "open_clip_config.json").write_text(json.dumps(about), encoding="utf-8")
    clip = open_clip.CLIP(**config)
    save_file(
        {name: tensor.contiguous() for name, tensor in clip.state_dict().items()},
        directory / "open_clip_model.safetensors",
    )
    return f"local-dir:{directory}"
