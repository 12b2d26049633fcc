"""prefkit's own engine: many responses at once with a key-value cache, each prompt computed once.

Comes in: a causal LM, and prompts as ids. Goes out: n responses a prompt with the model's own log-probs. The prompts of
a batch wait in a line, the longest first. Those that fit are computed together (padded on the left), and the cache of a
prompt is copied to its n responses. Every step adds a token to each row; a row that ends leaves at once, and when
enough rows are free the next prompts take their places. So no step computes a row that has ended, and padding is only
between prompts of like length.

Which road a model takes is found out, as layouts.py does it: each is tried on a few forced tokens and taken only where
every log-prob is that of the plain code. `batched` is the above; `prompt by prompt` computes the n responses of one
prompt side by side with the model's own cache (recurrent models); `without a cache` computes all of them anew at every
token, which is slow and always right.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from prefkit.arena import Arena
from prefkit.engines import Decoding, Request, Response
from prefkit.errors import MachineError, ModelError, is_out_of_memory
from prefkit.layouts import BEYOND_REACH, PROBE_TOLERANCE, SPAN, attention_reaches, num_predicted
from prefkit.models import REGIMES, autocast, muted_transformers
from prefkit.picking import Picked, Warping, pick, uniforms
from prefkit.stops import StopTexts

Road: TypeAlias = Literal["batched", "prompt by prompt", "without a cache"]
ROADS: tuple[Road, ...] = ("batched", "prompt by prompt", "without a cache")
SPARE = 64  # columns of the cache beyond the longest row: it is moved to the left once in so many steps
FREE = 4  # new prompts come in when a 1/FREE of the rows is free


class Row:
    """A response that grows: whose it is, its tokens so far, and the random number of each position."""

    __slots__ = ("drawn", "ids", "logps", "number", "request")

    def __init__(self, request: int, number: int, drawn: Any = None) -> None:
        self.request, self.number, self.drawn = request, number, drawn
        self.ids: list[int] = []
        self.logps: list[float] = []


class Slots:
    """Token slots that a model computed: `useful` are tokens of a prompt or a live response, `lost` all others."""

    def __init__(self) -> None:
        self.useful = self.lost = 0

    @property
    def share_lost(self) -> float:
        """Of all slots."""
        return self.lost / max(1, self.useful + self.lost)


Choose: TypeAlias = Callable[[Tensor, Sequence[Row]], Picked]
Ended: TypeAlias = Callable[[Row], bool]


class Generator:
    """A model that answers prompts; `road` says how.

    Args:
        model: a causal LM in eval mode.
        dtype: its regime.
        road: as `choose_road` found it.
    """

    def __init__(self, model: nn.Module, dtype: str, road: Road) -> None:
        self.model, self.regime, self.road = model, REGIMES[dtype], road
        self.slots = Slots()
        self.widest: int | None = None  # rows at once that are known to fit, once memory has run out
        self.device = next(model.parameters()).device
        names = inspect.signature(model.forward).parameters
        self.keeps = "logits_to_keep" in names
        self.placed = "position_ids" in names
        self.cache_name = "cache_params" if "cache_params" in names else "past_key_values"

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        numbers: Sequence[int],
        width: int,
        longest: int,
        begin: Callable[[int, int], Row],
        choose: Choose,
        ended: Ended,
    ) -> Iterator[Row]:
        """Grow rows of each prompt until each has ended, and give them as they do.

        Args:
            prompts: ids, the longest first.
            numbers: of the rows of each prompt.
            width: rows at once, at least as many.
            longest: tokens that are added to a row at most.
            begin: makes the row of a prompt and a number.
            choose: from the logits (B, V) of rows to a token each.
            ended: whether a row that just got a token has ended.
        """
        with torch.inference_mode(), autocast(self.regime, self.device):
            if self.road == "batched":
                yield from self._batched(prompts, numbers, width, longest, begin, choose, ended)
            else:
                for request, prompt in enumerate(prompts):
                    yield from self._side_by_side(prompt, [begin(request, k) for k in numbers], choose, ended)

    def _batched(
        self,
        prompts: Sequence[Sequence[int]],
        numbers: Sequence[int],
        width: int,
        longest: int,
        begin: Callable[[int, int], Row],
        choose: Choose,
        ended: Ended,
    ) -> Iterator[Row]:
        n = len(numbers)
        arena = Arena(width, max(map(len, prompts)) + longest + SPARE)
        rows: list[Row] = []
        waiting = 0
        logits: Tensor | None = None
        while rows or waiting < len(prompts):
            free = (arena.capacity - arena.rows) // n
            if waiting < len(prompts) and free and (free * n * FREE >= arena.capacity or not rows):
                some = range(waiting, min(waiting + free, len(prompts)))
                waiting = some.stop
                first = self._prefill(arena, [prompts[request] for request in some], n)
                rows += [begin(request, k) for request in some for k in numbers]
                logits = first if logits is None else torch.cat([logits, first])
            assert logits is not None
            done = self._add(logits, rows, choose, ended)
            if done:
                for place in done:
                    yield rows[place]
                order = arena.take_out(done)
                rows = [rows[place] for place in order]
            logits = self._step(arena, rows) if rows else None

    def _add(self, logits: Tensor, rows: Sequence[Row], choose: Choose, ended: Ended) -> list[int]:
        """A token for every row; the places of those that have ended."""
        picked = choose(logits, rows)
        done = []
        both = zip(picked.ids.tolist(), picked.logps.tolist(), strict=True)
        for place, (row, (token, logp)) in enumerate(zip(rows, both, strict=True)):
            row.ids.append(token)
            row.logps.append(logp)
            if ended(row):
                done.append(place)
        return done

    def _prefill(self, arena: Arena, prompts: Sequence[Sequence[int]], n: int) -> Tensor:
        """Compute prompts, put their cache into the arena n times each; the logits of what comes next."""
        lengths = [len(prompt) for prompt in prompts]
        longest = max(lengths)
        pads = [longest - length for length in lengths]
        ids = torch.tensor([[0] * pad + list(prompt) for pad, prompt in zip(pads, prompts, strict=True)])
        mask = torch.arange(longest) >= torch.tensor(pads)[:, None]
        inputs: dict[str, Any] = {"input_ids": ids.to(self.device)}
        if any(pads):
            inputs["attention_mask"] = mask.long().to(self.device)
            if self.placed:
                inputs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0).to(self.device)
        cache = DynamicCache()
        logits = self._forward(inputs | {"past_key_values": cache})
        self.slots.useful += sum(lengths)
        self.slots.lost += sum(pads)
        arena.join(cache, lengths, n)
        return logits.repeat_interleave(n, 0)

    def _step(self, arena: Arena, rows: Sequence[Row]) -> Tensor:
        arena.make_room()
        inputs: dict[str, Any] = {"input_ids": torch.tensor([[row.ids[-1]] for row in rows], device=self.device)}
        mask = arena.mask(self.device)
        if mask is not None:
            inputs["attention_mask"] = mask
        if self.placed:
            inputs["position_ids"] = arena.positions(self.device)
        logits = self._forward(inputs | {"past_key_values": arena.cache()})
        arena.step()
        self.slots.useful += len(rows)
        return logits

    def _forward(self, inputs: dict[str, Any]) -> Tensor:
        """The logits of the last column."""
        model: Any = self.model
        few = {"logits_to_keep": 1} if self.keeps else {}
        logits: Tensor = model(use_cache=True, **few, **inputs).logits[:, -1]
        return logits

    def _side_by_side(self, prompt: Sequence[int], rows: Sequence[Row], choose: Choose, ended: Ended) -> Iterator[Row]:
        """Rows of one prompt in step with each other; those that have ended are computed until the last one has."""
        model: Any = self.model
        live = set(range(len(rows)))
        ids = torch.tensor([list(prompt)] * len(rows), device=self.device)
        cache: Any = None
        whole = ids
        while live:
            if self.road == "without a cache":
                out = model(input_ids=whole, use_cache=False)
                self.slots.useful += len(prompt) + len(live)
                self.slots.lost += whole.numel() - len(prompt) - len(live)
            else:
                held = {} if cache is None else {self.cache_name: cache}
                out = model(input_ids=ids, use_cache=True, **held)
                cache = getattr(out, self.cache_name)
                useful = len(live) if whole.shape[1] > len(prompt) else len(prompt)
                self.slots.useful += useful
                self.slots.lost += ids.numel() - useful
            places = sorted(live)
            done = self._add(out.logits[places, -1], [rows[place] for place in places], choose, ended)
            for place in done:
                live.discard(places[place])
                yield rows[places[place]]
            ids = torch.tensor([[row.ids[-1]] for row in rows], device=self.device)
            whole = torch.cat([whole, ids], dim=1)


def answer(
    generator: Generator,
    requests: Sequence[Request],
    decoding: Decoding,
    width: int,
    stops: StopTexts,
    tell: Callable[[str], None],
    made: Callable[[int], None] = lambda _tokens: None,
) -> list[list[Response]]:
    """N responses to each request.

    Args:
        generator: the model.
        requests: the longest prompt first.
        decoding: how.
        width: rows at once; out of memory: half of them, then half of that, in this batch and all later ones.
        stops: the stop texts.
        tell: called with lines for a person.
        made: called with the tokens of a response that has ended, once for each: a batch that is computed anew gives
            the same ones again.
    """
    counted: set[tuple[int, int]] = set()

    def once(row: Row) -> None:
        if (row.request, row.number) not in counted:
            counted.add((row.request, row.number))
            made(len(row.ids))

    while True:
        width = min(width, generator.widest or width)
        slots = generator.slots.useful, generator.slots.lost
        try:
            return _answer(generator, requests, decoding, width, stops, once)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if width == 1:
                raise MachineError(
                    "out of memory on a single response", hint="a smaller sample.max_new_tokens, or another dtype"
                ) from None
        # not in the handler: there the error would keep the tensors of the batch alive
        generator.slots.useful, generator.slots.lost = slots
        if generator.device.type == "cuda":
            torch.cuda.empty_cache()
        generator.widest = width // 2
        tell(f"out of memory with {width} responses at once: computing {width // 2} at once")


def _answer(
    generator: Generator,
    requests: Sequence[Request],
    decoding: Decoding,
    width: int,
    stops: StopTexts,
    made: Callable[[Row], None],
) -> list[list[Response]]:
    ends, most = frozenset(decoding.end_ids), decoding.max_new_tokens
    warping = Warping(decoding.temperature, decoding.top_p, decoding.top_k)
    found: list[list[Response | None]] = [[None] * decoding.n for _ in requests]
    finished: dict[int, str] = {}

    def begin(request: int, number: int) -> Row:
        drawn = uniforms(decoding.seed, requests[request].prompt_id, number, most)
        return Row(request, number, drawn)

    def choose(logits: Tensor, rows: Sequence[Row]) -> Picked:
        numbers = torch.from_numpy(np.array([row.drawn[len(row.ids)] for row in rows])).to(logits.device)
        return pick(logits, numbers, warping, decoding.num_ids)

    def ended(row: Row) -> bool:
        if row.ids[-1] in ends or stops.ended(row.ids):
            finished[id(row)] = "stop"
            return True
        return len(row.ids) == most

    prompts = [request.prompt_ids for request in requests]
    for at in range(0, decoding.n, width):  # usually all at once
        numbers = range(at, min(at + width, decoding.n))
        for row in generator.run(prompts, numbers, width, most, begin, choose, ended):
            if not np.isfinite(row.logps).all():
                raise ModelError(
                    "the model's log-probs are not finite",
                    expected="numbers: look for NaN or infinite weights, or try float32",
                )
            found[row.request][row.number] = Response(row.ids, finished.pop(id(row), "length"), row.logps)
            made(row)
    return [[response for response in responses if response is not None] for responses in found]


def choose_road(model: nn.Module, dtype: str, longest: int) -> tuple[Road, str]:
    """The fastest road on which this model's log-probs are those of the plain code, and what the faster ones lack.

    Args:
        model: a causal LM in eval mode.
        dtype: its regime.
        longest: tokens of the longest prompt and response.

    Raises:
        ModelError: not even the plain code gives finite numbers.
    """
    probed = "float32" if dtype == "bfloat16" else dtype  # its weights are float32: nothing to be lost
    draw = torch.Generator().manual_seed(0)
    vocabulary = num_predicted(model)
    config = model.config.get_text_config()  # type: ignore[operator,union-attr]
    beyond = max((reach + BEYOND_REACH for reach in attention_reaches(config) if reach < longest), default=0)
    most = min(max(64, beyond), longest)
    steps = min(24, most - 1)

    def ids(count: int) -> list[int]:
        return torch.randint(0, vocabulary, (count,), generator=draw).tolist()

    prompts = [ids(max(1, count)) for count in (most - steps, most - steps - 3, (most - steps) // 2, 5, 1)]
    prompts.sort(key=len, reverse=True)
    # responses of different lengths: rows leave, others take their places
    forced = [[ids(max(1, steps - 5 * ((request + 2 * number) % 4))) for number in range(2)] for request in range(5)]
    wanted = [[_plain_logps(model, probed, prompts[r], forced[r][k]) for k in range(2)] for r in range(5)]
    if not all(bool(torch.isfinite(part).all()) for parts in wanted for part in parts):
        raise ModelError("the model's log-probs are not finite", expected="numbers: look for NaN or infinite weights")
    reasons: list[str] = []
    for road in ROADS[:-1]:
        reason = _tried(Generator(model, probed, road), prompts, forced, wanted, dtype)
        if not reason:
            return road, "; ".join(reasons)
        reasons.append(f"{road}: {reason}")
    return ROADS[-1], "; ".join(reasons)


def _plain_logps(model: Any, dtype: str, prompt: list[int], response: list[int]) -> Tensor:
    """One sequence through the model, log_softmax of its own logits."""
    device = next(model.parameters()).device
    with torch.inference_mode(), autocast(REGIMES[dtype], device):
        logits = model(input_ids=torch.tensor([prompt + response], device=device), use_cache=False).logits[0]
    found: Tensor = logits[len(prompt) - 1 : -1].float().log_softmax(-1).cpu()
    return found.gather(1, torch.tensor(response)[:, None])[:, 0]


def _tried(
    generator: Generator,
    prompts: list[list[int]],
    forced: list[list[list[int]]],
    wanted: list[list[Tensor]],
    dtype: str,
) -> str:
    """Why a road is not right for a model, "" if it is."""

    def choose(logits: Tensor, rows: Sequence[Row]) -> Picked:
        taken = torch.tensor([forced[row.request][row.number][len(row.ids)] for row in rows], device=logits.device)
        return Picked(taken, logits.float().log_softmax(-1).gather(-1, taken[:, None])[:, 0])

    def ended(row: Row) -> bool:
        return len(row.ids) == len(forced[row.request][row.number])

    worst = 0.0
    try:
        with muted_transformers():
            for row in generator.run(prompts, range(2), 4, max(map(len, prompts)), Row, choose, ended):
                apart = torch.tensor(row.logps) - wanted[row.request][row.number]
                worst = max(worst, _size(apart, dtype))
    except Exception as error:  # a model that has no such cache is no error, it is a reason
        if is_out_of_memory(error):
            raise
        return f"the class does not take it ({type(error).__name__})"
    return "" if worst <= PROBE_TOLERANCE[dtype] else f"differs from one sequence at a time by {worst:.2g} nats"


def _size(apart: Tensor, dtype: str) -> float:
    """The largest difference of a token; in bfloat16 weights the largest root mean square of some tokens."""
    if not bool(torch.isfinite(apart).all()):
        return float("inf")
    if dtype != "bfloat16_weights":
        return float(apart.abs().max())
    return max(float(some.square().mean().sqrt()) for some in torch.split(apart, SPAN))
