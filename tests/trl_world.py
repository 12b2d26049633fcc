"""What tests of TRL share: a dataset with its reference, the model of both, a DPOConfig for a CPU, and stock TRL."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import polars as pl
import pytest
import transformers
from tiny import built, chat_rows, text_rows, tiny_llama
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from prefkit.reference import precompute_reference
from prefkit.store import write_json
from prefkit.tables import write_parquet

# what TRL, transformers and datasets say of their own use of each other
THEIR_WARNINGS = [
    "ignore:.*(is|are) deprecated and will be removed:FutureWarning",
    "ignore:Specifying null_placement in SortOptions is deprecated:FutureWarning",
    "ignore:.*use_reentrant parameter should be passed explicitly:UserWarning",
    "ignore:'pin_memory' argument is set as true but no accelerator is found:UserWarning",
]
marks = [pytest.mark.filterwarnings(text) for text in THEIR_WARNINGS]


class World(NamedTuple):
    """A folder with `dataset`, its reference, and `model`."""

    folder: Path
    dataset: Path
    model: Path
    key: str


def make_world(folder: Path, kind: str = "text", count: int = 90, positions: int = 512, **sections: Any) -> World:
    model = tiny_llama(folder / "model", max_position_embeddings=positions)
    rows = text_rows(count) if kind == "text" else chat_rows(count)
    pipeline = built(folder, rows, model, kind, **({"split": {"test_share": 0.2}} | sections))
    return World(folder, folder / "dataset", model, precompute_reference(pipeline).key)


def config(out: Path, **changes: Any) -> Any:
    usual: dict[str, Any] = {
        "bf16": False,
        "use_cpu": True,
        "logging_steps": 1,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "max_length": None,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    return DPOConfig(str(out), **(usual | changes))


def losses_of(trainer: Any) -> list[float]:
    """Of each update; trains first."""
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def texts_of(world: World, split: str = "train") -> Any:
    """The pairs as stock TRL takes them, in the order of load_reference."""
    pairs = pl.read_parquet(world.dataset / "pairs" / "*.parquet").filter(pl.col("split") == split).sort("pair_id")
    rows = json.loads(json.dumps(pairs.select("prompt", "chosen", "rejected").to_dicts()))
    for row in rows:
        for name, side in row.items():
            if isinstance(side, list):
                row[name] = [{"role": message["role"], "content": message["content"]} for message in side]
    return datasets.Dataset.from_list(rows)


def stock(world: World, out: Path, **changes: Any) -> Any:
    """TRL's own trainer, that tokenises the texts and runs a reference pass."""
    args = config(out, **({"precompute_ref_log_probs": True} | changes))
    return DPOTrainer(str(world.model), args=args, train_dataset=texts_of(world))


def edit_reference(world: World, **columns: pl.Expr) -> None:
    """Change columns of the first part and mend its hash: only what the numbers say can show it then."""
    folder = world.dataset / "reference" / world.key
    recorded = json.loads((folder / "reference.json").read_text())
    path = folder / recorded["parts"][0]["file"]
    part = write_parquet(path, pl.read_parquet(path).with_columns(**columns))
    write_json(folder / "reference.json", recorded | {"parts": [part._asdict(), *recorded["parts"][1:]]})


class Counted(NamedTuple):
    """Models built, and forward passes without a gradient, since the count began."""

    models: list[str]
    no_grad: list[int]


@contextlib.contextmanager
def counting() -> Iterator[Counted]:
    """Count what Llamas are built, and what passes through them without a gradient."""
    import torch

    kind: Any = transformers.LlamaForCausalLM
    inner: Any = transformers.LlamaModel
    found = Counted([], [])
    build, forward = kind.__init__, inner.forward

    def built_one(self: Any, *rest: Any, **named: Any) -> None:
        found.models.append(type(self).__name__)
        build(self, *rest, **named)

    def passed(self: Any, *rest: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            found.no_grad.append(1)
        return forward(self, *rest, **named)

    kind.__init__, inner.forward = built_one, passed
    try:
        yield found
    finally:
        kind.__init__, inner.forward = build, forward
