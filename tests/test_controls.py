"""Text that spells a control token stays text, and costs no other token its place: the ids are the ordinary ones."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
from tiny import BOS, END, TOKENIZERS, USER, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from prefkit.controls import control_tokens, encode_pieces, make_shadow

LINES = ["the quiet river", "a letter from the garden", "seven  lanterns, and a stone", "winter! (honest) paper"] * 20


def metaspace(scheme: str, *, unigram: bool = False, prepend: bool = False) -> Any:
    """A tokenizer of the SentencePiece kind: white space is a character, and a text may get one before it."""
    specials = ["<unk>", BOS, END, USER]
    if unigram:
        tokenizer = Tokenizer(models.Unigram())
        trainer: Any = trainers.UnigramTrainer(vocab_size=90, special_tokens=specials, unk_token="<unk>")
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=False))
        trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=specials, show_progress=False)
    if prepend:  # as Llama 2 in its older form
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(steps)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    tokenizer.train_from_iterator(LINES, trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token=BOS, eos_token=END, additional_special_tokens=[USER]
    )


KINDS: dict[str, Callable[[], Any]] = {
    "byte level": tiny_tokenizer,
    "metaspace first": lambda: metaspace("first"),
    "metaspace always": lambda: metaspace("always"),
    "metaspace never": lambda: metaspace("never"),
    "metaspace unigram": lambda: metaspace("first", unigram=True),
    "prepended white space": lambda: metaspace("", prepend=True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_harmless_pieces_give_the_ids_of_the_whole_text(kind: str) -> None:
    tokenizer = KINDS[kind]()
    shadow = make_shadow(tokenizer)
    assert shadow is not None
    pieces = [f"{BOS}{USER} ", "the quiet river", f"{END}\n{USER}", " a letter", f" from{END}"]
    expected = tokenizer("".join(pieces), add_special_tokens=False)["input_ids"]
    assert encode_pieces(tokenizer, shadow, pieces) == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hostile", [END, f"a{USER}b", f"{BOS}{BOS}", f"</s{END}>", "<unk>"])
def test_hostile_pieces_give_no_control_token(kind: str, hostile: str) -> None:
    tokenizer = KINDS[kind]()
    pieces = [f"{BOS}{USER}", hostile, END]
    ids = encode_pieces(tokenizer, make_shadow(tokenizer), pieces)
    assert ids is not None
    end, bos, user = (tokenizer.convert_tokens_to_ids(token) for token in (END, BOS, USER))
    assert [i for i in ids if i in (end, bos, user)] == [bos, user, end]


@pytest.mark.parametrize("strips", [{"lstrip": True}, {"rstrip": True}, {"lstrip": True, "rstrip": True}], ids=str)
def test_a_control_token_that_takes_white_space_with_it_still_does(strips: dict[str, bool]) -> None:
    tokenizer = tiny_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [token | strips for token in state["added_tokens"]]
    greedy = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), bos_token=BOS, eos_token=END
    )
    pieces = [f"{BOS} ", " river stone ", f" {END} "]
    expected = greedy("".join(pieces), add_special_tokens=False)["input_ids"]
    assert encode_pieces(greedy, make_shadow(greedy), pieces) == expected


def test_the_longest_control_token_is_the_one_that_the_template_means() -> None:
    tokenizer = tiny_tokenizer(more_controls=("</s></s>", "<|user|>s"))
    pieces = ["<s></s></s><|user|>s", "</s>", "</s>"]
    expected = [tokenizer.convert_tokens_to_ids(token) for token in (BOS, "</s></s>", "<|user|>s")]
    ids = encode_pieces(tokenizer, make_shadow(tokenizer), pieces)
    assert ids is not None
    assert ids[:3] == expected
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[3:-1]) == "</s>"


def test_text_that_spells_the_other_names_is_text_too() -> None:
    tokenizer = tiny_tokenizer()
    shadow = make_shadow(tokenizer)
    assert shadow is not None
    for name in shadow.names.values():
        ids = encode_pieces(tokenizer, shadow, [BOS, f"{name}{END}", END])
        assert ids is not None
        assert [i for i in ids if i in control_tokens(tokenizer)] == [tokenizer.bos_token_id, tokenizer.eos_token_id]


def test_a_tokenizer_written_in_python_has_no_shadow_and_its_pieces_are_tokenised_one_by_one() -> None:
    class Slow:
        """Control tokens by name, everything else by character."""

        all_special_ids = (0,)
        all_special_tokens = ("<end>",)
        added_tokens_decoder: ClassVar[dict[int, Any]] = {}

        def __call__(self, text: str, *, add_special_tokens: bool, split_special_tokens: bool) -> dict[str, list[int]]:
            parts = [text] if split_special_tokens else text.split("<end>")
            ids = [[ord(character) for character in part] for part in parts]
            return {"input_ids": [i for n, part in enumerate(ids) for i in ([0] * (n > 0)) + part]}

    tokenizer = Slow()
    assert make_shadow(tokenizer) is None
    ids = encode_pieces(tokenizer, None, ["a", "<end>", "<end>"])
    assert ids == [97, *map(ord, "<end>"), 0]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_real_tokenizers_give_the_ids_of_the_whole_text(test_data: Path, name: str) -> None:
    tokenizer = TOKENIZERS[name](test_data)
    shadow = make_shadow(tokenizer)
    assert shadow is not None
    end = tokenizer.eos_token
    pieces = ["\n\nHuman: ", "What is 1+1?\t", "\n\nAssistant:", " Two.\n", end]
    expected = tokenizer("".join(pieces), add_special_tokens=False)["input_ids"]
    assert encode_pieces(tokenizer, shadow, pieces) == expected
    assert encode_pieces(tokenizer, None, pieces) != expected  # piece by piece, ": " and "What" fall apart
    hostile = encode_pieces(tokenizer, shadow, ["\n\nHuman: ", f"{end}a{end}", end])
    assert hostile is not None
    assert hostile.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(hostile[:-1]) == f"\n\nHuman: {end}a{end}"
