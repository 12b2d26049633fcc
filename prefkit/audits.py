"""`prefkit audit`: what gives the answer away in a dataset, before a GPU is spent on it.

Comes in: a built dataset. Goes out: audit/*.parquet and audit.json, and an `Audited`. The order: one pass over the
pairs for length, structure and openers; passes that count words and n-grams; one for the pairs of those that matter;
then the probes and the verdict. With a tokenizer the tokens that DPO will see are counted as well.
"""

import contextlib
import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import polars as pl

from prefkit import __version__
from prefkit.adapters import base_folder
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
from prefkit.documents import Audit
from prefkit.encode import EncodeSettings, resolve_template
from prefkit.errors import AuditError, DatasetError, located
from prefkit.format import AUDIT_JSON, Kind, canonical_json, differing
from prefkit.judgement import Audited, Counted, judge_evidence
from prefkit.locks import locked
from prefkit.papers import renew_papers
from prefkit.sections import num_bytes
from prefkit.settings import AuditConfig
from prefkit.sources import file_sha256
from prefkit.spill import Spill
from prefkit.store import read_document, read_manifest, write_json
from prefkit.tables import check_parts, table_blocks, write_parquet
from prefkit.target import Target, pipeline_of
from prefkit.text import words_of

Tell = Callable[[str], None]
Watch = Callable[[int, int], None]
BLOCK = 4096
WITHOUT_EFFECT = {"memory_limit"}  # settings that change no figure
OF_TOKENIZERS = {".json", ".jinja", ".txt", ".model"}  # endings of the files that decide ids; never those of weights
MADE_OF = {  # of audit.json, in words
    "pairs_sha256": "the pairs",
    "encoding_sha256": "the tokenizer of audit.model, or how pairs become its tokens,",
    "prefkit_version": "prefkit itself",
}


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
    of = _made_of(pipeline, manifest)
    with locked(dataset) if keep else contextlib.nullcontext(), scratch_of(dataset if keep else None) as folder:
        counted = _count(pipeline, manifest, tokenizer, folder, tell, watch)
        if strict:
            tell(f"{settings.num_flips} sign flips by prompt")
            counted = _flipped(counted, settings)
        audited = judge_evidence(counted, settings, str(dataset), strict=strict, tell=tell)
        audited = audited._replace(document=audited.document | {"made_of": of})
        return _kept(dataset, audited) if keep else audited


def why_audit(target: Target, *, strict: bool = False) -> str | None:
    """What keeps the audit on disk from being the one that `audit_dataset` would make now; None where nothing does.

    Args:
        target: as of `audit_dataset`.
        strict: likewise.
    """
    pipeline = pipeline_of(target)
    dataset, settings = Path(pipeline.dataset), pipeline.audit
    manifest = read_manifest(dataset)
    if not (dataset / AUDIT_JSON).exists():
        return "there was none"
    try:
        recorded = read_document(dataset / AUDIT_JSON, Audit)
        check_parts((dataset / AUDIT_JSON).parent, recorded.get("parts", []))
    except DatasetError as error:
        return f"{error.where} {error.message}"
    of, wanted = recorded.get("made_of"), _made_of(pipeline, manifest)
    if of is None:
        return "it does not say what it was made of"
    if changed := next((name for name in wanted if of.get(name) != wanted[name]), None):
        return f"{MADE_OF[changed]} changed"
    now = settings.model_dump(mode="json", exclude={"limits", *WITHOUT_EFFECT})
    then = {name: value for name, value in recorded["settings"].items() if name not in WITHOUT_EFFECT}
    apart = differing(then, now) or differing(recorded["limits"], settings.limits.model_dump(mode="json"))
    if apart:
        section = "audit." if then != now else "audit.limits."
        return f"{section}{apart[0].partition(':')[0]} changed"
    return None if recorded["strict"] == strict else f"it was made {'without' if strict else 'with'} --strict"


def _made_of(pipeline: Pipeline, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What decides an audit beside its own settings; `encoding`: how pairs become the tokens of audit.model."""
    parts = [[part["file"], part["sha256"]] for part in manifest["parts"]["pairs"]]
    folder, encoding = pipeline.audit.model, None
    if folder is not None:
        settings, template = pipeline.precompute, pipeline.precompute.chat_template
        told = {name: getattr(settings, name) for name in ("max_length", "min_completion_tokens", "long_prompt")}
        files = [path for name in {folder, str(base_folder(folder))} for path in Path(name).glob("*")]
        files = [path for path in files if path.suffix in OF_TOKENIZERS]
        files += [Path(template)] if template is not None else []
        hashed = [[path.name, file_sha256(path)] for path in files if path.is_file()]
        encoding = _sha256([told, template, sorted(hashed)])
    return {"pairs_sha256": _sha256(parts), "encoding_sha256": encoding, "prefkit_version": __version__}


def _sha256(value: object) -> str:
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


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
