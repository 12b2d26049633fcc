"""Pairs as rows: tries by hand, and against a slow walk over every pair of tokens."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefkit.attention import visible
from prefkit.encode import Sides
from prefkit.packing import MIN_SHARED, Batch, make_batch

LONG = [*range(100, 100 + MIN_SHARED)]  # just long enough to be shared


def test_a_pair_shares_its_prompt() -> None:
    batch = make_batch([Sides(LONG, [9, 10], [7])], rows="packed")
    # sorted: the rejected side, which begins with 7, comes first
    assert batch.input_ids.tolist() == [[*LONG, 7, 9, 10]]
    assert batch.position_ids.tolist() == [[*range(16), 16, 16, 17]]
    assert batch.ends.tolist() == [[19] * 16 + [17, 19, 19]]
    assert batch.lengths.tolist() == [19]
    # 9 and 7 are predicted by the last prompt token, 10 by 9: each place once
    assert batch.predictors.tolist() == [15, 17]
    assert batch.sources.tolist() == [0, 1, 0]
    assert batch.targets.tolist() == [9, 10, 7]
    assert batch.sides.tolist() == [0, 0, 1]
    assert batch.branches[0, 0].tolist() == [[0, 17, 0, 17], [17, 19, 0, 16], [17, 19, 17, 19]]


def test_the_common_beginning_of_two_responses_is_there_once() -> None:
    batch = make_batch([Sides(LONG, [5, 6, 8], [5, 6, 7])], rows="packed")
    assert batch.input_ids.tolist() == [[*LONG, 5, 6, 7, 8]]
    assert batch.position_ids[0, 16:].tolist() == [16, 17, 18, 18]
    assert batch.ends[0, 15:].tolist() == [20, 20, 20, 19, 20]
    # 5, 6 and then 8 or 7: three places predict six tokens
    assert batch.predictors.tolist() == [15, 16, 17]
    assert batch.sources.tolist() == [0, 1, 2, 0, 1, 2]
    assert batch.targets.tolist() == [5, 6, 8, 5, 6, 7]


def test_a_response_that_the_other_begins_with_adds_nothing() -> None:
    batch = make_batch([Sides(LONG, [5, 6], [5])], rows="packed")
    assert batch.input_ids.tolist() == [[*LONG, 5, 6]]
    assert batch.branches.shape[2] == 1
    assert batch.sources.tolist() == [0, 1, 0]


def test_two_pairs_with_one_prompt_share_it_and_a_third_has_its_own() -> None:
    pairs = [Sides(LONG, [1], [2]), Sides([50, 51], [3], [4]), Sides(LONG, [5], [1])]
    batch = make_batch(pairs, rows="packed")
    # the short prompt is below MIN_SHARED: once for each side; LONG and the two 1s are there once
    assert batch.input_ids.tolist() == [[50, 51, 3, 50, 51, 4, *LONG, 1, 2, 5]]
    assert batch.ends.tolist() == [[3, 3, 3, 6, 6, 6, *([25] * 16), 23, 24, 25]]
    assert batch.targets.tolist() == [1, 2, 3, 4, 5, 1]
    assert batch.sides.tolist() == [0, 1, 2, 3, 4, 5]
    assert batch.predictors[batch.sources].tolist() == [21, 21, 1, 4, 21, 21]


def test_a_short_beginning_is_not_shared_but_a_whole_short_sequence_is() -> None:
    short = LONG[: MIN_SHARED - 1]
    assert make_batch([Sides(short, [1], [2])], rows="packed").lengths.tolist() == [2 * MIN_SHARED]
    assert make_batch([Sides(LONG, [1], [2])], rows="packed").lengths.tolist() == [MIN_SHARED + 2]
    assert make_batch([Sides([1], [2], [2, 3])], rows="packed").input_ids.tolist() == [[1, 2, 3]]


def test_rows_of_one_pair_each_are_padded_and_padding_sees_itself() -> None:
    batch = make_batch([Sides(LONG, [1], [2]), Sides([3], [4], [4, 5])], rows="tree", pad_id=99)
    assert batch.input_ids[1].tolist() == [3, 4, 5, *([99] * 15)]
    assert batch.lengths.tolist() == [18, 3]
    assert batch.ends[1].tolist() == [3, 3, 3, *range(4, 19)]
    assert batch.predictors.tolist() == [15, 18, 19]
    assert batch.branches.shape == (1, 1, 0, 4)
    seen = visible(batch.ends)
    assert seen.shape == (2, 1, 18, 18)
    assert seen[1, 0, 3:].nonzero().tolist() == [[row, row + 3] for row in range(15)]


def test_two_ordinary_rows_a_pair() -> None:
    batch = make_batch([Sides([7, 8], [9, 10], [11])], rows="separate", pad_id=3)
    assert batch.input_ids.tolist() == [[7, 8, 9, 10], [7, 8, 11, 3]]
    assert batch.lengths.tolist() == [4, 3]
    assert batch.predictors.tolist() == [1, 2, 5]
    assert batch.sources.tolist() == [0, 1, 2]
    assert batch.targets.tolist() == [9, 10, 11]


def test_a_row_is_filled_up_to_a_multiple() -> None:
    batch = make_batch([Sides(LONG, [1], [2])], rows="packed", multiple=128)
    assert batch.input_ids.shape == (1, 128)
    assert batch.lengths.tolist() == [18]
    assert batch.branches[0, 0, -1].tolist() == [18, 128, 18, 128]


def test_who_sees_whom_by_hand() -> None:
    # prompt, prompt, one response of two tokens, another of two
    assert visible(torch.tensor([[6, 6, 4, 4, 6, 6]]))[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 1, 1],
    ]


# few ids and short prompts that repeat, so that every kind of sharing comes up
TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=5)
PROMPTS = st.one_of(TOKENS, st.sampled_from([LONG, [*LONG, 1], [*LONG, 1, 2, *LONG], LONG[:9]]))
PAIRS = st.lists(st.builds(Sides, PROMPTS, TOKENS, TOKENS), min_size=1, max_size=6)


def told_by(batch: Batch, row: int, place: int) -> list[int]:
    """What a token may see, in order, by the mask alone: the sequence as the model meets it."""
    seen: list[int] = batch.input_ids[row][visible(batch.ends)[row, 0, place]].tolist()
    return seen


@settings(deadline=None)
@given(PAIRS)
def test_every_token_is_predicted_by_exactly_what_comes_before_it(pairs: list[Sides]) -> None:
    for rows in ("packed", "tree", "separate", "alone"):
        batch = make_batch(pairs, rows=rows)
        length = batch.input_ids.shape[1]
        token = 0
        for number, pair in enumerate(pairs):
            for side, ids in enumerate((pair.chosen, pair.rejected)):
                for place, target in enumerate(ids):
                    flat = int(batch.predictors[batch.sources[token]])
                    assert told_by(batch, flat // length, flat % length) == pair.prompt + ids[:place]
                    assert int(batch.position_ids.flatten()[flat]) == len(pair.prompt) + place - 1
                    assert (int(batch.targets[token]), int(batch.sides[token])) == (target, 2 * number + side)
                    token += 1
        assert token == len(batch.targets)
        assert batch.predictors.tolist() == sorted(set(batch.predictors.tolist()))


@settings(deadline=None)
@given(PAIRS, st.sampled_from([1, 8]))
def test_branches_say_what_the_mask_says(pairs: list[Sides], multiple: int) -> None:
    batch = make_batch(pairs, rows="packed", multiple=multiple)
    rule = visible(batch.ends)[0, 0]
    real, length = int(batch.lengths[0]), batch.input_ids.shape[1]
    found = torch.zeros_like(rule)
    table = batch.branches[0, 0].tolist()
    for start, stop, first, end in table:
        for query in range(start, stop):
            found[query, first : min(end, query + 1)] = True
    assert found[:real].equal(rule[:real])
    covered = [query for start, stop, first, _ in table if first == start for query in range(start, stop)]
    assert covered == [*range(length)]  # each query in one branch, in order
