"""An evaluation at work: responses, scores, KL, held-out pairs and texts, one after the other.

Comes in: a plan. Goes out: the files of evaluation_tables.py. Responses lie in folders of their own, which evaluations
of several runs share; whatever took a model's time is written as it is done, and evaluation.json last, so that a kill
costs what was at work.
"""

import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from prefkit import __version__
from prefkit.budget import CPU_BATCH_TOKENS, measure_budget
from prefkit.candidate_folder import read_candidates
from prefkit.completions import compare_models, load_for_scoring
from prefkit.encode import resolve_template
from prefkit.errors import DatasetError, Interrupted
from prefkit.evaluation_plan import (
    OTHER,
    POLICY,
    REFERENCE,
    Plan,
    sampling,
    train_settings,
    why_not_held_out,
)
from prefkit.evaluation_tables import kept
from prefkit.format import EVALUATION_JSON, EVALUATION_PROMPTS, EVALUATION_SUMMARY, Kind, reference_key
from prefkit.held_out import accuracies, held_out_metrics, num_trained, test_rows
from prefkit.judge import compare_responses
from prefkit.locks import is_held
from prefkit.logps import CompletionLogps
from prefkit.measures import (
    CHOSEN,
    Row,
    Summary,
    Unscored,
    headline,
    kl_rows,
    length_rows,
    longest_of,
    prompt_rows,
    response_rows,
    reward_rows,
    summary_frame,
    summary_row,
    unscored,
    warnings_of,
    win_rows,
)
from prefkit.models import load_tokenizer, pick_device
from prefkit.perplexity import TEXTS, encode_texts, perplexities, text_nlls
from prefkit.prompts import read_texts
from prefkit.sample import draw_samples
from prefkit.sample_format import SAMPLES
from prefkit.sample_settings import SampleConfig, ScorerConfig
from prefkit.schedule import Limits
from prefkit.scorers import OpenScorer, open_scorer, score_rows
from prefkit.store import write_json
from prefkit.tables import read_table, write_parquet
from prefkit.win_rates import matched, wins_by_score, wins_by_verdict

Tell = Callable[[str], None]
Watch = Callable[[int, int], None]
Stop = Callable[[], bool]
Scores = dict[str, dict[str, pl.DataFrame]]  # scorer -> role -> prompt_id, score
SCORES = "scores"  # beside the folders of responses
WAIT = 1.0  # seconds between two looks at a folder that another prefkit samples into
VERDICT_COLUMNS = ("prompt_id", "number", "winner", "log_odds_ab", "log_odds_ba")


class Done(NamedTuple):
    """A finished evaluation: evaluation.json, and the table `evaluations`."""

    document: dict[str, Any]
    summary: pl.DataFrame


class Samples(NamedTuple):
    """Responses of a model: the hashes of their files, and a row each."""

    parts: list[str]
    table: pl.DataFrame


class Evaluation:
    """One evaluation at work: what it has found so far, and what it had to leave out."""

    def __init__(self, plan: Plan, tell: Tell, watch: Watch, stop: Stop) -> None:
        self.plan, self.tell, self.watch, self.stop = plan, tell, watch, stop
        self.settings = plan.settings
        self.confidence = plan.settings.confidence
        self.scorers = [open_scorer(config, plan.kind, tell) for config in plan.settings.scorers]
        self.rows: list[Row] = []
        self.prompts: list[pl.DataFrame] = []
        self.left_out: dict[str, str] = {}
        self.folders: list[dict[str, Any]] = []
        self.unscored: dict[str, list[Unscored]] = {}  # scorer -> of each model and temperature
        self.warnings: list[dict[str, str]] = []  # of what was asked, beside those that the figures give
        self.kind = plan.kind

    def run(self) -> Done:
        """All stages; each writes what took a model's time before the next begins."""
        for temperature in self.settings.temperatures:
            self._at(temperature)
        self._warn_of_trained("trained_prompts", "prompts", self.prompts[0]["prompt_id"])
        self._held_out()
        self._perplexity()
        return self._write()

    def _at(self, temperature: float) -> None:
        """Everything that is measured on responses sampled at one temperature."""
        samples = {role: self._sampled(role, temperature) for role in self.plan.models}
        tables = {role: folder.table for role, folder in samples.items()}
        for role, table in tables.items():
            self.rows += response_rows(role, temperature, table, self.confidence)
        if REFERENCE in tables:
            self.rows += length_rows(temperature, tables[POLICY], tables[REFERENCE], self.confidence)
        scores, wins = self._rewards(temperature, samples)
        wins |= self._judged(temperature, tables)
        for scorer, found in wins.items():
            self.rows += win_rows(temperature, scorer, found, self.confidence)
        kl = self._kl(temperature, tables)
        if kl is not None:
            self.rows += kl_rows(temperature, kl, self.confidence)
        self.prompts.append(prompt_rows(temperature, self.kind, tables, scores, wins, kl))

    def _sampled(self, role: str, temperature: float) -> Samples:
        """The responses of one model, drawn unless they lie there."""
        settings = sampling(self.plan, role, temperature)
        out = Path(str(settings.out))
        self.tell(f"sampling {role} at temperature {temperature:g}")
        while not self._drawn(settings):
            self.tell(f"waiting for another prefkit that samples into {out}")
            self._check_stop()
            time.sleep(WAIT)
        self._check_stop()
        place = os.path.relpath(out.resolve(), self.plan.folder.resolve())
        self.folders.append({"role": role, "temperature": temperature, "folder": Path(place).as_posix()})
        candidates = read_candidates(out)
        parts = [part["sha256"] for part in candidates.document["parts"][SAMPLES]]
        return Samples(parts, candidates.samples)

    def _drawn(self, settings: SampleConfig) -> bool:
        """Sample what is missing; False where another prefkit samples into the folder.

        Evaluations of a sweep share their reference's responses. The lock is taken by the sampling itself, so that
        nobody can take it between a look at it and the work.
        """
        try:
            draw_samples(
                settings,
                model=Path(str(settings.model)),
                kind=self.plan.kind,
                chat_template=self.plan.template,
                section="evaluate",
                tell=self.tell,
                watch=lambda *done: self.watch(int(done[0]), int(done[1])),
                stop=self.stop,
            )
        except DatasetError as error:
            if not is_held(error):
                raise
            return False
        return True

    def _check_stop(self) -> None:
        if self.stop():
            raise Interrupted("stopped; what is sampled and scored is on disk", where=str(self.plan.folder))

    def _rewards(self, temperature: float, samples: Mapping[str, Samples]) -> tuple[Scores, dict[str, pl.DataFrame]]:
        """Scores of all pointwise scorers, and the wins by them; rows of both go to the summary."""
        if not self.settings.scorers:
            self.left_out["reward"] = "no scorer: evaluate.scorers, or --scorer"
        elif REFERENCE not in samples:
            none = "no reference model: --reference, evaluate.reference or precompute.model"
            self.left_out["gain"] = self.plan.no_reference or none
        found: Scores = {}
        wins: dict[str, pl.DataFrame] = {}
        for scorer in self.scorers:
            if scorer.config.kind == "judge":
                continue
            label = scorer.config.label
            of = {role: self._scored(scorer, role, temperature, sampled) for role, sampled in samples.items()}
            chosen = self._chosen(samples[POLICY].table)
            if chosen is not None:
                of[CHOSEN] = score_rows(chosen, scorer, tell=self.tell, watch=self._look).select("prompt_id", "score")
            found[label] = of
            self.rows += reward_rows(temperature, label, of, self.confidence)
            rival = self._rival(of)
            if rival is not None:
                wins[label] = wins_by_score(of[POLICY], of[rival])
        return found, wins

    def _scored(self, scorer: OpenScorer, role: str, temperature: float, sampled: Samples) -> pl.DataFrame:
        """prompt_id and score of every response; kept beside the responses, for the other runs of a sweep."""
        # the files, not the sampler's key: that says nothing of the prompts, nor of their right answers
        name = reference_key({"samples": sampled.parts, "scorer": scorer.identity})

        def score() -> pl.DataFrame:
            self.tell(f"{scorer.config.label} scores {role} at temperature {temperature:g}")
            scored = score_rows(sampled.table, scorer, tell=self.tell, watch=self._look)
            self._check_stop()
            return scored.select("prompt_id", "number", "score", "reason")

        path = self.plan.samples / SCORES / f"{name}.parquet"
        rows = kept(path, sampled.table.select("prompt_id", "number"), score)
        self.unscored.setdefault(scorer.config.label, []).append(unscored(rows, sampled.table))
        return rows

    def _look(self, *done: int) -> None:
        self.watch(done[0], done[1])

    def _rival(self, of: Mapping[str, Any]) -> str | None:
        """Whose responses the policy's are compared with; None where there are none."""
        rival = {"reference": REFERENCE, "chosen": CHOSEN}.get(self.settings.against, OTHER)
        if rival in of:
            return rival
        none = self.plan.no_reference or "no reference model"
        missing = "no chosen side of these prompts" if rival == CHOSEN else none
        self.left_out["win_rate"] = f"{missing} to compare with (evaluate.against: {self.settings.against})"
        return None

    def _chosen(self, table: pl.DataFrame) -> pl.DataFrame | None:
        """The chosen sides of the dataset for these prompts, as rows to score; None where they are not wanted."""
        if self.settings.against != "chosen" or self.plan.held is None:
            return None
        pairs = read_table(self.plan.held.folder, "pairs", self.plan.held.manifest)
        asked = table.select("prompt_id", "prompt", "reference", "tools").unique("prompt_id", maintain_order=True)
        said = pairs.select("prompt_id", response=_last_text(self.kind)).unique(maintain_order=True)
        met = asked.join(said, on="prompt_id", how="inner", maintain_order="left_right")
        return None if met.is_empty() else met

    def _judged(self, temperature: float, tables: Mapping[str, pl.DataFrame]) -> dict[str, pl.DataFrame]:
        """What judges say of the policy's responses against those of the same number; kept in verdicts-*.parquet."""
        judges = [scorer.config for scorer in self.scorers if scorer.config.kind == "judge"]
        if not judges:
            return {}
        chosen = self._chosen(tables[POLICY])
        sides = {**tables, **({} if chosen is None else {CHOSEN: chosen})}
        rival = self._rival(sides)
        if rival is None:
            return {}
        met = matched(tables[POLICY], sides[rival])
        found = {}
        for judge in judges:

            def compare(judge: ScorerConfig = judge) -> pl.DataFrame:
                self.tell(f"{judge.label} compares responses at temperature {temperature:g}")
                verdicts = compare_responses(judge, met, tell=self.tell, watch=self._look)
                self._check_stop()
                return verdicts.select(name for name in VERDICT_COLUMNS if name in verdicts.columns)

            path = self.plan.folder / f"verdicts-{judge.label}-{temperature:g}.parquet"
            found[judge.label] = wins_by_verdict(kept(path, met.select("prompt_id", "number"), compare))
        return found

    def _kl(self, temperature: float, tables: Mapping[str, pl.DataFrame]) -> pl.DataFrame | None:
        """Both models' log-probs of the policy's responses; kept in kl.parquet."""
        if temperature != 1:
            if 1.0 not in self.settings.temperatures:
                self.left_out["kl"] = "the responses of temperature 1 alone are the model's own: evaluate.temperatures"
            return None
        models = self.plan.models
        if REFERENCE not in models:
            self.left_out["kl"] = self.plan.no_reference or "no reference model"
        elif self.settings.top_p < 1:
            self.left_out["kl"] = "evaluate.top_p leaves out tokens: the responses are not the model's own"
        elif len({models[role].identity["tokenizer_sha256"] for role in (POLICY, REFERENCE)}) > 1:
            self.left_out["kl"] = "the reference has another tokenizer"
        elif (longest := longest_of(tables[POLICY])) > (most := self.plan.positions((REFERENCE,)) or longest):
            self.left_out["kl"] = f"prompt and response have up to {longest} tokens, the reference has {most} positions"
        else:
            return self._compared(tables[POLICY])
        return None

    def _compared(self, table: pl.DataFrame) -> pl.DataFrame:
        keys = table.select("prompt_id", "number", "num_tokens")

        def compare() -> pl.DataFrame:
            prompts, responses = table["prompt_ids"].to_list(), table["response_ids"].to_list()
            longest = longest_of(table)
            self.tell("loading both models")
            policy, reference = (self._scorer(role, longest) for role in (POLICY, REFERENCE))
            self.tell("comparing both models")
            apart = compare_models(policy, reference, prompts, responses, self.watch)
            self._check_stop()
            sums = {
                name: [float(getattr(one, field).sum(dtype="float64")) for one in apart]
                for name, field in (("logps", "logps"), ("ref_logps", "ref_logps"), ("kl_exact", "kl"))
            }
            return keys.with_columns(pl.Series(name, values, pl.Float64) for name, values in sums.items())

        return kept(self.plan.folder / "kl.parquet", keys, compare)

    def _scorer(self, role: str, longest: int) -> CompletionLogps:
        return load_for_scoring(self.plan.models[role].folder, self.settings.dtype, longest, self.tell)

    def _warn(self, name: str, text: str) -> None:
        self.warnings.append({"name": name, "text": text})
        self.tell(text)

    def _warn_of_trained(self, name: str, of: str, asked: pl.Series) -> None:
        """Of prompts that the run was trained on: a gain there need be none elsewhere."""
        if self.plan.trained_on is not None and (count := num_trained(asked, self.plan.trained_on)):
            which = f"{count} of {asked.n_unique()} {of} are ones that the run was trained on"
            self._warn(name, f"{which}: figures on others may be lower")

    def _held_out(self) -> None:
        """Accuracy and margin on the test split, without a reference model; kept in held_out.parquet."""
        held = self.plan.held
        if (why := why_not_held_out(self.plan)) is not None:
            self.left_out["held_out"] = why
            return
        assert held is not None
        assert held.key is not None
        assert held.recorded is not None
        identity = held.recorded["identity"]
        rows = test_rows(held.folder, held.manifest, held.key, held.recorded)
        if rows.is_empty():
            self.left_out["held_out"] = "the dataset has no test split"
            return
        self._warn_of_trained("trained_held_out", "held-out prompts", rows["prompt_id"])

        def score() -> pl.DataFrame:
            folder = self.plan.models[POLICY].folder
            scorer = load_for_scoring(folder, identity["dtype"], identity["max_length"], self.tell)
            self.tell("scoring held-out pairs")
            longest = int(rows.select(pl.sum_horizontal("^num_.*_tokens$").max()).item())
            budget = CPU_BATCH_TOKENS if pick_device().type == "cpu" else measure_budget(scorer, longest)
            found = held_out_metrics(
                scorer,
                rows,
                train_settings(self.plan.run, held),
                Limits(None, budget),
                self.watch,
                (self.plan.run or {}).get("steps"),
            )
            self._check_stop()
            return found.pairs

        pairs = kept(self.plan.folder / "held_out.parquet", rows.select("pair_id", "prompt_id"), score)
        self.rows += [summary_row(POLICY, name, measured) for name, measured in accuracies(pairs, self.confidence)]

    def _perplexity(self) -> None:
        """Perplexity of held-out texts under both models; kept in texts.parquet."""
        if self.settings.texts is None:
            self.left_out["perplexity"] = "no texts: evaluate.texts"
            return
        tokenizer = load_tokenizer(self.plan.models[POLICY].folder)
        texts, rejects, _ = read_texts(self.settings.texts, self.kind)
        template = resolve_template(self.kind, self.plan.template, tokenizer)
        same = {self.plan.models[role].identity["tokenizer_sha256"] for role in self._both()}
        roles = self._both() if len(same) == 1 else (POLICY,)
        encoded, dropped = encode_texts(texts, tokenizer, self.kind, template, self.plan.positions(roles))
        dropped = Counter(dropped) + Counter(rejects["reason"].to_list())
        if dropped:
            reasons = ", ".join(f"{dropped[name]} {name}" for name in sorted(dropped))
            of = f"{dropped.total()} of {texts.height + rejects.height} texts"
            self._warn("texts_dropped", f"{of} are left out of the perplexity: {reasons}")
        lengths = encoded.select(pl.col("prompt_ids").list.len() + pl.col("response_ids").list.len()).to_series()

        def score() -> pl.DataFrame:
            if encoded.is_empty():
                return pl.DataFrame(schema=TEXTS)
            longest = int(lengths.max())  # type: ignore[arg-type]
            nlls = text_nlls(encoded, {role: self._scorer(role, longest) for role in roles}, self.tell, self.watch)
            self._check_stop()
            return nlls

        nlls = kept(self.plan.folder / "texts.parquet", encoded.select("text"), score)
        if nlls.is_empty():
            self.left_out["perplexity"] = "none of evaluate.texts has a reference that can be encoded"
        found = perplexities(nlls, self.confidence)
        self.rows += [summary_row(role, metric, measured) for role, metric, measured in found]

    def _both(self) -> tuple[str, ...]:
        return tuple(role for role in (POLICY, REFERENCE) if role in self.plan.models)

    def _write(self) -> Done:
        plan = self.plan
        table = summary_frame(self.rows)
        summary = Summary(table)
        parts = [
            write_parquet(plan.folder / EVALUATION_SUMMARY, table),
            write_parquet(plan.folder / EVALUATION_PROMPTS, pl.concat(self.prompts)),
        ]
        document = {
            "key": plan.key,
            "identity": plan.identity,
            "model": plan.models[POLICY].folder,
            "reference": plan.models[REFERENCE].folder if REFERENCE in plan.models else None,
            "dataset": None if plan.held is None else str(plan.held.folder),
            "against": self.settings.against,
            "settings": self.settings.model_dump(mode="json"),
            "samples": self.folders,
            "headline": headline(summary, self.settings.temperatures),
            "left_out": dict(sorted(self.left_out.items())),
            "warnings": warnings_of(summary, self.unscored) + self.warnings,
            "prefkit_version": __version__,
            "parts": [part._asdict() for part in parts],
        }
        write_json(plan.folder / EVALUATION_JSON, document)
        return Done(document, table)


def _last_text(kind: Kind) -> pl.Expr:
    """The text of a chosen side: in a chat dataset of its last message."""
    return pl.col("chosen") if kind == "text" else pl.col("chosen").list.last().struct.field("content")
