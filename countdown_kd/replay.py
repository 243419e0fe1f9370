"""A config's optimizer step on frozen sequences, taken apart; and what the config would draw by itself.

The step is the trainer's own: GOLDTrainer cuts and collates the sequences, computes the loss, Trainer clips and steps.
Only what is sampled is replaced by what was sampled once, and what is shuffled by one order. `parity.py` holds the
results of two configs side by side.

Not covered: several ranks (one process takes the whole batch), the random numbers of vLLM (its way of padding is),
losses by token where neither the hybrid ULD nor the JSD loss is used, and the rounding of step=fast: the step is taken
TRL's way, whose intermediate values can be looked at.
"""

from __future__ import annotations

import copy
import gc
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import chain, islice
from types import SimpleNamespace

import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from trl.experimental.gold.gold_trainer import ULDLoss
from trl.trainer.utils import RepeatSampler, pad

from countdown_kd.config import ROOT, instantiate
from countdown_kd.countdown import Puzzle
from countdown_kd.data import Data
from countdown_kd.gold import CountdownTrainer
from countdown_kd.run import load

gc.freeze()  # Trainer collects garbage whenever it starts: 0.5 s over what these imports have made

SEQUENCES = 8  # frozen at most, or one of each micro-batch; fewer where an optimizer step has fewer
STEPS = 60  # whose puzzles, on-policy draws and learning rates are looked at


@dataclass(frozen=True)
class Frozen:
    """The sequences that every config is given; ``tokens`` is how many there are before anything is cut off."""

    conversations: Dataset
    rollouts: list[list[int]]  # token ids, one rollout of each conversation's prompt
    tokens: dict[str, int]  # of "text" and of "rollouts"


@dataclass
class Sequence:
    """What a sequence contributes to its micro-batch's loss, which is the mean over its sequences."""

    loss: float = 0.0
    ids: list[list[int]] = field(default_factory=list)  # the student's tokens that make up an aligned token
    token_losses: list[float] = field(default_factory=list)  # of each aligned token; their mean is ``loss``
    tokens: int = 0  # of the student's completion
    aligned: int = 0  # of these, those that the teacher's tokenizer cuts alike


@dataclass(frozen=True)
class Step:
    """One optimizer step from the starting weights."""

    loss: float  # as the trainer logs it
    micro_losses: list[float]  # what each micro-batch adds to it
    sequences: list[Sequence]
    grad_norm: float  # before clipping
    clipped_norm: float  # after it
    update_norm: float
    unchanged: float  # share of the weights with a gradient that are the same after the step
    cut: int  # tokens that max_length or max_completion_length cut off

    @property
    def aligned(self) -> float:
        """Share of the completions' tokens that both tokenizers cut alike; NaN without alignment."""
        tokens = sum(sequence.tokens for sequence in self.sequences)
        return sum(sequence.aligned for sequence in self.sequences) / tokens if tokens else math.nan


@dataclass(frozen=True)
class Replay:
    """A config's step on the data's own text, and its step on the frozen rollouts."""

    text: Step
    rollouts: Step


@dataclass(frozen=True)
class Draws:
    """What a config would draw by itself; a list entry a step, but for the rollouts, one of each frozen prompt."""

    puzzles: list[list[Puzzle]]
    on_policy: list[list[bool]]  # of each micro-batch
    learning_rates: list[float]
    rollouts: list[list[int]]  # token ids, at the first step


def freeze(a: DictConfig, b: DictConfig) -> Frozen:
    """The first sequences of ``a``, once with the data's completions and once with its student's.

    The rollouts are as long as the longer of the two limits allows, so that each config cuts them at its own.
    """
    accumulated = math.lcm(2, *(cfg.trainer.gradient_accumulation_steps for cfg in (a, b)))
    step = a.trainer.per_device_train_batch_size * a.trainer.gradient_accumulation_steps
    data, conversations = dataset(OmegaConf.to_yaml(a.task))
    limits = {key: [cfg.trainer.get(key) for cfg in (a, b)] for key in ("max_length", "max_completion_length")}
    given = {key: max(both) for key, both in limits.items() if None not in both}
    trainer = build(CountdownTrainer, a, conversations.select([0]), **given)
    order = dict.fromkeys(chain.from_iterable(batches(trainer, len(data.train))))
    number = accumulated * math.ceil(min(step, SEQUENCES) / accumulated)
    frozen = conversations.select(list(islice(order, number)))
    rollouts = sample(build(CountdownTrainer, a, frozen, **given))

    render = trainer.processing_class.apply_chat_template
    prompts = [render(row["prompt"], add_generation_prompt=True, return_dict=False) for row in frozen]
    texts = [render(row["prompt"] + row["completion"], return_dict=False) for row in frozen]
    tokens = {"text": sum(map(len, texts)), "rollouts": sum(map(len, chain(prompts, rollouts)))}
    return Frozen(frozen, rollouts, tokens)


def replay(cfg: DictConfig, frozen: Frozen) -> Replay:
    """Take both steps. Raises ValueError where the config's trainer refuses its arguments or the sequences."""
    return Replay(take_step(cfg, frozen, on_policy=False), take_step(cfg, frozen, on_policy=True))


def take_step(cfg: DictConfig, frozen: Frozen, on_policy: bool) -> Step:
    """One optimizer step at the config's peak learning rate, with all sequences in its number of micro-batches."""
    trainer = build(
        ReplayTrainer, cfg, frozen.conversations,
        max_steps=1, warmup_steps=0, lr_scheduler_type="constant", lr_scheduler_kwargs=None,
        per_device_train_batch_size=len(frozen.rollouts) // cfg.trainer.gradient_accumulation_steps,
        num_generations=1, generation_batch_size=None, lmbda=float(on_policy),
        logging_strategy="steps", logging_steps=1,
    )  # fmt: skip
    trainer.frozen = iter(frozen.rollouts)
    # vLLM's rollouts are padded in another way than those of generate: to the limit, not to the longest.
    trainer.use_vllm = cfg.trainer.use_vllm
    trainer.vllm_generation = SimpleNamespace(generate=trainer.answer)
    trainer._last_vllm_sync_step = 0  # the step that is taken: nothing to push
    sequences = trainer.sequences
    if trainer.use_uld_loss:
        trainer.uld_loss_fn = RecordingULDLoss(
            trainer.args, trainer._tokenizer, trainer.teacher_tokenizer, trainer.accelerator.device
        )
        sequences = trainer.uld_loss_fn.sequences
    gradients = Gradients()
    trainer.add_callback(gradients)
    trainer.train()

    before, _ = models(OmegaConf.to_yaml(cfg.model))
    moving, same, moved = 0, 0, 0.0
    for (name, weight), old in zip(trainer.model.named_parameters(), before.parameters(), strict=True):
        weight, has_gradient = weight.detach().cpu(), gradients.nonzero[name].cpu()
        moving += has_gradient.sum().item()
        same += (has_gradient & (weight == old)).sum().item()
        moved += (weight.double() - old.double()).square().sum().item()
    logged = trainer.state.log_history[0]
    return Step(
        loss=logged["loss"],
        micro_losses=trainer.micro_losses,
        sequences=sequences,
        grad_norm=logged["grad_norm"],
        clipped_norm=gradients.norm,
        update_norm=math.sqrt(moved),
        unchanged=same / max(moving, 1),
        cut=frozen.tokens["rollouts" if on_policy else "text"] - trainer.tokens,
    )


def growth(cfg: DictConfig, frozen: Frozen, text: Step, micro_batches: int) -> float:
    """The loss of the data's text in several micro-batches over its loss in one: 1 if the loss is a mean.

    ``text`` is the config's own step, which is not taken again.
    """

    def loss_in(number: int) -> float:
        if number == cfg.trainer.gradient_accumulation_steps:
            return text.loss
        accumulating = copy.deepcopy(cfg)
        accumulating.trainer.gradient_accumulation_steps = number
        return take_step(accumulating, frozen, on_policy=False).loss

    return loss_in(micro_batches) / loss_in(1)


def draws(cfg: DictConfig, frozen: Frozen) -> Draws:
    """What the config's trainer draws with its own seeds, but for the rollouts' prompts, which are the frozen ones."""
    data, _ = dataset(OmegaConf.to_yaml(cfg.task))
    trainer = build(CountdownTrainer, cfg, frozen.conversations)
    rollouts = sample(trainer)

    def leave(slices: list[dict], indices: list[int]) -> None:
        for i in indices:
            trainer._buffered_inputs[i] = slices[i]

    trainer.draws, trainer.lmbda, trainer._generate_on_policy_for_slices = [], cfg.trainer.lmbda, leave
    batch = collated(trainer)
    for trainer.state.global_step in range(STEPS):
        trainer._fill_buffer(batch, trainer.args.gradient_accumulation_steps)

    order = batches(trainer, len(data.train))
    max_steps = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]
    trainer.create_optimizer_and_scheduler(max_steps)
    rates = []
    for _ in range(min(STEPS, max_steps)):
        rates += trainer.lr_scheduler.get_last_lr()[:1]
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    return Draws([[data.train[i].puzzle for i in batch] for batch in order], trainer.draws, rates, rollouts)


# ------------------------------------------------------------------------------------------------
# The trainer, with what is random replaced


@cache
def models(arguments: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model as it is on disk, on the CPU, and its tokenizer. What trains is a copy."""
    return load(OmegaConf.create(arguments))


@cache
def dataset(task: str) -> tuple[Data, Dataset]:
    data = instantiate(OmegaConf.create(task))
    return data, data.conversations()


def build(kind: type[CountdownTrainer], cfg: DictConfig, conversations: Dataset, **arguments) -> CountdownTrainer:
    """A config's trainer as run.py makes it, with some of its arguments replaced and without vLLM's engine."""
    student, tokenizer = models(OmegaConf.to_yaml(cfg.model))
    teacher, _ = models(OmegaConf.to_yaml(cfg.teacher))
    args = instantiate(
        cfg.trainer,
        use_cpu=cfg.trainer.get("use_cpu", False) or not torch.cuda.is_available(),
        use_vllm=False, output_dir=tempfile.gettempdir(), save_strategy="no", eval_strategy="no",
        report_to="none", disable_tqdm=True, **arguments,
    )  # fmt: skip
    args.teacher_tokenizer_name_or_path = cfg.teacher.pretrained_model_name_or_path
    step = OmegaConf.load(ROOT / "conf/step/trl.yaml")
    step.average_micro_batches = cfg.step.average_micro_batches
    trainer = kind(
        model=copy.deepcopy(student), teacher_model=copy.deepcopy(teacher), args=args, gen=cfg.gen, step=step,
        train_dataset=conversations, processing_class=tokenizer,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer


def collated(trainer: CountdownTrainer) -> dict:
    """All conversations of the trainer as one batch, cut and padded by its own means."""
    rows = trainer._remove_unused_columns(trainer.train_dataset)
    return send_to_device(trainer.data_collator(list(rows)), trainer.accelerator.device)


def sample(trainer: CountdownTrainer) -> list[list[int]]:
    """The student's rollouts of all its conversations' prompts, as it would sample them at the first step."""
    trainer.lmbda = 1.0
    trainer.clock.on_step_begin(None, None, None)
    trainer._fill_buffer(collated(trainer), 1)
    return [row[row != -100].tolist() for row in trainer._buffered_inputs[0]["labels"]]


def batches(trainer: CountdownTrainer, puzzles: int) -> list[list[int]]:
    """Which of so many puzzles the trainer's data loader gives the first steps. It cannot train after this."""
    trainer.train_dataset, trainer.data_collator = range(puzzles), list
    every = trainer.args.gradient_accumulation_steps  # it gives a step's batch once a micro-batch
    return list(islice(trainer.get_train_dataloader(), 0, STEPS * every, every))


class ReplayTrainer(CountdownTrainer):
    """Takes its rollouts from ``frozen``, its conversations in order, and keeps what a step consists of."""

    frozen: Iterator[list[int]]

    def __init__(self, **kwargs):
        self.sequences: list[Sequence] = []
        self.micro_losses: list[float] = []
        self.tokens = 0
        super().__init__(**kwargs)

    def _get_train_sampler(self, dataset=None):
        return RepeatSampler(
            self.train_dataset, mini_repeat_count=1, batch_size=len(self.train_dataset),
            repeat_count=self.args.gradient_accumulation_steps, shuffle=False,
        )  # fmt: skip

    def generate_on_policy_outputs(self, model, inputs, generation_config):
        def generate(input_ids, **_):
            _, rollouts, _, _ = self.answer(input_ids)
            rows = [torch.tensor(ids[: generation_config.max_new_tokens]) for ids in rollouts]
            completions = pad(rows, padding_side="right", padding_value=self.pad_token_id).to(input_ids)
            return SimpleNamespace(sequences=torch.cat([input_ids, completions], dim=1))

        return super().generate_on_policy_outputs(SimpleNamespace(generate=generate), inputs, generation_config)

    def answer(self, prompts, **_):
        """The next frozen rollouts, the way vLLM's wrapper returns them."""
        return None, [next(self.frozen) for _ in prompts], None, None

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.micro_losses.append(loss.item())
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.tokens += inputs["attention_mask"].sum().item()
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def generalized_jsd_loss(self, student_logits, teacher_logits, labels, num_items_in_batch, **kwargs):
        """The loss without ULD; the hybrid ULD loss does not come by here."""
        jsd = super().generalized_jsd_loss
        with torch.no_grad():
            for student, teacher, label in zip(student_logits, teacher_logits, labels, strict=True):
                losses = jsd(student, teacher, label, reduction="none", **kwargs).sum(-1).tolist()
                ids = [[token] for token in label[label != -100].tolist()]
                self.sequences.append(Sequence(sum(losses) / max(len(losses), 1), ids, losses))
        return jsd(student_logits, teacher_logits, labels, num_items_in_batch=num_items_in_batch, **kwargs)


class RecordingULDLoss(ULDLoss):
    """TRL's loss, which also keeps what it is of each sequence alone, and of each of its aligned tokens."""

    def __init__(self, *args):
        super().__init__(*args)
        self.sequences: list[Sequence] = []
        self.one: Sequence | None = None  # the sequence that is alone now

    def _compute_distillation_loss(self, *tensors, **offsets):
        compute = super()._compute_distillation_loss
        with torch.no_grad():
            for i in range(len(tensors[0])):
                self.one = Sequence()
                rows = {name: given if given is None else given[i : i + 1] for name, given in offsets.items()}
                self.one.loss = compute(*(given[i : i + 1] for given in tensors), **rows).item()
                self.sequences.append(self.one)
        self.one = None
        return compute(*tensors, **offsets)

    def _align_by_byte_offsets(self, s_offsets, t_offsets):
        groups = super()._align_by_byte_offsets(s_offsets, t_offsets)
        if self.one is not None:
            self.one.tokens = len(s_offsets)
            self.one.aligned = sum(len(s) == len(t) == 1 for s, t in zip(*groups, strict=True))
        return groups

    def _merge_probabilities_with_alignment_groups(self, probs, alignment_groups, token_ids=None):
        if self.one is not None and not self.one.ids:  # the student's come first
            self.one.ids = [[token_ids[i] for i in group] for group in alignment_groups]
        return super()._merge_probabilities_with_alignment_groups(probs, alignment_groups, token_ids)

    def _compute_hybrid_uld_loss(self, student_aligned, teacher_aligned):
        compute = super()._compute_hybrid_uld_loss
        if self.one is not None:
            rows = zip(student_aligned.split(1), teacher_aligned.split(1), strict=True)
            self.one.token_losses = [self.distillation_weight * compute(*row).item() for row in rows]
        return compute(student_aligned, teacher_aligned)


class Gradients(TrainerCallback):
    """The norm of the gradients that the optimizer gets, and which weights have one."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
        self.norm = torch.nn.utils.get_total_norm(gradients.values()).item()
        self.nonzero = {name: gradient != 0 for name, gradient in gradients.items()}
