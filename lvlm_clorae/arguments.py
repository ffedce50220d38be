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
    "eval_batch": "per_device_eval_batch_size",
    "batch": "per_device_eval_batch_size",
    "workers": "dataloader_num_workers",
    "rank": "lora_rank",
    "expert_rank": "lora_expert_rank",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "mim_tokens": "",
    "block": "global_micro_batch",
    "temperature": "interleave_temperature",
    "normalise": "normalize",
    "epochs": "num_train_epochs",
    "schedule": "lr_scheduler_type",
    "warmup": "warmup_ratio",
    "gradient_clipping": "max_grad_norm",
    "output": "output_dir",
    "resume": "resume_from_checkpoint",
    "checkpoint_every": "save_steps",
    "keep_checkpoints": "save_total_limit",
    "log_every": "logging_steps",
    "evaluate_every": "eval_every_epochs",
    "patience": "early_stopping_patience",
    "max_length": "max_source_length",
    "max_answer_length": "max_target_length",
    "on_bad_sample": "on_invalid_sample",
    "on_nonfinite": "on_nonfinite_loss",
    "collective_timeout": "ddp_timeout (seconds instead of minutes)",
    "precision": "bf16 (auto, true or false)",
    "units": "dataset_tasks",
    "points": "sweep_runs",
}
"""Flags and YAML keys of the previous release and their new names, empty for removed ones. Kept for one release."""


def suggestion(name: str, valid: Iterable[str], prefix: str = "", prog: str = "") -> str:
    """Return the end of an error message for an unknown name: its new name or the nearest valid one.

    If none is similar it lists the valid ones, or refers to the help of the command ``prog``. ``prefix`` is put before
    a suggested name, e.g. ``--``.
    """
    names = set(valid)
    if RENAMED.get(name) == "":
        return " It has been removed; leave it out."
    if RENAMED.get(name, "").split(" ")[0] in names:
        return f" It is now {prefix}{RENAMED[name]}."
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
