"""Command-line parser in which ``-`` and ``_`` are equal, and mistakes are UserErrors that suggest the nearest name."""

import argparse
import difflib
import sys
from collections.abc import Iterable
from itertools import takewhile
from typing import Any, NoReturn

from lvlm_clorae.errors import UserError, nearest

RENAMED = {
    "micro_batch": "per_device_train_batch_size",
    "accumulation": "gradient_accumulation_steps",
    "rank": "lora_rank",
    "eval_batch": "per_device_eval_batch_size",
    "batch": "per_device_eval_batch_size",
    "alpha": "lora_alpha",
    "workers": "dataloader_num_workers",
    "expert_rank": "lora_expert_rank",
    "dropout": "lora_dropout",
    "mim_tokens": "",
    "block": "global_micro_batch",
    "temperature": "interleave_temperature",
    "output": "output_dir",
    "normalise": "normalize",
    "epochs": "num_train_epochs",
    "schedule": "lr_scheduler_type",
    "warmup": "warmup_ratio",
    "gradient_clipping": "max_grad_norm",
    "resume": "resume_from_checkpoint",
    "checkpoint_every": "save_steps",
    "keep_checkpoints": "save_total_limit",
    "log_every": "logging_steps",
    "evaluate_every": "eval_every_epochs",
    "patience": "early_stopping_patience",
    "max_length": "max_source_length",
    "on_bad_sample": "on_invalid_sample",
    "max_answer_length": "max_target_length",
    "on_nonfinite": "on_nonfinite_loss",
    "units": "dataset_tasks",
    "collective_timeout": "ddp_timeout (seconds instead of minutes)",
    "precision": "bf16 (auto, true or false)",
    "points": "sweep_runs",
    "objects": "boxes",
    "achievement": "loss_weighting (achievement, coba or none)",
}
"""Flags and YAML keys of the previous release and their new names, empty for removed ones. Kept for one release."""

_OTHER_NAMES = {
    "model": "model_name_or_path base_model_name_or_path model_name model_id",
    "run": "adapter_name_or_path",
    "vision": "vision_tower",
    "projector": "mm_projector_type",
    "bf16 (auto, true or false)": "torch_dtype dtype",
    "load_in_8bit (or load_in_4bit)": "quantization_bit",
    "max_source_length": "cutoff_len max_seq_length model_max_length max_prompt_length",
    "lora_rank": "r lora_r",
    "max_target_length": "max_new_tokens generation_max_length max_completion_length",
    "interleave": "mix_strategy",
    "adapter": "finetuning_type peft_type train_type tuner_type",
    "target_modules (all-linear for all)": "lora_target lora_target_modules",
    "shards": "dataset dataset_name dataset_dir dataset_path data_path",
    "lr_scheduler_type": "lr_scheduler",
    "shards (its dev split is evaluated)": "val_size eval_dataset",
    "dataloader_num_workers": "num_workers preprocessing_num_workers",
    "per_device_train_batch_size": "batch_size train_batch_size per_gpu_train_batch_size",
    "learning_rate": "lr",
    "per_device_eval_batch_size": "eval_batch_size per_gpu_eval_batch_size",
    "num_train_epochs": "epoch num_epochs",
    "warmup_ratio (a fraction of all steps)": "warmup_steps num_warmup_steps",
    "save_steps": "save_strategy",
    "eval_every_epochs": "eval_strategy evaluation_strategy eval_steps",
    "logging_steps": "logging_strategy",
}
OTHER_NAMES = {other: name for name, others in _OTHER_NAMES.items() for other in others.split()}
"""Flags of TrainingArguments, PEFT, TRL, LLaMA-Factory, ms-swift and LLaVA for a setting that has another name here."""


def positive(text: str) -> int:
    """Convert the value of a flag to an integer of at least 1; a ``type`` of argparse."""
    if not text.isdecimal() or not 1 <= int(text) <= 10**9:
        raise argparse.ArgumentTypeError(f"{text} is not an integer from 1 to {10**9}")
    return int(text)


def suggestion(name: str, valid: Iterable[str], prefix: str = "", prog: str = "") -> str:
    """Return the end of an error message for an unknown name: its new name, its name here or the nearest valid one.

    If none is similar it lists the valid ones, or refers to the help of the command ``prog``. ``prefix`` is put before
    a suggested name, e.g. ``--``.
    """
    names, known = set(valid), name.removeprefix("no_")
    if RENAMED.get(known) == "":
        return " It has been removed; leave it out."
    for table in (RENAMED, OTHER_NAMES):
        if table.get(known, "").split(" ")[0] in names:
            return f" It is called {prefix}{table[known]} here."
    if not prog:
        return nearest(name, names)
    close = difflib.get_close_matches(name, sorted(names), n=1, cutoff=0.7)
    return f' Did you mean "{prefix}{close[0]}"?' if close else f" See {prog} --help."


class Parser(argparse.ArgumentParser):
    """An argparse parser without abbreviations that raises UserError instead of exiting."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **settings})

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. See {self.prog} --help.")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        given = [_underscored(word) for word in (sys.argv[1:] if args is None else args)]
        # argparse would report a missing required option before an unknown one, which may be the same one misspelt.
        own = given if self._subparsers is None else takewhile(lambda word: word.startswith("-"), given)
        for word in takewhile(lambda word: word != "--", own):
            flag = word.split("=", 1)[0]
            if flag.startswith("--") and " " not in flag and flag not in self._option_string_actions:
                self._unknown(flag)
        parsed, unknown = super().parse_known_args(given, namespace)
        if unknown:
            self._unknown(unknown[0])
        return parsed, unknown

    def _unknown(self, word: str) -> NoReturn:
        if not word.startswith("-"):
            raise UserError(f"{self.prog} has no argument {word}.")
        flags = (flag[2:] for flag in self._option_string_actions if flag.startswith("--"))
        raise UserError(f"{self.prog} has no option {word}.{suggestion(word.lstrip('-'), flags, '--', self.prog)}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            what = "command" if isinstance(action, argparse._SubParsersAction) else f"choice of {action.dest}"
            raise UserError(f'{self.prog}: "{value}" is no {what}.{nearest(str(value), map(str, action.choices))}')


def _underscored(word: str) -> str:
    """Return a flag with ``_`` for each ``-`` in its name, and any other word as it is."""
    flag, equals, value = word.partition("=")
    if not flag.startswith("--") or " " in flag:
        return word
    return "--" + flag[2:].replace("-", "_") + equals + value
