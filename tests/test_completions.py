"""Single completions through the kernel, and two models compared along them, beside plain transformers."""

import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import tiny
import torch

from prefkit.completions import Apart, as_pairs, compare_models, completion_logps, load_for_scoring
from prefkit.errors import MachineError
from prefkit.layouts import choose_layout
from prefkit.logps import CompletionLogps
from prefkit.measures import kl_rows

LAYOUTS = ("auto", "separate", "alone")


def scorer_of(model: Any, rows: str = "auto") -> CompletionLogps:
    layout = choose_layout(model, "float32", 128)
    kinds: Any = {"auto": layout, "separate": layout._replace(rows="separate", attention="eager")}
    kinds["alone"] = kinds["separate"]._replace(rows="alone")
    return CompletionLogps(model, "float32", kinds[rows])


def some_ids(num: int = 7) -> tuple[list[tiny.Ids], list[tiny.Ids]]:
    """Completions of three prompts, an odd number of one of them, in no order."""
    rng = random.Random(3)
    prompts = [tiny.random_ids(rng, count) for count in (5, 20, 1)]
    asked = [prompts[number % 3] for number in range(num)]
    return asked, [tiny.random_ids(rng, 1 + (5 * number) % 9) for number in range(num)]


def test_two_completions_of_a_prompt_are_a_pair_and_one_left_over_is_its_own() -> None:
    paired = as_pairs([[1], [2], [1], [1], [1]], [[7], [8, 8], [9], [], [6]])
    assert paired.places == [(0, 2), (4, 4), (1, 1)]
    assert [tuple(pair) for pair in paired.pairs] == [([1], [7], [9]), ([1], [6], [6]), ([2], [8, 8], [8, 8])]


@pytest.mark.parametrize("rows", LAYOUTS)
def test_log_probs_of_single_completions_are_the_plain_ones(rows: str) -> None:
    model = tiny.random_model(tiny.llama_config())
    prompts, completions = some_ids()
    prompts, completions = [*prompts, [3]], [*completions, []]
    seen: list[tuple[int, int]] = []
    found = completion_logps(
        scorer_of(model, rows), prompts, completions, watch=lambda done, total: seen.append((done, total))
    )
    for prompt, completion, logps in zip(prompts, completions, found, strict=True):
        assert len(logps) == len(completion)
        if completion:
            with torch.no_grad():
                plain = tiny.plain_logps(model, prompt, completion).numpy()
            np.testing.assert_allclose(logps, plain, atol=1e-4)
    assert seen[-1][0] == seen[-1][1] > 0


@pytest.mark.parametrize("rows", LAYOUTS)
def test_two_models_are_compared_as_plain_softmaxes_are(rows: str) -> None:
    one, other = (tiny.random_model(tiny.llama_config(), seed) for seed in (0, 1))
    prompts, completions = some_ids()
    found = compare_models(scorer_of(one, rows), scorer_of(other, rows), prompts, completions)
    for prompt, completion, apart in zip(prompts, completions, found, strict=True):
        ids = torch.tensor([[*prompt, *completion]])
        with torch.no_grad():
            p, q = (model(ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1) for model in (one, other))
        kl = (p.exp() * (p - q)).sum(-1)
        np.testing.assert_allclose(apart.kl, kl.numpy(), rtol=1e-4)
        for logps, plain in ((apart.logps, p), (apart.ref_logps, q)):
            wanted = plain[range(len(completion)), completion]
            np.testing.assert_allclose(logps, wanted.numpy(), atol=1e-4)


def test_a_model_is_nowhere_from_itself() -> None:
    model = tiny.random_model(tiny.gpt2_config())
    prompts, completions = some_ids()
    for apart in compare_models(scorer_of(model), scorer_of(model), prompts, completions):
        assert (apart.logps == apart.ref_logps).all()
        assert (apart.kl == 0).all()


def test_a_folder_is_loaded_ready_to_score(tmp_path: Path) -> None:
    told: list[str] = []
    scorer = load_for_scoring(str(tiny.tiny_llama(tmp_path / "model")), "float32", 40, told.append)
    assert told[-1].startswith(f"scoring with {tmp_path / 'model'} on cpu in float32, ")
    assert len(completion_logps(scorer, [[1, 2]], [[3, 4]])[0]) == 2


# -- the KL of whole responses, where all of them can be written down

VOCABULARY, LENGTH, END = 6, 3, 2


def all_responses(length: int = LENGTH) -> list[list[int]]:
    """Every response of up to `length` tokens: it ends with END, or is cut off."""
    tokens = range(VOCABULARY)
    found: list[list[int]] = []
    for size in range(1, length + 1):
        for begun in itertools.product([token for token in tokens if token != END], repeat=size - 1):
            ends = tokens if size == length else [END]
            found += [[*begun, end] for end in ends]
    return found


def toy(seed: int) -> Any:
    # weights of std .3 would make one token all but certain in a vocabulary of six
    return tiny.random_model(tiny.llama_config(VOCABULARY, initializer_range=0.12), seed)


def exact_kl(policy: Any, reference: Any, prompt: list[int]) -> tuple[float, float]:
    """KL(policy || reference) over all responses, in float64; and their mean length."""
    total = length = mass = 0.0
    for response in all_responses():
        with torch.no_grad():
            p, q = (float(tiny.plain_logps(model, prompt, response).double().sum()) for model in (policy, reference))
        mass += np.exp(p)
        total += np.exp(p) * (p - q)
        length += np.exp(p) * len(response)
    assert mass == pytest.approx(1, abs=1e-5)
    return total, length


def sampled(policy: Any, prompt: list[int], count: int, seed: int) -> list[list[int]]:
    """Responses drawn by their exact probabilities: no sampler is under test here."""
    responses = all_responses()
    with torch.no_grad():
        logps = [float(tiny.plain_logps(policy, prompt, response).double().sum()) for response in responses]
    weights = np.exp(logps) / np.exp(logps).sum()
    return [responses[number] for number in np.random.default_rng(seed).choice(len(responses), count, p=weights)]


def test_both_estimates_of_the_kl_are_right_and_the_second_varies_less() -> None:
    policy, reference = toy(0), toy(1)
    prompts = [[1, 3], [4], [5, 1, 3]]
    rows = []
    truth = [exact_kl(policy, reference, prompt) for prompt in prompts]
    assert all(kl > 0.05 for kl, _ in truth)
    for number, prompt in enumerate(prompts):
        responses = sampled(policy, prompt, 600, number)
        asked = [prompt] * len(responses)
        found = compare_models(scorer_of(policy), scorer_of(reference), asked, responses)
        rows += [(f"p{number}", len(apart.kl), *(float(some.sum()) for some in apart)) for apart in found]
    names = ["prompt_id", "num_tokens", "logps", "ref_logps", "kl_exact"]
    frame = pl.DataFrame(rows, schema=names, orient="row")
    told = {row["metric"]: row["value"] for row in kl_rows(1.0, frame, 0.95)}
    kl, length = (sum(some) / len(prompts) for some in zip(*truth, strict=True))
    spread = frame.with_columns(kl=pl.col("logps") - pl.col("ref_logps"))
    errors = {name: float(spread[name].to_numpy().std()) / np.sqrt(spread.height) for name in ("kl", "kl_exact")}
    assert told["kl"] == pytest.approx(kl, abs=4 * errors["kl"])
    assert told["kl_exact"] == pytest.approx(kl, abs=4 * errors["kl_exact"])
    assert errors["kl_exact"] < 0.5 * errors["kl"]
    assert told["kl_token"] == pytest.approx(kl / length, abs=5 * errors["kl"])
    assert told["kl_exact_token"] == pytest.approx(kl / length, abs=5 * errors["kl_exact"] + 0.02)


def test_over_all_responses_weighed_by_their_probability_both_estimates_are_the_kl() -> None:
    policy, reference = toy(0), toy(1)
    prompt, responses = [1, 3], all_responses()
    found: list[Apart] = compare_models(scorer_of(policy), scorer_of(reference), [prompt] * len(responses), responses)
    sums = [(float(a.logps.sum()), float(a.ref_logps.sum()), float(a.kl.sum())) for a in found]
    truth, _ = exact_kl(policy, reference, prompt)
    assert sum(np.exp(p) * (p - q) for p, q, _ in sums) == pytest.approx(truth, abs=1e-5)
    assert sum(np.exp(p) * kl for p, _, kl in sums) == pytest.approx(truth, abs=1e-5)


class Full(CompletionLogps):
    """A scorer that runs out of memory with more than some pairs at once."""

    most = 1

    def own_logits(self, batch: Any) -> Any:
        if int(batch.sides[-1]) // 2 + 1 > self.most:
            raise MemoryError("not that many")
        return super().own_logits(batch)


def test_a_comparison_that_runs_out_of_memory_goes_on_in_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = (tiny.random_model(tiny.llama_config(), seed) for seed in (0, 1))
    layout = choose_layout(one, "float32", 128)
    prompts, completions = some_ids()
    whole = compare_models(scorer_of(one), scorer_of(other), prompts, completions)
    halves = compare_models(Full(one, "float32", layout), scorer_of(other), prompts, completions)
    for some, others in zip(whole, halves, strict=True):
        for mine, yours in zip(some, others, strict=True):
            np.testing.assert_allclose(mine, yours, atol=1e-4)
    monkeypatch.setattr(Full, "most", 0)
    with pytest.raises(MachineError, match="out of memory comparing two models") as full:
        compare_models(Full(one, "float32", layout), scorer_of(other), prompts, completions)
    hint = "two models at once need room: a smaller evaluate.max_new_tokens, or evaluate.dtype bfloat16_weights"
    assert full.value.hint == hint
