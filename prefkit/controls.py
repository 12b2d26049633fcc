"""Control tokens: what a tokenizer holds to be special, and how a text that spells one stays a text.

Comes in: the text pieces of a rendered conversation, those of the template and those of the data. Goes out: token ids
in which only the template's pieces give control tokens. The tokenizer is copied with every control token under a name
that nobody types, and the template's pieces are written with those names; so all else, white space around control
tokens included, is tokenised as ever. Price: one copy of the tokenizer, only if some text spells a control token.
"""

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

MARK = "\ue000"  # private use: begins every other name
END = "\ue001"


class Shadow(NamedTuple):
    """A copy of a tokenizer whose control tokens have other names.

    `names`: control token to its other name; `counted`: ids that only a template may give. The unknown token is none of
    them: any text may hold a character that the tokenizer does not know.
    """

    tokenizer: Any
    names: dict[str, str]
    counted: frozenset[int]
    spelled: re.Pattern[str]


def control_tokens(tokenizer: Any) -> dict[int, str]:
    """The special tokens of a tokenizer, by id: what must never come out of a pair's own text."""
    added = {i: t.content for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    named = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    return added | named


def make_shadow(tokenizer: Any) -> Shadow | None:
    """The copy, or None for a tokenizer that cannot be copied so (one written in Python, or an odd normaliser)."""
    from tokenizers import Tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", None)
    controls = {token: i for i, token in control_tokens(tokenizer).items() if token}
    if backend is None or not controls:
        return None
    names = {token: f"{MARK}{i}{END}" for token, i in controls.items()}
    state = json.loads(backend.to_str())
    state |= {"padding": None, "truncation": None, "post_processor": None}
    for token in state["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = state["model"]
    if isinstance(model.get("vocab"), dict):
        model["vocab"] = {names.get(token, token): i for token, i in model["vocab"].items()}
    elif "vocab" in model:  # Unigram: pieces with their scores
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    try:
        copy = Tokenizer.from_str(json.dumps(state))
    except Exception:  # whatever its parser says: it cannot be copied
        return None
    if any(copy.encode(name, add_special_tokens=False).ids != [controls[token]] for token, name in names.items()):
        return None
    longest_first = sorted(names, key=lambda token: (-len(token), token))
    counted = frozenset(controls.values()) - {tokenizer.unk_token_id}
    return Shadow(copy, names, counted, re.compile("|".join(map(re.escape, longest_first))))


def encode_pieces(tokenizer: Any, shadow: Shadow | None, pieces: Sequence[str]) -> list[int] | None:
    """Token ids of a text of which every second piece, from the second on, is data.

    Args:
        tokenizer: the tokenizer itself.
        shadow: its copy; without one every piece is tokenised by itself, and white space at its ends may become a token
            of its own.
        pieces: template, data, template, ... in their order.

    Returns:
        the ids, or None if a control token came out of the data all the same.
    """
    if shadow is None or any(MARK in piece for piece in pieces):
        ids: list[int] = []
        for number, piece in enumerate(pieces):
            ids += tokenizer(piece, add_special_tokens=False, split_special_tokens=bool(number % 2))["input_ids"]
        return ids
    written = [
        piece if number % 2 else shadow.spelled.sub(lambda found: shadow.names[found[0]], piece)
        for number, piece in enumerate(pieces)
    ]
    ids = shadow.tokenizer.encode("".join(written), add_special_tokens=False).ids
    given = [
        shadow.tokenizer.token_to_id(shadow.names[token]) for p in pieces[::2] for token in shadow.spelled.findall(p)
    ]
    found, wanted = (sum(i in shadow.counted for i in listed) for listed in (ids, given))
    return ids if found == wanted else None
