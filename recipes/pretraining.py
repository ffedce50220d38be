"""Shared parts of the recipes that pretrain a base: objectives on plain text, and the training loop.

An objective gives an input and a target text. Extraction depends on copying, and a small model that is trained on all
objectives from the start does not learn it (models/demo/README.md), so a first phase teaches only copying.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lvlm_clorae.models.families.t5 import T5Processor, VisionT5, VisionT5Config

BATCH = 32
Example = tuple[str, str, Image.Image | None, list[list[int]]]
"""Input text, target text, image and boxes."""


@dataclass(frozen=True)
class Phase:
    """A number of steps with a mix of objectives; without images only those on text are possible."""

    steps: int
    learning_rate: float
    mix: dict[str, float]
    with_images: bool = True


def tokenizer_of(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train byte-level BPE on ``texts``, with T5's special tokens and one hundred sentinels."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<pad>", "</s>", "<unk>"] + [f"<extra_id_{number}>" for number in range(100)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def corrupt(words: Sequence[str], rng: random.Random) -> tuple[str, str]:
    """Corrupt about a fifth of the words in spans of one to three, as T5 does, and return (input, target)."""
    source: list[str] = []
    target: list[str] = []
    position, sentinel = 0, 0
    while position < len(words):
        if rng.random() < 0.14:
            length = rng.randrange(1, 4)
            # The first two sentinels and the last become task markers, so they are not used here.
            mark = f"<extra_id_{sentinel + 2}>"
            source.append(mark)
            target += [mark, *words[position : position + length]]
            sentinel, position = sentinel + 1, position + length
        else:
            source.append(words[position])
            position += 1
    return " ".join(source), " ".join(target) or "<extra_id_2>"


def two_names(text: str, lexicon: Sequence[str], rng: random.Random) -> tuple[str, str]:
    """Return a question about two runs of one or two words, which the text need not contain, and its answer."""
    first, second = (" ".join(rng.sample(lexicon, rng.randrange(1, 3))) for _ in range(2))
    return f"both {first} and {second}. text: {text}", f"{first} , {second}"


def words_after(words: Sequence[str], rng: random.Random) -> tuple[str, str]:
    """Return a question about one of at least two words, and the one to three words that follow it."""
    start = rng.randrange(len(words) - 1)
    stop = min(len(words), start + 1 + rng.randrange(1, 4))
    return f"after {words[start]}, {stop - start - 1}: {' '.join(words)}", " ".join(words[start + 1 : stop])


def capitalised(text: str) -> list[str]:
    """Return the runs of capitalised words."""
    runs, run = [], []
    for word in [*text.split(), ""]:
        if word[:1].isupper():
            run.append(word)
        elif run:
            runs.append(" ".join(run))
            run = []
    return runs


def configuration(processor: T5Processor, tower: dict[str, Any], **shape: int) -> VisionT5Config:
    """Return FLAN-T5's configuration, with the same number of layers in encoder and decoder.

    Args:
        processor: sets the vocabulary and the region token
        tower: configuration of the vision tower
        shape: ``d_model, d_kv, d_ff, num_layers, num_heads``
    """
    return VisionT5Config(
        vision=tower,
        region_token_id=processor.region_token_id,
        vocab_size=len(processor.tokenizer),
        num_decoder_layers=shape["num_layers"],
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
        **shape,
    )


def pretrain(
    model: VisionT5,
    processor: T5Processor,
    phase: Phase,
    example: Callable[[random.Random, Phase], Example],
    rng: random.Random,
    output: Path,
) -> None:
    """Run one phase: AdamW with a one-cycle schedule, in bf16 on a GPU; the model is saved every 1000 steps.

    Args:
        model: its parameters that require a gradient are trained
        processor: makes the batches and is saved with the model
        phase: number of steps, learning rate and mix of objectives
        example: generates an example
        rng: its random numbers
        output: directory of the model
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    print(f"{sum(p.numel() for p in parameters) / 1e6:.2f} M parameters, {phase}", flush=True)
    optimizer = torch.optim.AdamW(parameters, lr=phase.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, phase.learning_rate, phase.steps, pct_start=0.05)
    started, running = time.time(), 0.0
    for step in range(1, phase.steps + 1):
        sources, targets, images, boxes = zip(*(example(rng, phase) for _ in range(BATCH)), strict=True)
        batch = {name: tensor.to(model.device) for name, tensor in processor(sources, images, boxes, targets).items()}
        with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        running += loss.item()
        if step % 100 == 0:
            print(f"step {step} loss {running / 100:.4f} {(time.time() - started) / step:.3f} s/step", flush=True)
            running = 0.0
        if step % 1000 == 0 or step == phase.steps:
            save(model, processor, output)


def save(model: VisionT5, processor: T5Processor, output: Path) -> None:
    """Save the model with half-precision weights."""
    output.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.half() for name, tensor in model.state_dict().items()}
    model.save_pretrained(output, state_dict=state)
    processor.save_pretrained(output)
