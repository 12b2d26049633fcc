"""What `prefkit repair` does to the pairs, in order: openers, tokens, lengths, shortcuts. Reads and writes no file.

Comes in: the pairs of a dataset and what is wanted. Goes out: the pairs that are left, and for every other or edited
pair a row that says which repair did what to it, and why.
"""

import shlex
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import polars as pl

from prefkit.audit.evidence import in_memory
from prefkit.audit.repair import SIDES, Signs, length_surplus, surplus, token_signs
from prefkit.audit.shortcuts import Seen, find_shortcuts, fit_probes, see_pairs
from prefkit.config import Pipeline
from prefkit.corrections import distances
from prefkit.errors import CheckError, DatasetError, InputError
from prefkit.format import Kind, schema
from prefkit.grams import words_in
from prefkit.openers import without_opener
from prefkit.text import printable, words_of

Tell = Callable[[str], None]
Named: TypeAlias = tuple[str, Any]  # a repair and its setting
Step: TypeAlias = dict[str, Any]  # repair, setting, dropped, edited, dropped_later: as the manifest lists it
GONE = pl.Schema(dict.fromkeys(("origin", "reason", "rule", "detail", "twin"), pl.String) | {"jaccard": pl.Float64})
DISTANCES = ("edit_distance", "shared_prefix", "first_divergence")


class Wanted(NamedTuple):
    """The repairs that are asked for, in the order in which they are made."""

    strip_openers: tuple[str, ...] = ()
    balance: tuple[str, ...] = ()
    match_length: bool = False
    drop_shortcuts: float | None = None
    max_dropped: float = 0.5

    def steps(self) -> list[Named]:
        """Name and setting of each."""
        return [
            *(("strip_opener", text) for text in dict.fromkeys(self.strip_openers)),
            *(("balance", token) for token in dict.fromkeys(self.balance)),
            *([("match_length", None)] if self.match_length else []),
            *([("drop_shortcuts", self.drop_shortcuts)] if self.drop_shortcuts is not None else []),
        ]

    def checked(self) -> "Wanted":
        """As it is, if something is asked for and every setting fits.

        Raises:
            InputError: by the name of the option.
        """
        if not self.steps():
            raise InputError(
                "no repair is asked for",
                where="prefkit repair",
                expected="--strip-opener, --balance, --match-length or --drop-shortcuts",
                hint="prefkit audit DATASET says what there is to repair",
            )
        for option, texts in (("--strip-opener", self.strip_openers), ("--balance", self.balance)):
            for text in texts:
                if not words_in(text):
                    raise InputError(f"{text!r} holds no word and no sign", where=option)
        if self.drop_shortcuts is not None and not 0.5 <= self.drop_shortcuts <= 1:
            expected = "a held-out accuracy, .5 (chance) to 1"
            raise InputError(f"{self.drop_shortcuts:g} does not fit", where="--drop-shortcuts", expected=expected)
        if not 0 < self.max_dropped <= 1:
            expected = "a share of the pairs, above 0, at most 1"
            raise InputError(f"{self.max_dropped:g} does not fit", where="--max-dropped", expected=expected)
        return self


class Mended(NamedTuple):
    """`pairs` that are left, in their order; `dropped` and `changes` as on disk, the pairs of this repair only."""

    pairs: pl.DataFrame
    dropped: pl.DataFrame
    changes: pl.DataFrame
    steps: list[Step]


class _Made(NamedTuple):
    """A step that was made: how many pairs it dropped, and the origins of those that it edited and kept."""

    step: Named
    dropped: int
    edited: pl.Series


class _State(NamedTuple):
    """`pairs`: with `origin`, the pair_id before the repair, and `cut`, what was cut off; `gone`: GONE."""

    pairs: pl.DataFrame
    gone: pl.DataFrame
    made: list[_Made]


def mend_pairs(
    pairs: pl.DataFrame, kind: Kind, pipeline: Pipeline, wanted: Wanted, dataset: str, tell: Tell = lambda _text: None
) -> Mended:
    """Make the repairs.

    Args:
        pairs: of a finished dataset.
        kind: of the dataset.
        pipeline: it was built with; edited pairs have to pass its rules, and `audit` says how probes are fitted.
        wanted: which repairs.
        dataset: how messages name it.
        tell: called with lines for a person.

    Raises:
        DatasetError: there are no pairs.
        InputError: a repair has nothing to repair.
        CheckError: more pairs would have to go than wanted.max_dropped allows, or all.
    """
    if pairs.is_empty():
        hint = shlex.join(["prefkit", "query", dataset, "select reason, count(*) from dropped group by all"])
        raise DatasetError("holds no pairs", where=dataset, hint=hint)
    origin, cut = pl.col("pair_id").alias("origin"), pl.lit(None, pl.String).alias("cut")
    state = _State(pairs.with_columns(origin, cut), pl.DataFrame(schema=GONE), [])
    steps = wanted.steps()
    for _, text in (step for step in steps if step[0] == "strip_opener"):
        tell(f"cutting off {printable(text)!r}")
        screened = without_opener(state.pairs, kind, pipeline, text, dataset)
        state = _after(state, ("strip_opener", text), screened.kept, screened.dropped)
        _check_budget(state, wanted, dataset)
    if balanced := [step for step in steps if step[0] in ("balance", "match_length")]:
        tell(f"balancing {state.pairs.height} pairs")
        state = _balance(state, kind, pipeline, balanced, dataset)
        _check_budget(state, wanted, dataset)
    if wanted.drop_shortcuts is not None:
        state = _drop_shortcuts(state, kind, pipeline, wanted, dataset, tell)
        _check_budget(state, wanted, dataset)
    return Mended(_kept(state, kind), _dropped(pairs, state), _changes(pairs, state, kind), _steps(state))


def _after(state: _State, step: Named, kept: pl.DataFrame, gone: pl.DataFrame) -> _State:
    """The state after a step; `gone` holds some of the columns of GONE, `rule` is the repair itself unless given.

    The detail of a pair that goes ends with what earlier steps cut off it.
    """
    was = state.pairs.select("origin", was="cut")
    edited = kept.select("origin", "cut").join(was, on="origin", maintain_order="left")
    edited = edited.filter(pl.col("cut").ne_missing(pl.col("was")))
    named = gone.with_columns(pl.lit(step[0]).alias("reason"))
    named = named.with_columns(pl.lit(None, dtype).alias(n) for n, dtype in GONE.items() if n not in named.columns)
    filled = named.join(was, on="origin", maintain_order="left").with_columns(
        pl.coalesce("rule", "reason").alias("rule"),
        pl.concat_str("detail", "was", separator="; ", ignore_nulls=True).alias("detail"),
    )
    made = _Made(step, gone.height, edited["origin"])
    return _State(kept, pl.concat([state.gone, filled.select(*GONE).cast(GONE)]), [*state.made, made])


def _steps(state: _State) -> list[Step]:
    """The steps as the manifest lists them; `dropped_later`: of the edited pairs, those that a later step dropped."""
    gone = state.gone["origin"].to_list()
    return [
        {
            "repair": repair,
            "setting": setting,
            "dropped": dropped,
            "edited": len(edited),
            "dropped_later": int(edited.is_in(gone).sum()),
        }
        for (repair, setting), dropped, edited in state.made
    ]


def _check_budget(state: _State, wanted: Wanted, dataset: str) -> None:
    gone, total = state.gone.height, state.gone.height + state.pairs.height
    if gone == total or gone > wanted.max_dropped * total:
        option = f"--{state.made[-1].step[0].replace('_', '-')}"
        raise CheckError(
            f"with {option}, {gone} of {total} pairs would go ({gone / total:.1%})",
            where=dataset,
            expected=f"at most {wanted.max_dropped:.0%} (--max-dropped), and pairs that are left",
            hint="a higher --max-dropped, other repairs (--strip-opener edits pairs and keeps most), or other pairs",
        )


def _see(state: _State, kind: Kind, pipeline: Pipeline) -> Seen:
    """What the probes see of the pairs, texts as the audit reads them."""
    audit = pipeline.audit
    return see_pairs(in_memory(_plain(state.pairs, kind)), audit.allow, audit.allow_features)


def _plain(pairs: pl.DataFrame, kind: Kind) -> pl.DataFrame:
    return pairs.with_columns(words_of(name, kind).alias(name) for name in ("prompt", *SIDES))


def _balance(state: _State, kind: Kind, pipeline: Pipeline, steps: list[Named], dataset: str) -> _State:
    """Balance tokens and lengths, again and again until all hold together; what a step drops is its own."""
    plain, ids, seen = _plain(state.pairs, kind), state.pairs["origin"], _see(state, kind, pipeline)
    fit = fit_probes(seen, np.arange(len(ids)), -1, seed=pipeline.audit.seed, max_fit=pipeline.audit.probe_pairs)
    signs = {step: _signs(plain, step[1], dataset) for step in steps if step[0] == "balance"}
    by_step: dict[Named, list[int]] = {step: [] for step in steps}
    left = np.arange(len(ids), dtype=np.int64)
    settled = False
    while not settled:
        settled = True
        for step in steps:
            some = (fit.scores[left], ids.gather(left))
            rows = surplus(signs[step][left], *some) if step in signs else length_surplus(seen.length[left], *some)
            by_step[step] += left[rows].tolist()
            left, settled = np.delete(left, rows), settled and not len(rows)
    kept = state.pairs
    for step, rows_of in by_step.items():
        rows = np.sort(np.asarray(rows_of, dtype=np.int64))
        told = [_reason(step, seen.length[row], signs, row) + _told_score(fit.scores[row]) for row in rows]
        gone = pl.DataFrame({"origin": ids.gather(rows), "detail": pl.Series(told, dtype=pl.String)})
        kept = kept.join(gone, on="origin", how="anti", maintain_order="left")
        state = _after(state, step, kept, gone)
    return state


def _signs(plain: pl.DataFrame, token: str, dataset: str) -> Signs:
    signs = token_signs(plain, token)
    if not signs.any():
        sql = "select token from tokens where num_discordant > 0"
        hint = f"{shlex.join(['prefkit', 'query', dataset, sql])} lists those that are"
        raise InputError(f"{token!r} is on one side only in no pair", where="--balance", hint=hint)
    return signs


def _reason(step: Named, length: float, signs: Mapping[Named, Signs], row: int) -> str:
    if step in signs:
        side = "chosen" if signs[step][row] > 0 else "rejected"
        return f"{step[1]!r} is in {side} only"
    return f"{'chosen' if length > 0 else 'rejected'} is {np.exp(abs(length)):.2f} times as long in words"


def _told_score(score: float) -> str:
    return "" if np.isnan(score) else f"; shortcut score {score:+.2f}"


def _drop_shortcuts(state: _State, kind: Kind, pipeline: Pipeline, wanted: Wanted, dataset: str, tell: Tell) -> _State:
    """Drop pairs until no probe of length, structure and words is above the target.

    Raises:
        CheckError: as many pairs as may go are not enough.
        InputError: it is the only repair, and there is nothing to drop.
    """
    target, total = float(wanted.drop_shortcuts or 0), state.pairs.height + state.gone.height
    budget = max(0, min(int(wanted.max_dropped * total) - state.gone.height, state.pairs.height - 1))
    ids, audit = state.pairs["origin"], pipeline.audit
    found = find_shortcuts(
        _see(state, kind, pipeline), ids, target, budget, seed=audit.seed, max_fit=audit.probe_pairs, tell=tell
    )
    if found.accuracy > target:
        gone = state.gone.height + len(found.rows)
        raise CheckError(
            f"without {gone} of {total} pairs ({gone / total:.0%}) the probe {found.probe} still tells chosen in "
            f"{found.accuracy:.1%} of held-out pairs",
            where=dataset,
            expected=f"at most {target:.1%}, and at most {wanted.max_dropped:.0%} dropped (--max-dropped)",
            hint="--strip-opener or --balance for what the audit finds; or a higher --drop-shortcuts, or other pairs",
        )
    if not len(found.rows) and not state.made:
        raise InputError(
            f"no probe is above it: {found.probe} tells chosen in {found.accuracy:.1%} of held-out pairs",
            where=f"--drop-shortcuts {target:g}",
            expected="a lower one, or another repair",
            hint=shlex.join(["prefkit", "audit", dataset]),
        )
    told = [f"given away{_told_score(score)}" for score in found.scores]
    gone_rows = pl.DataFrame({"origin": ids.gather(found.rows), "detail": pl.Series(told, dtype=pl.String)})
    kept = state.pairs.join(gone_rows, on="origin", how="anti", maintain_order="left")
    return _after(state, ("drop_shortcuts", wanted.drop_shortcuts), kept, gone_rows)


def _kept(state: _State, kind: Kind) -> pl.DataFrame:
    """The pairs that are left; of an edited correction, how far its sides are apart is measured again."""
    edited = state.pairs.filter(pl.col("cut").is_not_null(), pl.col("method") == "correction")
    apart = distances(*(edited.select(words_of(side, kind)).to_series() for side in SIDES))
    measured = pl.concat([edited.select("pair_id"), apart], how="horizontal")
    joined = state.pairs.join(measured, on="pair_id", how="left", suffix="_new", maintain_order="left")
    again = pl.col("pair_id").is_in(edited["pair_id"].to_list())
    columns = [pl.when(again).then(f"{name}_new").otherwise(name).alias(name) for name in DISTANCES]
    return joined.with_columns(columns).drop("origin", "cut", *(f"{name}_new" for name in DISTANCES))


def _dropped(pairs: pl.DataFrame, state: _State) -> pl.DataFrame:
    """The dropped pairs as they were before the repair, in their order, as rows of the dropped table."""
    now = dict(state.pairs.select("origin", "pair_id").iter_rows())
    twin, repeats = pl.col("twin").replace(now), pl.col("rule").is_in(["duplicate", "near_duplicate"])
    gone = state.gone.with_columns(
        pl.when(repeats).then(twin).alias("duplicate_of"),
        pl.when(~repeats).then(twin).alias("contradicts"),
        pl.lit("repair").alias("stage"),
    ).select("stage", "duplicate_of", "contradicts", "jaccard", pair_id="origin", reason="rule")
    return pairs.drop("split").join(gone, on="pair_id", how="inner", maintain_order="left")


def _changes(pairs: pl.DataFrame, state: _State, kind: Kind) -> pl.DataFrame:
    """A row for every pair that was dropped or edited, in the order of the pairs before the repair."""
    edited = state.pairs.filter(pl.col("cut").is_not_null()).select(
        "origin", new_pair_id="pair_id", action=pl.lit("edited"), reason=pl.lit("strip_opener"), detail="cut"
    )
    dropped = state.gone.select("origin", "reason", "detail", action=pl.lit("dropped"))
    told = pl.concat([edited, dropped], how="diagonal").rename({"origin": "pair_id"})
    before = pairs.select("pair_id", chosen_before="chosen", rejected_before="rejected")
    rows = before.join(told, on="pair_id", how="inner", maintain_order="left").with_columns(
        pl.when(pl.col("action") == "edited").then(f"{side}_before").alias(f"{side}_before") for side in SIDES
    )
    return rows.select(schema("changes", kind).names())
