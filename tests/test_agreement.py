"""Whether a model and a tokenizer are a reference's: the figures by hand, and what is said where they are not."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from adapted import base_of, sft_adapter
from tiny import llama_config, tiny_llama, tiny_tokenizer

from prefkit.errors import GateError, ModelError
from prefkit.identity import model_config, template_sha256, tokenizer_sha256, weights_sha256
from prefkit.integrations.agreement import Agreement, Carried, check_folder, check_tokenizer, judge

KEY = "0123456789abcdef"


def identity_of(folder: Path, **changes: Any) -> dict[str, Any]:
    mine = {"weights_sha256": weights_sha256(folder), "config": model_config(folder)}
    return {**mine, "kind": "chat", "tokenizer_sha256": tokenizer_sha256(tiny_tokenizer()), **changes}


def test_the_figures_are_a_token_each() -> None:
    # .02 / 4 and .01 / 1; (.0004 / 4 + .0001 / 1) / 2 = .0001; (.02 - .01) / (4 + 1)
    found = Agreement.of([0.02, -0.01], [4, 1])
    assert (found.sides, found.tokens) == (2, 5)
    assert found.max_abs == pytest.approx(0.01)
    assert found.rms == pytest.approx(0.01)
    assert found.mean == pytest.approx(0.002)
    assert Agreement.of([0.5], [0]).max_abs == 0.5  # a side that a collator has cut away altogether


@pytest.mark.parametrize(
    ("figures", "exact", "good"),
    [
        (Agreement(2, 10, 0.9e-4, 0.0, 0.0), True, True),
        (Agreement(2, 10, 1.1e-4, 0.0, 0.0), True, False),
        (Agreement(2, 10, 1.0, 0.049, -0.0049), False, True),
        (Agreement(2, 10, 0.0, 0.051, 0.0), False, False),
        (Agreement(2, 10, 0.0, 0.0, -0.0051), False, False),
        (Agreement(2, 10, math.nan, math.nan, math.nan), True, False),
        (Agreement(2, 10, math.nan, math.nan, math.nan), False, False),
    ],
)
def test_the_limits_are_the_gates(figures: Agreement, exact: bool, good: bool) -> None:
    if good:
        return judge(figures, exact=exact, where="here")
    with pytest.raises(GateError, match="the model's own scores are not the dataset's"):
        judge(figures, exact=exact, where="here")
    return None


def test_a_model_that_scores_otherwise_is_told_by_how_much() -> None:
    with pytest.raises(GateError) as refused:
        judge(Agreement(128, 4309, 0.25, 0.5, -0.125), exact=True, where="train dataset")
    assert str(refused.value) == (
        "train dataset: the model's own scores are not the dataset's: 0.25 nats a token at most, RMS 0.5, mean -0.125, "
        "over 4309 tokens\n"
        "  expected: at most 0.0001\n"
        "  next: prefkit precompute DATASET --model M, and load the dataset again; other_reference=True if the "
        "reference is another model on purpose"
    )
    with pytest.raises(GateError) as refused:
        judge(Agreement(128, 4309, 0.25, 0.5, -0.125), exact=False, where="train dataset")
    assert refused.value.expected == "RMS at most 0.05, mean at most 0.005"


def test_a_folder_is_known_by_its_weights_and_its_config(tmp_path: Path) -> None:
    one = tiny_llama(tmp_path / "one")
    moved = Path(shutil.copytree(one, tmp_path / "moved"))
    check_folder(moved, identity_of(one))
    other = tiny_llama(tmp_path / "other", seed=1, rms_norm_eps=1e-3)
    with pytest.raises(GateError) as refused:
        check_folder(other, identity_of(one))
    before, after = (f"{weights_sha256(folder)[:16]}..." for folder in (one, other))
    assert str(refused.value) == (
        f"{other}: not the model that was scored (reference and model): weights_sha256: {before} and {after}; "
        "config.rms_norm_eps: 1e-06 and 0.001\n"
        "  expected: the reference's own model; to go on with a run, the model that it began with\n"
        f"  next: prefkit precompute DATASET --model {other}; "
        "other_reference=True if the reference is another model on purpose"
    )


def test_an_adapter_folder_is_no_model_to_others(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", llama_config())
    with pytest.raises(ModelError) as refused:
        check_folder(sft_adapter(tmp_path / "sft", base), identity_of(base))
    assert str(refused.value) == (
        f"{tmp_path / 'sft'}: holds an adapter, which this trainer does not load by itself\n"
        "  expected: a model folder, or a PeftModel\n"
        "  next: peft.PeftModel.from_pretrained(BASE, ADAPTER, is_trainable=True)"
    )


def test_a_tokenizer_is_known_by_what_it_does_and_its_template(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model")
    text = tiny_tokenizer().chat_template
    chat = Carried(KEY, identity_of(model, chat_template_sha256=template_sha256(text)), text)
    plain = Carried(KEY, identity_of(model, kind="text", chat_template_sha256=None), None)
    padded = tiny_tokenizer()
    padded.pad_token = padded.eos_token
    padded.padding_side = "left"
    for found in (chat, plain):
        check_tokenizer(tiny_tokenizer(), found)
        check_tokenizer(padded, found)
    bare = tiny_tokenizer(None)
    check_tokenizer(bare, plain)
    assert bare.chat_template is None
    check_tokenizer(bare, chat)
    assert bare.chat_template == text
    check_tokenizer(tiny_tokenizer("{{ messages }}"), plain)  # a text dataset was rendered with none
    with pytest.raises(GateError) as refused:
        check_tokenizer(tiny_tokenizer("{{ messages }}"), chat)
    both = (template_sha256(text), template_sha256("{{ messages }}"))
    assert str(refused.value) == (
        "processing_class: another chat template than the reference's (reference and processing_class): "
        f"chat_template_sha256: {str(both[0])[:16]}... and {str(both[1])[:16]}...\n"
        "  expected: the one that the pairs were rendered with: the trained model's tokenizer keeps it\n"
        f"  next: processing_class.chat_template = the text of reference/{KEY}/chat_template.jinja"
    )
    more = tiny_tokenizer()
    more.add_tokens(["copperlantern"])
    with pytest.raises(GateError) as refused:
        check_tokenizer(more, plain)
    hashes = [f"{tokenizer_sha256(tokenizer)[:16]}..." for tokenizer in (tiny_tokenizer(), more)]
    assert str(refused.value) == (
        "processing_class: another tokenizer than the reference's (reference and processing_class): "
        f"tokenizer_sha256: {hashes[0]} and {hashes[1]}\n"
        "  expected: the tokenizer of the model that was scored, without tokens added since"
    )
