"""Pretrain the demo base: a small model of FLAN-T5's architecture with a small open_clip tower.

The data are unlabelled demo texts, images and the names of their icons, without annotations and answers. Objectives,
each with an input and a target text: T5's span corruption, captions of the image, names of boxed regions, the region of
a named icon, repetition of a text or of a list of words, the capitalised words of the text, two words of a question,
and the words after a given word. The first phase has no images and teaches copying, which the other objectives depend
on: a small model that is trained on all of them from the start does not learn it.

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

sys.path.insert(0, str(Path(__file__).parents[2]))
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

from lvlm_clorae.models.families.t5 import T5Processor, VisionT5
from lvlm_clorae.models.processor import ImageTransform
from lvlm_clorae.tasks.schema import REGION
from tools.demo_data import images, world
from tools.demo_data.generator import DATASETS

IMAGE_SIZE = 64
TOWER = {"image_size": IMAGE_SIZE, "patch_size": 16, "width": 96, "layers": 4, "head_width": 32}
SHAPE = {"d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 4, "num_heads": 4}  # 2.3 M parameters with the tower
# Words of the prompts. A large base knows them; this one learns them by repeating lists.
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
    Phase(2500, 1.5e-3, {"repeat": 0.6, "capitals": 0.2, "after": 0.2}, with_images=False),
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


def unlabelled(rng: random.Random) -> tuple[str, list[str], bytes | None, list[list[int]]]:
    """Generate a text, the names of its icons, the image and their boxes."""
    writer, _, things = DATASETS[rng.choice(list(DATASETS))].write(rng)
    image, boxes = images.render(things, rng) if things else (None, [])
    return " ".join(writer.tokens), things, image, boxes


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Train the tokenizer on demo text and the words of prompts."""
    rng = random.Random(f"tokenizer/{seed}")
    texts = [unlabelled(rng)[0] for _ in range(30000)]
    texts += [" ".join(WORDS)] * 50
    return tokenizer_of(texts, vocab_size=2048)


def example(rng: random.Random, phase: Phase) -> Example:
    """Generate an example; the objective is sampled by the weights of ``phase.mix``."""
    text, things, png, boxes = unlabelled(rng)
    objective = rng.choices(list(phase.mix), list(phase.mix.values()))[0]
    image = Image.open(io.BytesIO(png)).convert("RGB") if png and phase.with_images else None
    if objective == "repeat" or (image is None and objective in ("caption", "objects", "find")):
        words = text if rng.random() < 0.3 else " ".join(rng.sample(LEXICON, rng.randrange(2, 12)))
        return f"repeat: {words}", words, None, []
    if objective == "capitals":
        return f"capitals: {text}", " , ".join(capitalised(text)) or "nothing", image, []
    if objective == "both":
        return *two_names(text, LEXICON, rng), image, []
    if objective == "after":
        return *words_after(text.split() if rng.random() < 0.5 else rng.sample(LEXICON, 8), rng), None, []
    if objective == "caption":
        return "caption:", " , ".join(sorted(things)), image, []
    listed = " ".join(f"O{number} {REGION}" for number in range(1, len(things) + 1))
    if objective == "objects":
        return f"objects: {listed}", " , ".join(f"O{n} {name}" for n, name in enumerate(things, 1)), image, boxes
    if objective == "find":
        number = rng.randrange(len(things))
        return f"find {things[number]}. objects: {listed} text: {text}", f"O{number + 1}", image, boxes
    source, target = corrupt((f"{text} shows {' , '.join(things)}" if things else text).split(), rng)
    return f"fill: {source}", target, image, []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("lvlm_clorae/models/demo"))
    parser.add_argument("--start", type=Path, help="directory of the first phase's model, to run only the second")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    if args.start:
        model = VisionT5.from_pretrained(args.start, dtype=torch.float32)
        processor = T5Processor.from_pretrained(args.start)
    else:
        processor = T5Processor(make_tokenizer(args.seed), ImageTransform(IMAGE_SIZE))
        model = VisionT5(configuration(processor, {"model": TOWER, "layer": -1}, **SHAPE))
    model.train()
    model.requires_grad_(True)
    # Only here is the tower trained, so its forward is called without the no_grad of the frozen one.
    tower = model.vision_tower
    tower.forward = type(tower).forward.__wrapped__.__get__(tower)
    for number, phase in enumerate(PHASES[1:] if args.start else PHASES):
        rng = random.Random(f"pretrain/{args.seed}/{number + bool(args.start)}")
        pretrain(model, processor, phase, example, rng, args.output)


if __name__ == "__main__":
    main()
