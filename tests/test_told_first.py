"""Mistakes are told before anything is loaded, by whoever declares what is right."""

import copy
import inspect
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import MISSING, fields

import pytest
from conftest import option_names
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from countdown_kd import libraries
from countdown_kd.config import ROOT, ConfigError, _settings, problems, validate
from countdown_kd.declared import from_pretrained, gold_config_fields
from countdown_kd.pretrained import token_counter

MESSAGES = '[{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]'
GROUPS = sorted(
    path.name for path in (ROOT / "conf").iterdir() if path.is_dir() and path.name not in ("hydra", "sweeps")
)
OPTIONS = [f"{group}={option}" for group in GROUPS for option in option_names(group)]


def told(cfg) -> str:
    with pytest.raises(ConfigError) as error:
        validate(cfg)
    return str(error.value)


# ------------------------------------------------------------------------------------------------
# At once: names, types, what this program cannot do


@pytest.mark.parametrize(
    "override, said",
    [
        ("seed=-1", "seed=-1: it must be greater than or equal to 0"),
        ("seed=abc", "seed=abc: it must be a valid integer"),
        ("trainer.max_steps=five", "trainer.max_steps=five: it must be -1 or a valid integer"),
        ("trainer.max_steps=-3", "trainer.max_steps=-3: it must be -1 or greater than 0"),
        ("trainer.bf16=maybe", "trainer.bf16=maybe: it must be a valid boolean, or null"),
        ("trainer.learning_rate='1e-4'", "trainer.learning_rate=1e-4: it must be a valid number"),
        ("+trainer.run_name=5", "trainer.run_name=5: it must be a valid string, or null"),
        ("trainer.max_completion_length=0", "trainer.max_completion_length=0: it must be greater than 0"),
        ("+trainer.vllm_mode=both", "trainer.vllm_mode=both: it must be colocate or server"),
        ("step.fused_loss=hello", "step.fused_loss=hello: it must be a valid boolean"),
        ("step.teacher_batch_size=0", "step.teacher_batch_size=0: it must be greater than 0, or null"),
        ("+step.bar=2", "step.bar: there is no such key; there is fused_loss, completion_logits"),
        ("+eval.num_puzzels=10", "eval.num_puzzels: there is no such key; did you mean num_puzzles?"),
        ("eval.temperature=-1", "eval.temperature=-1: it must be greater than or equal to 0"),
        ("eval.top_p=0", "eval.top_p=0: it must be greater than 0"),
        ("+gen.foo=1", "gen.foo: there is no such key; there is dtype, max_num_seqs, steps_per_rollout"),
        ("gen.dtype=int8", "gen.dtype=int8: it must be float32, bfloat16"),
        ("+dist.nproc=2", "dist.nproc: there is no such key; there is nproc_per_node"),
        ("dist.nproc_per_node=all", "dist.nproc_per_node=all: it must be gpu or a valid integer"),
        ("+tracking.url=x", "tracking.url: there is no such key; did you mean uri?"),
        ("+task.num_trian=5", "task.num_trian: generated() has no such argument; did you mean num_train?"),
        ("task.num_train=0", "task.num_train=0: it must be greater than 0"),
        ("task.puzzles=large", "task.puzzles=large: it must be tiny or public"),
        ("+model.lora_r=8", "model.lora_r: neither from_pretrained nor the model's config.json knows it"),
        ("+model.revison=x", "did you mean revision?"),
        ("+teacher.variants=x", "teacher.variants: neither from_pretrained nor the model's config.json knows it; did"),
        ("+model.revision=1234567", "model.revision=1234567: it must be a valid string"),
        ("model.dtype=float33", "model.dtype=float33: it must be float32, bfloat16"),
        ("+sead=1", "sead: there is no such key; did you mean seed?"),
        ("+trainer.seq_kd=true", "trainer.seq_kd=true: GOLDTrainer does not read it. Leave it out"),
        ("+trainer.loss_type=dft", "trainer.loss_type=dft: GOLD has a loss of its own"),
        ("+trainer.label_smoothing_factor=0.1", "trainer.label_smoothing_factor=0.1: GOLD has a loss of its own"),
        ("+trainer.model_init_kwargs={dtype: auto}", "the student is loaded by model.*"),
        ("+trainer.teacher_model_name_or_path=x", "the teacher is loaded by teacher.*"),
        ("+trainer.eval_strategy=steps", "trainer.eval_strategy=steps: the student is evaluated before and after"),
        ("+trainer.packing=true", "trainer.packing=true: GOLD compares sequence by sequence. Leave it out"),
        ("+trainer.fsdp=full_shard", "one a GPU with the whole model (dist=ddp)"),
        ("+trainer.deepspeed=zero.json", "one a GPU with the whole model (dist=ddp)"),
    ],
)
def test_a_mistake_is_told_at_once(cell, override, said):
    message = told(cell(override))
    assert said in message and len(message.splitlines()) == 1


def test_a_static_cache_under_autocast_is_told(cell):
    message = told(cell("gen.cache_implementation=static", "precision=bf16"))
    assert "Use precision=bf16_pure, precision=fp32 or gen=vllm" in message
    validate(cell("gen.cache_implementation=static", "precision=bf16_pure"))


def test_every_unknown_key_of_every_group_is_told(cell):
    groups = ("eval", "model", "teacher", "gen", "step", "task", "dist", "tracking", "trainer")
    message = told(cell(*(f"+{group}.zzz=1" for group in groups)))
    assert {line.partition(":")[0] for line in message.splitlines()} == {f"{group}.zzz" for group in groups}


def test_what_follows_from_a_mistake_is_not_told_again(cell):
    """task.seed and trainer.seed take the seed's value, task.num_test takes that of eval.num_puzzles."""
    lines = told(cell("seed=abc", "eval.num_puzzles=0")).splitlines()
    assert sorted(lines) == ["eval.num_puzzles=0: it must be greater than 0", "seed=abc: it must be a valid integer"]


def test_an_engine_over_several_ranks_is_refused(cell):
    overrides = ("gen=vllm", "+trainer.vllm_tensor_parallel_size=2", "dist=ddp")
    assert "trainer.vllm_tensor_parallel_size=2: an engine over several ranks" in told(cell(*overrides))
    validate(cell("gen=vllm_server", *overrides[1:]))


@pytest.mark.parametrize(
    "overrides",
    [
        ["+model.revision=main", "+model.variant=fp16", "+model.device_map=auto", "+model.use_safetensors=true"],
        ["+model.quantization_config={load_in_4bit: true}", "+model.token=true", "+model.cache_dir=x"],
        ["+model.num_hidden_layers=2", "+model.output_attentions=true", "+teacher.rope_scaling=null"],
        ["model.attn_implementation=eager", "+teacher.max_memory={0: 1GB}", "+model.code_revision=x"],
        ["~trainer.num_generations", "~trainer.optim"],
        ["+trainer.lr_scheduler_kwargs={}", "+trainer.include_for_metrics=[]", "trainer.temperature=1"],
    ],
    ids=lambda value: value[0],
)
def test_what_the_libraries_know_is_left_to_them(cell, overrides):
    validate(cell(*overrides))


def test_subfolders_and_configs_that_are_not_here_are_not_taken_for_mistakes(cell):
    validate(cell("model=qwen2.5-1.5b", "+model.subfolder=x", "+model.output_hidden_states=true"))
    assert "model.num_hidden_layers" in told(cell("model=qwen2.5-1.5b", "+model.num_hidden_layers=2"))


def test_fields_read_from_source_have_the_classes_types_and_defaults():
    from transformers import PreTrainedModel
    from trl.experimental.gold import GOLDConfig

    read = gold_config_fields()
    for each in fields(GOLDConfig):
        found = read[each.name]
        if each.default is not MISSING and found.default is not None:
            assert found.default == getattr(each.default, "value", each.default), each.name
        if found.type in (bool, int, float, str):
            assert each.type in (found.type, found.type.__name__), each.name
    known, kinds = set(from_pretrained().model_fields), inspect.Parameter
    named = inspect.signature(PreTrainedModel.from_pretrained).parameters.values()
    assert {each.name for each in named if each.kind is kinds.KEYWORD_ONLY} < known
    assert {"attn_implementation", "device_map", "subfolder", "code_revision", "trust_remote_code"} < known


def test_nothing_of_it_imports_torch_or_takes_long():
    code = (
        "import sys, time; from hydra import compose, initialize_config_dir\n"
        "from countdown_kd.config import ROOT, register_resolvers, validate\n"
        "register_resolvers()\n"
        "with initialize_config_dir(str(ROOT / 'conf'), version_base='1.3'):\n"
        "    cells = [compose('config', ['gen=vllm']), compose('config', ['experiment=lab_native'])]\n"
        "began = time.process_time()\n"
        "for cfg in cells: validate(cfg)\n"
        "print(time.process_time() - began)\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 1.5


# ------------------------------------------------------------------------------------------------
# What files tell


@pytest.fixture
def files(tmp_path, monkeypatch):
    """``files(train=[...], test=[...])`` writes the rows' prompts and completions; the overrides that name them."""
    monkeypatch.chdir(tmp_path)

    def write(train: list[tuple[str, str]], test: list[str]) -> list[str]:
        with open("train.jsonl", "w") as file:
            for number, (prompt, completion) in enumerate(train):
                messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
                file.write(json.dumps({"nums": [1, 2], "target": number, "messages": messages}) + "\n")
        with open("test.jsonl", "w") as file:
            for number, prompt in enumerate(test):
                file.write(json.dumps({"nums": [1, 2], "target": -1 - number, "prompt": prompt}) + "\n")
        return ["task=jsonl", "task.train_file=train.jsonl", "task.test_file=test.jsonl"]

    return write


def test_a_row_that_fills_max_length_alone_is_named(cell, files):
    task = files([("?", "!"), ("1 2 3 4 5 " * 30, "!"), ("?", "1 + 2 + " * 30)], ["?", "7 8 9 " * 60])
    lines = told(cell(*task)).splitlines()
    assert re.fullmatch(
        r"train.jsonl, line 2: the prompt alone has \d{3} tokens; trainer.max_length=128 is .*", lines[0]
    )
    assert lines[1].startswith("train.jsonl, line 3: the completion alone has ") and len(lines) == 2
    lines = told(cell("gen=vllm", *task)).splitlines()
    assert lines[2].startswith("test.jsonl, line 2: the prompt alone has ")
    validate(cell(*task, "trainer.max_length=2000"))
    validate(cell(*task, "trainer.max_length=null"))
    validate(cell(*task, "baseline=student"))


def test_many_rows_that_are_too_long_take_three_lines(cell, files):
    lines = told(cell(*files([("1 2 3 4 5 " * 30, "!")] * 9, ["?"]))).splitlines()
    assert len(lines) == 3 and lines[0].endswith("(6 more rows)")


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_tokens_are_counted_as_transformers_counts_them(side):
    from transformers import AutoTokenizer

    folder = ROOT / "countdown_kd/tiny" / side
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = [{"role": "user", "content": "Numbers: 1 2 3\n\ttarget: 6 é 😀 <|im_end|>"}]
    answer = [{"role": "assistant", "content": "<answer>1 + 2 + 3 = 6</answer>"}]
    own, others = token_counter({"pretrained_model_name_or_path": str(folder)}, 1)(prompt, answer)
    asked = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template(prompt + answer, return_dict=False)
    assert (own, own + others) == (len(asked), len(whole))


def folder(path, config=None, pre_tokenizer=None, **more):
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "gemma2"} | (config or {})))
    if pre_tokenizer:
        (path / "tokenizer.json").write_text(json.dumps({"pre_tokenizer": {"type": pre_tokenizer}, "decoder": None}))
    for name in more:
        (path / name.replace("_", ".")).write_bytes(b"\n")
    return f"pretrained_model_name_or_path={path}"


def test_a_tokenizer_that_is_no_byte_level_bpe_is_refused(cell, tmp_path):
    said = "its tokenizer is no byte-level BPE (Qwen, Llama 3, …), which extended ULD takes alone. Set"
    metaspace = folder(tmp_path / "metaspace", pre_tokenizer="Metaspace")
    sentencepiece = folder(tmp_path / "sentencepiece", tokenizer_model=b"")
    for model in (metaspace, sentencepiece):
        assert said in told(cell(f"teacher.{model}")) and said in told(cell(f"model.{model}"))
        validate(cell(f"teacher.{model}", "+trainer.use_extended_uld=false"))
        validate(cell(f"teacher.{model}", "trainer.use_uld_loss=false"))
        validate(cell(f"teacher.{model}", "baseline=teacher"))
    validate(cell(f"teacher.{folder(tmp_path / 'bytes', pre_tokenizer='ByteLevel')}"))
    validate(cell(f"teacher.{folder(tmp_path / 'nothing')}"))


def test_logits_that_are_capped_are_refused_where_they_are_computed_from_hidden_states(cell, tmp_path):
    capped = folder(tmp_path / "capped", {"final_logit_softcapping": 30.0})
    nested = folder(tmp_path / "nested", {"text_config": {"final_logit_softcapping": 30.0}})
    for model in (capped, nested):
        assert "(final_logit_softcapping). Set step.teacher_batch_size=null" in told(cell(f"teacher.{model}"))
        validate(cell(f"teacher.{model}", "step.teacher_batch_size=null"))
        validate(cell(f"model.{model}"))
        assert "Set step.chunked_logits=false" in told(cell(f"model.{model}", "step.chunked_logits=true"))


# ------------------------------------------------------------------------------------------------
# By the libraries themselves, in one process

REFUSED = {
    "trainer.lmbda=1.5": "trainer.lmbda=1.5: lmbda must be in the range [0.0, 1.0]",
    "trainer.beta=2.0": "trainer.beta=2.0: beta must be in the range [0.0, 1.0]",
    "trainer.learning_rate=-1": "trainer.learning_rate=-1: Invalid learning rate: -1",
    "+trainer.adam_beta1=2": "trainer.adam_beta1=2: Invalid beta parameter",
    "trainer.per_device_train_batch_size=0": "trainer.per_device_train_batch_size=0: generation_batch_size must be at",
    "trainer.num_generations=0": "trainer.num_generations=0: num_generations must be at least 1",
    "trainer.temperature=-1": "trainer.temperature=-1: temperature must be non-negative",
    "trainer.temperature=0": "trainer.temperature=0: `temperature` (=0) has to be a strictly positive float",
    "trainer.top_p=1.5": "trainer.top_p=1.5: top_p must be in (0, 1]",
    "trainer.top_k=-2": "trainer.top_k=-2: top_k must be 0 (disable), or at least 1",
    "trainer.uld_token_merge_strategy=foo": 'uld_token_merge_strategy must be either "observed" or "bayesian"',
    "trainer.optim=adam": "trainer.optim=adam: adam is not a valid OptimizerNames, please select one of",
    "+trainer.optim_args=foo": "trainer.optim_args=foo: ",
    "trainer.lr_scheduler_type=cosin": "please select one of ['linear', 'cosine'",
    "+trainer.lr_scheduler_kwargs={cycles: 1}": "got an unexpected keyword argument 'cycles'",
    "+trainer.accelerator_config={foo: 1}": "got an unexpected keyword argument 'foo'",
    "+trainer.packing_strategy=foo": "trainer.packing_strategy=foo: it must be one of bfd, bfd_split, wrapped",
    "+trainer.dataloader_num_workers=-1": "num_workers option should be non-negative",
    "trainer.report_to=wandb": "trainer.report_to=wandb: WandbCallback requires wandb to be installed",
    "gen.cache_implementation=foo": "gen.cache_implementation=foo: Invalid `cache_implementation` (foo)",
    "gen=vllm trainer.temperature=-1": "trainer.temperature=-1: temperature must be non-negative",
    "gen=vllm trainer.vllm_gpu_memory_utilization=1.5": "trainer.vllm_gpu_memory_utilization=1.5: Input should be less",
    "gen=vllm gen.dtype=float64": "gen.dtype=float64: vLLM samples in auto, half",
    "trainer.seed=-1": "trainer.seed=-1: Seed must be between 0 and 2**32 - 1",
}
SEVERAL = "trainer.lmbda=1.5 trainer.beta=2.0 trainer.learning_rate=-1"
ON_A_CPU = {"+trainer.fp16=true": "trainer.fp16=true: fp16 needs a GPU; on a CPU it does nothing"}
TAKEN = [
    *OPTIONS, "precision=bf16,gen=vllm".replace(",", " "), "trainer.use_uld_loss=false", "trainer.max_grad_norm=0.1",
    "+trainer.weight_decay=0.1", "trainer.gradient_checkpointing=true", "+trainer.eos_token='<|eot_id|>'",
    "gen=vllm trainer.temperature=0", "~trainer.optim ~trainer.num_generations", "trainer.report_to=mlflow",
    "gen.cache_implementation=static", "+trainer.push_to_hub=true", "+trainer.neftune_noise_alpha=5",
    "+trainer.torch_compile=true", "+trainer.full_determinism=true", "+trainer.auto_find_batch_size=true",
    "+trainer.optim_target_modules=[c_attn]", "trainer.optim=adafactor", "trainer.max_length=null",
    "+trainer.dataloader_num_workers=2 +trainer.dataloader_prefetch_factor=2",
]  # fmt: skip


def composed(overrides: str):
    words = re.findall(r"(?:[^\s{]|\{[^}]*\})+", overrides)
    files = ["task.train_file=train.jsonl", "task.test_file=test.jsonl"] if "task=jsonl" in words else []
    return compose("config", [*words, *files], return_hydra_config=True)


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """What ``problems`` says to every case, how many processes that and a second call took, and the cells."""
    here = tmp_path_factory.mktemp("told_first")
    (here / "train.jsonl").write_text(f'{{"nums": [1, 2], "target": 3, "messages": {MESSAGES}}}\n')
    (here / "test.jsonl").write_text('{"nums": [1, 2], "target": 1}\n')
    started = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(here / "cache"))
        patch.chdir(here)
        run = subprocess.run
        patch.setattr(libraries.subprocess, "run", lambda *args, **kwargs: started.append(args) or run(*args, **kwargs))
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            cases = [*REFUSED, SEVERAL, *ON_A_CPU, *TAKEN]
            cells = [composed(case) for case in cases]
        first = problems(cells)
        after_first = len(started)
        again = problems(cells)
    return dict(zip(cases, first, strict=True)), after_first, len(started), again == first


@pytest.mark.parametrize("override", REFUSED)
def test_the_libraries_refuse(answered, override):
    assert REFUSED[override] in answered[0][override]
    assert len(answered[0][override].splitlines()) == 1


def test_the_libraries_refuse_every_value_of_several(answered):
    keys = [line.partition("=")[0] for line in answered[0][SEVERAL].splitlines()]
    assert keys == ["trainer.lmbda", "trainer.beta", "trainer.learning_rate"]


@pytest.mark.parametrize("override", TAKEN)
def test_the_libraries_take(answered, override):
    assert answered[0][override] == ""


def test_fp16_is_refused_on_a_machine_without_a_gpu(answered):
    import torch

    (override, said), *_ = ON_A_CPU.items()
    assert answered[0][override].startswith("" if torch.cuda.is_available() else said)


def test_one_process_answers_for_all_cells_and_none_the_second_time(answered):
    _, first, both, same = answered
    assert (first, both, same) == (1, 1, True)


def test_of_cells_elsewhere_nothing_is_asked_that_only_their_gpus_know():
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        here, there = (composed(f"+trainer.fp16=true {where}") for where in ("", "hydra/launcher=slurm"))
    assert _settings(here)["trainer"]["fp16"] and "use_cpu" not in _settings(here)["trainer"]
    assert "fp16" not in _settings(there)["trainer"] and _settings(there)["trainer"]["use_cpu"]


# ------------------------------------------------------------------------------------------------
# What is remembered of it


class Process:
    """Stands for the process that has the libraries: how often it was started and what it is asked."""

    def __init__(self, answers=lambda text: []):
        self.starts: list[list[str]] = []
        self.answers = answers

    def __call__(self, command, input, **kwargs):
        texts = input.splitlines()
        self.starts.append(texts)
        lines = [json.dumps(self.answers(text)) for text in texts]
        return subprocess.CompletedProcess(command, 0, "\n".join(lines), "")


@pytest.fixture
def process(monkeypatch, tmp_path):
    process = Process()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(libraries.subprocess, "run", process)
    return process


def test_a_hundred_learning_rates_take_one_process(cell, process):
    default = cell()
    cells = [copy.deepcopy(default) for _ in range(100)]
    for number, each in enumerate(cells):
        each.trainer.learning_rate = 1e-5 * (number + 1)
    began = time.process_time()
    assert problems([*cells, *cells]) == [""] * 200
    assert time.process_time() - began < 6
    assert [len(texts) for texts in process.starts] == [100], "the same config is asked for once"
    problems(cells)
    cells[0].trainer.lmbda = 0.25
    problems(cells)
    assert [len(texts) for texts in process.starts] == [100, 1]


def test_cells_that_are_wrong_without_the_libraries_are_not_asked_about(cell, process):
    found = problems([cell("seed=abc"), cell("seed=2"), cell("+eval.x=1")])
    assert [bool(problem) for problem in found] == [True, False, True] and [len(each) for each in process.starts] == [1]


def test_an_answer_is_remembered_for_one_environment(process, monkeypatch):
    process.answers = lambda text: ["no"]
    assert libraries.objections([{"trainer": {}}]) == [["no"]]
    monkeypatch.setattr(libraries, "_environment", lambda: "others")
    libraries.objections([{"trainer": {}}])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    libraries.objections([{"trainer": {}}])
    assert len(process.starts) == 3


@pytest.mark.parametrize("spoil", ["not JSON", '{"a": 1}', "[1]", "\xff"])
def test_what_is_remembered_and_broken_is_asked_again(process, tmp_path, spoil):
    settings = [{"trainer": {"max_steps": 1}}]
    libraries.objections(settings)
    (file,) = (tmp_path / "cache").rglob("*.json")
    file.write_text(spoil, encoding="latin-1")
    assert libraries.objections(settings) == [[]] and len(process.starts) == 2
    assert json.loads(file.read_text()) == [] and not list(file.parent.glob(f"*.{os.getpid()}"))


def test_without_a_place_to_remember_everything_is_asked(process, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        assert libraries.objections([{"trainer": {}}]) == [[]]
    assert len(process.starts) == 2


def test_a_process_that_dies_refuses_nothing_and_is_told_of(process, monkeypatch, caplog):
    def dies(command, input, **kwargs):
        return subprocess.CompletedProcess(command, -11, '["first"]\n["half of', "…\nSegmentation fault")

    monkeypatch.setattr(libraries.subprocess, "run", dies)
    settings = [{"trainer": {"max_steps": number}} for number in (1, 2, 3)]
    assert libraries.objections(settings) == [["first"], [], []]
    assert "2 configs are not checked by the libraries: Segmentation fault" in caplog.text
    monkeypatch.setattr(libraries.subprocess, "run", process)
    libraries.objections(settings)
    assert len(process.starts[0]) == 2, "only what was answered is remembered"


def test_composed_configs_of_runs_are_checked_like_new_ones(cell):
    """A cell.yaml has no launcher's part, and its values are resolved."""
    from countdown_kd.config import plain

    cfg = OmegaConf.create(OmegaConf.to_yaml(OmegaConf.create(plain(cell("experiment=lab_oumi")))))
    validate(cfg)
    cfg.trainer.max_steps = "five"
    assert told(cfg).startswith("trainer.max_steps=five")
