"""A random VisionT5 of two layers that is made in no time, and batches for it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lvlm_clorae.models import Processor
from lvlm_clorae.models.constrained import PROBE
from lvlm_clorae.models.pictures import PictureTransform
from lvlm_clorae.models.processor_t5 import T5Processor
from lvlm_clorae.models.t5 import VisionT5, VisionT5Config
from tests.launch import REPOSITORY

DEMO = REPOSITORY / "lvlm_clorae/models/demo"
TOWER = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 2, "head_width": 16}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 2, "dropout_rate": 0.1}


@cache
def _demo_processor() -> Processor:
    return Processor.from_pretrained(DEMO)


def tiny_processor() -> T5Processor:
    """The demo base's small tokenizer with pictures of 32 x 32."""
    return T5Processor(_demo_processor().tokenizer, PictureTransform(TOWER["image_size"]))


@cache
def unigram_tokenizer(split: bool = True) -> PreTrainedTokenizerFast:
    """As T5's own: pieces that begin with a blank, characters rewritten by NFKC, those of no piece unknown.

    Without ``split`` pieces reach from one word into the next.
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
    """The configuration of :func:`tiny_model`."""
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
    """A random model in eval mode with weights large enough that its answers depend on what it reads."""
    torch.manual_seed(seed)
    model = VisionT5(tiny_config(**changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_norm" not in name and not name.startswith("vision_tower"):
                parameter.normal_(std=0.2 if name == "shared.weight" else 0.6)
    return model


def picture(number: int = 0, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """Noise of its own for every number."""
    generator = torch.Generator().manual_seed(number)
    values = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(values.numpy())


PROMPTS = ["event arguments. objects: O1 <region> O2 <region> text: guards struck the harbour", "entities. text: Mara"]


def tiny_batch(answers: bool = True) -> dict[str, torch.Tensor]:
    """Two rows: one with a picture and two objects, one of text alone."""
    return tiny_processor()(
        PROMPTS,
        [picture(), None],
        [[[0, 0, 20, 15], [10, 5, 40, 30]], []],
        ["attack <spot> target, O1", "none"] if answers else None,
    )


def picture_a_row(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch with a picture in every row, blank where there is none, as models take it too."""
    shown = batch["pixel_mask"] == 1
    pixels = batch["pixel_values"].new_zeros(len(shown), *batch["pixel_values"].shape[1:])
    pixels[shown] = batch["pixel_values"][: int(shown.sum())]
    return {**batch, "pixel_values": pixels}


def save_tiny(directory: Path) -> VisionT5:
    """A tiny model with its processor in ``directory``, as ``save_pretrained`` writes them."""
    model = tiny_model()
    model.save_pretrained(directory)
    tiny_processor().save_pretrained(directory)
    return model
