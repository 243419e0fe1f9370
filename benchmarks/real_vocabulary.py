"""A student and a teacher with random weights and vocabularies as large as Qwen's: for timing, without a download.

    python benchmarks/real_vocabulary.py FOLDER            # tiny widths, for a CPU
    python benchmarks/real_vocabulary.py FOLDER --large    # the widths of Qwen2.5-1.5B and Qwen3-4B, in bf16: 11 GB

A student with random weights samples any token, so nearly every token is a word that both tokenizers cut as one, or the
teacher would get another number of tokens. They are made-up words of four Greek letters, and merges that spell them.
"""

from __future__ import annotations

import argparse
import json
from itertools import islice, product
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config, Qwen2Tokenizer, Qwen3Config, set_seed

from countdown_kd.data import generated
from countdown_kd.tiny.recipe import make_tokenizer

VOCABULARY = 151_936  # columns of the output layers of Qwen2.5 (to 3B) and Qwen3
SHARED = 151_663  # tokens that Qwen2.5 and Qwen3 share
LETTERS = "αβγδεζηθικλμνξοπρστυφχψω"
TINY = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
STUDENT = dict(
    hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
)  # fmt: skip
TEACHER = dict(
    hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,
    head_dim=128,
)  # fmt: skip


def make_tokenizers(vocabulary: int = VOCABULARY, shared: int = SHARED) -> list[Qwen2Tokenizer]:
    """The student's and the teacher's, ``vocabulary`` tokens each, of which ``shared`` are the same."""
    data = generated("public", num_train=500, num_test=1, seed=0)
    texts = [message["content"] for each in data.train for message in each.prompt] + [
        each.completion for each in data.train
    ]
    small = make_tokenizer(texts, vocab_size=900)
    trained = json.loads(small.backend_tokenizer.to_str())["model"]
    spell = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str
    space, *letters = ("".join(piece for piece, _ in spell(text)) for text in " " + LETTERS)
    pairs = list(product(letters, repeat=2))
    # In this order every word has one way to be merged: " αβγδ" by " α", " αβ", "γδ".
    merges = [tuple(pair) for pair in trained["merges"]]
    merges += [tuple(letter) for letter in letters]
    merges += [(space, letter) for letter in letters]
    merges += [(space + a, b) for a, b in pairs]
    merges += pairs
    parts = trained["vocab"] | {}
    for a, b in merges:
        parts.setdefault(a + b, len(parts))
    own = vocabulary - shared
    words = ((space + a + b, c + d) for (a, b), (c, d) in product(pairs, repeat=2))
    words = list(islice(words, shared - len(parts) + 2 * own))
    tokenizers = []
    for mine in (words[: -2 * own] + words[-own:], words[:-own]):
        ids = parts | {a + b: i for i, (a, b) in enumerate(mine, start=len(parts))}
        tokenizer = Qwen2Tokenizer(ids, merges + mine, additional_special_tokens=["<|im_start|>"])
        tokenizer.eos_token, tokenizer.pad_token = small.eos_token, small.pad_token
        tokenizer.chat_template = small.chat_template
        tokenizers.append(tokenizer)
    return tokenizers


def make_model(name: str, tokenizer: Qwen2Tokenizer, large: bool) -> PreTrainedModel:
    """A "student" or a "teacher" with random weights, on the GPU where there is one."""
    config, size = {"student": (Qwen2Config, STUDENT), "teacher": (Qwen3Config, TEACHER)}[name]
    set_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return AutoModelForCausalLM.from_config(
            config(
                vocab_size=len(tokenizer), tie_word_embeddings=True, max_position_embeddings=4096,
                bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
                **(size if large else TINY),
            ),
            dtype=torch.bfloat16 if large else torch.float32,
        )  # fmt: skip


def make_pair(folder: Path, large: bool) -> tuple[Path, Path]:
    """Folders with a student and a teacher, made unless they are there."""
    for name, tokenizer in zip(("student", "teacher"), make_tokenizers(), strict=True):
        if not (folder / name).exists():
            make_model(name, tokenizer, large).save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
    return folder / "student", folder / "teacher"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--large", action="store_true", help="the widths of Qwen2.5-1.5B and Qwen3-4B")
    given = parser.parse_args()
    for path in make_pair(given.folder, given.large):
        print(path)


if __name__ == "__main__":
    main()
