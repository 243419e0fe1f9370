"""What we add to TRL's GOLDTrainer, and no more.

1. Each optimizer step draws from its own seed. TRL draws the on-policy micro-batches (lambda) from Python's global
   generator and samples from torch's, and vLLM reseeds both when it starts: two cells of one sweep would train on
   different mixtures. Here draws depend on the seed and the step alone, so loss curves can be laid over each other.
2. vLLM's engine is ours (engine.py), which samples in the rollout dtype.
3. The steps are timed by phase, and the on-policy draws, rollout lengths and truncations recorded.
4. With ``step=fast`` a step is computed in less time and memory, with the same losses: no logits where no loss reads
   them, our form of the losses, models and rollouts in larger batches (conf/step/fast.yaml).
5. With ``gen.steps_per_rollout`` above 1 the rollouts of several optimizer steps are sampled at once.
"""

from __future__ import annotations

import hashlib
import random
from collections import deque
from contextlib import nullcontext
from itertools import islice
from unittest import mock

import torch
from accelerate import DistributedType
from omegaconf import DictConfig
from torch.nn.functional import pad
from transformers import set_seed
from trl.experimental.gold import GOLDConfig, GOLDTrainer
from trl.experimental.gold.gold_trainer import build_teacher_inputs_from_texts
from trl.generation.vllm_generation import empty_cache
from trl.trainer.utils import split_tensor_dict

from countdown_kd import losses
from countdown_kd.engine import make_vllm
from countdown_kd.losses import Hidden, Logits
from countdown_kd.perf import StepClock


class CountdownTrainer(GOLDTrainer):
    """GOLDTrainer with pinned draws, the rollout dtype handed to vLLM, and timed phases.

    ``clock`` holds the timings. ``draws`` and ``batches`` have a list per optimizer step with an entry per micro-batch:
    whether the student sampled it itself (of the ranks, rank 0 draws for all), and a hash of its prompts and one of
    its completions, by which runs can be told to have seen the same.
    """

    def __init__(self, *, args: GOLDConfig, gen: DictConfig, step: DictConfig, **kwargs):
        self.step = step
        self.clock = StepClock(gen.steps_per_rollout)
        self.epochs_done = 0  # by the processes before this one
        self.steps_per_rollout = gen.steps_per_rollout
        self._later: deque[list[dict]] = deque()  # batches of the steps that the present rollouts are for too
        self._rollouts: dict[int, tuple[int, list, list]] = {}  # by step: when sampled, inputs and texts
        # Of micro-batches that share a pass of the student: its outputs, each with the copy that gathers the gradient
        # of its loss.
        self._shared: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.draws: list[list[bool]] = []
        self.batches: list[list[tuple[str, str]]] = []
        # Where a process sees several GPUs, Trainer would take them all (DataParallel), which TRL refuses.
        args._n_gpu = min(args.n_gpu, 1)
        # TRL builds its own engine where use_vllm is set; ours takes its place.
        use_vllm, args.use_vllm = args.use_vllm, False
        super().__init__(args=args, **kwargs)
        self.use_vllm = args.use_vllm = use_vllm
        self.generation_config.cache_implementation = gen.get("cache_implementation")
        if use_vllm:
            self.vllm_generation = make_vllm(
                self.model, self._tokenizer, self.accelerator, args, gen, step.one_weight_push
            )  # fmt: skip
            self.vllm_sync_frequency = args.vllm_sync_frequency
            self._last_vllm_sync_step = -args.vllm_sync_frequency
            sync = self.vllm_generation.sync_weights

            def timed_sync():
                with self.clock.phase("sync"):
                    sync()

            self.vllm_generation.sync_weights = timed_sync
        for model, hidden in ((self.model, step.chunked_logits), (self.teacher_model, step.teacher_batch_size)):
            capped = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
            if hidden and (capped or model.get_output_embeddings().bias is not None):
                raise ValueError(
                    f"{model.config.name_or_path}: its logits are more than hidden states times weights. Set "
                    "step.chunked_logits=false and step.teacher_batch_size=null"
                )
        if step.fused_loss and self.use_uld_loss:
            self.uld_loss_fn = losses.ULDLoss(
                args, self._tokenizer, self.teacher_tokenizer, device=self.accelerator.device
            )
        self.clock.watch(self.model, "student")
        self.clock.watch(self.teacher_model, "teacher")
        self.add_callback(self.clock)

    def training_step(self, model, inputs, num_items_in_batch=None):
        with self.clock.phase("backward"):
            loss = super().training_step(model, inputs, num_items_in_batch)
            if self._shared and not any("_student" in each for each in self._buffered_inputs):
                outputs, leaves = zip(*self._shared, strict=True)
                self._shared = []
                torch.autograd.backward(outputs, [leaf.grad for leaf in leaves])
            return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        micro_batches = self.args.gradient_accumulation_steps if self.step.average_micro_batches else 1
        if num_items_in_batch is not None:
            # The loader gives a step's batch once a micro-batch, and Trainer counts its tokens each time.
            num_items_in_batch = num_items_in_batch / micro_batches
        with self.clock.phase("loss"):
            ours = ("completion_logits", "chunked_logits", "teacher_batch_size", "student_batch_size")
            if any(self.step[key] for key in ours) or not self.step.empty_cache:
                loss, outputs = self._compute_loss(model, inputs, num_items_in_batch), None
            else:
                loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            if self.use_uld_loss and model.training:
                loss = loss / micro_batches
        return (loss, outputs) if return_outputs else loss

    def _compute_loss(self, model, inputs, num_items_in_batch) -> torch.Tensor:
        """What GOLDTrainer.compute_loss computes of text, without what it does not need."""
        # This micro-batch and those of the step that come after it.
        window = [each for each in self._buffered_inputs or [] if isinstance(each, dict)]
        place = next((i for i, each in enumerate(window) if each is inputs), None)
        window = [inputs] if place is None else window[place:]
        if "_teacher" not in inputs:
            self._ask_teacher(window if self.step.teacher_batch_size and self.use_uld_loss else [inputs])
        if "_student" not in inputs:
            self._ask_student(model, window)
        teacher, *teachers = inputs.pop("_teacher")
        student = inputs.pop("_student")
        columns = (student.states if isinstance(student, Hidden) else student).shape[1]
        ids, labels = (inputs[key][:, -columns:] for key in ("input_ids", "labels"))
        # Where the output layer is part of the loss, it computes in the precision that it has inside the model.
        with self.accelerator.autocast():
            if not self.use_uld_loss:
                jsd = losses.generalized_jsd_loss if self.step.fused_loss else self.generalized_jsd_loss
                student, teacher = (
                    each[:, :-1] if isinstance(each, torch.Tensor) else Hidden(each.states[:, :-1], each.weight)
                    for each in (student, teacher)
                )
                return jsd(
                    student, teacher, labels[:, 1:], self.beta, self.temperature, num_items_in_batch=num_items_in_batch
                )
            offsets = inputs.get("byte_offsets")
            teacher_ids, teacher_labels, teacher_offsets = teachers
            loss = self.uld_loss_fn(
                student, teacher, labels, teacher_labels, ids, teacher_ids,
                student_byte_offsets=None if offsets is None else offsets[:, -columns:],
                teacher_byte_offsets=teacher_offsets,
            )  # fmt: skip
        if hasattr(self.uld_loss_fn, "last_matched_loss"):
            self._matched_sum += self.uld_loss_fn.last_matched_loss.item()
            self._unmatched_sum += self.uld_loss_fn.last_unmatched_loss.item()
            self._matched_step_eq += 1 / self.args.gradient_accumulation_steps
            self._unmatched_step_eq += 1 / self.args.gradient_accumulation_steps
        if self.step.empty_cache:
            empty_cache()
        return loss

    def _ask_student(self, model, window: list[dict]) -> None:
        """Lay the student's logits beside the inputs of the first micro-batch, or of the first few."""
        size, alone = self.step.student_batch_size, self.accelerator.distributed_type == DistributedType.NO
        few = window[: max(1, (size or 0) // len(window[0]["input_ids"]))] if alone and model.training else window[:1]
        width = max(inputs["input_ids"].shape[1] for inputs in few)
        ids, mask = (
            torch.cat([pad(inputs[key], (width - inputs[key].shape[1], 0)) for inputs in few])
            for key in ("input_ids", "attention_mask")
        )
        columns = [self._columns(inputs["labels"]) for inputs in few]
        found = self._logits(model, ids, mask, max(columns), self.step.chunked_logits)
        hidden = isinstance(found, Hidden)
        rows = (found.states if hidden else found).split([len(inputs["input_ids"]) for inputs in few])
        outputs = [part[:, -own:] for part, own in zip(rows, columns, strict=True)]
        if len(few) > 1:
            # A loss goes back to here alone; after the last one all gradients go through the student at once.
            leaves = [output.detach().requires_grad_() for output in outputs]
            self._shared = list(zip(outputs, leaves, strict=True))
            outputs = leaves
        for inputs, output in zip(few, outputs, strict=True):
            inputs["_student"] = Hidden(output, found.weight) if hidden else output

    @torch.no_grad()
    def _ask_teacher(self, micro_batches: list[dict]) -> None:
        """Lay the teacher's logits of each micro-batch beside its inputs, with their ids, labels and byte offsets."""
        self.teacher_model.eval()
        if not self.use_uld_loss:
            for inputs in micro_batches:
                ids, mask, columns = inputs["input_ids"], inputs["attention_mask"], self._columns(inputs["labels"])
                chunked = self.step.chunked_logits
                inputs["_teacher"] = (self._logits(self.teacher_model, ids, mask, columns, chunked),)
            return
        ids, labels, mask, offsets = build_teacher_inputs_from_texts(
            self.teacher_tokenizer,
            [text for inputs in micro_batches for text in inputs["original_prompt_text"]],
            [text for inputs in micro_batches for text in inputs["original_completion_text"]],
            use_extended_uld=self.uld_loss_fn.use_extended_uld,
        )
        columns = self._columns(labels)
        ids, mask, labels = (each.to(self.accelerator.device) for each in (ids, mask, labels))
        in_one = self.step.teacher_batch_size or len(ids)
        # Of several micro-batches hidden states are kept, which are small, and no logits, which are not.
        hidden = bool(self.step.chunked_logits or self.step.teacher_batch_size)
        found = [
            self._logits(self.teacher_model, *batch, columns, hidden)
            for batch in zip(ids.split(in_one), mask.split(in_one), strict=True)
        ]
        states = torch.cat([each.states if hidden else each for each in found])
        sizes = [len(inputs["original_prompt_text"]) for inputs in micro_batches]
        parts = (states, *(each[:, -columns:] for each in (ids, labels, offsets)))
        for inputs, *own in zip(micro_batches, *(part.split(sizes) for part in parts), strict=True):
            inputs["_teacher"] = (Hidden(own[0], found[0].weight) if hidden else own[0], *own[1:])

    def _columns(self, labels: torch.Tensor) -> int:
        """How many of the last columns hold all completions and the logits that predict them."""
        if not self.step.completion_logits:
            return labels.shape[1]
        completions = (labels != -100).any(dim=0)
        return labels.shape[1] - max(0, completions.int().argmax().item() - 1)

    def _logits(self, model, ids, mask, columns: int, hidden: bool) -> Logits:
        """A model's logits of the last ``columns``, or its hidden states of them and its output layer."""
        keep = {"logits_to_keep": columns} if columns < ids.shape[1] else {}
        if not hidden:
            return model(input_ids=ids, attention_mask=mask, use_cache=False, **keep).logits
        layer = self.accelerator.unwrap_model(model).get_output_embeddings()
        with mock.patch.object(layer, "forward", lambda states: states):
            return Hidden(model(input_ids=ids, attention_mask=mask, use_cache=False, **keep).logits, layer.weight)

    @property
    def rollouts_ahead(self) -> bool:
        """Whether there are rollouts for steps to come. A checkpoint would not keep them."""
        return len(self._later) > 0

    def _get_train_sampler(self, dataset=None):
        sampler = super()._get_train_sampler(dataset)
        # It draws an epoch's order from where the epoch before has left its generator.
        for _ in range(self.epochs_done):
            torch.randperm(sampler.num_samples, generator=sampler.generator)
        return sampler

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """A step's batches. Those of the next steps are taken out with them, to be sampled for at once."""
        if not self._later:
            steps = min(self.steps_per_rollout, self.state.max_steps - self.state.global_step)
            taken = (list(islice(epoch_iterator, num_batches)) for _ in range(steps))
            self._later.extend(batches for batches in taken if batches)  # an epoch may end sooner
        batches = self._later.popleft() if self._later else []
        return batches, self._get_num_items_in_batch(batches, device)

    def _fill_buffer(self, generation_batch, buffer_steps):
        # Ranks sample different rollouts; the draws themselves are rank 0's.
        step = self.state.global_step
        set_seed(draw_seed(self.args.seed, step, self.accelerator.process_index))
        super()._fill_buffer(generation_batch, buffer_steps)

        if self.step.trim_padding:
            self._buffered_inputs = [trimmed(inputs) for inputs in self._buffered_inputs]
        self.draws.append(list(self._buffered_on_policy))
        self.batches.append([fingerprints(inputs) for inputs in self._buffered_inputs])
        metrics = self._metrics["train"]
        metrics["rollout/on_policy_frac"].append(sum(self.draws[-1]) / buffer_steps)
        for inputs, on_policy in zip(self._buffered_inputs, self._buffered_on_policy, strict=True):
            if on_policy:
                tokens, truncated = rollout_lengths(inputs["labels"], self.generation_config.eos_token_id)
                metrics["rollout/mean_tokens"].append(tokens.float().mean().item())
                metrics["rollout/truncated_frac"].append(truncated.float().mean().item())
                self.clock.rollout_tokens[-1] += tokens.sum().item()

    def _generate_on_policy_for_slices(self, slices, on_policy_indices):
        step = self.state.global_step
        with self.clock.phase("generate"):
            if step not in self._rollouts:
                buffers = self._buffered_inputs, self._buffered_text_logs
                self._sample(step, slices, on_policy_indices)
                self._buffered_inputs, self._buffered_text_logs = buffers
        sampled_at, inputs, texts = self._rollouts[step]
        self._metrics["train"]["rollout/staleness"].append(step - sampled_at)
        for i in on_policy_indices:
            self._buffered_inputs[i], self._buffered_text_logs[i] = inputs[i], texts[i]

    def _sample(self, step: int, slices: list[dict], on_policy_indices: list[int]) -> None:
        """Rollouts of this step and of those that wait: to TRL it is one step with more micro-batches."""
        size = len(slices)
        of_steps, wanted = [slices], list(on_policy_indices)
        for batches in self._later:
            # What TRL will draw when the step has come.
            draw = random.Random(draw_seed(self.args.seed, step + len(of_steps), 0)).random
            wanted += [size * len(of_steps) + i for i in range(size) if draw() <= self.lmbda]
            of_steps.append(split_tensor_dict(batches[0], size))
        self._buffered_inputs, self._buffered_text_logs = ([None] * (size * len(of_steps)) for _ in range(2))
        super()._generate_on_policy_for_slices(sum(of_steps, []), wanted)
        self._rollouts = {}
        for k in range(len(of_steps)):
            part = slice(size * k, size * (k + 1))
            self._rollouts[step + k] = step, self._buffered_inputs[part], self._buffered_text_logs[part]

    def _generate_non_vllm_for_slices(self, slices, on_policy_indices):
        # Autocast keeps a weight's cast until its outermost context ends: without one around it all, every token
        # casts all weights.
        once = self.accelerator.autocast() if self.step.cast_once else nullcontext()
        with once:
            if not self.step.rollouts_together:
                return super()._generate_non_vllm_for_slices(slices, on_policy_indices)
            # Of several optimizer steps: each is padded to its own longest prompt.
            width = max(slices[i]["prompts"].shape[1] for i in on_policy_indices)
            together = {
                key: torch.cat(
                    [pad(slices[i][key], (width - slices[i][key].shape[1], 0), value=filler) for i in on_policy_indices]
                )
                for key, filler in (("prompts", self._tokenizer.pad_token_id), ("prompt_attention_mask", 0))
            }
            buffers = self._buffered_inputs, self._buffered_text_logs
            self._buffered_inputs, self._buffered_text_logs = [None], [None]
            super()._generate_non_vllm_for_slices([together], [0])
        (sampled,), (texts,) = self._buffered_inputs, self._buffered_text_logs
        self._buffered_inputs, self._buffered_text_logs = buffers
        start = 0
        for i in on_policy_indices:
            part = slice(start, start := start + len(slices[i]["prompts"]))
            self._buffered_inputs[i] = slices[i] | {key: value[part] for key, value in sampled.items()}
            self._buffered_text_logs[i] = tuple(each[part] for each in texts)

    def generate_on_policy_outputs(self, model, inputs, generation_config):
        # Autocast keeps no casts in inference mode, and they are worth more.
        if not self.step.inference_mode or (self.step.cast_once and self.args.bf16):
            return super().generate_on_policy_outputs(model, inputs, generation_config)
        with torch.inference_mode():
            sampled = super().generate_on_policy_outputs(model, inputs, generation_config)
        # Autograd refuses tensors that were made in there.
        return tuple(each.clone() if isinstance(each, torch.Tensor) else each for each in sampled)


def draw_seed(seed: int, step: int, rank: int) -> int:
    """Of what a rank draws for an optimizer step."""
    return hash((seed, step, rank)) % 2**32


def trimmed(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A micro-batch without the columns in which no sequence has a token. Its tensors are (batch, sequence)."""
    used = inputs["attention_mask"].any(dim=0).nonzero().flatten()
    columns = slice(int(used[0]), int(used[-1]) + 1)
    keys = {"input_ids", "attention_mask", "labels", "byte_offsets"} & inputs.keys()
    return inputs | {key: inputs[key][:, columns] for key in keys}


def rollout_lengths(labels: torch.Tensor, eos_token_id: int | list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens sampled, and whether the limit cut the rollout off before an end-of-sequence token.

    ``labels`` is (batch, sequence) with -100 outside the completion; both results are (batch,).
    """
    sampled = labels != -100
    ended = torch.isin(labels, torch.tensor(eos_token_id, device=labels.device)) & sampled
    return sampled.sum(dim=1), ~ended.any(dim=1)


def fingerprints(inputs: dict[str, torch.Tensor]) -> tuple[str, str]:
    """A hash of a micro-batch's prompts and one of its completions, whatever the padding.

    ``input_ids``, ``attention_mask`` and ``labels`` are (batch, sequence), labels -100 outside the completion.
    """
    completion = inputs["labels"] != -100
    prompt = inputs["attention_mask"].bool() & ~completion
    return tuple(
        hashlib.sha256(inputs["input_ids"][part].to("cpu", torch.int64).numpy().tobytes()).hexdigest()[:8]
        for part in (prompt, completion)
    )
