"""Duplicates: which rows say what a row that is kept says already.

Three questions, asked in this order, each of the rows that the one before left: is a row the same as another but for
case, punctuation and white space (`exact_duplicates`); is it nearly the same (`near_duplicates`); and does its question
have enough answers without it (`beyond_cap`)?

All of them read `canonical` rows and return the rows to drop, each with the row that is kept in its place. A row is
known by its rank, which is also its claim to be kept: the lowest rank of equals stays, in whatever order rows come.
"""

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import daft
import numpy as np
from daft import DataFrame, Expression, Window, col, lit
from daft import functions as F
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

BUCKET_BITS = 12
"""Of a key of near duplicates: there can be so many passes over the buckets."""
RANK_BITS = 40
"""Bits of a rank that number the rows of one priority: a million million of them."""

_NUMBER_WORDS = (  # not "one", which is mostly a pronoun
    "two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen|eighteen|"
    "nineteen|twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety|hundred|thousand|million|half|third|quarter|twice|"
    "double|triple"
)
_FIGURES = rf"{_NUMBER_WORDS}|[\p{{L}}--[ai]]"
"""What is a figure among words: those for numbers, and letters that are no words of their own."""
_SYMBOLS = r"\p{Sm}^%/*()-"
# Regular expressions and their replacements, in this order. daft's engine neither looks ahead nor behind.
_CANONICAL = (
    (r"(\d),(\d{3})(?:,(\d{3}))?(?:,(\d{3}))?", "$1$2$3$4"),  # 1,200 is 1200
    (r"(\p{L}\p{L})-(\p{L})", "$1 $2"),  # a hyphen between words is no minus
    (r"(\p{L}\p{L})['’](\p{L})", "$1$2"),  # the letter of a contraction is no variable
    (r"(\d)(\p{L})", "$1 $2"),  # 2x is 2 x
    (r"\.+(\D|$)", " $1"),  # a full stop is no decimal point
    (rf"([{_SYMBOLS}])", " $1 "),
    (rf"[^\p{{L}}\p{{M}}\p{{N}}.{_SYMBOLS}]+", " "),
)


class Rule(NamedTuple):
    """What makes two rows near duplicates, and how surely they are found.

    Rows are sets of shingles, which are runs of words. Two rows meet, and are compared, where they share one of
    `bands` bands of `rows` MinHashes each. With similarity s this happens with probability 1 - (1 - s^rows)^bands.
    For the values below this S-curve is

        s       0.5    0.6    0.7    0.8    0.9
        chance  0.22   0.53   0.87   0.992  0.99999

    Nothing below the threshold passes, because rows that meet are compared by their shingles themselves. A text without
    spaces between words is a few long words, so that a change anywhere makes it another.
    """

    shingle: int = 3
    """Words of a shingle. One changed word costs at most this many shingles on either side."""
    bands: int = 16
    rows: int = 6
    threshold: float = 0.8
    """Least Jaccard similarity of near duplicates."""
    part: float = 0.5
    """Least similarity of the questions alone, and of the answers alone.

    A short question that is another, or a short answer that is, weighs nothing beside much text that is the same.
    """

    def chance(self, similarity: float) -> float:
        """Probability that two rows of this similarity are compared."""
        return 1 - (1 - similarity**self.rows) ** self.bands


def ranked(priority: Expression, row: Expression) -> Expression:
    """A row's rank, from the priority of its source, 0 first, and its number among all rows of this priority."""
    return (priority.cast(daft.DataType.int64()) * 2**RANK_BITS + row).cast(daft.DataType.int64())


def canonical(rows: DataFrame) -> DataFrame:
    """Rank, question and answer of rows, the texts reduced to what counts, and the hashes by which they are compared.

    Those are `asked`, of the question, and `pair`, of question and answer; null where nothing of them is left.
    Everything below reads these rows several times, so they are best written to disk once.
    """
    texts = rows.select("rank", *(canonical_text(col(name)).alias(name) for name in ("question", "answer")))
    asked, length = F.length(col("question")), F.length(col("question")) + F.length(col("answer"))
    return texts.with_columns(
        {
            "asked": F.when(asked > lit(0), F.hash(col("question"))).otherwise(lit(None)),
            "pair": F.when(length > lit(0), F.hash(col("question"), col("answer"))).otherwise(lit(None)),
        }
    )


def canonical_text(text: Expression) -> Expression:
    """Words, numbers, operators and round brackets in lower case, one space apart; no punctuation.

    Marks that are punctuation or mathematics, such as those of a factorial and a derivative, count as punctuation.
    """
    text = F.replace(F.replace(F.lower(F.fill_null(text, lit(""))), "−", "-"), "**", " ")
    for pattern, replacement in _CANONICAL:
        text = F.regexp_replace(text, pattern, replacement)
    return F.rstrip(F.lstrip(text))


def exact_duplicates(rows: DataFrame, passes: int = 1) -> DataFrame:
    """Canonical rows that have the question and the answer of a lower rank.

    Args:
        rows: canonical rows; of their columns, rank and pair are read. Rows of which nothing is left are equal to none.
        passes: in how many passes the keys are matched, of each of which the keys are held in memory.
    """
    return _in_passes(rows.where("pair is not null").select("rank", col("pair").alias("key")), passes, _later_of_equals)


def near_duplicates(
    rows: DataFrame, keys: DataFrame, rule: Rule, passes: int = 1, pairs_at_once: int = 200_000
) -> DataFrame:
    """Canonical rows that a chain of near duplicates joins to a lower rank.

    Args:
        rows: canonical rows, without exact duplicates.
        keys: their `band_keys`, which are read several times, and best written to disk beside the rows.
        rule: what near duplicates are.
        passes: in how many passes the keys are matched, of each of which the keys are held in memory, and of all of
            them the pairs.
        pairs_at_once: pairs whose texts are held in memory.
    """
    pairs = candidates(keys, passes).collect()
    parts = -(-pairs.count_rows() // pairs_at_once)
    found = [verified(pairs.where(f"rank % {parts} = {part}"), rows, rule).to_pydict() for part in range(parts)]
    rank, keeper = (np.array([r for part in found for r in part[name]], np.int64) for name in ("rank", "keeper"))
    return daft.from_pydict(dict(zip(("rank", "keeper"), components(rank, keeper), strict=True)))


def band_keys(rows: DataFrame, rule: Rule) -> DataFrame:
    """The keys of canonical rows, one for each band: near duplicates share at least one, other rows none, mostly.

    What must agree exactly is part of a key. So the many rows of one template with other numbers never meet. The
    highest bits of a key are its bucket: of files that are sorted by bucket, a pass reads its part alone.
    """
    hashes = F.minhash(_text(), num_hashes=rule.bands * rule.rows, ngram_size=rule.shingle)
    bands = rows.where("pair is not null").select("rank", F.chunk(hashes, rule.rows).alias("band"), *_exact())
    keyed = bands.explode("band").select("rank", F.hash(col("band"), col("figures"), col("numbers")).alias("key"))
    bucket = F.shift_right(col("key"), lit(np.uint64(64 - BUCKET_BITS)))
    return keyed.with_column("bucket", bucket.cast(daft.DataType.int32()))


def _text() -> Expression:
    """Question and answer of a canonical row."""
    return F.rstrip(F.concat(F.concat(col("question"), lit(" ")), col("answer")))


def _exact() -> tuple[Expression, Expression]:
    """What near duplicates have in common exactly.

    These are the numbers, operators and variables of the question in their order, and the numbers of the answer in any
    order, as solutions that are otherwise the same may state a result once more.
    """
    figures = F.regexp_replace(col("question"), rf"\b({_FIGURES})\b|[\p{{L}}\p{{M}}()]+", "$1")
    numbers = F.regexp_replace(col("answer"), r"[^\d.]+", " ")
    numbers = F.list_sort(F.list_distinct(F.split(F.rstrip(F.lstrip(numbers)), " ")))
    return F.regexp_replace(figures, " +", " ").alias("figures"), F.list_join(numbers, " ").alias("numbers")


def candidates(keys: DataFrame, passes: int = 1) -> DataFrame:
    """Pairs of rows that share a key: each row with the lowest rank that has the key.

    Their number grows with that of the rows only, however many rows share a key.
    """
    bounds = [part * 2**BUCKET_BITS // passes for part in range(passes + 1)]
    parts = (keys.where(f"bucket >= {first} and bucket < {end}") for first, end in itertools.pairwise(bounds))
    found = [_later_of_equals(part.select("rank", "key")).distinct().collect() for part in parts]
    return functools.reduce(DataFrame.concat, found).distinct()


def _in_passes(keys: DataFrame, passes: int, find: Callable[[DataFrame], DataFrame]) -> DataFrame:
    """What is found among the keys, looked for in a part of the keys after the other."""
    found = [find(keys.where(f"key % {passes} = {part}")).collect() for part in range(passes)]
    return functools.reduce(DataFrame.concat, found)


def _later_of_equals(keys: DataFrame) -> DataFrame:
    """Every rank that shares a key with a lower one, beside the lowest that does."""
    first = keys.groupby("key").agg(F.min(col("rank")).alias("keeper"), F.count(col("rank")).alias("copies"))
    shared = first.where("copies > 1").select("key", "keeper")
    return keys.join(shared, on="key").where("rank != keeper").select("rank", "keeper")


def verified(pairs: DataFrame, rows: DataFrame, rule: Rule) -> DataFrame:
    """The pairs whose canonical rows are as similar as the rule asks. No texts but theirs are held in memory."""
    met = pairs.select("rank").concat(pairs.select(col("keeper").alias("rank"))).distinct()
    rows = rows.join(met, on="rank", how="semi").collect()
    kept = {"keeper": "rank", "kept_question": "question", "kept_answer": "answer"}
    keepers = rows.select(*(col(name).alias(alias) for alias, name in kept.items()))
    compared = pairs.join(rows, on="rank").join(keepers, on="keeper")
    passing = _similar(col("question"), col("answer"), col("kept_question"), col("kept_answer"), rule)
    return compared.where(passing).select("rank", "keeper")


def similar(question: str, answer: str, kept_question: str, kept_answer: str, rule: Rule) -> bool:
    """Whether two canonical rows are as similar as the rule asks."""
    return (
        jaccard(question, kept_question, rule.shingle) >= rule.part
        and jaccard(answer, kept_answer, rule.shingle) >= rule.part
        and jaccard(f"{question} {answer}", f"{kept_question} {kept_answer}", rule.shingle) >= rule.threshold
    )


_similar: Callable[..., Expression] = daft.func(similar)


def jaccard(left: str, right: str, size: int) -> float:
    """Share of the shingles of two canonical texts that are in both."""
    if left == right:
        return 1.0
    a, b = shingles(left, size), shingles(right, size)
    return len(a & b) / len(a | b)


def shingles(text: str, size: int) -> set[tuple[str, ...]]:
    """All runs of `size` words; of a shorter text the only run there is."""
    words = text.split()
    return set(zip(*(words[start:] for start in range(size)), strict=False)) or {tuple(words)}


def components(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ranks that pairs join to a lower one, and the lowest that each of them is joined to by any chain of pairs."""
    ranks, places = np.unique(np.concatenate([left, right]), return_inverse=True)
    joined = coo_array((np.ones(len(left), bool), np.split(places, 2)), shape=(len(ranks), len(ranks)))
    _, component = connected_components(joined, directed=False)
    _, first = np.unique(component, return_index=True)  # ranks ascend, so the first place is the lowest rank
    keepers = ranks[first[component]]
    dropped = ranks != keepers
    return ranks[dropped], keepers[dropped]


def beyond_cap(rows: DataFrame, cap: int, passes: int = 1) -> DataFrame:
    """Canonical rows whose question has `cap` answers of lower rank.

    Args:
        rows: canonical rows; of their columns, rank and asked are read. Rows without a question, such as plain text,
            have no cap.
        cap: answers of a question that are kept.
        passes: as for `exact_duplicates`.
    """

    def later(keys: DataFrame) -> DataFrame:
        many = keys.groupby("key").agg(F.count(col("rank")).alias("answers")).where(f"answers > {cap}").select("key")
        same = Window().partition_by("key")  # which takes some kilobytes for each key, and most have few answers
        placed = keys.join(many, on="key", how="semi").with_columns(
            {
                "place": F.row_number().over(same.order_by("rank")),
                "keeper": F.min(col("rank")).over(same),
            }
        )
        return placed.where(f"place > {cap}").select("rank", "keeper")

    return _in_passes(rows.where("asked is not null").select("rank", col("asked").alias("key")), passes, later)


def without(rows: DataFrame, dropped: DataFrame) -> DataFrame:
    """The rows, of whatever columns, that are not among the dropped ones."""
    return rows.join(dropped.select("rank"), on="rank", how="anti")
