"""Where responses end: end tokens from wherever they are named, stop texts, and what of the tokens is the response."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import CHAT_TEMPLATE, gpt2_tokenizer, tiny_llama, tiny_tokenizer

from prefkit.encode import TRANSCRIPT
from prefkit.models import load_tokenizer
from prefkit.stops import Ending, StopTexts, Turn, assistant_turn, find_ending, response_text

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("stops") / "model")


def test_end_tokens_are_those_of_folder_tokenizer_and_template(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    assert find_ending(model, tokenizer, CHAT_TEMPLATE, []).ids == (2,)
    path = model / "generation_config.json"
    before = path.read_text()
    path.write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert find_ending(model, tokenizer, CHAT_TEMPLATE, []).ids == (2, 7, 9)
    path.write_text("no json")
    assert find_ending(model, tokenizer, None, []).ids == (2,)
    path.write_text(before)


def test_the_template_names_an_end_token_that_nobody_else_does(model: Path) -> None:
    tokenizer = tiny_tokenizer(CHATML, ["<|im_start|>", "<|im_end|>"])
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert assistant_turn(tokenizer, CHATML) == Turn("", "<|im_end|>\n")
    assert find_ending(model, tokenizer, CHATML, []).ids == (2, end)


def test_a_transcript_ends_where_the_other_one_speaks(model: Path) -> None:
    ending = find_ending(model, load_tokenizer(model), TRANSCRIPT, ["STOP"])
    assert ending.texts == ("STOP", "\n\nHuman:")
    assert ending.lead == " "
    assert find_ending(model, load_tokenizer(model), CHAT_TEMPLATE, ["STOP", "STOP"]).texts == ("STOP",)


def test_a_template_that_refuses_or_hides_what_is_said_names_nothing() -> None:
    tokenizer = tiny_tokenizer()
    assert assistant_turn(tokenizer, None) == Turn("", "")
    assert assistant_turn(tokenizer, "{{ raise_exception('no') }}") == Turn("", "")
    assert assistant_turn(tokenizer, "{{ bos_token }}") == Turn("", "")


def ending_of(tokenizer: Any, *texts: str, lead: str = "") -> Ending:
    return Ending((2,), texts, lead, frozenset(tokenizer.all_special_ids))


def test_a_response_is_its_words_without_end_control_tokens_and_stop_text() -> None:
    tokenizer = tiny_tokenizer()

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    ending = ending_of(tokenizer, "STOP", "\n\nHuman:")
    prompt = ids("question")
    cases = {
        (*ids("an answer"), 2): "an answer",
        (*ids(" an answer"),): " an answer",
        (*ids("an"), 3, *ids(" answer"), 4, 2): "an answer",
        (*ids("one STOP two"),): "one ",
        (*ids("one\n\nHuman: two STOP"),): "one",
        (2,): "",
        (*ids("an <b>answer</b> [red]x[/red]"), 2): "an <b>answer</b> [red]x[/red]",
    }
    for tokens, text in cases.items():
        assert response_text(tokenizer, prompt, tokens, ending) == text
    led = ending_of(tokenizer, lead=" ")
    assert response_text(tokenizer, prompt, [*ids(" two  spaces"), 2], led) == "two  spaces"


def test_an_end_token_that_is_an_ordinary_word_is_left_out_once() -> None:
    tokenizer = tiny_tokenizer()
    river = tokenizer(" river", add_special_tokens=False)["input_ids"]
    assert len(river) == 1
    ending = ending_of(tokenizer)._replace(ids=tuple(river))
    assert response_text(tokenizer, [], [*river, *river], ending) == " river"


def test_a_response_may_begin_or_end_within_a_character() -> None:
    tokenizer = tiny_tokenizer()
    smile = list(tokenizer("\U0001f642", add_special_tokens=False)["input_ids"])
    ending = ending_of(tokenizer)
    assert len(smile) > 1
    assert response_text(tokenizer, [], smile, ending) == "\U0001f642"
    assert "\ufffd" in response_text(tokenizer, smile[:1], [*smile[1:], *smile[:2]], ending)


def test_words_behind_a_prompt_keep_the_space_that_some_tokenizers_leave_out_at_the_beginning() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "</s>": 1, "\u2581one": 2, "\u2581two": 3}
    backend = Tokenizer(models.WordLevel(words, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")  # type: ignore[no-untyped-call]
    assert tokenizer.decode([3]) == "two"
    assert response_text(tokenizer, [2], [3, 1], Ending((1,), (), "", frozenset({0, 1}))) == " two"


def test_a_stop_text_is_found_at_the_token_that_completes_it_however_it_is_cut() -> None:
    tokenizer = tiny_tokenizer()
    stops = StopTexts(tokenizer, ending_of(tokenizer, "\n\nHuman:", "\u00e9nd"))
    text = "some words\n\nHuman: more"
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    holds = ["\n\nHuman:" in tokenizer.decode(ids[:k]) for k in range(len(ids) + 1)]
    first = holds.index(True)
    assert [stops.ended(ids[:k]) for k in range(1, first + 1)] == holds[1 : first + 1]
    assert stops.ended(list(tokenizer("\u00e9nd", add_special_tokens=False)["input_ids"]))
    between = [*tokenizer("\n\nHum", add_special_tokens=False)["input_ids"], 3, 4]
    assert stops.ended([*between, *tokenizer("an:", add_special_tokens=False)["input_ids"]])
    assert not StopTexts(tokenizer, ending_of(tokenizer)).ended(ids)


def test_real_templates_end_as_their_makers_say(test_data: Path) -> None:
    tokenizer = gpt2_tokenizer(test_data)
    found = {}
    for path in sorted((test_data / "chat_templates").glob("*.jinja")):
        found[path.stem] = assistant_turn(tokenizer, path.read_text())
    assert len(found) >= 3
    assert all(turn.after.strip() or not turn.lead for turn in found.values()), sorted(found)
