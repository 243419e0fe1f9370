"""The same batch through two configs, with the tiny pair itself."""

import os
import re
import shutil
import subprocess
import sys
from itertools import accumulate
from statistics import fmean

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from rich.console import Console
from rich.progress import Progress

from countdown_kd import tracking
from countdown_kd.config import ROOT, ConfigError
from countdown_kd.parity import DRAWN, MOST_PAIRS, Parity, differing, measure, read_side, switch, switched
from countdown_kd.parity_report import draw, notes, parity, sentences, show
from countdown_kd.replay import draws, freeze, growth, models, replay, take_step

FEW = ("task.num_train=64", "trainer.per_device_train_batch_size=4")
# Twelve keys that differ and change nothing. That of the first cannot be known without a look.
INNOCENT = (
    "+trainer.data_seed=7",
    "+trainer.eval_on_start=false",
    "+trainer.do_predict=true",
    "+trainer.eval_delay=1",
    "+trainer.eval_accumulation_steps=2",
    "+trainer.per_device_eval_batch_size=2",
    "+trainer.dataloader_pin_memory=false",
    "+trainer.dataloader_persistent_workers=false",
    "+trainer.torch_empty_cache_steps=4",
    "+trainer.ddp_timeout=60",
    "+trainer.vllm_max_model_length=100",
    "+trainer.include_num_input_tokens_seen=all",
)


def composed(overrides):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", overrides, return_hydra_config=True)


def side(*overrides):
    return read_side(" ".join((*FEW, *overrides)), composed)


QUIET = Progress(disable=True)


@pytest.fixture(scope="module")
def frozen():
    return freeze(side(), side())


@pytest.fixture(scope="module")
def one(frozen):
    """The defaults' steps."""
    return replay(side(), frozen)


@pytest.fixture(scope="module")
def drawn(frozen):
    """What the defaults draw."""
    return draws(side(), frozen)


@pytest.fixture
def against_defaults(frozen, one, drawn):
    """What parity finds between the defaults and a config, without measuring the defaults again."""

    def compared(*overrides) -> Parity:
        a, b = side(), side(*overrides)
        found = Parity(a, b, *differing(a, b), frozen=frozen, again=one)
        found.replays, found.draws = (one, replay(b, frozen)), (drawn, draws(b, frozen))
        switch(found, QUIET)
        return found

    return compared


# ------------------------------------------------------------------------------------------------
# A step, taken apart


def test_tokens_average_to_sequences_and_sequences_to_the_loss(one):
    for step in (one.text, one.rollouts):
        assert len(step.sequences) == 4 and all(sequence.token_losses for sequence in step.sequences)
        for sequence in step.sequences:
            assert fmean(sequence.token_losses) == pytest.approx(sequence.loss, rel=1e-5)
        assert fmean(sequence.loss for sequence in step.sequences) == pytest.approx(step.loss, rel=1e-5)
    assert one.text.loss != one.rollouts.loss


def test_without_uld_too(frozen):
    step = take_step(side("trainer.use_uld_loss=false"), frozen, on_policy=False)
    losses = [loss for sequence in step.sequences for loss in sequence.token_losses]
    assert len(losses) == sum(len(sequence.ids) for sequence in step.sequences) > 40
    assert fmean(losses) == pytest.approx(step.loss, rel=1e-5), "a mean over tokens, not over sequences"


def test_a_token_is_aligned_where_both_tokenizers_cut_it_out_of_the_text(one, frozen):
    assert one.text.aligned == 1.0
    _, tokenizer = models(OmegaConf.to_yaml(side().model))
    _, teachers = models(OmegaConf.to_yaml(side().teacher))
    aligned = tokens = 0
    for ids in frozen.rollouts:
        pieces = [tokenizer.decode(each) for each in ids if each != tokenizer.eos_token_id]
        ends = list(accumulate(map(len, pieces)))
        own = set(zip([0, *ends], ends, strict=False))
        others = teachers("".join(pieces), add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        aligned, tokens = aligned + len(own & set(others)), tokens + len(own)
    assert 0.9 < one.rollouts.aligned == aligned / tokens < 1.0


def test_the_gradient_is_clipped_and_the_weights_move_by_adams_first_step(one, frozen):
    assert one.rollouts.grad_norm > 1 == pytest.approx(one.rollouts.clipped_norm, rel=1e-5)
    # Adam's first step is the learning rate, up or down, for every weight that has a gradient (890,496 in all).
    assert one.text.update_norm == pytest.approx(1e-3 * 890_496**0.5, rel=0.02)
    assert one.text.unchanged < 0.001


def test_small_steps_are_lost_in_bf16_weights_and_only_there(frozen):
    shares = {
        precision: take_step(side(f"precision={precision}", "trainer.learning_rate=1e-7"), frozen, False).unchanged
        for precision in ("fp32", "bf16", "bf16_pure")
    }
    assert shares["bf16_pure"] > 0.9 and shares["fp32"] < 0.01 and shares["bf16"] < 0.01


@pytest.mark.parametrize("overrides, factor", [((), 4.0), (("trainer.use_uld_loss=false",), 0.25)])
def test_the_loss_of_the_same_sequences_depends_on_how_many_micro_batches_they_are(frozen, overrides, factor):
    """ULD sums over the micro-batches; the loss without ULD is divided by the tokens of all of them, k times over."""
    cfg = side(*overrides)
    text = take_step(cfg, frozen, on_policy=False)
    assert growth(cfg, frozen, text, 4) == pytest.approx(factor, rel=1e-4)


def test_micro_batches_add_up_to_the_loss(frozen, one):
    step = take_step(side("trainer.gradient_accumulation_steps=2"), frozen, on_policy=True)
    assert len(step.micro_losses) == 2 and sum(step.micro_losses) == pytest.approx(step.loss)
    assert step.loss == pytest.approx(2 * one.rollouts.loss, rel=1e-5)
    assert [each.loss for each in step.sequences] == pytest.approx([each.loss for each in one.rollouts.sequences])


def test_what_the_limits_cut_off_is_counted(frozen):
    step = take_step(side("trainer.max_completion_length=12"), frozen, on_policy=True)
    assert step.cut == sum(max(0, len(ids) - 12) for ids in frozen.rollouts) > 0
    whole = side("trainer.max_length=40", "trainer.max_completion_length=12", "eval.max_new_tokens=12")
    assert take_step(whole, frozen, on_policy=False).cut == frozen.tokens["text"] - 4 * 40 > 0


def test_vllms_rollouts_are_padded_otherwise_and_make_the_same_loss(one, frozen):
    step = take_step(side("gen=vllm"), frozen, on_policy=True)
    assert step.loss == pytest.approx(one.rollouts.loss, rel=1e-5) and step.cut == 0
    assert [each.ids for each in step.sequences] == [each.ids for each in one.rollouts.sequences]


def test_what_is_drawn_is_what_training_draws(tmp_path, frozen):
    from test_gold import make_trainer

    overrides = (*FEW, "trainer.gradient_accumulation_steps=2", "trainer.max_steps=3")
    trainer = make_trainer(tmp_path, *overrides)
    trainer.train()
    found = draws(side(*overrides[2:]), frozen)
    assert found.on_policy[:3] == trainer.draws
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert found.learning_rates == logged and len(set(logged)) == 3
    assert [len(batch) for batch in found.puzzles[:3]] == [8] * 3 and len(found.puzzles) == 8, "64 puzzles"


# ------------------------------------------------------------------------------------------------
# Two configs


def test_a_config_agrees_with_itself_bit_for_bit(one, drawn):
    a, b = side(), side()
    found = Parity(a, b, *differing(a, b))
    measure(found, QUIET)
    assert found.replays[0] == found.replays[1] == found.again == one
    assert found.draws[0] == found.draws[1] == drawn
    assert not found.units and not found.gaps and not found.drawn_apart
    assert next(sentences(found)) == "A and B do the same with the same batch, bit for bit."


MEASURED = {
    "trainer.beta": ("=1", "loss"),
    "trainer.uld_token_merge_strategy": ("=observed", "loss"),
    "trainer.gradient_accumulation_steps": ("=2", "loss"),
    "trainer.max_completion_length": ("=12", "loss"),
    "teacher.dtype": ("=bfloat16", "loss"),
    "trainer.learning_rate": ("=1e-4", "update_norm"),
    "trainer.max_grad_norm": ("=0.1", "clipped_norm"),
}


@pytest.mark.parametrize("key", MEASURED)
def test_the_key_that_changes_a_step_is_named_among_twelve_that_do_not(against_defaults, key):
    value, gap = MEASURED[key]
    found = against_defaults(key + value, *INNOCENT)
    assert found.gaps[0] == gap
    told = next(sentences(found))
    assert told.startswith(f"`{key}` explains 100% of the "), told
    assert told.endswith("12 other differing keys explain none of it."), told
    assert {unit.name for each in found.gaps for unit, _ in found.carriers(each)} == {key}


def test_the_denominator_is_named_and_other_forms_of_the_step_are_innocent():
    few = "trainer.gradient_accumulation_steps=2"
    a, b = side(few, "step=trl"), side(few, "step=fast", "step.average_micro_batches=true")
    found = Parity(a, b, *differing(a, b))
    measure(found, QUIET)
    switch(found, QUIET)
    assert found.growth == pytest.approx([2, 1], rel=1e-4)
    told = next(sentences(found))
    assert told.startswith("`step.average_micro_batches` explains 100% of the gap in loss"), told
    assert re.search(r"; \d+ other differing keys explain none of it\.$", told), told
    assert found.left_out == ["step.teacher_batch_size"], "TRL's loss cannot have it alone"


def test_of_precision_it_is_told_what_autocast_and_what_the_weights_do(tmp_path):
    few = "trainer.per_device_train_batch_size=2"  # many processors have no bf16 instructions
    a, b = side("precision=bf16", few), side("precision=bf16_pure", few, *INNOCENT)
    found = Parity(a, b, *differing(a, b))
    measure(found, QUIET)
    switch(found, QUIET)
    told = next(sentences(found))
    assert told.startswith("`precision` (model.dtype, trainer.bf16) explains 100% of the gap in loss ("), told
    assert "weights left unchanged" in told and told.endswith("12 other differing keys explain none of it.")
    shares = {unit.name: share for unit, share in found.carriers("unchanged")}
    assert shares == {"precision": 1.0}, "autocast over fp32 weights loses no update"

    console = Console(width=80, record=True, file=open(os.devnull, "w"))
    show(console, ("A" * 100, "B"), found)
    lines = console.export_text().splitlines()
    assert max(len(line.rstrip()) for line in lines[1:]) <= 80 and "…" not in "".join(lines)
    assert draw(found, tmp_path / "parity.png").read_bytes().startswith(b"\x89PNG")


DRAWN_BY = {
    "trainer.lmbda": ("=0.9", {"on_policy"}),
    "trainer.temperature": ("=0.5", {"rollouts"}),
    "trainer.seed": ("=7", {"puzzles", "on_policy", "rollouts"}),
    "task.seed": ("=7", {"puzzles"}),
    "trainer.max_steps": ("=30", {"learning_rates"}),
}


@pytest.mark.parametrize("key", DRAWN_BY)
def test_the_key_that_changes_what_is_drawn_is_named_among_twelve_that_do_not(against_defaults, key):
    value, apart = DRAWN_BY[key]
    found = against_defaults(key + value, *INNOCENT)
    assert not found.gaps and found.replays[0] == found.replays[1]
    assert found.drawn_apart == [each for each in DRAWN if each in apart]
    assert all([unit.name for unit in found.drawers(each)] == [key] for each in apart)
    same, *others = sentences(found)
    assert "bit for bit: 13 differing keys change neither" in same
    assert len(others) == len(apart) and all(sentence.endswith(f": `{key}`.") for sentence in others)
    assert any(key in note for note in notes(found)) == key.startswith("task.")


def test_two_causes_share_the_gap_and_what_is_taken_for_harmless_is_tried_where_nothing_else_is_left(against_defaults):
    found = against_defaults("trainer.beta=1", "trainer.uld_token_merge_strategy=observed", *INNOCENT)
    shares = {unit.name: share for unit, share in found.carriers("loss")}
    assert set(shares) == {"trainer.beta", "trainer.uld_token_merge_strategy"} and max(shares.values()) < 0.99
    told = next(sentences(found))
    assert all(f"`{key}` explains" in told for key in shares) and "12 other differing keys" in told
    found.untried, found.units = found.units, []
    switch(found, QUIET)
    assert {unit.name for unit, _ in found.carriers("loss")} == set(shares) and not found.untried


def test_two_keys_that_only_together_lose_updates_are_named_as_a_pair(against_defaults):
    found = against_defaults("model.dtype=bfloat16", "gen.dtype=bfloat16", "trainer.learning_rate=1e-7", *INNOCENT)
    (best, share), *_ = found.carriers("unchanged")
    assert best.called == "`model.dtype with trainer.learning_rate`" and share == pytest.approx(1)
    assert any(told.startswith(f"{best.called} explains 100% of the gap in weights left") for told in sentences(found))
    assert 1 < len(found.pairs) <= MOST_PAIRS and [unit for unit in found.units if " with " in unit.name] == [best]
    assert found.carriers("update_norm")[0][0].name == "trainer.learning_rate", "one key is enough there"


def test_switching_gives_a_one_value_of_bs():
    a = side("trainer.lr_scheduler_type=cosine")
    b = side("precision=bf16_pure", "+trainer.weight_decay=0.1", "++trainer.lr_scheduler_kwargs={num_cycles:2}")
    assert switched(a, b, ["trainer.weight_decay"]).trainer.weight_decay == 0.1
    assert "weight_decay" not in switched(b, a, ["trainer.weight_decay"]).trainer
    assert switched(a, b, ["trainer.lr_scheduler_kwargs.num_cycles"]).trainer.lr_scheduler_kwargs == {"num_cycles": 2}
    assert switched(a, b, ["model.dtype"]).gen.dtype == "bfloat16" and a.gen.dtype == "float32"


# ------------------------------------------------------------------------------------------------
# What a side can be, and cannot


def test_a_side_is_a_run_a_file_or_overrides(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    cfg = side("trainer.beta=1")
    (tmp_path / "cell.yaml").write_text(OmegaConf.to_yaml(cfg))
    client, experiment_id = tracking.open_store(composed([]).tracking)
    run_id = tracking.start_run(client, experiment_id, "seed=1,trainer.beta=1", "cell")
    client.log_text(run_id, OmegaConf.to_yaml(cfg), "config/composed.yaml")
    for given in (run_id[:8], "seed=1,trainer.beta=1", str(tmp_path / "cell.yaml")):
        assert read_side(given, composed) == cfg
    assert read_side("", composed).trainer.beta == 0
    with_comma = read_side("++trainer.lr_scheduler_kwargs={a:1,b:2} seed=3", composed)
    assert (with_comma.trainer.lr_scheduler_kwargs, with_comma.seed) == ({"a": 1, "b": 2}, 3)
    with pytest.raises(ConfigError, match="no run by that id or name"):
        read_side("nonsense", composed)


@pytest.mark.parametrize(
    "text, told", [("a: 1", "lacks baseline, dist"), ("- 1", "no composed config"), ("a: [", "cannot be read as YAML")]
)
def test_a_file_that_is_no_config_is_told(tmp_path, text, told):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError, match=told):
        read_side(str(tmp_path / "x.yaml"), composed)


def test_a_student_is_known_by_its_weights_not_by_its_folder(tmp_path):
    shutil.copytree(ROOT / "countdown_kd/tiny/student", tmp_path / "student")
    assert differing(side(), side(f"model.pretrained_model_name_or_path={tmp_path}/student")) == ([], [], [])
    (tmp_path / "student").rename(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(ConfigError, match="both the same student"):
        differing(side(), side(f"model.pretrained_model_name_or_path={tmp_path}/other"))


@pytest.mark.parametrize(
    "b, told",
    [
        ("trainer.betta=1", "betta"),
        ("seed=1,2", "Give single values"),
        ("[/INST]", "[/INST]: no run by that id or name"),
        ("+trainer.betta=1", "did you mean beta?"),
        ("precision=bf16 model.dtype=bfloat16", "autocast wants fp32 weights"),
        ("baseline=teacher", "trains nothing"),
        ("model.pretrained_model_name_or_path=Qwen/other", "same student"),
    ],
)
def test_mistakes_are_told(b, told, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    assert parity(["", b], composed) == 2
    assert told in " ".join(capsys.readouterr().out.split())


def test_mistakes_are_told_before_torch_is_imported(tmp_path):
    code = (
        "import sys; from countdown_kd.__main__ import main; code = main(sys.argv[1:]); "
        "sys.exit(code if 'torch' not in sys.modules else 'torch was imported')"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, "parity", "", "trainer.bf16=true model.dtype=bfloat16"], cwd=tmp_path,
        text=True, capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "80"},
    )  # fmt: skip
    assert result.returncode == 2, result.stderr
    assert "autocast wants fp32 weights" in " ".join(result.stdout.split()) and "Traceback" not in result.stderr
