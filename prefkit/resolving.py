"""A pipeline with what its sources decide: their formats, the kind of the dataset, and which settings have an effect.

Comes in: a pipeline as it was written. Goes out: the same with nothing left open, or an error that names the key.
"""

from collections.abc import Callable, Mapping, Sequence

from prefkit.config import DecontaminateConfig, PairsConfig, Pipeline
from prefkit.detection import with_formats
from prefkit.errors import ConfigError
from prefkit.format import Kind
from prefkit.formats import FORMATS
from prefkit.formats.reading import Family
from prefkit.sources import is_chat_source

Tell = Callable[[str], None]
# who can use what a pipeline says of pairs; length_cap and max_pairs_per_prompt are for all
SCORED: Sequence[Family] = ("candidates", "comparisons", "pairs")
OF_CANDIDATES = ("chosen", "rejected", "scorers", "scorers_agree", "seed")
USED_BY: Mapping[str, Sequence[Family]] = {
    **dict.fromkeys(OF_CANDIDATES, SCORED[:1]),
    **dict.fromkeys(("min_margin", "max_margin", "min_chosen_score"), SCORED),
    "min_agreement": ("comparisons",),
}


def resolve_formats(pipeline: Pipeline, tell: Tell = lambda _text: None) -> Pipeline:
    """The pipeline with the format of every source; one that it leaves out is found by the first rows, and told.

    Raises:
        SourceError: none or several fit.
    """
    found = with_formats(pipeline.sources, pipeline.validate_.max_reject_share)
    for source, why in found:
        if why:
            tell(f"{source.path}: format {source.format}, as {why}")
    return pipeline.model_copy(update={"sources": [source for source, _ in found]})


def refuse_without_effect(pipeline: Pipeline) -> None:
    """Refuse what a pipeline says of pairs where none of its sources, whose formats are known, can use it.

    What is said as it is by default does no harm, and stands in every manifest.

    Raises:
        ConfigError: by the name of the key.
    """
    clean, usual = pipeline.decontaminate, DecontaminateConfig()
    for key in ("ngram", "max_overlap"):
        if not clean.against and getattr(clean, key) != getattr(usual, key):
            raise ConfigError(
                "has no effect: there is nothing to compare with",
                where=f"decontaminate.{key}",
                expected="evaluation files in decontaminate.against",
                hint="name some, or leave the key out",
            )
    families = {FORMATS[str(source.format)].family for source in pipeline.sources}
    defaults = PairsConfig()
    for key in USED_BY:
        if getattr(pipeline.pairs, key) != getattr(defaults, key) and not families & set(USED_BY[key]):
            what = " or ".join(USED_BY[key])
            raise ConfigError(
                f"has no effect: no source holds {what}",
                where=f"pairs.{key}",
                expected=f"a source of {what}",
                hint="leave the key out; prefkit formats says what each format holds",
            )


def resolve_kind(pipeline: Pipeline) -> Kind:
    """The pipeline's own kind, or what its sources hold: chat if one begins with messages or transcripts, else text."""
    return pipeline.kind or ("chat" if any(is_chat_source(source) for source in pipeline.sources) else "text")
