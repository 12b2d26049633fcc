"""Deduplication and split of a build in plain Python: sets and loops over every two pairs, no sketches and no hashes.

Written from the rules alone, quadratic on purpose: what is here is meant to be read beside docs, not to be fast. Takes
rows as the pairs table has them (dicts), gives what should become of each. Similarities are fractions. Nothing is taken
from the code under test.
"""

import hashlib
import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any, NamedTuple

Row = Mapping[str, Any]
Gram = tuple[str, ...]

WORD = re.compile(r"\w+|[^\w\s]")
UNSPACED = ("CJK UNIFIED", "CJK COMPATIBILITY IDEOGRAPH", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")
TRUST = {"human": 0, "rule": 1, "model": 2, None: 3}
SYSTEM = ("system", "developer")


class Rules(NamedTuple):
    """The settings of deduplication and split; `threshold` None: no near-matching."""

    threshold: Fraction | None = Fraction(4, 5)
    ngram: int = 5
    prompt_ngram: int = 3
    contradictions: str = "drop_both"
    cycles: str = "drop"
    max_pairs_per_prompt: int | None = None
    test_share: float = 0.05
    seed: int = 0


class Drop(NamedTuple):
    """Why a row goes. `duplicate_of`, `jaccard` of duplicates; `contradicts`: the pair_ids that may stand there."""

    reason: str
    duplicate_of: str | None = None
    jaccard: Fraction | None = None
    contradicts: frozenset[str] = frozenset()
    cluster: int | None = None  # any name of it


class Outcome(NamedTuple):
    """By place in the input: the rows that stay, what happened to the others, and the prompt cluster of each row."""

    kept: list[int]
    dropped: dict[int, Drop]
    prompt_cluster: list[int]
    split: dict[int, str]


# texts


@lru_cache(maxsize=100_000)
def fold(text: str) -> str:
    """What is compared for equality: NFC, runs of white space as one space, none at the ends."""
    return re.sub(r"\s+", " ", unicodedata.normalize("NFC", text)).strip()


def apart(word: str) -> list[str]:
    """A word, with each character of a script that puts no space between words by itself."""
    parts, run = [], ""
    for character in word:
        if ord(character) >= 128 and unicodedata.name(character, "").startswith(UNSPACED):
            parts += [run, character]
            run = ""
        else:
            run += character
    return [part for part in [*parts, run] if part]


@lru_cache(maxsize=10_000)
def words_of(text: str) -> Gram:
    """The words of a text, and its signs."""
    folded = unicodedata.normalize("NFC", text).casefold()
    return tuple(part for word in WORD.findall(folded) for part in apart(word))


def listed_grams(text: str, n: int) -> list[Gram]:
    """The n-grams of a text in order; of a short one all its words as one."""
    words = words_of(text)
    return [words] if len(words) < n else [words[at : at + n] for at in range(len(words) - n + 1)]


@lru_cache(maxsize=10_000)
def grams(text: str, n: int) -> frozenset[Gram]:
    """The set that similarity is about."""
    return frozenset(listed_grams(text, n))


def is_short(text: str, n: int) -> bool:
    """Whether a text has fewer than n words."""
    return len(words_of(text)) < n


@lru_cache(maxsize=100_000)
def jaccard(one: str, other: str, n: int) -> Fraction:
    """Common n-grams / all n-grams of two texts."""
    left, right = grams(one, n), grams(other, n)
    return Fraction(len(left & right), len(left | right))


def side_text(side: Any) -> str:
    """A reply as a reader sees it: a text, or the contents (and tool calls) of its messages, one a line."""
    if isinstance(side, str):
        return side
    calls = [(turn.get("extra") or "") if '"tool_calls"' in (turn.get("extra") or "") else "" for turn in side]
    return "\n".join(turn["content"] + call for turn, call in zip(side, calls, strict=True))


def prompt_text(prompt: Any) -> str:
    """A prompt without its system and developer messages."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(turn["content"] for turn in prompt if turn["role"] not in SYSTEM)


def folded(value: Any) -> Hashable:
    """A text or messages, roles and calls included, such that equal means the same but for white space and NFC."""
    if isinstance(value, str):
        return fold(value)
    return tuple((turn["role"], fold(turn["content"]), turn.get("extra")) for turn in value)


def setting(row: Row) -> Hashable:
    """What the model is told beside the prompt; pairs of different settings have nothing to do with each other."""
    prompt = row["prompt"]
    told = [] if isinstance(prompt, str) else [turn for turn in prompt if turn["role"] in SYSTEM]
    tools = row.get("tools")
    return (None if tools is None else fold(tools), *folded_turns(told))


def folded_turns(turns: Iterable[Mapping[str, Any]]) -> list[Hashable]:
    """Role and folded content of each."""
    return [(turn["role"], fold(turn["content"])) for turn in turns]


# ids


def bare(value: Any) -> Any:
    """Messages as they are hashed: without an empty `extra`."""
    if isinstance(value, str):
        return value
    return [{key: inner for key, inner in turn.items() if key != "extra" or inner is not None} for turn in value]


def content_id(row: Row, *names: str) -> str:
    """sha256 over the JSON of kind and texts, exactly as they are."""
    kind = "text" if isinstance(row["prompt"], str) else "chat"
    tools = [] if row.get("tools") is None else [row["tools"]]
    value = [kind, *(bare(row[name]) for name in names), *tools]
    written = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(written.encode()).hexdigest()


def pair_id(row: Row) -> str:
    """The id of a pair."""
    return content_id(row, "prompt", "chosen", "rejected")


def prompt_id(row: Row) -> str:
    """The id of its prompt."""
    return content_id(row, "prompt")


def is_test(smallest: str, share: float, seed: int) -> bool:
    """Whether the prompts of a cluster are held out, by the smallest prompt_id among them."""
    digest = hashlib.sha256(f"{seed}:{smallest}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


# relations


class Likeness(NamedTuple):
    """How two pairs of one prompt cluster and setting relate."""

    direct: Fraction
    cross: Fraction
    is_near: bool
    is_against: bool


def likeness(one: Row, other: Row, rules: Rules) -> Likeness:
    """The rule for two pairs, of which it is known that prompt cluster and setting are the same."""
    sides = {(a, b): (folded(one[a]), folded(other[b])) for a in ("chosen", "rejected") for b in ("chosen", "rejected")}
    same_prompt = folded(one["prompt"]) == folded(other["prompt"])
    is_reversed = all(len(set(sides[pair])) == 1 for pair in (("chosen", "rejected"), ("rejected", "chosen")))
    if rules.threshold is None:
        is_same = all(len(set(sides[pair])) == 1 for pair in (("chosen", "chosen"), ("rejected", "rejected")))
        return Likeness(
            Fraction(int(is_same)), Fraction(int(is_reversed)), is_same and same_prompt, is_reversed and same_prompt
        )
    limit = rules.threshold

    def compared(mine: str, theirs: str) -> tuple[Fraction, bool]:
        left, right = side_text(one[mine]), side_text(other[theirs])
        value = jaccard(left, right, rules.ngram)
        by_chance = (is_short(left, rules.ngram) or is_short(right, rules.ngram)) and not same_prompt
        return value, value >= limit and not by_chance

    (cc, cc_match), (rr, rr_match) = compared("chosen", "chosen"), compared("rejected", "rejected")
    (cr, cr_match), (rc, rc_match) = compared("chosen", "rejected"), compared("rejected", "chosen")
    direct, cross = min(cc, rr), min(cr, rc)
    crosses = cr_match and rc_match
    is_near = cc_match and rr_match and not (crosses and cross > direct) and not is_reversed
    return Likeness(direct, cross, is_near, crosses and not is_near)


def components(number: int, edges: Iterable[tuple[int, int]]) -> list[int]:
    """The smallest place of the connected component of each place."""
    root = list(range(number))

    def find(at: int) -> int:
        while root[at] != at:
            at = root[at]
        return at

    for left, right in edges:
        one, other = find(left), find(right)
        root[max(one, other)] = min(one, other)
    return [find(at) for at in range(number)]


def prompt_clusters(rows: Sequence[Row], rules: Rules) -> list[int]:
    """The prompt cluster of each row: prompts that are equal after folding or alike, and what they are alike to."""
    texts = [prompt_text(row["prompt"]) for row in rows]
    edges = [
        (left, right)
        for left in range(len(texts))
        for right in range(left + 1, len(texts))
        if fold(texts[left]) == fold(texts[right])
        or (rules.threshold is not None and jaccard(texts[left], texts[right], rules.prompt_ngram) >= rules.threshold)
    ]
    return components(len(texts), edges)


def closest_calls(rows: Sequence[Row], rules: Rules) -> list[Fraction]:
    """Every similarity that a decision may hang on, of prompts and of sides, zeros and ones left out."""
    prompts = sorted({prompt_text(row["prompt"]) for row in rows})
    sides = sorted({side_text(row[side]) for row in rows for side in ("chosen", "rejected")})
    found = {
        jaccard(one, other, n)
        for texts, n in ((prompts, rules.prompt_ngram), (sides, rules.ngram))
        for place, one in enumerate(texts)
        for other in texts[:place]
    }
    return sorted(found - {Fraction(0), Fraction(1)})


# the stage


def claim(row: Row, number: int) -> tuple[Any, ...]:
    """Smallest first: a human's over a rule's over a model's over nobody's, the larger margin, the smaller pair_id."""
    margin = row.get("margin")
    return (TRUST[row.get("annotator")], -(float("-inf") if margin is None else margin), pair_id(row), number)


def dedupe(rows: Sequence[Row], rules: Rules) -> Outcome:
    """What becomes of each row."""
    cluster = prompt_clusters(rows, rules)
    settings = [setting(row) for row in rows]
    claims = [claim(row, number) for number, row in enumerate(rows)]
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        groups[(*(folded(row[name]) for name in ("prompt", "chosen", "rejected")), settings[number])].append(number)
    copies = {min(numbers, key=claims.__getitem__): numbers for numbers in groups.values()}
    first = {number: best for best, numbers in copies.items() for number in numbers}
    left = sorted(copies)
    lost: dict[int, Drop] = {}

    alike: dict[tuple[int, int], Likeness] = {}
    for place, one in enumerate(left):
        for other in left[:place]:
            if (cluster[one], settings[one]) == (cluster[other], settings[other]):
                alike[other, one] = alike[one, other] = likeness(rows[one], rows[other], rules)

    near = [pair for pair, found in alike.items() if found.is_near]
    if rules.contradictions != "keep":
        lost |= contradictions(rows, left, alike, strengths(rows, copies, components(len(rows), near), rules))
    left = [number for number in left if number not in lost]
    if rules.cycles == "drop":
        edges = {number: ends(rows[number], cluster[number], rules) for number in left}
        lost |= {number: Drop("cycle") for number in circular(rows, edges)}
    left = [number for number in left if number not in lost]

    groups_left: dict[int, list[int]] = defaultdict(list)
    of_near = components(len(rows), [(one, other) for one, other in near if one not in lost and other not in lost])
    for number in left:
        groups_left[of_near[number]].append(number)
    best_of = {name: min(numbers, key=claims.__getitem__) for name, numbers in groups_left.items()}
    best = sorted(best_of.values(), key=claims.__getitem__)
    if rules.max_pairs_per_prompt is not None:
        taken: dict[int, int] = defaultdict(int)
        for number in best:
            taken[cluster[number]] += 1
            if taken[cluster[number]] > rules.max_pairs_per_prompt:
                lost[number] = Drop("over_max_pairs_per_prompt")
    for name, numbers in groups_left.items():
        for number in numbers:
            if number == best_of[name]:
                continue
            if best_of[name] in lost:
                lost[number] = lost[best_of[name]]
            else:
                value = likeness(rows[number], rows[best_of[name]], rules).direct
                lost[number] = Drop("near_duplicate", pair_id(rows[best_of[name]]), value, cluster=name)
    for number in range(len(rows)):
        if number != first[number]:
            stays = first[number] not in lost
            lost[number] = (
                Drop("duplicate", pair_id(rows[first[number]]), Fraction(1)) if stays else lost[first[number]]
            )
    kept = [number for number in range(len(rows)) if number not in lost]
    return Outcome(kept, lost, cluster, splits(rows, kept, cluster, rules))


def strengths(
    rows: Sequence[Row], copies: Mapping[int, list[int]], of_near: Sequence[int], rules: Rules
) -> dict[int, Any]:
    """What speaks for each representative when another pair says the opposite."""
    if rules.contradictions == "majority":
        total: dict[int, int] = defaultdict(int)
        for best, numbers in copies.items():
            total[of_near[best]] += len(numbers)
        return {best: total[of_near[best]] for best in copies}
    if rules.contradictions == "higher_margin":
        return {best: rows[best].get("margin") or 0.0 for best in copies}
    return dict.fromkeys(copies, 0)


def contradictions(
    rows: Sequence[Row], left: Iterable[int], alike: Mapping[tuple[int, int], Likeness], strength: Mapping[int, Any]
) -> dict[int, Drop]:
    """The pairs whose claim is not larger than that of each pair that says the opposite."""
    against: dict[int, list[int]] = defaultdict(list)
    for (one, other), found in alike.items():
        if found.is_against:
            against[one].append(other)
    return {
        number: Drop("contradiction", contradicts=frozenset(pair_id(rows[other]) for other in against[number]))
        for number in left
        if any(strength[number] <= strength[other] for other in against[number])
    }


Response = Hashable
Edge = tuple[Response, Response]


def ends(row: Row, cluster: int, rules: Rules) -> Edge:
    """Chosen and rejected as responses: what is said, and to what prompts; a short one is to its very prompt."""

    def response(side: str) -> Response:
        to_one_prompt = rules.threshold is None or is_short(side_text(row[side]), rules.ngram)
        where = folded(row["prompt"]) if to_one_prompt else cluster
        return (to_one_prompt, where, setting(row), folded(row[side]))

    return response("chosen"), response("rejected")


def circular(rows: Sequence[Row], given: Mapping[int, Edge]) -> list[int]:
    """Level by level, the surest first: the pairs that a path of surer or equally sure ones leads back from."""
    drawn = set(given.values())
    edges = {number: edge for number, edge in given.items() if edge[::-1] not in drawn}

    def sure(number: int) -> tuple[float, float]:
        agreement, margin = (rows[number].get(name) for name in ("agreement", "margin"))
        return (1.0 if agreement is None else agreement, 0.0 if margin is None else margin)

    stay: set[int] = set()
    gone: list[int] = []
    for level in sorted({sure(number) for number in edges}, reverse=True):
        new = {number for number in edges if sure(number) == level}
        ahead: dict[Response, set[Response]] = defaultdict(set)
        for number in stay | new:
            ahead[edges[number][0]].add(edges[number][1])
        closing = {number for number in new if leads(ahead, edges[number])}
        gone += sorted(closing)
        stay |= new - closing
    return gone


def leads(ahead: Mapping[Response, set[Response]], edge: Edge) -> bool:
    """Whether a path leads from the end of an edge back to its start."""
    seen, waiting = {edge[1]}, [edge[1]]
    while waiting:
        found = ahead.get(waiting.pop(), set()) - seen
        seen |= found
        waiting += found
    return edge[0] in seen


def splits(rows: Sequence[Row], kept: Iterable[int], cluster: Sequence[int], rules: Rules) -> dict[int, str]:
    """The split of each kept row: that of the smallest prompt_id of its prompt cluster."""
    smallest: dict[int, str] = {}
    for number, row in enumerate(rows):
        smallest[cluster[number]] = min(prompt_id(row), smallest.get(cluster[number], prompt_id(row)))
    return {
        number: "test" if is_test(smallest[cluster[number]], rules.test_share, rules.seed) else "train"
        for number in kept
    }
