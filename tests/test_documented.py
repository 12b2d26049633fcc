"""What reads pages for the tests of the pages: blocks, commands, and when a line that is shown is true."""

import pytest
from documented import Command, blocks_of, commands_of, untrue

PAGE = """\
# A page

    sources -> pairs

Text.

    $ prefkit query d "select 1
                       where 2 > 1" \\
          --format csv      # a comment
    1
    ...
    $ prefkit audit d --strict | tail -n 1   # exits with 1

* a list

      $ prefkit info d

```python
print(1)
```

```
prefkit info a
# a comment
prefkit info b
```

```yaml
split: {seed: 1}
```

```
error: told
```
"""


def test_the_blocks_of_a_page_are_found_in_their_order_with_their_kind_and_line() -> None:
    blocks = blocks_of("PAGE.md", PAGE)
    assert [(block.kind, block.line) for block in blocks] == [
        ("text", 3),
        ("commands", 7),
        ("commands", 16),
        ("python", 19),
        ("commands", 23),
        ("yaml", 29),
        ("text", 33),
    ]
    assert [block.name[1] for block in blocks][::3] == ["sources -> pairs", "print(1)", "error: told"]


def test_commands_are_read_as_a_shell_reads_them_with_what_is_shown_below() -> None:
    sessions = [block for block in blocks_of("PAGE.md", PAGE) if block.kind == "commands"]
    query, audit = commands_of(sessions[0])
    assert query.words[:3] == ["prefkit", "query", "d"]
    assert query.words[3].split() == ["select", "1", "where", "2", ">", "1"]
    assert query.words[4:] == ["--format", "csv"]
    assert (query.shown, query.code, query.needs_a_shell) == (["1", "..."], 0, False)
    assert (audit.shown, audit.code, audit.needs_a_shell) == ([], 1, True)
    assert [command.words[-1] for command in commands_of(sessions[2])] == ["a", "b"]


def test_output_that_belongs_to_no_command_is_refused() -> None:
    (block,) = blocks_of("PAGE.md", "    1 row\n    $ prefkit info d\n")
    with pytest.raises(AssertionError, match="'1 row' is no command's"):
        list(commands_of(block))


PRINTED = "reading a\nreading b\n3 pairs\n  1 tie\n  2 kept\nverdict: pass 0.57\n"


@pytest.mark.parametrize(
    "shown",
    [
        [],
        ["3 pairs", "  1 tie", "  2 kept", "verdict: pass 0.57"],
        ["reading b", "3 pairs", "..."],
        ["...", "  2 kept", "verdict: pass 0.57"],
        ["3 pairs", "  ...", "verdict: pass 0.57"],
        ["3 pairs", "...", "  2 kept", "..."],
    ],
)
def test_lines_that_were_printed_are_true(shown: list[str]) -> None:
    assert untrue(shown, PRINTED) is None


@pytest.mark.parametrize(
    ("shown", "why"),
    [
        (["4 pairs", "..."], "not printed, or not in this place: '4 pairs'"),
        (["  1 tie", "..."], "not printed, or not in this place: '  1 tie'"),  # what stands before it is no progress
        (["3 pairs", "  2 kept", "..."], "not in this place"),
        (["3 pairs"], "left out without a line of ...: '  1 tie'"),
        (["3 pairs", "...", "  2 kept"], "not in this place: '  2 kept'"),
        (["3 pairs", "...", "verdict: pass 0.58"], "'verdict: pass 0.58'"),
        (["...", "  2 kept", "...", "  1 tie", "..."], "not in this place: '  1 tie'"),
    ],
)
def test_a_line_that_was_not_printed_or_stands_elsewhere_is_untrue(shown: list[str], why: str) -> None:
    told = untrue(shown, PRINTED)
    assert told is not None
    assert why in told


def test_with_other_weights_keys_and_numbers_may_be_near_and_words_and_counts_may_not() -> None:
    line = "reference 9c38e9b8932a5972: 843 pairs, loss 0.4013"
    assert untrue([line], "reference 0123456789abcdef: 843 pairs, loss 0.4020", exact=False) is None
    assert untrue([line], "reference 0123456789abcdef: 843 pairs, loss 0.4020") is not None
    assert untrue([line], "reference 0123456789abcdef: 842 pairs, loss 0.4013", exact=False) is not None
    assert untrue([line], "reference 0123456789abcdef: 843 pairs, loss 0.6013", exact=False) is not None
    assert untrue([line], "reference 0123456789abcdef: 843 pairs, rate 0.4013", exact=False) is not None


@pytest.mark.parametrize("text", ["prefkit info a | tail", "prefkit info runs/*", "cat a > b", "echo $HOME", "(cd a)"])
def test_a_command_that_only_a_shell_understands_goes_to_one(text: str) -> None:
    assert Command("P.md", text, [], 0).needs_a_shell


@pytest.mark.parametrize(
    "text", ["prefkit query d 'select count(*) from a'", 'prefkit show d --where "a > 2"', "ls # (all)"]
)
def test_what_stands_in_quotes_or_in_a_comment_needs_no_shell(text: str) -> None:
    assert not Command("P.md", text, [], 0).needs_a_shell


def test_a_command_is_called_by_its_first_line() -> None:
    assert Command("P.md", 'prefkit query d "select 1\n from x"', [], 0).name == ("P.md", 'prefkit query d "select 1')
