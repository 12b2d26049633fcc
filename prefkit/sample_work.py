"""What `prefkit sample` has to do: what is there, what decides the samples, which prompts are sampled together.

Comes in: settings, a model folder and prompts. Goes out: a `Work`, before any model runs. The plan follows from the
prompts' lengths and the settings alone, and new prompts go behind it, so parts that are there stay as they are.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import torch
from transformers import AutoConfig

from prefkit.adapters import base_folder
from prefkit.candidate_folder import (
    check_answers,
    check_written,
    claim,
    is_finished,
    read_plan,
    read_sample,
)
from prefkit.encode import encode_prompts, resolve_template
from prefkit.engines import Decoding
from prefkit.errors import CheckError, DatasetError, ModelError, first_line, located
from prefkit.format import Kind, part_name, reference_key
from prefkit.functions import module_hashes
from prefkit.identity import model_folder, policy_identity, template_sha256
from prefkit.layouts import rotary_limit
from prefkit.locks import locked
from prefkit.models import load_tokenizer, pick_device
from prefkit.prompts import Prompts, prompts_kind, read_prompts
from prefkit.sample_format import (
    PLAN,
    SAMPLES,
    sample_schema,
)
from prefkit.sample_settings import SampleConfig
from prefkit.stops import Ending, find_ending

Tell = Callable[[str], None]
GENERATION_VERSION = 1  # of what decides samples besides the settings: generation.py and picking.py
CPU_SAMPLE_TOKENS = 16_384  # prompt + response of the sequences made at once, on a CPU
GPU_SHARE = 0.5  # of the free memory that the cache of these sequences may take
FILLS = 8  # times that the rows of a batch are filled anew: the end of a batch has few rows at work
BATCHES_PER_PART = 4  # what a kill may cost, and what several processes share


class Work(NamedTuple):
    """All that is known before a model runs."""

    folder: Path
    model: Path
    named: str  # the model's folder, as it was given
    kind: Kind
    template: str | None
    ending: Ending
    identity: dict[str, Any]
    key: str
    prompts: Prompts
    dropped: pl.DataFrame
    encoded: pl.DataFrame  # prompt_id, prompt_ids
    plan: pl.DataFrame
    missing: list[int]  # parts
    current: bool
    decoding: Decoding


def without_prompts(work: Work) -> Work:
    """What the other processes need of it."""
    prompts = work.prompts._replace(
        kept=work.prompts.kept.clear(), dropped=work.prompts.dropped.clear(), rejects=work.prompts.rejects.clear()
    )
    return work._replace(encoded=work.encoded.clear(), prompts=prompts, dropped=work.dropped.clear())


def prepare_sampling(
    settings: SampleConfig,
    named: Path,
    kind: Kind | None,
    chat_template: str | None,
    tell: Tell,
    held: contextlib.ExitStack,
    section: str = "sample",
) -> Work:
    """Find what is there, read and encode the prompts, and plan those that are new."""
    folder, model = Path(settings.out), model_folder(named)
    tokenizer = load_tokenizer(model)
    has_template = chat_template is not None or bool(tokenizer.chat_template)
    kind = prompts_kind(settings.prompts, kind, has_template=has_template)
    template = resolve_template(kind, chat_template, tokenizer)
    ending = find_ending(model, tokenizer, template, settings.stop)
    tell(f"hashing the weights of {model}")
    identity = _identity(settings, policy_identity(model, tokenizer), kind, template, ending)
    key = reference_key(identity)
    claim(folder, {"key": key, "identity": identity})
    prompts = read_prompts(settings.prompts, kind, f"{section}.prompts")
    held.enter_context(locked(folder))
    claim(folder, {"key": key, "identity": identity})  # somebody else may have begun meanwhile
    tell(f"encoding {prompts.kept.height} prompts")
    with located(str(model)):
        encoded = encode_prompts(prompts.kept, tokenizer, kind, template)
    room = _room(model, settings.max_new_tokens, section)
    fits = pl.lit(True) if room is None else pl.col("prompt_ids").list.len() <= room
    reasons = pl.concat(
        [
            encoded.dropped,
            encoded.prompts.filter(~fits).select("prompt_id", reason=pl.lit("prompt_too_long")),
        ]
    )
    lost = prompts.kept.join(reasons, on="prompt_id", how="inner", maintain_order="left")
    dropped = pl.concat([prompts.dropped, lost.select(prompts.dropped.columns)])
    answered = encoded.prompts.filter(fits)
    if answered.is_empty():
        found = ", ".join(f"{count} {reason}" for reason, count in counted(dropped["reason"]).items())
        raise CheckError(
            f"no prompt can be sampled from: {found}",
            where=settings.prompts.path,
            hint=f"a smaller {section}.max_new_tokens, or another chat template",
        )
    plan = read_plan(folder)
    gone = plan.filter(~pl.col("prompt_id").is_in(answered["prompt_id"].to_list()))
    if gone.height:
        raise DatasetError(
            f"{gone.height} of its {plan.height} prompts are no longer in {settings.prompts.path}",
            where=str(folder),
            expected="all of them, and perhaps more",
            hint="choose another --out",
        )
    check_answers(folder, prompts.kept)
    check_written(folder, plan, settings.n)
    new = answered.filter(~pl.col("prompt_id").is_in(plan["prompt_id"].to_list()))
    if new.height:
        budget = settings.max_batch_tokens or _budget(model, settings.dtype)
        plan = pl.concat([plan, plan_prompts(new, settings.n, settings.max_new_tokens, budget, plan)])
    missing = [n for n in plan["part"].unique().sort() if not (folder / SAMPLES / part_name(n)).exists()]
    decoding = Decoding(
        str(model),
        settings.n,
        settings.temperature,
        settings.top_p,
        settings.top_k,
        settings.max_new_tokens,
        settings.seed,
        ending.ids,
        ending.texts,
        settings.dtype,
        len(tokenizer),
    )
    work = Work(
        folder,
        model,
        str(named),
        kind,
        template,
        ending,
        identity,
        key,
        prompts._replace(kept=prompts.kept.filter(pl.col("prompt_id").is_in(answered["prompt_id"].to_list()))),
        dropped,
        answered,
        plan,
        missing,
        False,
        decoding,
    )
    return work._replace(current=not new.height and not missing and is_current(work))


def _identity(
    settings: SampleConfig, policy: dict[str, Any], kind: Kind, template: str | None, ending: Ending
) -> dict[str, Any]:
    """All that decides the samples of a prompt."""
    named = ("n", "temperature", "top_p", "top_k", "max_new_tokens", "seed", "dtype", "engine")
    return {
        **policy,
        "chat_template_sha256": template_sha256(template),
        "kind": kind,
        **{name: getattr(settings, name) for name in named},
        "end_ids": list(ending.ids),
        "stop": list(ending.texts),
        **({"engine_modules": module_hashes([settings.engine], "sample.engine")} if settings.engine else {}),
        "generation_version": GENERATION_VERSION,
    }


def config_of(model: Path) -> Any:
    """The config of a model folder, or of an adapter's base."""
    path = base_folder(model)
    try:
        config: Any = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever transformers raises, the user needs the folder and the reason
        raise ModelError(f"its config does not load: {first_line(error)}", where=str(model)) from None
    return config.get_text_config()


def _room(model: Path, max_new_tokens: int, section: str) -> int | None:
    """Tokens that a prompt may have; None where the model has no last position."""
    config = config_of(model)
    positions = getattr(config, "max_position_embeddings", None)
    limits = [limit for limit in (positions, rotary_limit(config)) if limit]
    if not limits:
        return None
    if max_new_tokens >= min(limits):
        raise ModelError(
            f"{section}.max_new_tokens is {max_new_tokens}, the model has {min(limits)} positions",
            where=str(model),
            hint=f"--max-new-tokens {max(1, min(limits) // 2)}",
        )
    return int(min(limits)) - max_new_tokens


def _budget(model: Path, dtype: str) -> int:
    """Tokens of the sequences that are made at once on this machine: a constant, or what the free memory holds."""
    device = pick_device()
    if device.type == "cpu":
        return CPU_SAMPLE_TOKENS
    a_token = cached_numbers(config_of(model)) * (4 if dtype == "float32" else 2)
    free, _ = torch.cuda.mem_get_info(device)
    return max(CPU_SAMPLE_TOKENS, int(free * GPU_SHARE) // max(1, a_token))


def cached_numbers(config: Any) -> int:
    """Numbers that the key-value cache of a model holds for one token, of all layers together.

    Keys and values as wide as the model where a config does not say one number: recurrent models (Mamba) have no
    attention heads, and classes whose layers differ (Gemma 4) have several.
    """

    def told(name: str) -> int | None:
        try:
            value = getattr(config, name, None)
        except Exception:  # transformers' own error where the layers differ, which is no AttributeError
            return None
        return value if isinstance(value, int) and value > 0 else None

    layers, width, heads = told("num_hidden_layers") or 1, told("hidden_size") or 1, told("num_attention_heads")
    kept = told("num_key_value_heads") or heads
    size = told("head_dim") or (width // heads if heads else None)
    return 2 * layers * (kept * size if kept and size else width)


def plan_prompts(encoded: pl.DataFrame, n: int, max_new_tokens: int, budget: int, before: pl.DataFrame) -> pl.DataFrame:
    """Assign every prompt a batch and every batch a part, from lengths and settings alone.

    Prompts of like length come together, the longest first, so that memory shows at once; where lengths are equal,
    prompt_id decides. A batch has as many responses at work at once as the budget holds of its longest prompt with a
    longest response, at least those of one prompt; and prompts for FILLS times as many.

    Args:
        encoded: prompt_id and prompt_ids.
        n: responses a prompt.
        max_new_tokens: of a response.
        budget: prompt + response tokens of the sequences that are made at once.
        before: an earlier plan, behind which this one is numbered.

    Returns:
        the columns of the plan, in sampling order.
    """
    lengths = pl.col("prompt_ids").list.len().cast(pl.Int32)
    ordered = encoded.select("prompt_id", num_prompt_tokens=lengths).sort(
        "num_prompt_tokens", "prompt_id", descending=[True, False]
    )
    first_batch = 0 if before.is_empty() else int(before["batch"].max()) + 1  # type: ignore[arg-type]
    first_part = 0 if before.is_empty() else int(before["part"].max()) + 1  # type: ignore[arg-type]
    batches: list[int] = []
    widths: list[int] = []
    batch, left, width = first_batch - 1, 0, 0
    for tokens in ordered["num_prompt_tokens"].to_list():
        if not left:
            batch += 1
            at_once = max(1, budget // ((tokens + max_new_tokens) * n))
            left, width = at_once * FILLS, at_once * n
        left -= 1
        batches.append(batch)
        widths.append(width)
    part = ((pl.col("batch") - first_batch) // BATCHES_PER_PART + first_part).cast(pl.Int32)
    numbered = ordered.with_columns(pl.Series("batch", batches, pl.Int32), pl.Series("width", widths, pl.Int32))
    return numbered.with_columns(part=part).select(sample_schema(PLAN, "text").names())


def is_current(work: Work) -> bool:
    """Whether sample.json is there, and says what prompts and drops say now."""
    if not is_finished(work.folder):
        return False
    recorded = read_sample(work.folder)
    if recorded["files"] != [file._asdict() for file in work.prompts.files]:
        return False
    return bool(recorded["counts"] == counts_of(work) | {k: recorded["counts"][k] for k in ("samples", "tokens")}) and (
        recorded["dropped_reasons"] == counted(work.dropped["reason"])
    )


def counts_of(work: Work) -> dict[str, int]:
    """Rows that were read, and what became of them."""
    return {
        "rows": work.prompts.rows,
        "prompts": work.plan.height,
        "dropped": work.dropped.height,
        "rejects": work.prompts.rejects.height,
    }


def counted(reasons: pl.Series) -> dict[str, int]:
    """How often each reason is there, by name."""
    found = reasons.value_counts().sort(reasons.name)
    return {str(reason): int(count) for reason, count in found.iter_rows()}
