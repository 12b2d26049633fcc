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

from prefkit import __version__
from prefkit.candidate_folder import (
    read_plan,
    read_sample,
    write_whole,
)
from prefkit.config import Changes, Pipeline, Sections, require_model
from prefkit.documents import Sampler
from prefkit.engines import ANSWERS, Engine, Request, Response, check_responses, load_engine
from prefkit.errors import ConfigError, InputError, Interrupted, located
from prefkit.format import Kind, part_name
from prefkit.functions import calling
from prefkit.generation import Generator, Road, answer, choose_road
from prefkit.locks import leave_no_empty_directory
from prefkit.models import check_fits, load_model, load_tokenizer, pick_device
from prefkit.processes import Team, join_team, process_rank
from prefkit.sample_format import (
    PROMPTS,
    SAMPLE_JSON,
    SAMPLE_PLAN,
    SAMPLE_VERSION,
    SAMPLER_JSON,
    SAMPLES,
    sample_schema,
)
from prefkit.sample_settings import SampleConfig
from prefkit.sample_work import (
    Work,
    counted,
    counts_of,
    prepare_sampling,
    without_prompts,
)
from prefkit.sources import file_sha256
from prefkit.stops import StopTexts, response_text
from prefkit.store import dataset_around, read_document, write_json
from prefkit.tables import write_parquet
from prefkit.target import Target, pipeline_of
from prefkit.text import content_hash

Tell = Callable[[str], None]
Watch = Callable[[int, int, int], None]  # prompts done, prompts in all, tokens made


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
        InputError: sample.out is in a dataset.
        DatasetError: the directory holds something else, or samples of another model or other settings.
        ModelError: the model or its tokenizer does not load or does not fit.
        MachineError: out of disk or memory.
        Interrupted: `stop` said so.

    Example:
        asked = {"path": "demo/world/heldout.jsonl", "limit": 8}
        changes = {"sample.prompts": asked, "sample.out": "eight", "sample.n": 2}
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
    _refuse_in_dataset(Path(pipeline.sample.out), pipeline.dataset if isinstance(pipeline, Pipeline) else None)
    return draw_samples(
        pipeline.sample,
        model=Path(require_model(pipeline.sample.model or pipeline.precompute.model, "sample.model")),
        kind=pipeline.kind,
        chat_template=pipeline.precompute.chat_template,
        tell=tell,
        watch=watch,
        stop=stop,
    )


def _refuse_in_dataset(out: Path, dataset: str | None) -> None:
    """Refuse samples in a dataset, or in what a pipeline will make one: no build would take it for its own."""
    to_be = dataset is not None and out.resolve().is_relative_to(Path(dataset).resolve())
    if to_be or dataset_around(out) is not None:
        raise InputError("samples cannot be written into a dataset", where=str(out), hint="sample.out elsewhere")


def draw_samples(
    settings: SampleConfig,
    *,
    model: str | Path,
    kind: Kind | None = None,
    chat_template: str | None = None,
    section: str = "sample",
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
        section: whose settings these are, for messages.
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
                own.append(prepare_sampling(settings, Path(model), kind, chat_template, say, held, section))
                return without_prompts(own[0])

            work = team.on_main(prepare)
            work = own[0] if own else work
            made = _Made()
            if work.missing or not work.current:
                _sample(settings, work, team, say, watch, stop, made, chat_template)
            return team.on_main(lambda: _sampled(work, made, time.monotonic() - started))
    finally:
        if process_rank() == 0:
            leave_no_empty_directory(Path(settings.out))


class _Made:
    """What this call made: responses, their tokens, seconds, and the slots that all processes computed."""

    def __init__(self) -> None:
        self.samples = self.tokens = self.useful = self.lost = 0
        self.seconds = 0.0


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
        name = settings.engine

        def theirs(asked: Sequence[Request], _width: int, _made: Callable[[int], None]) -> Sequence[Sequence[Response]]:
            with calling(name, function, "sample.engine", where=f"prompt {asked[0].prompt_id[:16]}", expected=ANSWERS):
                return function(asked, work.decoding)

        return _Engine(name, theirs, name, lambda: (0, 0))
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
        "counts": counts_of(work) | {"samples": samples.height, "tokens": int(samples["num_tokens"].sum())},
        "finish_reasons": counted(samples["finish_reason"]),
        "dropped_reasons": counted(work.dropped["reason"]),
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
