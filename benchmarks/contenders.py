"""The two that are measured: prefkit's own code and TRL's, on the same model, pairs and reference.

What the benchmarks take of the kernel stands here and nowhere else.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from workload import SIDES

from prefkit.batches import NUM_TOKENS, plan_batches
from prefkit.budget import CPU_BATCH_TOKENS, measure_budget
from prefkit.config import TrainConfig
from prefkit.layouts import choose_layout
from prefkit.logps import CompletionLogps
from prefkit.losses import Objective
from prefkit.optimizers import make_optimizer
from prefkit.processes import Team
from prefkit.schedule import dealt, limits_of
from prefkit.scoring import assemble_part, score_batches
from prefkit.tables import write_parquet
from prefkit.updates import Trainee, update

Scores = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]  # chosen and rejected sums, in the order of the pairs
ALONE = Team(0, 1)
BETA = 0.1

# -- prefkit


def our_scorer(model: Any, dtype: str, max_length: int) -> CompletionLogps:
    """The model in the layout that it can be shown right in, as load_scorer makes it."""
    return CompletionLogps(model, dtype, choose_layout(model, dtype, max_length))


def our_layout(scorer: CompletionLogps) -> str:
    """The layout in words."""
    return scorer.layout.name


def longest(pairs: pl.DataFrame) -> int:
    """Tokens of the longest prompt + completion."""
    longer = pl.max_horizontal("num_chosen_tokens", "num_rejected_tokens")
    return int(pairs.select((pl.col("num_prompt_tokens") + longer).max()).item())


def our_budget(scorer: CompletionLogps, pairs: pl.DataFrame) -> int:
    """The tokens of a batch where the settings leave them out: a constant on a CPU, measured on CUDA."""
    if scorer.device.type == "cpu":
        return CPU_BATCH_TOKENS
    return measure_budget(scorer, int(pairs.select(NUM_TOKENS).max().item()))


def our_reference(scorer: CompletionLogps, pairs: pl.DataFrame, budget: int) -> pl.DataFrame:
    """Plan and score, as the reference pass does: pair_id and the columns of a reference, in scoring order."""
    plan = plan_batches(pairs, budget)
    return score_batches(scorer, plan, pairs, ALONE, lambda _batch: None, _no_slices)


def our_parts(scorer: CompletionLogps, pairs: pl.DataFrame, budget: int, path: Path) -> int:
    """The loop of precompute_reference: part by part, each written as a reference's part is; the rows written."""
    plan, rows = plan_batches(pairs, budget), 0
    for (_,), part in plan.group_by("part", maintain_order=True):
        mine = pairs.filter(pl.col("pair_id").is_in(part["pair_id"].to_list()))
        found = assemble_part(part, mine, [score_batches(scorer, part, mine, ALONE, lambda _batch: None, _no_slices)])
        write_parquet(path, found)
        rows += found.height
    return rows


def _no_slices(text: str) -> None:
    raise MemoryError(text)  # a batch that did not fit would be measured as two


def sums_of(scores: pl.DataFrame, pairs: pl.DataFrame) -> Scores:
    """The sums in the order of the pairs."""
    rows = pairs.select("pair_id").join(scores, on="pair_id", how="left", maintain_order="left")
    return rows["ref_chosen_logps"].to_numpy(), rows["ref_rejected_logps"].to_numpy()


def beside_reference(scores: pl.DataFrame, pairs: pl.DataFrame) -> pl.DataFrame:
    """The pairs with what a reference has of each: sums, and a value a token."""
    names = [f"ref_{side}_{of}" for side in ("chosen", "rejected") for of in ("logps", "token_logps")]
    return pairs.join(scores.select("pair_id", *names), on="pair_id", how="left", maintain_order="left")


def our_settings(micro: int, size: int, learning_rate: float, optimizer: str = "adamw") -> TrainConfig:
    """Plain DPO: by default AdamW, a constant rate without warm-up, clipping at 1."""
    return TrainConfig(
        beta=BETA,
        learning_rate=learning_rate,
        optimizer=optimizer,
        lr_scheduler_type="constant",
        batch_size=micro,
        gradient_accumulation_steps=size // micro,
    )


def our_training(
    scorer: CompletionLogps, rows: pl.DataFrame, settings: TrainConfig, device: str, watch: Callable[[int, float], None]
) -> None:
    """One update after the other over the rows in their order, as prefkit.train's loop makes them.

    Args:
        scorer: the policy.
        rows: reference rows, the pairs of an update one after the other.
        settings: of the run.
        device: cpu | cuda.
        watch: called after each update with its number, from 1, and its loss.
    """
    trainee = Trainee(scorer, scorer, make_optimizer(scorer, settings), Objective(), settings.max_grad_norm)
    rows = rows.with_columns(pl.lit(1.0).alias("weight"))
    limits = limits_of(settings, CPU_BATCH_TOKENS if device == "cpu" else None)
    size = settings.batch_size * settings.gradient_accumulation_steps
    for step, start in enumerate(range(0, rows.height, size)):
        some = rows[start : start + size]
        shares = dealt(range(some.height), some.select(NUM_TOKENS).to_series().to_list(), limits)
        made = update(trainee, some, shares, step, settings.learning_rate, settings.beta)
        watch(step + 1, float(made.metrics.losses.mean()))


# -- TRL


def trl_trainer(
    model: Any, pairs: pl.DataFrame, device: str, folder: str, extra: Sequence[str] = (), **settings: Any
) -> Any:
    """A DPOTrainer of stock TRL that takes our token ids as they are; it scores no reference by itself.

    The subclass says no more than that the dataset is prepared. Checkpointing of activations (TRL's default) is off,
    which is faster, and bf16 autocast too: the regime is that of the weights.
    """
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class Prepared(DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *_args: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, dataset: Any, _name: str, _batch_size: int) -> Any:
            return dataset

    columns = [*(f"{side}_ids" for side in SIDES), *extra]
    arguments = {
        "output_dir": folder,
        "precompute_ref_log_probs": True,
        "beta": BETA,
        "max_length": None,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": device == "cpu",
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return Prepared(
        model=model,
        args=DPOConfig(**(arguments | settings)),
        train_dataset=Dataset.from_dict({name: pairs[name].to_list() for name in columns}),
        processing_class=_pad_only(),
    )


def _pad_only() -> Any:
    """A tokenizer of one token: ids are all there is, the trainer only wants to know what pads them."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    only = "<pad>"
    words = Tokenizer(models.WordLevel({only: 0}, unk_token=only))
    make: Any = PreTrainedTokenizerFast
    return make(tokenizer_object=words, pad_token=only, eos_token=only)


def trl_reference(trainer: Any, size: int) -> Scores:
    """TRL's own reference pass over the trainer's dataset, in batches of that many pairs."""
    from trl import DPOTrainer

    trainer._precompute_model_hash = os.urandom(8).hex()  # part of its cache's key: nothing is read from the cache
    scored = DPOTrainer._precompute_ref_logps(trainer, trainer.train_dataset, "train", size)
    return np.array(scored["ref_chosen_logps"]), np.array(scored["ref_rejected_logps"])


def trl_training(
    model: Any,
    rows: pl.DataFrame,
    settings: TrainConfig,
    device: str,
    folder: str,
    watch: Callable[[int, float], None],
) -> None:
    """The same updates by TRL: arguments as `our_training`."""
    from transformers import TrainerCallback

    trainer = trl_trainer(
        model,
        rows,
        device,
        folder,
        extra=("ref_chosen_logps", "ref_rejected_logps"),
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        logging_steps=1,
    )

    class Watch(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, **rest: Any) -> None:  # noqa: ARG002 - its signature
            if "loss" in rest["logs"]:
                watch(state.global_step, rest["logs"]["loss"])

    trainer.add_callback(Watch())
    trainer.train()


def load_trl() -> None:
    """Import what TRL's trainer needs, so that it is no part of what is measured."""
    import datasets  # noqa: F401
    from trl import DPOConfig, DPOTrainer  # noqa: F401  trl loads them lazily


def be_quiet() -> None:
    """No progress bars or notices of the libraries in a job's output."""
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
