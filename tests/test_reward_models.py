"""Reward models: batches with padding equal one sequence at a time, whatever a class makes of padding."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CHAT_TEMPLATE, SIZES, gpt2_config, llama_config, save_model, sentence, tiny_tokenizer, turn
from transformers import AutoModelForSequenceClassification, BertConfig, PreTrainedConfig, RobertaConfig

from prefkit.errors import MachineError, ModelError
from prefkit.format import Kind
from prefkit.reward_models import RewardModel, load_reward_model, reward_identity, reward_responses

SMALL = {name: SIZES[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
SMALL |= {"max_position_embeddings": 130, "initializer_range": 0.3, "vocab_size": 380, "num_labels": 1}

CONFIGS: dict[str, Callable[..., PreTrainedConfig]] = {
    "llama": lambda **more: llama_config(num_labels=1, **more),
    "gpt2": lambda **more: gpt2_config(num_labels=1, **more),
    "bert": lambda **more: BertConfig(**(SMALL | more)),
    "roberta": lambda **more: RobertaConfig(**(SMALL | {"bos_token_id": 1, "eos_token_id": 2} | more)),
}


def classifier(folder: Path, config: PreTrainedConfig, template: str | None = CHAT_TEMPLATE) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        make: Any = AutoModelForSequenceClassification.from_config
        model = make(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.3)
    return save_model(folder, model.eval(), tiny_tokenizer(template))


def loaded(folder: Path, kind: Kind = "text", **more: Any) -> RewardModel:
    given: dict[str, Any] = {"dtype": "float32", "max_length": None, "chat_template": None, "tell": lambda _text: None}
    return load_reward_model(str(folder), kind, **(given | more))


def texts(count: int = 40) -> tuple[list[str], list[str]]:
    """Prompts and responses of very different lengths; some end with the end token or the padding, as text."""
    import random

    rng = random.Random(0)
    prompts = [sentence(rng, 1, 12) for _ in range(count)]
    responses = [" " + sentence(rng, 1, 25) for _ in range(count)]
    return prompts, [r + ("</s>" if n % 5 == 0 else "<pad>" if n % 7 == 0 else "") for n, r in enumerate(responses)]


def plain(folder: Path, sequences: list[list[int]]) -> list[float]:
    """THE oracle: transformers' own class as it is saved, one sequence at a time."""
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return [float(model(input_ids=torch.tensor([ids])).logits[0, 0]) for ids in sequences]


@pytest.mark.parametrize("pad", [None, 0, 2], ids=["no padding token", "a padding token", "the end token pads"])
@pytest.mark.parametrize("name", CONFIGS)
def test_batches_with_padding_give_what_each_sequence_alone_gives(name: str, pad: int | None, tmp_path: Path) -> None:
    if pad is None and name in ("bert", "roberta"):
        pytest.skip("these classes need one to be made")
    folder = classifier(tmp_path, CONFIGS[name](pad_token_id=pad))
    prompts, responses = texts()
    tokenizer = tiny_tokenizer()
    # by hand: the tokenizer's default puts <s> first, and </s> ends a text; what the text spells stays text
    sequences = [
        [1, *tokenizer(p + r, add_special_tokens=False, split_special_tokens=True)["input_ids"], 2]
        for p, r in zip(prompts, responses, strict=True)
    ]
    model = loaded(folder)
    assert model.padded or pad == 2  # with padding in every sequence a mask may well matter
    found = reward_responses(model, prompts, responses, [None] * len(prompts))
    assert found == pytest.approx(plain(folder, sequences), abs=1e-5)


def test_a_chat_is_rendered_with_the_template_and_what_spells_a_control_token_is_text(tmp_path: Path) -> None:
    folder = classifier(tmp_path, llama_config(num_labels=1))
    tokenizer = tiny_tokenizer()
    prompts = [[{**turn("user", text), "extra": None}] for text in ("quiet river", "a <|assistant|> b")]
    responses = ["seven stones", "no</s>"]

    def words(text: Any) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return found

    user, assistant = tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>"])
    sequences = [
        [1, user, *words(p[0]["content"]), assistant, *words(r), 2] for p, r in zip(prompts, responses, strict=True)
    ]
    found = reward_responses(loaded(folder, "chat"), prompts, responses, [None, None])
    assert found == pytest.approx(plain(folder, sequences), abs=1e-5)


def test_a_response_that_is_too_long_is_never_cut(tmp_path: Path) -> None:
    folder = classifier(tmp_path, BertConfig(**SMALL))
    long = "x" * 200
    assert reward_responses(loaded(folder), ["a", "a"], ["b", long], [None, None])[1] == "too_long"
    model = loaded(folder, max_length=6)
    short, exact, longer = (reward_responses(model, [""], [text], [None])[0] for text in ("x!x", "x!x!", "x!x!x"))
    assert [isinstance(score, float) for score in (short, exact)] == [True, True]  # <s>, four letters, </s>
    assert longer == "too_long"
    with pytest.raises(ModelError, match=r"scorers.max_length is 131, the model holds 130 tokens"):
        loaded(folder, max_length=131)


def test_roberta_counts_its_positions_from_its_padding_on(tmp_path: Path) -> None:
    folder = classifier(tmp_path, CONFIGS["roberta"](pad_token_id=0))
    model = loaded(folder)
    assert model.max_length == 129
    prompt = "x!" * 100
    found = reward_responses(model, [prompt[:n] for n in (127, 128)], ["", ""], [None, None])
    assert [isinstance(score, float) for score in found] == [True, False]


def test_a_class_that_takes_no_padding_is_scored_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = classifier(tmp_path, llama_config(num_labels=1))
    from prefkit import reward_models

    real = reward_models._forward

    def broken(model: RewardModel, sequences: list[list[int]]) -> list[float]:
        return [score + 0.5 * (len(sequences) > 1) for score in real(model, sequences)]

    monkeypatch.setattr(reward_models, "_forward", broken)
    told: list[str] = []
    model = loaded(folder, tell=told.append)
    assert not model.padded
    assert "one sequence at a time: padding changes its scores by 0.5" in told[0] or "padding changes" in told[0]
    prompts, responses = texts(6)
    found = reward_responses(model, prompts, responses, [None] * 6)
    monkeypatch.undo()
    assert found == pytest.approx(reward_responses(loaded(folder), prompts, responses, [None] * 6), abs=1e-5)


def test_bfloat16_is_near_float32(tmp_path: Path) -> None:
    folder = classifier(tmp_path, llama_config(num_labels=1))
    prompts, responses = texts(8)
    exact = reward_responses(loaded(folder), prompts, responses, [None] * 8)
    for dtype in ("bfloat16", "bfloat16_weights"):
        found = reward_responses(loaded(folder, dtype=dtype), prompts, responses, [None] * 8)
        assert found == pytest.approx(exact, abs=0.3)
        assert found != exact


def test_what_is_no_reward_model_is_refused_by_name(tmp_path: Path) -> None:
    two = classifier(tmp_path / "two", llama_config(num_labels=2))
    with pytest.raises(ModelError, match="a classifier with 2 outputs") as wrong:
        loaded(two)
    assert wrong.value.expected == "one output, the reward"
    from tiny import tiny_llama

    causal = tiny_llama(tmp_path / "causal")
    with pytest.raises(ModelError, match=r"of its weights are missing or of another shape: score.weight"):
        loaded(causal)
    small = classifier(tmp_path / "small", llama_config(100, num_labels=1))
    with pytest.raises(ModelError, match="tokens, the model 100 embeddings"):
        loaded(small)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="an adapter, not a whole reward model") as adapter:
        reward_identity(str(tmp_path / "adapter"), "text", None)
    assert adapter.value.expected == "a sequence classifier with its own weights"
    assert adapter.value.hint == "merge it: merge_and_unload() of peft, then save_pretrained"
    bare = classifier(tmp_path / "bare", llama_config(num_labels=1), None)
    with pytest.raises(ModelError, match="the tokenizer has no chat template") as none:
        reward_identity(str(bare), "chat", None)
    assert none.value.expected.startswith("scorers.chat_template: a jinja file")
    with pytest.raises(ModelError, match=r"scorers.chat_template: no template gone.jinja"):
        reward_identity(str(bare), "chat", "gone.jinja")


def test_out_of_memory_computes_a_batch_in_halves_and_one_response_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = classifier(tmp_path, llama_config(num_labels=1))
    model = loaded(folder)
    prompts, responses = texts(9)
    whole = reward_responses(model, prompts, responses, [None] * 9)
    from prefkit import reward_models

    real, most = reward_models._forward, 2

    def small(some: RewardModel, sequences: list[list[int]]) -> list[float]:
        if len(sequences) > most:
            raise MemoryError
        return real(some, sequences)

    monkeypatch.setattr(reward_models, "_forward", small)
    assert reward_responses(model, prompts, responses, [None] * 9) == pytest.approx(whole, abs=1e-5)
    most = 0
    with pytest.raises(MachineError, match="out of memory on a single response") as full:
        reward_responses(model, prompts, responses, [None] * 9)
    assert full.value.hint == "a smaller scorers.max_length, or another dtype"

    def failing(_model: RewardModel, _sequences: list[list[int]]) -> list[float]:
        raise ValueError("no end token")

    monkeypatch.setattr(reward_models, "_forward", failing)
    with pytest.raises(ModelError, match="it cannot score a sequence: no end token"):
        loaded(folder)
