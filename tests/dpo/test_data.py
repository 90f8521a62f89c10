"""Reading, splitting and pairing rated completions: what is kept, what is counted, what is refused."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mogeo.dpo.data import COUNTS, PAIRINGS, Pair, build_preferences, read_rows, split_rows
from mogeo.errors import InputError
from tests.profiles import examples


def row(prompt, *completions):
    """completions: (response, {objective: rating})."""
    return {
        "instruction": prompt,
        "source": "ignored",
        "completions": [
            {"response": response, "annotations": {name: {"Rating": rating} for name, rating in ratings.items()}}
            for response, ratings in completions
        ],
    }


ROWS = [
    row(
        "p1",
        ("a", {"help": "1", "truth": "5"}),
        ("b", {"help": "4.5", "truth": "2"}),
        ("c", {"help": "3", "truth": "N/A"}),
    ),
    row("p2", ("a", {"help": "2", "truth": "2"}), ("b", {"help": "2", "truth": "1"})),
    row(
        "p3",
        ("", {"help": "5", "truth": "5"}),
        ("b", {"help": "1", "truth": "4"}),
        (" \n", {"help": "3", "truth": "1"}),
    ),
    row("p4", ("same", {"help": "5", "truth": "3"}), ("same", {"help": "1", "truth": "3"})),
]


def test_best_against_worst_and_everything_left_out_is_counted():
    preferences = build_preferences(ROWS)
    assert preferences.objectives == ("help", "truth")
    assert preferences.pairs == {"help": [Pair("p1", "b", "a")], "truth": [Pair("p1", "a", "b"), Pair("p2", "a", "b")]}
    assert preferences.counts == {
        "help": {"pairs": 1, "ties": 1, "single": 1, "identical": 1, "unrated": 0, "empty": 2},
        "truth": {"pairs": 2, "ties": 1, "single": 1, "identical": 0, "unrated": 1, "empty": 2},
    }
    assert set(preferences.counts["help"]) == set(COUNTS)


def test_all_makes_each_strict_pair_and_random_makes_one_of_them():
    every = build_preferences(ROWS, ["help"], pairing="all")
    assert set(every.pairs["help"]) == {Pair("p1", "b", "a"), Pair("p1", "b", "c"), Pair("p1", "c", "a")}
    assert every.counts["help"]["ties"] == 1
    drawn = {build_preferences(ROWS, ["help"], pairing="random", seed=seed).pairs["help"][0] for seed in range(30)}
    assert drawn == set(every.pairs["help"])


def test_objectives_are_those_found_and_their_order_can_be_given():
    assert build_preferences(ROWS, ["truth", "help"]).objectives == ("truth", "help")
    assert build_preferences([*ROWS, row("p5", ("a", {"new": 1}), ("b", {"new": 2}))]).objectives[-1] == "new"


@pytest.mark.parametrize("rating", ["N/A", "", "nan", "inf", None, "good"])
def test_a_rating_that_is_no_number_leaves_the_completion_out(rating):
    rows = [row("p", ("a", {"x": "1"}), ("b", {"x": "2"}), ("c", {"x": rating}))]
    preferences = build_preferences(rows)
    assert preferences.pairs["x"] == [Pair("p", "b", "a")]
    assert preferences.counts["x"]["unrated"] == 1


def test_an_annotation_or_response_that_is_null_counts_as_unrated_or_empty():
    rows = [row("p", ("a", {"x": "1"}), ("b", {"x": "2"}), (None, {"x": "3"}), ("d", {"x": "4"}))]
    rows[0]["completions"][3]["annotations"]["x"] = None
    counts = build_preferences(rows).counts["x"]
    assert (counts["pairs"], counts["empty"], counts["unrated"]) == (1, 1, 1)


rated_rows = st.lists(
    st.lists(
        st.tuples(
            st.sampled_from("abcdef "), st.sampled_from(["1", "2", "2.0", "3", "N/A"]), st.sampled_from(["1", "5"])
        ),
        max_size=5,
    ),
    max_size=6,
)


@given(rated_rows, st.sampled_from(PAIRINGS), st.integers(0, 5))
@examples(100)
def test_every_pair_is_strict_and_of_one_prompt_and_nothing_is_lost_uncounted(table, pairing, seed):
    rows = [row("sure", ("good", {"x": "9", "y": "9"}), ("bad", {"x": "1", "y": "1"}))]
    rows += [row(f"p{i}", *((text, {"x": x, "y": y}) for text, x, y in line)) for i, line in enumerate(table)]
    preferences = build_preferences(rows, pairing=pairing, seed=seed)
    by_prompt = {r["instruction"]: r["completions"] for r in rows}
    for name, pairs in preferences.pairs.items():
        for pair in pairs:
            ratings = {}
            for c in by_prompt[pair.prompt]:
                if c["annotations"][name]["Rating"] != "N/A":
                    ratings.setdefault(c["response"], []).append(float(c["annotations"][name]["Rating"]))
            assert max(ratings[pair.chosen]) > min(ratings[pair.rejected])
            assert pair.chosen.strip()
            assert pair.rejected.strip()
            assert pair.chosen != pair.rejected
        counts = preferences.counts[name]
        assert counts["pairs"] == len(pairs)
        if pairing != "all":
            assert counts["pairs"] + counts["ties"] + counts["single"] + counts["identical"] == len(rows)


def test_draws_depend_on_the_prompt_and_not_on_the_other_rows():
    rows = [row(f"p{i}", *((t, {"x": r}) for t, r in zip("abcd", "1144", strict=True))) for i in range(20)]
    whole = build_preferences(rows, seed=3).pairs["x"]
    assert build_preferences(rows[::-1], seed=3).pairs["x"] == whole[::-1]
    assert build_preferences(rows[5:], seed=3).pairs["x"] == whole[5:]
    assert len(set(whole)) == 20
    assert len({(p.chosen, p.rejected) for p in whole}) > 1


BAD = [
    ({"completions": []}, "row 2: column 'instruction' is missing"),
    ({"instruction": "p"}, "row 2: column 'completions' is missing"),
    ({"instruction": 3, "completions": []}, "row 2: column 'instruction' has to be a str, found int"),
    ({"instruction": "p", "completions": ["a"]}, "row 2, completion 1: an object is needed, found str"),
    ({"instruction": "p", "completions": [{"annotations": {}}]}, "row 2, completion 1: column 'response' is missing"),
    ({"instruction": "p", "completions": [{"response": "a"}]}, "row 2, completion 1: column 'annotations' is missing"),
    (
        {"instruction": "p", "completions": [{"response": "a", "annotations": {"help": 4}}]},
        "row 2, completion 1, objective 'help': an annotation of the form",
    ),
]


@pytest.mark.parametrize(("bad", "message"), BAD)
def test_a_malformed_row_is_named_with_its_column(bad, message):
    with pytest.raises(InputError, match=message):
        build_preferences([ROWS[0], bad])


def test_an_objective_without_a_usable_pair_lists_what_was_left_out():
    with pytest.raises(InputError, match=r"objective 'truth' has no usable pair in 1 rows \(.*do not differ: 1;"):
        build_preferences([row("p", ("a", {"truth": "1"}), ("b", {"truth": "1"}))])


def test_unknown_names_are_answered_with_the_known_ones():
    with pytest.raises(InputError, match="no completion is rated for honesty; the data rates help, truth"):
        build_preferences(ROWS, ["help", "honesty"])
    with pytest.raises(InputError, match="named twice: help, help"):
        build_preferences(ROWS, ["help", "help"])
    with pytest.raises(InputError, match="unknown pairing 'best': use one of best-worst, all, random"):
        build_preferences(ROWS, pairing="best")
    with pytest.raises(InputError, match="rates no objective"):
        build_preferences([row("p", ("a", {}))])


# ---- splitting -------------------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from(["a", "b ", " b", "c", "d  e", "d e"]), min_size=6, max_size=30), st.integers(0, 9))
@examples(60)
def test_a_prompt_is_never_on_both_sides(prompts, seed):
    rows = [row("left"), row("right"), *(row(p) for p in prompts)]
    train, held_out = split_rows(rows, 0.4, seed)
    sides = [{" ".join(r["instruction"].split()) for r in side} for side in (train, held_out)]
    assert not sides[0] & sides[1]
    assert sorted(map(id, train + held_out)) == sorted(map(id, rows))
    assert (train, held_out) == split_rows(rows, 0.4, seed)


def test_held_out_is_a_share_of_the_prompts_or_their_number():
    rows = [row(f"p{i % 20}") for i in range(60)]
    for wanted in (0.25, 5):
        train, held_out = split_rows(rows, wanted, seed=0)
        assert (len(train), len(held_out)) == (45, 15)
    assert split_rows(rows, 5, 0) != split_rows(rows, 5, 1)
    for wanted in (0.0, 0, 1.0, 20, -1):
        with pytest.raises(InputError, match="both sides need at least one"):
            split_rows(rows, wanted, seed=0)


# ---- reading ---------------------------------------------------------------------------------------------------------


def test_jsonl_json_and_parquet_hold_the_same_rows(tmp_path):
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ROWS) + "\n", encoding="utf-8")
    (tmp_path / "d.json").write_text(json.dumps(ROWS), encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "d.parquet")
    expected = build_preferences(ROWS)
    for suffix in ("jsonl", "json", "parquet"):
        assert build_preferences(read_rows(tmp_path / f"d.{suffix}")) == expected


def test_a_hub_data_set_is_read_through_datasets(monkeypatch):
    import datasets

    calls = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: calls.append((name, split)) or ROWS)
    assert read_rows("someone/rated") == ROWS
    assert calls == [("someone/rated", "train")]

    def offline(name, split):
        raise ConnectionError("no route\nmore")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(InputError, match=r"'someone/rated' is neither a local file.*ConnectionError: no route\)"):
        read_rows("someone/rated")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", b'{"a": 1}\n{"a": \n', "line 2: not JSON"),
        ("d.jsonl", b'{"a": "\xff"}\n', "line 1: not JSON"),
        ("d.jsonl", b"[1]\n", "line 1: a JSON object is needed, found list"),
        ("d.jsonl", b"\n", "holds no rows"),
        ("d.json", b'{"a": 1}', "a JSON array of objects is needed"),
        ("d.json", b'{"a": 1}\n{"a": 2}', "name the file .jsonl"),
        ("d.parquet", b"PAR0", "not a Parquet file"),
        ("d.csv", b"a,b", "has to end in .jsonl, .json, .parquet"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_rows(tmp_path / name)
    assert name in str(caught.value)


def test_a_missing_file_or_a_folder_is_not_looked_up_on_the_hub(tmp_path):
    for name in ("missing.jsonl", "missing", "a/b/c"):
        with pytest.raises(InputError, match="does not exist"):
            read_rows(tmp_path / name)
    with pytest.raises(InputError, match="is a folder"):
        read_rows(tmp_path)
