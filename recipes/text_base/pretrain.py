"""Pretrain a base on the unlabelled training texts of shards, for benchmarks/real_text.py.

The data are the texts of the training samples and the words of the prompts, including label names, without annotations
and answers. Objectives: repetition of a text or of a list of words, the capitalised words of the text, two words of a
question, the words after a given word, and in the second phase T5's span corruption (pretraining.py). The vision tower
is the demo base's, frozen. The small size is initialized from the demo base, which can copy its own words; a new token
is initialized to the mean of the demo base's tokens that spell it. The other size is initialized randomly.

    python recipes/text_base/pretrain.py --shards runs/real_text/shards --output runs/text_base
    python recipes/text_base/pretrain.py --shards runs/real_text/shards --output runs/text_base_large --size base
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
from collections.abc import Callable
from pathlib import Path

import torch

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

from lvlm_clorae.data.index import load_index
from lvlm_clorae.data.reader import read_samples
from lvlm_clorae.errors import UserError
from lvlm_clorae.models import load_model
from lvlm_clorae.models.families.t5 import T5Processor, VisionT5
from lvlm_clorae.tasks.prompt import build_prompt
from lvlm_clorae.tasks.schema import plain

INSTRUCTIONS = "none none, and of between repeat: capitals: fill: both after nothing".split()
WINDOW = 24
"""Maximum number of words of a text in an example."""
BASE = {"d_model": 512, "d_kv": 64, "d_ff": 1024, "num_layers": 8, "num_heads": 8}
VOCABULARY = {"small": 2048, "base": 16384}
"""Size -> tokens: the demo base's, for an hour on one CPU core, and one for a GPU."""
COPYING = {"repeat": 0.6, "capitals": 0.2, "after": 0.2}
ALL = {"repeat": 0.2, "capitals": 0.2, "both": 0.2, "after": 0.2, "fill": 0.2}


def training_texts(shards: Path) -> tuple[list[str], list[str]]:
    """Return the distinct texts of the training samples, and the words of their prompts.

    Raises UserError for shards that cannot be read or contain no text to train on.
    """
    index = load_index(shards)
    texts: dict[str, None] = {}
    words = dict.fromkeys(INSTRUCTIONS)
    for name, dataset in index.datasets.items():
        for number, (_, sample, _) in enumerate(read_samples(shards, index, name, "train")):
            texts[plain(sample["text"])] = None
            if number == 0:  # the question and the labels are the same in all samples
                for subtask in dataset.subtasks:
                    prompt = build_prompt({**sample, "text": ""}, subtask, dataset.labels[subtask])
                    words.update(dict.fromkeys(prompt.split()))
    found = [text for text in texts if len(text.split()) > 1]
    if not found:
        raise UserError(f"{shards}: no training sample has a text of two words or more.")
    return found, list(words)


def objectives(texts: list[str], words: list[str]) -> Callable[[random.Random, Phase], Example]:
    """Return the function that generates an example: the objective by the weights of ``mix``, words uniformly."""
    lexicon = [*words, *sorted({word for text in texts for word in text.split() if len(word) < 20} - set(words))]

    def example(rng: random.Random, phase: Phase) -> Example:
        objective = rng.choices(list(phase.mix), list(phase.mix.values()))[0]
        tokens = rng.choice(texts).split()
        start = rng.randrange(max(1, len(tokens) - WINDOW + 1))
        tokens = tokens[start : start + WINDOW]
        text = " ".join(tokens)
        if objective == "repeat":
            copied = text if rng.random() < 0.3 else " ".join(rng.choices(lexicon, k=rng.randrange(2, 9)))
            return f"repeat: {copied}", copied, None, []
        if objective == "capitals":
            return f"capitals: {text}", " , ".join(capitalised(text)) or "nothing", None, []
        if objective == "both":
            return *two_names(text, lexicon, rng), None, []
        if objective == "after":
            return *words_after(tokens, rng), None, []
        source, target = corrupt(tokens, rng)
        return f"fill: {source}", target, None, []

    return example


def from_demo(demo: VisionT5, demo_processor: T5Processor, processor: T5Processor) -> VisionT5:
    """Return the demo base with another tokenizer."""
    config = copy.deepcopy(demo.config)
    config.vocab_size = len(processor.tokenizer)
    model = VisionT5(config)
    state = demo.state_dict()
    known, bpe = demo_processor.tokenizer.get_vocab(), demo_processor.tokenizer.backend_tokenizer.model
    rows = []
    for token in processor.tokenizer.convert_ids_to_tokens(range(config.vocab_size)):
        ids = [known[token]] if token in known else [piece.id for piece in bpe.tokenize(token)]
        rows.append(demo.shared.weight[ids].mean(0))
    tied = [name for name, weight in state.items() if weight.shape == demo.shared.weight.shape]
    model.load_state_dict(state | dict.fromkeys(tied, torch.stack(rows)))
    return model


def main(argv: list[str] | None = None) -> int:
    """Pretrain a base and return the exit code: 2 for invalid shards."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="a new directory for the base")
    parser.add_argument("--size", choices=VOCABULARY, default="small")
    parser.add_argument("--steps", type=int, nargs=2, default=[2000, 1500], help="numbers of steps of the two phases")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.output.exists():
        parser.error(f"{args.output} exists and would be overwritten; choose another --output")
    if min(args.steps) < 1:
        parser.error(f"--steps {args.steps[0]} {args.steps[1]}: both phases need at least one step")
    torch.manual_seed(args.seed)
    try:
        texts, words = training_texts(args.shards)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    demo, demo_processor = load_model("demo")
    tokenizer = tokenizer_of([*texts, *[" ".join(words)] * 50], VOCABULARY[args.size])
    processor = T5Processor(tokenizer, demo_processor.image_transform)
    if args.size == "small":
        model = from_demo(demo, demo_processor, processor)
    else:
        model = VisionT5(configuration(processor, demo.config.vision, **BASE))
        model.vision_tower.load_state_dict(demo.vision_tower.state_dict())
    model.to(args.device).train()
    model.requires_grad_(True)
    model.vision_tower.requires_grad_(False)
    example = objectives(texts, words)
    for number, (steps, mix) in enumerate(zip(args.steps, (COPYING, ALL), strict=True)):
        phase = Phase(steps, 1.5e-3, mix, with_images=False)
        pretrain(model, processor, phase, example, random.Random(f"pretrain/{args.seed}/{number}"), args.output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
