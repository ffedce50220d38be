"""A random VisionT5 of two layers, its processor, and batches for it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from lvlm_clorae.models import Processor
from lvlm_clorae.models.constrained import PROBE
from lvlm_clorae.models.families.t5 import T5Processor, VisionT5, VisionT5Config
from lvlm_clorae.models.processor import ImageTransform
from tests.helpers.launch import REPOSITORY

DEMO = REPOSITORY / "lvlm_clorae/models/demo"
TOWER = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 2, "head_width": 16}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 2, "dropout_rate": 0.1}


@cache
def _demo_processor() -> Processor:
    return Processor.from_pretrained(DEMO)


def tiny_processor() -> T5Processor:
    """Build a processor of the demo base's tokenizer with images of 32 x 32."""
    return T5Processor(_demo_processor().tokenizer, ImageTransform(TOWER["image_size"]))


@cache
def unigram_tokenizer(split: bool = True) -> PreTrainedTokenizerFast:
    """Train a tokenizer like T5's: pieces with a leading space, NFKC normalization, unknown characters.

    Without ``split`` pieces may span several words.
    """
    tokenizer = Tokenizer(models.Unigram())
    one_blank = normalizers.Replace(Regex(" {2,}"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC(), one_blank])
    words = [pre_tokenizers.WhitespaceSplit()] if split else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*words, pre_tokenizers.Metaspace(split=split)])
    tokenizer.decoder = decoders.Metaspace()
    specials = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=150, special_tokens=specials, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator([*PROMPTS, " ".join(PROBE), "person, Mara location, Tamsk"] * 50, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    sentinels = [f"<extra_id_{number}>" for number in range(100)]
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, extra_special_tokens=sentinels, **names)


def tiny_config(**changes: Any) -> VisionT5Config:
    """Build the configuration of :func:`tiny_model`."""
    processor = tiny_processor()
    settings: dict[str, Any] = {
        **T5,
        "vocab_size": len(processor.tokenizer),
        "feed_forward_proj": "gated-gelu",
        "decoder_start_token_id": 0,
        "vision": {"model": TOWER},
        "region_token_id": processor.region_token_id,
    }
    return VisionT5Config(**{**settings, **changes})


def tiny_model(seed: int = 0, **changes: Any) -> VisionT5:
    """Build a random model in eval mode with weights large enough that its answers depend on its input."""
    torch.manual_seed(seed)
    model = VisionT5(tiny_config(**changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_norm" not in name and not name.startswith("vision_tower"):
                parameter.normal_(std=0.2 if name == "shared.weight" else 0.6)
    return model


def noise_image(number: int = 0, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """Build a noise image from the seed ``number``."""
    generator = torch.Generator().manual_seed(number)
    values = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(values.numpy())


PROMPTS = ["event arguments. objects: O1 <region> O2 <region> text: guards struck the harbour", "entities. text: Mara"]


def tiny_batch(answers: bool = True) -> dict[str, torch.Tensor]:
    """Build a batch of two rows: one with an image and two objects, one with text alone."""
    return tiny_processor()(
        PROMPTS,
        [noise_image(), None],
        [[[0, 0, 20, 15], [10, 5, 40, 30]], []],
        ["attack <spot> target, O1", "none"] if answers else None,
    )


def image_a_row(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the batch with an image for every row, blank where a row has none."""
    shown = batch["pixel_mask"] == 1
    pixels = batch["pixel_values"].new_zeros(len(shown), *batch["pixel_values"].shape[1:])
    pixels[shown] = batch["pixel_values"][: int(shown.sum())]
    return {**batch, "pixel_values": pixels}


def save_tiny(directory: Path) -> VisionT5:
    """Save a tiny model and its processor to ``directory``; return the model."""
    model = tiny_model()
    model.save_pretrained(directory)
    tiny_processor().save_pretrained(directory)
    return model


def save_plain_t5(directory: Path, own_head: bool) -> T5ForConditionalGeneration:
    """Save a plain T5 in the layout of the hub, with a separate output embedding (as FLAN-T5) or without."""
    torch.manual_seed(3)
    processor = tiny_processor()
    activation = "gated-gelu" if own_head else "relu"
    config = T5Config(
        **T5,
        vocab_size=len(processor.tokenizer),
        feed_forward_proj=activation,
        tie_word_embeddings=not own_head,
        decoder_start_token_id=0,
    )
    plain = T5ForConditionalGeneration(config).eval()
    if own_head:
        plain.lm_head.weight = torch.nn.Parameter(0.1 * torch.randn_like(plain.lm_head.weight))
    plain.save_pretrained(directory)
    processor.tokenizer.save_pretrained(directory)
    return plain
