"""Stopping between two steps, and going on as if nothing had been."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from countdown_kd.config import ROOT
from countdown_kd.gold import CountdownTrainer
from countdown_kd.launching.folder import MARKER, STOP_FILE, mark_whole, owner, step_of

# With several ranks Trainer loads an optimizer to "its" device, which torch knows for cuda:0 but not for cpu:0.
torch.serialization.register_package(
    0, lambda storage: None, lambda storage, location: storage if location.startswith("cpu:") else None
)


class Stopped(Exception):
    """The run was asked to stop and has saved a checkpoint to go on from."""


class Checkpoints(TrainerCallback):
    """Adds to the trainer's checkpoints what is ours, and saves one when the launcher asks the run to stop."""

    def __init__(self, trainer: CountdownTrainer):
        self.trainer = trainer
        self.stop_file = Path(trainer.args.output_dir) / STOP_FILE
        self.wanted = False  # a checkpoint, at some step since the last one

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.wanted |= control.should_save
        asked = self._asked_to_stop()
        # A checkpoint does not keep the rollouts that wait for their steps: it waits for the last of these.
        ready = not self.trainer.rollouts_ahead
        control.should_save = ready and (self.wanted or asked)
        control.should_training_stop |= ready and asked
        self.wanted &= not ready

    def _asked_to_stop(self) -> bool:
        # Rank 0 decides: the ranks would see the file at different steps and wait for each other.
        asked = [self.stop_file.exists()]
        if self.trainer.args.world_size > 1:
            broadcast_object_list(asked)
        return asked[0]

    def on_save(self, args, state, control, **kwargs) -> None:
        # Written last and in one piece, after every rank has saved its generators: its presence says that the
        # checkpoint is whole.
        self.trainer.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            ours = {
                "clock": self.trainer.clock.state(),
                "draws": self.trainer.draws,
                "batches": self.trainer.batches,
                "max_steps": state.max_steps,
            }
            folder = Path(args.output_dir)
            checkpoint = folder / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            mark_whole(checkpoint, owner(folder).get("run_id", ""), code=ROOT.name, state=ours)


def train(trainer: CountdownTrainer, checkpoint: Path | None) -> None:
    """Train from the start or from a checkpoint to the end; raises Stopped where the launcher asks for it."""
    if checkpoint is not None:
        ours = json.loads((checkpoint / MARKER).read_text())
        trainer.clock.load_state(ours["clock"])
        trainer.draws, trainer.batches = ours["draws"], ours["batches"]
        trainer.epochs_done = int(TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)).epoch)
        if step_of(checkpoint) >= ours["max_steps"]:
            # Trainer would take one step too many from here.
            trainer._load_from_checkpoint(str(checkpoint))
            return
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    if trainer.state.global_step < trainer.state.max_steps:
        raise Stopped(f"stopped after step {trainer.state.global_step} of {trainer.state.max_steps}, with a checkpoint")
