"""The seam between sampling and whatever samples: requests in, responses out, what comes back checked.

prefkit's own engine (generation.py) and a `module:function` of the user's (sample.engine) are called alike: with a list
of requests and the settings. docs/sampling.md says how another engine fills it.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

from prefkit.errors import InputError
from prefkit.functions import load_functions

FINISHES = ("stop", "length")
ANSWERS = "a list of responses a request"


class Request(NamedTuple):
    """A prompt that is to be answered: its id, its tokens, and the text or messages that they are of."""

    prompt_id: str
    prompt_ids: list[int]
    prompt: Any


class Decoding(NamedTuple):
    """How is sampled; what decides the samples besides model and prompt.

    `end_ids`: tokens that end a response; `stop`: texts that do; `num_ids`: ids the tokenizer knows are below it.
    """

    model: str
    n: int
    temperature: float
    top_p: float
    top_k: int | None
    max_new_tokens: int
    seed: int
    end_ids: tuple[int, ...]
    stop: tuple[str, ...]
    dtype: str
    num_ids: int


class Response(NamedTuple):
    """One response: its ids, the one that ended it included; why it ended; the model's own log-prob of each token.

    `finish_reason`: stop | length. `token_logps`: in nats, at temperature 1 and without top_p or top_k; None where the
    engine cannot tell.
    """

    ids: list[int]
    finish_reason: str
    token_logps: list[float] | None = None


Engine: TypeAlias = Callable[[Sequence[Request], Decoding], Sequence[Sequence[Response]]]


def load_engine(name: str) -> Engine:
    """The function that sample.engine names.

    Raises:
        ConfigError: there is no such module or function.
    """
    (found,) = load_functions([name], "sample.engine")
    return found


def check_responses(requests: Sequence[Request], found: Any, decoding: Decoding, engine: str) -> list[list[Response]]:
    """What an engine gave, checked: n responses a request, in the order of the requests.

    Raises:
        InputError: it is not what was asked for; engine, prompt and response are named.
    """
    if not isinstance(found, (list, tuple)) or len(found) != len(requests):
        raise InputError(f"gave {_count(found)} for {len(requests)} requests", where=engine, expected=ANSWERS)
    made = []
    for request, responses in zip(requests, found, strict=True):
        if not isinstance(responses, (list, tuple)) or len(responses) != decoding.n:
            raise InputError(
                f"gave {_count(responses)} to prompt {request.prompt_id[:16]}",
                where=engine,
                expected=f"{decoding.n} responses a prompt (sample.n)",
            )
        made.append(
            [_checked(response, number, request, decoding, engine) for number, response in enumerate(responses)]
        )
    return made


def _count(found: Any) -> str:
    return f"{len(found)} results" if isinstance(found, (list, tuple)) else f"a {type(found).__name__}"


def _checked(response: Any, number: int, request: Request, decoding: Decoding, engine: str) -> Response:
    where = f"{engine}: response {number} to prompt {request.prompt_id[:16]}"
    try:
        ids, finish, logps = response
        plain = [int(i) for i in ids]
        values = None if logps is None else [float(value) for value in logps]
    except (TypeError, ValueError):
        raise InputError("is no response", where=where, expected="(ids, finish_reason, token_logps or None)") from None
    if not 0 < len(plain) <= decoding.max_new_tokens:
        raise InputError(
            f"has {len(plain)} tokens", where=where, expected=f"1 to {decoding.max_new_tokens} (sample.max_new_tokens)"
        )
    if any(i != given or not 0 <= i < decoding.num_ids for i, given in zip(plain, ids, strict=True)):
        raise InputError(
            "holds an id that is no token", where=where, expected=f"whole numbers below {decoding.num_ids}"
        )
    if finish not in FINISHES:
        raise InputError(f"finished by {finish!r}", where=where, expected="stop or length")
    if values is not None and len(values) != len(plain):
        raise InputError(f"has {len(values)} log-probs for {len(plain)} tokens", where=where, expected="one a token")
    if values is not None and not all(math.isfinite(value) and value <= 0 for value in values):
        raise InputError("has a log-prob that is none", where=where, expected="finite numbers of at most 0, in nats")
    return Response(plain, str(finish), values)
