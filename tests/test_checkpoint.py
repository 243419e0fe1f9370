"""When a checkpoint is saved, what it waits for, and going on from each; with the trainer itself."""

import json
import multiprocessing
import os
import shutil
import socket
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from test_gold import make_trainer

from countdown_kd.checkpoint import Checkpoints, train
from countdown_kd.gold import CountdownTrainer
from countdown_kd.launching.folder import MARKER, discard_unusable, last_checkpoint, mark_whole

# Rollouts are for two steps each, and a save is due after 3, 6 and 9.
SHARED = (
    "trainer.max_steps=9", "trainer.save_steps=3", "trainer.save_total_limit=null", "gen.steps_per_rollout=2",
    "trainer.lmbda=0.7", "trainer.per_device_train_batch_size=4",
    "trainer.learning_rate=1e-2",
)  # fmt: skip


def start(folder: Path) -> CountdownTrainer:
    trainer = make_trainer(folder, *SHARED)
    trainer.add_callback(Checkpoints(trainer))
    return trainer


def weights(trainer: CountdownTrainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    trainer = start(tmp_path_factory.mktemp("straight"))
    train(trainer, None)
    return trainer


def test_a_save_that_falls_due_while_rollouts_wait_is_made_after_the_last_of_them(straight):
    saved = [marker.parent.name for marker in Path(straight.args.output_dir).glob(f"checkpoint-*/{MARKER}")]
    assert sorted(saved) == ["checkpoint-4", "checkpoint-6", "checkpoint-9"]


@pytest.mark.parametrize("step", [4, 6, 9])
def test_from_each_checkpoint_a_run_goes_on_to_the_same_end(straight, tmp_path, step):
    """Also from the last, after which there is no step left to take."""
    name = f"checkpoint-{step}"
    shutil.copytree(Path(straight.args.output_dir, name), tmp_path / name)
    resumed = start(tmp_path)
    train(resumed, last_checkpoint(tmp_path, ""))
    assert torch.equal(weights(resumed), weights(straight))
    kept = [json.dumps([each.draws, each.batches]) for each in (resumed, straight)]
    assert kept[0] == kept[1] and len(resumed.draws) == len(resumed.clock.step_s) == 9


@pytest.fixture
def saved(tmp_path):
    """``saved(step, run_id)`` is a whole checkpoint, saved by a run."""

    def save(step: int, run_id: str = "mine") -> Path:
        checkpoint = tmp_path / f"checkpoint-{step}"
        checkpoint.mkdir()
        (checkpoint / "model.safetensors").write_bytes(b"weights")
        mark_whole(checkpoint, run_id, code="", state={})
        return checkpoint

    return save


def test_the_newest_whole_checkpoint_of_ones_own_is_gone_on_from(saved, tmp_path):
    assert last_checkpoint(tmp_path, "mine") is None
    for step in (8, 10):
        saved(step)
    (tmp_path / "checkpoint-12").mkdir()  # the run was killed while it was written
    saved(14, "another")
    (saved(16) / "model.safetensors").write_bytes(b"wei")  # cut off
    assert last_checkpoint(tmp_path, "mine") == tmp_path / "checkpoint-10"


def test_what_cannot_be_gone_on_from_is_told_and_removed(saved, tmp_path, caplog):
    for step in (8, 10):
        saved(step)
    saved(14, "another")
    (saved(16) / "model.safetensors").write_bytes(b"wei")
    discard_unusable(tmp_path, "mine")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-8"]
    assert caplog.messages == [
        "checkpoint-14 is not used: it is run another's",
        "checkpoint-16 is not used: it is damaged: model.safetensors has 3 bytes instead of 7",
    ]


def one_of_two_ranks(rank: int, port: int, folder: Path) -> bool:
    """Train to the end, and again from the first checkpoint. The other rank takes its time over each checkpoint."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    save = CountdownTrainer._save_rng_state
    if rank == 1:
        CountdownTrainer._save_rng_state = lambda *arguments: (time.sleep(0.3), save(*arguments))
    straight = start(folder / "straight")
    train(straight, None)
    if rank == 0:
        shutil.copytree(folder / "straight" / "checkpoint-4", folder / "resumed" / "checkpoint-4")
    torch.distributed.barrier()
    resumed = start(folder / "resumed")
    train(resumed, last_checkpoint(folder / "resumed", ""))
    torch.distributed.destroy_process_group()
    return torch.equal(weights(resumed), weights(straight))


def test_two_ranks_mark_a_checkpoint_when_both_have_saved_theirs_and_go_on_from_it(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Processes of their own, as each has its rank in its environment, from one that has imported everything for both.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        same_end = list(pool.map(one_of_two_ranks, (0, 1), (port, port), (tmp_path, tmp_path), timeout=300))
    assert same_end == [True, True]
    markers = list((tmp_path / "straight").glob(f"checkpoint-*/{MARKER}"))
    assert len(markers) == 3
    for marker in markers:
        generators = [file.stat().st_mtime_ns for file in marker.parent.glob("rng_state_*.pth")]
        assert len(generators) == 2 and max(generators) <= marker.stat().st_mtime_ns
