import os
import subprocess
import sys
import time

import pytest

from countdown_kd import doctor
from countdown_kd.doctor import BAD, GOOD, OPEN
from countdown_kd.launching.slurm import query

WITHOUT_TORCH = """
import sys
from countdown_kd.__main__ import main
code = main(["doctor", *sys.argv[1:]])
assert "torch" not in sys.modules
sys.exit(code)
"""


@pytest.fixture
def look(tmp_path):
    """``look("KEY=VALUE", …)`` is what the doctor ends with and prints, in a folder of its own."""

    def run(*overrides: str, **environment: str) -> tuple[int, str]:
        # No line is broken: what is looked for in them would be too.
        given = {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db", "COLUMNS": "400"} | environment
        done = subprocess.run(
            [sys.executable, "-c", WITHOUT_TORCH, *overrides],
            cwd=tmp_path, env=os.environ | given, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert not done.stderr
        return done.returncode, done.stdout

    return run


def test_all_is_there_for_the_tiny_pair(look, tmp_path):
    code, out = look()
    assert code == 0, out
    for line in ("✓ versions", "✓ MLflow store", "✓ model", "✓ teacher"):
        assert line in out
    assert "✗" not in out and "Slurm" not in out


def test_what_is_missing_comes_with_what_to_do_and_no_password(look):
    begun = time.time()
    code, out = look(
        "model.pretrained_model_name_or_path=./nowhere", "teacher=qwen3-4b", "task=h4",
        MLFLOW_TRACKING_URI="http://somebody:swordfish@127.0.0.1:9",
    )  # fmt: skip
    assert code == 1 and out.count("✗") == 4, out
    assert "✗ MLflow store       http://***@127.0.0.1:9" in out and "MLFLOW_TRACKING_URI must be" in out
    assert "✗ model              ./nowhere: no such folder" in out
    assert "with internet: hf download Qwen/Qwen3-4B-Instruct-2507" in out
    assert "load_dataset('HuggingFaceTB/Countdown-Task-GOLD'" in out
    assert "swordfish" not in out and "somebody" not in out
    assert time.time() - begun < 100


def test_what_is_on_the_hub_only_is_no_mistake_online(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    line = doctor.model("teacher", "Some/Model", "abc123")
    assert line.mark == OPEN and "the first run downloads it" in line.found
    assert line.fix == "beforehand: hf download Some/Model --revision abc123"


def test_a_model_in_the_cache_is_there_only_if_it_is_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", tmp_path)
    cached = tmp_path / "models--Some--Model"
    snapshot = cached / "snapshots" / "abc"
    for folder in (cached / "refs", snapshot):
        folder.mkdir(parents=True)
    (cached / "refs" / "main").write_text("abc")
    for file in ("config.json", "model-1-of-2.safetensors"):
        (snapshot / file).touch()
    assert doctor.model("model", "Some/Model", "main").mark == GOOD
    assert doctor.model("model", "Some/Model", "another").mark == BAD
    index = '{"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}'
    (snapshot / "model.safetensors.index.json").write_text(index)
    line = doctor.model("model", "Some/Model", "main")
    assert line.mark == BAD and "no model-2-of-2.safetensors" in line.found


def test_a_version_that_does_not_fit_is_named(cell, monkeypatch):
    real = doctor.version
    monkeypatch.setattr(doctor, "version", lambda package: "5.99" if package == "transformers" else real(package))
    (line,) = doctor.versions(cell(), print)
    assert line.mark == BAD
    assert "countdown-kd wants transformers" in line.found and "there is 5.99" in line.found
    assert "vllm" in line.found


def test_a_database_on_a_network_file_system_is_seen(tmp_path):
    mounts = tmp_path / "mounts"
    mounts.write_text(
        "/dev/sda1 / ext4 rw 0 0\nserver:/home /home nfs4 rw 0 0\ntmpfs /home/me/local tmpfs rw 0 0\n"
        "lustre /my\\040scratch lustre rw 0 0\n"
    )
    kinds = {"/data": "", "/home/me": "nfs4", "/home/me/local/x": "", "/my scratch/x": "lustre", "/homes": ""}
    for path, kind in kinds.items():
        assert doctor.network_file_system(doctor.database(f"sqlite:///{path}"), mounts) == kind


@pytest.mark.parametrize(
    "asked, timeout_min, mark, found",
    [
        (None, 60, GOOD, "main (default)"),
        ("long,main", 60, GOOD, "long: up, limit 2-00:00:00, main: up"),
        ("main", 91, BAD, "main: up, limit 1:30:00; timeout_min is 91"),
        ("main,gpu", 60, BAD, "no gpu on this cluster"),
        ("off", 60, BAD, "off: down"),
    ],
)
def test_a_partition_must_be_there_and_let_jobs_run_so_long(asked, timeout_min, mark, found):
    rows = [["main*", "1:30:00", "up"], ["long", "2-00:00:00", "up"], ["off", "infinite", "down"]]
    line = doctor.partition(rows, asked, timeout_min)
    assert line.mark == mark and found in line.found


def test_limits_are_minutes():
    limits = {"30:00": 30, "1:30:00": 90, "2-01:00:00": 49 * 60, "0:30": 0.5, "infinite": float("inf")}
    assert {limit: query.minutes(limit) for limit in limits} == limits


@pytest.mark.parametrize(
    "asked, torch, mark",
    [
        (1, '["2.13.0+cpu", false, []]', OPEN),
        (2, '["2.13.0", true, ["H200", "H200"]]', GOOD),
        (2, '["2.13.0", true, ["H200"]]', BAD),
        (1, '["2.13.0", true, ["H200", "H200"]]', OPEN),
        (0, '["2.13.0", true, []]', OPEN),
    ],
)
def test_a_job_must_see_the_gpus_it_asked_for(asked, torch, mark):
    assert doctor.gpus_in_job(asked, "0", 0, f"a warning\n{torch}\n", "").mark == mark


def test_gpus_that_torch_cannot_use_are_told_with_its_reason():
    line = doctor.gpus_in_job(1, None, 1, "", "Traceback …\nRuntimeError: driver too old\n")
    assert line.mark == BAD and "driver too old" in line.found


def test_what_does_not_answer_is_not_waited_for():
    begun = time.time()
    assert doctor.told("sleep", "60", seconds=0.2)[0] == 124
    with pytest.raises(TimeoutError):
        doctor.within(0.2, time.sleep, 5)
    assert time.time() - begun < 5
    assert doctor.told("no-such-program") == (127, "", "no no-such-program")


# ------------------------------------------------------------------------------------------------
# With a Slurm

SLURM = ("hydra/launcher=slurm", "hydra.launcher.cpus_per_task=1", "hydra.launcher.mem_gb=2")


def test_a_probe_job_tells_what_a_job_sees_and_leaves_nothing_behind(look, slurm, tmp_path):
    code, out = look(*SLURM, **slurm.env)
    assert code == 0, out
    for line in (
        "– MLflow store", "✓ Slurm", "✓ accounting", "✓ partition          main (default)", "✓ job  ",
        f"✓ job: shared folder {tmp_path}", "✓ job: MLflow store", "✓ job: files", "✓ job: CPUs",
    ):  # fmt: skip
        assert line in out
    # Of the GPUs that this Slurm pretends to have, a build of torch for CPUs says nothing.
    assert "job: GPUs" in out and "CUDA_VISIBLE_DEVICES=0" in out
    assert not (tmp_path / ".doctor").exists()


def test_a_partition_that_does_not_exist_is_named_and_no_job_submitted(look, slurm):
    jobs = slurm.run("sacct", "-n", "-X", "-a")
    code, out = look(*SLURM, "hydra.launcher.partition=gpu", **slurm.env)
    assert code == 1, out
    assert "✗ partition          no gpu on this cluster" in out and "hydra.launcher.partition=main|urgent" in out
    assert "job:" not in out and slurm.run("sacct", "-n", "-X", "-a") == jobs


def test_a_job_that_slurm_refuses_is_told_in_its_words(look, slurm, tmp_path):
    code, out = look(*SLURM, "hydra.launcher.gpus_per_node=4", **slurm.env)
    assert code == 1 and "✗ job                not taken: " in out, out
    assert "Requested node configuration is not available" in out
    assert not (tmp_path / ".doctor").exists()


def test_a_probe_that_fails_keeps_its_log(look, slurm, tmp_path):
    code, out = look(*SLURM, "hydra.launcher.setup=[echo no such module, exit 3]", **slurm.env)
    assert code == 1 and "FAILED 3:0" in out, out
    assert "no such module" in out
    (log,) = tmp_path.glob(".doctor/*/*_log.out")
    assert str(log) in out


def test_a_job_without_the_store_is_told(look, slurm):
    code, out = look(*SLURM, "hydra.launcher.setup=[unset MLFLOW_TRACKING_URI]", **slurm.env)
    assert code == 1 and "✗ job: MLflow store  MLFLOW_TRACKING_URI is not set there" in out, out
    assert "--export=NONE" in out
