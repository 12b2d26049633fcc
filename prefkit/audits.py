"""`prefkit audit`: what gives the answer away in a dataset, before a GPU is spent on it.

Comes in: a built dataset. Goes out: audit/*.parquet and audit.json, and an `Audited`. The order: one pass over the
pairs for length, structure and openers; passes that count words and n-grams; one for the pairs of those that matter;
then the probes and the verdict. With a tokenizer the tokens that DPO will see are counted as well.
"""

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import polars as pl

from prefkit.audit.allow import allows
from prefkit.audit.alphabets import Alphabet, count_alphabet, with_permutation
from prefkit.audit.counting import Texts, of_ids, of_words
from prefkit.audit.evidence import TEXTS, Evidence, gather
from prefkit.audit.features import Sides
from prefkit.audit.postings import ids_of, names_of
from prefkit.audit.structure import pair_similarity
from prefkit.audit.verdict import LEVELS, Level
from prefkit.boundaries import tokenise_pairs
from prefkit.config import Changes, Pipeline
from prefkit.encode import EncodeSettings, resolve_template
from prefkit.errors import AuditError, located
from prefkit.format import AUDIT_JSON, Kind
from prefkit.judgement import Audited, Counted, judge_evidence
from prefkit.locks import locked
from prefkit.papers import renew_papers
from prefkit.sections import num_bytes
from prefkit.settings import AuditConfig
from prefkit.spill import Spill
from prefkit.store import read_manifest, write_json
from prefkit.tables import check_parts, table_blocks, write_parquet
from prefkit.target import Target, pipeline_of
from prefkit.text import words_of

Tell = Callable[[str], None]
Watch = Callable[[int, int], None]
BLOCK = 4096


def audit_dataset(
    target: Target,
    *,
    changes: Changes = (),
    strict: bool = False,
    keep: bool = True,
    tell: Tell = lambda _text: None,
    watch: Watch = lambda _done, _total: None,
) -> Audited:
    """Audit a dataset and, with `keep`, write what was found into its audit/.

    Args:
        target: a dataset directory, a pipeline file or a loaded Pipeline. Its `audit` section says what to count and
            when something is a finding; with `audit.model` the `precompute` section says how pairs become tokens.
        changes: settings by their dotted keys, as in `load_pipeline`.
        strict: findings have to hold under Benjamini-Yekutieli, and tokens under sign flips by prompt; others are
            notes.
        keep: write audit/; without it nothing in the dataset changes.
        tell: called with what the work is at.
        watch: called with the pairs that a pass has read, and all.

    Returns:
        the verdict, the findings worst first, and the tables; also where nothing is kept.

    Raises:
        DatasetError: the dataset is unfinished or damaged.
        ModelError: `audit.model` holds no tokenizer that fits.

    Example:
        audited = prefkit.audit_dataset("demo/dataset", changes={"audit.allow": ["certainly"]}, keep=False)
        print(audited.verdict, [(finding.level, finding.name) for finding in audited.findings])
    """
    pipeline = pipeline_of(target, changes)
    dataset, settings = Path(pipeline.dataset), pipeline.audit
    manifest = read_manifest(dataset)
    check_parts(dataset / "pairs", manifest["parts"]["pairs"])
    tokenizer = _tokenizer(pipeline, manifest["kind"])
    with locked(dataset) if keep else contextlib.nullcontext(), scratch_of(dataset if keep else None) as folder:
        counted = _count(pipeline, manifest, tokenizer, folder, tell, watch)
        if strict:
            tell(f"{settings.num_flips} sign flips by prompt")
            counted = _flipped(counted, settings)
        audited = judge_evidence(counted, settings, str(dataset), strict=strict, tell=tell)
        return _kept(dataset, audited) if keep else audited


@contextlib.contextmanager
def scratch_of(dataset: Path | None) -> Iterator[Path]:
    """A folder for what does not fit into memory: below audit/, where what a kill has left goes first; or elsewhere."""
    if dataset is None:
        with tempfile.TemporaryDirectory(prefix="prefkit-audit-") as temporary:
            yield Path(temporary)
        return
    folder = dataset / "audit" / ".scratch"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def texts_of(dataset: Path, manifest: Mapping[str, Any], watch: Watch = lambda _done, _total: None) -> Texts:
    """The pairs of a dataset as plain texts, block by block; `watch` is told how far each pass over them is."""
    kind = manifest["kind"]
    sides = ("prompt", "chosen", "rejected")
    columns = [words_of(name, kind).alias(name) if name in sides else pl.col(name) for name in TEXTS]

    def texts() -> Iterator[pl.DataFrame]:
        blocks = table_blocks(dataset, "pairs", manifest, TEXTS, BLOCK)
        done, total = 0, int(manifest["counts"]["pairs"])
        for block in blocks:
            yield block.select(columns)
            done += block.height
            watch(done, total)
        if not total:
            yield pl.DataFrame(schema=dict.fromkeys(TEXTS, pl.String))

    return texts


def _tokenizer(pipeline: Pipeline, kind: Kind) -> tuple[Any, EncodeSettings] | None:
    """The tokenizer of `audit.model` and how it encodes; None without one. Only here is transformers imported."""
    folder, settings = pipeline.audit.model, pipeline.precompute
    if folder is None:
        return None
    from prefkit.models import load_tokenizer

    tokenizer = load_tokenizer(folder)
    with located(folder):
        template = resolve_template(kind, settings.chat_template, tokenizer)
    limits = (settings.max_length, settings.min_completion_tokens, settings.long_prompt)
    return tokenizer, EncodeSettings(kind, *limits, template)


def _count(
    pipeline: Pipeline,
    manifest: Mapping[str, Any],
    tokenizer: tuple[Any, EncodeSettings] | None,
    folder: Path,
    tell: Tell,
    watch: Watch,
) -> Counted:
    """Every pass over the pairs but those for the tokens that matter."""
    dataset, settings = Path(pipeline.dataset), pipeline.audit
    texts, tokenised = texts_of(dataset, manifest, watch), None
    if tokenizer is not None:
        tell("encoding")
        columns = ("pair_id", "prompt", "chosen", "rejected", "tools")
        with located(str(settings.model)):
            tokenised = tokenise_pairs(table_blocks(dataset, "pairs", manifest, columns, BLOCK), *tokenizer, folder)
    tell("reading")
    evidence = gather(texts, Sides(tokenised.chosen, tokenised.rejected) if tokenised else None)
    similarity = pair_similarity(texts, evidence.pairs.height)
    tell("counting words")
    words = count_words(texts, evidence, settings, folder)
    if tokenizer is None or tokenised is None:
        return Counted(evidence, similarity, words, None, None)
    tell("counting the tokens of the model")
    ids, decode = tokenised.blocks, tokenizer[0].decode
    with Spill(folder) as spill:
        model = count_alphabet(
            "model",
            ids,
            of_ids,
            lambda counts: _decoded(ids_of(ids, counts), decode),
            evidence,
            allows(settings.allow),
            scratch=spill,
            **_counting(settings),
        )
    return Counted(evidence, similarity, words, model, tokenised)


def count_words(texts: Texts, evidence: Evidence, settings: AuditConfig, folder: Path | None) -> Alphabet:
    """The words and their n-grams over all pairs; `folder`: where counters go that outgrow audit.memory_limit."""
    with Spill(folder) as spill:
        return count_alphabet(
            "word",
            texts,
            of_words,
            lambda counts: (names_of(texts, counts), None),
            evidence,
            allows(settings.allow),
            scratch=spill,
            **_counting(settings),
        )


def _counting(settings: AuditConfig) -> dict[str, int]:
    limit = num_bytes(settings.memory_limit)
    return {"ngrams": settings.ngrams, "min_discordant": settings.min_discordant, "memory_limit": limit}


def _decoded(ids: list[list[int]], decode: Callable[..., str]) -> tuple[list[str], list[list[int]]]:
    return [decode(one, clean_up_tokenization_spaces=False) for one in ids], ids


def _flipped(counted: Counted, settings: AuditConfig) -> Counted:
    """The permutation test of --strict, for each alphabet."""
    clusters, flips, seed = counted.evidence.clusters, settings.num_flips, settings.seed
    words = with_permutation(counted.words, clusters, flips, seed)
    model = counted.model and with_permutation(counted.model, clusters, flips, seed)
    return counted._replace(words=words, model=model)


def _kept(dataset: Path, audited: Audited) -> Audited:
    """Write the tables, then audit.json, which has their hashes and is taken away first: with it they are of one."""
    (dataset / AUDIT_JSON).unlink(missing_ok=True)
    parts = [write_parquet(dataset / name, table)._asdict() for name, table in audited.tables.items()]
    document = audited.document | {"parts": parts}
    write_json(dataset / AUDIT_JSON, document)
    renew_papers(dataset)
    return audited._replace(document=document)


def enforce_audit(audited: Audited, limit: Level | None = None) -> None:
    """Fail where the verdict of an audit is at a limit or worse: the exit of `prefkit audit --strict`.

    Args:
        audited: what `audit_dataset` returned.
        limit: not enough data | note | warn | fail; None takes the audit's own audit.limits.strict (warn by default).

    Raises:
        AuditError: the verdict is at the limit or worse.

    Example:
        audited = prefkit.audit_dataset("demo/dataset", strict=True, keep=False)
        try:
            prefkit.enforce_audit(audited)
        except prefkit.AuditError as error:
            print(error)
    """
    limit = limit or audited.document["limits"]["strict"]
    if LEVELS.index(audited.verdict) >= LEVELS.index(limit):
        raise AuditError(
            f"the verdict is {audited.verdict}: {audited.reason}",
            expected=f"better than {limit} (audit.limits.strict)",
            hint="prefkit audit TARGET lists the findings",
        )
