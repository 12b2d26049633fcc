"""How pairs look on a terminal: the two sides beside each other, what differs and what is flagged marked.

Comes in: whole pairs and places in them (show.py). Goes out: lines no wider than the console, long texts cut down to
what is marked. Without colour, signs stand around it. Text is data: never markup, and no escape sequence.
"""

import shlex
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

from rich.console import Console
from rich.text import Text

from prefkit.show import Pair, Shown, Turn
from prefkit.text import printable

Span = tuple[int, int]

NARROW = 60  # columns: below it a side has no room beside the other
SIDE, PROMPT, EARLIER = 1500, 600, 100  # characters of a message that are shown, about
HEAD, TAIL = 240, 160  # of them from its beginning and its end
CONTEXT, RUN, GAP = 80, 700, 40  # around a mark; of a mark itself; between two of them, rather shown than left out
SNAP = 16  # a cut moves by at most so much, to stand between words
LINE = 30  # a line break takes as much room as so many characters
SHOWN_EARLIER, SHOWN_FLAGS = 3, 12
SIGNS = {"chosen": ("{+", "+}"), "rejected": ("[-", "-]"), "flagged": ("<<", ">>")}
STYLES = {"chosen": "bold green", "rejected": "bold red", "flagged": "bold black on yellow"}


class Look(NamedTuple):
    """How wide, whether in colour, whether whole, and what stands between the sides."""

    width: int
    colour: bool
    full: bool
    rule: str


def print_pairs(shown: Shown, console: Console, *, width: int | None = None, full: bool = False) -> None:
    """Print pairs one after the other: prompt, both sides, where it comes from.

    Args:
        shown: what `show_pairs` returned.
        console: where to.
        width: in columns, otherwise the console's.
        full: leave nothing out of long texts.
    """
    colour = console.color_system is not None and not console.no_color
    look = Look(max(width or console.width, 2), colour, full, "|" if console.options.ascii_only else "\u2502")
    _say(console, look, _headline(shown), "bold")
    for said in _remarks(shown, look):
        _say(console, look, said, "dim")
    for number, pair in enumerate(shown.pairs, start=1):
        _say(console, look, f"\n{number} of {len(shown.pairs)}", "bold")
        _print_pair(pair, console, look)


def _say(console: Console, look: Look, text: str | Text, style: str = "", *, indent: int = 0) -> None:
    """Print a text, wrapped."""
    for line in _wrapped(console, Text(_clean(text), style) if isinstance(text, str) else text, look.width - indent):
        line.pad_left(indent)
        _put(console, line)


def _wrapped(console: Console, text: Text, width: int) -> list[Text]:
    """Lines of at most `width` columns, words that are longer in pieces."""
    return list(text.wrap(console, max(width, 2), overflow="fold"))  # no column is too narrow for a wide character


def _put(console: Console, line: Text) -> None:
    line.rstrip()
    console.print(line, soft_wrap=True, highlight=False)  # wrapped already, whatever width the console has


def _headline(shown: Shown) -> str:
    """How many pairs of how many, and which."""
    if not shown.matching:
        return f"{shown.dataset}: none of its {shown.total} pairs fits"
    fitting = f" that fit (of {shown.total})" if shown.matching < shown.total else ""
    order = "the highest shortcut_score first" if shown.by_score else "evenly spaced"
    return f"{shown.dataset}: {len(shown.pairs)} of {shown.matching} pairs{fitting}, {order}"


def _remarks(shown: Shown, look: Look) -> Iterator[str]:
    """What to know before reading: the audit, the token asked for, the signs."""
    if shown.pairs and not shown.audited:
        command = shlex.join(["prefkit", "audit", shown.dataset])
        yield f"not audited yet: {command} finds what gives chosen away, and scores each pair"
    if shown.token is not None:
        token, chosen, rejected, both = shown.token
        yield f"'{token}' is in chosen only in {chosen} pairs, in rejected only in {rejected}, in both in {both}"
    if shown.pairs and not look.colour:
        one, other, flag = (f"{opens}{name}{closes}" for name, (opens, closes) in SIGNS.items())
        yield f"what differs: {one} {other}; named by the audit or --token: {flag}"


def _print_pair(pair: Pair, console: Console, look: Look) -> None:
    for line in _prompt(pair, look):
        _say(console, look, line, indent=2)
    titles = [Text(_clean(_title(name, pair.facts)), "bold") for name in ("chosen", "rejected")]
    sides = [_side(pair, name, look) for name in ("chosen", "rejected")]
    if look.width < NARROW:
        for title, side in zip(titles, sides, strict=True):
            _say(console, look, title)
            _say(console, look, side, indent=2)
    else:
        _print_beside(titles, sides, console, look)
    for told in _footer(pair):
        _say(console, look, told, "dim")


def _print_beside(titles: Sequence[Text], sides: Sequence[Text], console: Console, look: Look) -> None:
    """Two columns of the same width, each under its title."""
    width = (look.width - 3) // 2
    columns = [
        [*_wrapped(console, title, width), Text("-" * width, "dim"), *_wrapped(console, side, width)]
        for title, side in zip(titles, sides, strict=True)
    ]
    for left, right in zip_longest(*columns, fillvalue=Text()):
        line = left.copy()
        line.pad_right(width - line.cell_len)
        _put(console, Text.assemble(line, (f" {look.rule} ", "dim"), right))


def _title(side: str, facts: Mapping[str, Any]) -> str:
    """The side, its score and who wrote it."""
    score, model = facts[f"{side}_score"], facts[f"{side}_model"]
    return ", ".join([side, *([f"score {score:g}"] if score is not None else []), *([model] if model else [])])


def _footer(pair: Pair) -> Iterator[str]:
    """Where the pair comes from, what is known of it, and what gives it away."""
    facts = pair.facts
    yield f"pair_id {facts['pair_id']}"
    told = [f"{facts['source']}:{facts['source_row']}", facts["split"], facts["method"], facts["annotator"]]
    numbers = ("margin", "agreement", "edit_distance", "shortcut_score")
    told += [f"{name} {facts[name]:.3g}" for name in numbers if facts[name] is not None]
    told += [f"weight {facts['weight']:g}"] if facts["weight"] != 1 else []
    yield ", ".join(str(one) for one in told if one)
    flagged = _shortest(pair.flagged)
    if flagged:
        named = [f"'{token}' in {side}" for token, side in flagged[:SHOWN_FLAGS]]
        more = len(flagged) - SHOWN_FLAGS
        yield "named by the audit: " + ", ".join(named) + (f" and {more} more" if more > 0 else "")


def _shortest(flagged: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Without n-grams that hold another one of the same side."""
    return [
        (token, side)
        for token, side in flagged
        if not any(side == same and token != short and f" {short} " in f" {token} " for short, same in flagged)
    ]


# texts


def _prompt(pair: Pair, look: Look) -> Iterator[Text]:
    """The tools, the earlier turns in a line each, the last turn."""
    if pair.tools:
        yield Text(_clean(f"tools: {', '.join(pair.tools)}"), "dim")
    *earlier, last = pair.prompt
    if earlier:
        yield Text(f"{len(earlier)} earlier turn{'s' * (len(earlier) > 1)}", "dim")
    left = max(0, len(earlier) - SHOWN_EARLIER) if not look.full else 0
    for number, turn in enumerate(earlier):
        if left and number == 1:
            yield Text(f"  {_left_out(left, 'turns')}", "dim")
        if not 1 <= number <= left:
            yield _labelled(turn, _shortened_line(turn, look), "dim")
    yield _labelled(last, _written(last, shortened(last, look, PROMPT), "", look), "")


def _shortened_line(turn: Turn, look: Look) -> Text:
    """A message on one line, its beginning only."""
    if look.full:
        return Text(_clean(turn.text), "dim")
    text = " ".join(turn.text.split())
    end = _cut(text, EARLIER, begins=False)
    left = f" {_left_out(len(text) - end)}" if end < len(text) else ""
    return Text(_clean(text[:end]) + left, "dim")


def _labelled(turn: Turn, text: Text, style: str) -> Text:
    return Text.assemble((_clean(f"{turn.role}: ") if turn.role else "", f"{style} bold".strip()), text)


def _side(pair: Pair, name: str, look: Look) -> Text:
    """All messages of a side; a single reply of the assistant needs no label."""
    turns: Sequence[Turn] = pair.chosen if name == "chosen" else pair.rejected
    written = [_written(turn, shortened(turn, look, SIDE), name, look) for turn in turns]
    if [turn.role for turn in turns] != ["assistant"]:
        written = [_labelled(turn, text, "") for turn, text in zip(turns, written, strict=True)]
    return Text("\n", overflow="fold").join(written)


def shortened(turn: Turn, look: Look, room: int) -> list[Span]:
    """The places of a long text that are shown: its beginning and end, flags, and as many differences as fit."""
    text, size = turn.text, len(turn.text)
    if look.full or _cost(text, (0, size)) <= room:
        return [(0, size)]
    head = HEAD if turn.differs else room - TAIL
    wanted = [(size - TAIL, size), *((start - CONTEXT, end + CONTEXT) for start, end in turn.flagged)]
    wanted += [(start - CONTEXT, min(end, start + RUN) + CONTEXT) for start, end in turn.differs]
    kept = [(0, _cut(text, _fitting(text, head), begins=False))]
    for start, end in wanted:
        merged = _merged([*kept, (_cut(text, start, begins=True), _cut(text, end, begins=False))])
        if sum(_cost(text, one) for one in merged) > room:
            break
        kept = merged
    return kept


def _fitting(text: str, room: int) -> int:
    """How many characters a beginning of that much room has."""
    lines = 0
    for place, character in enumerate(text):
        lines += character == "\n"
        if place + LINE * lines >= room:
            return place
    return len(text)


def _cost(text: str, span: Span) -> int:
    return span[1] - span[0] + LINE * text.count("\n", *span)


def _merged(spans: Iterable[Span]) -> list[Span]:
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1] + GAP:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _cut(text: str, at: int, *, begins: bool) -> int:
    """A place near by between words or, in a script without spaces, before no mark; where words begin, or end."""
    if not 0 < at < len(text):
        return min(max(at, 0), len(text))
    for place in range(at, max(at - SNAP, 0), -1):
        if text[place].isspace():
            return place + begins
    while at < len(text) and unicodedata.category(text[at]).startswith("M"):
        at += 1
    return at


def _left_out(count: int, what: str = "characters") -> str:
    return f"[... {count} {what} ...]"


def _written(turn: Turn, kept: Sequence[Span], side: str, look: Look) -> Text:
    """The places of a text that are shown, with their marks, and how much is left out between them."""
    written, at = Text(overflow="fold"), 0
    for start, end in kept:
        if start > at:
            written.append(f" {_left_out(start - at)} ", "dim")
        pieces = list(_pieces(turn, start, end))
        if look.colour:
            for text, differs, flagged in pieces:
                written.append(_clean(text), _style(text, side, differs=differs, flagged=flagged))
        else:
            written.append(_signed(pieces, side))
        at = end
    if at < len(turn.text):
        written.append(f" {_left_out(len(turn.text) - at)}", "dim")
    return written


def _style(text: str, side: str, *, differs: bool, flagged: bool) -> str:
    if flagged:
        return STYLES["flagged"]
    return (STYLES[side] + " reverse" * text.isspace()) if differs else ""


def _signed(pieces: Iterable[tuple[str, bool, bool]], side: str) -> str:
    """The pieces with signs around what is marked; what begins last ends first."""
    written, kinds, open_now = "", (side, "flagged"), list[int]()
    for text, *marked in [*pieces, ("", False, False)]:
        for kind in [kind for kind in reversed(open_now) if not marked[kind]]:
            open_now.remove(kind)
            written += SIGNS[kinds[kind]][1]
        for kind in [kind for kind in (0, 1) if marked[kind] and kind not in open_now]:
            open_now.append(kind)
            written += SIGNS[kinds[kind]][0]
        written += _clean(text)
    return written


def _pieces(turn: Turn, start: int, end: int) -> Iterator[tuple[str, bool, bool]]:
    """A part of a text, cut where a mark begins or ends: text, whether it differs, whether it is flagged."""
    steps: dict[int, list[int]] = {start: [0, 0], end: [0, 0]}
    for kind, spans in enumerate((turn.differs, turn.flagged)):
        for first, last in spans:
            if max(first, start) < min(last, end):
                steps.setdefault(max(first, start), [0, 0])[kind] += 1
                steps.setdefault(min(last, end), [0, 0])[kind] -= 1
    level, at = [0, 0], start
    for place in sorted(steps):
        if place > at:
            yield turn.text[at:place], level[0] > 0, level[1] > 0
        at, level = place, [have + step for have, step in zip(level, steps[place], strict=True)]


def _clean(text: str) -> str:
    """Nothing that moves the cursor: tabs and odd spaces as spaces, control characters as the replacement mark."""
    spaces = "".join(" " if unicodedata.category(c) == "Zs" else c for c in text.replace("\t", "    "))
    return printable(spaces)
