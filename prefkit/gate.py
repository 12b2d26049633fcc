"""Refuse to train on a reference that is not this policy's. Before the first step, cheap checks first.

1. The identity: the key is that of the recorded identity; weights, config and tokenizer are the policy's, name by name.
   Template, max_length, truncation and dtype are the reference's own; where the pipeline or a --set says them too, both
   must say the same, and a tokenizer's own template must still be the one that was used.
2. The table, without a model: complete for the split, finite, log-probs <= 0, no all-zero row, lists as long as their
   ids, the sum column equal to the sum of the list column, every part as it was written.
3. The policy itself scores the longest and some random rows, token by token, and their texts are tokenised again.

So with the sigmoid loss step 0 has loss ln 2 and rewards 0 to float rounding. Peers' failures that this catches:
changed weights at the same path, a shuffled column, zeros for unfilled rows, length-1 lists, a mean where a sum is
meant. A run may say that its reference is another model on purpose (train.other_reference): then only the tokenizer
and the template are compared, and the policy's scores are recorded, not judged.
"""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import torch

from prefkit.config import PrecomputeConfig
from prefkit.encode import EncodeSettings, Sides, encode_pairs, resolve_template
from prefkit.errors import GateError, ModelError
from prefkit.format import Kind, differing
from prefkit.identity import policy_identity, template_sha256
from prefkit.logps import CompletionLogps
from prefkit.reference_table import AGAIN, distinction, read_reference, reference_keys, refuse_pairs
from prefkit.work import TEMPLATE_FILE

NUM_LONGEST, NUM_RANDOM = 16, 48
MAX_ABS = 1e-4  # float32: largest difference of one token, in nats
MAX_RMS, MAX_MEAN = 0.05, 0.005  # bfloat16: what two evaluations of one model may differ by, in nats a token


class GateFigures(NamedTuple):
    """How close the policy's own scores of the sampled rows came to the table, in nats a token; kept in run.json."""

    rows: int
    tokens: int
    max_abs: float
    rms: float
    mean: float


class Policy(NamedTuple):
    """What training brings to the gate.

    `identity`: of the policy's folder; `own_template_sha256`: of its tokenizer's own chat template; `told`: settings of
    a reference that the pipeline says in so many words, by their (dotted) name in an identity.
    """

    identity: dict[str, Any]
    own_template_sha256: str | None
    told: dict[str, Any]


def policy_of(folder: Path, tokenizer: Any, settings: PrecomputeConfig, kind: Kind) -> Policy:
    """What a model folder and the precompute section of a pipeline say of the reference that fits them."""
    explicit = settings.model_fields_set
    told: dict[str, Any] = {name: getattr(settings, name) for name in ("max_length", "dtype") if name in explicit}
    truncation = ("long_prompt", "min_completion_tokens")
    told |= {f"truncation.{name}": getattr(settings, name) for name in truncation if name in explicit}
    own = None
    if kind == "chat":
        if settings.chat_template is not None and "chat_template" in explicit:
            template = resolve_template(kind, settings.chat_template, tokenizer)
            told["chat_template_sha256"] = template_sha256(template)
        with contextlib.suppress(ModelError):  # it may have none, and the reference another
            own = template_sha256(resolve_template(kind, None, tokenizer))
    return Policy(policy_identity(folder, tokenizer), own, told)


def find_reference(
    dataset: Path, policy: Policy, wanted: str | None, *, other: bool = False
) -> tuple[str, dict[str, Any]]:
    """The reference to train against: the wanted key, or the only one that is the policy's.

    Args:
        dataset: with reference/.
        policy: what it must be the reference of.
        wanted: a key, or None.
        other: another model's reference will do, if its tokenizer is the policy's.

    Raises:
        DatasetError: there is no reference, or the wanted one is not among them.
        GateError: none is this policy's, or several are; the message lists them and what differs.
    """
    keys = reference_keys(dataset, wanted)
    looked_at = {key: read_reference(dataset, key) for key in keys}
    apart = {key: _apart(ref, policy, other=other) for key, ref in looked_at.items()}
    same = [key for key, lines in apart.items() if not lines]
    if not same:
        nearest = sorted(apart, key=lambda key: len(apart[key]))
        listed = f"\n  {nearest[0]} (reference and policy): " + "; ".join(sorted(apart[nearest[0]], reverse=True))
        listed += "".join(f"\n  {key}: {len(apart[key])} settings differ" for key in nearest[1:])
        raise GateError(f"no reference is this policy's:{listed}", where=str(dataset), hint=_way_out(apart[nearest[0]]))
    if len(same) > 1:
        shared = [f"{key}: " + distinction(looked_at[key]["identity"]) for key in same]
        raise GateError(
            "several references are this policy's:\n  " + "\n  ".join(shared),
            where=str(dataset),
            hint="--reference KEY",
        )
    return same[0], looked_at[same[0]]


def _way_out(lines: Sequence[str]) -> str:
    """What to type where these settings differ."""
    names = {line.partition(":")[0].partition(".")[0] for line in lines}
    again = "prefkit precompute TARGET --model M"
    if names <= {"weights_sha256", "config"}:
        return f"{again}; --set train.other_reference=true, if the reference is another model on purpose"
    if names <= {"max_length", "dtype", "truncation", "chat_template_sha256"}:
        return f"{again}, or the reference's own settings: --set precompute..."
    return again


def _apart(reference: Mapping[str, Any], policy: Policy, *, other: bool) -> list[str]:
    """The settings in which a reference is not the policy's, each with both values."""
    compared = ("tokenizer_sha256",) if other else ("weights_sha256", "config", "tokenizer_sha256")
    wanted = {name: policy.identity[name] for name in compared} | policy.told
    used_its_own = reference["provenance"].get("chat_template", "unknown") is None
    if reference["identity"]["kind"] == "chat" and used_its_own and "chat_template_sha256" not in policy.told:
        wanted["chat_template_sha256"] = policy.own_template_sha256
    return differing({name: _setting(reference["identity"], name) for name in wanted}, wanted)


def _setting(identity: Mapping[str, Any], name: str) -> Any:
    section, _, inner = name.partition(".")
    return identity[section][inner] if inner else identity[section]


def sample_rows(rows: pl.DataFrame, seed: int) -> pl.DataFrame:
    """The 16 longest rows and 48 random others."""
    length = pl.sum_horizontal(f"num_{side}_tokens" for side in Sides._fields)
    ordered = rows.sort(length, "pair_id", descending=[True, False])
    rest = ordered.slice(NUM_LONGEST)
    picked = np.random.default_rng(seed).permutation(rest.height)[:NUM_RANDOM]
    return pl.concat([ordered.head(NUM_LONGEST), rest[sorted(picked.tolist())]])


def check_policy(
    policy: CompletionLogps,
    tokenizer: Any,
    folder: Path,
    identity: Mapping[str, Any],
    rows: pl.DataFrame,
    pairs: pl.DataFrame,
    seed: int,
    *,
    same_model: bool,
) -> GateFigures:
    """`check_scores` and `check_ids`: what needs the model and the tokenizer."""
    figures = check_scores(policy, rows, seed, f"reference {folder.name}", same_model=same_model)
    check_ids(folder, identity, tokenizer, rows, pairs, seed)
    return figures


def check_ids(
    folder: Path, identity: Mapping[str, Any], tokenizer: Any, rows: pl.DataFrame, pairs: pl.DataFrame, seed: int
) -> None:
    """Tokenise the sampled pairs again: the table's ids must be those of the pairs' own texts.

    What the scores cannot show: whole rows under the wrong pair_id, or chosen and rejected in each other's place.

    Args:
        folder: of the reference, with its chat template.
        identity: of the reference.
        tokenizer: the policy's, which is the reference's.
        rows: of the reference.
        pairs: of the dataset, with their texts.
        seed: of the sample.

    Raises:
        GateError: the ids are those of other texts.
    """
    sample = sample_rows(rows, seed)
    template = folder / TEMPLATE_FILE
    cut = identity["truncation"]
    settings = EncodeSettings(
        identity["kind"],
        identity["max_length"],
        cut["min_completion_tokens"],
        cut["long_prompt"],
        template.read_text(encoding="utf-8") if template.exists() else None,
    )
    mine = pairs.filter(pl.col("pair_id").is_in(sample["pair_id"].to_list()))
    names = [f"{side}_ids" for side in Sides._fields]
    encoded = {
        row[0]: row[1:] for row in encode_pairs(mine, tokenizer, settings).pairs.select("pair_id", *names).rows()
    }
    apart = [row[0] for row in sample.select("pair_id", *names).rows() if encoded.get(row[0]) != row[1:]]
    refuse_pairs(folder, f"of {sample.height} looked at have ids that are not those of their text", apart)


def check_scores(
    policy: CompletionLogps, rows: pl.DataFrame, seed: int, where: str, *, same_model: bool = True
) -> GateFigures:
    """Let the policy score the sampled rows and compare with the table, token by token.

    Args:
        policy: in the reference's regime.
        rows: of the reference.
        seed: of the sample.
        where: the reference, for the message.
        same_model: whether the two must agree; otherwise the figures say how far apart they are.

    Raises:
        GateError: the table is not what this policy scores.
    """
    sample = sample_rows(rows, seed)
    apart: list[float] = []
    worst: tuple[float, str] = (-1.0, "")
    for row in sample.iter_rows(named=True):
        sides = Sides(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"])
        with torch.no_grad():
            scored = policy(policy.batch([sides])).token_logps.cpu().double().numpy()
        table = np.array(row["ref_chosen_token_logps"] + row["ref_rejected_token_logps"], dtype=np.float64)
        difference = scored - table
        apart += difference.tolist()
        worst = max(worst, (float(np.abs(difference).max()), row["pair_id"]))
    values = np.array(apart)
    figures = GateFigures(
        sample.height,
        len(values),
        float(np.abs(values).max()),
        float(np.sqrt((values**2).mean())),
        float(values.mean()),
    )
    exact = policy.dtype == "float32"
    good = figures.max_abs <= MAX_ABS if exact else figures.rms <= MAX_RMS and abs(figures.mean) <= MAX_MEAN
    if same_model and not good:
        raise GateError(
            f"the policy's own scores are not the table's: largest difference {figures.max_abs:.3g} nats a token (pair "
            f"{worst[1][:12]}), RMS {figures.rms:.3g}, mean {figures.mean:.3g}, over {figures.tokens} tokens",
            where=where,
            expected=f"at most {MAX_ABS:g}" if exact else f"RMS at most {MAX_RMS:g}, mean at most {MAX_MEAN:g}",
            hint=AGAIN,
        )
    return figures
