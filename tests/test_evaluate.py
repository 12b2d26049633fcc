"""prefkit evaluate on a tiny run: what its figures are, beside what can be computed by hand from the samples."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pytest
import tiny
import torch
from command import Prefkit
from rich.console import Console

import prefkit
from prefkit.documents import Run
from prefkit.errors import ConfigError, DatasetError, InputError, Interrupted, SourceError
from prefkit.evaluate import Evaluated, evaluate_model
from prefkit.evaluation_plan import pipeline_wants, prompts_identity
from prefkit.evaluation_tables import evaluation_lines, kept, list_evaluations, read_evaluation
from prefkit.evaluation_view import print_evaluated
from prefkit.locks import locked
from prefkit.measures import Summary
from prefkit.models import load_model
from prefkit.reference import precompute_reference
from prefkit.sample import draw_samples
from prefkit.sample_settings import PromptsConfig, SampleConfig
from prefkit.settings import Pipeline
from prefkit.store import read_document
from prefkit.train import train_dpo

NUM_PROMPTS, N = 6, 3
SCORER = "def score(prompts, completions, **columns):\n    return [float(len(c[-1]['content'])) for c in completions]\n"


class World(NamedTuple):
    folder: Path
    pipeline: Pipeline
    run: str


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A chat dataset with a reference and a short run that has moved a little."""
    folder = tmp_path_factory.mktemp("world")
    model = tiny.tiny_llama(folder / "model")
    train = {"max_steps": 4, "learning_rate": 1e-3, "batch_size": 4}
    pipeline = tiny.built(folder, tiny.chat_rows(24), model, "chat", split={"test_share": 0.3}, train=train)
    precompute_reference(pipeline)
    run = train_dpo(pipeline).run
    asked = [{"prompt": f"What is copper {n}?", "reference": f"silver thread {n}"} for n in range(NUM_PROMPTS)]
    tiny.write_rows(folder / "prompts.jsonl", asked)
    (folder / "lengths.py").write_text(SCORER)
    return World(folder, pipeline, run)


@pytest.fixture
def world(made: World, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.chdir(made.folder)
    monkeypatch.syspath_prepend(str(made.folder))
    return made


def settings(**changes: Any) -> dict[str, Any]:
    usual: dict[str, Any] = {"prompts": "prompts.jsonl", "n": N, "max_new_tokens": 8, "texts": "prompts.jsonl"}
    return usual | {"scorers": [{"function": "lengths:score"}], "temperatures": [1.0, 0.0]} | changes


@pytest.fixture
def evaluated(world: World) -> Evaluated:
    return evaluate_model(world.run, settings())


def samples_of(done: Evaluated, role: str, temperature: float = 1.0) -> pl.DataFrame:
    one = next(s for s in done.document["samples"] if (s["role"], s["temperature"]) == (role, temperature))
    return pl.concat(
        [pl.read_parquet(file) for file in sorted((Path(done.folder) / one["folder"]).glob("samples/*.parquet"))]
    )


def by_prompt(rows: pl.DataFrame, value: pl.Expr) -> dict[str, float]:
    means = rows.group_by("prompt_id").agg(value.cast(pl.Float64).mean().alias("mean"))
    return dict(means.sort("prompt_id").iter_rows())


def test_the_headline_is_the_paired_gain_in_mean_reward(evaluated: Evaluated) -> None:
    lengths = pl.col("response").str.len_chars()
    mine, theirs = (by_prompt(samples_of(evaluated, role), lengths) for role in ("policy", "reference"))
    assert len(mine) == NUM_PROMPTS
    gains = np.array([mine[prompt] - theirs[prompt] for prompt in mine])
    told = evaluated.document["headline"]
    assert told["value"] == pytest.approx(gains.mean())
    half = 2.570581835636314 * gains.std(ddof=1) / np.sqrt(NUM_PROMPTS)  # t(.975, 5)
    assert (told["low"], told["high"]) == pytest.approx((gains.mean() - half, gains.mean() + half))
    assert (told["scorer"], told["temperature"], told["num_prompts"]) == ("score", 1.0, NUM_PROMPTS)
    summary = Summary(evaluated.summary)
    for role, means in (("policy", mine), ("reference", theirs)):
        reward = summary.get(role, "reward", 1.0, "score")
        assert reward is not None
        assert reward.value == pytest.approx(np.mean(list(means.values())))


def test_wins_and_lengths_are_those_of_the_samples(evaluated: Evaluated) -> None:
    mine, theirs = (samples_of(evaluated, role) for role in ("policy", "reference"))
    shares = []
    for prompt in mine["prompt_id"].unique():
        one, other = ([len(text) for text in rows.filter(prompt_id=prompt)["response"]] for rows in (mine, theirs))
        shares.append(np.mean([(a > b) + (a == b) / 2 for a in one for b in other]))
    summary = Summary(evaluated.summary)
    rate, tokens, cut = (
        summary.get("policy", metric, 1.0, scorer)
        for metric, scorer in (("win_rate", "score"), ("tokens", None), ("cut_off", None))
    )
    assert rate is not None
    assert rate.value == pytest.approx(np.mean(shares))
    assert rate.num_responses == NUM_PROMPTS * N * N
    assert tokens is not None
    assert tokens.value == pytest.approx(mine["num_tokens"].mean())
    assert cut is not None
    assert cut.value == pytest.approx((mine["finish_reason"] == "length").mean())


def test_the_kl_is_that_of_plain_transformers_along_the_responses(evaluated: Evaluated, world: World) -> None:
    models = [load_model(folder, "float32", torch.device("cpu")) for folder in (f"{world.run}/model", "model")]
    sampled, exact, tokens = [], [], 0
    for row in samples_of(evaluated, "policy").iter_rows(named=True):
        ids, start = torch.tensor([row["prompt_ids"] + row["response_ids"]]), len(row["prompt_ids"])
        with torch.no_grad():
            p, q = (model(ids).logits[0, start - 1 : -1].double().log_softmax(-1) for model in models)
        taken = range(len(row["response_ids"])), row["response_ids"]
        sampled.append(float((p - q)[taken].sum()))
        exact.append(float((p.exp() * (p - q)).sum()))
        tokens += len(row["response_ids"])
    summary = Summary(evaluated.summary)
    expected = {"kl": float(np.mean(sampled)), "kl_exact": float(np.mean(exact))}
    expected |= {"kl_token": sum(sampled) / tokens, "kl_exact_token": sum(exact) / tokens}
    for metric, value in expected.items():
        found = summary.get("policy", metric, 1.0)
        assert found is not None
        assert found.value == pytest.approx(value, abs=2e-4), metric
    assert summary.get("policy", "kl", 0.0) is None


def test_held_out_figures_are_those_of_the_runs_own_evaluation(evaluated: Evaluated, world: World) -> None:
    own = read_document(Path(world.run) / "run.json", Run)["eval"]
    summary = Summary(evaluated.summary)
    for metric in ("rewards/accuracies", "rewards/margins"):
        found = summary.get("policy", metric)
        assert found is not None
        assert found.value == pytest.approx(own[metric], abs=1e-6)
        assert found.num_responses == 24 - world_train_pairs(world)


@pytest.mark.slow
def test_ten_kills_and_the_same_command_leave_the_bytes_of_an_unbroken_evaluation(tmp_path: Path) -> None:
    start = tmp_path / "start"
    start.mkdir()
    here = Path.cwd()
    os.chdir(start)
    try:
        tiny.tiny_llama(Path("model"))
        train = {"max_steps": 2, "learning_rate": 1e-3, "batch_size": 4}
        evaluate = {"prompts": "prompts.jsonl", "n": 4, "max_new_tokens": 24, "texts": "prompts.jsonl"}
        evaluate |= {"scorers": [{"verifier": "exact"}], "temperatures": [1.0, 0.5]}
        rows = tiny.chat_rows(24)
        asked = [{"prompt": f"What is copper {n}?", "reference": f"silver thread {n}"} for n in range(24)]
        tiny.write_rows(Path("prompts.jsonl"), asked)
        pipeline = tiny.built(
            Path(), rows, Path("model"), "chat", split={"test_share": 0.3}, train=train, evaluate=evaluate
        )
        precompute_reference(pipeline)
        train_dpo(pipeline)
    finally:
        os.chdir(here)
    killer = [sys.executable, str(Path(__file__).parent / "evaluation_killer.py"), "7", "10", str(tmp_path)]
    done = subprocess.run(killer, capture_output=True, text=True, check=False)
    output = tmp_path / "output.txt"
    assert done.returncode == 0, done.stderr[-2000:] + (output.read_text()[-2000:] if output.exists() else "")
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["different"] == []
    assert found["kills"] >= 5, found
    assert found["unfinished"] >= 3, found


def world_train_pairs(world: World) -> int:
    manifest = json.loads((Path(world.pipeline.dataset) / "manifest.json").read_text())
    return int(manifest["counts"]["train"])


def test_perplexity_is_that_of_plain_transformers(evaluated: Evaluated, world: World) -> None:
    tokenizer = tiny.tiny_tokenizer()
    nats, tokens = [0.0, 0.0], 0
    models = [load_model(folder, "float32", torch.device("cpu")) for folder in (f"{world.run}/model", "model")]
    for number in range(NUM_PROMPTS):
        messages = [tiny.turn("user", f"What is copper {number}?")]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        said = [*messages, tiny.turn("assistant", f"silver thread {number}")]
        whole = tokenizer.apply_chat_template(said, return_dict=False)
        tokens += len(whole) - len(prompt)
        for place, model in enumerate(models):
            with torch.no_grad():
                nats[place] -= float(tiny.plain_logps(model, prompt, whole[len(prompt) :]).double().sum())
    summary = Summary(evaluated.summary)
    mine, theirs, ratio = (summary.get(role, "perplexity") for role in ("policy", "reference", "ratio"))
    assert mine is not None
    assert theirs is not None
    assert ratio is not None
    assert mine.value == pytest.approx(np.exp(nats[0] / tokens), rel=1e-4)
    assert theirs.value == pytest.approx(np.exp(nats[1] / tokens), rel=1e-4)
    assert ratio.value == pytest.approx(np.exp((nats[0] - nats[1]) / tokens), rel=1e-4)


def test_every_text_counts_whatever_its_prompt(world: World) -> None:
    tokenizer, model = tiny.tiny_tokenizer(), load_model("model", "float32", torch.device("cpu"))
    said = [" ".join(tiny.WORDS[start : start + 4]) for start in range(8)]
    rows: list[dict[str, Any]] = [{"prompt": "Continue:", "reference": text} for text in said]
    rows += [{"prompt": "", "reference": "a text without a prompt"}, {"prompt": "Say nothing."}]
    rows += [{"prompt": "Continue:", "reference": "river " * 600}, {"reference": "no prompt at all"}]
    tiny.write_rows(Path("continued.jsonl"), rows)
    told: list[str] = []
    some = settings(texts="continued.jsonl", temperatures=[1.0], n=1, scorers=[])
    done = evaluate_model("model", some, out="continued", tell=told.append)
    nats, tokens = 0.0, 0
    for row in rows[:9]:
        messages = [tiny.turn("user", row["prompt"])]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        whole = tokenizer.apply_chat_template([*messages, tiny.turn("assistant", row["reference"])], return_dict=False)
        tokens += len(whole) - len(prompt)
        with torch.no_grad():
            nats -= float(tiny.plain_logps(model, prompt, whole[len(prompt) :]).double().sum())
    found = Summary(done.summary).get("policy", "perplexity")
    assert found is not None
    assert found.value == pytest.approx(np.exp(nats / tokens), rel=1e-4)
    assert (found.num_prompts, found.num_responses) == (9, 9)
    assert found.low is not None
    text = "3 of 12 texts are left out of the perplexity: 1 missing_field, 1 no_reference, 1 too_long"
    assert {"name": "texts_dropped", "text": text} in done.document["warnings"]
    assert text in told


def test_of_a_dataset_the_test_prompts_are_asked_and_of_training_prompts_it_warns(world: World) -> None:
    some = settings(prompts="dataset", temperatures=[0.0], n=1, texts=None, scorers=[])
    pairs = pl.read_parquet("dataset/pairs/*.parquet").select("prompt_id", "split").unique()
    splits = {split: set(pairs.filter(split=split)["prompt_id"]) for split in ("train", "test")}
    assert all(splits.values())
    done = evaluate_model(world.run, some, out="asked")
    assert set(samples_of(done, "policy", 0.0)["prompt_id"]) == splits["test"]
    assert "trained_prompts" not in {one["name"] for one in done.document["warnings"]}
    seen = evaluate_model(world.run, some | {"prompts": {"path": "dataset", "split": "train"}}, out="asked")
    assert seen.document["key"] != done.document["key"]
    assert set(samples_of(seen, "policy", 0.0)["prompt_id"]) == splits["train"]
    count = len(splits["train"])
    text = f"{count} of {count} prompts are ones that the run was trained on: figures on others may be lower"
    assert {"name": "trained_prompts", "text": text} in seen.document["warnings"]


def test_what_the_run_was_trained_on_is_known_beside_another_dataset_too(world: World, tmp_path: Path) -> None:
    """Of the same pairs in another split most test prompts are training prompts of the run."""
    again = tiny.built(
        tmp_path, tiny.chat_rows(24), world.folder / "model", "chat", split={"test_share": 0.3, "seed": 5}
    )
    precompute_reference(again)
    splits = {}
    for name, folder in (("own", Path("dataset")), ("other", Path(again.dataset))):
        pairs = pl.read_parquet(folder / "pairs" / "*.parquet")
        splits[name] = {split: set(pairs.filter(split=split)["prompt_id"]) for split in ("train", "test")}
    both, other = splits["other"]["test"] & splits["own"]["train"], splits["other"]["test"]
    assert both
    some = settings(temperatures=[0.0], n=1, texts=None, scorers=[])
    done = evaluate_model(world.run, some | {"prompts": again.dataset}, dataset=again.dataset, out=tmp_path / "e")
    told = {one["name"]: one["text"] for one in done.document["warnings"]}
    rest = "are ones that the run was trained on: figures on others may be lower"
    assert told["trained_prompts"] == f"{len(both)} of {len(other)} prompts {rest}"
    assert told["trained_held_out"] == f"{len(both)} of {len(other)} held-out prompts {rest}"
    own = evaluate_model(world.run, some | {"prompts": "dataset"}, dataset=again.dataset, out=tmp_path / "e")
    assert "trained_prompts" not in {one["name"] for one in own.document["warnings"]}


def test_a_rebuild_that_changes_no_pair_is_no_new_question(world: World, tmp_path: Path) -> None:
    shutil.copytree("dataset", tmp_path / "dataset")
    asked = PromptsConfig(path=str(tmp_path / "dataset"))
    before = prompts_identity(asked)
    manifest = tmp_path / "dataset" / "manifest.json"
    document = json.loads(manifest.read_text())
    document["pipeline"]["train"]["beta"] = 0.7
    manifest.write_text(json.dumps(document))
    assert prompts_identity(asked) == before
    document["parts"]["pairs"][0]["sha256"] = "0" * 64
    manifest.write_text(json.dumps(document))
    assert prompts_identity(asked) != before


def test_a_dataset_as_texts_is_refused_at_once(world: World) -> None:
    with pytest.raises(SourceError, match=r"evaluate\.texts: a dataset has no references") as refused:
        evaluate_model("model", settings(texts="dataset"), out="refused")
    assert refused.value.expected == "a file of prompt, reference"
    with pytest.raises(SourceError, match="split is of a dataset"):
        evaluate_model("model", settings(prompts={"path": "prompts.jsonl", "split": "test"}), out="refused")
    assert not Path("refused").exists()


def test_texts_that_are_all_left_out_are_counted(world: World) -> None:
    tiny.write_rows(Path("long.jsonl"), [{"prompt": "Continue:", "reference": "river " * 600}])
    some = settings(texts="long.jsonl", temperatures=[1.0], n=1, scorers=[])
    done = evaluate_model("model", some, out="long")
    assert done.document["left_out"]["perplexity"] == "none of evaluate.texts has a reference that can be encoded"
    assert [one["text"] for one in done.document["warnings"] if one["name"] == "texts_dropped"] == [
        "1 of 1 texts are left out of the perplexity: 1 too_long"
    ]


def test_responses_longer_than_the_reference_are_no_error(world: World) -> None:
    tiny.tiny_llama(Path("short"), max_position_embeddings=40)
    rows = [{"prompt": "What is copper?"}, {"prompt": " ".join(tiny.WORDS)}]
    tiny.write_rows(Path("mixed.jsonl"), rows)
    some = settings(prompts="mixed.jsonl", temperatures=[1.0], n=1, texts=None)
    done = evaluate_model("model", some, reference="short", out="short-out")
    longest = max(len(row["prompt_ids"]) + len(row["response_ids"]) for row in samples_of(done, "policy").to_dicts())
    why = f"prompt and response have up to {longest} tokens, the reference has 40 positions"
    assert longest > 40
    assert done.document["left_out"]["kl"] == why


def test_the_same_again_is_nothing_to_do_and_all_of_it_is_the_same_bytes(evaluated: Evaluated, world: World) -> None:
    again = evaluate_model(world.run, settings())
    assert again.unchanged
    assert again.document == evaluated.document
    assert again.summary.equals(evaluated.summary)
    before = tiny.snapshot(Path(evaluated.folder))
    shutil.rmtree(evaluated.folder)
    shutil.rmtree(Path(world.pipeline.dataset) / "samples")
    anew = evaluate_model(world.run, settings())
    assert not anew.unchanged
    assert tiny.snapshot(Path(anew.folder)) == before
    assert list_evaluations(world.run) == [Path(anew.folder)]
    assert read_evaluation(anew.folder).document == anew.document


def test_an_evaluation_that_was_stopped_goes_on_and_leaves_the_same_bytes(evaluated: Evaluated, world: World) -> None:
    before, told = tiny.snapshot(Path(evaluated.folder)), set()
    for asked in (1, 5, 8):
        shutil.rmtree(evaluated.folder)
        shutil.rmtree(Path(world.pipeline.dataset) / "samples", ignore_errors=True)
        calls = iter(range(asked))
        with pytest.raises(Interrupted) as stopped:
            evaluate_model(world.run, settings(), stop=lambda calls=calls: next(calls, None) is None)  # type: ignore[misc]
        told.add(stopped.value.message)
        assert not (Path(evaluated.folder) / "evaluation.json").exists()
        assert tiny.snapshot(Path(evaluate_model(world.run, settings()).folder)) == before
    assert "stopped; what is sampled and scored is on disk" in told


def test_another_run_finds_the_references_responses(evaluated: Evaluated, world: World) -> None:
    base = evaluate_model("model", settings(), reference="model", dataset=world.pipeline.dataset, out="base")
    assert base.folder.startswith("base/evaluations/")
    found = Summary(base.summary)
    for metric in ("kl", "kl_exact"):
        kl = found.get("policy", metric, 1.0)
        assert kl is not None
        assert (kl.value, kl.low, kl.high) == (0, 0, 0)
    rate = found.get("policy", "win_rate", 1.0, "score")
    assert rate is not None
    assert rate.value == 0.5
    mine, theirs = (samples_of(base, role) for role in ("policy", "reference"))
    assert mine.equals(theirs)
    assert theirs.drop("model").equals(samples_of(evaluated, "reference").drop("model"))


def test_scores_are_of_the_prompts_that_were_asked(world: World) -> None:
    asked = [{"prompt": f"Which {word} is narrow?", "reference": word} for word in ("river", "stone", "cloud", "paper")]
    tiny.write_rows(Path("first.jsonl"), asked[:2])
    tiny.write_rows(Path("others.jsonl"), asked[2:])
    tiny.write_rows(Path("grown.jsonl"), asked)
    rewards = []
    for name, count in (("first", 2), ("others", 2), ("grown", 4)):
        some = settings(prompts=f"{name}.jsonl", temperatures=[1.0], texts=None)
        done = evaluate_model("model", some, reference="model", out="asked")
        means = by_prompt(samples_of(done, "policy"), pl.col("response").str.len_chars())
        assert len(means) == count
        reward = Summary(done.summary).get("policy", "reward", 1.0, "score")
        assert reward is not None
        assert reward.value == pytest.approx(np.mean(list(means.values())))
        assert reward.num_prompts == count
        rewards.append(reward.value)
    assert rewards[0] != rewards[1]
    Path("wanted.py").write_text("def score(reference, **_):\n    return [float(len(r)) for r in reference]\n")
    wanted = settings(prompts="edited.jsonl", temperatures=[1.0], texts=None, scorers=[{"function": "wanted:score"}])
    for word in ("two", "another"):
        tiny.write_rows(Path("edited.jsonl"), [row | {"reference": word} for row in asked])
        reward = Summary(evaluate_model("model", wanted, out="asked").summary).get("policy", "reward", 1.0, "score")
        assert reward is not None
        assert reward.value == len(word)


def test_what_was_kept_of_other_rows_is_made_again(tmp_path: Path) -> None:
    path, made = tmp_path / "kept.parquet", list[int]()
    rows = pl.DataFrame({"prompt_id": ["a", "b"], "number": [0, 0]})

    def make(of: pl.DataFrame, value: int) -> pl.DataFrame:
        made.append(value)
        return of.with_columns(score=pl.lit(value))

    assert kept(path, rows, lambda: make(rows, 1))["score"].to_list() == [1, 1]
    assert kept(path, rows, lambda: make(rows, 2))["score"].to_list() == [1, 1]
    other = pl.DataFrame({"prompt_id": ["a", "c"], "number": [0, 0]})
    assert kept(path, other, lambda: make(other, 3))["score"].to_list() == [3, 3]
    assert kept(path, other[:1], lambda: make(other[:1], 4))["score"].to_list() == [4]
    path.write_bytes(b"no parquet")
    assert kept(path, other, lambda: make(other, 5))["score"].to_list() == [5, 5]
    assert made == [1, 3, 4, 5]


def test_views_show_evaluations_of_runs_in_any_client(
    evaluated: Evaluated, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    import duckdb

    asked = prefkit.query_dataset(world.pipeline.dataset, "select * from evaluations order by all").pl()
    assert asked["run"].unique().to_list() == ["1"]
    assert asked["evaluation"].unique().to_list() == [Path(evaluated.folder).name]
    assert asked.drop("run", "evaluation").height == evaluated.summary.height
    monkeypatch.chdir(world.pipeline.dataset)
    connection = duckdb.connect()
    connection.execute(Path("views.sql").read_text())
    assert connection.sql("select * from evaluations order by all").pl().equals(asked)
    prompts = connection.sql("from evaluation_prompts").pl()
    assert prompts.height == 2 * NUM_PROMPTS
    assert prompts.filter(temperature=1.0)["gain"].mean() == pytest.approx(evaluated.document["headline"]["value"])


def test_info_of_a_run_mentions_its_evaluations(
    evaluated: Evaluated, world: World, prefkit: Prefkit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world.folder)
    (line,) = evaluation_lines(world.run)
    assert line["evaluation"] == Path(evaluated.folder).name
    assert line["gain"] == evaluated.document["headline"]["value"]
    shown = prefkit("info", world.run)
    assert f"evaluation    {line['evaluation']}: reward by score " in shown.out


def test_what_cannot_be_measured_is_left_out_with_the_reason(world: World) -> None:
    plain = evaluate_model("model", {"prompts": "prompts.jsonl", "n": 1, "max_new_tokens": 3}, out="plain")
    assert plain.document["left_out"] == {
        "reward": "no scorer: evaluate.scorers, or --scorer",
        "kl": "no reference model",
        "held_out": "no dataset: --dataset",
        "perplexity": "no texts: evaluate.texts",
    }
    warm = settings(temperatures=[0.5], n=1, texts=None)
    assert (
        "the responses of temperature 1 alone are the model's own"
        in evaluate_model(world.run, warm, out="warm").document["left_out"]["kl"]
    )
    cut = settings(temperatures=[1.0], top_p=0.5, n=1, texts=None)
    assert "evaluate.top_p leaves out tokens" in evaluate_model(world.run, cut, out="cut").document["left_out"]["kl"]


def test_chosen_sides_of_the_dataset_are_scored_as_the_other_side(world: World) -> None:
    pairs = prefkit.query_dataset(world.pipeline.dataset, "select prompt, chosen from pairs order by pair_id").pl()
    rows = [{"prompt": [{"role": m["role"], "content": m["content"]} for m in prompt]} for prompt in pairs["prompt"]]
    tiny.write_rows(Path("asked.jsonl"), rows[:5])
    some = settings(prompts="asked.jsonl", temperatures=[1.0], n=1, texts=None)
    done = evaluate_model(world.run, some, against="chosen", out="chosen")
    reward = Summary(done.summary).get("chosen", "reward", 1.0, "score")
    assert reward is not None
    assert reward.value == pytest.approx(np.mean([len(said[-1]["content"]) for said in pairs["chosen"][:5]]))
    wins = Summary(done.summary).get("policy", "win_rate", 1.0, "score")
    assert wins is not None
    assert wins.num_responses == 5


def test_another_model_can_be_the_other_side(world: World) -> None:
    other = tiny.tiny_llama(world.folder / "other", seed=7)
    done = evaluate_model(world.run, settings(temperatures=[1.0], n=1, texts=None), against=str(other), out="against")
    assert Summary(done.summary).get("other", "reward", 1.0, "score") is not None
    assert {one["role"] for one in done.document["samples"]} == {"policy", "reference", "other"}


def test_a_judge_gives_a_win_rate_and_what_it_is_of_two_minds_about_is_counted_apart(world: World) -> None:
    some = settings(scorers=[{"judge": "model"}], temperatures=[1.0], n=2, texts=None)
    done = evaluate_model(world.run, some, out="judged")
    verdicts = pl.read_parquet(Path(done.folder) / "verdicts-model-1.parquet")
    assert verdicts.height == 2 * NUM_PROMPTS
    summary = Summary(done.summary)
    rate, changed = (summary.get("policy", metric, 1.0, "model") for metric in ("win_rate", "inconsistent"))
    won = (
        verdicts.drop_nulls("winner")
        .group_by("prompt_id")
        .agg(share=(pl.col("winner") == "a").mean() + (pl.col("winner") == "tie").mean() / 2)
    )
    assert (rate.value if rate is not None else None) == (pytest.approx(won["share"].mean()) if won.height else None)
    assert changed is not None
    assert changed.value == pytest.approx(verdicts["winner"].null_count() / verdicts.height)
    assert changed.num_responses == verdicts.height
    assert done.document["headline"] is None


def test_a_folder_that_is_being_sampled_is_waited_for(world: World) -> None:
    once = settings(temperatures=[1.0], n=1, texts=None, seed=5)
    done = evaluate_model(world.run, once)
    shutil.rmtree(done.folder)
    told: list[str] = []

    def tell(text: str) -> None:
        told.append(text)

    with locked(Path(done.folder) / done.document["samples"][0]["folder"]), pytest.raises(Interrupted):
        evaluate_model(world.run, once, tell=tell, stop=lambda: any("waiting for" in text for text in told))
    assert any("waiting for another prefkit that samples into" in text for text in told)


def test_a_lock_that_is_taken_just_before_the_sampling_is_waited_for_too(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = settings(temperatures=[1.0], n=1, texts=None, seed=6)
    told: list[str] = []
    calls: list[Path] = []

    def late(settings: SampleConfig, **more: Any) -> Any:
        calls.append(Path(settings.out))
        if len(calls) > 1:
            return draw_samples(settings, **more)
        with locked(Path(settings.out)):  # another process, between any look and the work
            return draw_samples(settings, **more)

    monkeypatch.setattr("prefkit.evaluation_work.draw_samples", late)
    monkeypatch.setattr("prefkit.evaluation_work.WAIT", 0.0)
    done = evaluate_model(world.run, once, tell=told.append)
    assert f"waiting for another prefkit that samples into {calls[0]}" in told
    assert calls[1] == calls[0]
    assert Summary(done.summary).get("policy", "reward", 1.0, "score") is not None


def test_a_dataset_that_is_moved_keeps_its_evaluations_samples(
    evaluated: Evaluated, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(world.pipeline.dataset, moved)
    (key,) = {Path(evaluated.folder).name}
    folder = moved / "runs" / Path(world.run).name / "evaluations" / key
    monkeypatch.chdir(tmp_path)
    places = [one["folder"] for one in read_evaluation(folder).document["samples"]]
    assert len(places) == 4  # two models at two temperatures
    for place in places:
        assert place.startswith("../../../../samples/")
        assert (folder / place / "sample.json").exists()


def test_a_model_that_took_the_references_place_is_not_taken_for_it(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(world.folder, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    some = settings(temperatures=[1.0], n=1, texts=None)
    run = str(Path(world.run).resolve().relative_to(world.folder.resolve()))
    pipeline = Pipeline.model_validate(
        world.pipeline.model_dump(mode="json", by_alias=True, exclude_unset=True)
        | {"dataset": "dataset", "precompute": {"model": "model"}, "evaluate": some}
    )
    for path, keys in ((Path("dataset/manifest.json"), ("pipeline", "precompute")), (Path(run) / "run.json", ())):
        document = json.loads(path.read_text())
        inner = document
        for name in keys:
            inner = inner[name]
        inner["model"] = "model"  # not that of the world, which stays what it was
        path.write_text(json.dumps(document))
    there = evaluate_model(pipeline)
    assert there.document["reference"] == "model"
    shutil.rmtree("model")
    away = evaluate_model(run, some, out="away").document
    assert away["left_out"]["gain"] == "the reference model is not there from this directory: --reference says where"
    tiny.tiny_llama(Path("model"), seed=11)
    why = "model is another model than the one that the reference was scored with: --reference says which"
    for replaced in (evaluate_model(run, some), evaluate_model(pipeline)):
        assert replaced.document["reference"] is None
        assert replaced.document["left_out"] == {
            "gain": why,
            "win_rate": f"{why} to compare with (evaluate.against: reference)",
            "kl": why,
            "perplexity": "no texts: evaluate.texts",
        }
    named = evaluate_model(run, some, reference="model")
    assert named.document["reference"] == "model"
    assert "kl" not in named.document["left_out"]


def test_a_replaced_model_of_a_run_whose_dataset_is_gone_is_not_its_reference(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(world.folder, tmp_path / "copy")
    shutil.copytree(world.run, tmp_path / "copy" / "run")
    shutil.rmtree(tmp_path / "copy" / "dataset")
    monkeypatch.chdir(tmp_path / "copy")
    document = json.loads(Path("run/run.json").read_text()) | {"dataset": "dataset", "model": "model"}
    Path("run/run.json").write_text(json.dumps(document))
    some = settings(temperatures=[1.0], n=1, texts=None)
    assert evaluate_model("run", some).document["reference"] == "model"
    shutil.rmtree("model")
    tiny.tiny_llama(Path("model"), seed=11)
    assert evaluate_model("run", some).document["reference"] is None


def test_beta_is_part_of_what_an_evaluation_is_of(world: World, tmp_path: Path) -> None:
    some = settings(temperatures=[1.0], n=1, texts=None, scorers=[])
    tiny.tiny_llama(tmp_path / "other", seed=9)
    found = []
    for beta in (0.1, 0.3):
        dataset = tmp_path / f"beta-{beta}"
        shutil.copytree(world.pipeline.dataset, dataset)
        shutil.rmtree(dataset / "runs")
        manifest = json.loads((dataset / "manifest.json").read_text())
        manifest["pipeline"].setdefault("train", {})["beta"] = beta
        (dataset / "manifest.json").write_text(json.dumps(manifest))
        done = evaluate_model(f"{tmp_path}/other", some, reference="model", dataset=dataset, out=tmp_path / "out")
        margin = Summary(done.summary).get("policy", "rewards/margins")
        assert margin is not None
        assert margin.value is not None
        found.append((done.document["key"], margin.value))
    (first, small), (second, large) = found
    assert first != second
    assert large == pytest.approx(3 * small, rel=1e-5)


def test_the_model_of_a_run_has_the_margins_of_the_run(evaluated: Evaluated, world: World, tmp_path: Path) -> None:
    dataset = tmp_path / "dataset"
    shutil.copytree(world.pipeline.dataset, dataset)
    manifest = json.loads((dataset / "manifest.json").read_text())
    manifest["pipeline"].setdefault("train", {})["beta"] = 7.0
    (dataset / "manifest.json").write_text(json.dumps(manifest))
    some = settings(temperatures=[1.0], n=1, texts=None, scorers=[])
    done = evaluate_model(f"{world.run}/model", some, dataset=dataset, out=tmp_path / "out")
    mine, runs = (Summary(of.summary).get("policy", "rewards/margins") for of in (done, evaluated))
    assert mine is not None
    assert mine == runs


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (
            lambda: evaluate_model("model", settings()),
            InputError,
            "a model that is no run has no place for its evaluation",
        ),
        (lambda: evaluate_model("model"), ConfigError, "nothing says how to evaluate"),
        (lambda: evaluate_model("model", {"n": 2}), ConfigError, "evaluate.prompts does not fit: Field required"),
        (lambda: evaluate_model("pipeline.yaml"), ConfigError, "the pipeline has no evaluate section"),
    ],
)
def test_what_does_not_fit_is_refused(
    world: World, call: Callable[[], Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        call()


def test_what_is_no_model_is_told_before_the_place_of_its_evaluation(world: World) -> None:
    with pytest.raises(InputError) as refused:
        evaluate_model("dataset/runs/9", settings())
    assert str(refused.value) == (
        "dataset/runs/9: no such model and no such run\n  expected: the folder of a model or of a run"
    )
    with pytest.raises(InputError) as refused:
        evaluate_model("dataset", settings())
    assert str(refused.value) == (
        "dataset: is a dataset, no model\n  expected: the folder of a model or of a run, such as dataset/runs/1"
    )


def test_changes_of_the_prompts_hold_for_those_of_the_command(
    world: World, prefkit: Prefkit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world.folder)
    rows = [{"question": f"What is tin {n}?", "answer": str(n)} for n in range(5)]
    tiny.write_rows(world.folder / "asked.jsonl", rows)
    words = ["evaluate", "model", "--prompts", "asked.jsonl", "--scorer", "verifier:exact", "-n", "1", "--json"]
    words += ["--out", "elsewhere", "--set", "evaluate.prompts.limit=2"]
    ended = prefkit(*words, "--max-new-tokens", "4")
    assert "no prompt: a row has the keys question, answer" in ended.err
    assert "--set evaluate.prompts.columns.prompt=NAME" in ended.err
    words += ["--set", "evaluate.prompts.columns={prompt: question, reference: answer}"]
    ended = prefkit(*words, "--max-new-tokens", "4")
    assert ended.code == 0, ended.err
    assert {row["num_prompts"] for row in ended.last_json()["summary"] if row["metric"] == "reward"} == {2}
    ended = prefkit(*words, "--max-new-tokens", "100000")
    assert "evaluate.max_new_tokens is 100000, the model has " in ended.err
    (world.folder / "whole.yaml").write_text(
        "dataset: dataset\nsources: [{path: x, format: pairs}]\n"
        "evaluate: {prompts: {path: old.jsonl, columns: {prompt: old}}}\n"
    )
    ended = prefkit("evaluate", "whole.yaml", *words[2:], "--max-new-tokens", "4")
    assert ended.code == 0, ended.err
    assert {row["num_prompts"] for row in ended.last_json()["summary"] if row["metric"] == "reward"} == {2}


def test_messages_say_what_to_do_next(world: World) -> None:
    with pytest.raises(InputError) as refused:
        evaluate_model("model", settings())
    assert refused.value.expected == "--out DIR"
    with pytest.raises(ConfigError) as unsaid:
        evaluate_model("model")
    assert unsaid.value.expected == "prompts, and scorers"
    with pytest.raises(ConfigError) as without:
        pipeline_wants(world.pipeline)
    assert without.value.expected == "evaluate: with prompts"
    pipeline = Pipeline.model_validate(
        world.pipeline.model_dump(mode="json", by_alias=True, exclude_unset=True)
        | {"dataset": "nowhere", "evaluate": {"prompts": "prompts.jsonl"}}
    )
    with pytest.raises(DatasetError, match="holds no finished run") as none:
        pipeline_wants(pipeline)
    assert none.value.hint == "prefkit train PIPELINE"


def test_a_run_that_is_not_finished_is_refused(world: World, tmp_path: Path) -> None:
    shutil.copytree(world.run, tmp_path / "run")
    path = tmp_path / "run" / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"finished": False}))
    with pytest.raises(DatasetError, match="is not finished") as refused:
        evaluate_model(tmp_path / "run", settings())
    assert (refused.value.expected, refused.value.hint) == ("a finished run", "prefkit train goes on")


def test_a_changed_table_is_an_error(evaluated: Evaluated, tmp_path: Path) -> None:
    shutil.copytree(evaluated.folder, tmp_path / "copy")
    pl.DataFrame({"x": [1]}).write_parquet(tmp_path / "copy" / "summary.parquet")
    with pytest.raises(DatasetError, match="part was changed") as refused:
        read_evaluation(tmp_path / "copy")
    assert refused.value.hint == "prefkit evaluate makes it again once its folder is deleted"


def test_the_terminal_shows_headline_tables_and_warnings(evaluated: Evaluated) -> None:
    console = Console(width=100, record=True, markup=False, highlight=False, soft_wrap=True)
    print_evaluated(evaluated, console)
    shown = console.export_text()
    assert " by score " in shown.splitlines()[1]
    for text in ("temperature 1: 18 responses to 6 prompts", "reward, score", "win rate, score", "KL, nats"):
        assert text in shown
    assert "held-out pairs: accuracy" in shown
    assert f"{NUM_PROMPTS} texts: perplexity" in shown
    assert "times the reference's" in shown
    assert "6 prompts are few" in shown


def test_prompts_without_a_score_are_named(world: World) -> None:
    Path("some.py").write_text(
        "def score(prompts, **_):\n    return [None if '0?' in p[-1]['content'] else 1.0 for p in prompts]\n"
    )
    some = settings(temperatures=[1.0], texts=None, scorers=[{"function": "some:score"}])
    done = evaluate_model("model", some, reference="model", out="some")
    reward = Summary(done.summary).get("policy", "reward", 1.0, "score")
    assert reward is not None
    assert (reward.value, reward.num_prompts) == (1.0, NUM_PROMPTS - 1)
    text = "score gave 6 of 36 responses no score: means are over the rest; 1 of 6 prompts has none"
    assert {"name": "unscored", "text": text} in done.document["warnings"]
    console = Console(width=120, record=True, markup=False, highlight=False, soft_wrap=True)
    print_evaluated(done, console)
    lines = console.export_text().splitlines()
    (line,) = (line for line in lines if "reward, score" in line)
    assert line.count("(5 prompts)") == 3
    (line,) = (line for line in lines if " tokens " in line)
    assert "prompts)" not in line


def test_the_command_line_evaluates_a_pipelines_newest_run(
    world: World, prefkit: Prefkit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world.folder)
    text = (world.folder / "pipeline.yaml").read_text()
    (world.folder / "evaluated.yaml").write_text(
        text + "evaluate: {prompts: prompts.jsonl, max_new_tokens: 4, n: 1}\nscore: {scorers: [{verifier: exact}]}\n"
    )
    shown = prefkit("evaluate", "evaluated.yaml", "--json")
    assert shown.code == 0, shown.err
    told = json.loads(shown.out.splitlines()[-1])
    assert told["headline"]["scorer"] == "exact"
    assert told["folder"].startswith(str(Path(world.run) / "evaluations"))
    again = prefkit("evaluate", world.run, "--prompts", "prompts.jsonl", "--scorer", "verifier:exact", "-n", "1",
                    "--max-new-tokens", "4", "--temperature", "1")  # fmt: skip
    assert again.code == 0
    assert "nothing to do" in again.out
    assert prefkit("evaluate", "model").code == 2
