"""What a user hands to PrecomputedDPOTrainer beside datasets: refused where it would be silently wrong.

No trl here: a DPOConfig is asked for its own defaults. Settings are refused that would be silently wrong with sums that
are on disk, or that have no effect there.
"""

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from prefkit.errors import InputError


def settled(args: Any, ref_model: Any, identity: Mapping[str, Any]) -> Any:
    """A copy of the user's DPOConfig with what this trainer needs; everything else stays as it is.

    Args:
        args: of the user.
        ref_model: of the user.
        identity: of the reference.

    Raises:
        InputError: a setting that would be silently wrong, or have no effect.
    """
    length = identity["max_length"]
    untouched = args.max_length == type(args).max_length >= length  # TRL's default, and it cuts nothing
    if args.max_length not in (None, length) and not untouched:
        _refuse("max_length", args.max_length, f"None or {length}: the ids were cut at the reference's max_length")
    if args.truncation_mode != "keep_start":
        _refuse("truncation_mode", args.truncation_mode, "keep_start, as the reference has it")
    if args.ld_alpha is not None:
        _refuse("ld_alpha", args.ld_alpha, "None: the reference's sums weigh every token alike")
    if args.sync_ref_model:
        _refuse("sync_ref_model", value=True, expected="False: the reference is on disk and stays as it is")
    if args.padding_free:
        _refuse("padding_free", value=True, expected="False: this TRL has switched it off")
    if not args.disable_dropout:
        _refuse("disable_dropout", value=False, expected="True: the reference was scored without dropout")
    for name in ("precompute_ref_batch_size", "dataset_num_proc"):
        if getattr(args, name) is not None:
            _refuse(name, getattr(args, name), "None: nothing is precomputed or tokenised")
    if ref_model is not None:
        what = f"ref_model is a {type(ref_model).__name__}"
        raise InputError(what, where="ref_model", expected="None: the reference is on disk")
    for engine, said in (("fsdp", args.fsdp), ("deepspeed", args.deepspeed)):
        if said or os.environ.get(f"ACCELERATE_USE_{engine.upper()}", "false").lower() == "true":
            _refuse(engine, said or True, "neither FSDP (TRL builds a second model under it) nor DeepSpeed (untested)")
    args = copy.copy(args)
    args.precompute_ref_log_probs, args.max_length = True, None
    return args


def check_arguments(model: Any, args: Any, data_collator: Any, config: type) -> None:
    """What is handed to the trainer is of the types that it takes, and its collator cuts nothing; `config`: DPOConfig.

    Raises:
        InputError: it is not.
    """
    if not isinstance(model, (str, Path, torch.nn.Module)):
        expected = "a model folder, a name on a hub, or a model"
        raise InputError(f"model is a {type(model).__name__}", where="model", expected=expected)
    if not (args is None or isinstance(args, config)):
        raise InputError(f"args is a {type(args).__name__}", where="args", expected="a DPOConfig, or None")
    length = getattr(data_collator, "max_length", None)
    if length is not None:
        expected = "None: the reference's sums are of whole rows"
        raise InputError(f"the collator's max_length is {length}", where="data_collator.max_length", expected=expected)


def _refuse(name: str, value: object, expected: str) -> None:
    raise InputError(f"{name} is {value!r}", where=f"DPOConfig.{name}", expected=expected)
