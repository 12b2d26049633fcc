"""Where a response ends: its end tokens, its stop texts, and what of its tokens is the response.

Comes in: a model folder, its tokenizer and chat template. Goes out: `Ending`. The end tokens are those that the model's
generation_config.json and config.json name, the tokenizer's, and the control token with which the template ends an
assistant's turn: base models' folders often name another one than the template writes.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from prefkit.adapters import base_folder
from prefkit.controls import control_tokens
from prefkit.encode import TEMPLATE_FAILS, TRANSCRIPT, apply_template

ASKED, SAID = "qzx ask xzq", "qzx say xzq"  # words that no template changes
CONTEXT = 8  # tokens of the prompt that a response is read behind
TRANSCRIPT_STOPS = ("\n\nHuman:",)  # what begins the other's next turn where no control token does


class Ending(NamedTuple):
    """How a model's responses end.

    `ids`: tokens that end a response; `texts`: what ends it, and is no part of it; `lead`: what the template writes
    between its generation prompt and a response (a space in transcripts); `controls`: ids that are never text.
    """

    ids: tuple[int, ...]
    texts: tuple[str, ...]
    lead: str
    controls: frozenset[int]


class Turn(NamedTuple):
    """What a template writes around an assistant's words: before them, after the generation prompt; and behind."""

    lead: str
    after: str


def find_ending(folder: str | Path, tokenizer: Any, template: str | None, stops: Sequence[str]) -> Ending:
    """How responses of a model end.

    Args:
        folder: of the model; of an adapter its base is looked at.
        tokenizer: its own.
        template: text of the chat template, None for text.
        stops: stop texts that are asked for.
    """
    controls = control_tokens(tokenizer)
    found = _ids_of_folder(base_folder(Path(folder))) | {tokenizer.eos_token_id}
    turn = assistant_turn(tokenizer, template)
    if turn.after:
        ids = tokenizer(turn.after, add_special_tokens=False)["input_ids"]
        found |= {next((i for i in ids if i in controls), None)}
    own = TRANSCRIPT_STOPS if template == TRANSCRIPT else ()
    ends = tuple(sorted(i for i in found if i is not None and i >= 0))
    return Ending(ends, tuple(dict.fromkeys([*stops, *own])), turn.lead, frozenset(controls))


def _ids_of_folder(folder: Path) -> set[int | None]:
    """The end tokens that generation_config.json and config.json name."""
    found: set[int | None] = set()
    for name in ("generation_config.json", "config.json"):
        try:
            named = json.loads((folder / name).read_text(encoding="utf-8")).get("eos_token_id")
        except (OSError, ValueError, AttributeError):
            continue
        found |= {i for i in (named if isinstance(named, list) else [named]) if type(i) is int}
    return found


def assistant_turn(tokenizer: Any, template: str | None) -> Turn:
    """What a template writes around an assistant's words, found by rendering one; nothing where it cannot be told."""
    if template is None:
        return Turn("", "")
    asked = [{"role": "user", "content": ASKED}]
    try:
        prompt = apply_template(asked, tokenizer, template, ask=True)
        whole = apply_template([*asked, {"role": "assistant", "content": SAID}], tokenizer, template)
    except TEMPLATE_FAILS:
        return Turn("", "")
    before, said, after = whole.partition(SAID)
    if not said:
        return Turn("", "")
    lead = before.removeprefix(prompt) if before.startswith(prompt) else ""
    return Turn(lead, after)


def response_text(tokenizer: Any, prompt_ids: Sequence[int], ids: Sequence[int], ending: Ending) -> str:
    """The words of a response: without control tokens, what the template leads with, and what follows a stop text.

    It is read behind the last tokens of its prompt: some tokenizers leave out the space that a text begins with.
    """
    kept = ids[:-1] if ids and ids[-1] in ending.ids else ids
    plain = [i for i in kept if i not in ending.controls]
    text = _behind(tokenizer, [i for i in prompt_ids[-CONTEXT:] if i not in ending.controls], plain)
    cut = min((at for stop in ending.texts if (at := text.find(stop)) >= 0), default=len(text))
    return text[:cut].removeprefix(ending.lead)


def _behind(tokenizer: Any, before: Sequence[int], ids: Sequence[int]) -> str:
    """The text that some tokens add to those before them."""
    first, whole = _decoded(tokenizer, before), _decoded(tokenizer, [*before, *ids])
    # a character may be cut in two there
    return whole.removeprefix(first) if whole.startswith(first) else _decoded(tokenizer, ids)


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


class StopTexts:
    """Whether a response that grows token by token has just come to a stop text."""

    def __init__(self, tokenizer: Any, ending: Ending) -> None:
        self.tokenizer, self.ending = tokenizer, ending
        # a stop text that the last token completes lies in as many tokens as it has bytes: each holds one at least
        self.reach = max((len(text.encode()) for text in ending.texts), default=0)

    def ended(self, ids: Sequence[int]) -> bool:
        """Whether the words of these tokens hold a stop text that ends in the last token."""
        if not self.reach:
            return False
        tail: list[int] = []
        for token in reversed(ids):
            if token not in self.ending.controls:
                tail.append(token)
            if len(tail) > self.reach:
                break
        text = _decoded(self.tokenizer, tail[::-1])
        return any(stop in text for stop in self.ending.texts)
