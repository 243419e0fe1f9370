"""What we add to GOLDTrainer, with the trainer itself and vLLM's own engine."""

import math
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import open_dict
from transformers import TrainerCallback
from trl.experimental.gold import GOLDConfig

from countdown_kd import perf
from countdown_kd.checkpoint import Checkpoints, Stopped, train
from countdown_kd.config import ROOT, instantiate, register_resolvers
from countdown_kd.gold import CountdownTrainer, rollout_lengths
from countdown_kd.launching.folder import STOP_FILE, last_checkpoint
from countdown_kd.run import load
from countdown_kd.summary import PHASE_COLOURS

register_resolvers()  # also in the processes that are spawned below


def make_trainer(folder, *overrides) -> CountdownTrainer:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", ["task.num_train=64", "trainer.max_steps=4", *overrides])
    with open_dict(cfg):
        cfg.trainer.output_dir = str(folder)
    student, tokenizer = load(cfg.model)
    teacher, _ = load(cfg.teacher)
    return CountdownTrainer(
        model=student,
        teacher_model=teacher,
        args=instantiate(cfg.trainer, use_cpu=True),
        gen=cfg.gen,
        step=cfg.step,
        train_dataset=instantiate(cfg.task).conversations(),
        processing_class=tokenizer,
    )


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    trainer = make_trainer(tmp_path_factory.mktemp("trained"), "trainer.gradient_accumulation_steps=2")
    trainer.train()
    return trainer


def test_training_starts_as_trl_itself_does(tmp_path):
    """All on-policy draws equal (lambda 0): the losses are plain GOLDTrainer's, digit for digit."""
    from trl.experimental.gold import GOLDTrainer

    ours = make_trainer(tmp_path, "trainer.lmbda=0.0", "step=trl")
    theirs = make_trainer(tmp_path, "trainer.lmbda=0.0", "step=trl")
    for name in ("training_step", "compute_loss", "_fill_buffer", "_generate_on_policy_for_slices"):
        setattr(theirs, name, getattr(GOLDTrainer, name).__get__(theirs))
    ours.train()
    theirs.train()
    assert losses(ours) == losses(theirs)


# What is TRL's step in another form, and how far its losses and gradient norms may be off. In bf16 sums that are padded
# otherwise are rounded otherwise: after two updates TRL's own losses are 0.4 % from those in fp32.
SAME = {
    "step=fast": 1e-5,
    "step=fast step.chunked_logits=true": 1e-5,
    "step=fast trainer.use_uld_loss=false": 1e-5,
    "step=fast step.chunked_logits=true trainer.use_uld_loss=false": 1e-5,
    "step=fast trainer.uld_use_hybrid_loss=false": 1e-5,
    "step=fast +trainer.uld_crossentropy_weight=0.5": 1e-5,
    "step=fast precision=bf16": 2e-2,
    "step=fast step.chunked_logits=true precision=bf16": 2e-2,
    "step=fast precision=bf16_pure": 2e-2,
    "step.fused_loss=true": 1e-5,
    "step.completion_logits=true": 1e-5,
    "step.empty_cache=false": 0.0,
    "step.trim_padding=true": 1e-5,
    "step.cast_once=true precision=bf16": 0.0,
    "step.inference_mode=true": 0.0,
    "step.fused_loss=true step.teacher_batch_size=3": 1e-5,
    "step.student_batch_size=8": 1e-5,
    "step=fast step.student_batch_size=8": 1e-5,
    "step=fast step.student_batch_size=8 step.chunked_logits=true": 1e-5,
    "step=fast step.student_batch_size=8 trainer.use_uld_loss=false": 1e-5,
    "step=fast step.student_batch_size=8 precision=bf16": 2e-2,
    "step=fast step.student_batch_size=8 trainer.gradient_checkpointing=true": 1e-5,
}


@pytest.mark.parametrize("overrides", SAME)
def test_a_fast_step_is_trls(tmp_path, overrides):
    """Two micro-batches a step, one of them of the student's own in most."""
    few = (
        "trainer.gradient_accumulation_steps=2", "trainer.per_device_train_batch_size=4", "trainer.max_steps=3",
        "trainer.logging_steps=1",
    )  # fmt: skip
    start = [] if "step=" in overrides else ["step=trl"]
    fast = make_trainer(tmp_path, *few, *start, *overrides.split(), "step.rollouts_together=false")
    kept = (each for each in overrides.split() if not each.startswith("step"))
    plain = make_trainer(tmp_path, *few, *kept, "step=trl")
    fast.train()
    plain.train()
    assert fast.batches == plain.batches and {True, False} == set(sum(fast.draws, []))
    entries = [[each for each in trainer.state.log_history if "loss" in each] for trainer in (fast, plain)]
    for ours, trls in zip(*entries, strict=True):
        assert set(ours) == set(trls)
        for key in ("loss", "grad_norm", *(set(trls) & {"matched_loss", "unmatched_loss"})):
            rounded = 1e-4 if "matched" in key else 0  # TRL writes four digits
            assert ours[key] == pytest.approx(trls[key], rel=SAME[overrides], abs=rounded)


@pytest.mark.parametrize(("size", "passes"), [("null", 3), (3, 3), (4, 2), (64, 1)])
def test_micro_batches_share_a_pass_of_the_student(tmp_path, size, passes):
    """Three micro-batches of two sequences; at four sequences a pass the last is left alone."""
    trainer = make_trainer(
        tmp_path, "trainer.gradient_accumulation_steps=3", "trainer.per_device_train_batch_size=2",
        "trainer.lmbda=0.0", "trainer.max_steps=2", f"step.student_batch_size={size}",
    )  # fmt: skip
    seen = []
    trainer.model.register_forward_hook(lambda *_: seen.append(1))
    trainer.train()
    assert len(seen) == 2 * passes


@pytest.mark.parametrize("kind", ["step.rollouts_together=true", "gen.cache_implementation=static"])
def test_rollouts_in_one_batch_or_with_a_static_cache_are_the_same(tmp_path, kind):
    """Where nothing is left to chance."""
    few = (
        "trainer.gradient_accumulation_steps=3", "trainer.per_device_train_batch_size=2", "trainer.max_steps=2",
        "trainer.top_k=1",
    )  # fmt: skip
    found = []
    for changed in ((), (kind,)):
        trainer = make_trainer(tmp_path, *few, "step.rollouts_together=false", *changed)
        trainer.train()
        found.append(trainer)
    assert found[0].batches == found[1].batches and max(map(sum, found[1].draws)) > 1
    assert losses(found[0]) == pytest.approx(losses(found[1]), rel=1e-5)


def test_autocast_casts_a_weight_once_a_rollout(tmp_path):
    """And not once a token. The casts are gone when training begins, or its gradients would be."""
    casts = []
    for once in ("false", "true"):
        trainer = make_trainer(
            tmp_path, "precision=bf16", "trainer.lmbda=1", "trainer.max_steps=1", f"step.cast_once={once}",
            "step.rollouts_together=true",
        )  # fmt: skip
        trainer.train()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            trainer.clock.on_step_begin(None, None, None)
            trainer._rollouts.clear()
            trainer._fill_buffer(next(iter(trainer.get_train_dataloader())), 1)
        casts.append({each.key: each.count for each in profile.key_averages()}["aten::_to_copy"])
    linears = sum(isinstance(module, torch.nn.Linear) for module in trainer.model.modules())
    assert casts[0] - casts[1] > 10 * linears
    assert all(p.grad is None or p.grad.abs().sum() > 0 for p in trainer.model.parameters())


@pytest.mark.parametrize("steps_per_rollout", [2, 3])
def test_rollouts_of_several_steps_are_sampled_at_once(tmp_path, steps_per_rollout):
    """The first steps' rollouts are those that they have alone; draws and prompts are the same in all steps."""
    few = (
        "trainer.gradient_accumulation_steps=2", "trainer.per_device_train_batch_size=4", "trainer.max_steps=7",
        "trainer.lmbda=0.7", "trainer.top_k=1", "trainer.logging_steps=1", "task.num_train=40",
    )  # fmt: skip
    alone = make_trainer(tmp_path, *few)
    ahead = make_trainer(tmp_path, *few, f"gen.steps_per_rollout={steps_per_rollout}")
    sampled_at = []
    sample = ahead._sample
    ahead._sample = lambda step, *rest: (sampled_at.append(step), sample(step, *rest))
    alone.train()
    ahead.train()
    assert ahead.draws == alone.draws
    prompts = [[[prompt for prompt, _ in step] for step in trainer.batches] for trainer in (ahead, alone)]
    assert prompts[0] == prompts[1]
    # Five steps an epoch, which no rollout crosses.
    windows = {2: [[0, 1], [2, 3], [4], [5, 6]], 3: [[0, 1, 2], [3, 4], [5, 6]]}[steps_per_rollout]
    expected = {}
    for window in windows:
        on_policy = [step for step in window if any(ahead.draws[step])]
        expected |= {step: on_policy[0] for step in on_policy}
    assert sampled_at == sorted(set(expected.values()))
    staleness = {
        entry["step"] - 1: entry["rollout/staleness"]
        for entry in ahead.state.log_history
        if "rollout/staleness" in entry
    }
    assert staleness == {step: step - sampled for step, sampled in expected.items()}
    first = min(expected)
    assert ahead.batches[: first + 1] == alone.batches[: first + 1]


@pytest.mark.parametrize("overrides, stops_after", [((), 6), (("gen.steps_per_rollout=3", "trainer.lmbda=1"), 7)])
def test_a_run_goes_on_as_if_nothing_had_been(tmp_path, overrides, stops_after):
    """In the second epoch of two, and where rollouts wait for steps: then the checkpoint waits for the last of them."""

    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 5:
                Path(args.output_dir, STOP_FILE).touch()

    def start(name: str) -> CountdownTrainer:
        trainer = make_trainer(tmp_path / name, "trainer.max_steps=8", "trainer.save_steps=100", *overrides)
        trainer.add_callback(Checkpoints(trainer))
        return trainer

    straight = start("straight")
    train(straight, None)
    begun = start("interrupted")
    begun.add_callback(Stop())
    with pytest.raises(Stopped, match=f"after step {stops_after} of 8"):
        train(begun, None)
    (tmp_path / "interrupted" / STOP_FILE).unlink()
    resumed = start("interrupted")
    train(resumed, last_checkpoint(tmp_path / "interrupted", run_id=""))
    assert losses(resumed) == losses(straight)
    assert all(map(torch.equal, resumed.model.parameters(), straight.model.parameters()))


def test_steps_whose_longest_prompts_differ_share_their_rollouts(tmp_path):
    shared = make_trainer(
        tmp_path, "gen.steps_per_rollout=4", "trainer.per_device_train_batch_size=1", "trainer.lmbda=1.0"
    )
    batches = list(islice(shared.get_train_dataloader(), 4))
    assert len({batch["prompts"].shape[1] for batch in batches}) > 1
    shared.train()
    assert shared.state.global_step == 4 and all(map(math.isfinite, losses(shared)))


def test_a_step_of_shared_rollouts_is_as_long_as_their_mean():
    clock = perf.StepClock(steps_per_rollout=2)
    clock.step_s = [9.0] * 4 + [5.0, 1.0, 7.0, 1.0, 5.0, 1.0, 100.0]
    clock.phase_s = [{phase: 1.0 for phase in perf.PHASES}] * 11
    clock.rollout_tokens = [0] * 11
    assert clock.metrics(samples_per_step=4)["perf/s_per_it"] == 3.0


@pytest.mark.parametrize("overrides", [("step=fast",), ("step=trl",), ("step=fast", "trainer.use_uld_loss=false")])
def test_micro_batches_can_be_averaged(tmp_path, overrides):
    """The same eight sequences in one, two and four micro-batches have the same loss and the same gradient."""
    found = []
    for number in (1, 2, 4):
        trainer = make_trainer(
            tmp_path, *overrides, "step.average_micro_batches=true", "trainer.lmbda=0", "trainer.max_steps=1",
            f"trainer.gradient_accumulation_steps={number}", f"trainer.per_device_train_batch_size={8 // number}",
        )  # fmt: skip
        trainer.train()
        found.append([trainer.state.log_history[0][key] for key in ("loss", "grad_norm")])
    assert found[1] == pytest.approx(found[0], rel=1e-4) and found[2] == pytest.approx(found[0], rel=1e-4)


def test_no_logits_are_computed_at_the_prompt(tmp_path):
    seen = []
    for step in ("trl", "fast"):
        trainer = make_trainer(tmp_path, f"step={step}", "trainer.lmbda=0", "trainer.max_steps=1")
        trainer.model.lm_head.register_forward_hook(lambda _, __, logits: seen.append(logits.shape[1]))
        trainer.train()
    assert seen[1] < 0.7 * seen[0]


def test_a_process_that_sees_two_gpus_trains_on_one(tmp_path, monkeypatch, trained):
    made = GOLDConfig.__post_init__

    def on_two_gpus(self):
        made(self)
        self._n_gpu = 2  # as Trainer finds them, without ranks

    monkeypatch.setattr(GOLDConfig, "__post_init__", on_two_gpus)
    trainer = make_trainer(tmp_path, "trainer.gradient_accumulation_steps=2")
    trainer.train()
    assert losses(trainer) == losses(trained)


def test_draws_depend_on_seed_and_step_alone(tmp_path, trained):
    again = make_trainer(tmp_path, "trainer.gradient_accumulation_steps=2", "precision=bf16")
    again.train()
    other = make_trainer(tmp_path, "trainer.gradient_accumulation_steps=2", "seed=7")
    other.train()
    assert trained.draws == again.draws != other.draws
    assert [len(flags) for flags in trained.draws] == [2] * 4


@pytest.mark.parametrize(
    "precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16), ("bf16_pure", torch.bfloat16)]
)
def test_transformers_samples_in_the_rollout_dtype(tmp_path, precision, dtype):
    trainer = make_trainer(tmp_path, f"precision={precision}", "trainer.lmbda=1.0", "trainer.max_steps=1")
    seen = []
    projection = trainer.model.model.layers[0].mlp.gate_proj
    generate = trainer.generate_on_policy_outputs

    def watched(*args, **kwargs):
        handle = projection.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
        try:
            return generate(*args, **kwargs)
        finally:
            handle.remove()

    trainer.generate_on_policy_outputs = watched
    trainer.train()
    assert set(seen) == {dtype}


def test_phases_add_up_to_the_step_and_every_one_is_seen(trained):
    clock = trained.clock
    assert len(clock.step_s) == 4
    for step, phases in zip(clock.step_s, clock.phase_s, strict=True):
        assert sum(phases.values()) == pytest.approx(step)
    seen = set().union(*clock.phase_s)
    assert seen == set(perf.PHASES) - {"sync"}


def test_metrics_have_the_promised_names(trained):
    metrics = trained.clock.metrics(samples_per_step=32)
    phases = {f"perf/phase/{phase}_s" for phase in perf.PHASES}
    assert set(metrics) == phases | {
        "perf/s_per_it", "perf/samples_per_s", "perf/rollout_tokens_per_s", "perf/peak_memory_gib",
    }  # fmt: skip


def test_the_figure_has_a_colour_for_every_phase():
    assert tuple(PHASE_COLOURS) == perf.PHASES


def test_a_phase_inside_another_pauses_it():
    clock = perf.StepClock()
    clock.on_step_begin(None, None, None)
    with clock.phase("loss"):
        time.sleep(0.02)
        with clock.phase("teacher"):
            time.sleep(0.05)
        time.sleep(0.02)
    with clock.phase("generate"), clock.phase("student"):
        time.sleep(0.03)
    clock.on_step_end(None, None, None)
    (seconds,) = clock.phase_s
    assert set(seconds) == {"optimizer", "loss", "teacher", "generate"}, "sampling calls the student too"
    assert 0.04 <= seconds["loss"] and 0.05 <= seconds["teacher"] and 0.03 <= seconds["generate"]


def test_warm_up_is_left_out():
    clock = perf.StepClock()
    clock.step_s = [9.0, 9.0, 9.0, 1.0, 2.0, 1.0]
    clock.phase_s = [{phase: 1.0 for phase in perf.PHASES}] * 6
    clock.rollout_tokens = [1000, 1000, 1000, 10, 20, 30]
    metrics = clock.metrics(samples_per_step=4)
    assert metrics["perf/s_per_it"] == 1.0
    assert metrics["perf/samples_per_s"] == 3.0, "of all steps: here a third of them are of another kind"
    assert metrics["perf/rollout_tokens_per_s"] == 20.0


def test_a_rollout_is_truncated_when_no_end_of_sequence_came():
    end, other = 5, 7
    labels = torch.tensor([[-100, other, end, -100], [-100, other, other, other], [end, -100, -100, other]])
    tokens, truncated = rollout_lengths(labels, [end, 6])
    assert tokens.tolist() == [2, 3, 2]
    assert truncated.tolist() == [False, True, False]


def compare_log_probabilities(folder, precision):
    trainer = make_trainer(
        folder,
        "gen=vllm",
        f"precision={precision}",
        "trainer.lmbda=1.0",
        "trainer.learning_rate=5e-3",
    )
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train()

    from vllm import SamplingParams

    engine, tokenizer = trainer.vllm_generation, trainer.processing_class
    engine.sync_weights()
    ids = tokenizer("<|im_start|>user\nMake 11 of 7,15,3<|im_end|>\n<think>25 19 11</think>")["input_ids"]
    (output,) = engine.llm.generate(
        [{"prompt_token_ids": ids}], SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False
    )
    vllm = [position[token].logprob for position, token in zip(output.prompt_logprobs[1:], ids[1:], strict=True)]
    model = trainer.model.eval()
    with torch.no_grad():
        student = torch.log_softmax(model(torch.tensor([ids])).logits.float(), dim=-1)[0]
        for name, parameter in model.named_parameters():
            parameter.copy_(before[name])
        untrained = torch.log_softmax(model(torch.tensor([ids])).logits.float(), dim=-1)[0]
    picked = torch.arange(len(ids) - 1), torch.tensor(ids[1:])
    return {
        "dtype": str(engine.llm.llm_engine.model_config.dtype),
        "to_student": (student[picked] - torch.tensor(vllm)).abs().mean().item(),
        "to_untrained": (untrained[picked] - torch.tensor(vllm)).abs().mean().item(),
    }


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-4), ("bf16", 0.05)])
def test_vllm_samples_from_the_trained_weights_in_the_rollout_dtype(tmp_path, monkeypatch, precision, tolerance):
    """Log-probabilities of vLLM after training are the student's, and far from the untrained student's."""
    for name, value in {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }.items():
        monkeypatch.setenv(name, value)
    # An engine changes its process for good.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        result = pool.submit(compare_log_probabilities, tmp_path, precision).result(timeout=500)
    assert result["dtype"] == ("torch.float32" if precision == "fp32" else "torch.bfloat16")
    assert result["to_student"] < tolerance
    assert result["to_untrained"] > 10 * tolerance
