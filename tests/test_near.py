"""Near-duplicate texts are those of brute force: no edge is wrong, few are missed, and parts on disk change nothing."""

import os
import random
import signal
import subprocess
import sys
import tracemalloc
from collections import defaultdict
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from time import monotonic, process_time, sleep
from typing import Any

import numpy as np
import oracle
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefkit.errors import MachineError
from prefkit.minhash import Nearness, choose_bands
from prefkit.near import Near, kept_of, near_in_parts, near_texts
from prefkit.workers import done_by, processes_of

PROPERTY = settings(deadline=None, max_examples=40, derandomize=True, database=None)
SURE = {"num_perm": 512, "weights": (0.001, 0.999)}  # at .8 a pair of similarity .82 is missed once in 2,000
WORDS = [f"w{i}" for i in range(2000)]
Edge = tuple[int, int, Fraction]


def series(texts: Sequence[str]) -> pl.Series:
    return pl.Series("text", list(texts), pl.String)


def brute(texts: Sequence[str], limit: float, ngram: int = 5) -> dict[tuple[int, int], Fraction]:
    """Every two texts that are alike, by their sets: only texts that share an n-gram are compared."""
    where: dict[oracle.Gram, list[int]] = defaultdict(list)
    for place, text in enumerate(texts):
        for gram in oracle.grams(text, ngram):
            where[gram].append(place)
    common: dict[tuple[int, int], int] = defaultdict(int)
    for places in where.values():
        for at, right in enumerate(places):
            for left in places[:at]:
                common[left, right] += 1
    sizes = [len(oracle.grams(text, ngram)) for text in texts]
    shares = {
        (left, right): Fraction(both, sizes[left] + sizes[right] - both) for (left, right), both in common.items()
    }
    return {pair: share for pair, share in shares.items() if float(share) >= limit}


def edges(near: Near) -> dict[tuple[int, int], float]:
    assert [str(column.dtype) for column in near] == ["int64", "int64", "float64"]
    assert len(near.left) == len(near.right) == len(near.jaccard)
    pairs = list(zip(near.left.tolist(), near.right.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs)
    assert all(left < right for left, right in pairs)
    return dict(zip(pairs, near.jaccard.tolist(), strict=True))


def check_edges(near: Near, texts: Sequence[str], nearness: Nearness) -> None:
    """No edge is wrong: both texts are that much alike, to the last bit of the fraction."""
    for (left, right), value in edges(near).items():
        wanted = oracle.jaccard(texts[left], texts[right], nearness.ngram)
        assert value == len_ratio(wanted), (left, right)
        assert value >= nearness.threshold


def len_ratio(share: Fraction) -> float:
    return share.numerator / share.denominator


def parts_of(number: int, pairs: Any) -> list[int]:
    return oracle.components(number, pairs)


def edited(text: str, similarity: float, random_: random.Random) -> str:
    """A copy that a few replaced words bring near a similarity, each far from the next: five 5-grams a word."""
    words = text.split()
    grams = len(words) - 4
    lost = round(grams * (1 - similarity) / (1 + similarity) / 5)
    for place in random_.sample(range(5, len(words) - 5, 10), lost):
        words[place] = f"x{random_.randrange(10**9)}"
    return " ".join(words)


def documents(number: int, low: float, high: float, seed: int, length: int = 160) -> list[str]:
    """Texts two by two: one, and its copy of a similarity between low and high."""
    random_ = random.Random(seed)
    texts = []
    for _ in range(number // 2):
        text = " ".join(random_.choices(WORDS, k=length))
        texts += [text, edited(text, random_.uniform(low, high), random_)]
    random_.shuffle(texts)
    return texts


# against brute force


@pytest.mark.parametrize("nearness", [Nearness(), Nearness(0.5), Nearness(0.95), Nearness(0.7, ngram=2, num_perm=64)])
def test_edges_are_right_and_what_is_well_above_the_threshold_is_all_found(nearness: Nearness) -> None:
    texts = [*documents(300, 0.4, 1.0, seed=1), "w1 w2 w3", "W1  w2 w3", "w1 w2", "", "   ", "w1"]
    near = near_texts(series(texts), nearness)
    check_edges(near, texts, nearness)
    found = edges(near)
    wanted = brute(texts, min(nearness.threshold + 0.15, 1.0), nearness.ngram)
    assert len(wanted) >= 10
    group = parts_of(len(texts), found)
    lost = [(left, right) for left, right in wanted if group[left] != group[right]]
    assert [pair for pair in lost if texts[pair[0]].strip() and texts[pair[1]].strip()] == []


def test_of_documents_just_above_the_threshold_as_many_are_found_as_the_bands_promise() -> None:
    texts = documents(2400, 0.8, 0.87, seed=2)
    wanted = brute(texts, 0.8)
    assert len(wanted) > 1000
    near = near_texts(series(texts), Nearness())
    check_edges(near, texts, Nearness())
    bands, rows = choose_bands(0.8, 128, (0.05, 0.95))
    chances = [1 - (1 - float(share) ** rows) ** bands for share in wanted.values()]
    spread = sum(chance * (1 - chance) for chance in chances) ** 0.5
    found = edges(near)
    assert set(found) <= set(wanted)
    assert len(found) > sum(chances) - 4 * spread


def test_of_the_rows_that_brute_force_removes_nearly_all_are_removed() -> None:
    texts = documents(3400, 0.8, 0.95, seed=3)
    wanted = brute(texts, 0.8)
    near = near_texts(series(texts), Nearness())
    kept = kept_of(len(texts), near)
    removed = int((kept != np.arange(len(texts))).sum())
    by_force = parts_of(len(texts), wanted)
    to_remove = sum(first != place for place, first in enumerate(by_force))
    assert to_remove > 1500
    assert 0.985 * to_remove <= removed <= to_remove


PIECES = [
    "a b c d e f",
    "g h i j",
    "k l m n o p q",
    "雪が降る夜",
    "caf\u00e9 x y",
    "z",
    "!",
    "A B C D E F",
    "w w w w w",
]
SOME_TEXTS = st.lists(st.lists(st.sampled_from(PIECES), max_size=5).map(" ".join), max_size=12)


@PROPERTY
@given(SOME_TEXTS, st.sampled_from([0.3, 0.5, 0.8, 1.0]), st.integers(1, 6))
def test_the_clusters_of_any_texts_are_those_of_brute_force(texts: list[str], threshold: float, ngram: int) -> None:
    nearness = Nearness(threshold, ngram, 512, (0.001, 0.999))
    near = near_texts(series(texts), nearness)
    spoken = [place for place, text in enumerate(texts) if oracle.words_of(text)]
    check_edges(near, texts, nearness)
    close = [
        (left, right)
        for right in spoken
        for left in spoken
        if left < right and len_ratio(oracle.jaccard(texts[left], texts[right], ngram)) >= threshold
    ]
    fog = any(threshold <= oracle.jaccard(texts[left], texts[right], ngram) < threshold + 0.02 for left, right in close)
    if not fog or threshold == 1.0:
        wanted, found = parts_of(len(texts), close), kept_of(len(texts), near).tolist()
        assert [found[place] for place in spoken] == [wanted[place] for place in spoken]


def test_no_texts_one_text_and_texts_that_have_nothing_in_common_have_no_edge() -> None:
    for texts in ([], ["a b c d e f"], ["a b c d e f", "g h i j k l"], ["a", "b"], ["a", "a b", "a a"]):
        assert edges(near_texts(series(texts))) == {}
    assert edges(near_in_parts([], "text", scratch=Path("nowhere"))) == {}


def test_a_text_without_words_is_like_no_other_text_with_words() -> None:
    found = edges(near_texts(series(["", "  ", "a b c d e", "a", "!"])))
    assert all(pair == (0, 1) for pair in found)


def test_short_texts_are_alike_only_where_all_their_words_are_the_same() -> None:
    texts = ["yes it is", "Yes, it is", "yes  IT is", "it is yes", "yes it is so", "yes"]
    assert edges(near_texts(series(texts))) == {(0, 2): 1.0}


def test_a_threshold_that_a_similarity_is_equal_to_is_reached() -> None:
    """Four of five 5-grams: nine words, and the same with a tenth and with another tenth."""
    nine = "a b c d e f g h"  # 4 grams
    one = f"{nine} i"  # 5 grams: 4 / 5
    found = edges(near_texts(series([nine, one]), Nearness(0.8, 5, 512, (0.001, 0.999))))
    assert found == {(0, 1): 0.8}
    assert edges(near_texts(series([nine, one]), Nearness(0.81, 5, 512, (0.001, 0.999)))) == {}


def test_at_a_threshold_of_one_only_equal_sets_are_alike() -> None:
    texts = ["a b c d e f", "A b  c d e f", "a b c d e f g", "a b c d e f a b c d e f", "x", "X"]
    found = edges(near_texts(series(texts), Nearness(1.0)))
    assert found == {(0, 1): 1.0, (4, 5): 1.0}


def test_texts_in_scripts_without_spaces_are_compared_by_characters() -> None:
    text = "昨日は雪が降って寒かったので家で静かに本を読みながら猫と過ごしていました。"
    texts = [text, text.replace("家", "部"), text[::-1]]
    found = edges(near_texts(series(texts), Nearness(0.6, 5, 512, (0.001, 0.999))))
    assert found == {(0, 1): pytest.approx(float(oracle.jaccard(texts[0], texts[1], 5)))}


def test_a_null_is_like_nothing() -> None:
    found = edges(near_texts(pl.Series("text", ["a b c d e f", None, "a b c d e f", None], pl.String)))
    assert found.get((0, 2)) == 1.0
    assert all(pair in ((0, 2), (1, 3)) for pair in found)


def test_settings_decide() -> None:
    texts = documents(60, 0.55, 0.65, seed=4)
    assert edges(near_texts(series(texts), Nearness(0.8, **SURE))) == {}  # type: ignore[arg-type]
    low = edges(near_texts(series(texts), Nearness(0.5, **SURE)))  # type: ignore[arg-type]
    assert len(low) == 30
    fewer = near_texts(series(texts), Nearness(0.5, ngram=1, num_perm=512, weights=(0.001, 0.999)))
    assert all(value > low[pair] for pair, value in edges(fewer).items() if pair in low)


# order and clusters


def by_text(near: Near, texts: Sequence[str]) -> set[tuple[str, str, float]]:
    return {
        (min(texts[left], texts[right]), max(texts[left], texts[right]), value)
        for (left, right), value in edges(near).items()
    }


def test_the_order_of_texts_changes_no_edge() -> None:
    texts = documents(400, 0.75, 1.0, seed=6)
    texts += [texts[0], texts[0].upper(), *texts[5:9]]
    found = by_text(near_texts(series(texts)), texts)
    assert len(found) > 100
    for seed in range(3):
        other = random.Random(seed).sample(texts, len(texts))
        assert by_text(near_texts(series(other)), other) == found


def test_a_chain_is_one_cluster_and_its_ends_are_no_edge() -> None:
    words = [f"w{i}" for i in range(100)]
    chain = [" ".join(words[at : at + 60]) for at in range(0, 40, 5)]  # 51 of 61 grams in common
    found = near_texts(series(chain), Nearness(0.8, **SURE))  # type: ignore[arg-type]
    assert kept_of(len(chain), found).tolist() == [0] * 8
    assert (0, 7) not in edges(found)


def test_the_lowest_row_of_a_cluster_is_the_one_that_is_kept() -> None:
    near = Near(np.array([3, 1, 0, 6]), np.array([4, 4, 5, 7]), np.array([0.9, 0.8, 1.0, 1.0]))
    found = kept_of(9, near)
    assert found.dtype == np.int64
    assert found.tolist() == [0, 1, 2, 1, 1, 0, 6, 6, 8]
    none = Near(*(np.array([], dtype=dtype) for dtype in (np.int64, np.int64, np.float64)))
    assert kept_of(3, none).tolist() == [0, 1, 2]
    assert kept_of(0, none).tolist() == []


@PROPERTY
@given(st.lists(st.tuples(st.integers(0, 14), st.integers(0, 14)).filter(lambda pair: pair[0] < pair[1]), max_size=20))
def test_kept_rows_are_those_of_a_plain_search(pairs: list[tuple[int, int]]) -> None:
    left, right = (np.array([pair[side] for pair in pairs], dtype=np.int64) for side in (0, 1))
    assert kept_of(15, Near(left, right, np.ones(len(pairs)))).tolist() == parts_of(15, pairs)


# many in one bucket


def measured(texts: list[str]) -> tuple[Near, float, int]:
    tracemalloc.start()
    start = process_time()
    near = near_texts(series(texts))
    spent, peak = process_time() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return near, spent, peak


@pytest.mark.parametrize("kind", ["identical", "templated", "short"])
def test_ten_thousand_texts_of_one_bucket_end_soon_and_in_little_memory(kind: str) -> None:
    """All pairs would be 50 million edges, 1.2 GB."""
    body = " ".join(WORDS[:40])
    make: dict[str, Callable[[int], str]] = {
        "identical": lambda _: body,
        "templated": lambda number: f"{body} yours {number}",
        "short": lambda _: "I agree",
    }
    texts = [make[kind](number) for number in range(10_000)]
    near, spent, peak = measured(texts)
    assert kept_of(len(texts), near).tolist() == [0] * len(texts)
    assert len(near.left) < 40 * len(texts)
    assert spent < 10
    assert peak < 300e6


def test_templates_that_are_less_alike_than_the_threshold_do_not_grow_quadratically_either() -> None:
    """They share many buckets, and no two of them are near."""
    body = " ".join(WORDS[:44])
    texts = [f"{body} {' '.join(f'x{number}y{i}' for i in range(8))}" for number in range(4000)]
    assert 0.6 < oracle.jaccard(texts[0], texts[1], 5) < 0.8
    near, spent, peak = measured(texts)
    assert edges(near) == {}
    assert spent < 20
    assert peak < 500e6


def test_twins_are_found_in_a_crowd_of_texts_that_share_most_of_their_words() -> None:
    """Every text shares bands with all others, from which it is .64 or .7, and is near one of them only."""
    for body, own in ((40, 10), (60, 12)):
        texts = []
        for number in range(1500):
            words = [*WORDS[:body], *(f"x{number}y{i}" for i in range(own))]
            texts += [" ".join(words), " ".join([*words[:-1], f"z{number}"])]
        order = random.Random(body).sample(range(len(texts)), len(texts))
        near = near_texts(series([texts[place] for place in order]))
        assert all(order[left] // 2 == order[right] // 2 for left, right in edges(near))
        assert len(near.left) >= 0.985 * 1500


# parts on disk


@pytest.fixture
def write_parts(tmp_path: Path) -> Callable[..., list[Path]]:
    def write(texts: Sequence[str | None], sizes: Sequence[int], column: str = "text") -> list[Path]:
        folder = tmp_path / f"parts{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        assert sum(sizes) == len(texts)
        files, at = [], 0
        for number, size in enumerate(sizes):
            files.append(folder / f"part-{number:05}.parquet")
            rows = {"other": ["z"] * size, column: texts[at : at + size]}
            frame = pl.DataFrame(rows, schema=dict.fromkeys(rows, pl.String))
            frame.write_parquet(files[-1], row_group_size=max(size // 3, 1))
            at += size
        return files

    return write


def same(one: Near, other: Near) -> bool:
    return edges(one) == edges(other)


WriteParts = Callable[..., list[Path]]


@pytest.mark.parametrize(
    "sizes",
    [[306], [1, 305], [100, 3, 0, 203], [0, 306, 0], [0, 0, 0, 306], [*[1] * 6, 300], [51] * 6, [305, 1]],
    ids=lambda sizes: f"{len(sizes)}-{sizes[0]}",
)
def test_parts_of_any_size_have_the_edges_of_the_whole(
    sizes: list[int], write_parts: WriteParts, tmp_path: Path
) -> None:
    texts = [*documents(300, 0.7, 1.0, seed=8), "a", "b", "A", "", "雪が降る夜に猫は眠る", "雪が降る夜に猫は眠る"]
    whole = near_texts(series(texts))
    assert len(whole.left) > 50
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    assert same(near_in_parts(write_parts(texts, sizes), "text", scratch=scratch), whole)


@pytest.mark.parametrize("nearness", [Nearness(0.6), Nearness(0.95, ngram=3), Nearness(0.8, num_perm=64)])
def test_parts_have_the_edges_of_the_whole_under_any_settings(
    nearness: Nearness, write_parts: WriteParts, tmp_path: Path
) -> None:
    texts = documents(240, 0.5, 1.0, seed=9, length=160)
    files = write_parts(texts, [100, 140], column="content")
    whole = near_texts(series(texts), nearness)
    assert len(whole.left) > 10
    assert same(near_in_parts(files, "content", nearness, scratch=tmp_path), whole)


def test_two_processes_find_what_one_finds(write_parts: WriteParts, tmp_path: Path) -> None:
    texts = documents(600, 0.7, 1.0, seed=10)
    files = write_parts(texts, [1, 0, 350, 240, 9])
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    found = near_in_parts(files, "text", processes=2, scratch=scratch)
    assert same(found, near_texts(series(texts)))


def test_parts_of_nothing_have_no_edge(write_parts: WriteParts, tmp_path: Path) -> None:
    assert edges(near_in_parts(write_parts([], [0]), "text", scratch=tmp_path)) == {}
    assert edges(near_in_parts(write_parts([], [0, 0]), "text", processes=2, scratch=tmp_path)) == {}
    assert edges(near_in_parts(write_parts(["a b c d e f"], [1]), "text", scratch=tmp_path)) == {}


def test_a_null_in_a_part_shifts_no_row(write_parts: WriteParts, tmp_path: Path) -> None:
    texts = ["a b c d e f", None, None, "a b c d e f", "g h i j k l", None]
    found = edges(near_in_parts(write_parts(texts, [2, 4]), "text", scratch=tmp_path))
    assert found[(0, 3)] == 1.0
    assert all(texts[left] is None and texts[right] is None for left, right in found if (left, right) != (0, 3))


def test_large_buckets_in_parts_end_soon(write_parts: WriteParts, tmp_path: Path) -> None:
    body = " ".join(WORDS[:30])
    texts = [body] * 5000 + [f"{body} {number}" for number in range(5000)]
    start = process_time()
    found = near_in_parts(write_parts(texts, [3000, 7000]), "text", scratch=tmp_path)
    assert process_time() - start < 10
    assert kept_of(len(texts), found).tolist() == [0] * len(texts)
    assert len(found.left) < 40 * len(texts)


def test_what_was_in_scratch_before_does_not_matter(write_parts: WriteParts, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    first, second = documents(60, 0.8, 1.0, seed=11), documents(80, 0.8, 1.0, seed=12)
    for texts in (first, second, first):
        whole = near_texts(series(texts))
        assert same(near_in_parts(write_parts(texts, [len(texts)]), "text", scratch=scratch), whole)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_removal_recall_holds_for_other_samples(seed: int, write_parts: WriteParts, tmp_path: Path) -> None:
    texts = documents(6000, 0.8, 0.97, seed=100 + seed, length=150)
    wanted = parts_of(len(texts), brute(texts, 0.8))
    to_remove = sum(first != place for place, first in enumerate(wanted))
    near = near_in_parts(write_parts(texts, [2500, 3500]), "text", processes=2, scratch=tmp_path)
    check_edges(near, texts, Nearness())
    removed = int((kept_of(len(texts), near) != np.arange(len(texts))).sum())
    assert 0.985 * to_remove <= removed <= to_remove


# processes


def test_a_process_that_is_ended_from_outside_is_an_error_that_says_what_to_do() -> None:
    with processes_of(2) as pool, pytest.raises(MachineError) as raised:
        [*done_by(pool, [(os._exit, 3)])]
    assert raised.value.as_dict() == {
        "kind": "MachineError",
        "message": "a process that compares texts was ended from outside, most likely as memory ran out",
        "where": "build.processes",
        "hint": "--set build.processes=1, or make room and type the same command",
    }


def test_a_script_without_a_guard_is_not_run_again_by_its_processes(tmp_path: Path) -> None:
    path, script = tmp_path / "texts.parquet", tmp_path / "script.py"
    pl.DataFrame({"text": ["one two three four five six", "seven"] * 4}).write_parquet(path, row_group_size=2)
    script.write_text(
        "from pathlib import Path\n"
        "from prefkit.near import near_in_parts\n"
        "print('ran')\n"
        f"print(len(near_in_parts([Path({str(path)!r})], 'text', processes=2).left))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.split() == ["ran", "12"]  # twice 4 equal texts, 6 pairs each


def test_processes_end_with_the_one_that_was_killed(tmp_path: Path) -> None:
    path, script = tmp_path / "texts.parquet", tmp_path / "script.py"
    pl.DataFrame({"text": ["one two three four five six", "seven"] * 4}).write_parquet(path, row_group_size=2)
    script.write_text(
        "import os, signal\n"
        "from pathlib import Path\n"
        "from prefkit.minhash import Nearness\n"
        "from prefkit.near import Meeting, text_files\n"
        "from prefkit.workers import processes_of\n"
        f"files = text_files([Path({str(path)!r})], ('text',))\n"
        f"with processes_of(2) as pool, Meeting(files, Nearness(), pool=pool, scratch=Path({str(tmp_path)!r})):\n"
        "    print(*pool._processes, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, script], stdout=subprocess.PIPE, text=True, check=False, cwd=tmp_path)
    assert done.returncode == -signal.SIGKILL
    workers = [int(number) for number in done.stdout.split()]
    assert len(workers) == 2
    waited = monotonic() + 20
    while any(Path(f"/proc/{number}").exists() for number in workers) and monotonic() < waited:
        sleep(0.05)
    assert not any(Path(f"/proc/{number}").exists() for number in workers)


def test_giant_texts_are_compared_in_bounded_memory() -> None:
    texts = series([" ".join(f"v{place + step}" for step in range(20_000)) for place in range(40)])
    tracemalloc.start()
    found = near_texts(texts)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found.left) == 40 * 39 // 2
    assert peak < 150_000_000
