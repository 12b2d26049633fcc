"""What a user reads when a model, a reference or a training cannot go on: the whole text, provoked by the command.

Each expected text is written by hand; a pattern stands only where a hash or a library's own words are in it.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from command import Ended, Prefkit
from safetensors.torch import load_file, save_file
from tiny import (
    Row,
    built,
    chat_rows,
    llama_config,
    random_model,
    save_model,
    snapshot,
    text_rows,
    tiny_llama,
    tiny_tokenizer,
)
from transformers import BertConfig, FalconConfig, GPTNeoXJapaneseConfig

from prefkit import layouts
from prefkit.errors import ModelError
from prefkit.logps import CompletionLogps, Layout
from prefkit.models import load_model, load_tokenizer

NUM_PAIRS = 8
AGAIN = "delete the reference and type prefkit precompute again"


@pytest.fixture
def refuses(prefkit: Prefkit, tmp_path: Path) -> Callable[..., None]:
    """A command ends with the code and a text that is this pattern, and writes nothing; --json says the same parts."""

    def check(arguments: tuple[str, ...], text: str, kind: str, code: int = 2) -> None:
        before = snapshot(tmp_path)
        ended = prefkit(*arguments)
        assert ended.code == code, ended.err
        assert re.fullmatch(f"error: {text}\n", ended.err), ended.err
        after = snapshot(tmp_path)
        assert {name for name in after.keys() - before.keys() if not name.endswith(".lock")} == set()
        assert {name: after[name] for name in before} == before
        told = prefkit(*arguments, "--json")
        said = json.loads(told.out.splitlines()[-1])["error"]
        where = f"{said['where']}: " if "where" in said else ""
        expected = f"\n  expected: {said['expected']}" if "expected" in said else ""
        hint = f"\n  next: {said['hint']}" if "hint" in said else ""
        assert (told.code, said["kind"]) == (code, kind)
        assert re.fullmatch(text, f"{where}{said['message']}{expected}{hint}")

    return check


Refuses = Callable[..., None]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text dataset with its reference, and the model of both, in one folder."""
    folder = tmp_path_factory.mktemp("prepared")
    from prefkit.reference import precompute_reference

    precompute_reference(built(folder, text_rows(NUM_PAIRS), tiny_llama(folder / "model")))
    return folder


@pytest.fixture
def ready(prepared: Path, tmp_path: Path) -> Path:
    """That folder, copied to where the commands of this test run: `dataset` and `model`."""
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    return tmp_path


def dataset_of(folder: Path, rows: list[Row], kind: str = "text", **sections: Any) -> Path:
    """A dataset alone; the model of its commands is given by --model."""
    built(folder, rows, folder / "model", kind, **sections)
    return folder


PRECOMPUTE = ("precompute", "dataset", "--model", "model")
TRAIN = ("train", "dataset", "--model", "model", "--set", "train.max_steps=2")


# the tokenizer and its template


def test_a_chat_dataset_without_a_template_is_answered_in_full(refuses: Refuses, tmp_path: Path) -> None:
    dataset_of(tmp_path, chat_rows(3), "chat")
    tiny_llama(tmp_path / "model", template=None)
    text = (
        "the tokenizer has no chat template\n"
        "  expected: precompute.chat_template: a jinja file, or `transcript` (Human / Assistant turns as in HH)\n"
        "  next: --set precompute.chat_template=transcript"
    )
    refuses(PRECOMPUTE, re.escape(text), "ModelError")
    text = "precompute.chat_template: no template gone.jinja\n  expected: a jinja file, or `transcript`"
    refuses((*PRECOMPUTE, "--set", "precompute.chat_template=gone.jinja"), re.escape(text), "ModelError")
    (tmp_path / "broken.jinja").write_text("{{ bos_token }}\n{% if %}")
    text = r"broken\.jinja:2: the chat template is no jinja: [A-Z][^\n]+"
    refuses((*PRECOMPUTE, "--set", "precompute.chat_template=broken.jinja"), text, "ModelError")


def test_a_template_of_the_tokenizer_that_is_no_jinja_is_answered_with_the_models_folder(
    refuses: Refuses, tmp_path: Path
) -> None:
    dataset_of(tmp_path, chat_rows(3), "chat")
    tiny_llama(tmp_path / "model", template="{% for %}")
    text = r"model[^\n]*: the chat template is no jinja: [A-Z][^\n]+"
    refuses(PRECOMPUTE, text, "ModelError")


def test_a_tokenizer_without_an_end_is_answered_with_its_folder(refuses: Refuses, tmp_path: Path) -> None:
    dataset_of(tmp_path, text_rows(3))
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    save_model(tmp_path / "model", random_model(llama_config(len(tokenizer))), tokenizer)
    text = "model: the tokenizer has no eos_token\n  expected: one: a text completion ends with it"
    refuses(PRECOMPUTE, re.escape(text), "ModelError")


def test_a_transcript_without_an_end_is_answered_with_the_models_folder(refuses: Refuses, tmp_path: Path) -> None:
    dataset_of(tmp_path, chat_rows(3), "chat")
    tokenizer = tiny_tokenizer(template=None)
    tokenizer.eos_token = None
    save_model(tmp_path / "model", random_model(llama_config(len(tokenizer))), tokenizer)
    text = "model: the tokenizer has no eos_token\n  expected: one: the transcript ends with it"
    refuses([*PRECOMPUTE, "--set", "precompute.chat_template=transcript"], re.escape(text), "ModelError")


def test_prompts_that_end_inside_a_token_are_answered_in_full(refuses: Refuses, tmp_path: Path) -> None:
    rows = text_rows(8)
    for row in rows:
        row["prompt"] += " lan"
        row["chosen"] = "tern" + row["chosen"]
    dataset_of(tmp_path, rows)
    tiny_llama(tmp_path / "model")
    text = (
        "in 8 of 8 pairs the prompt's tokens are no prefix of those of prompt + completion\n"
        "  expected: at most a share of 0.05 (precompute.max_boundary_share)\n"
        "  next: end prompts at a token boundary (text), fix the chat template, or raise the limit"
    )
    refuses(PRECOMPUTE, re.escape(text), "CheckError", 1)


def test_a_dataset_of_which_encoding_leaves_nothing_is_answered_with_the_reasons(
    refuses: Refuses, tmp_path: Path
) -> None:
    dataset_of(tmp_path, chat_rows(4), "chat")
    tiny_llama(tmp_path / "model")
    silent = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    (tmp_path / "silent.jinja").write_text(silent)
    hint = "\n  next: another precompute.max_length or chat template"
    text = "dataset: encoding drops every pair: 4 empty_completion" + hint
    refuses((*PRECOMPUTE, "--set", "precompute.chat_template=silent.jinja"), re.escape(text), "CheckError", 1)
    text = "dataset: encoding drops every pair: 4 prompt_too_long" + hint
    short = ("--set", "precompute.max_length=5", "--set", "precompute.min_completion_tokens=4")
    refuses((*PRECOMPUTE, *short), re.escape(text), "CheckError", 1)


# the model's folder


def without(*names: str) -> Callable[[Path], None]:
    def spoil(model: Path) -> None:
        for name in names:
            (model / name).unlink()

    return spoil


def with_file(name: str, content: str) -> Callable[[Path], None]:
    def spoil(model: Path) -> None:
        (model / name).write_text(content)

    return spoil


def without_a_weight(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def cut_off(model: Path) -> None:
    content = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(content[:-100])


def not_finite(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def one_token_not_finite(model: Path) -> None:
    """A token of the data, and of nothing that is scored before the data, has no embedding."""
    probes = {i for pair in layouts._probe_pairs(len(tiny_tokenizer()), 128, []) for ids in pair for i in ids}
    used = set(tiny_tokenizer()("".join(row["prompt"] for row in text_rows(3)))["input_ids"])
    (token, *_) = sorted(used - probes - set(range(8)))
    tensors = load_file(model / "model.safetensors")
    tensors["model.embed_tokens.weight"][token] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def bidirectional(model: Path) -> None:
    shutil.rmtree(model)
    config = BertConfig(
        vocab_size=512, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    save_model(model, random_model(config), tiny_tokenizer())


def smaller(model: Path) -> None:
    shutil.rmtree(model)
    save_model(model, random_model(llama_config(100)), tiny_tokenizer())


def dynamic_rotary(model: Path) -> None:
    shutil.rmtree(model)
    rotary = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}
    save_model(model, random_model(llama_config(rope_parameters=rotary)), tiny_tokenizer())


FOLDER = "a folder of save_pretrained, with its tokenizer"
MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "gone": (shutil.rmtree, re.escape(f"model: no such model folder\n  expected: {FOLDER}")),
    "no tokenizer": (
        without("tokenizer.json", "tokenizer_config.json"),
        re.escape("model: no tokenizer in it\n  expected: tokenizer.json, as written by save_pretrained"),
    ),
    "a torn tokenizer": (with_file("tokenizer.json", "{"), r"model: its tokenizer does not load: [^\n]+"),
    "no weights": (
        without("model.safetensors"),
        re.escape(
            "model/model.safetensors: no safetensors weights\n  next: save the model with save_pretrained(FOLDER)"
        ),
    ),
    "weights of another kind": (
        with_file("model.safetensors", "PK\x03\x04 this is a pickle"),
        re.escape("model/model.safetensors: no safetensors file"),
    ),
    "weights cut off": (cut_off, re.escape("model/model.safetensors: the file is cut off")),
    "an index that is no JSON": (
        lambda model: (without("model.safetensors")(model), with_file("model.safetensors.index.json", "{")(model)),
        re.escape("model/model.safetensors.index.json: no index of safetensors files\n  expected: a weight_map"),
    ),
    "an index without a map": (
        lambda model: (without("model.safetensors")(model), with_file("model.safetensors.index.json", "{}")(model)),
        re.escape("model/model.safetensors.index.json: no index of safetensors files\n  expected: a weight_map"),
    ),
    "a header of another shape": (
        lambda model: (model / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"[]"),
        re.escape("model/model.safetensors: no safetensors file"),
    ),
    "a header without places": (
        lambda model: (model / "model.safetensors").write_bytes((9).to_bytes(8, "little") + b'{"a": {}}'),
        re.escape("model/model.safetensors: no safetensors file"),
    ),
    "no config": (
        without("config.json"),
        re.escape("model: there is no config.json\n  expected: a model folder of save_pretrained"),
    ),
    # whoever reads it first, the file is named
    "a torn config": (with_file("config.json", '{"a":'), r"model: [^\n]*config\.json[^\n]*JSON[^\n]*"),
    "a config that is a list": (with_file("config.json", "[1]"), re.escape("model: config.json is no JSON object")),
    "a config of nothing": (with_file("config.json", "{}"), r"model: the model does not load: [^\n]+"),
    "a weight lost": (
        without_a_weight,
        re.escape(
            "model: 1 of its weights are missing or of another shape: model.layers.1.mlp.up_proj.weight\n"
            "  expected: all"
        ),
    ),
    "not causal": (
        bidirectional,
        re.escape("model: not a causal language model: what comes later changes what it says before"),
    ),
    "too few embeddings": (smaller, r"model: the tokenizer has \d+ tokens, the model 100 embeddings"),
    "dynamic rotary factors": (
        dynamic_rotary,
        re.escape(
            "model: its dynamic rotary factors above 64 tokens depend on what was scored before\n"
            "  expected: precompute.max_length of at most 64\n  next: --set precompute.max_length=64"
        ),
    ),
    "numbers that are not finite": (
        not_finite,
        re.escape("model: the model's log-probs are not finite\n  expected: numbers: look for NaN or infinite weights"),
    ),
    "a token that is not finite": (
        one_token_not_finite,
        re.escape(
            "model: the model's log-probs are not finite\n"
            "  expected: numbers: look for NaN or infinite weights, or try float32"
        ),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_cannot_be_used_is_answered_in_full(name: str, refuses: Refuses, tmp_path: Path) -> None:
    spoil, text = MODELS[name]
    dataset_of(tmp_path, text_rows(3))
    tiny_llama(tmp_path / "model")
    spoil(tmp_path / "model")
    refuses((*PRECOMPUTE, "--dry-run"), text, "ModelError")
    if name != "a token that is not finite":  # it shows when the plan is on disk already
        refuses(PRECOMPUTE, text, "ModelError")


def test_a_length_beyond_the_models_positions_is_answered_in_full(refuses: Refuses, tmp_path: Path) -> None:
    dataset_of(tmp_path, text_rows(3))
    tiny_llama(tmp_path / "model")
    text = (
        "model: precompute.max_length is 513, the model has 512 positions (max_position_embeddings)\n"
        "  next: --set precompute.max_length=512"
    )
    refuses((*PRECOMPUTE, "--set", "precompute.max_length=513"), re.escape(text), "ModelError")


def test_a_model_that_is_loaded_from_python_names_what_it_should_be(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as refused:
        load_model(tmp_path / "nowhere", "float32", torch.device("cpu"))
    expected = "a folder with config.json and model.safetensors"
    assert str(refused.value) == f"{tmp_path}/nowhere: no such model folder\n  expected: {expected}"


def test_memory_that_a_single_pair_exhausts_is_answered_in_full(
    prefkit: Prefkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset_of(tmp_path, text_rows(3))
    tiny_llama(tmp_path / "model")

    def refuse(_self: CompletionLogps, _batch: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("prefkit.scoring.choose_layout", lambda *_: Layout("packed", "packed"))
    monkeypatch.setattr(CompletionLogps, "forward", refuse)
    ended = prefkit(*PRECOMPUTE)
    text = r"out of memory on a single pair\n  next: a smaller precompute\.max_length, or another dtype\n"
    assert ended.code == 3
    assert re.fullmatch(rf"error: [^\n]+: {text}", ended.err), ended.err  # which pair, or of which reference
    assert not list(tmp_path.rglob("reference.json"))


def test_a_model_that_is_short_of_memory_when_it_is_probed_is_not_said_to_refuse_the_mask(
    prefkit: Prefkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset_of(tmp_path, text_rows(3))
    tiny_llama(tmp_path / "model")
    forward, made = CompletionLogps.forward, []

    def second_fails(self: CompletionLogps, batch: Any) -> Any:
        made.append(batch)
        if len(made) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(self, batch)

    monkeypatch.setattr(CompletionLogps, "forward", second_fails)
    ended = prefkit(*PRECOMPUTE)
    assert "does not take it" not in ended.out + ended.err


# the reference


def reference_of(folder: Path) -> Path:
    (found,) = (folder / "dataset" / "reference").iterdir()
    return found


def record(folder: Path, **changes: Any) -> None:
    path = reference_of(folder) / "reference.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(folder: Path, change: Callable[[pl.DataFrame], pl.DataFrame]) -> None:
    """Other rows, with the hash that goes with them: the hash alone would be refused first."""
    part = reference_of(folder) / "part-00000.parquet"
    changed = change(pl.read_parquet(part))
    changed.write_parquet(part)
    digest = hashlib.sha256(part.read_bytes()).hexdigest()
    record(folder, parts=[{"file": part.name, "rows": changed.height, "sha256": digest}])


def first_row(**changes: Any) -> Callable[[pl.DataFrame], pl.DataFrame]:
    def change(frame: pl.DataFrame) -> pl.DataFrame:
        rows = frame.to_dicts()
        made = {name: new(rows[0]) if callable(new) else new for name, new in changes.items()}
        return pl.DataFrame([rows[0] | made, *rows[1:]], frame.schema)

    return change


def test_a_reference_whose_record_was_changed_is_answered_with_what_to_type(ready: Path, prefkit: Prefkit) -> None:
    identity = json.loads((reference_of(ready) / "reference.json").read_text())["identity"]
    record(ready, identity=identity | {"max_length": 64})
    before = snapshot(ready)
    ended = prefkit(*TRAIN)
    where = f"dataset/reference/{reference_of(ready).name}/reference.json"
    text = f"error: {where}: its identity is not the one that its key was made from: it was changed\n"
    assert (ended.code, ended.err[: len(text)]) == (1, text)
    assert "  next: " in ended.err
    assert snapshot(ready) == before


def test_a_reference_without_rows_is_answered_with_what_to_type(ready: Path, prefkit: Prefkit) -> None:
    record(ready, parts=[])
    before = snapshot(ready)
    ended = prefkit(*TRAIN)
    text = f"error: dataset/reference/{reference_of(ready).name}: the reference has no rows\n"
    assert (ended.code, ended.err[: len(text)]) == (1, text)
    assert "  next: " in ended.err
    assert snapshot(ready) == before


Frames = Callable[[pl.DataFrame], pl.DataFrame]
SPOILED: dict[str, tuple[Frames, str]] = {
    "another column": (
        lambda frame: frame.with_columns(pl.lit(1, pl.Int32).alias("extra")),
        rf"/part-00000\.parquet: columns that no reference pass writes \(found and expected\): "
        rf"extra: Int32 and None\n  next: {AGAIN}",
    ),
    "a null in a prompt": (
        first_row(prompt_ids=lambda row: [None, *row["prompt_ids"][1:]]),
        r": 1 pairs with a null in prompt_ids: [0-9a-f]{12}\n  next: " + AGAIN,
    ),
    "an empty prompt": (
        first_row(prompt_ids=[], num_prompt_tokens=0),
        r": 1 pairs with an empty prompt_ids: [0-9a-f]{12}\n  next: " + AGAIN,
    ),
    "a prompt of another length": (
        first_row(num_prompt_tokens=1000),
        r": 1 pairs with num_prompt_tokens that is not the length of prompt_ids: [0-9a-f]{12}\n"
        r"  next: delete the reference and type prefkit precompute again",
    ),
    "pairs missing": (
        lambda frame: frame.head(NUM_PAIRS - 1),
        r": 1 pairs missing: [0-9a-f]{12}\n  next: prefkit precompute TARGET scores them",
    ),
    "scores of another model": (
        first_row(
            ref_chosen_token_logps=lambda row: [
                row["ref_chosen_token_logps"][0] - 0.5,
                *row["ref_chosen_token_logps"][1:],
            ],
            ref_chosen_logps=lambda row: sum(row["ref_chosen_token_logps"]) - 0.5,
        ),
        r"reference [0-9a-f]{16}: the policy's own scores are not the table's: largest difference 0\.5 nats a token "
        r"\(pair [0-9a-f]{12}\), RMS [0-9.e-]+, mean [0-9.e-]+, over \d+ tokens\n"
        rf"  expected: at most 0\.0001\n  next: {AGAIN}",
    ),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_reference_that_is_not_what_it_was_is_answered_in_full(name: str, ready: Path, refuses: Refuses) -> None:
    change, text = SPOILED[name]
    rewrite(ready, change)
    where = "" if text.startswith("reference ") else re.escape(f"dataset/reference/{reference_of(ready).name}")
    refuses(TRAIN, where + text, "GateError", 1)


def test_a_pair_both_scored_and_dropped_is_answered_in_full(ready: Path, refuses: Refuses) -> None:
    folder = reference_of(ready)
    pair = pl.read_parquet(folder / "part-00000.parquet")["pair_id"][0]
    path = folder / "dropped.parquet"
    pl.DataFrame({"pair_id": [pair], "reason": ["prompt_too_long"]}).write_parquet(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    record(ready, dropped={"file": path.name, "rows": 1, "sha256": digest})
    text = (
        f"dataset/reference/{folder.name}: 1 pairs both scored and dropped: {pair[:12]}\n"
        "  next: delete the reference and type prefkit precompute again"
    )
    refuses(TRAIN, re.escape(text), "GateError", 1)


@pytest.mark.parametrize("spoil", ["lost", "changed", "no parquet"])
def test_a_part_of_a_reference_that_is_gone_or_changed_is_answered_in_full(
    spoil: str, ready: Path, refuses: Refuses
) -> None:
    part = reference_of(ready) / "part-00000.parquet"
    where = f"dataset/reference/{reference_of(ready).name}/part-00000.parquet"
    if spoil == "lost":
        part.unlink()
        text = re.escape(f"{where}: part is missing\n  next: delete the reference and type prefkit precompute again")
    else:
        part.write_bytes(b"PAR1")
        text = re.escape(
            f"{where}: part was changed: its sha256 is not the recorded one\n"
            "  next: delete the reference and type prefkit precompute again"
        )
    if spoil == "no parquet":
        digest = hashlib.sha256(b"PAR1").hexdigest()
        record(ready, parts=[{"file": part.name, "rows": NUM_PAIRS, "sha256": digest}])
        text = rf"{re.escape(where)}: cannot be read: [^\n]+\n  next: {AGAIN}"
    refuses(TRAIN, text, "GateError", 1)


def test_a_policy_of_other_weights_is_answered_in_full(ready: Path, refuses: Refuses) -> None:
    key = reference_of(ready).name
    tensors = load_file(ready / "model" / "model.safetensors")
    tensors["model.norm.weight"][0] += 0.5
    save_file(tensors, ready / "model" / "model.safetensors", metadata={"format": "pt"})
    text = (
        rf"dataset: no reference is this policy's:\n"
        rf"  {key} \(reference and policy\): weights_sha256: [0-9a-f]{{16}}\.\.\. and [0-9a-f]{{16}}\.\.\.\n"
        r"  next: prefkit precompute TARGET --model M; --set train\.other_reference=true, "
        r"if the reference is another model on purpose"
    )
    refuses(TRAIN, text, "GateError", 1)


def test_a_reference_that_is_not_there_is_answered_in_full(ready: Path, refuses: Refuses) -> None:
    key = reference_of(ready).name
    text = f"dataset: no reference 0123456789abcdef\n  expected: one of {key}"
    refuses((*TRAIN, "--reference", "0123456789abcdef"), re.escape(text), "DatasetError")
    shutil.rmtree(reference_of(ready))
    text = "dataset: no finished reference\n  next: prefkit precompute TARGET --model M"
    refuses(TRAIN, re.escape(text), "DatasetError")


def test_several_references_of_one_policy_are_answered_in_full(ready: Path, refuses: Refuses, prefkit: Prefkit) -> None:
    first = reference_of(ready).name
    assert prefkit(*PRECOMPUTE, "--set", "precompute.max_length=100").code == 0
    keys = sorted(path.name for path in (ready / "dataset" / "reference").iterdir())
    length = {key: 128 if key == first else 100 for key in keys}
    listed = "".join(
        rf"\n  {key}: max_length {length[key]}, dtype float32, truncation \{{[^\n]+\}}, chat_template_sha256 None, "
        rf"weights_sha256 [0-9a-f]{{16}}"
        for key in keys
    )
    text = rf"dataset: several references are this policy's:{listed}\n  next: --reference KEY"
    refuses(TRAIN, text, "GateError", 1)


# training


def test_a_dataset_without_a_train_split_is_answered_in_full(
    tmp_path: Path, refuses: Refuses, prefkit: Prefkit
) -> None:
    dataset_of(tmp_path, text_rows(4), split={"test_share": 1.0})
    tiny_llama(tmp_path / "model")
    assert prefkit(*PRECOMPUTE).code == 0
    text = "dataset: no pair to train on\n  next: prefkit query DATASET 'from dropped'"
    refuses(TRAIN, re.escape(text), "DatasetError")


def test_a_loss_that_is_not_finite_is_answered_with_its_run(ready: Path, prefkit: Prefkit) -> None:
    ended = prefkit(*TRAIN, "--set", "train.learning_rate=1e30", "--set", "train.max_grad_norm=null")
    text = (
        "error: dataset/runs/1: the loss is not finite at step 1\n  expected: a number\n"
        "  next: a smaller train.learning_rate\n"
    )
    assert (ended.code, ended.err) == (1, text)
    assert not (ready / "dataset" / "runs" / "1" / "model").exists()


def train_other(folder: Path, prefkit: Prefkit, config: Any) -> Ended:
    """Precompute and train a model of another architecture with gradient checkpointing."""
    dataset_of(folder, text_rows(4))
    save_model(folder / "model", random_model(config), tiny_tokenizer())
    done = prefkit(*PRECOMPUTE)
    assert done.code == 0, done.err
    return prefkit(*TRAIN, "--set", "train.gradient_checkpointing=true")


def test_a_model_without_gradient_checkpointing_is_answered_with_its_folder(tmp_path: Path, prefkit: Prefkit) -> None:
    config = GPTNeoXJapaneseConfig(
        vocab_size=380, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=256
    )
    ended = train_other(tmp_path, prefkit, config)
    text = (
        "error: model: GPTNeoXJapaneseForCausalLM has no gradient checkpointing\n"
        "  next: --set train.gradient_checkpointing=false\n"
    )
    assert (ended.code, ended.err) == (2, text)


def test_a_model_that_takes_its_dropout_from_its_config_is_answered_with_its_folder(
    tmp_path: Path, prefkit: Prefkit
) -> None:
    config = FalconConfig(
        vocab_size=380, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, hidden_dropout=0.5, alibi=False
    )
    ended = train_other(tmp_path, prefkit, config)
    text = (
        "error: model: FalconForCausalLM takes its dropout from its config in train mode\n"
        "  expected: one that is a function of its weights\n"
        "  next: --set train.gradient_checkpointing=false, or dropout 0 in config.json\n"
    )
    assert (ended.code, ended.err) == (2, text)


def test_a_tokenizer_that_cannot_be_made_says_why_in_one_line(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ModelError) as refused:
        load_tokenizer(tmp_path / "model")
    assert refused.value.message.startswith("its tokenizer does not load: ")
    assert "\n" not in refused.value.message
