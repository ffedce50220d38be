"""Pretrain the demo base: a small FLAN-T5-shaped model with a small open_clip tower.

It sees unlabelled demo text, pictures and the names of the things drawn in them, never an annotation or an answer.
Objectives, each an input and a target text: T5's span corruption, captions of the picture, names of boxed regions, the
region of a named thing, repetition of a text or of a list of words, the capitalised words of the text, two words given
in a question, and the words after a given word. The first phase, without pictures, teaches copying, on which all else
rests: a small model that starts with everything at once does not find it.

    python recipes/demo_base/pretrain.py --output lvlm_clorae/models/demo
"""

from __future__ import annotations

import argparse
import io
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lvlm_clorae.data.demo import world
from lvlm_clorae.data.demo.generator import unlabelled
from lvlm_clorae.models.pictures import PictureTransform
from lvlm_clorae.models.processor_t5 import T5Processor
from lvlm_clorae.models.t5 import VisionT5, VisionT5Config
from lvlm_clorae.tasks.schema import REGION

IMAGE_SIZE = 64
# Words that instructions are made of. A large base knows them; this one learns them by repeating lists.
WORDS = (
    "person location organization miscellaneous entities relation between event triggers arguments text: types: roles: "
    "relations: objects: objects. entities. triggers. arguments. none none, and of O1 O2 O3 O4 O5 "
    + " ".join(world.RELATIONS)
    + " "
    + " ".join(world.EVENT_TYPES)
    + " "
    + " ".join(world.ROLES)
    + " caption: repeat: capitals: fill: find both after shows nothing"
).split()
LEXICON = (
    *WORDS, *world.FIRST, *world.LAST, *world.CITIES, *world.ORG_HEADS, *world.ORG_TAILS, *world.WORK_HEADS,
    *world.WORK_TAILS, *world.AMBIGUOUS, *world.GROUPS, *world.TARGETS, *world.GOODS, *world.SUSPECTS, *world.CAUSES,
)  # fmt: skip
BATCH = 32


@dataclass(frozen=True)
class Phase:
    """Steps under one mix of objectives; without ``pictures`` only those of text are possible."""

    steps: int
    learning_rate: float
    mix: dict[str, float]
    pictures: bool = True


PHASES = (
    Phase(2500, 1.5e-3, {"repeat": 0.6, "capitals": 0.2, "after": 0.2}, pictures=False),
    Phase(
        4000,
        1.5e-3,
        {
            "caption": 0.1,
            "objects": 0.2,
            "find": 0.2,
            "repeat": 0.1,
            "capitals": 0.1,
            "both": 0.1,
            "after": 0.1,
            "fill": 0.1,
        },
    ),
)
Example = tuple[str, str, Image.Image | None, list[list[int]]]


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE on demo text, with T5's special tokens and one hundred sentinels."""
    rng = random.Random(f"tokenizer/{seed}")
    texts = [unlabelled(rng)[0] for _ in range(30000)]
    texts += [" ".join(WORDS)] * 50
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<pad>", "</s>", "<unk>"] + [f"<extra_id_{number}>" for number in range(100)]
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def corrupt(words: list[str], rng: random.Random) -> tuple[str, str]:
    """T5's span corruption: about a fifth of the words in spans of one to three."""
    source: list[str] = []
    target: list[str] = []
    position, sentinel = 0, 0
    while position < len(words):
        if rng.random() < 0.14:
            length = rng.randrange(1, 4)
            # The first two sentinels and the last are task markers later; here they mean nothing yet.
            mark = f"<extra_id_{sentinel + 2}>"
            source.append(mark)
            target += [mark, *words[position : position + length]]
            sentinel, position = sentinel + 1, position + length
        else:
            source.append(words[position])
            position += 1
    return " ".join(source), " ".join(target) or "<extra_id_2>"


def example(rng: random.Random, phase: Phase) -> Example:
    """One input text, target text, picture and boxes; the objective by the weights of ``phase.mix``."""
    text, things, picture, boxes = unlabelled(rng)
    kind = rng.choices(list(phase.mix), list(phase.mix.values()))[0]
    image = Image.open(io.BytesIO(picture)).convert("RGB") if picture and phase.pictures else None
    if kind == "repeat" or (image is None and kind in ("caption", "objects", "find")):
        words = text if rng.random() < 0.3 else " ".join(rng.sample(LEXICON, rng.randrange(2, 12)))
        return f"repeat: {words}", words, None, []
    if kind == "capitals":
        return f"capitals: {text}", " , ".join(capitalised(text)) or "nothing", image, []
    if kind == "both":
        return *two_names(text, rng), image, []
    if kind == "after":
        return *words_after(text.split() if rng.random() < 0.5 else rng.sample(LEXICON, 8), rng), None, []
    if kind == "caption":
        return "caption:", " , ".join(sorted(things)), image, []
    listed = " ".join(f"O{number} {REGION}" for number in range(1, len(things) + 1))
    if kind == "objects":
        return f"objects: {listed}", " , ".join(f"O{n} {name}" for n, name in enumerate(things, 1)), image, boxes
    if kind == "find":
        number = rng.randrange(len(things))
        return f"find {things[number]}. objects: {listed} text: {text}", f"O{number + 1}", image, boxes
    source, target = corrupt((f"{text} shows {' , '.join(things)}" if things else text).split(), rng)
    return f"fill: {source}", target, image, []


def two_names(text: str, rng: random.Random) -> tuple[str, str]:
    """Two runs of one or two words, named before a text that need not have them."""
    first, second = (" ".join(rng.sample(LEXICON, rng.randrange(1, 3))) for _ in range(2))
    return f"both {first} and {second}. text: {text}", f"{first} , {second}"


def words_after(words: list[str], rng: random.Random) -> tuple[str, str]:
    """One word of ``words``, and the up to three that follow it."""
    start = rng.randrange(len(words) - 1)
    stop = min(len(words), start + 1 + rng.randrange(1, 4))
    return f"after {words[start]}, {stop - start - 1}: {' '.join(words)}", " ".join(words[start + 1 : stop])


def capitalised(text: str) -> list[str]:
    """The runs of capitalised words."""
    runs, run = [], []
    for word in [*text.split(), ""]:
        if word[:1].isupper():
            run.append(word)
        elif run:
            runs.append(" ".join(run))
            run = []
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("lvlm_clorae/models/demo"))
    parser.add_argument("--start", type=Path, help="go on with the second phase from this directory")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    if args.start:
        model = VisionT5.from_pretrained(args.start, dtype=torch.float32)
        processor = T5Processor.from_pretrained(args.start)
    else:
        processor = T5Processor(make_tokenizer(args.seed), PictureTransform(IMAGE_SIZE))
        model = VisionT5(configuration(processor))
    model.train()
    model.requires_grad_(True)
    # Here, and only here, the tower learns: its forward is taken without the no_grad of the frozen one.
    tower = model.vision_tower
    tower.forward = type(tower).forward.__wrapped__.__get__(tower)
    for number, phase in enumerate(PHASES[1:] if args.start else PHASES):
        pretrain(
            model, processor, phase, random.Random(f"pretrain/{args.seed}/{number + bool(args.start)}"), args.output
        )


def configuration(processor: T5Processor) -> VisionT5Config:
    """128 wide, four layers each, a tower of 96 in 16-pixel patches: 2.3 M parameters."""
    tower = {"image_size": IMAGE_SIZE, "patch_size": 16, "width": 96, "layers": 4, "head_width": 32}
    return VisionT5Config(
        vision={"model": tower, "layer": -1},
        region_token_id=processor.region_token_id,
        vocab_size=len(processor.tokenizer),
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_layers=4,
        num_decoder_layers=4,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )


def pretrain(model: VisionT5, processor: T5Processor, phase: Phase, rng: random.Random, output: Path) -> None:
    """One phase: AdamW under a one-cycle schedule; saved every 1000 steps and at the end."""
    parameters = list(model.parameters())
    print(f"{sum(p.numel() for p in parameters) / 1e6:.2f} M parameters, {phase}", flush=True)
    optimizer = torch.optim.AdamW(parameters, lr=phase.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, phase.learning_rate, phase.steps, pct_start=0.05)
    started, running = time.time(), 0.0
    for step in range(1, phase.steps + 1):
        sources, targets, images, boxes = zip(*(example(rng, phase) for _ in range(BATCH)), strict=True)
        loss = model(**processor(sources, images, boxes, targets)).loss
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
    """Half-precision weights: the demo base stays small in the repository."""
    output.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.half() for name, tensor in model.state_dict().items()}
    model.save_pretrained(output, state_dict=state)
    processor.save_pretrained(output)


if __name__ == "__main__":
    main()
