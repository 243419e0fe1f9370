"""The tiny pair that the package ships, and the recipe that made it."""

import random
from itertools import islice

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from countdown_kd.config import ROOT, instantiate
from countdown_kd.countdown import FAILURES, check, short_prompt, tiny_puzzles, tiny_trace
from countdown_kd.evaluate import evaluate, hf_sampler
from countdown_kd.run import load
from countdown_kd.tiny import recipe

PAIR = ("teacher", "student")
FOLDER = ROOT / "countdown_kd" / "tiny"


def conversation(puzzle):
    return short_prompt(puzzle) + [{"role": "assistant", "content": tiny_trace(puzzle)}]


@pytest.mark.parametrize("role", PAIR)
def test_a_tokenizer_loads_to_the_ids_it_was_saved_with(role):
    # The file itself, read without transformers' choice of a class by the model's type.
    saved = PreTrainedTokenizerFast(tokenizer_file=str(FOLDER / role / "tokenizer.json"))
    loaded = AutoTokenizer.from_pretrained(FOLDER / role)
    for puzzle in islice(tiny_puzzles(seed=3), 200):
        text = loaded.apply_chat_template(conversation(puzzle), tokenize=False)
        assert loaded(text)["input_ids"] == saved(text)["input_ids"]
        assert loaded.decode(loaded(text)["input_ids"]) == text


@pytest.mark.parametrize("role", PAIR)
def test_digits_are_cut_singly(role):
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / role)
    assert tokenizer.tokenize("25-11+3=17") == list("25-11+3=17")


def test_the_vocabularies_differ_yet_cut_the_traces_alike():
    teacher, student = (AutoTokenizer.from_pretrained(FOLDER / role) for role in PAIR)
    assert set(teacher.get_vocab()) != set(student.get_vocab())
    for puzzle in islice(tiny_puzzles(seed=0), 50):
        text = tiny_trace(puzzle)
        assert teacher.tokenize(text) == student.tokenize(text), "else the hybrid loss has no signal there"


def test_no_pickled_weights_are_shipped():
    files = {file.name for role in PAIR for file in (FOLDER / role).iterdir()}
    assert files == {
        "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip


@pytest.fixture(scope="module")
def accuracies():
    """Both models on 800 held-out puzzles, sampled as in training."""
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", ["eval.num_puzzles=800"])
    examples = instantiate(cfg.task).test
    results = {}
    for role, kwargs in (("teacher", cfg.teacher), ("student", cfg.model)):
        model, tokenizer = load(kwargs)
        sampler = hf_sampler(model, tokenizer, cfg.eval, autocast=False, description=role)
        results[role] = evaluate(sampler, model, tokenizer, examples, cfg.eval)
    return results


def test_the_teacher_solves_nine_in_ten_held_out_puzzles(accuracies):
    assert accuracies["teacher"].metrics["accuracy"] >= 0.9


def test_the_student_solves_a_few_and_fails_in_every_way(accuracies):
    metrics = accuracies["student"].metrics
    assert 0.15 <= metrics["accuracy"] <= 0.35
    shares = {label: metrics[f"failures/{label}"] / 800 for label in FAILURES}
    assert min(shares.values()) > 0.005
    assert max(shares.values()) < 0.4


def test_spoiled_traces_fall_into_every_class():
    rng, puzzles = random.Random(0), list(islice(tiny_puzzles(seed=0), 2000))
    labels = {check(recipe.spoiled_trace(p, rng), *p).label for p in puzzles}
    assert labels == {"correct", *FAILURES}


def test_the_recipe_makes_a_pair_that_loads(tmp_path, monkeypatch):
    arguments = ["recipe", "--out", str(tmp_path), "--steps", "2", "--student-steps", "2"]
    monkeypatch.setattr("sys.argv", arguments)
    recipe.main()
    for role in PAIR:
        made = AutoTokenizer.from_pretrained(tmp_path / role)
        shipped = AutoTokenizer.from_pretrained(FOLDER / role)
        assert made.get_vocab() == shipped.get_vocab(), "the vocabulary needs no training"
