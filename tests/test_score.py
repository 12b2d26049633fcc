"""prefkit score: functions as TRL calls them, several scorers in one table, what is refused, and what goes on."""

import json
import textwrap
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from command import Prefkit
from test_judge import biased
from tiny import built, snapshot, text_rows, tiny_llama, turn, write_rows

from prefkit import scored_folder
from prefkit.build import build_dataset
from prefkit.config import Pipeline, load_pipeline, load_sections
from prefkit.errors import ConfigError, DatasetError, InputError, Interrupted, ModelError, SourceError
from prefkit.functions import installed_versions
from prefkit.sample import sample_candidates
from prefkit.sample_settings import ScorerConfig
from prefkit.score import score_candidates
from prefkit.scorer_options import parse_scorer, read_scorers
from prefkit.scorers import open_scorer, score_rows
from prefkit.sources import file_sha256


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def module(name: str, text: str) -> None:
    Path(f"{name}.py").write_text(textwrap.dedent(text), encoding="utf-8")


def sums(count: int = 6, chat: bool = False) -> list[dict[str, Any]]:
    """Four responses to each of some sums, one of them right; of different lengths."""
    rows = []
    for n in range(count):
        prompt = f"What is {n} + 1?"
        for more in range(4):
            response = f"{'I think ' * more}it is {n + more}"
            asked = [turn("user", prompt)] if chat else prompt
            rows.append({"prompt": asked, "response": response, "reference": str(n + 1), "model": "m"})
    return rows


def table(name: str, folder: str = "out") -> pl.DataFrame:
    return pl.read_parquet(f"{folder}/{name}/*.parquet")


# functions


def test_a_function_is_called_as_trl_calls_it(prefkit: Prefkit) -> None:
    write_rows(Path("r.jsonl"), sums(1, chat=True))
    module(
        "mine",
        """
        def words(prompts, completions, reference, model, solution, trainer_state=None, log_extra=None, **columns):
            assert prompts == [[{"role": "user", "content": "What is 0 + 1?"}]] * 4
            assert [list(map(sorted, c)) for c in completions] == [[["content", "role"]]] * 4
            assert {c[0]["role"] for c in completions} == {"assistant"}
            assert reference == solution == ["1"] * 4 and model == ["m"] * 4 and trainer_state is None
            log_extra("words", completions)
            return [len(c[0]["content"].split()) for c in completions]
        """,
    )
    ended = prefkit("score", "r.jsonl", "--scorer", "mine:words", "--out", "out", "--json")
    assert ended.code == 0, ended.err
    told = ended.last_json()["scorers"]
    assert told == [
        {
            "scorer": "words", "kind": "function", "out": "out", "candidates": 4, "scored": 4, "unscored": {},
            "mean": 6.0, "judge": None, "advice": [], "new": 4, "unchanged": False,
        }
    ]  # fmt: skip
    scored = table("scored")
    assert scored["score"].to_list() == [3.0, 5.0, 7.0, 9.0]  # it is 0; I think it is 1; ...
    assert scored["number"].to_list() == [0, 1, 2, 3]
    assert scored["scorer"].unique().to_list() == ["words"]


def test_a_function_of_a_text_dataset_gets_texts_and_only_what_it_names() -> None:
    write_rows(Path("r.jsonl"), sums(1))
    module(
        "mine",
        """
        def long(completions):
            assert all(isinstance(c, str) for c in completions)
            return [len(c) for c in completions]
        async def later(prompts, completions, **columns):
            return [1.0 if p == "What is 0 + 1?" else 0.0 for p in prompts]
        """,
    )
    done = score_candidates("r.jsonl", ["mine:long", "mine:later"], out="out")
    assert [one.mean for one in done] == [pytest.approx((7 + 15 + 23 + 31) / 4), 1.0]


def test_a_function_of_trl_works_as_it_is() -> None:
    pytest.importorskip("trl")
    thought = "<think>two</think>It is 2."
    rows = [{"prompt": [turn("user", "q")], "response": text} for text in (thought, "It is 2.")]
    write_rows(Path("r.jsonl"), rows)
    score_candidates("r.jsonl", ["trl.rewards:think_format_reward"], out="out")
    assert table("scored").select("response", "score").rows() == [(thought, 1.0), ("It is 2.", 0.0)]
    write_rows(Path("t.jsonl"), [{"prompt": "q", "response": thought}])  # as docs/scoring.md says
    with pytest.raises(InputError, match=r"raised TypeError in .*trl.*\.py:[0-9]+: string indices must be integers"):
        score_candidates("t.jsonl", ["trl.rewards:think_format_reward"], out="texts")
    assert not Path("texts").exists()


def test_none_is_no_score_and_neither_is_what_is_not_finite_or_out_of_the_scale() -> None:
    write_rows(Path("r.jsonl"), [{"prompt": "p", "response": f"r{n}"} for n in range(6)])
    module("mine", "def some(completions):\n    return [None, float('nan'), float('-inf'), 1.5, 0, True]\n")
    (done,) = score_candidates("r.jsonl", [parse_scorer("mine:some", "s", (0.0, 1.0))], out="out")
    assert table("scored").select("response", "score").rows() == [("r4", 0.0), ("r5", 1.0)]
    unscored = table("unscored").select("response", "reason", "value").rows()
    assert unscored == [
        ("r0", "no_score", None),
        ("r1", "not_finite", None),
        ("r2", "not_finite", None),
        ("r3", "out_of_scale", 1.5),
    ]
    assert done.unscored == {"not_finite": 2, "no_score": 1, "out_of_scale": 1}


@pytest.mark.parametrize(
    ("body", "message", "place"),
    [
        ("return [1.0]", "scorers.function mine:f gave 1 results for 4 completions", "r.jsonl:1"),
        ("return [1.0, '2', 3, 4]", "scorers.function mine:f gave str", "r.jsonl:2"),
        ("return 1.0", "scorers.function mine:f gave float", "r.jsonl:1"),
        ("return 'four'", "scorers.function mine:f gave str", "r.jsonl:1"),
        ("return {1: 2}", "scorers.function mine:f gave dict", "r.jsonl:1"),
        ("raise KeyError('gone')", "scorers.function mine:f raised KeyError in mine.py:2: 'gone'", "r.jsonl:1"),
        ("raise SystemExit(3)", "scorers.function mine:f raised SystemExit in mine.py:2: 3", "r.jsonl:1"),
    ],
)
def test_a_function_that_fails_is_named_with_its_place(body: str, message: str, place: str) -> None:
    write_rows(Path("r.jsonl"), sums(1))
    module("mine", f"def f(completions):\n    {body}\n")
    with pytest.raises(InputError) as wrong:
        score_candidates("r.jsonl", ["mine:f"], out="out")
    assert (wrong.value.message, wrong.value.where) == (message, place)
    every = ("a list with a number or None for every completion", "a number or None for every completion")
    assert wrong.value.expected in every
    assert wrong.value.hint == "mend it and type the same command"


def test_the_innermost_line_of_the_users_own_modules_is_named() -> None:
    write_rows(Path("r.jsonl"), sums(1))
    Path("near").mkdir()
    module("near/by", "import json\n\ndef read(text):\n    return json.loads(text)\n")
    module(
        "mine",
        """
        import functools
        from near.by import read

        def logged(function):
            @functools.wraps(function)
            def call(*args, **columns):
                return function(*args, **columns)
            return call

        @logged
        def f(prompts, completions):
            return [read(text) for text in completions]

        async def later(completions):
            raise RuntimeError("boom")

        def other(completions, count):
            return [0.0] * count
        """,
    )

    def message(name: str) -> str:
        with pytest.raises((InputError, SourceError)) as wrong:
            score_candidates("r.jsonl", [f"mine:{name}"], out="out")
        return wrong.value.message

    deep = "scorers.function mine:f raised JSONDecodeError in near/by.py:4: Expecting value: line 1 column 1 (char 0)"
    assert message("f") == deep  # neither json's own line nor that of mine.py
    assert message("later") == "scorers.function mine:later raised RuntimeError in mine.py:16: boom"
    # none of its lines ran
    missing = "raised TypeError: other() missing 1 required positional argument: 'count'"
    assert message("other") == f"scorers.function mine:other {missing}"


def test_numbers_of_other_libraries_are_numbers() -> None:
    write_rows(Path("r.jsonl"), sums(1))
    module(
        "mine",
        """
        import numpy, torch
        from fractions import Fraction
        def f(completions):
            return [numpy.float32(0.5), torch.tensor(1), Fraction(1, 4), 10 ** 400]
        def g(completions):
            return numpy.arange(4)
        """,
    )
    done = score_candidates("r.jsonl", ["mine:f", "mine:g"], out="out")
    scored = table("scored").sort("scorer", "number")
    assert scored["score"].to_list() == [0.5, 1.0, 0.25, 0.0, 1.0, 2.0, 3.0]
    assert done[0].unscored == {"not_finite": 1}


def test_a_module_that_is_not_there_is_named() -> None:
    write_rows(Path("r.jsonl"), sums(1))
    with pytest.raises(ConfigError, match=r"scorers.function: no module gone"):
        score_candidates("r.jsonl", ["gone:f"], out="out")
    module("mine", "x = 1\n")
    with pytest.raises(ConfigError, match=r"scorers.function: mine has no function f"):
        score_candidates("r.jsonl", ["mine:f"], out="out")
    assert not Path("out").exists()


# the identity of a scorer


def test_the_same_scorer_has_nothing_to_do_and_another_one_of_its_name_is_refused() -> None:
    write_rows(Path("r.jsonl"), sums())
    module("mine", "import helping\ndef f(completions):\n    return [helping.worth(c) for c in completions]\n")
    module("helping", "def worth(text):\n    return len(text)\n")
    score_candidates("r.jsonl", ["mine:f", "verifier:number"], out="out")
    before = snapshot(Path("out"))
    assert [one.unchanged for one in score_candidates("r.jsonl", ["mine:f", "verifier:number"], out="out")] == [
        True
    ] * 2
    assert snapshot(Path("out")) == before
    module("helping", "def worth(text):\n    return -len(text)\n")
    with pytest.raises(DatasetError) as other:
        score_candidates("r.jsonl", ["mine:f"], out="out")
    assert other.value.message == "the scorer f has scored here and is another one now: modules differ"
    assert other.value.expected == "the same scorer under the same name"
    assert other.value.hint == (
        "delete out/*/f-?????.parquet and out/scores/f.*, or choose another folder; "
        "under another name (--name, name:) the old scores stay beside the new ones, and a build takes both"
    )
    with pytest.raises(DatasetError, match="another one now: scale, verifier differ"):
        score_candidates("r.jsonl", [parse_scorer("verifier:exact", "number", (0, 1))], out="out")
    assert snapshot(Path("out")) == before
    (again,) = score_candidates("r.jsonl", [parse_scorer("mine:f", "shorter")], out="out")
    assert again.scored == 24
    assert sorted(table("scored")["scorer"].unique()) == ["f", "number", "shorter"]


def test_a_scorer_that_fails_at_once_may_be_mended_or_be_another_one() -> None:
    write_rows(Path("r.jsonl"), [*sums(), {"prompt": "p"}])
    module("mine", "def f(completions):\n    raise ValueError('boom')\n")
    with pytest.raises(InputError) as failed:
        score_candidates("r.jsonl", ["mine:f"], out="out")
    assert failed.value.hint == "mend it and type the same command"
    assert sorted(snapshot(Path("out"))) == [".lock", "rejects/part-00000.parquet"]
    module("mine", "def f(completions):\n    return [len(c) for c in completions]\n")
    assert [one.scored for one in score_candidates("r.jsonl", ["mine:f"], out="out")] == [24]
    tiny_llama(Path("m"))  # a language model has no output that were a reward
    with pytest.raises(ModelError, match=r"score\.weight"):
        score_candidates("r.jsonl", ["reward:m"], out="out")
    module("m", "def m(completions):\n    return [0.0 for c in completions]\n")
    assert [one.scored for one in score_candidates("r.jsonl", ["m:m"], out="out")] == [24]


def test_a_record_of_a_scorer_that_left_no_table_is_none() -> None:
    """As a kill between the two leaves it."""
    write_rows(Path("r.jsonl"), sums())
    Path("out/scores").mkdir(parents=True)
    Path("out/scores/number.begun").write_text(json.dumps({"candidates": "r.jsonl", "identity": {"kind": "judge"}}))
    assert [one.scored for one in score_candidates("r.jsonl", ["verifier:number"], out="out")] == [24]
    assert sorted(path.name for path in Path("out/scores").iterdir()) == ["number.json"]


def test_tables_without_the_record_of_their_scorer_are_scored_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scored_folder, "ROWS_PER_PART", 8)
    write_rows(Path("r.jsonl"), sums())
    score_candidates("r.jsonl", [parse_scorer("verifier:number", "x")], out="out")
    Path("out/scores/x.json").unlink()
    module("mine", "def f(completions):\n    return [7.0 for c in completions]\n")
    with pytest.raises(Interrupted):
        score_candidates("r.jsonl", [parse_scorer("mine:f", "x")], out="out", stop=lambda: True)
    assert table("scored")["score"].to_list() == [7.0] * 8
    score_candidates("r.jsonl", [parse_scorer("mine:f", "x")], out="out")
    assert table("scored")["score"].to_list() == [7.0] * 24


def test_a_function_that_fails_after_its_first_part_is_told_to_be_begun_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scored_folder, "ROWS_PER_PART", 8)
    write_rows(Path("r.jsonl"), sums())
    module("mine", "def f(completions):\n    return [1 / (7 - int(c[-1])) for c in completions]\n")
    with pytest.raises(InputError, match=r"raised ZeroDivisionError in mine\.py:2: ") as failed:
        score_candidates("r.jsonl", ["mine:f"], out="out")
    hint = "mend it, delete out/*/f-?????.parquet and out/scores/f.*, and type the same command"
    assert failed.value.hint == hint
    module("mine", "def f(completions):\n    return [7 - int(c[-1]) for c in completions]\n")
    with pytest.raises(DatasetError, match="is another one now"):
        score_candidates("r.jsonl", ["mine:f"], out="out")
    for file in [*Path("out").glob("*/f-?????.parquet"), *Path("out/scores").glob("f.*")]:
        file.unlink()
    assert [one.scored for one in score_candidates("r.jsonl", ["mine:f"], out="out")] == [24]


# the folder of the tables


def test_a_folder_of_something_else_is_refused() -> None:
    write_rows(Path("r.jsonl"), sums())
    write_rows(Path("s.jsonl"), sums(2))
    for name in ("full", "sampled", "sampling"):
        Path(name).mkdir()
    for file in (
        "full/d.txt",
        "full/c.txt",
        "full/b.txt",
        "full/a.txt",
        "sampled/sample.json",
        "sampling/sampler.json",
    ):
        Path(file).write_text("{}")
    score_candidates("r.jsonl", ["verifier:number"], out="out")
    write_rows(Path("out/dataset.jsonl"), sums(1))  # whatever a person keeps beside the tables
    before = snapshot(Path())

    def refused(path: str, out: str) -> DatasetError:
        with pytest.raises(DatasetError) as wrong:
            score_candidates(path, ["verifier:exact"], out=out)
        assert (wrong.value.where, wrong.value.hint) == (out, "choose another --out")
        return wrong.value

    full = refused("r.jsonl", "full")
    assert full.message == "holds a.txt, b.txt, c.txt"
    assert full.expected == "a folder of scores, or one that is new or empty"
    for sampled in ("sampled", "sampling"):
        foreign = refused("r.jsonl", sampled)
        assert foreign.message == "holds samples, and the scores of these alone"
        assert foreign.expected == "a folder that is new or empty"
    other = refused("s.jsonl", "out")
    assert other.message == "holds scores of r.jsonl"
    assert other.expected == "those of s.jsonl, or nothing yet"
    assert snapshot(Path()) == before
    score_candidates(str(Path("r.jsonl").absolute()), ["verifier:exact"], out="out")  # the same file
    assert table("scored").height == 48


def test_a_folder_of_unfinished_scores_is_for_their_candidates_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scored_folder, "ROWS_PER_PART", 8)
    write_rows(Path("r.jsonl"), sums())
    write_rows(Path("s.jsonl"), sums())
    with pytest.raises(Interrupted):
        score_candidates("r.jsonl", ["verifier:number"], out="out", stop=lambda: True)
    with pytest.raises(DatasetError, match=r"holds scores of r\.jsonl"):
        score_candidates("s.jsonl", ["verifier:exact"], out="out")
    (done,) = score_candidates("r.jsonl", ["verifier:number"], out="out")
    assert (done.scored, done.new) == (24, 16)


def test_what_a_scorer_is_stands_beside_its_tables() -> None:
    write_rows(Path("r.jsonl"), sums())
    module("mine", "def f(completions):\n    return [0.0] * len(completions)\n")
    score_candidates("r.jsonl", [parse_scorer("mine:f", None, (-1, 1))], out="out")
    document = json.loads(Path("out/scores/f.json").read_text())
    assert document["identity"] == {
        "kind": "function",
        "function": "mine:f",
        "modules": {"mine.py": file_sha256("mine.py")},
        "scale": [-1.0, 1.0],
    }
    assert document["counts"] == {"candidates": 24, "scored": 24, "unscored": 0}
    assert [part["file"] for part in document["parts"]] == ["unscored/f-00000.parquet", "scored/f-00000.parquet"]
    for part in document["parts"]:
        assert part["sha256"] == file_sha256(Path("out") / part["file"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"identity": None}, "is damaged at identity"),
        ({"parts": [{"rows": 3}]}, "is damaged at parts.0.file"),
        ({"counts": None}, "is damaged at counts"),
        (None, "is no JSON object"),
    ],
)
def test_a_damaged_document_of_a_scorer_is_named_and_made_again(change: Any, message: str) -> None:
    write_rows(Path("r.jsonl"), sums(3))
    (done,) = score_candidates("r.jsonl", ["verifier:number"], out="out")
    path = Path("out/scores/number.json")
    whole = path.read_bytes()
    path.write_text(json.dumps([] if change is None else json.loads(whole) | change))
    with pytest.raises(DatasetError) as wrong:
        score_candidates("r.jsonl", ["verifier:number"], out="out")
    assert (wrong.value.message, wrong.value.where) == (message, str(path))
    assert wrong.value.hint == "delete it and type prefkit score again: what it scored is scored anew"
    path.unlink()
    (again,) = score_candidates("r.jsonl", ["verifier:number"], out="out")
    assert (again.new, again.mean) == (done.new, done.mean)
    assert path.read_bytes() == whole


def test_of_a_file_that_grows_only_what_is_new_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scored_folder, "ROWS_PER_PART", 8)
    module(
        "mine",
        """
        from pathlib import Path
        def f(completions):
            with Path("calls.txt").open("a") as file:
                file.write(f"{len(completions)}\\n")
            return [len(c) for c in completions]
        """,
    )
    write_rows(Path("r.jsonl"), sums(5))
    score_candidates("r.jsonl", ["mine:f"], out="out")
    assert Path("calls.txt").read_text().split() == ["8", "8", "4"]
    write_rows(Path("r.jsonl"), sums(7))
    (done,) = score_candidates("r.jsonl", ["mine:f"], out="out")
    assert Path("calls.txt").read_text().split()[3:] == ["8", "4"]  # the last part was not full
    assert (done.candidates, done.scored, done.new, done.unchanged) == (28, 28, 12, False)
    write_rows(Path("r.jsonl"), sums(2))
    (fewer,) = score_candidates("r.jsonl", ["mine:f"], out="out")
    assert (fewer.candidates, fewer.scored, fewer.new) == (8, 8, 0)
    assert len([*Path("out/scored").iterdir()]) == 1
    changed = sums(2)
    changed[5]["response"] = "it is another"
    write_rows(Path("r.jsonl"), changed)
    (mended,) = score_candidates("r.jsonl", ["mine:f"], out="out")
    assert (mended.new, table("scored")["response"].to_list()[5]) == (8, "it is another")


def test_a_call_that_is_stopped_goes_on_to_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scored_folder, "ROWS_PER_PART", 8)
    module("mine", "def f(completions):\n    return [len(c) for c in completions]\n")
    write_rows(Path("r.jsonl"), sums(6))
    score_candidates("r.jsonl", ["mine:f", "verifier:number"], out="whole")
    with pytest.raises(Interrupted, match="stopped: 8 responses scored by f"):
        score_candidates("r.jsonl", ["mine:f", "verifier:number"], out="out", stop=lambda: True)
    assert [path.name for path in Path("out/scored").iterdir()] == ["f-00000.parquet"]
    module("mine", "def f(completions):\n    return [1 for c in completions]\n")
    with pytest.raises(DatasetError, match="another one now: modules differ"):
        score_candidates("r.jsonl", ["mine:f"], out="out")
    module("mine", "def f(completions):\n    return [len(c) for c in completions]\n")
    done = score_candidates("r.jsonl", ["mine:f", "verifier:number"], out="out")
    assert [one.new for one in done] == [16, 24]
    assert snapshot(Path("out")) == snapshot(Path("whole"))


# what is scored


def test_sampled_candidates_are_scored_and_new_ones_alone() -> None:
    tiny_llama(Path("m"))
    module(
        "mine",
        """
        def f(completions, completion_ids):
            return [len(ids) for ids in completion_ids]
        """,
    )

    def sample(count: int) -> None:
        write_rows(Path("p.jsonl"), [{"prompt": [turn("user", f"river {n}")], "reference": "7"} for n in range(count)])
        settings = {"prompts": {"path": "p.jsonl"}, "out": "c", "model": "m", "n": 3, "max_new_tokens": 6}
        sample_candidates(load_sections({"sample": settings}))

    sample(4)
    (done,) = score_candidates("c", ["mine:f"])
    assert (done.candidates, done.scored) == (12, 12)
    samples = pl.concat([pl.read_parquet(file) for file in sorted(Path("c/samples").iterdir())])
    scored = table("scored", "c")
    assert scored["candidate_id"].to_list() == samples["candidate_id"].to_list()
    assert scored["score"].to_list() == samples["num_tokens"].to_list()
    sample(6)
    (more,) = score_candidates("c", ["mine:f"])
    assert (more.candidates, more.scored, more.new) == (18, 18, 6)
    (Path("c") / "sample.json").unlink()
    with pytest.raises(DatasetError, match=r"sampling is unfinished: there is no sample.json"):
        score_candidates("c", ["mine:f"])


def test_rows_that_are_no_response_are_rejects() -> None:
    rows = [
        *sums(1),
        {"prompt": "p"},
        {"prompt": "p", "response": 7},
        {"prompt": "p", "response": "r", "reference": []},
    ]
    write_rows(Path("r.jsonl"), [*rows, {"prompt": [turn("user", "p")], "response": "r"}])
    with Path("r.jsonl").open("a") as file:
        file.write("{broken\n")
    told: list[str] = []
    (done,) = score_candidates("r.jsonl", ["verifier:number"], out="out", tell=told.append)
    assert done.candidates == 4
    assert "5 rows are no response: see out/rejects" in told
    rejects = pl.read_parquet("out/rejects/part-00000.parquet").select("line", "field", "reason").rows()
    assert rejects == [
        (5, "response", "missing_field"),
        (6, "response", "wrong_type"),
        (7, "reference", "wrong_type"),
        (8, "prompt", "messages_in_text_dataset"),
        (9, None, "not_json"),
    ]


def test_a_reply_of_one_message_is_its_text_and_of_several_none() -> None:
    one, two = [turn("assistant", "a")], [turn("assistant", "a"), turn("user", "b")]
    rows = [{"prompt": [turn("user", "p")], "response": reply} for reply in (one, two, "c")]
    write_rows(Path("r.jsonl"), rows)
    module("mine", "def f(completions):\n    return [len(c) for c in completions]\n")
    score_candidates("r.jsonl", ["mine:f"], out="out")
    assert table("scored")["response"].to_list() == ["a", "c"]
    assert pl.read_parquet("out/rejects/*.parquet")["reason"].to_list() == ["not_one_reply"]


def test_a_file_without_any_response_is_refused() -> None:
    write_rows(Path("r.jsonl"), [{"question": "q", "answer": "a"}] * 3)
    with pytest.raises(SourceError) as wrong:
        score_candidates("r.jsonl", ["verifier:number"], out="out")
    assert wrong.value.message == "3 of 3 rows are no response: prompt: missing_field"
    assert (wrong.value.where, wrong.value.expected) == (
        "r.jsonl:1",
        "prompt, response [, reference, model, tools] in each",
    )


def test_rows_in_memory_are_scored_as_those_on_disk() -> None:
    rows = pl.DataFrame(sums(2))
    opened = open_scorer(ScorerConfig.model_validate({"verifier": "number"}), "text")
    found = score_rows(rows, opened)
    assert found["score"].to_list() == [0.0, 1.0, 0.0, 0.0] * 2
    assert found["reason"].null_count() == 8
    bare = score_rows(rows.select("prompt", "response"), opened.config)
    assert bare["reason"].unique().to_list() == ["no_reference"]


# the tables as sources of a build


@pytest.mark.parametrize("chat", [True, False])
def test_one_scorer_or_several_are_a_candidates_source(chat: bool) -> None:
    write_rows(Path("r.jsonl"), sums(6, chat))
    module(
        "mine",
        """
        def short(completions):
            return [-len(c if isinstance(c, str) else c[0]["content"]) for c in completions]
        """,
    )

    def built(number: int) -> pl.DataFrame:
        settings = {
            "dataset": f"d{number}",
            "sources": [{"path": "out/scored/*.parquet", "format": "candidates"}],
            "split": {"test_share": 0},
        }
        Path("p.yaml").write_text(json.dumps(settings))
        done = build_dataset(load_pipeline("p.yaml"))
        assert (done.counts["rejects"], done.kind) == (0, "chat" if chat else "text")
        return pl.read_parquet(f"d{number}/pairs/*.parquet").sort("source_row")

    def texts(pairs: pl.DataFrame, side: str) -> list[str]:
        return [text if isinstance(text, str) else text[0]["content"] for text in pairs[side].to_list()]

    score_candidates("r.jsonl", ["verifier:number"], out="out")
    one = built(1)
    assert sorted(texts(one, "chosen")) == [f"I think it is {n + 1}" for n in range(6)]  # the right one
    assert set(one["chosen_model"]) == {"m"}
    score_candidates("r.jsonl", ["mine:short"], out="out")
    both = built(2)
    assert both.height == 6
    # four responses, two scorers: the longest is wrong and the worst by both
    assert sorted(texts(both, "rejected")) == [f"I think I think I think it is {n + 3}" for n in range(6)]


@pytest.mark.parametrize(("odds", "place", "share"), [(4.0, "first", "100%"), (-4.0, "second", "0%")])
def test_a_position_biased_judge_yields_no_pairs_at_all_and_the_report_says_why(
    odds: float, place: str, share: str, prefkit: Prefkit
) -> None:
    write_rows(Path("r.jsonl"), sums(3))
    biased(Path("judge"), odds)
    ended = prefkit("score", "r.jsonl", "--scorer", "judge:judge", "--out", "out", "--json")
    assert ended.code == 0, ended.err
    why = (
        "none of the 18 verdicts of judge holds when the order is changed: it always prefers the response shown "
        f"{place}, whichever that is; no response is scored, and no pairs can be built"
    )
    (told,) = ended.last_json()["scorers"]
    assert told["advice"] == [why]
    assert (told["scored"], told["unscored"]) == (0, {"inconsistent": 12})
    assert told["judge"] == {
        "comparisons": 18,  # six pairs a prompt
        "consistent": 0,
        "ties": 0,
        "not_compared": 0,
        "consistent_share": 0.0,
        "first_share": 1.0 if odds > 0 else 0.0,
    }
    said = prefkit("score", "r.jsonl", "--scorer", "judge:judge", "--out", "out").out
    assert (
        f"18 comparisons, 0% with the same verdict in both orders; {share} of all verdicts are for the response" in said
    )
    assert f"advice: {why}" in said
    assert pl.read_parquet("out/inconsistent/judge-00000.parquet")["winner"].null_count() == 18
    for source, form in (("scored", "candidates"), ("verdicts", "comparisons")):
        settings = {"dataset": "d", "sources": [{"path": f"out/{source}/*.parquet", "format": form}]}
        Path("p.yaml").write_text(json.dumps(settings))
        failed = prefkit("build", "p.yaml")
        assert failed.code == 2
        assert f"out/{source}/*.parquet: holds no row" in failed.err
        assert f"next: {why}" in failed.err
        assert not Path("d").exists()


def test_consistent_verdicts_are_a_comparisons_source(monkeypatch: pytest.MonkeyPatch) -> None:
    from test_judge import preferring
    from transformers import AutoTokenizer

    write_rows(Path("r.jsonl"), sums(3))
    tiny_llama(Path("judge"), max_position_embeddings=2048)
    tokenizer = AutoTokenizer.from_pretrained("judge")
    preferring(monkeypatch, tokenizer, lambda text: float("think" in text))
    (done,) = score_candidates("r.jsonl", ["judge:judge"], out="out")
    # I think before three of four: each of them beats the first, and ties with the others
    assert table("scored")["score"].to_list() == pytest.approx([-1.0, 1 / 3, 1 / 3, 1 / 3] * 3)
    assert done.judge is not None
    assert (done.judge["consistent"], done.judge["ties"], done.judge["first_share"]) == (18, 9, 0.5)
    settings = {
        "dataset": "d",
        "sources": [{"path": "out/verdicts/*.parquet", "format": "comparisons"}],
        "split": {"test_share": 0},
    }
    Path("p.yaml").write_text(json.dumps(settings))
    built = build_dataset(load_pipeline("p.yaml"))
    assert (built.counts["rejects"], built.reasons) == (0, {"tie": 9})
    assert all("think" not in text for text in pl.read_parquet("d/pairs/*.parquet")["rejected"])


def test_a_judge_that_is_right_no_more_often_than_chance_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    from prefkit.score import _judge_advice

    figures = {"comparisons": 10, "consistent": 5, "consistent_share": 0.5, "first_share": 0.75}
    (said,) = _judge_advice("j", figures)
    assert said == (
        "only 50% of the verdicts of j hold when the order is changed; by chance half would, and 75% are for the "
        "response shown first"
    )
    assert _judge_advice("j", figures | {"consistent_share": 0.9, "consistent": 9}) == []
    (none,) = _judge_advice("j", {"comparisons": 0, "consistent": 0, "first_share": None})
    assert none == "j compared nothing: no prompt has two different responses that fit its model"
    (mixed,) = _judge_advice("j", figures | {"consistent": 0})
    assert mixed.startswith("none of the 10 verdicts of j holds when the order is changed; no response is scored")


@pytest.mark.parametrize(
    ("value", "scale", "why"),
    [
        ("None", None, "it gave no score"),
        ("2.0", (0.0, 1.0), "its scores are out of the scale that was declared"),
        ("float('nan')", None, "its scores are not finite"),
    ],
)
def test_a_scorer_that_scores_nothing_is_told_why(value: str, scale: Any, why: str) -> None:
    write_rows(Path("r.jsonl"), sums(1))
    module("mine", f"def f(completions):\n    return [{value}] * len(completions)\n")
    (done,) = score_candidates("r.jsonl", [parse_scorer("mine:f", None, scale)], out="out")
    assert done.advice == [f"f scored nothing: {why}. No pairs can be built from it"]


# the command


def test_a_function_of_another_version_of_its_package_is_another_scorer(monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(Path("r.jsonl"), sums())
    package, about = Path("site/rating_pack"), Path("site/rating_pack-1.dist-info")
    package.mkdir(parents=True)
    about.mkdir()
    (package / "__init__.py").write_text("from rating_pack.inner import f\n")
    (package / "inner.py").write_text("def f(completions):\n    return [1.0] * len(completions)\n")
    (about / "top_level.txt").write_text("rating_pack\n")
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: rating-pack\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(str(Path("site").absolute()))
    score_candidates("r.jsonl", ["rating_pack:f"], out="out")
    identity = json.loads(Path("out/scores/f.json").read_text())["identity"]
    assert identity["versions"] == {"rating-pack": "1.0"}
    assert list(identity["modules"]) == ["rating_pack"]
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: rating-pack\nVersion: 1.1\n")
    with pytest.raises(DatasetError, match="another one now: versions differ"):
        score_candidates("r.jsonl", ["rating_pack:f"], out="out")
    assert installed_versions(["prefkit.demo.rating:rate", "json:dumps"]) == {}


def test_scores_of_a_scorer_that_the_section_does_not_name_are_no_source_in_silence() -> None:
    """Two scorers that rank the other way round would cancel, and pairs come from both, whatever the section says."""
    write_rows(Path("r.jsonl"), sums())
    module("mine", "def long(completions):\n    return [len(c) for c in completions]\n")
    score_candidates("r.jsonl", ["mine:long"], out="c")
    Path("c/sampler.json").write_text("{}")
    before = snapshot(Path("c"))
    sections: dict[str, Any] = {"prompts": "p.jsonl", "out": "c"}
    wanted = {
        "dataset": "d",
        "sources": [{"path": "c/scored/*.parquet", "format": "candidates"}],
        "sample": sections,
        "score": {"scorers": [{"verifier": "number"}, {"verifier": "exact"}]},
    }
    with pytest.raises(DatasetError) as refused:
        score_candidates(Pipeline.model_validate(wanted))
    what = "holds scores of long, which score.scorers does not name: a build would rank by them, too"
    assert (refused.value.message, refused.value.where) == (what, "c")
    assert refused.value.expected == "those of number, exact alone"
    deleted = "delete c/*/long-?????.parquet and c/scores/long.*"
    assert refused.value.hint == f"name them in score.scorers, choose another sample.out, or {deleted}"
    assert snapshot(Path("c")) == before


def test_a_pipeline_names_candidates_and_scorers(prefkit: Prefkit) -> None:
    tiny_llama(Path("m"))
    write_rows(Path("p.jsonl"), [{"prompt": f"river {n}", "reference": "7"} for n in range(3)])
    settings: dict[str, Any] = {
        "dataset": "d",
        "sources": [{"path": "c/scored/*.parquet", "format": "candidates"}],
        "precompute": {"model": "m"},
        "sample": {"prompts": "p.jsonl", "out": "c", "n": 2, "max_new_tokens": 4},
        "score": {"scorers": [{"verifier": "number", "name": "right", "scale": [0, 1]}]},
    }
    Path("p.yaml").write_text(json.dumps(settings))
    assert prefkit("sample", "p.yaml").code == 0
    ended = prefkit("score", "p.yaml")
    assert ended.code == 0, ended.err
    assert "right (verifier): 6 of 6 responses scored" in ended.out
    ended = prefkit("score", "p.yaml", "--set", "score.scorers=[{verifier: exact}]")
    assert (ended.code, "holds scores of right, which score.scorers does not name" in ended.err) == (2, True)
    assert prefkit("score", "p.yaml", "--scorer", "verifier:exact").code == 0
    assert sorted(path.name for path in Path("c/scores").iterdir()) == ["exact.json", "right.json"]
    for missing, hint in (("score", "add score: {scorers: [...]}, or --scorer"), ("sample", "add sample:")):
        Path("less.yaml").write_text(json.dumps({k: v for k, v in settings.items() if k != missing}))
        failed = prefkit("score", "less.yaml")
        assert failed.code == 2
        assert f"the pipeline has no {missing} section" in failed.err
        assert hint in failed.err
    with pytest.raises(InputError, match="the pipeline has no sample section") as wrong:
        score_candidates("less.yaml")
    assert wrong.value.expected == "sample.out, the candidates"
    assert wrong.value.hint == "add sample:, or name the candidates' folder"


REFUSED: list[tuple[list[str], str]] = [
    ([], "no scorer is given"),
    (["--scorer", "verifier"], "--scorer verifier is no scorer"),
    (["--scorer", "verifier:sums"], "--scorer verifier:sums: Input should be 'number' or 'exact'"),
    (["--scorer", "a:b:c"], "--scorer a:b:c: scorers.function: a:b:c is not module:function"),
    (["--scorer", "verifier:number", "--scale", "0"], "--scale 0 is no scale"),
    (["--scorer", "verifier:number", "--scale", "1,0"], "scorers.scale must be given from low to high"),
    (["--scorer", "judge:m", "--scale", "0,1"], "scorers.scale has no effect on a scorer with judge:"),
    (["--scorer", "verifier:number", "--name", "a b"], "--scorer verifier:number: "),
    (["--scorer", "verifier:number", "--scorer", "verifier:exact", "--name", "x"], "--name is for one scorer, 2 are"),
    (["--scorer", "verifier:number", "--scorer", "function:mine:number"], "two scorers are called number"),
    (
        ["--scorer", "verifier:number", "--set", "score.scorers=[]"],
        "--set changes a pipeline, and these are candidates",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_what_makes_no_sense_is_refused(arguments: list[str], message: str, prefkit: Prefkit) -> None:
    write_rows(Path("r.jsonl"), sums(1))
    ended = prefkit("score", "r.jsonl", "--out", "out", *arguments)
    assert ended.code == 2, ended.err
    assert message in ended.err
    assert not Path("out").exists()


def test_a_file_needs_a_folder_for_its_tables() -> None:
    write_rows(Path("r.jsonl"), sums(1))
    with pytest.raises(InputError) as wrong:
        score_candidates("r.jsonl", ["verifier:number"])
    assert wrong.value.message == "is no folder of prefkit sample, so the scored tables need one"
    assert wrong.value.expected == "a folder with sample.json, or a file with --out DIR"
    assert wrong.value.hint == "add --out DIR"
    with pytest.raises(SourceError, match="no such file"):
        score_candidates("nowhere", ["verifier:number"])


def test_scores_in_a_dataset_are_refused(tmp_path: Path) -> None:
    pipeline = built(tmp_path, text_rows(2), tmp_path / "none")
    write_rows(Path("r.jsonl"), sums(1))
    with pytest.raises(InputError, match="scores cannot be written into a dataset") as wrong:
        score_candidates("r.jsonl", ["verifier:number"], out=Path(pipeline.dataset) / "scores")
    assert wrong.value.hint == "--out elsewhere"
    assert not (Path(pipeline.dataset) / "scores").exists()


def test_a_file_of_nothing_holds_no_response() -> None:
    Path("r.jsonl").write_text("")
    with pytest.raises(SourceError, match=r"^r\.jsonl: holds no response"):
        score_candidates("r.jsonl", ["verifier:number"], out="out")


def test_scorers_in_short() -> None:
    read = [parse_scorer(spec) for spec in ("mine:f", "function:judge:f", "reward:a/b", "judge:./x/", "verifier:exact")]
    assert [(one.kind, one.label) for one in read] == [
        ("function", "f"), ("function", "f"), ("reward_model", "b"), ("judge", "x"), ("verifier", "exact"),
    ]  # fmt: skip
    (scaled,) = read_scorers(["mine:f"], "g", "-1,2.5")
    assert (scaled.label, scaled.scale) == ("g", (-1.0, 2.5))
    with pytest.raises(ConfigError) as wrong:
        read_scorers([], None, "0,1")
    assert (wrong.value.expected, wrong.value.hint) == ("one --scorer", "a pipeline names each of several")
    with pytest.raises(ConfigError) as scale:
        read_scorers(["a:b"], None, "0,1,2")
    assert (scale.value.expected, scale.value.hint) == ("lowest and highest score", "--scale 0,1")
    with pytest.raises(ConfigError) as none:
        parse_scorer("f")
    assert none.value.expected == "module:function, reward:FOLDER, judge:FOLDER, verifier:number or verifier:exact"
    with pytest.raises(ConfigError, match=r"--name is for one scorer, 2 are given"):
        read_scorers(["a:b", "a:c"], "x", None)


def test_a_scorer_is_exactly_one_of_four_and_has_a_name_of_its_own() -> None:
    for given in ({"verifier": "number", "judge": "m"}, {"name": "x"}):
        with pytest.raises(ValueError, match="a scorer has exactly one of function, reward_model, judge, verifier"):
            ScorerConfig.model_validate(given)
    write_rows(Path("r.jsonl"), sums(1))
    with pytest.raises(InputError, match="two scorers are called number") as two:
        score_candidates("r.jsonl", ["verifier:number"] * 2, out="out")
    assert (two.value.expected, two.value.hint) == ("a name for each", "--name NAME")
    with pytest.raises(InputError, match="no scorer is given") as none:
        score_candidates("r.jsonl", out="out")
    assert none.value.hint == "--scorer module:function"
    with pytest.raises(InputError, match="--set changes a pipeline, and these are candidates") as changed:
        score_candidates("r.jsonl", ["verifier:number"], out="out", changes=["a=1"])
    assert changed.value.hint == "--scorer, --name and --scale"
