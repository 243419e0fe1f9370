"""One run, top to bottom: data, models, evaluate, distil, evaluate.

    python -m countdown_kd.run outputs/…/cell.yaml

launch.py starts this in a process of its own, under torchrun for dist=ddp, with MLFLOW_RUN_ID set; what is
written down on the way is in record.py.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import warnings
from pathlib import Path

import datasets
import mlflow
import torch
from accelerate import Accelerator
from omegaconf import DictConfig, OmegaConf
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
    set_seed,
)
from transformers.utils.logging import disable_progress_bar
from trl.experimental.gold import GOLDConfig
from vllm.distributed import cleanup_dist_env_and_memory

from countdown_kd.checkpoint import Checkpoints, Stopped, train
from countdown_kd.config import instantiate
from countdown_kd.data import Data
from countdown_kd.engine import VLLM, make_vllm
from countdown_kd.evaluate import Evaluation, evaluate, hf_sampler, vllm_sampler
from countdown_kd.gold import CountdownTrainer
from countdown_kd.launching.cell import die_with_parent
from countdown_kd.launching.folder import STOPPED_FILE, last_checkpoint, owner, step_of
from countdown_kd.progress import Bar
from countdown_kd.record import RecordSteps, record_config, record_evaluation, record_training

log = logging.getLogger("countdown_kd")


def run(cfg: DictConfig) -> None:
    """Distil the teacher into the student on Countdown; metrics and artifacts go to the active MLflow run."""
    set_seed(cfg.seed)
    # GOLDConfig checks its values before anything is loaded; bf16 without a GPU wants to be told of the CPU.
    use_cpu = cfg.trainer.get("use_cpu", False) or not torch.cuda.is_available()
    args: GOLDConfig = instantiate(cfg.trainer, use_cpu=use_cpu)
    data: Data = instantiate(cfg.task)
    log.info(
        "%d training and %d test puzzles (fingerprint %s)",
        len(data.train), len(data.test), data.fingerprint,
    )  # fmt: skip
    if cfg.baseline:
        return run_baseline(cfg, args, data)

    student, tokenizer = load(cfg.model)
    teacher, teacher_tokenizer = load(cfg.teacher)
    args.teacher_tokenizer_name_or_path = cfg.teacher.pretrained_model_name_or_path
    trainer = CountdownTrainer(
        model=student,
        teacher_model=teacher,
        args=args,
        gen=cfg.gen,
        step=cfg.step,
        train_dataset=data.conversations(),
        processing_class=tokenizer,
        callbacks=[steps := RecordSteps()],
    )
    if (gpus := torch.cuda.device_count()) > args.world_size and not trainer.is_model_parallel:
        log.info("training on %d of the %d GPUs here; dist=ddp trains on all of them", args.world_size, gpus)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Progress())
    trainer.add_callback(Checkpoints(trainer))
    folder = Path(args.output_dir)
    checkpoint = last_checkpoint(folder, owner(folder).get("run_id", ""))
    engine = trainer.vllm_generation if trainer.use_vllm else None
    models = {"student": (student, tokenizer), "teacher": (teacher, teacher_tokenizer)}
    record_config(cfg, args, data, models, engine, resumed_at=step_of(checkpoint))

    disable_progress_bar()  # transformers' own: a bar for every checkpoint
    if checkpoint is None:
        before = evaluated("before training", cfg, args, data, student, tokenizer, engine)
        record_evaluation("eval_before", before)

    try:
        train(trainer, checkpoint)
    finally:
        steps.write()
    record_training(trainer)

    after = evaluated("after training", cfg, args, data, student, tokenizer, engine)
    record_evaluation("eval", after)

    if trainer.accelerator.is_main_process:
        # Not save_model, which pickles the training arguments beside the weights.
        student.save_pretrained(folder / "student")
        tokenizer.save_pretrained(folder / "student")


def run_baseline(cfg: DictConfig, args: GOLDConfig, data: Data) -> None:
    """Evaluate the student or the teacher as it is: a row to compare trained students with."""
    accelerator = Accelerator()
    model, tokenizer = load(cfg.teacher if cfg.baseline == "teacher" else cfg.model)
    model.to(accelerator.device)
    engine = make_vllm(model, tokenizer, accelerator, args, cfg.gen) if args.use_vllm else None
    record_config(cfg, args, data, {cfg.baseline: (model, tokenizer)}, engine)
    result = evaluated(cfg.baseline, cfg, args, data, model, tokenizer, engine)
    record_evaluation("eval", result)


def load(kwargs: DictConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer by from_pretrained's arguments."""
    model = AutoModelForCausalLM.from_pretrained(**kwargs)
    shared = {key: kwargs[key] for key in ("revision", "trust_remote_code") if key in kwargs}
    tokenizer = AutoTokenizer.from_pretrained(kwargs.pretrained_model_name_or_path, **shared)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def evaluated(
    description: str,
    cfg: DictConfig,
    args: GOLDConfig,
    data: Data,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    engine: VLLM | None,
) -> Evaluation:
    """The held-out puzzles, answered through the cell's own generation backend."""
    if engine is not None:
        sampler = vllm_sampler(engine, cfg.eval, description)
    else:
        sampler = hf_sampler(model, tokenizer, cfg.eval, args.bf16, description)
    result = evaluate(sampler, model, tokenizer, data.test, cfg.eval)
    log.info("%s: %s", description, result)
    return result


class Progress(ProgressCallback):
    """The trainer's progress with the loss beside it, instead of a printed dictionary a step."""

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero:
            self.training_bar = Bar(state.max_steps, "training", "step")
        self.current_step = 0

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.4f}", refresh=False)


def leave_signals_to_the_launcher() -> None:
    """Live exactly as long as the process that started us.

    Slurm sends its signals (SIGTERM and SIGUSR2 before a preemption) to every process of a job; dying of them would
    lose the step. Whoever supervises us asks for a checkpoint instead (cell.ask_to_stop).
    """
    die_with_parent(ctypes.CDLL(None))
    rank = os.getpid()
    for number in (signal.SIGTERM, signal.SIGUSR2):
        if signal.getsignal(number) is signal.SIG_IGN:  # our supervisor in a Slurm job ignores it for us
            # Not for processes forked from here: worker pools are ended with SIGTERM.
            signal.signal(number, lambda number, _: os.getpid() == rank or os._exit(128 + number))


def main(config_file: str) -> None:
    cfg = OmegaConf.load(config_file)
    is_rank_0 = int(os.environ.get("RANK", 0)) == 0
    logging.basicConfig(
        level=logging.INFO if is_rank_0 else logging.WARNING,
        format="[%(asctime)s] %(message)s",
        datefmt="%H:%M:%S",
        handlers=[
            logging.StreamHandler(),
            logging.FileHandler(Path(config_file).with_name("run.log")),
        ],
    )
    # What libraries say at every run and nobody can act on.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true but no accelerator")
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
    if not sys.stderr.isatty():  # what takes long is told by lines (progress.py)
        disable_progress_bar()
        datasets.disable_progress_bars()
    leave_signals_to_the_launcher()
    if is_rank_0:
        # summary.idle_gpus reads them. Without a GPU, whoever wants MLflow's system metrics sets its own variable.
        mlflow.start_run(log_system_metrics=torch.cuda.is_available() or None)
    try:
        run(cfg)
    except Stopped as stopped:
        log.info("%s", stopped)
        if is_rank_0:
            Path(config_file).with_name(STOPPED_FILE).touch()
    except Exception:
        log.exception("the run failed")
        sys.exit(1)
    finally:
        if is_rank_0:
            # Closing it is for whoever started this process: for a moment, a cell that is stopped to go on later
            # would be FAILED, and a launcher that looks at it just then would go home.
            mlflow.end_run("RUNNING")
    if torch.distributed.is_initialized():
        # A thread of gloo's that still holds tensors when Python ends aborts the process. This joins them all, vLLM's
        # or not; only destroying the group does not, as long as anything still holds one.
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main(sys.argv[1])
