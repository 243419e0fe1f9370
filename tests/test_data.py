import json

import pytest

from countdown_kd import data
from countdown_kd.countdown import check, h4_prompt

MESSAGES = [
    {"role": "user", "content": "Make 3 of 1,2"},
    {"role": "assistant", "content": "<answer>1+2=3</answer>"},
]


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def files(tmp_path):
    train = [{"nums": [1, n], "target": n + 1, "messages": MESSAGES} for n in range(2, 12)]
    test = [{"nums": [n, 1], "target": n + 1} for n in range(10, 14)]
    return write(tmp_path / "train.jsonl", train), write(tmp_path / "test.jsonl", test)


@pytest.mark.parametrize("puzzles", ["tiny", "public"])
def test_generated_data_is_fixed_by_its_seed_and_never_overlaps(puzzles):
    one, again, other = (data.generated(puzzles, 200, 50, seed) for seed in (1, 1, 2))
    assert one == again and one.fingerprint == again.fingerprint != other.fingerprint
    assert one.test == other.test, "cells of different seeds are evaluated on the same puzzles"
    held_out = {example.puzzle.key for example in one.test}
    assert not held_out & {example.puzzle.key for example in one.train + other.train}


@pytest.mark.parametrize("puzzles", ["tiny", "public"])
def test_generated_completions_solve_their_puzzles(puzzles):
    for example in data.generated(puzzles, 200, 1, seed=0).train:
        assert check(example.completion, *example.puzzle).label == "correct"


def test_more_puzzles_than_there_are_is_an_error():
    with pytest.raises(ValueError, match="5000 held-out puzzles asked for; the tiny task has 971"):
        data.generated("tiny", 10, 5000, seed=0)


def test_a_jsonl_pair_loads_and_training_rows_that_are_evaluated_are_dropped(files):
    loaded = data.jsonl(*files, num_test=4)
    assert [example.puzzle.numbers for example in loaded.train] == [(1, n) for n in range(2, 10)]
    assert loaded.train[0].prompt == MESSAGES[:-1]
    assert loaded.train[0].completion == MESSAGES[-1]["content"]
    assert loaded.test[0].prompt == h4_prompt(loaded.test[0].puzzle)


def test_num_test_limits_the_evaluation(files):
    assert len(data.jsonl(*files, num_test=2).test) == 2


def test_a_prompt_may_be_text_or_messages(files, tmp_path):
    rows = [
        {"nums": [50, 2], "target": 52, "prompt": "Make 52 of 50,2"},
        {"nums": [50, 3], "target": 53, "prompt": MESSAGES[:1]},
    ]
    loaded = data.jsonl(files[0], write(tmp_path / "prompts.jsonl", rows), num_test=9)
    assert loaded.test[0].prompt == [{"role": "user", "content": "Make 52 of 50,2"}]
    assert loaded.test[1].prompt == MESSAGES[:1]


@pytest.mark.parametrize(
    "line, said",
    [
        ("{not json", "line 3: not JSON (Expecting property name"),
        ("[1, 2]", "line 3: list where an object was expected"),
        ({"target": 3, "messages": MESSAGES}, "line 3: no 'nums'; it has target, messages"),
        ({"nums": [1, 2], "messages": MESSAGES}, "line 3: no 'target'"),
        ({"nums": "1 2", "target": 3}, "line 3: 'nums' is '1 2', not a list"),
        ({"nums": [1, 2], "target": "3"}, "line 3: 'target' is '3', not an integer"),
        ({"nums": [1, True], "target": 3}, "line 3: 'nums' is [1, True]"),
        ({"nums": [1, 2], "target": 3}, "line 3: messages must be a list of objects"),
        (
            {"nums": [1, 2], "target": 3, "messages": MESSAGES[:1]},
            "line 3: the last of at least two",
        ),
    ],
    ids=str,
)
def test_a_malformed_line_is_named_with_its_file(files, tmp_path, line, said):
    good = {"nums": [1, 2], "target": 3, "messages": MESSAGES}
    bad = write(tmp_path / "bad.jsonl", [good, "", line])
    with pytest.raises(ValueError) as error:
        data.jsonl(bad, files[1], num_test=4)
    assert str(error.value).startswith(f"{bad}, {said}")


def test_a_missing_or_empty_file_is_named(files, tmp_path):
    with pytest.raises(ValueError, match="nowhere.jsonl: no such file"):
        data.jsonl(str(tmp_path / "nowhere.jsonl"), files[1], num_test=4)
    with pytest.raises(ValueError, match="empty.jsonl: the file is empty"):
        data.jsonl(write(tmp_path / "empty.jsonl", []), files[1], num_test=4)


def test_data_that_is_all_evaluated_leaves_nothing_to_train_on(files):
    with pytest.raises(ValueError, match="0 training and 4 test puzzles are left"):
        data._without_overlap([], data.jsonl(*files, num_test=4).test)


@pytest.fixture
def hub_copy(tmp_path):
    """A folder laid out like HuggingFaceTB/Countdown-Task-GOLD, with two of its configs."""
    folder = tmp_path / "Countdown-Task-GOLD"
    for config in ("test", "verified_Qwen3-4B-Instruct-2507"):
        (folder / config).mkdir(parents=True)
    (folder / "README.md").write_text(
        "---\nconfigs:\n"
        "- config_name: test\n  data_files:\n  - split: test\n    path: test/*.jsonl\n"
        "- config_name: verified_Qwen3-4B-Instruct-2507\n  data_files:\n"
        "  - split: train\n    path: verified_Qwen3-4B-Instruct-2507/*.jsonl\n---\n"
    )
    rows = [{"nums": [1, n], "target": n + 1, "messages": MESSAGES} for n in range(2, 12)]
    write(folder / "verified_Qwen3-4B-Instruct-2507" / "data.jsonl", rows)
    rows = [{"nums": [1, n], "target": n + 1, "prompt": MESSAGES[:1]} for n in range(10, 14)]
    write(folder / "test" / "data.jsonl", rows)
    return folder


def test_the_published_layout_loads_through_datasets(hub_copy, cell, monkeypatch, tmp_path):
    from countdown_kd.config import instantiate

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    loaded = instantiate(cell("task=h4", f"task.path={hub_copy}").task)
    assert len(loaded.train) == 8 and len(loaded.test) == 4
    assert loaded.test[0].prompt == MESSAGES[:1]


def test_the_training_side_has_the_columns_that_gold_takes(files):
    rows = data.jsonl(*files, num_test=4).conversations()
    assert rows.column_names == ["prompt", "completion"]
    assert rows[0] == {"prompt": MESSAGES[:-1], "completion": MESSAGES[-1:]}
