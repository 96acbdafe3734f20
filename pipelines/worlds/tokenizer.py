"""A tokenizer of the worlds' questions and answers: a word is one token, of what is read in an image each letter.

By bytes a question is longer than the image that it is about, and most of what a small model learns is spelling.
"""

from __future__ import annotations

import re
from pathlib import Path

VOCAB_SIZE = 512
"""At most so many tokens: 256 bytes, the words' merges, four control tokens."""


WORDS = re.findall(
    r"\w+",
    "What Where Which How many is are it this there in at the of a an one colour shape number word top middle bottom left "
    "right centre above below largest just red orange yellow green cyan blue purple white circle square triangle plus ring "
    "circles squares triangles pluses rings",
)


def write_tokenizer(folder: Path) -> None:
    """Write a Hugging Face folder for the template `tiny`: byte pairs, merged until words are whole."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rust = Tokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.Sequence([
        # Capitals and digits stand alone, the same behind a space, unless a word begins with them.
        pre_tokenizers.Split(Regex(r" ?[A-Z]?[a-z]+|[A-Z0-9]| "), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    rust.decoder = decoders.ByteLevel()
    control = ["<bos>", "<user>", "<assistant>", "<end>"]
    rust.train_from_iterator(
        [*WORDS, *(f" {word}" for word in WORDS)],
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=[AddedToken(name, special=True, normalized=False) for name in control],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    names = {"bos_token": "<bos>", "eos_token": "<end>", "pad_token": "<end>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=rust, clean_up_tokenization_spaces=False, **names)
    fast.save_pretrained(str(folder))
