"""What a model cannot read or say of a dataset is counted, and the F1 ceiling is what a perfect model would score."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import Metaspace as MetaspaceDecoder
from tokenizers.models import Unigram
from tokenizers.normalizers import NFKC
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from lvlm_clorae import cli
from lvlm_clorae.data import limits
from lvlm_clorae.data.dataset import ShardDataset
from lvlm_clorae.data.index import DatasetSpec, load_index
from lvlm_clorae.data.limits import Limits, check_prompts, measure_limits
from lvlm_clorae.data.writer import ShardWriter
from lvlm_clorae.errors import UserError
from lvlm_clorae.models import Processor
from lvlm_clorae.models.families.t5 import T5Processor
from lvlm_clorae.models.processor import ImageTransform

WORDS = "Ann sings in Oslo and later Bo Berg sings in Rome with Cy".split()
SPANS = [(0, 1), (3, 4), (6, 8), (10, 11), (12, 13)]


def sample(tokens: list[str], spans: list[tuple[int, int]]) -> dict[str, Any]:
    entities = [{"type": "person", "span": [a, b], "text": " ".join(tokens[a:b])} for a, b in spans]
    common = {"dataset": "toy", "task": "mner", "image": None, "objects": []}
    return {**common, "text": " ".join(tokens), "tokens": tokens, "entities": entities}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    with ShardWriter(tmp_path, DatasetSpec("toy", "mner", ("entity",), {"entity": ["person"]}, {})) as writer:
        writer.add("train", "plain", sample(WORDS, SPANS))
        writer.add("train", "emoji", sample(["\U0001f600", "met", "Ann"], [(0, 1), (2, 3)]))
        writer.add("train", "empty", sample(["Ann"], []))
    return tmp_path


@pytest.fixture(scope="module")
def t5() -> Processor:
    """A processor with T5's gaps: no braces, no "<", no emoji; full-width letters become plain ones."""
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *(c for c in string.printable if not c.isspace() and c not in "<{}")]
    tokenizer = Tokenizer(Unigram([(piece, -1.0) for piece in pieces], unk_id=2))
    tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder = NFKC(), Metaspace(), MetaspaceDecoder()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    sentinels = [f"<extra_id_{number}>" for number in (0, 1, 99)]
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "additional_special_tokens": sentinels}
    return T5Processor(PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names), ImageTransform(8))


def measured(directory: Path, processor: Processor, *lengths: int) -> Limits:
    index = load_index(directory)
    tasks = index.dataset_tasks("train").values()
    return measure_limits(ShardDataset(index, directory), tasks, processor, *lengths)["toy/entity"]


def test_without_limits_only_the_tokenizer_loses_gold(directory: Path, processor: Processor, t5: Processor) -> None:
    whole = measured(directory, processor, 256, 128)  # of bytes
    assert (whole.gold_lost_in_tokenizer, whole.f1_ceiling) == (0, 100.0)
    found = measured(directory, t5, 256, 128)
    assert (found.samples, found.prompts_cut, found.targets_cut, found.gold) == (3, 0, 0, 7)
    assert (found.gold_outside_text, found.gold_outside_target, found.gold_lost_in_tokenizer) == (0, 0, 1)
    assert found.f1_ceiling == pytest.approx(100 * 2 * 6 / (7 + 6), abs=8)  # "person, " without text may be predicted
    assert found.f1_ceiling < 100


def test_gold_outside_the_text_and_the_target(directory: Path, processor: Processor) -> None:
    short = measured(directory, processor, 30, 128)
    assert short.prompts_cut == 1
    assert short.gold_outside_text > 0
    assert short.gold_outside_target == 0
    cut = measured(directory, processor, 256, 12)
    assert cut.targets_cut > 0
    assert cut.gold_outside_target > 0
    assert cut.gold_outside_text == 0
    for found in (short, cut):
        lost = found.gold_outside_text + found.gold_outside_target + found.gold_lost_in_tokenizer
        assert found.f1_ceiling <= 100 * 2 * (7 - lost) / (7 + 7 - lost) + 1e-9


def test_a_limit_that_does_not_hold_the_labels_is_an_error(directory: Path, processor: Processor) -> None:
    found = measured(directory, processor, 4, 128)
    assert found.prompts_cut == 3
    with pytest.raises(UserError, match=f"toy/entity: .*{found.needed_source_length} tokens.*= 4"):
        check_prompts({"toy/entity": found}, 4)
    enough = measured(directory, processor, found.needed_source_length, 128)
    assert enough.needed_source_length == 0
    check_prompts({"toy/entity": enough}, found.needed_source_length)


def test_few_of_many_samples_are_examined(
    directory: Path, processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_SAMPLES", 2)
    assert measured(directory, processor, 256, 128).samples == 2


def test_inspect_reports_the_limits_of_a_model(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["shards", "inspect", str(directory), "--model", "demo", "--max_source_length", "30"]
    assert cli.main([*line, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["train"]["toy/entity"]["prompts_cut"] == 1
    assert content["dev"] == {}
    assert cli.main(line) == 0
    assert "F1 ceiling" in capsys.readouterr().out.replace("\n", " ")
