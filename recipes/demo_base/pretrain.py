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
import sys
from pathlib import Path

import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[1]))

from pretraining import (
    Example,
    Phase,
    capitalised,
    configuration,
    corrupt,
    pretrain,
    tokenizer_of,
    two_names,
    words_after,
)

from lvlm_clorae.data.demo import world
from lvlm_clorae.data.demo.generator import unlabelled
from lvlm_clorae.models.pictures import PictureTransform
from lvlm_clorae.models.processor_t5 import T5Processor
from lvlm_clorae.models.t5 import VisionT5
from lvlm_clorae.tasks.schema import REGION

IMAGE_SIZE = 64
TOWER = {"image_size": IMAGE_SIZE, "patch_size": 16, "width": 96, "layers": 4, "head_width": 32}
SHAPE = {"d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 4, "num_heads": 4}  # 2.3 M parameters with the tower
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


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """On demo text and the words of instructions."""
    rng = random.Random(f"tokenizer/{seed}")
    texts = [unlabelled(rng)[0] for _ in range(30000)]
    texts += [" ".join(WORDS)] * 50
    return tokenizer_of(texts, vocab_size=2048)


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
        return *two_names(text, LEXICON, rng), image, []
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
        model = VisionT5(configuration(processor, {"model": TOWER, "layer": -1}, **SHAPE))
    model.train()
    model.requires_grad_(True)
    # Here, and only here, the tower learns: its forward is taken without the no_grad of the frozen one.
    tower = model.vision_tower
    tower.forward = type(tower).forward.__wrapped__.__get__(tower)
    for number, phase in enumerate(PHASES[1:] if args.start else PHASES):
        rng = random.Random(f"pretrain/{args.seed}/{number + bool(args.start)}")
        pretrain(model, processor, phase, example, rng, args.output)


if __name__ == "__main__":
    main()
