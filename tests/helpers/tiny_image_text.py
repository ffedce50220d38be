"""Two small random image-text-to-text models of transformers with their processors, in the layout of the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import (
    CLIPVisionConfig,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from tests.helpers.tiny_causal import language_config, qwen_tokenizer, save

TURN = (
    "{{% for m in messages %}}<|im_start|>{{{{ m.role }}}}\n{{% for part in m.content %}}"
    "{{% if part.type == 'image' %}}"
    "{image}{{% else %}}{{{{ part.text }}}}{{% endif %}}{{% endfor %}}<|im_end|>\n{{% endfor %}}"
    "{{% if add_generation_prompt %}}<|im_start|>assistant\n{{% endif %}}"
)
VISION_TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


def save_qwen(directory: Path) -> Any:
    """Save a Qwen2.5-VL: images of any size, positions in three dimensions, a tower named ``visual``."""
    tokenizer = qwen_tokenizer()
    tokenizer.add_tokens(VISION_TOKENS, special_tokens=True)
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    text = language_config("qwen2", len(tokenizer) + 8).to_dict()
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    ends = {"bos_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = Qwen2_5_VLConfig(
        text_config={**{key: text[key] for key in (*keys, "vocab_size")}, "rope_parameters": rope, **ends},
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "out_hidden_size": 32,
            "window_size": 28,
            "fullatt_block_indexes": [1],
        },
        **dict(zip(names, tokenizer.convert_tokens_to_ids(VISION_TOKENS), strict=True)),
    )
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=56 * 56),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=TURN.format(image="<|vision_start|><|image_pad|><|vision_end|>"),
    )
    return save(directory, Qwen2_5_VLForConditionalGeneration(config), processor)


def save_onevision(directory: Path) -> Any:
    """Save a LLaVA-OneVision: several crops per image, a CLIP tower named ``vision_tower``."""
    tokenizer = qwen_tokenizer()
    tokenizer.add_tokens(["<image>", "<video>"], special_tokens=True)
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        projection_dim=24,
    )
    grid = [[28, 28], [28, 56], [56, 28]]
    config = LlavaOnevisionConfig(
        vision_config=vision,
        text_config=language_config("qwen2", len(tokenizer) + 8),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=grid,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        vision_aspect_ratio="anyres_max_9",
    )
    size = {"height": 28, "width": 28}
    processor = LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=grid),
        tokenizer=tokenizer,
        video_processor=LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=5,  # patches and the class token
        vision_feature_select_strategy="default",
        chat_template=TURN.format(image="<image>\n"),
    )
    return save(directory, LlavaOnevisionForConditionalGeneration(config), processor)
