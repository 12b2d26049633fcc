"""TRL's DPOTrainer on a reference that is on disk: no reference model, no second tokenisation, no reference pass.

Comes in: a dataset directory with a finished reference. Goes out: a `datasets.Dataset` (or a stream) with the ids that
were scored and the sums of their log-probs, and a trainer that takes it as it is. What TRL 1.16 does is kept, but for:

* `_prepare_dataset`, where TRL would tokenise: the dataset has the ids already, and is handed back. The tokenizer is
  compared with the reference's.
* `_precompute_ref_logps`, where TRL would run its reference pass: the dataset has the sums already, and is handed back.
  It is called because precompute_ref_log_probs is set here; TRL then builds no reference model, its collator puts
  ref_chosen_logps and ref_rejected_logps into each batch, and its losses read them from there, as they would after
  TRL's own pass.
* `evaluate` on a dataset that comes later: TRL refuses it after the first step, when its reference is gone.
* the constructor, which runs whole, between checks. Before it: the settings, the datasets, the hash of a model folder.
  After it: dropout is off in attention too, and the policy itself scores a sample of each dataset in the precision and
  with the collator that it is trained with. TRL reads nothing of a reference but its sums, so sums are compared.

A dataset carries whose reference it has. The identity stands in `info.description`, which map, filter, select, sort,
shuffle, train_test_split, save_to_disk, concatenate and interleave keep, streams too; the key and a hash (row_hashes)
stand in every row, so that rows of another origin and changed ones are told. to_parquet, to_json, push_to_hub and
to_iterable_dataset lose the description: what they give is refused. Price of loading: every part of pairs and reference
is read twice, for its hash and its rows.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from prefkit.errors import DatasetError, InputError, first_line
from prefkit.format import canonical_json, differing, reference_key
from prefkit.gate import NUM_LONGEST, NUM_RANDOM
from prefkit.integrations.agreement import (
    Agreement,
    Carried,
    check_checkpoint,
    check_folder,
    check_tokenizer,
    judge,
    mark_checkpoint,
)
from prefkit.integrations.row_hashes import HASH_ROWS, ORIGIN, CheckedCollator, check_first, check_table, row_hashes
from prefkit.integrations.trl_settings import check_arguments, settled
from prefkit.models import disable_dropout
from prefkit.reference_table import Opened, open_reference, scored_blocks
from prefkit.scored_rows import IDS, SUMS
from prefkit.target import path_of
from prefkit.work import TEMPLATE_FILE

try:
    import datasets
    import trl
    from packaging.version import Version
    from transformers import ProcessorMixin, Trainer
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer
except ImportError as error:
    raise InputError(
        f"needs trl and datasets: {first_line(error)}", where=__name__, hint="pip install 'prefkit[trl]'"
    ) from None
if not Version("1.16") <= Version(trl.__version__) < Version("2"):
    raise InputError(
        f"trl {trl.__version__} is another than this is made for",
        where=__name__,
        expected="1.16 or later, below 2",
        hint="pip install 'prefkit[trl]'; for trl 0.13 to 0.28, prefkit export DATASET --to trl --with-reference",
    )

Data: TypeAlias = "datasets.Dataset | datasets.IterableDataset"
FEATURES = datasets.Features(
    {"pair_id": datasets.Value("large_string"), "reference": datasets.Value("large_string")}
    | {name: datasets.LargeList(datasets.Value("int32")) for name in IDS}
    | {name: datasets.Value("float32") for name in SUMS}
    | {"row_hash": datasets.Value("int64")}
)
READ = [name for name in FEATURES if name not in ("reference", "row_hash")]  # of a part
LOGGER = logging.getLogger(__name__)
LOAD = "prefkit.integrations.trl.load_reference(DATASET)"
STREAM_ROWS = 32_768  # that a stream holds at once: 100 MB at 768 tokens a pair; each such block reads the parts anew
READ_ROWS = 1_024


# --- the dataset


def load_reference(
    dataset: str | Path, key: str | None = None, split: str | None = "train", *, streaming: bool = False
) -> Any:
    """The scored pairs of a split as TRL's collator reads them.

    Args:
        dataset: the directory.
        key: of the reference, or as much of it as no other has; None where there is one only.
        split: train, test, or None for both.
        streaming: an IterableDataset: the same rows in the same order, in flat memory, straight from the parts.

    Returns:
        a datasets.Dataset (or IterableDataset) with pair_id, reference (the key), prompt_ids, chosen_ids, rejected_ids,
        the scalars ref_chosen_logps and ref_rejected_logps, sums in nats, and row_hash, over all of these; sorted by
        pair_id, a content hash, so that the order is one of chance.

    Raises:
        InputError: there is no such split, or an argument is of another type.
        DatasetError: no finished dataset or reference, a part of the pairs was changed, or no pair of that split.
        GateError: there are several references, or what this one holds cannot be what a reference pass has written.
    """
    dataset = path_of(dataset, "a dataset directory")
    if not (key is None or isinstance(key, str)):
        raise InputError(f"a key is a text, not a {type(key).__name__}", where="key", expected="a str, or None")
    if split not in ("train", "test", None):
        raise InputError(f"there is no split {split!r}", where=str(dataset), expected="train, test, or None for both")
    opened = open_reference(dataset, key)
    about = datasets.DatasetInfo(description=_describe(opened), features=FEATURES)
    blocks = (block.select("pair_id" if streaming else READ) for block in scored_blocks(opened, split))
    rows = pl.concat([pl.DataFrame(schema={"pair_id": pl.String}), *blocks], how="diagonal").sort("pair_id")
    if rows.is_empty():
        hint = "split.test_share at prefkit build says how many pairs each has"
        raise DatasetError(f"no scored pair in the split {split}", where=str(dataset), hint=hint)
    if not streaming:
        table = _completed(pa.table(rows.to_arrow()), opened.folder.name)
        return datasets.Dataset(table.cast(FEATURES.arrow_schema), info=about)
    files = tuple(str(opened.folder / part["file"]) for part in opened.recorded["parts"])  # a list would be shards
    told = {"files": files, "pair_ids": rows["pair_id"].to_arrow(), "key": opened.folder.name}
    stream = datasets.IterableDataset.from_generator(_stream, features=FEATURES, gen_kwargs=told)
    stream.info.description = about.description
    return stream


def _completed(rows: pa.Table, key: str) -> pa.Table:
    """Rows of the parts with the columns that they lack, in the order of FEATURES."""
    named = rows.append_column("reference", pa.array([key] * rows.num_rows, pa.large_string()))
    return named.append_column("row_hash", row_hashes(rows, key)).select([*FEATURES])


def _stream(files: Sequence[str], pair_ids: Any, key: str) -> Iterator[dict[str, Any]]:
    """Rows of these pairs in their order, a block of pairs at a time, each gathered from all parts.

    Parts hold long pairs first: in their order a stream would go from long to short. No Polars: a dataloader's worker
    is forked, and its threads are not.
    """
    for start in range(0, len(pair_ids), STREAM_ROWS):
        some = pair_ids[start : start + STREAM_ROWS]
        found = []
        for path in files:
            with pq.ParquetFile(path, pre_buffer=False) as file:
                for batch in file.iter_batches(READ_ROWS, columns=READ, use_threads=False):
                    mine = pc.is_in(batch["pair_id"].cast(some.type), some)
                    found.append(batch.filter(mine))
        table = pa.Table.from_batches(found)
        table = table.take(pc.index_in(some, table["pair_id"].combine_chunks().cast(some.type)))
        for batch in _completed(table, key).to_batches(max_chunksize=READ_ROWS):
            yield from batch.to_pylist()


def _describe(opened: Opened) -> str:
    path = opened.folder / TEMPLATE_FILE
    template = path.read_text(encoding="utf-8") if path.exists() else None
    told = {"prefkit_reference": opened.folder.name, "identity": opened.recorded["identity"], "template": template}
    return canonical_json(told)


def carried(dataset: Any, name: str) -> Carried:
    """Whose reference a dataset of `load_reference` has, as it was loaded or as datasets' own methods left it.

    Raises:
        DatasetError: it is none, has lost what it was, or its rows are not what TRL's collator takes.
    """
    if not isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)):
        raise DatasetError(f"is a {type(dataset).__name__}", where=name, expected=f"a dataset of {LOAD}")
    try:
        told = json.loads(dataset.info.description)
        found = Carried(told["prefkit_reference"], told["identity"], told["template"])
        genuine = reference_key(found.identity) == found.key
    except (ValueError, KeyError, TypeError):
        genuine = False
    if not genuine:
        raise DatasetError(
            "does not say whose reference it has: it is not of load_reference, or of two, or was saved in a way that "
            "loses it",
            where=name,
            expected="dataset.info.description as load_reference writes it",
            hint=f"{LOAD}, and save_to_disk to keep it",
        )
    _check_rows(dataset, found.key, name)
    return found


def _check_rows(dataset: Any, key: str, name: str) -> None:
    row = next(iter(dataset), None)
    if row is None:
        raise DatasetError("has no rows", where=name)
    if absent := [column for column in FEATURES if column not in row]:
        raise DatasetError(f"has no column {', '.join(absent)}", where=name, expected=", ".join(FEATURES), hint=LOAD)
    check_first(row, name)
    keys = {row["reference"]}
    if isinstance(dataset, datasets.Dataset):
        keys |= set(pc.unique(dataset.select_columns(["reference"]).with_format("arrow")[:]["reference"]).to_pylist())
    if strange := sorted(str(other) for other in keys - {key}):
        raise DatasetError(
            f"has rows of another origin: reference {', '.join(strange[:3])}", where=name, expected=key, hint=LOAD
        )
    if isinstance(dataset, datasets.Dataset):
        check_table(dataset.select_columns([*FEATURES]).with_format("arrow").iter(HASH_ROWS), key, name)


# --- the trainer


def sample_of(dataset: Any, seed: int) -> list[dict[str, Any]]:
    """The 16 longest rows and 48 random others; of a stream the first 64."""
    if isinstance(dataset, datasets.IterableDataset):
        return list(dataset.take(NUM_LONGEST + NUM_RANDOM))
    blocks = dataset.select_columns([*IDS]).with_format("arrow").iter(10_000)
    lengths = np.concatenate([sum(np.asarray(pc.list_value_length(block[name])) for name in IDS) for block in blocks])
    order = np.argsort(-lengths, kind="stable")
    rest = np.random.default_rng(seed).permutation(order[NUM_LONGEST:])[:NUM_RANDOM]
    return [dataset[int(place)] for place in [*order[:NUM_LONGEST], *sorted(rest)]]


class PrecomputedDPOTrainer(DPOTrainer):
    """TRL's DPOTrainer for datasets of `load_reference`; takes its arguments, those after processing_class by name.

    Two more: `other_reference=True` says that the reference is another model on purpose: weights are not compared then,
    and scores are measured, not judged. `check_scores=False` leaves out the scoring; weights are then known by their
    hash alone, so that the model must be a folder's name. `agreement` has the figures of the scoring, a dataset a row.
    """

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        other_reference: bool = False,
        check_scores: bool = True,
        **others: Any,
    ) -> None:
        check_arguments(model, args, data_collator, DPOConfig)
        self.reference = carried(train_dataset, "train_dataset")
        if args is None:  # as TRL names it
            named = model if isinstance(model, (str, Path)) else model.config._name_or_path
            args = DPOConfig(f"{Path(named).name}-DPO", max_length=None)
        args = settled(args, ref_model, self.reference.identity)
        self._check_eval(eval_dataset, args)
        if args.process_index == 0:
            _tell_overlap(train_dataset, eval_dataset)
        local = isinstance(model, (str, Path)) and Path(model).is_dir()
        if local and not other_reference:
            check_folder(Path(model), self.reference.identity)
        quantised = others.get("quantization_config") or (args.model_init_kwargs or {}).get("quantization_config")
        if not (check_scores or other_reference or (local and not quantised)):
            raise InputError(
                "check_scores is False, and nothing else shows that this model is the reference's",
                where="check_scores",
                expected="a model folder by its name, and no quantization_config",
            )
        super().__init__(
            model=str(model) if isinstance(model, Path) else model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **others,
        )
        assert self.ref_model is None, "a reference model was built"
        policy: Any = self.model
        disable_dropout(policy)  # TRL's own leaves out rates that attention keeps as numbers
        checked: Any = CheckedCollator(self.data_collator, self.reference.key, not args.remove_unused_columns)
        self.data_collator = checked
        self.agreement: dict[str, Agreement] = {}
        if check_scores:
            for name, dataset in [("train", self.train_dataset), *_named(self.eval_dataset, "eval")]:
                self.agreement[name] = self._score(dataset, name, judged=not other_reference)

    def _check_eval(self, given: Any, args: Any) -> None:
        for name, dataset in _named(given, "eval_dataset"):
            found = carried(dataset, name)
            if found.key != self.reference.key:
                raise DatasetError(
                    "has another reference than train_dataset: "
                    + "; ".join(differing(self.reference.identity, found.identity)),
                    where=name,
                    expected=f"reference {self.reference.key}",
                )
            if args.world_size > 1 and isinstance(dataset, datasets.IterableDataset):
                raise DatasetError(
                    "is a stream, whose last batches several processes fill up with rows that were there before",
                    where=name,
                    expected="a dataset without streaming=True: its repeated rows are left out of the means",
                )

    def _prepare_dataset(self, dataset: Data, processing_class: Any, args: Any, dataset_name: str) -> Data:  # noqa: ARG002
        if isinstance(processing_class, ProcessorMixin):
            raise InputError(
                f"processing_class is a {type(processing_class).__name__}, of a model of images",
                where="processing_class",
                expected="a tokenizer: references are of text",
            )
        check_tokenizer(processing_class, self.reference)
        return dataset

    def _precompute_ref_logps(self, dataset: Data, name: str, batch_size: int) -> Data:  # noqa: ARG002
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        """The columns that reach the collator: with those that it checks rows by."""
        self._signature_columns: Any = [*IDS, *SUMS, *ORIGIN]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            mark_checkpoint(folder, self.reference.key)
        super()._save_checkpoint(model, trial)  # type: ignore[no-untyped-call]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        check_checkpoint(Path(resume_from_checkpoint), self.reference)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def evaluate(self, eval_dataset: Any = None, *rest: Any, **named: Any) -> dict[str, float]:
        """As TRL's, and on any dataset of `load_reference` at any time."""
        if eval_dataset is None or isinstance(eval_dataset, str):
            found: dict[str, float] = super().evaluate(eval_dataset, *rest, **named)
            return found
        self._check_eval(eval_dataset, self.args)
        # what TRL's own adds to this is tokenising and a reference pass
        return dict(Trainer.evaluate(self, eval_dataset, *rest, **named))

    def _score(self, dataset: Data, name: str, *, judged: bool) -> Agreement:
        """Let the policy score a sample as it will be trained, and compare the sums.

        Raises:
            GateError: the dataset's sums are not what this policy scores.
        """
        apart, counts, worst = [], [], (-1.0, "")
        for row in sample_of(dataset, self.args.seed):
            batch = self.data_collator([dict(row)])
            for given, scored, count in zip(*(values.tolist() for values in self._sums(batch)), strict=True):
                apart.append(scored - given)
                counts.append(count)
                worst = max(worst, (abs(scored - given) / max(count, 1), row["pair_id"]))
        figures = Agreement.of(apart, counts)
        if judged:
            pair = worst[1][:12]
            where = f"{name} dataset, reference {self.reference.key}, pair {pair} worst"
            judge(figures, exact=self._exact(), where=where)
        return figures

    def _sums(self, batch: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The sums that a batch brings, those that the model finds, and the number of tokens: chosen, then rejected."""
        model: Any = self.model
        device = next(model.parameters()).device
        inputs = {name: value.to(device) for name, value in batch.items() if isinstance(value, torch.Tensor)}
        given = torch.cat([inputs.pop(name) for name in SUMS])
        mask = inputs.pop("completion_mask")
        labels = inputs["input_ids"].masked_fill(mask == 0, -100)
        training = model.training
        model.train()  # as it is trained: a dropout that only the config knows would show
        with torch.no_grad(), self.accelerator.autocast():
            found = model(**inputs, labels=labels, use_cache=False, fused_lm_head=True).log_probs
        model.train(training)
        count = mask[:, 1:].sum(1)
        return given.double(), found[:, -(mask.shape[1] - 1) :].double().sum(1), count

    def _exact(self) -> bool:
        """Whether policy and reference both compute in plain float32."""
        model: Any = self.model
        weights = {weight.dtype for weight in model.parameters() if weight.is_floating_point()}
        plain = self.accelerator.mixed_precision == "no" and torch.get_float32_matmul_precision() == "highest"
        return plain and weights == {torch.float32} and self.reference.identity["dtype"] == "float32"


def _named(given: Any, name: str) -> list[tuple[str, Any]]:
    """The datasets of what TRL takes as eval_dataset."""
    if given is None:
        return []
    return [(f"{name} {each}", one) for each, one in given.items()] if isinstance(given, dict) else [(name, given)]


def _tell_overlap(train: Data, given: Any) -> None:
    """Say how many pairs are trained on and evaluated on; it may be on purpose."""
    tables = [("train_dataset", train), *_named(given, "eval_dataset")]
    pairs = {
        name: pc.unique(one.select_columns(["pair_id"]).with_format("arrow")[:]["pair_id"])
        for name, one in tables
        if isinstance(one, datasets.Dataset)
    }
    trained = pairs.pop("train_dataset", None)
    for name, own in pairs.items() if trained is not None else ():
        if both := pc.sum(pc.is_in(own, trained)).as_py():
            LOGGER.warning("%s: %d of its %d pairs are in train_dataset too", name, both, len(own))
