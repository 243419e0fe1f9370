"""A config runs nothing but what this program names, and holds no secret."""

import pytest
from conftest import option_names
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from countdown_kd.config import ROOT, ConfigError, instantiate, masked, plain, validate
from countdown_kd.declared import TARGETS
from countdown_kd.parity_report import parity

HF_TOKEN = "hf_" + "aB3" * 11


def composed(overrides):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", overrides, return_hydra_config=True)


def told(cfg) -> str:
    with pytest.raises(ConfigError) as error:
        validate(cfg)
    return str(error.value)


# ------------------------------------------------------------------------------------------------
# What is called


def test_what_conf_names_is_what_is_allowed():
    named = {
        group: {OmegaConf.load(ROOT / f"conf/{group}/{option}.yaml")["_target_"] for option in option_names(group)}
        for group in TARGETS
    }
    assert named == {group: set(targets) for group, targets in TARGETS.items()}


@pytest.mark.parametrize("key", ["task", "trainer", "task.seed", "trainer.report_to", "trainer.accelerator_config.x"])
@pytest.mark.parametrize("behind", ["nothing", "a list", "a reference"])
def test_nothing_else_is_instantiated(tmp_path, key, behind):
    (tmp_path / "from").write_text("")
    harm = {"_target_": "shutil.copyfile", "src": str(tmp_path / "from"), "dst": str(tmp_path / "to")}
    cfg = OmegaConf.merge(OmegaConf.create(plain(composed([]))), {"harm": harm})
    group = key.partition(".")[0]
    value = {"nothing": harm, "a list": {"x": [[harm]]}, "a reference": "${harm}"}[behind]
    OmegaConf.update(cfg, key, value, merge=False, force_add=True)
    with pytest.raises(ConfigError, match=r"_target_=(shutil\.copyfile|None): "):
        instantiate(cfg[group])
    assert "shutil.copyfile: " in told(cfg)
    assert not (tmp_path / "to").exists()


def test_what_conf_names_is_instantiated():
    cfg = composed(["task.num_train=3", "task.num_test=2"])
    assert len(instantiate(cfg.task).train) == 3
    assert len(instantiate(cfg.task, num_train=2).train) == 2


@pytest.mark.parametrize(
    "override, said",
    [
        (
            "task._target_=torch.load",
            "task._target_=torch.load: it must be countdown_kd.data.generated, countdown_kd.d",
        ),
        (
            "trainer._target_=builtins.dict",
            "trainer._target_=builtins.dict: it must be trl.experimental.gold.GOLDConfig",
        ),
        ("task._target_=countdown_kd.data.Path", "task._target_=countdown_kd.data.Path: it must be"),
        ("+task.x={_target_: os.system}", "task.x._target_=os.system: nothing is called here; leave it out"),
        ("+model._target_=os.system", "model._target_=os.system: nothing is called here; leave it out"),
        (
            "+trainer.lr_scheduler_kwargs={a: [{_target_: os.system}]}",
            "lr_scheduler_kwargs.a[0]._target_=os.system: not",
        ),
    ],
)
def test_another_target_on_the_command_line_is_told(override, said):
    assert said in told(composed([override]))


def test_a_file_given_to_parity_runs_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pickle").write_text("")
    cfg = OmegaConf.create(plain(composed([])))
    cfg.task = {"_target_": "shutil.copyfile", "src": "pickle", "dst": "copied"}
    (tmp_path / "composed.yaml").write_text(OmegaConf.to_yaml(cfg))
    assert parity(["", "composed.yaml"], composed) == 2
    assert "task._target_=shutil.copyfile: it must be countdown_kd.data" in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "copied").exists()


def test_nothing_instantiates_past_the_list():
    """hydra.utils.instantiate has one caller."""
    sources = [*(ROOT / "countdown_kd").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py"), ROOT / "launch.py"]
    callers = [path.name for path in sources if "hydra.utils" in path.read_text()]
    assert callers == ["config.py"]


# ------------------------------------------------------------------------------------------------
# What is told to nobody


@pytest.mark.parametrize(
    "override",
    [
        "+model.token=hf_abc", "+teacher.use_auth_token=abc", "+trainer.hub_token=abc",
        "+trainer.push_to_hub_token=abc", "+task.password=abc", "+gen.api_key=abc", "+eval.client_secret=abc",
        "+dist.access_key=abc",
        "+model.quantization_config={hub_token: abc}", f"+trainer.run_name={HF_TOKEN}", f"task.puzzles=x-{HF_TOKEN}",
        f"+model.proxies={{http: 'http://abc:{HF_TOKEN}@proxy:80'}}", f"tracking.experiment={HF_TOKEN}",
        "+trainer.vllm_server_base_url='http://user:abc@host:8001'", "+hydra.job.env_set.HF_TOKEN=abc",
        "+hydra.job.env_set.WANDB_API_KEY=abc", f"+hydra.launcher.setup=['export HF_TOKEN={HF_TOKEN}']",
    ],
)  # fmt: skip
def test_a_secret_is_refused_without_being_repeated(override):
    message = told(composed([override]))
    key = override.lstrip("+").partition("=")[0]
    assert f"{key}" in message and "a secret, and configs are stored and shown. Set it in the environment" in message
    assert "abc" not in message and HF_TOKEN not in message


@pytest.mark.parametrize(
    "override",
    [
        "+model.token=true", "+model.token=null", "+trainer.eos_token=x", "+trainer.pad_token=x",
        "+trainer.hub_token=null", "+trainer.include_num_input_tokens_seen=all", "+trainer.vllm_server_base_url='http://host:8001/v1'",
        "tracking.uri='postgresql://user:password@host/db'", "+trainer.run_name=hf_models", "+model.key_mapping={a: b}",
        "trainer.uld_token_merge_strategy=observed", "+trainer.vllm_server_base_url='http://host/@scope'",
    ],
)  # fmt: skip
def test_what_only_looks_like_a_secret_is_taken(override):
    validate(composed([override]))


def test_passwords_and_tokens_are_masked():
    assert masked("sqlite:////a@b/c.db at http://u:p/w@d@host:5000/x, mail me@here") == (
        "sqlite:////a@b/c.db at http://***@host:5000/x, mail me@here"
    )
    assert masked(f"token={HF_TOKEN}.") == "token=hf_***."
    assert masked("Qwen/Qwen2.5-7B, hf_models/x, trainer.beta=0.5") == "Qwen/Qwen2.5-7B, hf_models/x, trainer.beta=0.5"
