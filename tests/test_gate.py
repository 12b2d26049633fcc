"""No reference but the policy's own, whole and unchanged, is trained on; each way to be wrong has its own message.

Tests of content rewrite the part AND its recorded hash: the hash alone would catch them otherwise.
"""

import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import polars as pl
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import built, chat_rows, plain_logps, snapshot, text_rows, tiny_llama, write_rows

from prefkit.build import build_dataset
from prefkit.cli import main
from prefkit.config import Pipeline
from prefkit.errors import DatasetError, GateError
from prefkit.gate import sample_rows
from prefkit.models import load_model, load_tokenizer
from prefkit.reference import precompute_reference
from prefkit.run import Trained
from prefkit.target import pipeline_of
from prefkit.train import train_dpo

Change: TypeAlias = Callable[[pl.DataFrame], pl.DataFrame]
NUM_PAIRS = 12


class Ready:
    """A dataset with its reference and its model, in a folder of its own that a test may spoil."""

    def __init__(self, folder: Path, pipeline: Pipeline) -> None:
        self.folder, self.model = folder, folder / "model"
        moved = {"dataset": str(folder / "dataset")}
        precompute = pipeline.precompute.model_copy(update={"model": str(self.model)})
        self.pipeline = pipeline.model_copy(update={**moved, "precompute": precompute})

    @property
    def references(self) -> list[Path]:
        return sorted((self.folder / "dataset" / "reference").iterdir())

    @property
    def reference(self) -> Path:
        (only,) = self.references
        return only

    def rows(self) -> pl.DataFrame:
        return pl.read_parquet(self.reference / "part-00000.parquet")

    def rewrite(self, change: Change) -> None:
        part, record = self.reference / "part-00000.parquet", self.reference / "reference.json"
        changed = change(pl.read_parquet(part))
        changed.write_parquet(part)
        recorded = json.loads(record.read_text(encoding="utf-8"))
        digest = hashlib.sha256(part.read_bytes()).hexdigest()
        recorded["parts"] = [{"file": part.name, "rows": changed.height, "sha256": digest}]
        record.write_text(json.dumps(recorded), encoding="utf-8")

    def precompute(self, **changes: Any) -> str:
        settings = self.pipeline.precompute.model_copy(update=changes)
        return precompute_reference(self.pipeline.model_copy(update={"precompute": settings})).key

    def train(self, **options: Any) -> Trained:
        settings = self.pipeline.train.model_copy(update={"max_steps": 1})
        return train_dpo(self.pipeline.model_copy(update={"train": settings}), **options)

    def refuses(self, message: str, kind: type[Exception] = GateError, **options: Any) -> Any:
        """Training stops with the message, and before any step."""
        steps: list[int] = []
        with pytest.raises(kind, match=message) as caught:
            self.train(watch=lambda done, _total, _row: steps.append(done), **options)
        assert not steps
        assert not list(self.folder.rglob("steps.jsonl"))
        return caught.value


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Ready:
    folder = tmp_path_factory.mktemp("prepared")
    pipeline = built(folder, text_rows(NUM_PAIRS), tiny_llama(folder / "model"))
    precompute_reference(pipeline)
    return Ready(folder, pipeline)


@pytest.fixture
def ready(prepared: Ready, tmp_path: Path) -> Ready:
    shutil.copytree(prepared.folder, tmp_path / "ready")
    return Ready(tmp_path / "ready", prepared.pipeline)


def values(frame: pl.DataFrame, column: str, change: Callable[[int, Any], Any]) -> pl.DataFrame:
    """The frame with `change(row number, value)` in a column."""
    changed = [change(number, value) for number, value in enumerate(frame[column].to_list())]
    return frame.with_columns(pl.Series(column, changed, frame.schema[column]))


def first(new: Callable[[Any], Any], column: str) -> Change:
    return lambda frame: values(frame, column, lambda number, value: value if number else new(value))


def test_the_untouched_reference_passes_and_the_figures_are_kept(ready: Ready) -> None:
    run = Path(ready.train().run)
    gate = json.loads((run / "run.json").read_text(encoding="utf-8"))["gate"]
    rows = ready.rows()
    assert gate["rows"] == NUM_PAIRS
    assert gate["tokens"] == sum(rows["num_chosen_tokens"].to_list() + rows["num_rejected_tokens"].to_list())
    assert 0 <= gate["max_abs"] <= 1e-5
    assert gate["rms"] <= gate["max_abs"]
    assert abs(gate["mean"]) <= gate["max_abs"]


# --- the table, without a model

CHOSEN, REJECTED = "ref_chosen_token_logps", "ref_rejected_token_logps"


def set_first_token(value: Any) -> Callable[[list[float]], list[Any]]:
    return lambda tokens: [value, *tokens[1:]]


def without_chosen(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose columns agree with each other, and in which nothing was chosen."""
    return row | {"chosen_ids": [], CHOSEN: [], "num_chosen_tokens": 0, "ref_chosen_logps": 0.0}


SPOILED: dict[str, tuple[Change, str]] = {
    "a null sum": (first(lambda _: None, "ref_chosen_logps"), "1 pairs with a null in ref_chosen_logps"),
    "a null list": (first(lambda _: None, REJECTED), f"1 pairs with a null in .*{REJECTED}"),
    "a null token": (first(set_first_token(None), CHOSEN), f"1 pairs with a (null|value) in .*{CHOSEN}"),
    "null ids": (first(lambda _: None, "rejected_ids"), "1 pairs .*(null|rejected_ids)"),
    "a null prompt": (first(lambda _: None, "prompt_ids"), "1 pairs .*prompt_ids"),
    "an empty prompt": (first(lambda _: [], "prompt_ids"), "1 pairs .*prompt_ids"),
    "an empty completion": (
        lambda frame: pl.DataFrame([without_chosen(frame.row(0, named=True)), *frame.to_dicts()[1:]], frame.schema),
        "1 pairs with an empty chosen_ids",
    ),
    "a NaN sum": (
        first(lambda _: float("nan"), "ref_rejected_logps"),
        "1 pairs .*ref_rejected_logps.* not finite",
    ),
    "a NaN token": (first(set_first_token(float("nan")), CHOSEN), f"1 pairs .*{CHOSEN}.* not finite"),
    "float16 overflow": (first(lambda _: float("-inf"), "ref_chosen_logps"), "ref_chosen_logps.* not finite"),
    "zeros for unfilled rows": (
        lambda frame: first(lambda _: 0.0, "ref_chosen_logps")(first(lambda v: [0.0] * len(v), CHOSEN)(frame)),
        f"1 pairs with nothing but zeros in {CHOSEN}",
    ),
    "length-1 lists": (
        lambda frame: frame.with_columns(pl.concat_list("ref_chosen_logps").alias(CHOSEN)),
        f"{NUM_PAIRS} pairs with {CHOSEN} not as long as chosen_ids",
    ),
    "ids that lost a token": (
        first(lambda ids: ids[:-1], "chosen_ids"),
        f"1 pairs with {CHOSEN} not as long as chosen_ids",
    ),
    "a log-prob above 0": (
        first(set_first_token(0.01), REJECTED),
        f"1 pairs with a log-prob above 0 in {REJECTED}",
    ),
    "a shuffled sum column": (
        lambda frame: frame.with_columns(pl.col("ref_rejected_logps").reverse()),
        f"{NUM_PAIRS} pairs where ref_rejected_logps is not the sum of {REJECTED}",
    ),
    "a mean for a sum": (
        lambda frame: frame.with_columns((pl.col("ref_chosen_logps") / pl.col("num_chosen_tokens")).cast(pl.Float32)),
        f"{NUM_PAIRS} pairs where ref_chosen_logps is not the sum of {CHOSEN}",
    ),
    "missing rows": (lambda frame: frame.head(NUM_PAIRS - 2), "2 pairs missing"),
    "no rows": (lambda frame: frame.head(0), f"{NUM_PAIRS} pairs missing"),
    "duplicate rows": (lambda frame: pl.concat([frame, frame.head(1)]), "1 pairs scored twice"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_spoiled_table_is_refused_by_name(ready: Ready, name: str) -> None:
    change, message = SPOILED[name]
    ready.rewrite(change)
    error = ready.refuses(message)
    assert error.where == str(ready.reference)
    assert "prefkit precompute" in error.hint


def test_the_message_shows_the_first_ten_pairs(ready: Ready) -> None:
    pairs = pl.read_parquet(ready.folder / "dataset" / "pairs" / "part-*.parquet")["pair_id"].sort().to_list()
    ready.rewrite(lambda frame: frame.head(0))
    shown = re.findall(r"\b[0-9a-f]{12}\b", ready.refuses("12 pairs missing").message)
    assert shown == [pair[:12] for pair in pairs[:10]]


def test_a_pair_both_scored_and_dropped_is_refused(ready: Ready) -> None:
    pair = ready.rows()["pair_id"][0]
    path, record = ready.reference / "dropped.parquet", ready.reference / "reference.json"
    pl.DataFrame({"pair_id": [pair], "reason": ["prompt_too_long"]}).write_parquet(path)
    recorded = json.loads(record.read_text(encoding="utf-8"))
    recorded["dropped"]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    record.write_text(json.dumps(recorded), encoding="utf-8")
    ready.refuses(f"1 pairs .*{pair[:12]}")


def test_an_edited_part_is_refused_by_its_hash(ready: Ready) -> None:
    part = ready.reference / "part-00000.parquet"
    ready.rows().with_columns(pl.col("ln_ches") + 1).write_parquet(part)
    error = ready.refuses("part was changed: its sha256 is not the recorded one")
    assert error.where == str(part)


def test_a_lost_part_is_named(ready: Ready) -> None:
    (ready.reference / "part-00000.parquet").unlink()
    assert ready.refuses("part is missing").where == str(ready.reference / "part-00000.parquet")


def test_pairs_added_after_the_reference_are_missing_and_the_message_says_what_to_type(ready: Ready) -> None:
    source = write_rows(ready.folder / "more.jsonl", text_rows(NUM_PAIRS + 3))
    sources = [ready.pipeline.sources[0].model_copy(update={"path": str(source)})]
    build_dataset(ready.pipeline.model_copy(update={"sources": sources}))
    error = ready.refuses("3 pairs missing")
    assert "prefkit precompute" in error.hint


def test_rows_of_pairs_that_left_the_dataset_are_ignored(ready: Ready) -> None:
    source = write_rows(ready.folder / "fewer.jsonl", text_rows(NUM_PAIRS)[4:])
    sources = [ready.pipeline.sources[0].model_copy(update={"path": str(source)})]
    build_dataset(ready.pipeline.model_copy(update={"sources": sources}))
    run = Path(ready.train().run)
    assert json.loads((run / "run.json").read_text(encoding="utf-8"))["gate"]["rows"] == NUM_PAIRS - 4


# --- the identity


def test_changed_weights_at_the_same_path_are_refused_with_both_hashes(ready: Ready) -> None:
    tensors = load_file(ready.model / "model.safetensors")
    tensors["model.norm.weight"][0] += 0.5
    save_file(tensors, ready.model / "model.safetensors", metadata={"format": "pt"})
    error = ready.refuses(r"no reference is this policy's")
    recorded = json.loads((ready.reference / "reference.json").read_text(encoding="utf-8"))["identity"]
    assert f"weights_sha256: {recorded['weights_sha256'][:16]}" in error.message
    assert "tokenizer" not in error.message
    assert error.exit_code == 1


def test_another_tokenizer_is_refused(ready: Ready) -> None:
    tokenizer = load_tokenizer(ready.model)
    tokenizer.eos_token = "<pad>"
    tokenizer.save_pretrained(ready.model)
    error = ready.refuses("tokenizer_sha256: ")
    assert "weights_sha256" not in error.message


def test_another_config_over_the_same_weights_is_refused_by_its_key_and_both_values(ready: Ready) -> None:
    path = ready.model / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | {"rms_norm_eps": 0.25}), encoding="utf-8")
    ready.refuses(rf"config\.rms_norm_eps: {config['rms_norm_eps']} and 0\.25")


def test_the_same_weights_at_another_path_and_in_other_shards_are_the_policy(ready: Ready) -> None:
    moved = ready.folder / "moved"
    load_model(ready.model, "float32", torch.device("cpu")).save_pretrained(moved, max_shard_size="30KB")  # type: ignore[operator]
    load_tokenizer(ready.model).save_pretrained(moved)
    shutil.rmtree(ready.model)
    ready.pipeline = ready.pipeline.model_copy(
        update={"precompute": ready.pipeline.precompute.model_copy(update={"model": str(moved)})}
    )
    assert ready.train().steps == 1


def test_several_references_are_listed_with_what_sets_them_apart(ready: Ready) -> None:
    first_key, second_key = ready.reference.name, ready.precompute(dtype="bfloat16")
    error = ready.refuses("several references are this policy's")
    assert re.search(rf"{first_key}: max_length 128, dtype float32", error.message)
    assert re.search(rf"{second_key}: max_length 128, dtype bfloat16", error.message)
    assert error.hint == "--reference KEY"
    for key in (first_key, second_key):
        run = Path(ready.train(reference=key, out=str(ready.folder / key)).run)
        assert json.loads((run / "run.json").read_text(encoding="utf-8"))["reference"] == key


def test_the_only_reference_that_is_this_policys_is_found_among_others(ready: Ready) -> None:
    own = ready.reference.name
    ready.precompute(model=str(tiny_llama(ready.folder / "other", seed=5)))
    assert len(ready.references) == 2
    run = Path(ready.train().run)
    assert json.loads((run / "run.json").read_text(encoding="utf-8"))["reference"] == own


def test_a_wanted_reference_of_another_model_is_refused(ready: Ready) -> None:
    other = ready.precompute(model=str(tiny_llama(ready.folder / "other", seed=5)))
    error = ready.refuses("no reference is this policy's", reference=other)
    assert other in error.message
    assert "weights_sha256" in error.message


def test_an_unknown_key_is_answered_with_the_known_ones(ready: Ready) -> None:
    error = ready.refuses("no reference 0123456789abcdef", DatasetError, reference="0123456789abcdef")
    assert ready.reference.name in error.expected


def test_no_reference_and_an_unfinished_one_are_none(ready: Ready) -> None:
    (ready.reference / "reference.json").unlink()
    for _ in range(2):
        error = ready.refuses("no finished reference", DatasetError)
        assert error.hint == "prefkit precompute TARGET --model M"
        shutil.rmtree(ready.folder / "dataset" / "reference", ignore_errors=True)


def test_another_template_gives_another_reference_and_both_are_listed(tmp_path: Path) -> None:
    pipeline = built(tmp_path, chat_rows(4), tiny_llama(tmp_path / "model"), "chat")
    ready = Ready(tmp_path, pipeline)
    keys = {ready.precompute(), ready.precompute(chat_template="transcript")}
    assert len(keys) == 2
    error = ready.refuses("several references are this policy's")
    assert all(key in error.message for key in keys)


# --- the policy's own scores


def digits(folder: Path) -> Ready:
    """Pairs of one length: digits are in no merge of the tiny tokenizer, so each is a token."""
    rows = [{"prompt": f"{a}{b}", "chosen": b, "rejected": a} for a in "0123" for b in "456"]
    pipeline = built(folder, rows, tiny_llama(folder / "model"))
    precompute_reference(pipeline)
    ready = Ready(folder, pipeline)
    assert (
        ready.rows()["chosen_ids"].list.len().to_list() == ready.rows()["rejected_ids"].list.len().to_list() == [2] * 12
    )
    return ready


def scores_of_another_pair(frame: pl.DataFrame) -> pl.DataFrame:
    """Sums and lists, each row's those of the next: all lengths are equal, so no table check can see it."""
    columns = ["ref_chosen_logps", "ref_rejected_logps", CHOSEN, REJECTED]
    order = [*range(1, frame.height), 0]
    return frame.with_columns(frame[order].select(columns))


def test_whole_scores_of_another_pair_are_caught_by_scoring(tmp_path: Path) -> None:
    ready = digits(tmp_path)
    ready.rewrite(scores_of_another_pair)
    error = ready.refuses("the policy's own scores are not the table's")
    assert error.expected == "at most 0.0001"
    assert "delete the reference" in error.hint


def test_one_token_off_by_a_thousandth_is_caught_by_scoring(ready: Ready) -> None:
    frame = ready.rows()
    pair, token = frame["pair_id"][0], frame[CHOSEN][0][0]
    moved = first(set_first_token(token - 1e-3), CHOSEN)(frame)
    sums = pl.Series("ref_chosen_logps", [sum(tokens) for tokens in moved[CHOSEN].to_list()], pl.Float32)
    ready.rewrite(lambda _: moved.with_columns(sums))
    error = ready.refuses(r"largest difference 0\.001 nats a token")
    assert pair[:12] in error.message


def test_ids_that_were_not_scored_are_caught_by_scoring(ready: Ready) -> None:
    ready.rewrite(first(lambda ids: [*ids[:-2], (ids[-2] + 7) % 300 + 10, ids[-1]], "chosen_ids"))
    ready.refuses("the policy's own scores are not the table's")


def test_chosen_and_rejected_in_each_others_place_are_caught_by_scoring(tmp_path: Path) -> None:
    ready = digits(tmp_path)
    columns = ["ref_chosen_logps", CHOSEN]
    other = [name.replace("chosen", "rejected") for name in columns]
    swapped = dict(zip(columns + other, other + columns, strict=True))
    ready.rewrite(lambda frame: frame.with_columns(pl.col(old).alias(new) for new, old in swapped.items()))
    ready.refuses("the policy's own scores are not the table's")


def test_bfloat16_is_scored_with_its_own_tolerance(ready: Ready) -> None:
    shutil.rmtree(ready.reference)
    ready.precompute(dtype="bfloat16")
    shutil.rmtree(ready.train().run)
    scale = pl.col(CHOSEN).list.eval(pl.element() * 1.5), pl.col("ref_chosen_logps") * 1.5
    ready.rewrite(lambda frame: frame.with_columns(scale))
    error = ready.refuses("the policy's own scores are not the table's")
    assert error.expected == "RMS at most 0.05, mean at most 0.005"


# --- what the pipeline says of the reference, and another model on purpose


def said(ready: Ready, *changes: str) -> Pipeline:
    """The pipeline of `prefkit train DATASET --set ...`: only the changes are said in so many words."""
    return pipeline_of(str(ready.folder / "dataset"), [f"train.model={ready.model}", "train.max_steps=1", *changes])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("precompute.max_length=64", "max_length: 128 and 64"),
        ("precompute.dtype=bfloat16", "dtype: float32 and bfloat16"),
        ("precompute.long_prompt=cut", "truncation.long_prompt: drop and cut"),
        ("precompute.min_completion_tokens=5", "truncation.min_completion_tokens: 4 and 5"),
    ],
)
def test_a_setting_said_to_training_must_be_the_references(ready: Ready, change: str, message: str) -> None:
    with pytest.raises(GateError) as caught:
        train_dpo(said(ready, change))
    assert message in caught.value.message
    assert "--set precompute" in caught.value.hint
    value = change.rpartition("=")[2].replace("64", "128").replace("bfloat16", "float32").replace("cut", "drop")
    same = f"{change.partition('=')[0]}={value.replace('5', '4')}"
    assert train_dpo(said(ready, same)).steps == 1


def test_what_only_the_manifest_says_is_left_to_the_reference(ready: Ready) -> None:
    ready.precompute(max_length=100)
    shutil.rmtree(ready.folder / "dataset" / "reference" / ready_key(ready, 128))
    assert train_dpo(said(ready)).steps == 1  # the manifest says 128


def ready_key(ready: Ready, max_length: int) -> str:
    recorded = [json.loads((path / "reference.json").read_text(encoding="utf-8")) for path in ready.references]
    return next(str(ref["key"]) for ref in recorded if ref["identity"]["max_length"] == max_length)


def test_a_setting_of_the_pipeline_picks_its_reference_among_several(ready: Ready) -> None:
    short = ready.precompute(max_length=100)
    settings = ready.pipeline.precompute.model_copy(update={"max_length": 100})
    ready.pipeline = ready.pipeline.model_copy(update={"precompute": settings})
    run = Path(ready.train().run)
    assert json.loads((run / "run.json").read_text(encoding="utf-8"))["reference"] == short


def with_template(model: Path, template: str) -> None:
    tokenizer = load_tokenizer(model)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(model)


def test_a_tokenizer_whose_own_template_changed_is_refused_and_one_chosen_for_the_reference_is_not(
    tmp_path: Path,
) -> None:
    model = tiny_llama(tmp_path / "model")
    pipeline = built(tmp_path, chat_rows(8), model, kind="chat", train={"max_steps": 1})
    precompute_reference(pipeline)
    with_template(model, load_tokenizer(model).chat_template + " ")
    with pytest.raises(GateError, match=r"chat_template_sha256: [0-9a-f]{16}\.\.\. and [0-9a-f]{16}\.\.\.") as caught:
        train_dpo(pipeline)
    assert not list(tmp_path.rglob("steps.jsonl"))
    shutil.rmtree(tmp_path / "dataset" / "reference")
    chosen = pipeline.precompute.model_copy(update={"chat_template": "transcript"})
    precompute_reference(pipeline.model_copy(update={"precompute": chosen}))
    with_template(model, load_tokenizer(model).chat_template + " ")
    assert train_dpo(pipeline).steps == 1
    other = pipeline.precompute.model_copy(update={"chat_template": str(tmp_path / "other.jinja")})
    (tmp_path / "other.jinja").write_text("{{ messages[0]['content'] }}", encoding="utf-8")
    with pytest.raises(GateError, match="chat_template_sha256"):
        train_dpo(pipeline.model_copy(update={"precompute": other}))
    assert caught.value.exit_code == 1


def test_another_model_as_reference_on_purpose_is_trained_on_and_its_distance_is_kept(ready: Ready) -> None:
    policy = tiny_llama(ready.folder / "policy", seed=9)
    other = ready.pipeline.train.model_copy(update={"model": str(policy), "other_reference": True})
    plain = other.model_copy(update={"other_reference": False})
    ready.pipeline = ready.pipeline.model_copy(update={"train": plain})
    ready.refuses("weights_sha256: [0-9a-f]{16}... and [0-9a-f]{16}...")
    ready.pipeline = ready.pipeline.model_copy(update={"train": other})
    run = json.loads((Path(ready.train().run) / "run.json").read_text(encoding="utf-8"))
    assert run["gate"]["rms"] > 0.1
    assert run["train"]["other_reference"]
    # the loss at step 0 is that of the two models: of the margin of both log-ratios, by the plain code
    table = ready.rows().sort("pair_id")
    model, losses = load_model(policy, "float32", torch.device("cpu")), []
    for row in table.iter_rows(named=True):
        chosen, rejected = (
            float(plain_logps(model, row["prompt_ids"], row[f"{side}_ids"]).detach().sum()) - row[f"ref_{side}_logps"]
            for side in ("chosen", "rejected")
        )
        losses.append(math.log1p(math.exp(-0.1 * (chosen - rejected))))
    first_loss = ready.train(out=str(ready.folder / "again")).first_loss
    settings = ready.pipeline.train.model_copy(update={"batch_size": NUM_PAIRS})
    whole = ready.pipeline.model_copy(update={"train": settings.model_copy(update={"max_steps": 1})})
    assert train_dpo(whole, out=str(ready.folder / "whole")).first_loss == pytest.approx(
        sum(losses) / NUM_PAIRS, abs=1e-5
    )
    assert abs(first_loss - math.log(2)) > 1e-3


def test_another_model_on_purpose_must_have_the_same_tokenizer(ready: Ready) -> None:
    policy = tiny_llama(ready.folder / "policy", seed=9)
    tokenizer = load_tokenizer(policy)
    tokenizer.add_tokens(["river stone"])
    tokenizer.save_pretrained(policy)
    settings = ready.pipeline.train.model_copy(update={"model": str(policy), "other_reference": True})
    ready.pipeline = ready.pipeline.model_copy(update={"train": settings})
    ready.refuses("tokenizer_sha256")


def test_the_switch_takes_nothing_from_the_scoring_of_the_same_model(ready: Ready) -> None:
    settings = ready.pipeline.train.model_copy(update={"other_reference": True})
    ready.pipeline = ready.pipeline.model_copy(update={"train": settings})
    nudge = set_first_token(-1.5)
    ready.rewrite(lambda frame: summed(first(nudge, CHOSEN)(frame)))
    ready.refuses("the policy's own scores are not the table's")


def summed(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.with_columns(pl.col(CHOSEN).list.sum().alias("ref_chosen_logps"))


def swapped(frame: pl.DataFrame) -> pl.DataFrame:
    """Chosen and rejected in each other's place, in every column: ids and scores agree, and training is inverted."""
    other = {"chosen": "rejected", "rejected": "chosen"}
    names = {name: name.replace(side, other[side]) for side in other for name in frame.columns if side in name}
    return frame.rename(names).select(frame.columns)


@pytest.mark.parametrize(
    "change",
    [lambda frame: frame.with_columns(pl.col("pair_id").reverse()), swapped],
    ids=["rows under other pairs", "sides in each other's place"],
)
def test_whole_rows_that_belong_to_other_texts_are_caught_by_tokenising_again(ready: Ready, change: Change) -> None:
    ready.rewrite(change)
    ready.refuses(f"12 pairs of {NUM_PAIRS} looked at have ids that are not those of their text")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda frame: frame.drop("ln_ches"), "ln_ches: Float32?"),
        (lambda frame: frame.with_columns(pl.col("ref_chosen_logps").cast(pl.Float64)), "Float64 and Float32"),
        (lambda frame: frame.with_columns(extra=pl.lit(1)), "extra: Int32"),
    ],
    ids=["a column lost", "a column of another type", "a column more"],
)
def test_a_part_with_other_columns_is_refused(ready: Ready, change: Change, message: str) -> None:
    ready.rewrite(change)
    error = ready.refuses("columns that no reference pass writes")
    assert re.search(message.replace("Float32?", "None and Float32"), error.message)


def test_a_part_that_is_no_parquet_is_refused_even_with_its_hash(ready: Ready) -> None:
    part, record = ready.reference / "part-00000.parquet", ready.reference / "reference.json"
    part.write_bytes(b"PAR1 and nothing more")
    recorded = json.loads(record.read_text(encoding="utf-8"))
    recorded["parts"][0]["sha256"] = hashlib.sha256(part.read_bytes()).hexdigest()
    record.write_text(json.dumps(recorded), encoding="utf-8")
    assert ready.refuses("cannot be read").where == str(part)


def test_one_damaged_reference_does_not_stand_in_the_way_of_a_wanted_one(ready: Ready) -> None:
    own, folder = ready.reference.name, ready.reference.parent / "0123456789abcdef"
    folder.mkdir()
    (folder / "reference.json").write_text("{}", encoding="utf-8")
    settings = ready.pipeline.train.model_copy(update={"max_steps": 1})
    assert train_dpo(ready.pipeline.model_copy(update={"train": settings}), reference=own).steps == 1


def test_a_whole_section_said_to_training_counts_as_said(ready: Ready) -> None:
    with pytest.raises(GateError, match="max_length: 128 and 77"):
        train_dpo(said(ready, "precompute={max_length: 77}"))


# --- as a command

COMMANDS: dict[str, tuple[Callable[[Ready], Any], str, str]] = {
    "weights": (lambda ready: tiny_llama(ready.model, seed=3), "weights_sha256", "GateError"),
    "tokenizer": (lambda ready: more_tokens(ready.model), "tokenizer_sha256", "GateError"),
    "a shuffled column": (
        lambda ready: ready.rewrite(lambda f: f.with_columns(pl.col("ref_chosen_logps").reverse())),
        "is not the sum of",
        "GateError",
    ),
    "zeros": (
        lambda ready: ready.rewrite(SPOILED["zeros for unfilled rows"][0]),
        "nothing but zeros",
        "GateError",
    ),
    "nulls": (lambda ready: ready.rewrite(SPOILED["a null token"][0]), "with a", "GateError"),
    "length-1 lists": (lambda ready: ready.rewrite(SPOILED["length-1 lists"][0]), "not as long as", "GateError"),
    "mean for sum": (lambda ready: ready.rewrite(SPOILED["a mean for a sum"][0]), "is not the sum of", "GateError"),
    "missing rows": (lambda ready: ready.rewrite(SPOILED["missing rows"][0]), "2 pairs missing", "GateError"),
    "an edited part with its hash": (
        lambda ready: ready.rewrite(lambda f: summed(first(set_first_token(-1.5), CHOSEN)(f))),
        "the policy's own scores are not the table's",
        "GateError",
    ),
    "an edited part": (
        lambda ready: ready.rows().head(3).write_parquet(ready.reference / "part-00000.parquet"),
        "its sha256 is not the recorded one",
        "GateError",
    ),
    "a newer format": (
        lambda ready: newer(ready.folder / "dataset" / "manifest.json"),
        "format_version",
        "DatasetError",
    ),
    "an edited identity": (lambda ready: shorter(ready.reference / "reference.json"), "was changed", "GateError"),
    "no reference": (lambda ready: shutil.rmtree(ready.reference), "no finished reference", "DatasetError"),
}
SAID = {"max_length": "64", "dtype": "bfloat16", "long_prompt": "cut"}


def more_tokens(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    tokenizer.add_tokens(["river stone"])
    tokenizer.save_pretrained(model)


def newer(manifest: Path) -> None:
    recorded = json.loads(manifest.read_text(encoding="utf-8"))
    manifest.write_text(json.dumps(recorded | {"format_version": recorded["format_version"] + 1}), encoding="utf-8")


def shorter(reference: Path) -> None:
    recorded = json.loads(reference.read_text(encoding="utf-8"))
    recorded["identity"]["max_length"] = 64
    reference.write_text(json.dumps(recorded), encoding="utf-8")


def refused(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[Any, Any]:
    """Exit code and error object of `prefkit train ... --json`."""
    monkeypatch.setattr("sys.argv", ["prefkit", "train", *words, "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    return ended.value.code, json.loads(printed.out.splitlines()[-1])["error"]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_refuses_by_name_before_the_first_step(
    name: str, ready: Ready, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, message, kind = COMMANDS[name]
    spoil(ready)
    code, error = refused([str(ready.folder / "dataset"), "--model", str(ready.model)], monkeypatch, capsys)
    assert message in error["message"]
    assert (error["kind"], code) == (kind, {"GateError": 1, "DatasetError": 2}[kind])
    assert not list(ready.folder.rglob("steps.*"))


@pytest.mark.parametrize("name", SAID)
def test_the_command_refuses_settings_that_are_not_the_references(
    name: str, ready: Ready, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(ready.folder / "dataset"), "--model", str(ready.model), "--set", f"precompute.{name}={SAID[name]}"]
    code, error = refused(words, monkeypatch, capsys)
    assert (code, error["kind"]) == (1, "GateError")
    assert f"{name}: " in error["message"]
    assert f" and {SAID[name]}" in error["message"]
    assert not list(ready.folder.rglob("steps.*"))


# --- the sample


def test_the_sample_is_the_16_longest_and_48_others_by_seed_alone() -> None:
    lengths = [(number * 37) % 101 + 1 for number in range(100)]
    frame = pl.DataFrame(
        {
            "pair_id": [f"{number:03d}" for number in range(100)],
            "num_prompt_tokens": lengths,
            "num_chosen_tokens": [1] * 100,
            "num_rejected_tokens": [2] * 100,
        }
    )
    sample = sample_rows(frame, 0)
    longest = sorted(lengths, reverse=True)[:16]
    assert sample["num_prompt_tokens"].head(16).to_list() == longest
    assert sample.height == sample["pair_id"].n_unique() == 64
    assert sample_rows(frame.sample(fraction=1, shuffle=True, seed=2), 0).equals(sample)
    assert not sample_rows(frame, 1).equals(sample)
    assert sample_rows(frame.head(20), 0).height == 20


def test_the_gate_writes_nothing_into_the_dataset(ready: Ready) -> None:
    ready.rewrite(SPOILED["a mean for a sum"][0])
    before = snapshot(ready.folder / "dataset")
    ready.refuses("is not the sum of")
    after = snapshot(ready.folder / "dataset")
    assert {name: after[name] for name in before} == before
    assert torch.is_grad_enabled()
