"""What we add to TRL's GOLDTrainer, and no more.

1. Each optimizer step draws from its own seed. TRL draws the on-policy micro-batches (lambda) from Python's global
   generator and samples from torch's, and vLLM reseeds both when it starts: two cells of one sweep would train on
   different mixtures. Here draws depend on the seed and the step alone, so loss curves can be laid over each other.
2. A colocated vLLM gets the rollout dtype, which TRL does not pass on (an fp32 student would be sampled from in half
   precision), and on the CPU its weights in a way that works there.
3. The steps are timed by phase, and the on-policy draws, rollout lengths and truncations recorded.
4. With ``step=fast`` a step is computed in less time and memory, with the same losses: no logits where no loss reads
   them, our form of the losses, the teacher in larger batches (conf/step/fast.yaml).
"""

from __future__ import annotations

import hashlib
from unittest import mock

import torch
import torch._dynamo
from accelerate import Accelerator
from omegaconf import DictConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl.experimental.gold import GOLDConfig, GOLDTrainer
from trl.experimental.gold.gold_trainer import build_teacher_inputs_from_texts
from trl.generation import vllm_generation
from trl.generation.vllm_generation import VLLMGeneration

from countdown_kd import losses
from countdown_kd.losses import Hidden, Logits
from countdown_kd.perf import StepClock


class VLLM(VLLMGeneration):
    """TRL's vLLM wrapper with the arguments of ``vllm.LLM`` that it does not pass on."""

    def __init__(self, *args, llm: dict, one_weight_push: bool, **kwargs):
        self.llm_arguments = llm
        self.one_weight_push = one_weight_push
        super().__init__(*args, **kwargs)

    def _init_vllm(self):
        if self.mode == "server":
            return super()._init_vllm()
        if self.accelerator.device.type == "cpu":
            # Compiling takes longer than it saves on small models, and a C++ compiler that may not be there; vLLM's
            # sampler is compiled whatever enforce_eager says.
            self.llm_arguments["enforce_eager"] = True
            torch._dynamo.config.disable = True
        engine = vllm_generation.LLM
        with mock.patch.object(vllm_generation, "LLM", lambda **theirs: engine(**(theirs | self.llm_arguments))):
            super()._init_vllm()

    def sync_weights(self):
        on_cpu = self.accelerator.device.type == "cpu"
        if self.mode == "server" or self.enable_sleep_mode or not (on_cpu or self.one_weight_push):
            return super().sync_weights()
        runner = self.llm.llm_engine.model_executor.driver_worker.model_runner
        if not on_cpu:
            runner.get_model().load_weights(self._iter_named_params())
            self.llm.reset_prefix_cache()
            return
        # On the CPU vLLM packs linear layers when it loads them, and load_weights, which TRL calls, fails on packed
        # ones. reload_weights unpacks, loads all and packs again.
        runner.reload_weights(weights_iterator=self._iter_named_params())
        if self.model.config.tie_word_embeddings:
            # A tied output layer has no weights of its own to load, yet a packed copy, which would stay as it was.
            head = runner.get_model().lm_head
            head.quant_method.process_weights_after_loading(head)
        self.llm.reset_prefix_cache()


def make_vllm(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    accelerator: Accelerator,
    args: GOLDConfig,
    gen: DictConfig,
    one_weight_push: bool = False,
) -> VLLM:
    """A vLLM engine for ``model`` (or the client of a server), with GOLD's sampling settings."""
    return VLLM(
        model=model,
        accelerator=accelerator,
        processing_class=tokenizer,
        mode=args.vllm_mode,
        structured_outputs_regex=args.vllm_structured_outputs_regex,
        server_base_url=args.vllm_server_base_url,
        server_host=args.vllm_server_host,
        server_port=args.vllm_server_port,
        group_port=args.vllm_group_port,
        server_timeout=args.vllm_server_timeout,
        tensor_parallel_size=args.vllm_tensor_parallel_size,
        gpu_memory_utilization=args.vllm_gpu_memory_utilization,
        max_model_length=args.vllm_max_model_length or args.max_length,
        enable_sleep_mode=args.vllm_enable_sleep_mode,
        model_impl=args.vllm_model_impl,
        trust_remote_code=args.trust_remote_code,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        max_completion_length=args.max_completion_length,
        logprobs=None,
        llm={"dtype": gen.dtype, "max_num_seqs": gen.max_num_seqs},
        one_weight_push=one_weight_push,
    )


class CountdownTrainer(GOLDTrainer):
    """GOLDTrainer with pinned draws, the rollout dtype handed to vLLM, and timed phases.

    ``clock`` holds the timings. ``draws`` and ``batches`` have a list per optimizer step with an entry per micro-batch:
    whether the student sampled it itself (of the ranks, rank 0 draws for all), and a hash of its prompts and one of
    its completions, by which runs can be told to have seen the same.
    """

    def __init__(self, *, args: GOLDConfig, gen: DictConfig, step: DictConfig, **kwargs):
        self.step = step
        self.clock = StepClock()
        self.draws: list[list[bool]] = []
        self.batches: list[list[tuple[str, str]]] = []
        # TRL builds its own engine where use_vllm is set; ours takes its place.
        use_vllm, args.use_vllm = args.use_vllm, False
        super().__init__(args=args, **kwargs)
        self.use_vllm = args.use_vllm = use_vllm
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
            return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        micro_batches = self.args.gradient_accumulation_steps if self.step.average_micro_batches else 1
        if num_items_in_batch is not None:
            # The loader gives a step's batch once a micro-batch, and Trainer counts its tokens each time.
            num_items_in_batch = num_items_in_batch / micro_batches
        with self.clock.phase("loss"):
            step = self.step
            if step.completion_logits or step.chunked_logits or step.teacher_batch_size or not step.empty_cache:
                loss, outputs = self._compute_loss(model, inputs, num_items_in_batch), None
            else:
                loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            if self.use_uld_loss and model.training:
                loss = loss / micro_batches
        return (loss, outputs) if return_outputs else loss

    def _compute_loss(self, model, inputs, num_items_in_batch) -> torch.Tensor:
        """What GOLDTrainer.compute_loss computes of text, without what it does not need."""
        if "_teacher" not in inputs:
            window = [each for each in self._buffered_inputs or [] if isinstance(each, dict)]
            asked = self.step.teacher_batch_size and self.use_uld_loss and any(each is inputs for each in window)
            self._ask_teacher(window if asked else [inputs])
        teacher, *teachers = inputs.pop("_teacher")
        ids, labels = inputs["input_ids"], inputs["labels"]
        columns = self._columns(labels)
        student = self._logits(model, ids, inputs["attention_mask"], columns, self.step.chunked_logits)
        ids, labels = ids[:, -columns:], labels[:, -columns:]
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
            vllm_generation.empty_cache()
        return loss

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

    def _generate_on_policy_for_slices(self, slices, on_policy_indices):
        with self.clock.phase("generate"):
            super()._generate_on_policy_for_slices(slices, on_policy_indices)

    def _fill_buffer(self, generation_batch, buffer_steps):
        # Ranks sample different rollouts; the draws themselves are rank 0's.
        set_seed(hash((self.args.seed, self.state.global_step, self.accelerator.process_index)) % 2**32)
        super()._fill_buffer(generation_batch, buffer_steps)

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
