"""`prefkit sample`: N responses of a model to each prompt, with the model's own log-probs of every token.

Comes in: prompts and a model folder. Goes out: a candidates directory (sample_format.py). What decides the samples is
written first and hashed into the key; the plan fixes which prompts are sampled together from their lengths alone, and
each part is renamed into place. So a call that was killed goes on and leaves the bytes of an unbroken one, a second
call has nothing to do, and prompts that were added to the file are the only ones sampled. Several processes
(accelerate launch, torchrun) share the batches of each part.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import torch
from transformers import AutoConfig

from prefkit import __version__
from prefkit.adapters import base_folder
from prefkit.candidate_folder import (
    check_answers,
    check_written,
    claim,
    is_finished,
    read_plan,
    read_sample,
    write_whole,
)
from prefkit.config import Changes, Sections, require_model
from prefkit.documents import Sampler
from prefkit.encode import encode_prompts, resolve_template
from prefkit.engines import Decoding, Engine, Request, Response, check_responses, load_engine
from prefkit.errors import CheckError, ConfigError, DatasetError, Interrupted, ModelError, first_line, located
from prefkit.format import Kind, part_name, reference_key
from prefkit.generation import Generator, Road, answer, choose_road
from prefkit.identity import model_folder, policy_identity, template_sha256
from prefkit.layouts import rotary_limit
from prefkit.locks import leave_no_empty_directory, locked
from prefkit.models import check_fits, load_model, load_tokenizer, pick_device
from prefkit.processes import Team, join_team, process_rank
from prefkit.prompts import Prompts, prompts_kind, read_prompts
from prefkit.sample_format import (
    PLAN,
    PROMPTS,
    SAMPLE_JSON,
    SAMPLE_PLAN,
    SAMPLE_VERSION,
    SAMPLER_JSON,
    SAMPLES,
    sample_schema,
)
from prefkit.sample_settings import SampleConfig
from prefkit.sources import file_sha256
from prefkit.stops import Ending, StopTexts, find_ending, response_text
from prefkit.store import read_document, write_json
from prefkit.tables import write_parquet
from prefkit.target import Target, pipeline_of
from prefkit.text import content_hash

Tell = Callable[[str], None]
Watch = Callable[[int, int, int], None]  # prompts done, prompts in all, tokens made
GENERATION_VERSION = 1  # of what decides samples besides the settings: generation.py and picking.py
CPU_SAMPLE_TOKENS = 16_384  # prompt + response of the sequences made at once, on a CPU
GPU_SHARE = 0.5  # of the free memory that the cache of these sequences may take
FILLS = 8  # times that the rows of a batch are filled anew: the end of a batch has few rows at work
BATCHES_PER_PART = 4  # what a kill may cost, and what several processes share


class Sampled(NamedTuple):
    """What `sample_candidates` returns."""

    out: str
    key: str  # of the sampler
    prompts: int  # that have responses
    samples: int  # in all
    new: int  # of this call
    tokens: int  # of all responses
    finish_reasons: dict[str, int]
    dropped: dict[str, int]  # prompts that were not sampled from, by reason
    rejects: int  # lines that are no prompt
    seconds: float
    tokens_per_second: float  # of the responses of this call, while sampling; 0.0 where there was nothing to do
    padding_share: float  # of the token slots that were computed: padding, and rows that had ended; 0..1
    unchanged: bool  # there was nothing to do


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


def sample_candidates(
    target: Target | Sections,
    *,
    changes: Changes = (),
    tell: Tell = lambda _text: None,
    watch: Watch = lambda _done, _total, _tokens: None,
    stop: Callable[[], bool] = lambda: False,
) -> Sampled:
    """Sample responses to the prompts of a pipeline's sample section.

    The same settings again: nothing is sampled but prompts that are new. Killed or stopped, the next call goes on.

    Args:
        target: a dataset directory, a pipeline file or a loaded Pipeline; its sample section decides. Or `Sections`,
            as `load_sections` makes them.
        changes: settings by their dotted keys, as in `load_pipeline`.
        tell: called with lines for a person.
        watch: called now and then with the prompts that are done, all prompts, and the tokens made by this call.
        stop: asked after every part; True ends the call there, and the next one goes on.

    Returns:
        what was sampled, why responses ended, and how fast.

    Raises:
        ConfigError: the pipeline has no sample section.
        SourceError: the prompts cannot be read.
        DatasetError: the directory holds something else, or samples of another model or other settings.
        ModelError: the model or its tokenizer does not load or does not fit.
        MachineError: out of disk or memory.
        Interrupted: `stop` said so.

    Example:
        asked = {"path": "demo/world/heldout.jsonl", "limit": 8}
        changes = {"sample.prompts": asked, "sample.out": "demo/eight", "sample.n": 2}
        done = prefkit.sample_candidates("demo/on_policy.yaml", changes=changes)
        print(done.samples, done.finish_reasons)
    """
    pipeline = target if isinstance(target, Sections) else pipeline_of(target, changes)
    if pipeline.sample is None:
        raise ConfigError(
            "the pipeline has no sample section",
            where=str(target) if isinstance(target, (str, Path)) else "the pipeline",
            expected="sample: with prompts and out",
        )
    return draw_samples(
        pipeline.sample,
        model=Path(require_model(pipeline.sample.model or pipeline.precompute.model, "sample.model")),
        kind=pipeline.kind,
        chat_template=pipeline.precompute.chat_template,
        tell=tell,
        watch=watch,
        stop=stop,
    )


def draw_samples(
    settings: SampleConfig,
    *,
    model: str | Path,
    kind: Kind | None = None,
    chat_template: str | None = None,
    tell: Tell = lambda _text: None,
    watch: Watch = lambda _done, _total, _tokens: None,
    stop: Callable[[], bool] = lambda: False,
) -> Sampled:
    """`sample_candidates` without a pipeline.

    Args:
        settings: prompts, directory and how to sample; its model counts for nothing here.
        model: folder of a model, an adapter, or a run.
        kind: chat | text; None: as the prompts are.
        chat_template: as precompute.chat_template.
        tell: as in `sample_candidates`, and so are watch and stop.
        watch: see there.
        stop: see there.
    """
    started = time.monotonic()
    try:
        with join_team() as team, contextlib.ExitStack() as held:
            say = tell if team.is_main else lambda _text: None
            own: list[Work] = []  # of process 0, with all prompts: the others get them a part at a time

            def prepare() -> Work:
                own.append(_prepare(settings, Path(model), kind, chat_template, say, held))
                return _without_prompts(own[0])

            work = team.on_main(prepare)
            work = own[0] if own else work
            made = _Made()
            if work.missing or not work.current:
                _sample(settings, work, team, say, watch, stop, made, chat_template)
            return team.on_main(lambda: _sampled(work, made, time.monotonic() - started))
    finally:
        if process_rank() == 0:
            leave_no_empty_directory(Path(settings.out))


def _without_prompts(work: Work) -> Work:
    """What the other processes need of it."""
    prompts = work.prompts._replace(
        kept=work.prompts.kept.clear(), dropped=work.prompts.dropped.clear(), rejects=work.prompts.rejects.clear()
    )
    return work._replace(encoded=work.encoded.clear(), prompts=prompts, dropped=work.dropped.clear())


class _Made:
    """What this call made: responses, their tokens, seconds, and the slots that all processes computed."""

    def __init__(self) -> None:
        self.samples = self.tokens = self.useful = self.lost = 0
        self.seconds = 0.0


def _prepare(
    settings: SampleConfig,
    named: Path,
    kind: Kind | None,
    chat_template: str | None,
    tell: Tell,
    held: contextlib.ExitStack,
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
    prompts = read_prompts(settings.prompts, kind)
    held.enter_context(locked(folder))
    claim(folder, {"key": key, "identity": identity})  # somebody else may have begun meanwhile
    tell(f"encoding {prompts.kept.height} prompts")
    with located(str(model)):
        encoded = encode_prompts(prompts.kept, tokenizer, kind, template)
    room = _room(model, settings.max_new_tokens)
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
        found = ", ".join(f"{count} {reason}" for reason, count in _counted(dropped["reason"]).items())
        raise CheckError(
            f"no prompt can be sampled from: {found}",
            where=settings.prompts.path,
            hint="a smaller sample.max_new_tokens, or another chat template",
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
    return work._replace(current=not new.height and not missing and _is_current(work))


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
        "generation_version": GENERATION_VERSION,
    }


def _config_of(model: Path) -> Any:
    path = base_folder(model)
    try:
        config: Any = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever transformers raises, the user needs the folder and the reason
        raise ModelError(f"its config does not load: {first_line(error)}", where=str(model)) from None
    return config.get_text_config()


def _room(model: Path, max_new_tokens: int) -> int | None:
    """Tokens that a prompt may have; None where the model has no last position."""
    config = _config_of(model)
    positions = getattr(config, "max_position_embeddings", None)
    limits = [limit for limit in (positions, rotary_limit(config)) if limit]
    if not limits:
        return None
    if max_new_tokens >= min(limits):
        raise ModelError(
            f"sample.max_new_tokens is {max_new_tokens}, the model has {min(limits)} positions",
            where=str(model),
            hint=f"--max-new-tokens {max(1, min(limits) // 2)}",
        )
    return int(min(limits)) - max_new_tokens


def _budget(model: Path, dtype: str) -> int:
    """Tokens of the sequences that are made at once on this machine: a constant, or what the free memory holds."""
    device = pick_device()
    if device.type == "cpu":
        return CPU_SAMPLE_TOKENS
    config = _config_of(model)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    a_token = 2 * config.num_hidden_layers * heads * size * (4 if dtype == "float32" else 2)
    free, _ = torch.cuda.mem_get_info(device)
    return max(CPU_SAMPLE_TOKENS, int(free * GPU_SHARE) // int(a_token))


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


def _is_current(work: Work) -> bool:
    """Whether sample.json is there, and says what prompts and drops say now."""
    if not is_finished(work.folder):
        return False
    recorded = read_sample(work.folder)
    if recorded["files"] != [file._asdict() for file in work.prompts.files]:
        return False
    return bool(recorded["counts"] == _counts(work) | {k: recorded["counts"][k] for k in ("samples", "tokens")}) and (
        recorded["dropped_reasons"] == _counted(work.dropped["reason"])
    )


def _counts(work: Work) -> dict[str, int]:
    return {
        "rows": work.prompts.rows,
        "prompts": work.plan.height,
        "dropped": work.dropped.height,
        "rejects": work.prompts.rejects.height,
    }


def _counted(reasons: pl.Series) -> dict[str, int]:
    found = reasons.value_counts().sort(reasons.name)
    return {str(reason): int(count) for reason, count in found.iter_rows()}


def _sample(
    settings: SampleConfig,
    work: Work,
    team: Team,
    tell: Tell,
    watch: Watch,
    stop: Callable[[], bool],
    made: _Made,
    chat_template: str | None,
) -> None:
    """Sample and write the missing parts, then sample.json."""
    if any(team.on_each(stop)):
        raise Interrupted("stopped before anything was sampled", where=str(work.folder))
    engine = _engine(settings, work, team, tell) if work.missing else None
    team.on_main(lambda: _begin(work, engine.road if engine else None))
    started = time.monotonic()
    per_part = work.plan.group_by("part").len().sort("part")
    done = sum(count for part, count in per_part.iter_rows() if part not in work.missing)
    total = work.plan.height
    watch(done, total, 0)
    for number in work.missing:
        assert engine is not None
        rows = work.plan.filter(pl.col("part") == number)
        asked = team.on_main(lambda rows=rows: _requests(work, rows))  # type: ignore[misc]
        stopped = _sample_part(work, number, rows, asked, engine, team, made, watch, done, total, stop)
        done += rows.height
        watch(done, total, made.tokens)
        if stopped and number != work.missing[-1]:
            left = sum(missing > number for missing in work.missing)
            raise Interrupted(
                f"stopped: {made.samples} responses sampled and written, {left} parts left", where=str(work.folder)
            )
    made.seconds = time.monotonic() - started
    if engine is not None:
        slots = team.on_each(engine.slots)
        made.useful, made.lost = (sum(some) for some in zip(*slots, strict=True))
    team.on_main(lambda: _finish(work, chat_template))


class _Engine(NamedTuple):
    """Whoever samples: called with the requests of a batch."""

    name: str
    call: Callable[[Sequence[Request], int, Callable[[int], None]], Sequence[Sequence[Response]]]
    road: str
    slots: Callable[[], tuple[int, int]]


def _engine(settings: SampleConfig, work: Work, team: Team, tell: Tell) -> _Engine:
    """The engine of generation.py, or the one that sample.engine names."""
    if settings.engine is not None:
        function: Engine = load_engine(settings.engine)
        tell(f"sampling with {settings.engine}")
        return _Engine(
            settings.engine,
            lambda asked, _width, _made: function(asked, work.decoding),
            settings.engine,
            lambda: (0, 0),
        )
    generator, reason = _generator(work, team)
    tell(f"sampling on {generator.device} in {settings.dtype}, {generator.road}" + (f": {reason}" if reason else ""))
    stops = StopTexts(load_tokenizer(work.model), work.ending)

    def call(asked: Sequence[Request], width: int, made: Callable[[int], None]) -> list[list[Response]]:
        with located(str(work.model)):
            return answer(generator, asked, work.decoding, width, stops, tell, made)

    return _Engine("prefkit", call, generator.road, lambda: (generator.slots.useful, generator.slots.lost))


def _generator(work: Work, team: Team) -> tuple[Generator, str]:
    """The model in this process, on the road that process 0 found right."""
    longest = int(work.plan["num_prompt_tokens"].max()) + work.decoding.max_new_tokens  # type: ignore[arg-type]

    def load() -> tuple[Any, tuple[Road, str]]:
        model = load_model(work.model, work.decoding.dtype, pick_device())
        with located(str(work.model)):
            check_fits(model, load_tokenizer(work.model), 1, str(work.model))
            return model, choose_road(model, work.decoding.dtype, longest)

    own: list[Any] = []

    def found() -> tuple[Road, str]:
        own.append(load())
        road: tuple[Road, str] = own[0][1]
        return road

    road, reason = team.on_each(found)[0]
    return Generator(own[0][0], work.decoding.dtype, road), reason


def _requests(work: Work, rows: pl.DataFrame) -> dict[str, Request]:
    """The prompts of some rows of the plan, by id."""
    found = rows.select("prompt_id").join(work.encoded, on="prompt_id").join(work.prompts.kept, on="prompt_id")
    wanted = found.select("prompt_id", "prompt_ids", "prompt").iter_rows()
    return {name: Request(name, list(ids), prompt) for name, ids, prompt in wanted}


def _sample_part(
    work: Work,
    number: int,
    rows: pl.DataFrame,
    asked: dict[str, Request],
    engine: _Engine,
    team: Team,
    made: _Made,
    watch: Watch,
    done: int,
    total: int,
    stop: Callable[[], bool],
) -> bool:
    """Sample and write one part, all processes together; whether any of them was asked to stop."""
    ended = [0, 0]  # responses and tokens of this process

    def note(tokens: int) -> None:
        ended[0], ended[1] = ended[0] + 1, ended[1] + tokens
        watch(done + ended[0] * team.size // work.decoding.n, total, made.tokens + ended[1] * team.size)

    def share() -> tuple[dict[str, list[Response]], bool]:
        mine: dict[str, list[Response]] = {}
        for place, (_, batch) in enumerate(rows.group_by("batch", maintain_order=True)):
            if place % team.size == team.rank:
                requests = [asked[name] for name in batch["prompt_id"]]
                found = engine.call(requests, int(batch["width"][0]), note)
                checked = check_responses(requests, found, work.decoding, engine.name)
                mine |= {request.prompt_id: given for request, given in zip(requests, checked, strict=True)}
        return mine, stop()

    shares = team.on_each(share)
    responses = {name: given for mine, _ in shares for name, given in mine.items()}
    made.samples += sum(map(len, responses.values()))
    made.tokens += sum(len(response.ids) for given in responses.values() for response in given)
    team.on_main(lambda: _write_part(work, number, rows, responses))
    return any(stopped for _, stopped in shares)


def _write_part(work: Work, number: int, rows: pl.DataFrame, responses: dict[str, list[Response]]) -> None:
    tokenizer = load_tokenizer(work.model)
    known = rows.select("prompt_id").join(work.encoded, on="prompt_id", maintain_order="left")
    known = known.join(work.prompts.kept, on="prompt_id", maintain_order="left")
    made = [
        row | told
        for row in known.select("prompt_id", "prompt", "reference", "tools", "prompt_ids").to_dicts()
        for told in _rows_of(work, row, responses[row["prompt_id"]], tokenizer)
    ]
    schema = sample_schema(SAMPLES, work.kind)
    columns = {name: pl.Series(name, [row[name] for row in made], dtype) for name, dtype in schema.items()}
    write_parquet(work.folder / SAMPLES / part_name(number), pl.DataFrame(columns))


def _rows_of(
    work: Work, row: dict[str, Any], responses: Sequence[Response], tokenizer: Any
) -> Iterator[dict[str, Any]]:
    """The columns of each response of a prompt."""
    for number, response in enumerate(responses):
        logps = response.token_logps
        yield {
            "candidate_id": content_hash("candidate", row["prompt_id"], work.key, number),
            "number": number,
            "response": response_text(tokenizer, row["prompt_ids"], response.ids, work.ending),
            "model": work.named,
            "temperature": work.decoding.temperature,
            "finish_reason": response.finish_reason,
            "num_tokens": len(response.ids),
            "logps": None if logps is None else sum(logps),
            "response_ids": response.ids,
            "token_logps": logps,
        }


def _begin(work: Work, road: str | None) -> None:
    """Put what decides the samples, the prompts and the plan on disk before anything is sampled."""
    (work.folder / SAMPLE_JSON).unlink(missing_ok=True)  # it will not say what is there
    if not (work.folder / SAMPLER_JSON).exists():
        write_json(work.folder / SAMPLER_JSON, {"key": work.key, "identity": work.identity, "road": road})
    for name, frame in ((PROMPTS, work.prompts.kept), ("dropped", work.dropped)):
        write_whole(work.folder / name, sample_schema(name, work.kind), frame)
    write_whole(work.folder / "rejects", work.prompts.rejects.schema, work.prompts.rejects)
    path = work.folder / SAMPLE_PLAN
    if not path.exists() or not read_plan(work.folder).equals(work.plan):
        write_parquet(path, work.plan)


def _finish(work: Work, chat_template: str | None) -> None:
    """Write what was sampled and the hash of every file; its being there is what readers trust."""
    import transformers

    files = {name: sorted((work.folder / name).glob("part-*.parquet")) for name in (PROMPTS, "dropped", "rejects")}
    files[SAMPLES] = [work.folder / SAMPLES / part_name(number) for number in work.plan["part"].unique().sort()]
    samples = pl.concat(
        [pl.read_parquet(f, columns=["finish_reason", "num_tokens"], glob=False) for f in files[SAMPLES]]
    )
    document = {
        "sample_version": SAMPLE_VERSION,
        "key": work.key,
        "kind": work.kind,
        "identity": work.identity,
        "model": work.named,
        "provenance": {
            "chat_template": chat_template,
            "device": pick_device().type,
            "road": read_document(work.folder / SAMPLER_JSON, Sampler)["road"],
            "versions": {"prefkit": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        },
        "files": [file._asdict() for file in work.prompts.files],
        "counts": _counts(work) | {"samples": samples.height, "tokens": int(samples["num_tokens"].sum())},
        "finish_reasons": _counted(samples["finish_reason"]),
        "dropped_reasons": _counted(work.dropped["reason"]),
        "parts": {name: [_entry(file) for file in listed] for name, listed in files.items()},
        "plan": _entry(work.folder / SAMPLE_PLAN),
    }
    write_json(work.folder / SAMPLE_JSON, document)


def _entry(file: Path) -> dict[str, Any]:
    rows = pl.scan_parquet(file, glob=False).select(pl.len()).collect().item()
    return {"file": file.name, "rows": rows, "sha256": file_sha256(file)}


def _sampled(work: Work, made: _Made, seconds: float) -> Sampled:
    recorded = read_sample(work.folder)
    return Sampled(
        str(work.folder),
        work.key,
        recorded["counts"]["prompts"],
        recorded["counts"]["samples"],
        made.samples,
        recorded["counts"]["tokens"],
        recorded["finish_reasons"],
        recorded["dropped_reasons"],
        recorded["counts"]["rejects"],
        seconds,
        made.tokens / made.seconds if made.seconds else 0.0,
        made.lost / max(1, made.useful + made.lost),
        not work.missing and work.current,
    )
