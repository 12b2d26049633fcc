"""A pipeline file says what it means or is refused: with file, line, key, what was expected, the nearest known key."""

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from prefkit.config import Pipeline, load_pipeline, load_sections, pipeline_from_manifest
from prefkit.errors import ConfigError, InputError
from prefkit.formats import FORMATS
from prefkit.formats.reading import Format
from prefkit.sample_settings import PromptsConfig

SMALL = """
dataset: out
sources:
  - path: a.jsonl
    format: pairs
"""
KEYS_THAT_OTHERS_SET = {
    "dataset": "d",
    "kind": "text",
    "pairs": {"min_margin": 0.5},
    "validate": {"max_reject_share": 0.2, "max_chars": 1000, "score_scale": [1, 10]},
    "dedupe": {"exact": False, "contradictions": "majority"},
    "split": {"test_share": 0.2, "seed": 3},
    "audit": {"allow": ["the"]},
    "precompute": {"model": "m", "max_length": 512, "dtype": "float32", "max_batch_tokens": 4096},
    "train": {
        "model": "m",
        "loss": "sigmoid",
        "beta": 0.05,
        "label_smoothing": 0.1,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "cosine",
        "optimizer": "adamw",
        "weight_decay": 0.01,
        "max_grad_norm": 2.0,
        "batch_size": 4,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
        "max_steps": 30,
        "warmup_steps": 3,
        "eval_steps": 10,
        "logging_steps": 1,
        "save_steps": 10,
        "save_total_limit": 3,
        "seed": 7,
    },
}


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Pipeline]:
    """Load a pipeline from text, with --set changes."""

    def load_text(text: str, *changes: str, **overrides: Any) -> Pipeline:
        (tmp_path / "pipeline.yaml").write_text(text, encoding="utf-8")
        return load_pipeline(tmp_path / "pipeline.yaml", changes, **overrides)

    return load_text


def refusal(load: Callable[..., Pipeline], text: str, *changes: str) -> ConfigError:
    with pytest.raises(ConfigError) as refused:
        load(text, *changes)
    return refused.value


def test_a_small_pipeline_gets_the_defaults_of_the_design(load: Callable[..., Pipeline]) -> None:
    pipeline = load(SMALL)
    assert pipeline.kind is None
    assert pipeline.sources[0].direction == "higher_is_better"
    assert (pipeline.split.test_share, pipeline.dedupe.contradictions) == (0.05, "drop_both")
    assert (pipeline.dedupe.exact, pipeline.pairs.min_margin) == (True, 0.0)


def test_every_key_that_other_tools_set_is_known(pipeline_of: Callable[..., Pipeline]) -> None:
    source = {
        "path": "a.jsonl",
        "format": "candidates",
        "columns": {"prompt": "q", "responses": ["a.x", "b.x"]},
        "direction": "lower_is_better",
        "annotator": "human",
    }
    resolved = pipeline_of(source, **KEYS_THAT_OTHERS_SET).as_manifest()
    assert resolved["sources"] == [source | {"labels": None, "rules": [], "license": None}]
    for section, settings in KEYS_THAT_OTHERS_SET.items():
        if isinstance(settings, dict):
            for key, value in settings.items():
                assert resolved[section][key] == value, f"{section}.{key}"


def test_the_manifest_form_leaves_out_where_the_dataset_lies_and_can_be_read_back(
    load: Callable[..., Pipeline],
) -> None:
    pipeline = load(SMALL, "validate.score_scale=[1, 10]", "train.beta=0.3")
    resolved = pipeline.as_manifest()
    assert "dataset" not in resolved
    assert pipeline_from_manifest(resolved, "out") == pipeline
    assert pipeline_from_manifest(resolved, "out", ["train.beta=0.4"]).train.beta == 0.4


def test_settings_cannot_be_changed_once_they_are_checked(load: Callable[..., Pipeline]) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load(SMALL).dataset = "elsewhere"  # type: ignore[misc]


# refusals


@pytest.mark.parametrize(
    ("text", "key", "line", "near"),
    [
        (SMALL + "splitt:\n  seed: 1\n", "splitt", 6, "split"),
        (SMALL + "split:\n  seed: 1\n  test_shar: 0.1\n", "split.test_shar", 8, "split.test_share"),
        (SMALL + "    anotator: human\n", "sources[0].anotator", 6, "sources[0].annotator"),
        (
            SMALL + "audit:\n  limits:\n    min_coverag: 0.1\n",
            "audit.limits.min_coverag",
            8,
            "audit.limits.min_coverage",
        ),
        (SMALL + "validate: {max_char: 3}\n", "validate.max_char", 6, "validate.max_chars"),
        (SMALL.replace("format:", "formt:"), "sources[0].formt", 5, "sources[0].format"),
        (SMALL.replace("dataset:", "datasett:"), "datasett", 2, "dataset"),
    ],
)
def test_an_unknown_key_is_refused_with_its_line_and_the_nearest_known_key(
    text: str, key: str, line: int, near: str, load: Callable[..., Pipeline], tmp_path: Path
) -> None:
    error = refusal(load, text)
    assert error.where == f"{tmp_path / 'pipeline.yaml'}:{line}"
    assert f"unknown key {key}" in error.message
    assert f"did you mean {near}?" in str(error)
    assert near.rpartition(".")[2] in error.expected


def test_a_key_like_no_other_is_refused_with_the_keys_that_there_are(load: Callable[..., Pipeline]) -> None:
    error = refusal(load, SMALL + "split: {zzz: 1}\n")
    assert error.hint == ""
    assert error.expected == "one of test_share, seed"


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        (SMALL + "split:\n  test_share: 1.5\n", 7, ["split.test_share = 1.5", "less than or equal to 1"]),
        (SMALL + "split:\n  seed: many\n", 7, ["split.seed = 'many'", "integer"]),
        (SMALL + "kind: audio\n", 6, ["kind = 'audio'", "'chat' or 'text'"]),
        (
            SMALL.replace("pairs", "pear"),
            5,
            ["format: pear is not known", "did you mean pairs?", "prefkit formats lists them"],
        ),
        (SMALL + "    direction: up\n", 6, ["sources[0].direction = 'up'", "'lower_is_better'"]),
        (SMALL + "dedupe:\n  contradictions: argue\n", 7, ["dedupe.contradictions = 'argue'", "'majority'"]),
        (SMALL + "pairs:\n  min_margin: -1\n", 7, ["pairs.min_margin = -1", "greater than or equal to 0"]),
        (SMALL + "train:\n  beta: .nan\n", 7, ["train.beta = nan"]),
        (SMALL + "    columns: {prompt: 3}\n", 6, ["sources[0].columns.prompt = 3", "string"]),
        (SMALL + "split: 3\n", 6, ["split = 3"]),
        ("dataset: d\nsources: []\n", 2, ["sources = []", "at least 1"]),
    ],
)
def test_a_value_that_does_not_fit_is_refused_with_file_line_key_and_what_was_expected(
    text: str, line: int, said: list[str], load: Callable[..., Pipeline], tmp_path: Path
) -> None:
    error = refusal(load, text)
    assert error.where == f"{tmp_path / 'pipeline.yaml'}:{line}"
    assert [part for part in said if part not in str(error)] == []
    assert "pydantic" not in str(error)


@pytest.mark.parametrize("key", ["dataset", "sources", "sources[0].path"])
def test_a_missing_key_is_refused_by_name(key: str, load: Callable[..., Pipeline]) -> None:
    texts = {
        "dataset": "sources:\n  - {path: a, format: hh}\n",
        "sources": "dataset: d\n",
        "sources[0].path": "dataset: d\nsources:\n  - format: hh\n",
    }
    error = refusal(load, texts[key])
    assert error.message == f"key {key} is missing"
    assert "pipeline.yaml" in error.where


@pytest.mark.parametrize(("section", "key"), [("sample", "out"), ("evaluate", "n")])
def test_prompts_that_are_missing_are_refused_with_the_change_that_names_them(section: str, key: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_sections({}, [f"{section}.{key}=3"])
    assert error.value.message == f"key {section}.prompts is missing"
    assert error.value.expected == "a file of prompts or a dataset, or path: with columns:, limit: and split:"
    assert error.value.hint == f"--set {section}.prompts=FILE"


def test_prompts_given_as_a_path_alone_can_be_changed_within() -> None:
    written = {"sample": {"prompts": "p.jsonl", "out": "c"}, "evaluate": {"prompts": "p.jsonl", "texts": "t.jsonl"}}
    changes = ["sample.prompts.limit=5", "evaluate.prompts.columns={prompt: q}", "evaluate.texts.columns.reference=a"]
    found = load_sections(written, changes)
    assert found.sample is not None
    assert found.evaluate is not None
    assert found.sample.prompts == PromptsConfig(path="p.jsonl", limit=5)
    assert found.evaluate.prompts == PromptsConfig(path="p.jsonl", columns={"prompt": "q"})
    assert found.evaluate.texts == PromptsConfig(path="t.jsonl", columns={"reference": "a"})
    for key in ("sample.out.x", "sample.prompts.path.x"):
        with pytest.raises(ConfigError, match="is not a section"):
            load_sections(written, [f"{key}=1"])
    with pytest.raises(ConfigError, match=r"unknown key sample\.promts"):
        load_sections(written, ["sample.promts.limit=1"])
    with pytest.raises(ConfigError, match="is not a section"):
        load_sections(written | {"nothing": "x"}, ["nothing.a=1"])


def test_a_key_given_twice_is_refused_with_the_line_of_the_second(
    load: Callable[..., Pipeline], tmp_path: Path
) -> None:
    text = SMALL + "split:\n  seed: 1\n  test_share: 0.1\n  seed: 2\n"
    error = refusal(load, text)
    assert error.message == "key split.seed is given twice"
    assert error.where == f"{tmp_path / 'pipeline.yaml'}:9"


def test_settings_that_contradict_each_other_are_refused_with_both_names(load: Callable[..., Pipeline]) -> None:
    error = refusal(load, SMALL + "precompute: {max_length: 8, min_completion_tokens: 8}\n")
    assert "precompute.min_completion_tokens" in error.message
    assert "precompute.max_length" in error.message


def test_a_score_scale_is_given_from_low_to_high(load: Callable[..., Pipeline]) -> None:
    assert "score_scale" in refusal(load, SMALL + "validate: {score_scale: [10, 1]}\n").message


def test_a_column_that_no_record_has_is_refused_and_not_overlooked(load: Callable[..., Pipeline]) -> None:
    error = refusal(load, SMALL + "    columns:\n      chosen_scor: points\n")
    assert "chosen_scor" in error.message
    assert "chosen_score" in str(error)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "just a sentence",
        "- a\n- b\n",
        "a: b: c",
        "dataset: [",
        "\x00",
        "dataset: &a [*a]\n",
        "? [a]\n: b\n",
        "1: 2\n",
    ],
)
def test_a_file_that_is_no_pipeline_is_refused_by_name(text: str, load: Callable[..., Pipeline]) -> None:
    assert "pipeline.yaml" in refusal(load, text).where


def test_broken_yaml_is_refused_with_its_line(load: Callable[..., Pipeline], tmp_path: Path) -> None:
    assert refusal(load, SMALL + "split: {seed: 1\n").where.startswith(f"{tmp_path / 'pipeline.yaml'}:")


def test_a_missing_a_binary_and_a_foreign_pipeline_file_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "missing.yaml", tmp_path / "binary.yaml", tmp_path):
        with pytest.raises(ConfigError, match="cannot read the pipeline file") as refused:
            load_pipeline(path)
        assert refused.value.where == str(path)


def test_no_tag_of_a_pipeline_file_runs_code(load: Callable[..., Pipeline], tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    text = SMALL + textwrap.dedent(f"""
        split: !!python/object/apply:pathlib.Path.touch
          - !!python/object/apply:pathlib.Path ["{mark}"]
    """)
    assert refusal(load, text).exit_code == 2
    assert not mark.exists()


# --set


def test_a_change_wins_over_the_file_and_a_later_change_over_an_earlier_one(load: Callable[..., Pipeline]) -> None:
    text = SMALL + "split: {seed: 1, test_share: 0.1}\n"
    pipeline = load(text, "split.seed=2", "split.seed=3", "pairs.min_margin=0.5")
    assert (pipeline.split.seed, pipeline.split.test_share, pipeline.pairs.min_margin) == (3, 0.1, 0.5)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("train.learning_rate=1e-4", 1e-4),
        ("train.learning_rate=1E-4", 1e-4),
        ("train.learning_rate=5.0e-7", 5e-7),
        ("train.learning_rate=.001", 0.001),
        ("train.learning_rate=1", 1.0),
    ],
)
def test_numbers_with_an_exponent_are_numbers(change: str, expected: float, load: Callable[..., Pipeline]) -> None:
    assert load(SMALL, change).train.learning_rate == expected
    in_file = SMALL + "train:\n  learning_rate: " + change.partition("=")[2] + "\n"
    assert load(in_file).train.learning_rate == expected


def test_changes_reach_lists_nested_sections_and_switches(load: Callable[..., Pipeline]) -> None:
    pipeline = load(
        SMALL,
        "audit.allow=[Arthur, the]",
        "audit.limits.q=0.01",
        "dedupe.exact=false",
        "kind=chat",
        "train.max_steps=5",
    )
    assert pipeline.audit.allow == ["Arthur", "the"]
    assert (pipeline.audit.limits.q, pipeline.dedupe.exact, pipeline.kind) == (0.01, False, "chat")
    assert pipeline.train.max_steps == 5


def test_a_value_may_hold_an_equals_sign(load: Callable[..., Pipeline]) -> None:
    assert load(SMALL, "precompute.model=a=b").precompute.model == "a=b"


def test_an_option_replaces_the_key_of_the_file_and_none_leaves_it(load: Callable[..., Pipeline]) -> None:
    assert load(SMALL, dataset="there").dataset == "there"
    assert load(SMALL, dataset=None).dataset == "out"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("split.seed", ["--set split.seed is not a change", "section.key=value"]),
        ("=3", ["is not a change"]),
        ("split.test_shar=0.1", ["unknown key split.test_shar", "did you mean split.test_share?"]),
        ("split.test_share=2", ["split.test_share = 2", "less than or equal to 1"]),
        ("train.beta=[", ["train.beta", "YAML"]),
        ("dataset.x=1", ["dataset is not a section"]),
        ("train.beta.x=3", ["train.beta"]),
        ("split=3", ["split = 3"]),
        ("train.beta=", ["train.beta"]),
    ],
)
def test_a_change_that_cannot_be_followed_is_refused_and_says_that_it_came_from_set(
    change: str, said: list[str], load: Callable[..., Pipeline]
) -> None:
    error = refusal(load, SMALL, change)
    assert [part for part in said if part not in str(error)] == []
    assert "--set" in error.where + error.message


def test_every_configuration_error_ends_a_command_with_2() -> None:
    assert issubclass(ConfigError, InputError)
    assert ConfigError("x").exit_code == 2


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"columns": {"prompt": "q"}}, "columns: needs format:, as it is the format that says what they mean"),
        ({"rules": [{"pattern": "a"}]}, "rules: needs format:"),
        ({"format": "shp", "direction": "lower_is_better"}, "direction: lower_is_better has no effect on shp"),
        ({"format": "trl", "labels": {"a": [1], "b": [2]}}, "labels: has no effect on trl: it is for comparisons"),
        ({"format": "rewrite"}, "format: rewrite needs rules:"),
        ({"format": "pairs", "rules": [{"pattern": "a"}]}, "format: pairs takes no rules:, format: rewrite does"),
        ({"format": "shp", "columns": {"prompt": "q"}}, "columns.prompt: shp has its own names, which are not mapped"),
        ({"format": "pairs", "columns": {"chosen": ["a", "b"]}}, "columns.chosen: takes one path; several are for"),
        ({"format": "pairs", "columns": {"chosen": None}}, "columns.chosen: pairs cannot do without it"),
        (
            {"format": "comparisons", "columns": {"response_a": None}},
            "columns.response_a: comparisons cannot do without",
        ),
        ({"format": "openrlhf", "columns": {"rejected": None}}, "columns.rejected: openrlhf cannot do without it"),
        ({"format": "comparisons", "labels": {"a": [1], "b": ["1"]}}, "labels: 1 is given twice"),
        ({"format": "rewrite", "rules": [{"replace": "x"}]}, "a rewrite rule has either pattern: or function:"),
        ({"format": "rewrite", "rules": [{"function": "words"}]}, "rules.function: words is not module:function"),
        (
            {"format": "rewrite", "rules": [{"function": "a:b", "replace": "x"}]},
            "replace: and ignore_case: have no effect on a rule with function:",
        ),
        ({"format": "rewrite", "rules": [{"pattern": "(a"}]}, "rules.pattern '(a' with replace ''"),
        ({"format": "rewrite", "rules": [{"pattern": "(a)", "replace": "\\2"}]}, "invalid group reference 2"),
        (
            {"format": "rewrite", "rules": [{"pattern": "a", "replace": "\ud800"}]},
            "sources[0].rules[0].replace holds half a character",
        ),
        ({"format": "rewrite", "rules": [{"pattern": "\udfff"}]}, "sources[0].rules[0].pattern holds half a character"),
        ({"format": "rewrite", "rules": [{"pattern": ""}]}, "rules.pattern: an empty one matches everywhere"),
        (
            {"format": "rewrite", "rules": [{"pattern": "a", "gone": ["b", "c\ud800"]}]},
            "sources[0].rules[0].gone[1] holds half a character",
        ),
    ],
)
def test_what_a_source_cannot_mean_is_refused_in_words(
    source: dict[str, Any], said: str, pipeline_of: Callable[..., Pipeline]
) -> None:
    with pytest.raises(ConfigError) as raised:
        pipeline_of({"path": "a.jsonl", **source})
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"pairs": {"rejected": "second"}}, "pairs.rejected: second is not worst, random, all or sigma:K (sigma:2)"),
        ({"pairs": {"rejected": "sigma:"}}, "pairs.rejected: sigma: is not worst"),
        ({"pairs": {"min_margin": 2, "max_margin": 1}}, "pairs.max_margin must not be below pairs.min_margin"),
        ({"build": {"memory_limit": "lots"}}, "build.memory_limit: lots is not a size such as 500MB or 4GB"),
        ({"build": {"memory_limit": "0KB"}}, "build.memory_limit: 0KB is not between 1MB and 1000000GB"),
        ({"build": {"memory_limit": "999KB"}}, "build.memory_limit: 999KB is not between 1MB and 1000000GB"),
        ({"build": {"memory_limit": f"{'9' * 400}GB"}}, "9GB is not between 1MB and 1000000GB"),
        ({"audit": {"memory_limit": "lots"}}, "audit.memory_limit: lots is not a size such as 500MB or 4GB"),
        ({"audit": {"allow": ["re:("]}}, "audit.allow 're:(': missing ), unterminated subpattern"),
        ({"audit": {"allow": ["re:"]}}, "audit.allow: re: without a pattern matches no token"),
        (
            {"audit": {"allow_features": ["zz"]}},
            "no feature of the structure table; there are words, characters, lines",
        ),
        ({"audit": {"allow": [" "]}}, "audit.allow: ' ' holds no word and no sign"),
        (
            {"audit": {"allow_features": ["list_item"]}},
            "audit.allow_features: list_item is no feature of the structure table; did you mean list_items?",
        ),
        (
            {"audit": {"limits": {"probe_note": 0.8}}},
            "audit.limits: probe_note, probe_warn, probe_fail must not fall",
        ),
        (
            {"audit": {"limits": {"q": 0.0005}}},
            "audit.num_flips: too few for audit.limits.q: nothing could be confirmed",
        ),
        ({"audit": {"limits": {"warn_win_rate": 0.6}}}, "audit.limits: win_rate, warn_win_rate must not fall"),
    ],
)
def test_what_a_section_cannot_mean_is_refused_in_words(
    sections: dict[str, Any], said: str, pipeline_of: Callable[..., Pipeline]
) -> None:
    with pytest.raises(ConfigError) as raised:
        pipeline_of({"path": "a.jsonl", "format": "pairs"}, **sections)
    assert said in str(raised.value)


def test_a_memory_limit_is_a_number_of_bytes(pipeline_of: Callable[..., Pipeline]) -> None:
    for text, wanted in (
        ("500MB", 500_000_000),
        ("1.5 gb", 1_500_000_000),
        ("2000KB", 2_000_000),
        ("1MB", 1_000_000),
        ("1000000GB", 10**15),
    ):
        made = pipeline_of({"path": "a.jsonl", "format": "pairs"}, build={"memory_limit": text})
        assert made.build.num_bytes() == wanted


def test_what_a_record_may_lack_is_left_out_by_null(pipeline_of: Callable[..., Pipeline]) -> None:
    for form, name in (("trl", "prompt"), ("pairs", "weight"), ("comparisons", "score_a"), ("candidates", "responses")):
        made = pipeline_of({"path": "a.jsonl", "format": form, "columns": {name: None}})
        assert made.sources[0].columns == {name: ""}


@pytest.mark.parametrize("form", [form for form in FORMATS.values() if "prompt" in form.columns])
def test_every_format_whose_prompt_may_be_mapped_reads_one_of_several_paths(
    form: Format, pipeline_of: Callable[..., Pipeline]
) -> None:
    rules = {"rules": [{"pattern": "x"}]} if form.family == "responses" else {}
    columns = {"prompt": ["a", "b"]}
    source = pipeline_of({"path": "a.jsonl", "format": form.name, "columns": columns, **rules}).sources[0]
    row = dict.fromkeys(form.required, "y") | {"a": "one", "b": "two", "score": 1, "winner": "a", "scores": [1]}
    (record,) = form.read({name: value for name, value in row.items() if name != "prompt"}, source.columns)
    assert record["prompt"] == "one\ntwo"


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [
        ('dataset: "d\\ud800"\nsources: [{path: a, format: hh}]\n', 1, "dataset"),
        ('dataset: d\naudit:\n  allow: [a, "\\udc00"]\nsources: [{path: a, format: hh}]\n', 3, "audit.allow[1]"),
    ],
)
def test_half_a_character_is_refused_with_its_line_and_key(text: str, line: int, key: str, tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as raised:
        load_pipeline(path)
    assert raised.value.message == f"{key} holds half a character (a lone surrogate)"
    assert raised.value.where == f"{path}:{line}"
