"""The reference pass: complete, keyed by content, resumable at any kill, and never done twice."""

import functools
import hashlib
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from command import Prefkit
from filelock import FileLock
from rich.console import Console
from tiny import (
    CHAT_TEMPLATE,
    Row,
    built,
    chat_rows,
    mamba_config,
    plain_logps,
    random_model,
    save_model,
    snapshot,
    text_rows,
    tiny_llama,
    tiny_tokenizer,
    write_rows,
)
from transformers import AutoModelForCausalLM, BloomConfig, LlamaForCausalLM, LlamaModel

from prefkit.batches import BATCHES_PER_PART
from prefkit.build import build_dataset
from prefkit.config import Pipeline, load_pipeline
from prefkit.documents import Reference
from prefkit.encode import TRANSCRIPT
from prefkit.errors import CheckError, DatasetError, InputError, Interrupted, MachineError, ModelError
from prefkit.head import After
from prefkit.layouts import choose_layout
from prefkit.logps import CompletionLogps, Layout
from prefkit.models import load_tokenizer
from prefkit.reference import Precomputed, estimate_reference, precompute_reference
from prefkit.terminal import print_dry_run
from prefkit.train import train_dpo

REFERENCE_COLUMNS = {
    "pair_id": pl.String,
    "prompt_ids": pl.List(pl.Int32),
    "chosen_ids": pl.List(pl.Int32),
    "rejected_ids": pl.List(pl.Int32),
    "num_prompt_tokens": pl.Int32,
    "num_chosen_tokens": pl.Int32,
    "num_rejected_tokens": pl.Int32,
    "ref_chosen_logps": pl.Float32,
    "ref_rejected_logps": pl.Float32,
    "ref_chosen_token_logps": pl.List(pl.Float32),
    "ref_rejected_token_logps": pl.List(pl.Float32),
    "chosen_truncated": pl.Boolean,
    "rejected_truncated": pl.Boolean,
    "ln_ches": pl.Float32,
}
A_PAIR_A_BATCH = {"max_batch_tokens": 1}  # and 32 batches a part


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model"))


class Calls:
    """How often a Llama was made and run since the fixture began."""

    made = 0
    run = 0


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    counted = Calls()
    make, run = LlamaForCausalLM.__init__, LlamaModel.forward

    @functools.wraps(make)
    def counting_make(self: Any, *args: Any, **kwargs: Any) -> None:
        counted.made += 1
        make(self, *args, **kwargs)

    @functools.wraps(run)
    def counting_run(self: Any, *args: Any, **kwargs: Any) -> Any:
        counted.run += 1
        return run(self, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "__init__", counting_make)
    monkeypatch.setattr(LlamaModel, "forward", counting_run)
    return counted


def folder_of(pipeline: Pipeline, done: Precomputed) -> Path:
    return Path(pipeline.dataset) / "reference" / done.key


def the_folder(pipeline: Pipeline) -> Path:
    (folder,) = (Path(pipeline.dataset) / "reference").iterdir()
    return folder


def rows_of(folder: Path) -> pl.DataFrame:
    return pl.concat([pl.read_parquet(path) for path in sorted(folder.glob("part-*.parquet"))])


def pairs_of(pipeline: Pipeline) -> pl.DataFrame:
    return pl.read_parquet(Path(pipeline.dataset) / "pairs" / "part-*.parquet")


def with_precompute(pipeline: Pipeline, **changes: Any) -> Pipeline:
    return pipeline.model_copy(update={"precompute": pipeline.precompute.model_copy(update=changes)})


def rebuilt(pipeline: Pipeline, rows: list[Row]) -> None:
    write_rows(Path(pipeline.sources[0].path), rows)
    build_dataset(pipeline)


def plain_sums(row: Row, model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        return plain_logps(model, row["prompt_ids"], row["chosen_ids"]), plain_logps(
            model, row["prompt_ids"], row["rejected_ids"]
        )


# --- what is in it


@pytest.mark.parametrize(("kind", "rows"), [("text", text_rows(14)), ("chat", chat_rows(14))], ids=["text", "chat"])
def test_every_row_holds_the_plain_log_probs_of_its_own_pair(
    tmp_path: Path, model: Path, kind: str, rows: list[Row]
) -> None:
    pipeline = built(tmp_path, rows, model, kind, precompute={"max_batch_tokens": 200})
    done = precompute_reference(pipeline)
    assert (done.pairs, done.dropped, done.scored) == (14, 0, 14)
    found = rows_of(folder_of(pipeline, done)).join(pairs_of(pipeline), on="pair_id", how="full", coalesce=True)
    assert found.height == 14
    tokenizer, plain = tiny_tokenizer(), AutoModelForCausalLM.from_pretrained(model)
    for row in found.iter_rows(named=True):
        for side, expected in zip(("chosen", "rejected"), plain_sums(row, plain), strict=True):
            text = tokenizer.decode(row["prompt_ids"] + row[f"{side}_ids"])
            if kind == "text":
                assert text == "<s>" + row["prompt"] + row[side] + "</s>"
            else:
                assert text == tokenizer.apply_chat_template(row["prompt"] + row[side], tokenize=False)
            tokens = torch.tensor(row[f"ref_{side}_token_logps"])
            assert len(tokens) == row[f"num_{side}_tokens"] == len(row[f"{side}_ids"])
            assert float((tokens - expected).abs().max()) <= 1e-4
            # the sum of the stored tokens, rounded once to float32
            assert row[f"ref_{side}_logps"] == float(tokens.double().sum().float())
        assert row["num_prompt_tokens"] == len(row["prompt_ids"])


def test_columns_and_types_are_those_of_the_format(tmp_path: Path, model: Path) -> None:
    pipeline = built(tmp_path, text_rows(3), model)
    folder = folder_of(pipeline, precompute_reference(pipeline))
    assert dict(rows_of(folder).schema) == REFERENCE_COLUMNS
    assert rows_of(folder).null_count().sum_horizontal().item() == 0
    assert dict(pl.read_parquet(folder / "dropped.parquet").schema) == {
        "pair_id": pl.String,
        "reason": pl.String,
    }
    plan = pl.read_parquet(folder / "plan.parquet")
    assert plan.columns[:4] == ["pair_id", "batch", "part", "num_tokens"]
    assert sorted(path.name for path in folder.iterdir()) == [
        "dropped.parquet",
        "part-00000.parquet",
        "plan.parquet",
        "reference.json",
    ]


def test_reference_json_names_its_key_its_identity_and_every_part(tmp_path: Path, model: Path) -> None:
    pipeline = built(tmp_path, text_rows(40), model, precompute=A_PAIR_A_BATCH)
    done = precompute_reference(pipeline)
    folder = folder_of(pipeline, done)
    recorded = json.loads((folder / "reference.json").read_text(encoding="utf-8"))
    Reference.model_validate(recorded)
    canonical = json.dumps(recorded["identity"], sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    assert recorded["key"] == done.key == folder.name == hashlib.sha256(canonical.encode()).hexdigest()[:16]
    assert recorded["identity"]["max_length"] == 128
    assert recorded["identity"]["dtype"] == "float32"
    assert recorded["identity"]["chat_template_sha256"] is None
    assert recorded["parts"] == [
        {"file": name, "rows": rows, "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest()}
        for name, rows in (("part-00000.parquet", 32), ("part-00001.parquet", 8))
    ]
    assert recorded["provenance"]["layout"] == "packed rows, prompts shared (packed attention)"


@pytest.mark.parametrize(("setting", "text"), [(None, CHAT_TEMPLATE), ("transcript", TRANSCRIPT)])
def test_the_chat_template_is_kept_and_part_of_the_identity(
    tmp_path: Path, model: Path, setting: str | None, text: str
) -> None:
    pipeline = built(tmp_path, chat_rows(3), model, "chat", precompute={"chat_template": setting})
    folder = folder_of(pipeline, precompute_reference(pipeline))
    identity = json.loads((folder / "reference.json").read_text(encoding="utf-8"))["identity"]
    assert (folder / "chat_template.jinja").read_text(encoding="utf-8") == text
    assert identity["chat_template_sha256"] == hashlib.sha256(text.encode()).hexdigest()


def test_pairs_that_encoding_drops_are_listed_with_the_reason_and_nowhere_else(tmp_path: Path, model: Path) -> None:
    long = "river " * 150
    rows = [
        {"prompt": long, "chosen": " yes", "rejected": " no"},
        {"prompt": "short", "chosen": f" {long}a", "rejected": f" {long}b"},
        *text_rows(5),
    ]
    pipeline = built(tmp_path, rows, model)
    done = precompute_reference(pipeline)
    folder = folder_of(pipeline, done)
    pairs = pairs_of(pipeline)
    reasons = {rows[0]["prompt"]: "prompt_too_long", "short": "identical_after_truncation"}
    expected = {row["pair_id"]: reasons[row["prompt"]] for row in pairs.to_dicts() if row["prompt"] in reasons}
    dropped = pl.read_parquet(folder / "dropped.parquet")
    assert dict(dropped.iter_rows()) == expected
    assert dropped["pair_id"].is_sorted()
    assert (done.pairs, done.dropped) == (5, 2)
    kept = rows_of(folder)["pair_id"].to_list() + dropped["pair_id"].to_list()
    assert sorted(kept) == sorted(pairs["pair_id"].to_list())


def test_counts_say_what_encoding_did(tmp_path: Path, model: Path) -> None:
    long = " river stone" * 60
    rows = [
        {"prompt": "a", "chosen": long, "rejected": " no"},
        {"prompt": "b", "chosen": long, "rejected": " stone" + long},
        {"prompt": "c </s>", "chosen": " yes", "rejected": " no"},
        {"prompt": "d", "chosen": " yes", "rejected": " no"},
    ]
    pipeline = built(tmp_path, rows, model, precompute={"max_length": 64})
    done = precompute_reference(pipeline)
    recorded = json.loads((folder_of(pipeline, done) / "reference.json").read_text(encoding="utf-8"))
    table = rows_of(folder_of(pipeline, done))
    tokens = table.select(pl.sum_horizontal("num_prompt_tokens", "num_chosen_tokens", "num_rejected_tokens").sum())
    assert recorded["counts"] == done.counts
    assert done.counts == {
        "tokens": tokens.item(),
        "chosen_truncated": 2,
        "rejected_truncated": 1,
        "one_side_truncated": 1,
        "prompts_no_prefix": 0,
        "completions_without_end": 0,
        "prompts_cut": 0,
        "spells_control_token": 1,
    }


def test_a_class_that_is_not_attention_only_is_scored_in_separate_sequences_and_says_why(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    folder = save_model(tmp_path / "model", random_model(mamba_config(len(tokenizer))), tokenizer)
    pipeline = built(tmp_path, text_rows(4), folder)
    told: list[str] = []
    done = precompute_reference(pipeline, tell=told.append)
    recorded = json.loads((folder_of(pipeline, done) / "reference.json").read_text(encoding="utf-8"))
    assert recorded["provenance"]["layout"].startswith("separate sequences")
    assert "packed: the class does not take it" in recorded["provenance"]["layout"]
    assert any("separate sequences" in line and "does not take it" in line for line in told)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    for row in rows_of(folder_of(pipeline, done)).iter_rows(named=True):
        assert float((torch.tensor(row["ref_chosen_token_logps"]) - plain_sums(row, plain)[0]).abs().max()) <= 1e-4


def test_a_model_whose_head_is_not_known_has_no_ln_ches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_llama(tmp_path / "model")
    monkeypatch.setattr("prefkit.logps.after_head", lambda _config: After(1.1))  # something that our head gets wrong
    pipeline = built(tmp_path, text_rows(4), folder)
    done = precompute_reference(pipeline)
    recorded = json.loads((folder_of(pipeline, done) / "reference.json").read_text(encoding="utf-8"))
    assert (
        "the model's own logits: our head: differs from one sequence at a time by" in recorded["provenance"]["layout"]
    )
    assert rows_of(folder_of(pipeline, done))["ln_ches"].null_count() == 4
    plain = AutoModelForCausalLM.from_pretrained(folder)
    for row in rows_of(folder_of(pipeline, done)).iter_rows(named=True):
        assert float((torch.tensor(row["ref_chosen_token_logps"]) - plain_sums(row, plain)[0]).abs().max()) <= 1e-4


@pytest.mark.parametrize("attention", ["packed", "sdpa", "eager"])
def test_an_attention_that_is_asked_for_is_used_and_recorded(tmp_path: Path, model: Path, attention: str) -> None:
    pipeline = built(tmp_path, text_rows(4), model, precompute={"attention": attention})
    done = precompute_reference(pipeline)
    provenance = json.loads((folder_of(pipeline, done) / "reference.json").read_text(encoding="utf-8"))["provenance"]
    assert provenance["attention"] == attention
    assert f"({attention} attention)" in provenance["layout"]
    plain = AutoModelForCausalLM.from_pretrained(model)
    for row in rows_of(folder_of(pipeline, done)).iter_rows(named=True):
        assert float((torch.tensor(row["ref_chosen_token_logps"]) - plain_sums(row, plain)[0]).abs().max()) <= 1e-4


def test_a_dry_run_says_how_many_pairs_are_left(tmp_path: Path, model: Path, prefkit: Prefkit) -> None:
    pipeline = built(tmp_path, text_rows(6), model)
    before = prefkit("precompute", pipeline.dataset, "--dry-run")
    assert "  6 pairs to score: about 0.0 MB on disk and " in before.out
    precompute_reference(pipeline)
    after = prefkit("precompute", pipeline.dataset, "--dry-run")
    assert "  all of them are scored: nothing to do, and nothing written\n" in after.out
    assert "one batch timed" not in after.out


def test_what_transformers_says_of_an_attention_that_is_tried_is_not_heard(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bloom has one attention only, which is no fault of the model."""
    config = BloomConfig(vocab_size=380, hidden_size=32, n_layer=2, n_head=4)
    assert choose_layout(random_model(config), "float32", 64).rows == "separate"
    assert "implementation" not in capsys.readouterr().err


@pytest.mark.parametrize("value", ["true", "0", "-3", "1.5", "many"])
@pytest.mark.parametrize("section", ["precompute", "train"])
def test_a_budget_is_a_number_of_tokens(tmp_path: Path, model: Path, section: str, value: str) -> None:
    built(tmp_path, text_rows(2), model)
    with pytest.raises(InputError, match="max_batch_tokens"):
        load_pipeline(tmp_path / "pipeline.yaml", [f"{section}.max_batch_tokens={value}"])


def test_an_attention_that_the_model_does_not_take_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    folder = save_model(tmp_path / "model", random_model(mamba_config(len(tokenizer))), tokenizer)
    pipeline = built(tmp_path, text_rows(4), folder, precompute={"attention": "packed"})
    with pytest.raises(InputError, match="packed attention is not right for this model: packed: the class") as caught:
        precompute_reference(pipeline)
    assert caught.value.where == "precompute.attention"
    assert caught.value.hint == "--set precompute.attention=auto"
    assert not (Path(pipeline.dataset) / "reference").exists()


# --- order, kills and resumes


def test_the_plan_lies_on_disk_before_anything_is_scored(tmp_path: Path, model: Path) -> None:
    pipeline = built(tmp_path, text_rows(5), model, precompute=A_PAIR_A_BATCH)
    seen: list[list[str]] = []
    told: list[tuple[int, int, int]] = []

    def watch(done: int, total: int, pairs: int) -> None:
        seen.append(sorted(path.name for path in the_folder(pipeline).iterdir()))
        told.append((done, total, pairs))

    precompute_reference(pipeline, watch=watch)
    assert seen == [["dropped.parquet", "plan.parquet"]] * 5
    plan = pl.read_parquet(the_folder(pipeline) / "plan.parquet")
    assert plan["pair_id"].to_list() == rows_of(the_folder(pipeline))["pair_id"].to_list()
    assert plan["num_tokens"].to_list() == sorted(plan["num_tokens"].to_list(), reverse=True)
    done = plan["num_tokens"].cum_sum().to_list()
    assert told == [(tokens, done[-1], number + 1) for number, tokens in enumerate(done)]


@pytest.mark.parametrize("batches", [1, 31, 33, 64])
def test_a_kill_at_any_batch_costs_no_finished_part_and_leaves_the_bytes_of_an_unbroken_run(
    tmp_path: Path, model: Path, batches: int, calls: Calls
) -> None:
    whole = built(tmp_path / "whole", text_rows(70), model, precompute=A_PAIR_A_BATCH)
    precompute_reference(whole)
    broken = built(tmp_path / "broken", text_rows(70), model, precompute=A_PAIR_A_BATCH)
    left = iter(range(batches))

    def kill(_done: int, _total: int, _pairs: int) -> None:
        next(left)

    with pytest.raises(StopIteration):
        precompute_reference(broken, watch=kill)
    assert not (the_folder(broken) / "reference.json").exists()
    done = precompute_reference(broken)
    assert done.scored == 70 - 32 * (batches // 32)
    assert snapshot(the_folder(broken)) == snapshot(the_folder(whole))


def test_a_lost_part_is_the_only_one_that_is_scored_again(tmp_path: Path, model: Path) -> None:
    pipeline = built(tmp_path, text_rows(70), model, precompute=A_PAIR_A_BATCH)
    folder = folder_of(pipeline, precompute_reference(pipeline))
    before = snapshot(folder)
    times = {path.name: path.stat().st_mtime_ns for path in folder.glob("p*.parquet")}
    (folder / "part-00001.parquet").unlink()
    assert precompute_reference(pipeline).scored == 32
    assert snapshot(folder) == before
    changed = [name for name, time in times.items() if (folder / name).stat().st_mtime_ns != time]
    assert changed == ["part-00001.parquet"]


def test_a_kill_just_before_reference_json_leaves_the_bytes_of_an_unbroken_run(tmp_path: Path, model: Path) -> None:
    pipeline = built(tmp_path, chat_rows(4), model, "chat")
    folder = folder_of(pipeline, precompute_reference(pipeline))
    before = snapshot(folder)
    (folder / "reference.json").unlink()
    assert precompute_reference(pipeline).scored == 0
    assert snapshot(folder) == before


def test_a_kill_just_before_the_reference_json_of_appended_pairs_is_made_good(tmp_path: Path, model: Path) -> None:
    rows = text_rows(20)
    pipeline = built(tmp_path, rows[:12], model)
    folder = folder_of(pipeline, precompute_reference(pipeline))
    old = (folder / "reference.json").read_bytes()
    rebuilt(pipeline, rows)
    precompute_reference(pipeline)
    before = snapshot(folder)
    (folder / "reference.json").write_bytes(old)  # it is written last: this is how the kill leaves the folder
    precompute_reference(pipeline)
    assert snapshot(folder) == before


@pytest.mark.parametrize("lost", ["plan.parquet", "dropped.parquet", "chat_template.jinja"])
def test_a_kill_while_the_first_files_are_written_leaves_the_bytes_of_an_unbroken_run(
    tmp_path: Path, model: Path, lost: str
) -> None:
    rows = [*chat_rows(4), *chat_rows(1, seed=9, low=200, high=200)]
    pipeline = built(tmp_path, rows, model, "chat")
    folder = folder_of(pipeline, precompute_reference(pipeline))
    before = snapshot(folder)
    for name in (lost, "part-00000.parquet", "reference.json"):
        (folder / name).unlink()
    precompute_reference(pipeline)
    assert snapshot(folder) == before


def test_the_same_settings_have_nothing_to_do(tmp_path: Path, model: Path, calls: Calls) -> None:
    pipeline = built(tmp_path, text_rows(6), model)
    first = precompute_reference(pipeline)
    assert (calls.made, calls.run > 0) == (1, True)
    before, runs = snapshot(Path(pipeline.dataset)), calls.run
    again = precompute_reference(pipeline)
    assert (again.key, again.pairs, again.scored) == (first.key, 6, 0)
    assert again.counts == first.counts
    assert (calls.made, calls.run) == (1, runs)
    assert snapshot(Path(pipeline.dataset)) == before


@pytest.mark.parametrize("change", [{"max_batch_tokens": 64}, {"max_boundary_share": 0.5}])
def test_settings_that_change_no_number_reuse_the_reference(
    tmp_path: Path, model: Path, calls: Calls, change: dict[str, Any]
) -> None:
    pipeline = built(tmp_path, text_rows(6), model)
    first = precompute_reference(pipeline)
    again = precompute_reference(with_precompute(pipeline, **change))
    assert (again.key, again.scored, calls.made) == (first.key, 0, 1)


@pytest.mark.parametrize("change", [{"max_length": 100}, {"dtype": "bfloat16"}, {"min_completion_tokens": 5}])
def test_settings_that_may_change_a_number_score_into_another_key(
    tmp_path: Path, model: Path, change: dict[str, Any]
) -> None:
    pipeline = built(tmp_path, text_rows(4), model)
    first = precompute_reference(pipeline)
    before = snapshot(folder_of(pipeline, first))
    other = precompute_reference(with_precompute(pipeline, **change))
    assert other.key != first.key
    assert other.scored == 4
    assert snapshot(folder_of(pipeline, first)) == before


def test_other_weights_at_the_same_path_are_scored_into_another_key(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "model", seed=0)
    pipeline = built(tmp_path, text_rows(4), folder)
    first = precompute_reference(pipeline)
    tiny_llama(folder, seed=1)
    second = precompute_reference(pipeline)
    assert second.key != first.key
    assert second.scored == 4


# --- keyed by content


def test_appended_pairs_are_the_only_ones_scored(tmp_path: Path, model: Path) -> None:
    rows = text_rows(20)
    pipeline = built(tmp_path, rows[:12], model)
    folder = folder_of(pipeline, precompute_reference(pipeline))
    before = snapshot(folder)
    rebuilt(pipeline, [*rows[12:], *rows[:12]])
    done = precompute_reference(pipeline)
    assert (done.pairs, done.scored, folder_of(pipeline, done)) == (20, 8, folder)
    assert (folder / "part-00000.parquet").read_bytes() == before["part-00000.parquet"]
    assert sorted(rows_of(folder)["pair_id"].to_list()) == sorted(pairs_of(pipeline)["pair_id"].to_list())
    recorded = json.loads((folder / "reference.json").read_text(encoding="utf-8"))
    assert [(part["file"], part["rows"]) for part in recorded["parts"]] == [
        ("part-00000.parquet", 12),
        ("part-00001.parquet", 8),
    ]


def test_appended_pairs_that_encoding_drops_are_listed_though_nothing_is_scored(tmp_path: Path, model: Path) -> None:
    rows = text_rows(6)
    pipeline = built(tmp_path, rows, model)
    folder = folder_of(pipeline, precompute_reference(pipeline))
    rebuilt(pipeline, [*rows, {"prompt": "river " * 150, "chosen": " yes", "rejected": " no"}])
    done = precompute_reference(pipeline)
    assert (done.pairs, done.dropped, done.scored) == (6, 1, 0)
    listed = rows_of(folder)["pair_id"].to_list() + pl.read_parquet(folder / "dropped.parquet")["pair_id"].to_list()
    assert sorted(listed) == sorted(pairs_of(pipeline)["pair_id"].to_list())
    assert train_dpo(pipeline).steps == 1  # the gate misses no pair


def test_a_kill_between_the_drops_of_appended_pairs_and_their_reference_json_is_made_good(
    tmp_path: Path, model: Path
) -> None:
    rows = text_rows(6)
    pipeline = built(tmp_path, rows, model)
    folder = folder_of(pipeline, precompute_reference(pipeline))
    old = (folder / "reference.json").read_bytes()
    rebuilt(pipeline, [*rows, {"prompt": "river " * 150, "chosen": " yes", "rejected": " no"}])
    precompute_reference(pipeline)
    before = snapshot(folder)
    (folder / "reference.json").write_bytes(old)
    precompute_reference(pipeline)
    assert snapshot(folder) == before
    assert train_dpo(pipeline).steps == 1


def test_an_edited_part_is_not_laundered_by_appending(tmp_path: Path, model: Path) -> None:
    """reference.json gets new hashes when pairs are appended: of parts that are still what was written."""
    rows = text_rows(20)
    pipeline = built(tmp_path, rows[:12], model)
    folder = folder_of(pipeline, precompute_reference(pipeline))
    part = folder / "part-00000.parquet"
    rows_of(folder).with_columns(pl.col("ref_chosen_logps") - 1).write_parquet(part)
    rebuilt(pipeline, rows)
    before = snapshot(folder)
    with pytest.raises(DatasetError, match="part was changed: its sha256 is not the recorded one") as caught:
        precompute_reference(pipeline)
    assert caught.value.where == str(part)
    assert caught.value.hint == f"delete {folder} and type prefkit precompute again"
    assert snapshot(folder) == before


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "plan.parquet").unlink(), "holds other pairs than plan.parquet says"),
        (lambda folder: (folder / "plan.parquet").write_bytes(b"PAR1"), "cannot be read: "),
        (lambda folder: (folder / "part-00000.parquet").write_bytes(b"PAR1"), "cannot be read: "),
    ],
    ids=["no plan", "a torn plan", "a torn part"],
)
def test_what_a_damaged_reference_holds_is_refused_with_the_way_out(
    tmp_path: Path, model: Path, spoil: Callable[[Path], Any], message: str
) -> None:
    pipeline = built(tmp_path, text_rows(12), model)
    folder = folder_of(pipeline, precompute_reference(pipeline))
    (folder / "reference.json").unlink()  # as a kill while appending leaves it
    spoil(folder)
    with pytest.raises(DatasetError, match=message) as caught:
        precompute_reference(pipeline)
    assert caught.value.hint == f"delete {folder} and type prefkit precompute again"


def test_a_stop_ends_the_pass_after_its_part_and_the_next_call_scores_the_rest(tmp_path: Path, model: Path) -> None:
    rows = text_rows(3 * BATCHES_PER_PART)
    pipeline = built(tmp_path / "stopped", rows, model, precompute=A_PAIR_A_BATCH)
    with pytest.raises(Interrupted, match="stopped before anything was scored"):
        precompute_reference(pipeline, stop=lambda: True)
    assert not (Path(pipeline.dataset) / "reference").exists()
    scored: list[int] = []
    with pytest.raises(Interrupted) as caught:
        precompute_reference(
            pipeline, watch=lambda _done, _total, pairs: scored.append(pairs), stop=lambda: bool(scored)
        )
    folder = the_folder(pipeline)
    assert caught.value.message == f"stopped: {BATCHES_PER_PART} pairs scored and written, 2 parts left"
    assert caught.value.where == str(folder)
    assert [path.name for path in folder.glob("part-*")] == ["part-00000.parquet"]
    assert precompute_reference(pipeline, stop=lambda: False).scored == 2 * BATCHES_PER_PART
    unbroken = built(tmp_path / "unbroken", rows, model, precompute=A_PAIR_A_BATCH)
    precompute_reference(unbroken)
    assert snapshot(folder) == snapshot(the_folder(unbroken))


def test_the_boundary_table_says_how_many_tokens_prompts_lose(tmp_path: Path, model: Path) -> None:
    # "river" is one token of the tiny tokenizer: a prompt cut inside it loses its last piece, more or less of it
    rows = [*text_rows(4), {"prompt": "a riv", "chosen": "er stone", "rejected": "er letter"}]
    pipeline = built(tmp_path, rows, model, precompute={"max_boundary_share": 1.0})
    tokenizer = load_tokenizer(model)
    lost = len(tokenizer("a riv")["input_ids"]) - len(tokenizer("a")["input_ids"])
    told, done = estimate_reference(pipeline), precompute_reference(pipeline)
    assert told.boundary == done.boundary == {"0": 4, str(lost): 1}
    recorded = json.loads((folder_of(pipeline, done) / "reference.json").read_text(encoding="utf-8"))
    assert recorded["boundary"] == done.boundary


def test_a_dry_run_counts_the_pairs_that_are_there_and_no_others(tmp_path: Path, model: Path) -> None:
    rows = [*text_rows(6), {"prompt": "river " * 150, "chosen": " yes", "rejected": " no"}]
    pipeline = built(tmp_path, rows, model)
    precompute_reference(pipeline)
    rebuilt(pipeline, rows[2:6])
    told = estimate_reference(pipeline)
    assert (told.pairs, told.dropped, told.disk_bytes, told.seconds) == (4, {}, 0, 0.0)


def test_the_largest_batch_is_that_of_the_plan_whatever_the_setting_says_later(tmp_path: Path, model: Path) -> None:
    pipeline = built(tmp_path, text_rows(12), model, precompute={"max_batch_tokens": 200})
    folder = folder_of(pipeline, precompute_reference(pipeline))
    sizes: dict[int, int] = {}
    for batch, tokens in pl.read_parquet(folder / "plan.parquet").select("batch", "num_tokens").iter_rows():
        sizes[batch] = sizes.get(batch, 0) + tokens
    assert len(sizes) > 1
    (folder / "reference.json").unlink()
    precompute_reference(with_precompute(pipeline, max_batch_tokens=4000))
    recorded = json.loads((folder / "reference.json").read_text(encoding="utf-8"))
    assert recorded["provenance"]["largest_batch"] == max(sizes.values()) <= 200


# --- the budget of a batch


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, budget: int) -> list[int]:
    """From now on the budget is measured, as on a GPU; the longest pair of each measurement."""
    asked: list[int] = []

    def measure(scorer: CompletionLogps, longest: int) -> int:
        assert isinstance(scorer, CompletionLogps)
        asked.append(longest)
        return budget

    monkeypatch.setattr("prefkit.reference.pick_device", lambda: torch.device("cuda"))
    monkeypatch.setattr("prefkit.reference.measure_budget", measure)
    return asked


def budgets_of(folder: Path) -> list[int | None]:
    """The budgets of the plan, each once, in its order."""
    return pl.read_parquet(folder / "plan.parquet")["max_batch_tokens"].unique(maintain_order=True).to_list()


def test_on_a_cpu_a_batch_has_2048_tokens_and_nothing_is_measured(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prefkit.reference.measure_budget", lambda *_args: pytest.fail("measured"))
    pipeline = built(tmp_path, text_rows(70, low=20, high=30), model, precompute={"max_length": 256})
    told = estimate_reference(pipeline)
    assert told.max_batch_tokens == 2048
    folder = folder_of(pipeline, precompute_reference(pipeline))
    plan = pl.read_parquet(folder / "plan.parquet")
    assert budgets_of(folder) == [2048]
    sizes = plan.group_by("batch").agg(pl.col("num_tokens").sum())["num_tokens"].to_list()
    assert told.batches == len(sizes) > 2
    assert 1800 < max(sizes) <= 2048


def test_on_a_gpu_the_budget_is_measured_once_and_kept_in_the_plan(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, calls: Calls
) -> None:
    rows = text_rows(60)
    pipeline = built(tmp_path, rows[:50], model)
    asked = on_a_gpu(monkeypatch, 150)
    lines: list[str] = []
    folder = folder_of(pipeline, precompute_reference(pipeline, tell=lines.append))
    assert "batches of 150 tokens, as much as the free memory holds" in lines
    assert calls.made == 1  # the model that was measured is the one that scores
    plan = pl.read_parquet(folder / "plan.parquet")
    assert asked == [plan["num_tokens"].max()]
    assert budgets_of(folder) == [150]
    rebuilt(pipeline, rows)
    assert precompute_reference(pipeline).scored == 10
    assert estimate_reference(pipeline).max_batch_tokens == 150
    assert len(asked) == 1
    assert budgets_of(folder) == [150]
    monkeypatch.undo()  # and wherever it goes on
    rebuilt(pipeline, [*rows, *text_rows(3, seed=9)])
    precompute_reference(pipeline)
    assert budgets_of(folder) == [150]


@pytest.mark.parametrize("batches", [0, 33])
def test_a_kill_after_the_measurement_leaves_the_bytes_of_an_unbroken_run_on_any_machine(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, batches: int
) -> None:
    asked = on_a_gpu(monkeypatch, 30)
    whole, broken = (built(tmp_path / name, text_rows(70), model) for name in ("whole", "broken"))
    precompute_reference(whole)
    left = iter([None] * batches)
    with pytest.raises(StopIteration):
        precompute_reference(broken, watch=lambda *_numbers: next(left))
    assert len(asked) == 2
    elsewhere = on_a_gpu(monkeypatch, 90)
    precompute_reference(broken)
    assert snapshot(the_folder(broken)) == snapshot(the_folder(whole))
    assert elsewhere == []


def test_a_budget_that_is_given_is_taken_whatever_the_plan_says(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = on_a_gpu(monkeypatch, 500)
    rows = text_rows(30)
    pipeline = built(tmp_path, rows[:10], model, precompute={"max_batch_tokens": 100})
    folder = folder_of(pipeline, precompute_reference(pipeline))
    rebuilt(pipeline, rows[:20])
    precompute_reference(with_precompute(pipeline, max_batch_tokens=60))
    rebuilt(pipeline, rows)
    precompute_reference(with_precompute(pipeline, max_batch_tokens=None))  # the last one that was used
    plan = pl.read_parquet(folder / "plan.parquet")
    assert plan["max_batch_tokens"].to_list() == [100] * 10 + [60] * 20
    assert asked == []


def test_no_model_is_loaded_to_plan_what_cannot_be_scored(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, calls: Calls
) -> None:
    rows = text_rows(8)
    for row in rows:
        row["prompt"] += " lan"
        row["chosen"] = "tern" + row["chosen"]
    asked = on_a_gpu(monkeypatch, 500)
    with pytest.raises(CheckError, match="in 8 of 8 pairs the prompt's tokens are no prefix"):
        precompute_reference(built(tmp_path / "split", rows, model))
    too_long = built(tmp_path / "long", [{"prompt": "river " * 150, "chosen": " yes", "rejected": " no"}], model)
    with pytest.raises(CheckError, match="encoding drops every pair: 1 prompt_too_long"):
        precompute_reference(too_long)
    assert (asked, calls.made) == ([], 0)


def test_a_plan_of_an_earlier_release_is_gone_on_with(tmp_path: Path, model: Path) -> None:
    rows = text_rows(80)
    pipeline = built(tmp_path, rows[:70], model, precompute=A_PAIR_A_BATCH)
    folder = folder_of(pipeline, precompute_reference(pipeline))
    old = pl.read_parquet(folder / "plan.parquet").drop("max_batch_tokens")
    old.write_parquet(folder / "plan.parquet")
    for name in ("reference.json", "part-00001.parquet"):
        (folder / name).unlink()
    rebuilt(pipeline, rows)
    done = precompute_reference(with_precompute(pipeline, max_batch_tokens=None))
    assert (done.pairs, done.scored) == (80, 32 + 10)
    plan = pl.read_parquet(folder / "plan.parquet")
    assert plan.drop("max_batch_tokens").head(70).equals(old)
    assert plan["max_batch_tokens"].to_list() == [None] * 70 + [2048] * 10
    assert sorted(rows_of(folder)["pair_id"].to_list()) == sorted(pairs_of(pipeline)["pair_id"].to_list())


def test_pairs_of_one_prompt_are_scored_in_one_batch(tmp_path: Path, model: Path) -> None:
    """By how long they are they would lie far apart."""
    rows = text_rows(30)
    for number in (3, 9, 20):
        rows[number]["prompt"] = "one prompt for three"
        rows[number]["chosen"] += " river" * 5 * (number // 3)
    pipeline = built(tmp_path, rows, model, precompute={"max_batch_tokens": 120})
    plan = pl.read_parquet(folder_of(pipeline, precompute_reference(pipeline)) / "plan.parquet")
    shared = pairs_of(pipeline).filter(pl.col("prompt") == "one prompt for three")["pair_id"].to_list()
    places = [place for place, pair in enumerate(plan["pair_id"]) if pair in shared]
    assert len(places) == 3
    assert places == [places[0], places[0] + 1, places[0] + 2]
    assert plan["num_tokens"].to_list() != sorted(plan["num_tokens"].to_list(), reverse=True)


def test_reordered_and_dropped_pairs_score_nothing(tmp_path: Path, model: Path, calls: Calls) -> None:
    rows = text_rows(20)
    pipeline = built(tmp_path, rows, model)
    folder = folder_of(pipeline, precompute_reference(pipeline))
    before = snapshot(folder)
    random.Random(3).shuffle(rows)
    rebuilt(pipeline, rows)
    assert precompute_reference(pipeline).scored == 0
    rebuilt(pipeline, rows[:15])
    assert precompute_reference(pipeline).scored == 0
    assert snapshot(folder) == before
    assert calls.made == 1


def test_pairs_that_come_and_go_between_a_kill_and_the_next_run_are_scored_once_or_not(
    tmp_path: Path, model: Path
) -> None:
    rows = text_rows(50)
    pipeline = built(tmp_path, rows[:45], model, precompute=A_PAIR_A_BATCH)
    left = iter([None] * 40)
    with pytest.raises(StopIteration):
        precompute_reference(pipeline, watch=lambda *_numbers: next(left))
    rebuilt(pipeline, rows[10:])
    precompute_reference(pipeline)
    scored = rows_of(the_folder(pipeline))["pair_id"]
    assert not scored.is_duplicated().any()
    assert set(pairs_of(pipeline)["pair_id"]) <= set(scored)


def test_two_datasets_of_the_same_pairs_have_the_same_bytes_in_any_order(tmp_path: Path, model: Path) -> None:
    rows = text_rows(40)
    one = built(tmp_path / "one", rows, model, precompute={"max_batch_tokens": 100})
    two = built(tmp_path / "two", rows, model, precompute={"max_batch_tokens": 100})
    turned = built(tmp_path / "turned", rows[::-1], model, precompute={"max_batch_tokens": 100})
    for pipeline in (one, two, turned):
        precompute_reference(pipeline)
    assert snapshot(the_folder(one)) == snapshot(the_folder(two)) == snapshot(the_folder(turned))


# --- a dry run, and refusals


def test_a_dry_run_foretells_and_writes_nothing(tmp_path: Path, model: Path) -> None:
    rows = [*text_rows(10), {"prompt": "river " * 150, "chosen": " yes", "rejected": " no"}]
    pipeline = built(tmp_path, rows, model, precompute={"max_batch_tokens": 200})
    before = snapshot(tmp_path)
    told = estimate_reference(pipeline)
    assert snapshot(tmp_path) == before
    done = precompute_reference(pipeline)
    folder = folder_of(pipeline, done)
    plan = pl.read_parquet(folder / "plan.parquet")
    assert (told.key, told.pairs, told.dropped) == (done.key, 10, {"prompt_too_long": 1})
    assert (told.tokens, told.batches) == (plan["num_tokens"].sum(), plan["batch"].n_unique())
    assert told.max_batch_tokens == 200
    shown = io.StringIO()
    print_dry_run(told, Console(file=shown, width=200))
    assert (
        f"{told.tokens} tokens in {told.batches} batches of at most 200, what pairs share counted once; "
        in shown.getvalue()
    )
    print_dry_run(told._replace(max_batch_tokens=None), Console(file=shown, width=200))
    assert f"{told.tokens} tokens in {told.batches} batches; " in shown.getvalue()
    assert told.counts == done.counts
    assert told.seconds > 0
    size = (folder / "part-00000.parquet").stat().st_size
    assert size / 3 < told.disk_bytes < size * 3


def test_more_tokens_than_the_model_has_positions_are_refused(tmp_path: Path, model: Path) -> None:
    pipeline = built(tmp_path, text_rows(3), model, precompute={"max_length": 513})
    for command in (precompute_reference, estimate_reference):
        with pytest.raises(ModelError, match=r"precompute\.max_length is 513, the model has 512 positions"):
            command(pipeline)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "nowhere", "no such model folder"),
        (lambda folder: folder, "no tokenizer in it|no safetensors weights"),
        (lambda folder: None, "precompute.model is not set"),
    ],
    ids=["missing", "a folder of something else", "not set"],
)
def test_what_is_no_model_is_refused(
    tmp_path: Path, model: Path, make: Callable[[Path], Path | None], message: str
) -> None:
    pipeline = built(tmp_path / "data", text_rows(3), model)
    other = make(tmp_path / "data")
    with pytest.raises(InputError, match=message):
        precompute_reference(with_precompute(pipeline, model=None if other is None else str(other)))
    assert not (Path(pipeline.dataset) / "reference").exists()


def test_a_tokenizer_without_a_template_stops_a_chat_dataset_before_it_writes(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "model", template=None)
    pipeline = built(tmp_path, chat_rows(3), folder, "chat")
    with pytest.raises(ModelError, match="the tokenizer has no chat template") as caught:
        precompute_reference(pipeline)
    assert caught.value.hint == "--set precompute.chat_template=transcript"
    assert not (Path(pipeline.dataset) / "reference").exists()


def test_too_many_split_prompts_stop_the_pass_before_a_model_loads(tmp_path: Path, model: Path, calls: Calls) -> None:
    rows = text_rows(8)
    for row in rows:
        row["prompt"] += " lan"
        row["chosen"] = "tern" + row["chosen"]
    pipeline = built(tmp_path, rows, model)
    with pytest.raises(CheckError, match="in 8 of 8 pairs the prompt's tokens are no prefix"):
        precompute_reference(pipeline)
    assert calls.made == 0
    assert precompute_reference(with_precompute(pipeline, max_boundary_share=1.0)).counts["prompts_no_prefix"] == 8


def test_an_unfinished_dataset_is_refused(tmp_path: Path, model: Path) -> None:
    pipeline = built(tmp_path, text_rows(3), model)
    (Path(pipeline.dataset) / "manifest.json").unlink()
    with pytest.raises(DatasetError, match=r"there is no manifest\.json"):
        precompute_reference(pipeline)


def test_a_second_writer_is_told_who_holds_the_dataset(tmp_path: Path, model: Path) -> None:
    pipeline = built(tmp_path, text_rows(3), model)
    with (
        FileLock(Path(pipeline.dataset) / ".lock"),
        pytest.raises(DatasetError, match="is being written by another prefkit"),
    ):
        precompute_reference(pipeline)


# --- memory

CPU_MESSAGE = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 4000000000000 bytes. Error code 12 (Cannot allocate memory)"
)
SHORT_OF_MEMORY: dict[str, Exception] = {
    "on a GPU": torch.OutOfMemoryError("CUDA out of memory."),
    "on the CPU": RuntimeError(CPU_MESSAGE),  # what torch raises there, word for word
    "in Python": MemoryError(),
}


def limit_pairs(monkeypatch: pytest.MonkeyPatch, most_pairs: int, error: Exception) -> None:
    """From now on a forward pass of more pairs fails. The layout is given, so that only scoring meets it."""
    forward = CompletionLogps.forward

    def refuse(self: CompletionLogps, batch: Any) -> Any:
        if int(batch.sides[-1]) // 2 + 1 > most_pairs:
            raise error
        return forward(self, batch)

    monkeypatch.setattr(CompletionLogps, "forward", refuse)
    monkeypatch.setattr("prefkit.scoring.choose_layout", lambda *_args: Layout("packed", "packed"))


@pytest.mark.parametrize("place", SHORT_OF_MEMORY)
def test_out_of_memory_scores_the_same_batch_in_slices(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    roomy, tight = (built(tmp_path / name, text_rows(10), model) for name in ("roomy", "tight"))
    expected = rows_of(folder_of(roomy, precompute_reference(roomy)))
    limit_pairs(monkeypatch, 2, SHORT_OF_MEMORY[place])
    found = rows_of(folder_of(tight, precompute_reference(tight)))
    sums = ["ref_chosen_logps", "ref_rejected_logps"]
    same = [name for name in REFERENCE_COLUMNS if not name.startswith("ref_") and name != "ln_ches"]
    assert found.select(same).equals(expected.select(same))
    assert abs(found.select(sums).to_numpy() - expected.select(sums).to_numpy()).max() <= 1e-4


@pytest.mark.parametrize("place", SHORT_OF_MEMORY)
def test_out_of_memory_on_a_single_pair_is_the_machines_fault(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    pipeline = built(tmp_path, text_rows(3), model)
    limit_pairs(monkeypatch, 0, SHORT_OF_MEMORY[place])
    with pytest.raises(MachineError, match="out of memory on a single pair") as caught:
        precompute_reference(pipeline)
    assert caught.value.exit_code == 3


def test_scoring_in_slices_is_noted(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = built(tmp_path, text_rows(10), model)
    limit_pairs(monkeypatch, 2, SHORT_OF_MEMORY["on a GPU"])
    told: list[str] = []
    precompute_reference(pipeline, tell=told.append)
    assert any("memory" in line for line in told)


def test_an_error_of_the_model_is_not_taken_for_a_lack_of_memory(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = built(tmp_path, text_rows(3), model)
    limit_pairs(monkeypatch, 0, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes"):
        precompute_reference(pipeline)


def test_a_dataset_without_pairs_is_refused(tmp_path: Path, model: Path) -> None:
    pipeline = built(tmp_path, [{"prompt": "a", "chosen": "b", "rejected": "b"}], model)
    with pytest.raises(DatasetError, match="holds no pairs") as caught:
        precompute_reference(pipeline)
    asked = '"select reason, count(*) from dropped group by all"'
    assert caught.value.hint == f"prefkit query {pipeline.dataset} {asked}"
    assert not (Path(pipeline.dataset) / "reference").exists()
