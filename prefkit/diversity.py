"""How varied sampled responses are: within a prompt, and over all of them.

Comes in: a frame with a row a response: prompt_id, response. Goes out: shares of 0..1. Words are those of text.WORD,
casefolded: a word, or a single sign. A set of word pairs (2-grams) holds the beginning and the end of a text too, so
that a text of one word has some.

* distinct-1, distinct-2: different n-grams over all n-grams of all responses (Li et al. 2016, arXiv 1510.03055, section
  5.2). It falls as responses get longer or more numerous: compare models on the same prompts and n alone.
* distinct_responses: of a prompt, different texts over texts.
* self_similarity: of a prompt, the mean Jaccard similarity of the sets of word pairs of any two of its responses; 1
  where all are the same, 0 where no two share a pair. Null where a prompt has one response.
"""

import itertools
from collections.abc import Iterable, Sequence

import polars as pl

from prefkit.text import WORD

EDGE = ""  # beside a text's first and last word: no word is empty


def words(text: str) -> list[str]:
    """The words and signs of a text, casefolded."""
    return WORD.findall(text.casefold())


def distinct_n(texts: Iterable[str], n: int) -> float | None:
    """Different n-grams over all n-grams of some texts, 0..1; None where no text has one.

    Example: "a b a" and "a b" have 5 words, of them 2 different, so distinct-1 is .4; of the 3 word pairs 2, so
    distinct-2 is 2/3.
    """
    seen: set[tuple[str, ...]] = set()
    total = 0
    for text in texts:
        found = words(text)
        grams = [tuple(found[at : at + n]) for at in range(len(found) - n + 1)]
        seen.update(grams)
        total += len(grams)
    return len(seen) / total if total else None


def word_pairs(text: str) -> frozenset[tuple[str, str]]:
    """The 2-grams of a text, with its beginning and its end: "a b" has (edge, a), (a, b), (b, edge)."""
    return frozenset(itertools.pairwise([EDGE, *words(text), EDGE]))


def mean_similarity(texts: Sequence[str]) -> float | None:
    """The mean Jaccard similarity of the word pairs of any two texts; None of fewer than two.

    Example: "a b" and "a c" share one of five word pairs: .2.
    """
    found = [word_pairs(text) for text in texts]
    alike = [len(one & other) / len(one | other) for one, other in itertools.combinations(found, 2)]
    return sum(alike) / len(alike) if alike else None


def diversity_by_prompt(rows: pl.DataFrame) -> pl.DataFrame:
    """Of each prompt how varied its responses are.

    Args:
        rows: prompt_id and response.

    Returns:
        prompt_id, distinct_responses, self_similarity (both null of a single response), sorted by prompt_id.
    """
    texts = rows.group_by("prompt_id").agg(pl.col("response")).sort("prompt_id")
    listed = texts["response"].to_list()
    return pl.DataFrame(
        {
            "prompt_id": texts["prompt_id"],
            "distinct_responses": [len(set(some)) / len(some) if len(some) > 1 else None for some in listed],
            "self_similarity": [mean_similarity(some) for some in listed],
        },
        schema={"prompt_id": pl.String, "distinct_responses": pl.Float64, "self_similarity": pl.Float64},
    )
