"""What we add to TRL's GOLDTrainer, and no more.

1. Each optimizer step draws from its own seed. TRL draws the on-policy micro-batches (lambda) from Python's global
   generator and samples from torch's, and vLLM reseeds both when it starts: two cells of one sweep would train on
   different mixtures. Here draws depend on the seed and the step alone, so loss curves can be laid over each other.
2. A colocated vLLM gets the rollout dtype, which TRL does not pass on (an fp32 student would be sampled from in half
   precision), and on the CPU its weights in a way that works there.
3. The steps are timed by phase, and the on-policy draws, rollout lengths and truncations recorded.
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
from trl.generation import vllm_generation
from trl.generation.vllm_generation import VLLMGeneration

from countdown_kd.perf import StepClock


class VLLM(VLLMGeneration):
    """TRL's vLLM wrapper with the arguments of ``vllm.LLM`` that it does not pass on."""

    def __init__(self, *args, llm: dict, **kwargs):
        self.llm_arguments = llm
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
        if self.mode == "server" or self.accelerator.device.type != "cpu":
            return super().sync_weights()
        # On the CPU vLLM packs linear layers when it loads them, and load_weights, which TRL calls, fails on packed
        # ones. reload_weights unpacks, loads all and packs again.
        runner = self.llm.llm_engine.model_executor.driver_worker.model_runner
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
    )


class CountdownTrainer(GOLDTrainer):
    """GOLDTrainer with pinned draws, the rollout dtype handed to vLLM, and timed phases.

    ``clock`` holds the timings. ``draws`` and ``batches`` have a list per optimizer step with an entry per micro-batch:
    whether the student sampled it itself (of the ranks, rank 0 draws for all), and a hash of its prompts and one of
    its completions, by which runs can be told to have seen the same.
    """

    def __init__(self, *, args: GOLDConfig, gen: DictConfig, **kwargs):
        self.clock = StepClock()
        self.draws: list[list[bool]] = []
        self.batches: list[list[tuple[str, str]]] = []
        # TRL builds its own engine where use_vllm is set; ours takes its place.
        use_vllm, args.use_vllm = args.use_vllm, False
        super().__init__(args=args, **kwargs)
        self.use_vllm = args.use_vllm = use_vllm
        if use_vllm:
            self.vllm_generation = make_vllm(self.model, self._tokenizer, self.accelerator, args, gen)
            self.vllm_sync_frequency = args.vllm_sync_frequency
            self._last_vllm_sync_step = -args.vllm_sync_frequency
            sync = self.vllm_generation.sync_weights

            def timed_sync():
                with self.clock.phase("sync"):
                    sync()

            self.vllm_generation.sync_weights = timed_sync
        self.clock.watch(self.model, "student")
        self.clock.watch(self.teacher_model, "teacher")
        self.add_callback(self.clock)

    def training_step(self, model, inputs, num_items_in_batch=None):
        with self.clock.phase("backward"):
            return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with self.clock.phase("loss"):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

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
