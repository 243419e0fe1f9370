"""Every config in the repository composes and means what it says; every mistake is told before anything is loaded."""

import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import option_names
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, MissingConfigException
from hydra.types import RunMode
from omegaconf import OmegaConf

from countdown_kd import config
from countdown_kd.config import ROOT, ConfigError, identity, validate
from countdown_kd.declared import gold_config_fields
from countdown_kd.launching.sweep import compose_all, grid

GROUPS = ("task", "model", "teacher", "precision", "gen", "dist", "eval", "experiment")
OPTIONS = [(group, option) for group in GROUPS for option in option_names(group)]
SWEEPS = sorted((ROOT / "sweeps").glob("*.yaml"))
PROMISED = {
    "task": {"tiny", "h4", "jsonl"},
    "model": {"tiny", "qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-7b", "llama3.2-1b"},
    "teacher": {"tiny", "qwen3-4b", "qwen2.5-7b"},
    "precision": {"bf16", "bf16_pure", "fp32"},
    "gen": {"hf", "vllm", "vllm_server"},
    "dist": {"single", "ddp"},
}


def test_every_promised_option_exists():
    for group, options in PROMISED.items():
        assert options <= set(option_names(group))


@pytest.fixture
def jsonl_pair(tmp_path, monkeypatch):
    """train.jsonl and test.jsonl in the current folder."""
    monkeypatch.chdir(tmp_path)
    messages = '[{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]'
    (tmp_path / "train.jsonl").write_text(f'{{"nums": [1, 2], "target": 3, "messages": {messages}}}\n')
    (tmp_path / "test.jsonl").write_text('{"nums": [1, 2], "target": 1}\n')


@pytest.mark.parametrize("group, option", OPTIONS, ids=lambda value: value)
def test_every_option_composes_to_a_valid_cell(cell, jsonl_pair, group, option):
    files = ["task.train_file=train.jsonl", "task.test_file=test.jsonl"] if option == "jsonl" else []
    validate(cell(f"{group}={option}", *files))


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.stem)
def test_every_sweep_opens_with_its_question_and_command_and_its_cells_are_valid(cell, file):
    lines = file.read_text().splitlines()
    assert lines[1].startswith("# ") and "?" in lines[1]
    assert f"python launch.py +sweeps={file.stem}" in file.read_text()
    params = OmegaConf.load(file).hydra.sweeper.params
    swept = OverridesParser.create().parse_overrides([f"{key}={values}" for key, values in params.items()])
    first = [o.value().start if o.is_interval_sweep() else next(o.sweep_string_iterator()) for o in swept]
    validate(cell(*(f"{o.key_or_group}={value}" for o, value in zip(swept, first, strict=True))))


@pytest.mark.parametrize(
    "precision, weights, autocast, rollouts",
    [
        ("fp32", "float32", False, "float32"),
        ("bf16", "float32", True, "bfloat16"),
        ("bf16_pure", "bfloat16", False, "bfloat16"),
    ],
)
@pytest.mark.parametrize("gen", ["hf", "vllm"])
def test_precision_sets_weights_autocast_and_rollouts(cell, precision, weights, autocast, rollouts, gen):
    cfg = cell(f"precision={precision}", f"gen={gen}")
    assert (cfg.model.dtype, cfg.trainer.bf16, cfg.gen.dtype) == (weights, autocast, rollouts)
    validate(cfg)


@pytest.mark.parametrize(
    "overrides, said",
    [
        (["+trainer.lmbd=0.3"], "trainer.lmbd: GOLDConfig has no such field; did you mean lmbda?"),
        (["precision=bf16", "model.dtype=bfloat16"], "Use precision=bf16 (fp32 weights"),
        (["trainer.num_generations=5"], "Make num_generations a divisor of 16"),
        (["+trainer.generation_batch_size=3"], "are not the 16 sequences of an optimizer step"),
        (["gen.dtype=bfloat16"], "with gen=hf the student itself samples, in float32"),
        (["task=jsonl"], "task.train_file, task.test_file must be given"),
        (["model.pretrained_model_name_or_path=/no/such"], "/no/such: the folder does not exist"),
        (["teacher.pretrained_model_name_or_path=./conf"], "./conf: the folder has no config.json"),
        (["baseline=both"], "baseline=both: it must be student or teacher, or null"),
        (["eval.rule=once"], "eval.rule=once: it must be exactly_once or at_most_once"),
        (["eval.num_puzzles=0"], "eval.num_puzzles=0: it must be greater than 0"),
        (["eval.batch_size=0"], "eval.batch_size=0: it must be greater than 0"),
        (["eval.max_new_tokens=0"], "eval.max_new_tokens=0: it must be greater than 0"),
        (["eval.max_new_tokens=128"], "leaves no room for a prompt"),
        (["+trainer.hub_token=hf_x"], "Set it in the environment instead (HF_TOKEN, or `hf auth login` once)"),
        (["gen.steps_per_rollout=0"], "gen.steps_per_rollout=0: it must be greater than 0"),
        (["step.fused_loss=false"], "step.teacher_batch_size=32: TRL's loss wants whole logits. Set step.teach"),
        (["step.teacher_batch_size=0"], "step.teacher_batch_size=0: it must be greater than 0, or null"),
        (["step.student_batch_size=1.5"], "step.student_batch_size=1.5: it must be a valid integer, or null"),
        (["trainer.save_total_limit=1"], "trainer.save_total_limit=1: the only checkpoint is removed before"),
        (["dist.nproc_per_node=0"], "dist.nproc_per_node=0: it must be gpu or greater than 0"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_mistake_is_named_with_its_value_its_rule_and_its_fix(cell, monkeypatch, overrides, said):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError, match=re.escape(said)):
        validate(cell(*overrides))


def test_all_mistakes_are_told_at_once(cell):
    with pytest.raises(ConfigError) as error:
        validate(cell("eval.rule=once", "trainer.num_generations=5"))
    assert len(str(error.value).splitlines()) == 2


def test_a_missing_vllm_is_told(cell, monkeypatch):
    monkeypatch.setattr("countdown_kd.config.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="vLLM is not installed. Run `make setup`"):
        validate(cell("gen=vllm"))


def test_an_option_that_does_not_exist_is_answered_with_those_that_do(cell):
    with pytest.raises(MissingConfigException, match="qwen2.5-0.5b"):
        cell("model=qwen")


def test_a_key_that_does_not_exist_is_refused(cell):
    with pytest.raises(ConfigCompositionException, match="lmbd"):
        cell("trainer.lmbd=0.3")


def test_the_field_names_read_from_source_are_those_of_the_class():
    from dataclasses import fields

    from trl.experimental.gold import GOLDConfig

    assert set(gold_config_fields()) == {field.name for field in fields(GOLDConfig) if field.init}


def test_help_and_composing_import_no_torch():
    code = (
        "import runpy, sys\n"
        "try:\n    runpy.run_path('launch.py', run_name='__main__')\n"
        "except SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules and 'mlflow' not in sys.modules"
    )
    for arguments in (["--help"], ["gen=vllm", "--cfg", "job"]):
        result = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert "vllm" in result.stdout


def test_every_command_that_the_readme_quotes_composes(cell, jsonl_pair):
    readme = (ROOT / "README.md").read_text().replace("\\\n", "")  # a command may go on in the next line
    commands = re.findall(r"python launch\.py([^\n`#]*)", readme)
    assert len(commands) > 5
    for command in commands:
        words = shlex.split(command)
        overrides = [word.split(",")[0] for word in words if "=" in word and not word.startswith(("+sweeps", "hydra"))]
        validate(cell(*overrides))
        for word in words:
            if word.startswith("+sweeps="):
                assert (ROOT / "sweeps" / f"{word.removeprefix('+sweeps=')}.yaml").exists()


# ------------------------------------------------------------------------------------------------
# What a cell is known by


@pytest.mark.parametrize(
    "override",
    [
        "hydra.run.dir=/elsewhere", "tracking.experiment=other", "force=true", "trainer.logging_steps=5",
        "trainer.save_steps=0.5", "trainer.report_to=mlflow", "trainer.output_dir=/elsewhere", "hydra/launcher=slurm",
    ],
)  # fmt: skip
def test_launcher_paths_and_logging_do_not_change_what_a_cell_is(cell, override):
    assert identity(cell(override)) == identity(cell())


@pytest.mark.parametrize(
    "override",
    [
        "seed=1", "precision=bf16", "gen=vllm", "trainer.lmbda=0.25", "eval.num_puzzles=10", "dist=ddp",
        "task.num_train=100", "+trainer.weight_decay=0.1", "baseline=student", "trainer.learning_rate=1e-4",
        "trainer.logging_nan_inf_filter=true",
    ],
)  # fmt: skip
def test_whatever_matters_to_the_result_changes_what_a_cell_is(cell, override):
    assert identity(cell(override)) != identity(cell())


def test_a_local_file_counts_by_its_content(cell, jsonl_pair, tmp_path):
    task = ("task=jsonl", "task.train_file={0}/train.jsonl", "task.test_file={0}/test.jsonl")
    (tmp_path / "copy").mkdir()
    for name in ("train.jsonl", "test.jsonl"):
        shutil.copy(tmp_path / name, tmp_path / "copy")
    here, there = (identity(cell(*(each.format(folder) for each in task))) for folder in (".", tmp_path / "copy"))
    assert here == there
    with open(tmp_path / "copy" / "test.jsonl", "a") as file:
        file.write('{"nums": [1, 2], "target": 2}\n')
    config._digest.cache_clear()
    assert identity(cell(*(each.format(tmp_path / "copy") for each in task))) != here


def test_a_file_below_the_home_folder_counts_by_its_content(cell, jsonl_pair, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    files = "task=jsonl task.train_file='{0}/train.jsonl' task.test_file='{0}/test.jsonl'"
    assert identity(cell(*files.format("~").split())) == identity(cell(*files.format(tmp_path).split()))


def test_files_of_one_size_that_differ_in_a_few_bytes_are_two(cell, tmp_path):
    """Up to 64 MiB every byte counts. The files are sparse: only the changed bytes take room."""
    known = []
    for changed_at in (None, 3 * 2**20 // 2, 61 * 2**20):
        file = tmp_path / f"{changed_at}.jsonl"
        with open(file, "wb") as stream:
            stream.truncate(64 * 2**20)
            if changed_at:
                stream.seek(changed_at)
                stream.write(b"other")
        known.append(identity(cell("task=jsonl", f"task.train_file={file}", "task.test_file=x")))
    assert len(set(known)) == 3


def test_cells_composed_together_are_what_hydra_composes():
    """Values, options, additions, deletions, hydra's own keys, a group's option among values."""
    arguments = [
        "seed=1,2", "precision=bf16,fp32", "+trainer.weight_decay=0.1", "gen=vllm", "~trainer.optim", "task.num_test=5",
        "hydra.job.name=some", "trainer={temperature: 0.5}", "eval=sampled,greedy", "eval.num_puzzles=7",
    ]  # fmt: skip
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        master = hydra.compose_config("config", arguments, run_mode=RunMode.MULTIRUN)
        cells = grid(master)
        loader = GlobalHydra.instance().config_loader()
        plain = [loader.load_sweep_config(master, list(cell)) for cell in cells]
        ours = compose_all(master, cells)
        assert len(cells) == 8
        names = [str(cell.hydra.job.override_dirname) for cell in ours]
        assert names[0] == "seed-1+precision-bf16+eval-sampled", "what was swept, in the order in which it was typed"
        for one, other, overrides in zip(ours, plain, cells, strict=True):
            one.hydra.job.override_dirname = other.hydra.job.override_dirname
            assert OmegaConf.to_container(one) == OmegaConf.to_container(other)
            assert loader.load_sweep_config(master, overrides) is one, "Hydra finds what is composed"
