"""Pairs become tokens: chat template, tokenisation, the prompt boundary, truncation. The only place that decides them.

Comes in: a pairs frame and a tokenizer. Goes out: prompt_ids, chosen_ids, rejected_ids exactly as they will be scored
and trained on, and a drop with a reason for every pair that cannot be. The trainer never tokenises again.

* chat: the prompt is rendered with the generation prompt, prompt + reply without; no special token but the template's
  own.
* text: the strings are joined as they are and tokenised as the tokenizer does by default; EOS is appended unless there.
* prompt_ids is the longest token prefix that the prompt, prompt + chosen and prompt + rejected share, never empty.
* text that spells a control token is encoded as text, never as the token.
"""

import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jinja2
import polars as pl

from prefkit.controls import Shadow, control_tokens, encode_pieces, make_shadow
from prefkit.conversations import Conversation, asking_of, conversations_of, hidden_texts, marked
from prefkit.errors import CheckError, ModelError
from prefkit.format import Kind

# turns as in Anthropic's HH transcripts; one space after the colon, the end token after the last reply only
TRANSCRIPT = (
    "{{ bos_token if bos_token and bos_token != eos_token else '' }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '\n\nHuman: ' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '\n\nAssistant: ' + message['content'] + (eos_token if loop.last else '') }}"
    "{% elif message['role'] == 'system' %}{{ message['content'] }}"
    "{% else %}{{ raise_exception('the transcript template has no role ' + message['role']) }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)
# what strftime_now says in a template that prints today's date: ids must not depend on the day they were made. It is
# the date that Llama 3.1's template falls back to; a macro, because transformers hands no function to a template
FIXED_DATE = {"%Y": "2024", "%y": "24", "%m": "07", "%d": "26", "%-d": "26", "%B": "July", "%b": "Jul", "%A": "Friday"}
FIXED_DATE |= {"%a": "Fri", "%H": "00", "%I": "12", "%M": "00", "%S": "00", "%p": "AM", "%j": "208"}
REPLACED = "".join(f" | replace('{code}', '{text}')" for code, text in FIXED_DATE.items())
FIXED_STRFTIME = "{% macro strftime_now(format) %}{{ format" + REPLACED + " }}{% endmacro %}{{ '' }}"
OWN_TEMPLATES = {"transcript": TRANSCRIPT}
# what a template raises at a conversation that it cannot print, or that is nested too deeply
TEMPLATE_FAILS = (jinja2.TemplateError, TypeError, ValueError, AttributeError, KeyError, RecursionError)
ShadowOf: TypeAlias = Callable[[], Shadow | None]
CHUNK = 2_000  # pairs tokenised at once
END_WINDOW = 3  # an end token may be followed by a newline or two of the template


class EncodeSettings(NamedTuple):
    """What decides the tokens of a pair besides the tokenizer; all of it is part of a reference's identity."""

    kind: Kind
    max_length: int
    min_completion_tokens: int
    long_prompt: str  # drop | cut
    chat_template: str | None  # the template's text; None in a text dataset


class Encoded(NamedTuple):
    """`pairs`: id columns of format.REFERENCE, counting columns of format.PLAN; `dropped`: pair_id, reason."""

    pairs: pl.DataFrame
    dropped: pl.DataFrame


class Sides(NamedTuple):
    """The token ids of one pair, before or after truncation."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


ENCODED: dict[str, Any] = {
    "pair_id": pl.String,
    "prompt_ids": pl.List(pl.Int32),
    "chosen_ids": pl.List(pl.Int32),
    "rejected_ids": pl.List(pl.Int32),
    "chosen_truncated": pl.Boolean,
    "rejected_truncated": pl.Boolean,
    "num_boundary_tokens": pl.Int32,
    "num_unended": pl.Int32,
    "prompt_cut": pl.Boolean,
    "spells_control_token": pl.Boolean,
}


def resolve_template(
    kind: Kind, setting: str | None, tokenizer: Any, key: str = "precompute.chat_template"
) -> str | None:
    """The text of the chat template to use, None in a text dataset.

    Args:
        kind: of the dataset.
        setting: precompute.chat_template: one of our own by name, a jinja file, or None for the tokenizer's own.
        tokenizer: whose own template is the default.
        key: the setting's name, for messages.

    Raises:
        ModelError: there is none; the message names both ways to give one.
    """
    if kind == "text":
        return None
    template = _named_template(setting, tokenizer, key)
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "?"}], chat_template=template, tokenize=False)
    except jinja2.TemplateSyntaxError as error:
        where = f"{setting or tokenizer.name_or_path or 'the tokenizer'}:{error.lineno}"
        raise ModelError(f"the chat template is no jinja: {error.message}", where=where) from None
    except (jinja2.TemplateError, TypeError, ValueError):
        pass  # it may refuse this conversation, and take those of the dataset: rows are judged one by one
    return template


def _named_template(setting: str | None, tokenizer: Any, key: str) -> str:
    if setting is None:
        own = tokenizer.chat_template
        template = own.get("default") if isinstance(own, dict) else own  # several templates by name: the default
        if isinstance(template, str):
            return template
        raise ModelError(
            "the tokenizer has no chat template",
            expected=f"{key}: a jinja file, or `transcript` (Human / Assistant turns as in HH)",
            hint=f"--set {key}=transcript" if key.startswith("precompute") else "",
        )
    if setting in OWN_TEMPLATES:
        return OWN_TEMPLATES[setting]
    try:
        return Path(setting).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise ModelError(f"{key}: no template {setting}", expected="a jinja file, or `transcript`") from None


def encode_pairs(pairs: pl.DataFrame, tokenizer: Any, settings: EncodeSettings) -> Encoded:
    """Encode every pair of a frame with pair_id, prompt, chosen, rejected.

    Raises:
        ModelError: the tokenizer has no end token for a text dataset.
    """
    if settings.kind == "text" and tokenizer.eos_token_id is None:
        raise ModelError("the tokenizer has no eos_token", expected="one: a text completion ends with it")
    if settings.chat_template == TRANSCRIPT and tokenizer.eos_token_id is None:
        raise ModelError("the tokenizer has no eos_token", expected="one: the transcript ends with it")
    controls = control_tokens(tokenizer)
    shadow = functools.cache(lambda: make_shadow(tokenizer))  # once, and only if a text spells a control token
    starts = range(0, max(pairs.height, 1), CHUNK)
    chunks = [_encode_chunk(pairs.slice(at, CHUNK), tokenizer, settings, controls, shadow) for at in starts]
    lengths = [pl.col(f"{s}_ids").list.len().cast(pl.Int32).alias(f"num_{s}_tokens") for s in Sides._fields]
    frame = pl.concat([chunk.pairs for chunk in chunks]).with_columns(lengths)
    return Encoded(frame, pl.concat([chunk.dropped for chunk in chunks]))


class EncodedPrompts(NamedTuple):
    """`prompts`: prompt_id, prompt_ids; `dropped`: prompt_id, reason."""

    prompts: pl.DataFrame
    dropped: pl.DataFrame


def encode_prompts(prompts: pl.DataFrame, tokenizer: Any, kind: Kind, template: str | None) -> EncodedPrompts:
    """Encode prompts by themselves, as a pair's prompt is: what a model is given to answer.

    Args:
        prompts: prompt_id, prompt, and tools where there are some.
        tokenizer: of the model.
        kind: of the prompts.
        template: the chat template's text; None for text.

    Returns:
        ids in the order of the prompts, never empty. Of a pair they may be fewer: there the last ones can merge with
        the completion.
    """
    settings = EncodeSettings(kind, 0, 0, "drop", template)
    controls = [token for token in control_tokens(tokenizer).values() if token]
    shadow = functools.cache(lambda: make_shadow(tokenizer))
    kept: list[tuple[str, list[int]]] = []
    dropped: list[tuple[str, str]] = []
    for at in range(0, prompts.height, CHUNK):
        chunk = prompts.slice(at, CHUNK)
        rows = chunk.select("prompt_id", "prompt", *(["tools"] if "tools" in chunk.columns else [])).to_dicts()
        flags = _spells_control(chunk.with_columns(chosen="prompt", rejected="prompt"), kind, controls)
        for row, ids in zip(rows, _prompt_ids(rows, flags, tokenizer, settings, shadow, controls), strict=True):
            whole = ids if isinstance(ids, str) else _not_ended(ids, tokenizer, kind)
            if isinstance(whole, str):
                dropped.append((row["prompt_id"], whole))
            else:
                kept.append((row["prompt_id"], whole))
    columns: dict[str, Any] = {"prompt_id": pl.String, "prompt_ids": pl.List(pl.Int32)}
    return EncodedPrompts(
        pl.DataFrame(kept, schema=columns, orient="row"),
        pl.DataFrame(dropped, schema={"prompt_id": pl.String, "reason": pl.String}, orient="row"),
    )


def _prompt_ids(
    rows: list[dict[str, Any]],
    spelled: list[bool],
    tokenizer: Any,
    settings: EncodeSettings,
    shadow: ShadowOf,
    controls: Sequence[str],
) -> list[list[int] | str]:
    """The ids of each prompt, or the reason why there are none."""
    found: list[list[int] | str | None] = [None] * len(rows)
    texts: dict[int, str] = {}
    for number, (row, flag) in enumerate(zip(rows, spelled, strict=True)):
        if flag:
            found[number] = _guarded_prompt(row, tokenizer, shadow, settings)
        elif settings.kind == "text":
            texts[number] = row["prompt"]
        else:
            shown = _rendered([asking_of(row)], len(row["prompt"]), tokenizer, settings, controls)
            if isinstance(shown, str):
                found[number] = shown
            else:
                texts[number] = shown[0]
    ids = tokenizer([*texts.values()], add_special_tokens=settings.kind == "text")["input_ids"] if texts else []
    for number, tokens in zip(texts, ids, strict=True):
        found[number] = tokens
    return [tokens for tokens in found if tokens is not None]


def _guarded_prompt(row: dict[str, Any], tokenizer: Any, shadow: ShadowOf, settings: EncodeSettings) -> list[int] | str:
    """As `_tokenise_guarded`, of a prompt alone."""
    if settings.kind == "text":
        return list(tokenizer(row["prompt"], split_special_tokens=True)["input_ids"])
    if row.get("tools") or any(m.get("extra") for m in row["prompt"]):
        return "control_token_in_text"
    try:
        ids = _guarded(asking_of(row), tokenizer, shadow(), settings)
    except TEMPLATE_FAILS:
        return "template_refused"
    return "control_token_in_text" if ids is None else ids


def _not_ended(ids: list[int], tokenizer: Any, kind: Kind) -> list[int] | str:
    """A text prompt without the end token that its tokenizer puts behind every text; never empty."""
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    if kind == "text" and len(ids) > 1 and ids[-1] == eos:
        ids = ids[:-1]
    first = bos if bos is not None else eos
    return ids or ("empty_prompt" if first is None else [first])


def _encode_chunk(
    pairs: pl.DataFrame, tokenizer: Any, settings: EncodeSettings, controls: dict[int, str], shadow: ShadowOf
) -> Encoded:
    """A chunk at a time: ids as Python numbers take 70 bytes a token, in a frame 4."""
    spelt = [token for token in controls.values() if token]
    flags = _spells_control(pairs, settings.kind, spelt)
    kept: list[dict[str, Any]] = []
    dropped: list[dict[str, str]] = []
    if pairs.height:
        named = ("pair_id", "prompt", "chosen", "rejected", *(["tools"] if "tools" in pairs.columns else []))
        rows = pairs.select(named).to_dicts()
        for row, flag, tokens in zip(
            rows, flags, _tokenise(rows, flags, tokenizer, settings, shadow, spelt), strict=True
        ):
            if isinstance(tokens, str):
                dropped.append({"pair_id": row["pair_id"], "reason": tokens})
                continue
            result = _encode_one(tokens, tokenizer, settings, controls)
            if isinstance(result, str):
                dropped.append({"pair_id": row["pair_id"], "reason": result})
            else:
                kept.append({"pair_id": row["pair_id"], "spells_control_token": flag, **result})
    columns = {name: pl.Series(name, [row[name] for row in kept], dtype) for name, dtype in ENCODED.items()}
    return Encoded(pl.DataFrame(columns), pl.DataFrame(dropped, schema={"pair_id": pl.String, "reason": pl.String}))


def check_boundary(num_split: int, num_pairs: int, limit: float) -> None:
    """Stop where too many tokenised prompts are no prefix of the tokenised prompt + completion.

    Raises:
        CheckError: their share is above `limit` (precompute.max_boundary_share).
    """
    if num_pairs and num_split > limit * num_pairs:
        raise CheckError(
            f"in {num_split} of {num_pairs} pairs the prompt's tokens are no prefix of those of prompt + completion",
            expected=f"at most a share of {limit:g} (precompute.max_boundary_share)",
            hint="end prompts at a token boundary (text), fix the chat template, or raise the limit",
        )


def _spells_control(pairs: pl.DataFrame, kind: Kind, tokens: Sequence[str]) -> list[bool]:
    if not tokens:
        return [False] * pairs.height
    # text can spell one over the boundary, and so can two turns that a template puts side by side, stripped or not
    joined = [
        [_side_by_side(column, kind, strip) for column in ("prompt", "chosen", "rejected")] for strip in (False, True)
    ]
    texts = [prompt + side for prompt, chosen, rejected in joined for side in (chosen, rejected)]
    texts += [pl.col("tools").fill_null("")] if "tools" in pairs.columns else []
    found = [text.str.contains_any(list(tokens)) for text in texts]
    return pairs.select(pl.any_horizontal(found).fill_null(False)).to_series().to_list()


def _side_by_side(column: str, kind: Kind, strip: bool) -> pl.Expr:  # noqa: FBT001
    if kind == "text":
        return pl.col(column)
    content, extra = (pl.element().struct.field(name) for name in ("content", "extra"))
    content = content.str.strip_chars() if strip else content
    return pl.col(column).list.eval(pl.concat_str(content, extra.fill_null(""))).list.join("")


def _tokenise(
    rows: list[dict[str, Any]],
    spelled: list[bool],
    tokenizer: Any,
    settings: EncodeSettings,
    shadow: ShadowOf,
    controls: Sequence[str],
) -> list[Sides | str]:
    """Token ids of (prompt, prompt + chosen, prompt + rejected) a row, or the reason why there are none."""
    plain = [row for row, flag in zip(rows, spelled, strict=True) if not flag]
    texts = [_render(row, tokenizer, settings, controls) for row in plain]
    flat = [text for three in texts if not isinstance(three, str) for text in three]
    ids = tokenizer(flat, add_special_tokens=settings.kind == "text")["input_ids"] if flat else []
    triples = iter(zip(ids[::3], ids[1::3], ids[2::3], strict=True))
    ordinary = iter([three if isinstance(three, str) else Sides(*next(triples)) for three in texts])
    return [
        _tokenise_guarded(row, tokenizer, shadow, settings) if flag else next(ordinary)
        for row, flag in zip(rows, spelled, strict=True)
    ]


def _render(row: dict[str, Any], tokenizer: Any, settings: EncodeSettings, controls: Sequence[str]) -> list[str] | str:
    """The three texts of a row, or the reason why there are none."""
    if settings.kind == "text":
        return [row["prompt"], row["prompt"] + row["chosen"], row["prompt"] + row["rejected"]]
    return _rendered(conversations_of(row), len(row["prompt"]), tokenizer, settings, controls)


def _rendered(
    conversations: Sequence[Conversation],
    num_prompt: int,
    tokenizer: Any,
    settings: EncodeSettings,
    controls: Sequence[str],
) -> list[str] | str:
    """Conversations that begin with the same prompt of so many messages as texts, or why there are none."""
    try:
        texts = [_apply(conversation, tokenizer, settings) for conversation in conversations]
        for conversation in conversations:
            if any(token in text for text in hidden_texts(conversation) for token in controls):
                return "control_token_in_text"  # spelt with escapes, so that it shows only here
            if conversation.uses_tools():
                with_marks, marks = marked(conversation, num_prompt)
                shown = _apply(with_marks, tokenizer, settings)
                if any(mark not in shown for mark in marks):
                    return "template_ignores_tools"
    except TEMPLATE_FAILS:
        return "template_refused"
    return texts


def _apply(conversation: Conversation, tokenizer: Any, settings: EncodeSettings) -> str:
    template = settings.chat_template or ""
    dated = FIXED_STRFTIME + template if "strftime_now" in template else template
    return str(
        tokenizer.apply_chat_template(
            conversation.messages,
            tools=conversation.tools,
            chat_template=dated,
            add_generation_prompt=conversation.ask,
            tokenize=False,
        )
    )


def apply_template(messages: list[dict[str, Any]], tokenizer: Any, template: str, *, ask: bool = False) -> str:
    """Messages as the text that a chat template makes of them; `ask`: with the generation prompt."""
    return _apply(Conversation(messages, None, ask), tokenizer, EncodeSettings("chat", 0, 0, "drop", template))


def _tokenise_guarded(row: dict[str, Any], tokenizer: Any, shadow: ShadowOf, settings: EncodeSettings) -> Sides | str:
    """Text that spells a control token: it is tokenised as text, and only the template gives control tokens."""
    if settings.kind == "text":
        texts = [row["prompt"], row["prompt"] + row["chosen"], row["prompt"] + row["rejected"]]
        ids = tokenizer(texts, split_special_tokens=True)["input_ids"]
        return Sides(*ids)
    if row.get("tools") or any(m.get("extra") for name in ("prompt", "chosen", "rejected") for m in row[name]):
        return "control_token_in_text"  # which of its tokens stem from the arguments of a call nobody can say
    try:
        found = [_guarded(conversation, tokenizer, shadow(), settings) for conversation in conversations_of(row)]
    except TEMPLATE_FAILS:
        return "template_refused"
    return "control_token_in_text" if any(ids is None for ids in found) else Sides(*found)  # type: ignore[arg-type]


def _guarded(
    conversation: Conversation, tokenizer: Any, shadow: Shadow | None, settings: EncodeSettings
) -> list[int] | None:
    """Ids of a conversation whose content is hostile; None where the template does more to it than to strip it."""
    messages = conversation.messages
    marked = [{**m, "content": f"\ue000{i}\ue001"} for i, m in enumerate(messages)]
    pieces = re.split("\ue000(\\d+)\ue001", _apply(conversation._replace(messages=marked), tokenizer, settings))
    wanted = _apply(conversation, tokenizer, settings)
    for contents in ([m["content"] for m in messages], [m["content"].strip() for m in messages]):
        filled = [contents[int(piece)] if i % 2 else piece for i, piece in enumerate(pieces)]
        if "".join(filled) == wanted:
            return encode_pieces(tokenizer, shadow, filled)
    return None


def encode_responses(
    prompts: Sequence[Any], responses: Sequence[str], tools: Sequence[str | None], tokenizer: Any, template: str | None
) -> list[list[int] | str]:
    """Each prompt + response as one sequence of ids, whole, or the reason why there is none; of pairs, `encode_pairs`.

    Args:
        prompts: messages each, or a text each where there is no template.
        responses: the reply to each.
        tools: that each prompt offers, as JSON; None: none.
        tokenizer: of the model.
        template: the text of a chat template; None: texts are joined, special tokens are the tokenizer's default, and
            the end token, where it has one, is appended unless there.
    """
    settings = EncodeSettings("text" if template is None else "chat", 0, 0, "drop", template)
    spelt = [token for token in control_tokens(tokenizer).values() if token]
    shadow = functools.cache(lambda: make_shadow(tokenizer))
    if template is None:
        return [
            _text_ids(prompt + response, tokenizer, spelt) for prompt, response in zip(prompts, responses, strict=True)
        ]
    return [
        _reply_ids(
            {
                "prompt": prompt,
                "chosen": [{"role": "assistant", "content": response}],
                "rejected": [],
                "tools": offered,
            },
            tokenizer,
            shadow,
            settings,
            spelt,
        )
        for prompt, response, offered in zip(prompts, responses, tools, strict=True)
    ]


def _text_ids(text: str, tokenizer: Any, spelt: Sequence[str]) -> list[int]:
    spells = any(token in text for token in spelt)
    ids: list[int] = tokenizer(text, **({"split_special_tokens": True} if spells else {}))["input_ids"]
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def _reply_ids(
    row: dict[str, Any], tokenizer: Any, shadow: ShadowOf, settings: EncodeSettings, spelt: Sequence[str]
) -> list[int] | str:
    """Ids of a prompt and its reply, `chosen`; what spells a control token is tokenised as text."""
    conversation = conversations_of(row)[1]
    contents = [m["content"] for m in conversation.messages]
    joined = ["".join(contents), "".join(text.strip() for text in contents), *hidden_texts(conversation)]
    spells = any(token in text for text in joined for token in spelt)
    if spells and (conversation.tools or any(set(m) - {"role", "content"} for m in conversation.messages)):
        return "control_token_in_text"
    try:
        if spells:
            ids = _guarded(conversation, tokenizer, shadow(), settings)
            return "control_token_in_text" if ids is None else ids
        text = _apply(conversation, tokenizer, settings)
        if conversation.uses_tools():
            with_marks, marks = marked(conversation, len(row["prompt"]))
            shown = _apply(with_marks, tokenizer, settings)
            if any(mark not in shown for mark in marks):
                return "template_ignores_tools"
    except TEMPLATE_FAILS:
        return "template_refused"
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _encode_one(
    tokens: Sides, tokenizer: Any, settings: EncodeSettings, controls: dict[int, str]
) -> dict[str, Any] | str:
    """Boundary, end token and truncation of one pair: its columns, or the reason for its drop."""
    prompt, chosen, rejected = (list(ids) for ids in tokens)
    if settings.kind == "text":
        eos = tokenizer.eos_token_id
        # a tokenizer that ends every text has ended the prompt; a single one may be the BOS (they are one in gpt2)
        prompt = prompt[:-1] if len(prompt) > 1 and prompt[-1] == eos else prompt
        chosen, rejected = (ids if ids and ids[-1] == eos else [*ids, eos] for ids in (chosen, rejected))
    shared = common_prefix(prompt, chosen, rejected)
    whole = Sides(prompt[:shared], chosen[shared:], rejected[shared:])
    if not shared:
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if first is None:
            return "empty_prompt"
        whole = whole._replace(prompt=[first])
    if not (whole.chosen and whole.rejected):
        return "empty_completion"
    begins = frozenset({tokenizer.bos_token_id} - {None})
    cut = truncate(whole, settings.max_length, settings.min_completion_tokens, settings.long_prompt, begins)
    if isinstance(cut, str):
        return cut
    return {
        "prompt_ids": cut.prompt,
        "chosen_ids": cut.chosen,
        "rejected_ids": cut.rejected,
        "chosen_truncated": len(cut.chosen) < len(whole.chosen),
        "rejected_truncated": len(cut.rejected) < len(whole.rejected),
        "num_boundary_tokens": len(prompt) - shared,
        "prompt_cut": len(cut.prompt) < len(whole.prompt),
        "num_unended": sum(controls.keys().isdisjoint(ids[-END_WINDOW:]) for ids in (whole.chosen, whole.rejected)),
    }


def common_prefix(*sequences: Sequence[int]) -> int:
    """Length of the longest prefix that all sequences share."""
    first = sequences[0]
    if all(other[: len(first)] == first for other in sequences[1:]):  # the usual case, at the speed of a list compare
        return len(first)
    count = 0
    for tokens in zip(*sequences, strict=False):
        if any(token != tokens[0] for token in tokens):
            break
        count += 1
    return count


def truncate(
    sides: Sides, max_length: int, min_completion: int, long_prompt: str, begins: frozenset[int] = frozenset()
) -> Sides | str:
    """Keep the start of prompt + completion up to max_length tokens.

    Args:
        sides: untruncated ids; the prompt is not empty.
        max_length: tokens of prompt + completion, > min_completion.
        min_completion: room that a prompt too long for its completions must leave them.
        long_prompt: what happens to one that leaves less: `drop` the pair, or `cut` the prompt's left.
        begins: ids that stay at the front of a cut prompt (BOS).

    Returns:
        the truncated ids, or the reason: prompt_too_long | identical_after_truncation.
    """
    prompt, chosen, rejected = sides
    if len(prompt) + max(len(chosen), len(rejected)) > max_length:
        room = max_length - len(prompt)
        if room < min_completion:
            if long_prompt == "drop":
                return "prompt_too_long"
            head = prompt[:1] if prompt[0] in begins else []
            keep = max_length - min_completion - len(head)
            prompt, room = head + (prompt[-keep:] if keep else []), min_completion
        chosen, rejected = chosen[:room], rejected[:room]
    return "identical_after_truncation" if chosen == rejected else Sides(prompt, chosen, rejected)
