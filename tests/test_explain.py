"""The search for the keys that carry a difference: on made-up causes, on composed configs, and for real."""

import random
import re
from types import SimpleNamespace

import pytest
from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import OmegaConf
from rich.console import Console

from countdown_kd import tracking
from countdown_kd.config import ROOT, ConfigError, identity
from countdown_kd.explain import Unit, all_of, check_settings, compose, differing, draw, ends, minimal, show_units
from countdown_kd.launching.states import State


def some_units(number):
    return [Unit(f"k{i}", {f"k{i}": (0, 1)}, "loss", "", ()) for i in range(number)]


# ------------------------------------------------------------------------------------------------
# The algorithm


@pytest.mark.parametrize("at_once", [True, False])
def test_every_planted_set_is_found_whatever_its_size(at_once):
    units = some_units(15)
    generator = random.Random(0)
    for size in (1, 2, 3, 5, 15):
        for _ in range(20):
            cause = set(generator.sample(units, size))
            asked = []

            def carries(sets, cause=cause, asked=asked):
                asked.extend(sets)
                return [cause <= set(each) for each in sets]

            assert set(minimal(units, carries, at_once)) == cause
            if size == 1:
                assert len(asked) <= 2 * 4, "a single cause is found by halving"


def test_no_key_of_what_is_found_can_be_left_out():
    # Not monotone: a set carries where it has k0 and an odd number of keys, or everything.
    units = some_units(8)

    def carry(each):
        return len(each) == 8 or (units[0] in each and len(each) % 2 == 1)

    found = minimal(units, lambda sets: [carry(each) for each in sets], at_once=False)
    assert carry(found)
    assert not any(carry([u for u in found if u != unit]) for unit in found)


def test_sets_are_asked_about_one_by_one_only_where_they_run_one_by_one():
    units, batches = some_units(8), []

    def carries(sets):
        batches.append(len(sets))
        return [units[0] in each for each in sets]

    minimal(units, carries, at_once=False)
    assert set(batches) == {1}
    batches.clear()
    minimal(units, carries, at_once=True)
    assert set(batches) == {2}


# ------------------------------------------------------------------------------------------------
# Two configs


@pytest.fixture
def sweeper():
    """What Hydra gives a sweeper, as far as composing goes."""
    GlobalHydra.instance().clear()
    hydra = Hydra.create_main_hydra_file_or_module(
        calling_file=str(ROOT / "launch.py"), calling_module=None, config_path="conf", job_name="launch"
    )
    config = hydra.compose_config("config", ["hydra/sweeper=explain"], RunMode.MULTIRUN, with_log_configuration=False)
    yield SimpleNamespace(config=config, hydra_context=SimpleNamespace(config_loader=hydra.config_loader))
    GlobalHydra.instance().clear()


def between(sweeper, *overrides):
    """A's overrides, A, B, and what differs."""
    a, b = ends(overrides, sweeper.hydra_context.config_loader)
    configs = compose(sweeper, a), compose(sweeper, b)
    return a, *configs, differing(sweeper, a, *configs)


def test_first_values_make_a_and_second_ones_b(sweeper):
    loader = sweeper.hydra_context.config_loader
    overrides = ["precision=bf16,fp32", "trainer.lmbda=0.5", "++trainer.data_seed=1,2"]
    assert ends(overrides, loader) == (
        ["precision=bf16", "trainer.lmbda=0.5", "++trainer.data_seed=1"],
        ["precision=fp32", "trainer.lmbda=0.5", "++trainer.data_seed=2"],
    )
    with pytest.raises(ConfigError, match="seed=1,2,3: 3 values; explain compares two"):
        ends(["seed=1,2,3"], loader)


@pytest.mark.parametrize(
    "overrides",
    [
        ("experiment=lab_native,lab_oumi",),
        ("experiment=lab_oumi,lab_native", "gen=hf"),
        ("gen=hf,vllm", "precision=bf16,fp32"),
        ("gen=vllm,hf", "precision=fp32,bf16_pure"),
        ("experiment=h4,lab_oumi",),
        ("task=tiny,three_to_four", "seed=1,2"),
        ("model=tiny,qwen2.5-1.5b", "dist=single,ddp"),
        ("experiment=lab_native,h4",),
        ("trainer.seed=1,2", "+trainer.lr_scheduler_kwargs={min_lr: 1},{}"),
    ],
)
def test_a_with_all_of_bs_values_is_b(sweeper, overrides):
    a, config_a, config_b, units = between(sweeper, *overrides)
    assert identity(config_a) != identity(config_b)
    assert identity(compose(sweeper, [*a, *all_of(units)])) == identity(config_b)


def test_keys_that_belong_together_are_switched_together(sweeper):
    *_, units = between(sweeper, "precision=bf16,bf16_pure", "gen=hf,vllm", "seed=1,2", "trainer.top_k=0,5")
    found = {unit.name: set(unit.values) for unit in units}
    assert found["precision"] == {"model.dtype", "trainer.bf16"}
    assert "gen=vllm" in next(unit.overrides for unit in units if unit.name == "gen")
    assert found["seed"] == {"seed"}, "task.seed and trainer.seed follow it"
    assert found["trainer.top_k"] == {"trainer.top_k"} and len(found) == 4
    *_, units = between(sweeper, "task=tiny,h4")
    assert [unit.name for unit in units if unit.name.startswith("task")] == ["task"], "another function's arguments"


def test_what_can_change_the_loss_comes_first(sweeper):
    *_, units = between(sweeper, "++trainer.do_eval=false,true", "++trainer.ddp_timeout=1,2", "trainer.beta=0,1")
    assert [unit.name for unit in units] == ["trainer.beta", "trainer.ddp_timeout", "trainer.do_eval"]


# ------------------------------------------------------------------------------------------------
# For real

LAB = (
    "-m", "hydra/sweeper=explain", "experiment=lab_native,lab_oumi", "gen=hf", "trainer.max_steps=4",
    "trainer.learning_rate=1e-4", "trainer.max_completion_length=48", "eval.num_puzzles=10",
    "trainer.save_strategy=no",
)  # fmt: skip


@pytest.mark.timeout(900)
def test_the_lab_notes_cause_is_named_and_runs_are_used_again(launch):
    first = launch(*LAB, "hydra.sweeper.tolerance=1e-6", timeout=800)
    assert first.returncode == 0, first.stderr
    said = re.search(r"^`precision \(model.dtype, trainer.bf16\)` explains 100% of the gap of .* in train/loss.*$",
                     first.stdout, re.M)  # fmt: skip
    assert said and said[0].endswith("the other 4 differing keys explain none of it."), first.stdout
    (sweep,) = launch.runs("sweep")
    assert sweep.info.status == "FINISHED" and sweep.data.tags["mlflow.note.content"] == said[0]
    assert {artifact.path for artifact in launch.client.list_artifacts(sweep.info.run_id)} == {"explain.png"}
    names = {run.info.run_name for run in launch.runs("cell")}
    assert {"A", "B", "A+precision"} <= names

    # With seeds instead of a tolerance, B, A and the probes are there already; two more seeds of A are run.
    cells = len(launch.runs("cell"))
    again = launch(*LAB, "hydra.sweeper.seeds=2", timeout=300)
    assert again.returncode == 0, again.stderr
    assert "over 2 seeds" in again.stdout
    assert len(launch.runs("cell")) == cells + 1
    same = launch("-m", "hydra/sweeper=explain", "precision=fp32,fp32")
    assert same.returncode == 0 and "one and the same config" in same.stdout


@pytest.mark.parametrize(
    "overrides, told",
    [
        (("seed=1,2,3",), "3 values; explain compares two"),
        (("precision=fp32,fp64",), "fp64"),
        (("model.dtype=float32,bfloat16",), "gen.dtype=float32: with gen=hf"),
        (("seed=1,2", "hydra.sweeper.metric=train/los"), "did you mean train/loss?"),
    ],
)
def test_bad_input_is_told_before_anything_runs(launch, overrides, told):
    done = launch("-m", "hydra/sweeper=explain", *overrides, timeout=100)
    assert done.returncode != 0 and told.lower() in (done.stdout + done.stderr).lower()
    assert not launch.runs("cell") and not launch.runs("sweep")


@pytest.mark.parametrize(
    "setting, told",
    [
        ({"seeds": 1}, "seeds=1: it must be an integer of 2 or more"),
        ({"seeds": "two"}, "seeds=two: it must be"),
        ({"tolerance": -1}, "tolerance=-1: it must be a number of 0 or more"),
        ({"tolerance": "small"}, "tolerance=small: it must be"),
        ({"share": 90}, "share=90: it must be above 0 and not above 1"),
        ({"metric": "accuracy"}, "Did you mean eval/accuracy?"),
    ],
)
def test_settings_are_checked_first(tmp_path, setting, told):
    store = OmegaConf.create({"tracking": {"uri": f"sqlite:///{tmp_path}/mlflow.db", "experiment": "x"}})
    sound = {"metric": "train/loss", "seeds": 3, "tolerance": None, "share": 0.9, "config": store}
    check_settings(SimpleNamespace(**sound))
    with pytest.raises(ConfigError, match=re.escape(told)):
        check_settings(SimpleNamespace(**sound | setting))


def test_a_metric_that_only_a_finished_run_has_logged_is_known(tmp_path):
    config = OmegaConf.create({"tracking": {"uri": f"sqlite:///{tmp_path}/mlflow.db", "experiment": "x"}})
    client, experiment_id = tracking.open_store(config.tracking)
    run_id = tracking.start_run(client, experiment_id, "a", "cell")
    client.log_metric(run_id, "train/entropy", 1.0)
    tracking.set_state(client, run_id, State.RUNNING)
    tracking.set_state(client, run_id, State.FINISHED)
    check_settings(SimpleNamespace(metric="train/entropy", seeds=3, tolerance=0, share=0.9, config=config))


def test_the_figure_of_two_configs_that_agree_has_no_probes_and_whole_steps(tmp_path, recwarn):
    search = SimpleNamespace(sets={}, cause=[], runs={"A": "1", "B": "2"}, metric="train/loss", gap=0.0)
    search.curve = lambda name: {1: 1.0, 2: 0.9}
    assert draw(search, tmp_path / "explain.png").read_bytes().startswith(b"\x89PNG")
    assert not [str(each.message) for each in recwarn if "identical" in str(each.message)]


def test_values_in_brackets_are_shown_as_they_are():
    console = Console(width=80, record=True, file=open("/dev/null", "w"))
    show_units(console, [Unit("k", {"k": ("[/INST]", "[pad]")}, "loss", "", ())])
    assert re.search(r"\[/INST\] +\[pad\]", console.export_text())


def test_plan_runs_nothing(launch):
    done = launch("-m", "hydra/sweeper=explain", "trainer.beta=0,1", "plan=true", timeout=100)
    assert done.returncode == 0 and "trainer.beta" in done.stdout and "probes" in done.stdout
    assert not launch.runs("cell") and not launch.runs("sweep")
