"""Runs and configs side by side."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Launcher
from omegaconf import OmegaConf
from rich.console import Console
from scipy.stats import binomtest

from countdown_kd.compare import interval, mcnemar, moved_table
from countdown_kd.config import ConfigError, gold_config_fields
from countdown_kd.differences import COSMETIC, LOSS, NOISE, SPEED, differences
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


@pytest.mark.parametrize("text", ["nothing here", "GOLDConfig(" + "(" * 100_000 + ")", "GOLDConfig(\n" + "x" * 10**6])
def test_text_without_a_config_is_told_and_never_run(tmp_path, text):
    (tmp_path / "x.txt").write_text(text)
    with pytest.raises(ConfigError, match="no config in it"):
        read_configs(tmp_path / "x.txt")


@pytest.mark.parametrize("name, text", [("x.yaml", "- 1"), ("x.json", "{"), ("y.yaml", "a: [")])
def test_a_file_that_is_no_config_is_told(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=name):
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
    lines = printed[printed.index("of steps") :].splitlines()
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
    assert "of 1 repeated runs" in result.stdout and "--all" in result.stdout
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
    assert "baseline=student → baseline=teacher" in result.stdout
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    (sweep,) = launch.runs("sweep")
    assert "compare.png" in [file.path for file in launch.client.list_artifacts(sweep.info.run_id)]
