"""Runs and configs side by side."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Launcher
from mlflow import MlflowClient
from mlflow.entities import Metric
from omegaconf import OmegaConf
from rich.console import Console
from scipy.stats import binomtest

from countdown_kd import tracking
from countdown_kd.compare import Side, by_value, compare, interval, mcnemar, moved_table, noise_of, parting
from countdown_kd.config import ConfigError
from countdown_kd.declared import gold_config_fields
from countdown_kd.differences import ACCURACY, COSMETIC, LOSS, NOISE, SPEED, differences, rank
from countdown_kd.printed import flatten, read_configs

SHORT = ("trainer.max_steps=6", "trainer.per_device_train_batch_size=4", "eval.num_puzzles=30")


def command(launch, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "countdown_kd", "compare", *arguments], cwd=launch.folder, text=True,
        env=os.environ | {"MLFLOW_TRACKING_URI": launch.uri, "COLUMNS": "140"}, capture_output=True, timeout=120,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------
# Printed configs


def test_two_printed_gold_configs_in_one_note(tmp_path):
    from trl.experimental.gold import GOLDConfig

    ours = GOLDConfig(output_dir="here", use_cpu=True, bf16=True, run_name="a")
    theirs = GOLDConfig(
        output_dir="there", use_cpu=True, bf16=False, run_name="b", eval_steps=100, gradient_checkpointing_kwargs={},
    )  # fmt: skip
    note = tmp_path / "note.md"
    indented = "\n".join(f"    {line}" for line in str(theirs).splitlines())
    note.write_text(
        f"# Losses\n<summary>One</summary>\n```\n{ours}\n```\n<summary>Two</summary>\n\n```\n{indented}\n```\n"
        "args = GOLDConfig(\n    lmbda=0.9,\n)\n"
    )
    (one, first), (two, second) = read_configs(note)
    assert (one, two) == ("One", "Two") and len(first) > 100
    found = {each.key: each.rank for each in differences([first, second])}
    assert found.pop("bf16") == LOSS and found.pop("eval_steps") == COSMETIC
    assert found.pop("gradient_checkpointing_kwargs") == COSMETIC
    assert {each for each in found.values()} <= {NOISE, COSMETIC}


LAB_NOTE = Path(__file__).parent / "lab_note"  # the two dumps that this project grew out of, without a host's name


def test_the_lab_notes_dumps_differ_in_what_its_author_found_and_bf16_comes_first():
    (_, oumi), (_, native) = (
        config for name in ("oumi", "native_trl") for config in read_configs(LAB_NOTE / f"{name}.txt")
    )
    assert len(oumi) == len(native) == 207
    found = differences([native, oumi])
    assert [each.key for each in found if each.rank == LOSS] == [
        "bf16", "teacher_model_name_or_path", "teacher_tokenizer_name_or_path",
    ]  # fmt: skip
    assert [each.key for each in found if each.rank == COSMETIC] == [
        "eval_steps", "gradient_checkpointing_kwargs", "log_level", "logging_first_step", "lr_scheduler_kwargs",
        "per_device_eval_batch_size",
    ]  # fmt: skip
    assert [each.key for each in found if each.rank == NOISE] == ["logging_dir", "output_dir", "run_name"]
    assert len(found) == 12


@pytest.mark.parametrize("experiment, dump", [("lab_native", "native_trl"), ("lab_oumi", "oumi")])
def test_the_experiments_have_every_value_of_the_lab_notes_dumps_but_the_launchers(cell, experiment, dump):
    ((_, printed),) = read_configs(LAB_NOTE / f"{dump}.txt")
    own = flatten(OmegaConf.to_container(cell(f"experiment={experiment}").trainer, resolve=True))
    apart = {
        key
        for key, value in printed.items()
        if key.partition(".")[0] in gold_config_fields() and (key not in own or own[key] != value)
    }
    launchers = "output_dir|run_name|report_to|project|trackio_.*|wandb_.*|hub_.*|push_to_hub.*|save_.*|callbacks"
    others = "(teacher_)?model_.*|teacher_tokenizer_.*|use_cpu|local_rank|vllm_server_.*|resume_from_.*|.*_token"
    assert {key for key in apart if not re.fullmatch(f"{launchers}|{others}", key)} == {"warmup_steps"}
    assert printed["warmup_ratio"] == own["warmup_steps"] == 0.05


@pytest.mark.parametrize(
    "text, config",
    [
        ("GOLDConfig(\nkwargs={\n 'a': 1,\n},\nbeta=0.5,\n)", {"kwargs.a": 1, "beta": 0.5}),
        ("GOLDConfig(\nrun_name=a=1,b=2,\nmp=,\nip=0.0.0.0,\n)", {"run_name": "a=1,b=2", "mp": "", "ip": "0.0.0.0"}),
        ("TrainingConfig(training=TrainingParams(gold=GoldParams(lmbda=0.5)))", {"lmbda": 0.5}),
        ("XConfig(s=<SchedulerType.COSINE: 'cosine'>, token=<HUB_TOKEN>)", {"s": "cosine", "token": "<HUB_TOKEN>"}),
        ("args = GOLDConfig(\n    lmbda=0.9,  # half\n    model=name,\n)\n", {"lmbda": 0.9, "model": "name"}),
        ("12:00 INFO trl: GOLDConfig(\nbf16=True,\nmp=,\n)\nnext", {"bf16": True, "mp": ""}),
        ("GOLDConfig(\nrun_name=a(b,\nbf16=True,\n)\n", {"run_name": "a(b", "bf16": True}),
        ("bf16: true\nlearning_rate: 1e-5\n", {"bf16": True, "learning_rate": 1e-5}),
        ('{"bf16": true}', {"bf16": True}),
    ],
)  # fmt: skip
def test_a_config_is_read_however_it_is_printed(tmp_path, text, config):
    (tmp_path / "x.txt").write_text(text)
    ((_, found),) = read_configs(tmp_path / "x.txt")
    assert found == config


def test_numbers_are_numbers_in_any_spelling_but_releases_are_not():
    assert [flatten({"lr": value})["lr"] for value in ("1e-5", 1e-05, "0.00001")] == [1e-5] * 3
    assert flatten({"max_steps": "60", "name": "007", "x": "1e999"}) == {"max_steps": 60, "name": "007", "x": "1e999"}
    assert flatten({"versions": {"trl": "2.10"}}) == {"versions.trl": "2.10"}


def test_dtypes_as_loaded_are_one_value_and_no_config_has_no_keys():
    fp32, bf16 = ({"student": {"dtypes": {dtype: 9}}} for dtype in ("float32", "bfloat16"))
    (found,) = differences([flatten(fp32), flatten(bf16)])
    assert found.values == ("float32", "bfloat16") and found.rank == LOSS
    assert flatten({"student": {"dtypes": {"float32": 9, "bfloat16": 1}}}) == {
        "student.dtypes": "9 float32, 1 bfloat16"
    }
    assert flatten({}) == {}


def test_other_frameworks_names_and_spellings_become_gold_configs():
    oumi = flatten(
        {"training": {"gold": {"beta": 0.0, "lmbda": 0.5}, "optimizer": "adamw_torch", "learning_rate": 1e-5}}
    )
    assert oumi == {"beta": 0, "lmbda": 0.5, "optim": "adamw_torch", "learning_rate": 1e-5}
    printed = flatten({"eval_strategy": "IntervalStrategy.NO", "evaluation_strategy": "no", "max_grad_norm": 1.0})
    assert printed == {"eval_strategy": "no", "max_grad_norm": 1}


def test_what_can_change_the_loss_comes_first():
    one = {"logging_steps": 1, "vllm_mode": "colocate", "beta": 0, "output_dir": "a", "data": 1, "brand_new_key": 1}
    other = {"logging_steps": 2, "vllm_mode": "server", "beta": 1, "output_dir": "b", "data": 1, "brand_new_key": 2}
    found = differences([one, other])
    assert [each.key for each in found] == ["beta", "brand_new_key", "vllm_mode", "logging_steps", "output_dir"]
    assert [each.rank for each in found] == [LOSS, LOSS, SPEED, COSMETIC, NOISE]
    assert "KL(teacher || student)" in found[0].why and found[1].why == "not known to be harmless"


@pytest.mark.parametrize(
    "key, what",
    [
        ("vllm_sync_frequency", LOSS), ("vllm_max_model_length", LOSS), ("vllm_gpu_memory_utilization", SPEED),
        ("eval.rule", ACCURACY), ("eval.temperature", ACCURACY), ("eval.batch_size", SPEED), ("temperature", LOSS),
    ],
)  # fmt: skip
def test_what_changes_rollouts_or_how_accuracy_is_measured_is_no_matter_of_speed(key, what):
    assert rank(key)[0] == what


def test_changes_that_are_not_committed_can_change_the_loss_and_committed_ones_are_told_by_the_commit():
    one, other = {"commit": "c1", "code": "a"}, {"commit": "c1", "code": "b"}
    (found,) = differences([one, other])
    assert found.rank == LOSS and "code.diff" in found.why
    found = {each.key: each.rank for each in differences([one, {"commit": "c2", "code": "b"}])}
    assert found == {"commit": LOSS, "code": NOISE}


@pytest.mark.parametrize("text", ["nothing here", "GOLDConfig(" + "(" * 100_000 + ")", "GOLDConfig(\n" + "x" * 10**6])
def test_text_without_a_config_is_told_and_never_run(tmp_path, text):
    (tmp_path / "x.txt").write_text(text)
    with pytest.raises(ConfigError, match="no config in it"):
        read_configs(tmp_path / "x.txt")


@pytest.mark.parametrize("name, text", [("x.yaml", "- 1"), ("x.json", "{"), ("y.yaml", "a: [")])
def test_a_file_that_is_no_config_is_told(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=f"{name}: (not read as|a config is keys with values, not list. Write)"):
        read_configs(tmp_path / name)


# ------------------------------------------------------------------------------------------------
# Numbers


def test_mcnemar_counts_the_puzzles_that_one_of_them_solves():
    one = ["correct"] * 3 + ["wrong_value"] * 12
    other = ["correct"] * 2 + ["wrong_value"] + ["correct"] * 9 + ["missing_answer_tags"] * 3
    gained, lost, p = mcnemar(one, other)
    # Ten puzzles, one of them lost: 2 * (1 + 10) / 2**10.
    assert (gained, lost) == (9, 1) and p == pytest.approx(22 / 1024)
    assert mcnemar(one, one) == (0, 0, 1.0)
    console = Console(width=80)
    with console.capture() as printed:
        console.print(moved_table(one, other))
    assert [line.split() for line in printed.get().splitlines()[-2:]] == [
        ["correct", "2", "·", "1"],
        ["wrong_value", "9", "3", "·"],
    ]


@pytest.mark.parametrize("gained, lost", [(1, 0), (5, 5), (4900, 5100), (4600, 5400), (0, 1000)])
def test_mcnemars_p_is_scipys_for_any_number_of_puzzles(gained, lost):
    one, other = ["x"] * gained + ["correct"] * lost, ["correct"] * gained + ["x"] * lost
    assert mcnemar(one, other)[2] == pytest.approx(binomtest(gained, gained + lost).pvalue, rel=1e-9)


def test_the_interval_over_seeds_is_students():
    assert interval([1.0, 2.0, 3.0], ".2f") == "2.00 (-0.48–4.48)"
    assert interval([2.0], ".1f") == "2.0" and interval([], ".1f") == "–"
    assert interval([60.0, 62.4], ".1f") == "60.0, 62.4", "an interval of two is wider than what it is of"
    assert interval([1.0, 50.0, 99.0], ".1f", 0, 100) == "50.0 (0.0–100.0)"


# ------------------------------------------------------------------------------------------------
# Made-up runs


@pytest.fixture
def made(tmp_path, monkeypatch, capsys):
    """``made.add(name, config, …)`` makes a run, ``made.said(name, …)`` is what compare prints."""
    monkeypatch.chdir(tmp_path)
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.create_experiment("x", artifact_location=(tmp_path / "artifacts").as_uri())

    class Store:
        def add(self, name, config=None, curves=(), params=(), tags=(), status="FINISHED", batches=None, metrics=()):
            tags = {"countdown_kd.kind": "cell", **dict(tags)}
            run_id = client.create_run(experiment, run_name=name, tags=tags).info.run_id
            points = [Metric(key, value, 0, 0) for key, value in dict(metrics).items()]
            for key, curve in dict(curves).items():
                points += [Metric(f"train/{key}", value, 0, step) for step, value in curve.items()]
            client.log_batch(run_id, metrics=points)
            for key, value in dict(params).items():
                client.log_param(run_id, key, value)
            if config:
                client.log_dict(run_id, config, "config/effective.yaml")
            if batches:
                client.log_dict(run_id, batches, "on_policy_draws.json")
            client.set_terminated(run_id, status)
            return run_id

        def side(self, run_id, config=(("beta", 0),)):
            return Side("", dict(config), client.get_run(run_id), client)

        def said(self, *names, width=160, code=0):
            monkeypatch.setenv("COLUMNS", str(width))
            capsys.readouterr()
            assert compare(lambda: (client, experiment), names, False) == code
            return capsys.readouterr().out

    store = Store()
    store.client = client
    return store


def one_line(printed: str) -> str:
    return " ".join(printed.split())


def test_dtypes_as_loaded_and_keys_that_one_run_lacks_are_shown(made):
    versions = {"torch": "2.13"}
    made.add("a", {"student": {"dtypes": {"float32": 9}}, "versions": versions})
    made.add("b", {"student": {"dtypes": {"bfloat16": 9}}, "versions": versions | {"flash-attn": "2.8"}})
    said = made.said("a", "b")
    assert re.search(r"student.dtypes +float32 +bfloat16", said) and re.search(r"versions.flash-attn +– +2.8", said)
    assert "the same" not in said


def test_a_run_without_a_config_is_said_to_have_none_and_not_to_be_the_same(made):
    made.add("a", {"trainer": {"beta": 0}})
    made.add("dead", status="FAILED")
    said = made.said("a", "dead")
    assert "has not finished (FAILED)" in said and "has no effective config" in said
    assert "none to compare it with" in said and "are the same" not in said


def test_what_a_run_has_not_recorded_is_no_difference(made):
    curves = {"loss": {1: 1.0, 2: 2.0}}
    made.add("a", {"x": 1}, curves, batches={"on_policy": [[True]] * 2, "batches": [[["p", "r"]]] * 2})
    made.add("going", {"x": 1}, curves, status="RUNNING")
    made.add("baseline", {"x": 1})
    said = made.said("a", "going", "baseline")
    assert re.search(r" 0 +\? +\? +\? +never +\? +\? +2\b", said) and "?: a run has not recorded it" in said
    assert said.count("has logged no train/loss") == 1 and said.count("has no predictions") == 3


def test_values_and_names_in_brackets_are_shown_as_they_are(made):
    made.add("x[/y]", {"stop": "[/INST]", "pad": "[pad]"}, params={"k": "[a]"}, tags={"countdown_kd.state": "[/z]"})
    made.add("b", {"stop": "[/s]", "pad": "[eos]"}, params={"k": "[/b]"}, status="FAILED")
    said = made.said("x[/y]", "b")
    assert all(word in said for word in ("[/INST]", "[pad]", "[eos]", "k-[a]", "k-[/b]"))
    assert "no[/y]: no run by that id or name" in made.said("no[/y]", "b", code=2)


def test_a_name_longer_than_a_files_may_be_is_a_name(made):
    long = ",".join(f"trainer.key_{i}=1" for i in range(30))
    made.add(long, {"x": 1})
    made.add("b", {"x": 1})
    assert "The configs are the same." in made.said(long, "b")


def test_a_name_that_two_runs_have_is_refused_and_an_unknown_one_answered_with_near_ones(made):
    ids = [made.add("twice", {"x": 1}) for _ in range(2)]
    said = one_line(made.said("twice", "b", code=2))
    assert "2 runs are called so" in said and all(run_id[:8] in said for run_id in ids)
    said = one_line(made.said("twise", "b", code=2))
    assert "Near: twice" in said and "mlflow.db" in said and "4 or more" in said


def test_a_run_that_went_on_with_other_values_is_said_to(made):
    run_id = made.add("a", {"threads": 2})
    made.client.log_dict(run_id, {"threads": 2}, "config/effective_from_step_4.yaml")
    made.client.log_dict(run_id, {"threads": 8}, "config/effective_from_step_12.yaml")
    made.add("b", {"threads": 2})
    assert "went on from a checkpoint with other values: threads: 2 → 8" in made.said("a", "b")


def test_the_figure_belongs_to_the_sweep_that_was_named_also_where_its_cells_are_anothers(made):
    first = made.add("first", tags={"countdown_kd.kind": "sweep"})
    cells = [
        made.add(name, {"x": 1}, params={"seed": name}, tags={tracking.PARENT_TAG: first, tracking.IDENTITY_TAG: name})
        for name in "12"
    ]
    tags = {"countdown_kd.kind": "sweep", tracking.SHARED_TAG: " ".join(cells)}
    second = made.add("second", tags=tags)
    made.said("second")
    assert not made.client.list_artifacts(first)
    assert [each.path for each in made.client.list_artifacts(second)] == ["compare.png"]


def test_repeats_are_told_apart_in_the_outcomes(made):
    curves = {"loss": {1: 1.0}}
    ids = [made.add(name, {"x": 1}, curves, {"precision": "fp32"}) for name in "ab"]
    outcomes = made.said("a", "b").partition("Outcomes")[2]
    assert all(run_id[:8] in outcomes for run_id in ids)


def test_in_steps_of_both_kinds_each_kinds_own_loss_is_followed(made):
    config, losses = {"x": 1}, {"loss": {1: 1.0, 2: 1.5, 3: 1.0}}
    a = made.add("a", config, losses | {"on_policy_loss": {1: 1.0, 2: 2.0}, "off_policy_loss": {2: 1.0, 3: 1.0}})
    losses = {"loss": {1: 1.0, 2: 1.6, 3: 1.0}}
    b = made.add("b", config, losses | {"on_policy_loss": {1: 1.0, 2: 2.2}, "off_policy_loss": {2: 1.0001, 3: 1.0}})
    part = parting(made.side(a), made.side(b), dict.fromkeys((1, 2, 3), 1e-6))
    assert part.losses == {"all": 2, "on-policy": 2, "off-policy": None}, "0.0001 is how TRL rounds"


def test_noise_is_what_repeats_of_the_same_config_and_code_have_parted_by_so_far(made):
    tags, config = {tracking.IDENTITY_TAG: "i"}, {"beta": 0}

    def add(losses, config=config):
        return made.add("x", config, {"loss": dict(enumerate(losses, start=1))}, tags=tags)

    one, same = add([1.0, 1.0, 1.0, 1.0]), add([1.0, 1.0, 2.0, 2.0])
    add([9.0] * 4, {"beta": 0, "code": "other"})
    sides = made.side(one), made.side(same)
    noise, pairs = noise_of(*sides)
    assert pairs == 0 and parting(*sides, noise).losses["all"] == 3, "they do not excuse themselves"
    add([1.0, 1.1, 1.0, 1.0])
    noise, pairs = noise_of(*(made.side(run_id) for run_id in (one, same)))
    assert pairs == 2 and noise == pytest.approx({1: 1e-6, 2: 0.1 / 1.1, 3: 0.5, 4: 0.5})


def test_of_many_sides_it_is_said_which_have_which_value(made):
    assert by_value([1, 1, True, 2, 1]) == "1: 1–2, 5\nTrue: 3\n2: 4"
    for i in range(12):
        made.add(f"r{i}", {"optim": "adamw_torch" if i < 11 else "sgd"}, params={"seed": str(i)})
    said = made.said(*(f"r{i}" for i in range(12)), width=80)
    assert "adamw_torch: 1–11" in said and "sgd: 12" in said and "12  seed-11" in said


def test_the_seconds_of_each_phase_stand_beside_the_outcomes(made):
    for name in "ab":
        made.add(name, {"x": 1}, params={"gen": name}, metrics={"perf/phase/generate_s": 0.61})
    assert re.search(r"gen-a +0.61 +–", made.said("a", "b"))


def test_files_are_compared_without_a_store(tmp_path):
    for name, beta in (("a", 0), ("b", 1)):
        (tmp_path / f"{name}.yaml").write_text(f"beta: {beta}")
    launch = Launcher(tmp_path)
    assert "beta" in command(launch, "a.yaml", "b.yaml").stdout
    assert not (tmp_path / "mlflow.db").exists()


# ------------------------------------------------------------------------------------------------
# Runs


@pytest.fixture(scope="module")
def runs(launch_once):
    for overrides in (("seed=1",), ("seed=1", "force=true"), ("seed=1", "trainer.learning_rate=1e-4")):
        result = launch_once(*overrides, *SHORT)
        assert result.returncode == 0, result.stderr
    return launch_once, [run.info.run_id for run in launch_once.runs("cell")]


def curve(printed: str) -> list[str]:
    """draws, puzzles, rollouts, and the losses: the row under the table of first steps that differ."""
    lines = printed[printed.index("roll-") :].splitlines()
    return next(line for line in lines if line.split()[-1:] == ["6"]).split()[-7:-1]


def test_two_runs_of_one_config_are_told_to_agree(runs):
    launch, (one, again, _) = runs
    result = command(launch, one, again)
    assert result.returncode == 0, result.stderr
    assert "The configs are the same." in result.stdout
    assert curve(result.stdout) == ["never"] * 6
    assert "0 puzzles gained, 0 lost" in result.stdout


def test_the_key_that_differs_and_the_step_where_the_losses_part(runs):
    launch, (one, _, other) = runs
    result = command(launch, one[:8], other[:8])
    assert result.returncode == 0, result.stderr
    assert "learning_rate" in result.stdout and "the size of an update" in result.stdout
    assert "logging_steps" not in result.stdout and "output_dir" not in result.stdout
    draws, puzzles, rollouts, loss, *_ = curve(result.stdout)
    # The first update has warm-up's learning rate 0; from the second on the weights differ.
    assert (draws, puzzles) == ("never", "never") and int(loss) in (2, 3)
    assert rollouts == "never" or int(rollouts) >= int(loss)
    assert re.search(r"learning_rate-1e-4 +\S+ +1 ", result.stdout), "one pair of repeats"
    assert "--all" in result.stdout
    assert "output_dir" in command(launch, one, other, "--all").stdout


def test_mistakes_are_told(runs, tmp_path):
    launch, (one, *_) = runs
    for arguments, word in (
        (("nonsense", one), "no run by that id or name"),
        ((one,), "1 to compare"),
        ((str(tmp_path / "missing.yaml"), one), "no such file"),
    ):
        result = command(launch, *arguments)
        assert result.returncode == 2 and word in " ".join(result.stdout.split()) and "Traceback" not in result.stderr


def test_a_run_is_found_by_its_name(runs):
    launch, (one, _, other) = runs
    launch.client.set_tag(other, "mlflow.runName", "it's=another")
    assert "learning_rate" in command(launch, one, "it's=another").stdout
    assert "no run by that" in command(launch, one, "it_s=another").stdout


def test_another_set_of_puzzles_and_an_unfinished_run_are_said(runs):
    launch, (one, *_) = runs
    result = launch("seed=1", *SHORT[:2], "eval.num_puzzles=10")
    assert result.returncode == 0, result.stderr
    other = launch.runs("cell")[-1].info.run_id
    launch.client.update_run(other, status="RUNNING")
    result = command(launch, one, other)
    assert "has not finished (RUNNING)" in result.stdout
    assert "evaluated on other puzzles" in result.stdout


def test_a_sweep_is_compared_by_its_cells(tmp_path):
    launch = Launcher(tmp_path)
    assert launch("-m", "baseline=student,teacher", "eval.num_puzzles=30").returncode == 0
    result = command(launch, launch.runs("sweep")[0].info.run_id)
    assert result.returncode == 0, result.stderr
    assert "baseline-student → baseline-teacher" in result.stdout
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    (sweep,) = launch.runs("sweep")
    assert "compare.png" in [file.path for file in launch.client.list_artifacts(sweep.info.run_id)]
