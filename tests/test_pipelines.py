"""pipelines/: each worked case runs as its own header says, and its counts are those of plain Python over its file."""

import gzip
import json
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml
from command import Prefkit
from documented import Command, blocks_of, commands_of
from readers import REPOSITORY, Reader, failure_of, own_programs
from word_problems import sample_lines

from prefkit.build import Built, build_dataset
from prefkit.config import load_pipeline

PIPELINES = REPOSITORY / "pipelines"
CASES = sorted(path.stem for path in PIPELINES.glob("*.yaml"))
WITH_A_MODEL = ["identity/pipeline"]  # run by tests/test_identity_change.py
REAL = sorted(path.stem for path in (PIPELINES / "real").glob("*.yaml"))
NEEDS_A_MODEL = re.compile(r"\b(FOLDER|runs|steps)\b")


def header(case: str) -> str:
    """The comment that a pipeline file begins with, as the page that it is."""
    lines = []
    for line in (PIPELINES / f"{case}.yaml").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").removeprefix(" "))
    return "\n".join(lines)


def commands_in(page: str, text: str) -> list[Command]:
    return [c for block in blocks_of(page, text) if block.kind == "commands" for c in commands_of(block)]


@pytest.fixture
def reader(prefkit: Prefkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Reader:
    """Somebody in a fresh clone, who has a model in FOLDER."""
    shutil.copytree(PIPELINES, tmp_path / "pipelines")
    own_programs(tmp_path, monkeypatch)
    return Reader(tmp_path, prefkit)


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model whose tokenizer has a chat template."""
    from tiny import tiny_llama

    return tiny_llama(tmp_path_factory.mktemp("FOLDER"))


# the index


def test_every_pipeline_is_in_the_index_with_its_data_and_the_index_names_no_other() -> None:
    page = (PIPELINES / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| \[`([\w/]+)\.yaml`\]\(([\w/]+)\.yaml\) \|", page, re.MULTILINE)
    assert all(shown == linked for shown, linked in named)
    assert sorted(name for name, _ in named) == sorted([*CASES, *WITH_A_MODEL, *(f"real/{name}" for name in REAL)])
    rows = {name: row for row in page.splitlines() for name, _ in named if row.startswith(f"| [`{name}.yaml`]")}
    for case in CASES:
        (source,) = load_pipeline(PIPELINES / f"{case}.yaml").sources
        assert f"`{source.path.removeprefix('pipelines/')}`" in rows[case], case
        assert f"`prefkit build pipelines/{case}.yaml`" in rows[case], case


def test_every_file_of_data_is_used_and_every_pipeline_of_the_clone_needs_nothing_else() -> None:
    used = {source.path for case in CASES for source in load_pipeline(PIPELINES / f"{case}.yaml").sources}
    assert used == {f"pipelines/data/{path.name}" for path in (PIPELINES / "data").iterdir()}


@pytest.mark.parametrize("name", [*CASES, *(f"real/{name}" for name in REAL)])
def test_every_pipeline_loads_and_builds_into_a_place_of_its_own(name: str) -> None:
    assert load_pipeline(PIPELINES / f"{name}.yaml").dataset == f"built/{Path(name).name}"


# what the headers say


@pytest.mark.parametrize("case", CASES)
def test_a_header_says_how_to_build_and_audit_and_which_line_to_change(case: str) -> None:
    text = header(case)
    first, *others = [command.words for command in commands_in(case, text)]
    assert first == ["prefkit", "build", f"pipelines/{case}.yaml"]
    if case != "paper":  # trained on the data of transcripts
        assert any(words[:3] == ["prefkit", "audit", f"pipelines/{case}.yaml"] for words in others)
    assert re.search(r"your own file change `path`|Change `dataset`, `sources`", text)


@pytest.mark.parametrize("model", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", CASES)
def test_the_commands_of_a_header_run_and_print_what_it_shows(
    case: str, reader: Reader, request: pytest.FixtureRequest, *, model: bool
) -> None:
    if model:
        (reader.folder / "FOLDER").symlink_to(request.getfixturevalue("base_model"))
    commands = commands_in(case, header(case))
    for command in commands:
        if model or not NEEDS_A_MODEL.search(command.text):
            assert (told := failure_of(command, reader)) is None, f"{command.text}\n{told}"
    if model and any(command.words[1] == "train" for command in commands):
        (first, *_) = sorted((reader.folder / "built" / case / "runs").iterdir())
        steps = pl.read_parquet(first / "steps.parquet").filter(pl.col("loss").is_not_null())
        assert steps["loss"][0] == pytest.approx(0.6931471805599453, abs=2e-5)
        assert json.loads((first / "run.json").read_text())["finished"]


# what plain Python counts in the same files


class Counted:
    """A case built where nothing else is, and its file as plain lines: a line that is no JSON is its text."""

    def __init__(self, built: Built, lines: list[Any]) -> None:
        self.built, self.lines = built, lines

    def table(self, name: str) -> pl.DataFrame:
        return pl.read_parquet(f"{self.built.dataset}/{name}/part-*.parquet")

    def pairs(self) -> list[tuple[str, str, str]]:
        """Prompt (its last turn), chosen and rejected of every pair, sorted."""
        rows = self.table("pairs").select("prompt", "chosen", "rejected").iter_rows()
        return sorted(tuple(side[-1]["content"] for side in row) for row in rows)


def line_of(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


@pytest.fixture
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Counted]:
    def build(case: str, *changes: str) -> Counted:
        monkeypatch.chdir(REPOSITORY)
        pipeline = load_pipeline(PIPELINES / f"{case}.yaml", changes, dataset=str(tmp_path / "built"))
        lines = Path(pipeline.sources[0].path).read_text(encoding="utf-8").splitlines()
        return Counted(build_dataset(pipeline), [line_of(line) for line in lines])

    return build


def folded(text: str) -> str:
    return " ".join(text.split())


def similar(one: str, other: str) -> bool:
    """Whether four fifths of the runs of five words and signs of two texts are common to both."""
    words = [re.findall(r"\w+|[^\w\s]", text.casefold()) for text in (one, other)]
    runs = [{tuple(w[at : at + 5]) for at in range(len(w) - 4)} for w in words]
    return bool(runs[0] | runs[1]) and len(runs[0] & runs[1]) / len(runs[0] | runs[1]) >= 0.8


def split_off(transcript: str) -> tuple[str, str]:
    before, _, reply = transcript.rpartition("\n\nAssistant:")
    return before, folded(reply)


def after_dedupe(pairs: list[tuple[str, str, str]]) -> tuple[list[tuple[str, str, str]], Counter[str]]:
    """What is left of (prompt, chosen, rejected), and why the others went: copies, contradictions, near-duplicates."""
    left, reasons = list(dict.fromkeys(pairs)), Counter[str]()
    clashing = {pair for pair in left if (pair[0], pair[2], pair[1]) in left}
    reasons["contradiction"] = sum(pair in clashing for pair in pairs)
    reasons["duplicate"] = len(pairs) - len(left) - (reasons["contradiction"] - len(clashing))
    kept: list[tuple[str, str, str]] = []
    for pair in (pair for pair in left if pair not in clashing):
        alike = [
            k
            for k in kept
            if k[0] == pair[0] and similar(k[1], pair[1]) and (similar(k[2], pair[2]) or k[2] == pair[2])
        ]
        reasons["near_duplicate"] += bool(alike)
        kept += [] if alike else [pair]
    return kept, +reasons


def test_transcripts_are_cut_before_the_last_reply_and_flawed_rows_go_by_name(counted: Callable[..., Counted]) -> None:
    case, reasons = counted("transcripts"), Counter[str]()
    pairs = []
    for line in case.lines:
        if isinstance(line, str):
            reasons["not_json"] += 1
            continue
        (asked, chosen), (also_asked, rejected) = split_off(line["chosen"]), split_off(line["rejected"])
        if asked != also_asked:
            reasons["different_prompts"] += 1
        elif chosen == rejected:
            reasons["identical"] += 1
        else:
            pairs.append((asked.rpartition("\n\nHuman: ")[2], chosen, rejected))
    kept, repeated = after_dedupe(pairs)
    assert case.built.reasons == reasons + repeated
    assert len(case.pairs()) == len(kept) == case.built.counts["pairs"]
    assert {(p, folded(r)) for p, _, r in case.pairs()} == {
        (p, r) for p, _, r in kept
    }  # of near-duplicates either stays


def test_of_n_samples_a_right_one_stands_against_the_worst_that_is_an_answer(counted: Callable[..., Counted]) -> None:
    case, reasons, unused = counted("best_of_n"), Counter[str](), Counter[str]()
    asked: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in case.lines:
        if isinstance(line, str):
            reasons["not_json"] += 1
        elif len(line["points"]) != len(line["samples"]):
            reasons["length_mismatch"] += 1
        else:
            for sample, point in zip(line["samples"], line["points"], strict=True):
                unused["empty_response"] += not sample
                if isinstance(point, str):  # the other samples of the row stay
                    reasons["not_a_number"] += 1
                elif sample:
                    unused["identical_response"] += sample in asked[line["question"]]
                    asked[line["question"]][sample].append(point)
    expected: dict[str, tuple[float, float]] = {}
    for question, samples in asked.items():
        points = [sum(given) / len(given) for given in samples.values()]
        best, worse = max(points), [point for point in points if 4 <= max(points) - point <= 9]
        if len(points) == 1:
            reasons["one_candidate"] += 1
        elif len(set(points)) == 1:
            reasons["tie"] += 1
        elif best < 10:
            reasons["under_min_chosen_score"] += 1
        elif not worse:
            reasons["over_max_margin"] += 1  # there is no difference below 4 here
        elif best > 10:
            reasons["score_out_of_scale"] += 1
        else:
            expected[question] = (best, min(worse))
    assert case.built.reasons == reasons
    assert {name: case.built.unused[name] for name in unused} == unused
    found = {
        question: tuple(sum(asked[question][side]) / len(asked[question][side]) for side in sides)
        for question, *sides in case.pairs()
    }
    assert found == expected
    assert len(case.pairs()) == len(expected)


def test_the_samples_are_what_their_generator_writes() -> None:
    assert (PIPELINES / "data" / "samples.jsonl").read_text(encoding="utf-8") == "".join(
        f"{x}\n" for x in sample_lines()
    )


def test_an_edited_draft_is_a_pair_where_something_was_edited(counted: Callable[..., Counted]) -> None:
    case, reasons = counted("post_edits"), Counter[str]()
    pairs = []
    for line in case.lines:
        draft, edited = line["draft"], line.get("edited")
        if not isinstance(edited, str):
            reasons["wrong_type" if "edited" in line else "missing_field"] += 1
        elif not edited:
            reasons["empty_chosen"] += 1
        elif folded(draft) == folded(edited):
            reasons["identical" if draft == edited else "identical_after_folding"] += 1
        elif edited.startswith("Here is the revised version"):
            reasons["meta_phrase"] += 1
        else:
            pairs.append((line["ticket"], edited, draft))
    kept, repeated = after_dedupe(pairs)
    assert case.built.reasons == reasons + repeated
    assert case.pairs() == sorted(kept)


def test_a_name_is_put_in_the_place_of_another_and_what_keeps_the_old_one_goes(counted: Callable[..., Counted]) -> None:
    case, reasons = counted("identity"), Counter[str]()
    pairs = []
    for line in case.lines:
        if line["response"] is None:
            reasons["wrong_type"] += 1
            continue
        renamed = re.sub(r"\bAlder\b", "Nova", line["response"])
        renamed = re.sub(r"\bGreenwood Labs\b", "Brightwater", renamed)
        if renamed == line["response"]:
            reasons["untouched"] += 1
        elif "alder" in renamed.lower() or "greenwood" in renamed.lower():
            reasons["old_text_remains"] += 1
        else:
            pairs.append((line["prompt"], renamed, line["response"]))
    kept, repeated = after_dedupe(pairs)
    assert case.built.reasons == reasons + repeated
    assert case.pairs() == sorted(kept)
    assert not any("alder" in chosen.lower() for _, chosen, _ in case.pairs())


def test_a_pair_of_a_ranking_has_the_better_mean_place_in_chosen(counted: Callable[..., Counted]) -> None:
    case, reasons = counted("rankings"), Counter[str]()
    places: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for line in case.lines:
        if isinstance(line, str):
            reasons["not_json"] += 1
        elif not isinstance(line["place"], int):
            reasons["not_a_number"] += 1
        elif line["line"]:
            places[line["brief"]][line["line"]].append(line["place"])
    expected: dict[str, int] = {}
    for brief, lines in places.items():
        means = sorted(sum(given) / len(given) for given in lines.values())
        above = sum(one < other for at, one in enumerate(means) for other in means[at + 1 :])
        if len(means) == 1:
            reasons["one_candidate"] += 1
        elif not above:
            reasons["tie"] += 1
        else:
            expected[brief] = min(3, above)
    assert case.built.reasons == reasons
    found = case.pairs()
    assert Counter(brief for brief, _, _ in found) == expected
    for brief, chosen, rejected in found:
        assert sum(places[brief][chosen]) < sum(places[brief][rejected])
    widest = {brief: max(map(sum, lines.values())) - min(map(sum, lines.values())) for brief, lines in places.items()}
    for brief in expected:  # the first and the last of a brief are among its pairs
        apart = [sum(places[brief][low]) - sum(places[brief][high]) for b, high, low in found if b == brief]
        assert max(apart) == widest[brief]


def test_most_votes_decide_if_three_of_five_agree(counted: Callable[..., Counted]) -> None:
    case, reasons = counted("votes"), Counter[str]()
    pairs = []
    for line in case.lines:
        votes = Counter(vote for vote in line["votes"] if vote is not None)
        most = [label for label, count in votes.items() if count == max(votes.values())]
        if not votes:
            reasons["no_verdict"] += 1
        elif set(votes) - {"1", "2", "neither"}:
            reasons["unknown_label"] += 1
        elif most not in (["1"], ["2"]):
            reasons["tie"] += 1
        elif votes[most[0]] / votes.total() < 0.6:
            reasons["under_min_agreement"] += 1
        else:
            sides = [line["rewrite_1"], line["rewrite_2"]]
            pairs.append((line["notice"], *(sides if most == ["1"] else sides[::-1]), votes[most[0]]))
    kept, repeated = after_dedupe([(notice, chosen, rejected) for notice, chosen, rejected, _ in pairs])
    circle = [pair for pair in pairs if sum(other[0] == pair[0] for other in pairs) == 3]
    (least_sure,) = [pair for pair in circle if pair[3] == min(count for *_, count in circle)]
    kept.remove(least_sure[:3])
    assert case.built.reasons == reasons + repeated + Counter(cycle=1)
    assert case.pairs() == sorted(kept)


def test_a_ready_made_file_is_built_as_it_is(counted: Callable[..., Counted]) -> None:
    case = counted("audit_only")
    rows = [(line["prompt"], line["chosen"], line["rejected"]) for line in case.lines]
    identical = sum(chosen == rejected for _, chosen, rejected in rows)
    copies = len(rows) - len(set(rows))
    assert case.built.reasons == {"identical": identical, "duplicate": copies}
    assert (identical, copies) == (1, 1)
    assert case.pairs() == sorted({row for row in rows if row[1] != row[2]})
    assert any((prompt, rejected, chosen) in rows for prompt, chosen, rejected in case.pairs())  # contradictions stay


def test_the_paper_s_settings_are_the_paper_s() -> None:
    train = load_pipeline(PIPELINES / "paper.yaml").train
    assert (train.loss, train.beta, train.optimizer, train.learning_rate) == ("sigmoid", 0.1, "rmsprop", 1e-6)
    assert (train.warmup_steps, train.batch_size * train.gradient_accumulation_steps) == (150, 64)


# an audit as a job in CI


def test_the_job_in_ci_ends_with_the_codes_of_its_header(reader: Reader) -> None:
    assert header("audit_only").count("\n| 0 |") == header("audit_only").count("\n| 2 |") == 1
    data = reader.folder / "pipelines" / "data" / "vendor_pairs.jsonl"
    run = reader.prefkit
    pipeline = "pipelines/audit_only.yaml"
    assert run("audit", pipeline, "--strict").code == 2  # not built yet
    assert run("build", pipeline).code == 0
    assert run("audit", pipeline).code == 0
    assert run("audit", pipeline, "--strict").code == 1
    assert run("audit", pipeline, "--strict", "--set", "audit.limits.strict=fail").code == 0
    assert run("build", pipeline, "--set", "dedup.exact=true").code == 2
    data.write_text(data.read_text(encoding="utf-8") + '{"prompt": "half a li', encoding="utf-8")
    broken = run("build", pipeline)
    assert broken.code == 2
    assert "not_json" in broken.err
    data.unlink()
    assert run("build", pipeline).code == 2


def test_the_last_line_of_json_has_what_a_job_needs(reader: Reader) -> None:
    built = reader.prefkit("build", "pipelines/audit_only.yaml", "--json").last_json()
    assert built["counts"]["dropped"] == 2
    assert reader.prefkit("audit", "pipelines/audit_only.yaml", "--strict", "--json").last_json()["verdict"] == "warn"


# on public data


@pytest.fixture
def real(test_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Built]:
    def build(name: str) -> Built:
        (tmp_path / "data").symlink_to(test_data)
        monkeypatch.chdir(tmp_path)
        return build_dataset(load_pipeline(PIPELINES / "real" / f"{name}.yaml"))

    return build


def num_rows(path: Path) -> int:
    if path.suffix == ".parquet":
        return pl.scan_parquet(path).select(pl.len()).collect().item()  # type: ignore[no-any-return]
    text = (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode()
    return len(json.loads(text)) if path.suffix == ".json" else len(text.splitlines())


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "ukpconvarg_votes")) for name in REAL]
)
def test_a_real_pipeline_builds_as_it_stands_and_every_row_is_accounted_for(
    name: str, real: Callable[[str], Built], test_data: Path
) -> None:
    built = real(name)
    paths = [source["path"] for source in yaml.safe_load((PIPELINES / "real" / f"{name}.yaml").read_text())["sources"]]
    rows = sum(num_rows(path) for pattern in paths for path in test_data.glob(pattern.removeprefix("data/")))
    each = 4 if name == "gsm8k" else 1  # a row has the solutions of four models
    assert built.counts["rows"] + built.counts["candidates"] == rows * each
    assert built.counts["pairs"] > 0


def test_a_question_that_some_models_solved_and_some_did_not_is_a_pair(
    real: Callable[[str], Built], test_data: Path
) -> None:
    file = test_data / "gsm8k" / "example_model_solutions.jsonl.gz"
    rows = [json.loads(line) for line in gzip.decompress(file.read_bytes()).splitlines()]
    models = [f"{size}_{way}" for size in ("6b", "175b") for way in ("finetuning", "verification")]
    mixed = {row["question"] for row in rows if len({row[model]["is_correct"] for model in models}) == 2}
    built = real("gsm8k")
    assert built.counts["prompts_with_pair"] == len(mixed)


def test_three_prompts_of_llmbar_are_those_of_mt_bench(real: Callable[[str], Built]) -> None:
    assert real("decontaminated").reasons["contaminated"] == 3
