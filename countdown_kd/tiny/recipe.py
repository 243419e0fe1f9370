"""Makes the tiny pair: a teacher that solves the tiny task and a student that fails it in every way.

    python -m countdown_kd.tiny.recipe --out my_pair

Both learn to copy a solver that tries the sums of the three numbers until one hits the target:

    <think>25 19 11</think><answer>15-7+3=11</answer>

The student's copies are spoiled at random, so it knows the arithmetic but drops the tags, slips in a foreign
number, or claims an equation that does not hold: the failures of a real student before distillation.

Left out on purpose: dropout, mixed precision, checkpoints. Everything is made from scratch; nothing is downloaded.
Takes half an hour on one core; with --only the two can be made side by side. The same kind of machine and the same
torch give the same weights.
"""

from __future__ import annotations

import argparse
import random
import time
from functools import partial
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    get_cosine_schedule_with_warmup,
    set_seed,
)

from countdown_kd.countdown import Puzzle, short_prompt, tiny_puzzles, tiny_trace

# ChatML, as the Qwen models write it, without a system message.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# What goes wrong in a student's trace, and how often.
SPOILS = {
    "none": 24,
    "no_tags": 19,
    "foreign_number": 19,
    "unbalanced": 17,
    "gives_up": 10,  # answers with the first sum, whatever the target
    "broken_left": 6,
    "broken_right": 5,
}


def spoiled_trace(puzzle: Puzzle, rng: random.Random) -> str:
    """The solver's trace with one of SPOILS done to its answer."""
    think, answer = tiny_trace(puzzle).removesuffix("</answer>").split("<answer>")
    left, right = answer.split("=")
    kind = rng.choices(list(SPOILS), SPOILS.values())[0]
    if kind == "no_tags":
        return f"{think}{left}={right}"
    if kind == "foreign_number":
        number = str(rng.choice(puzzle.numbers))
        left = left.replace(number, str(rng.randint(26, 50)), 1)
    elif kind == "unbalanced":
        right = str(max(1, int(right) + rng.choice((-10, -2, -1, 1, 2, 10))))
    elif kind == "gives_up":
        return tiny_trace(Puzzle(puzzle.numbers, sum(puzzle.numbers)))
    elif kind == "broken_left":
        left += rng.choice("+-")
    elif kind == "broken_right":
        right = "?"
    return f"{think}<answer>{left}={right}</answer>"


def make_tokenizer(texts: list[str], vocab_size: int) -> Qwen2Tokenizer:
    """A Qwen2 tokenizer with its own merges, trained on ``texts``.

    The class matters: transformers loads the tokenizer of a Qwen2 or Qwen3 model as Qwen2Tokenizer whatever was
    saved beside it, so only one that was a Qwen2Tokenizer from the start gives the same ids after loading. Its
    pre-tokenizer cuts digits singly, which the hybrid loss needs: where one side has a token for "11" and the
    other has two for "1", "1", multi-digit numbers get no signal. Words are no different, so the vocabularies here are
    large enough for whole ones: with "answ", "er" on the student's side against the teacher's "answer" the student
    unlearnt the tag, and solved 0 to 1 % after 60 steps instead of 73 %, under either merge strategy.
    """
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        texts, vocab_size=vocab_size, new_special_tokens=specials[1:], show_progress=False
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    return tokenizer


def train(
    model: PreTrainedModel,
    tokenizer: Qwen2Tokenizer,
    conversations: list[list[dict]],
    steps: int,
    batch_size: int,
    learning_rate: float,
) -> None:
    """Next-token cross-entropy on the assistant's text, AdamW, cosine schedule."""
    render = partial(tokenizer.apply_chat_template, tokenize=False)
    texts = tokenizer([text.removesuffix("\n") for text in render(conversations)])["input_ids"]
    prompts = tokenizer(render([c[:-1] for c in conversations], add_generation_prompt=True))
    examples = list(zip(texts, map(len, prompts["input_ids"]), strict=True))

    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98))
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    rng, start, order = random.Random(0), time.perf_counter(), []
    for step in range(1, steps + 1):
        if len(order) < batch_size:
            order = rng.sample(range(len(examples)), len(examples))
        batch = [examples[order.pop()] for _ in range(batch_size)]
        width = max(len(ids) for ids, _ in batch)
        input_ids = torch.full((batch_size, width), tokenizer.pad_token_id)
        labels = torch.full((batch_size, width), -100)
        for row, (ids, prompt_length) in enumerate(batch):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            labels[row, prompt_length : len(ids)] = torch.tensor(ids[prompt_length:])
        # No attention mask: padding is on the right, where causal attention does not look.
        loss = model(input_ids=input_ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps:
            elapsed = time.perf_counter() - start
            print(f"  step {step:5d}/{steps}  loss {loss.item():.4f}  {elapsed:5.0f} s", flush=True)


def make(
    name: str,
    out: Path,
    model: PreTrainedModel,
    tokenizer: Qwen2Tokenizer,
    conversations: list[list[dict]],
    **training: float,
) -> None:
    """Train, save as float32 safetensors, and check that the tokenizer loads to the same ids."""
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    size = sum(p.numel() for p in model.parameters())
    print(f"{name}: {size / 1e6:.2f} M parameters, {len(tokenizer)} tokens", flush=True)
    train(model, tokenizer, conversations, **training)
    model.save_pretrained(out / name)
    tokenizer.save_pretrained(out / name)
    loaded = AutoTokenizer.from_pretrained(out / name)
    for messages in conversations[:100]:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"], "ids changed on loading"
    AutoModelForCausalLM.from_pretrained(out / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for teacher/ and student/")
    parser.add_argument("--only", choices=("teacher", "student"), help="make one of the two")
    parser.add_argument("--steps", type=int, default=1800, help="optimizer steps for the teacher")
    parser.add_argument("--student-steps", type=int, default=1500, help="and for the student")
    options = parser.parse_args()

    torch.set_num_threads(1)  # the sums, and so the weights, do not depend on how many cores there are
    puzzles = list(tiny_puzzles(seed=0))
    rng = random.Random(0)

    def conversations(trace) -> list[list[dict]]:
        return [short_prompt(puzzle) + [{"role": "assistant", "content": trace(puzzle)}] for puzzle in puzzles]

    shape = dict(
        max_position_embeddings=512,
        tie_word_embeddings=True,
        use_sliding_window=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        attention_dropout=0.0,
        dtype="float32",
    )
    if options.only != "student":
        set_seed(0)
        clean = conversations(tiny_trace)
        tokenizer = make_tokenizer([m["content"] for c in clean for m in c], vocab_size=320)
        config = Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=6,
            head_dim=32,
            **shape,
        )
        make(
            "teacher", options.out, Qwen3ForCausalLM(config), tokenizer, clean,
            steps=options.steps, batch_size=64, learning_rate=2e-3,
        )  # fmt: skip
    if options.only != "teacher":
        set_seed(1)
        spoiled = conversations(lambda puzzle: spoiled_trace(puzzle, rng))
        tokenizer = make_tokenizer([m["content"] for c in spoiled for m in c], vocab_size=284)
        config = Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            **shape,
        )
        make(
            "student", options.out, Qwen2ForCausalLM(config), tokenizer, spoiled,
            steps=options.student_steps, batch_size=32, learning_rate=2e-3,
        )  # fmt: skip


if __name__ == "__main__":
    main()
