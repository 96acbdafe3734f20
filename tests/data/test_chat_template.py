"""Each template spells its family's text, the loss covers the answers with their ends, and images keep their places."""

import hashlib
import itertools
import json
import os
import random
import re
import shutil
from types import SimpleNamespace

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from himix_megatron.conversion.export.tokenizer import byte_characters
from himix_megatron.data.errors import BadSampleError
from himix_megatron.data.text.chat_template import (
    TEMPLATES,
    check_conversation,
    check_tokenizer,
    encode,
    end_of_turn,
    prompt,
    turns_of,
    with_marks,
    without_marks,
)
from himix_megatron.data.text.tokenizer import HuggingFaceTokenizer, Piece, load_tokenizer
from tests.support.data_fixtures import row

CORPUS = [
    "USER: What does the picture show? ASSISTANT: a red circle on the left",
    "A chat between a curious user and an artificial intelligence assistant.",
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "user\nassistant\nsystem\nYou are a helpful assistant.",
] * 3
QWEN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
LLAMA3 = "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"


def byte_level(specials) -> Tokenizer:
    """Byte-level BPE, the kind of Qwen2 and Llama 3."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return tokenizer


def spaces_as_prefix() -> Tokenizer:
    """SentencePiece-like BPE with byte fallback, the kind of Llama 2, Vicuna and TinyLlama."""
    words = [word for line in CORPUS for word in line.replace(" ", " ▁").split(" ")]  # as SentencePiece: no merge across words
    learned = Tokenizer(models.BPE())
    learned.train_from_iterator(words, trainers.BpeTrainer(vocab_size=400, show_progress=False))
    model = json.loads(learned.to_str())["model"]
    specials = ["<unk>", "<s>", "</s>"]
    tokens = [*specials, *(f"<0x{i:02X}>" for i in range(256)), *sorted(model["vocab"], key=model["vocab"].get)]
    vocab, merges = {token: i for i, token in enumerate(tokens)}, [tuple(pair) for pair in model["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return tokenizer


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A tokenizer folder per family."""
    made = {
        "qwen2": PreTrainedTokenizerFast(tokenizer_object=byte_level(QWEN), eos_token="<|endoftext|>"),
        "llama3": PreTrainedTokenizerFast(
            tokenizer_object=byte_level(LLAMA3), bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>"
        ),
        "vicuna": PreTrainedTokenizerFast(
            tokenizer_object=spaces_as_prefix(), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
        ),
    }
    made["qwen2"].chat_template = (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )  # as Qwen2 publishes it
    made["llama3"].chat_template = (
        "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
        "+ message['content'] | trim + '<|eot_id|>' %}{% if loop.first %}{% set content = bos_token + content %}{% endif %}"
        "{{ content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    )  # as Llama 3 publishes it
    made["vicuna"].chat_template = (
        "{{ bos_token }}A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. {% for message in messages %}"
        "{% if message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ' }}"
        "{% else %}{{ 'ASSISTANT: ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    )  # Vicuna's tokenizer has none: FastChat's vicuna_v1.1 written as one
    for name, tokenizer in made.items():
        tokenizer.save_pretrained(tmp_path_factory.getbasetemp() / name)
    return {name: tmp_path_factory.getbasetemp() / name for name in made}


@pytest.fixture(
    params=["plain-bytes", "plain-qwen2", "plain-vicuna", "vicuna-vicuna", "llama3-llama3", "chatml-qwen2", "tiny-bytes"]
)
def family(request, folders):
    """(template, its tokenizer)."""
    template, name = request.param.split("-")
    return template, load_tokenizer("bytes" if name == "bytes" else str(folders[name]))


TALK = row(0, "a.png", "What does it show?", "a red circle", "Where is it, ünd in 你好?", "on the lëft 🙂", "Thanks!", "ok")
CAPTION = row(0, "a.png", "Describe it.", "a red circle 🙂 ünd 你好")
ENDS = {"plain": "\n", "vicuna": "</s>", "llama3": "<|eot_id|>", "chatml": "<|im_end|>", "tiny": ""}


def spelled(tokenizer, ids) -> str:
    """Text of ids with special tokens, for Hugging Face tokenizers."""
    return tokenizer._tokenizer.decode(list(ids), skip_special_tokens=False)


def test_the_loss_covers_exactly_the_answers_and_their_ends(family):
    template, tokenizer = family
    talk = CAPTION if template == "plain" else TALK
    text = encode(talk, tokenizer, template, 10_000)
    assert not text.was_cut
    assert not text.loss_mask[0]
    starts = [i for i in range(1, len(text.ids)) if text.loss_mask[i] and not text.loss_mask[i - 1]]
    ends = [i for i in range(1, len(text.ids) + 1) if text.loss_mask[i - 1] and (i == len(text.ids) or not text.loss_mask[i])]
    answers = [answer for _, answer in turns_of(talk)]
    assert len(starts) == len(answers)
    for start, end, answer in zip(starts, ends, answers, strict=True):
        said = text.ids[start:end]
        assert tuple(said[-len(end_of_turn(tokenizer, template)) :]) == end_of_turn(tokenizer, template)
        assert tokenizer.decode(said).strip() == answer
        if hasattr(tokenizer, "_tokenizer"):
            assert spelled(tokenizer, said).strip(" ") == answer + ENDS[template]


def test_a_prompt_is_what_stood_before_the_answer(family):
    template, tokenizer = family
    talk = CAPTION if template == "plain" else TALK
    text = encode(talk, tokenizer, template, 10_000)
    starts = [i for i in range(1, len(text.ids)) if text.loss_mask[i] and not text.loss_mask[i - 1]]
    for answer, start in enumerate(starts):
        assert prompt(talk, tokenizer, template, answer).ids.tolist() == text.ids[:start].tolist()
    unanswered = {"conversations": talk["conversations"][:1]}
    assert prompt(unanswered, tokenizer, template).ids.tolist() == text.ids[: starts[0]].tolist()


def test_ids_are_those_of_the_whole_text(folders):
    """Nothing is lost at the seams between pieces: the tokenizer sees one string."""
    vicuna = load_tokenizer(str(folders["vicuna"]))
    text = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
        "polite answers to the user's questions. USER: What does it show? ASSISTANT: a red circle</s>USER: Where? "
        "ASSISTANT: left</s>"
    )
    talk = row(0, "a.png", "What does it show?", "a red circle", "Where?", "left")
    ids = encode(talk, vicuna, "vicuna", 1000).ids.tolist()
    assert ids == [vicuna.special_id("bos"), *vicuna._tokenizer(text, add_special_tokens=False)["input_ids"]]

    llama3 = load_tokenizer(str(folders["llama3"]))
    text = (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhat does it show?<|eot_id|><|start_header_id|>assistant"
        "<|end_header_id|>\n\na red circle<|eot_id|>"
    )
    ids = encode(row(0, "a.png", "What does it show?", "a red circle"), llama3, "llama3", 1000).ids.tolist()
    assert ids == llama3._tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(("template", "name"), [("chatml", "qwen2"), ("llama3", "llama3"), ("vicuna", "vicuna")])
def test_templates_equal_the_tokenizers_own_chat_template(folders, template, name):
    tokenizer = load_tokenizer(str(folders[name]))
    messages = []
    for question, answer in turns_of(TALK):
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    def theirs(number: int, **how):
        text = tokenizer._tokenizer.apply_chat_template(messages[:number], tokenize=False, **how)
        # ChatML closes with a newline behind the end of the answer, which no model has to learn to write.
        text = text if how else text.removesuffix("\n")
        return tokenizer._tokenizer(text, add_special_tokens=False)["input_ids"]

    assert encode(TALK, tokenizer, template, 1000).ids.tolist() == theirs(6)
    for answer in range(3):
        asked = prompt(TALK, tokenizer, template, answer)
        assert asked.ids.tolist() == theirs(2 * answer + 1, add_generation_prompt=True)


def test_plain_starts_with_bos_or_else_with_eos(folders):
    for name, start in (("vicuna", "<s>"), ("llama3", "<|begin_of_text|>"), ("qwen2", "<|endoftext|>")):
        tokenizer = load_tokenizer(str(folders[name]))
        ids = encode(CAPTION, tokenizer, "plain", 1000).ids
        assert spelled(tokenizer, ids[:1]) == start
        assert len(prompt(CAPTION, tokenizer, "plain").ids) == 1


def test_the_tiny_template_costs_four_tokens():
    tokenizer = load_tokenizer("bytes")
    talk = row(0, "a.png", "Why?", "So.")
    text = encode(talk, tokenizer, "tiny", 100)
    assert text.ids.tolist() == [256, 257, *b"Why?", 258, *b"So.", 259]
    assert max(text.ids) < tokenizer.vocab_size
    assert tokenizer.decode(text.ids) == "Why?So."


def test_long_texts_are_cut_and_say_so():
    tokenizer = load_tokenizer("bytes")
    text = encode(row(0, None, "Why?", "So it is."), tokenizer, "tiny", 9)
    assert text.was_cut
    assert len(text.ids) == len(text.loss_mask) == 9
    assert text.loss_mask.tolist() == [False] * 7 + [True] * 2


@pytest.mark.parametrize(
    ("marked", "clean"),
    [
        ("<image>\nWhat?", "What?"),
        ("What?\n<image>", "What?"),
        ("What?<image>", "What?"),
        ("One\n<image>\nTwo", "One\nTwo"),
        ("<image>\n<image>\nWhich?", "Which?"),
        ("<image>", ""),
        ("One <image> two", "One  two"),
    ],
)
def test_marks_go_with_one_newline(marked, clean):
    assert without_marks(marked) == clean


SPELLED = {
    "plain": ("START", "{unwritten}{answer}\n", ""),
    "vicuna": (
        "<s>A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. ",
        "USER: {question} ASSISTANT: {answer}</s>",
        "",
    ),
    "llama3": (
        "<|begin_of_text|>",
        "<|start_header_id|>user<|end_header_id|>\n\n{question}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{answer}<|eot_id|>",
        "",
    ),
    "chatml": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n",
        "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>",
        "\n",
    ),
    "tiny": ("\0", "\1{question}\2{answer}\3", ""),
}
"""Opening, turn and what is between turns: the templates once more, as strings. A byte stands for each of tiny's tokens."""
MARK = "\ue000"
STRETCHES = ["a red circle", " ", "\n", "ünd", "你好", "🙂", "👩‍👧", "e\u0301", "the assis", "tant", "left", "?", "  x"]
MARKS = ["<image>", "<image>\n", "\n<image>", "\n<image>\n", "<image>" * 2, "<image>\n" * 2]


def drawn_text(draw: random.Random) -> str:
    kinds = draw.choices((STRETCHES, MARKS), (2, 1), k=draw.randrange(1, 8))
    return "".join(draw.choice(kind) for kind in kinds)


def marked(text: str) -> str:
    """A turn as it is written, with one character for each mark: letter by letter."""
    letters: list[str] = []
    while text:
        if text.startswith("<image>"):
            takes_before = letters[-1:] == ["\n"]
            letters = [*(letters[:-1] if takes_before else letters), MARK]
            text = text[len("<image>") :]
            text = text if takes_before else text.removeprefix("\n")
        else:
            letters.append(text[0])
            text = text[1:]
    return "".join(stripped(stripped(letters)[::-1])[::-1])


def stripped(letters: list[str]) -> list[str]:
    """Without white space at the start, marks or not among it."""
    first = next((i for i, letter in enumerate(letters) if letter != MARK and not letter.isspace()), len(letters))
    return [MARK] * letters[:first].count(MARK) + letters[first:]


def bytes_of(tokenizer, ids) -> list[bytes]:
    """What each token writes."""
    if not hasattr(tokenizer, "_tokenizer"):
        return [bytes(1)] * len(ids)
    known = {character: bytes([byte]) for byte, character in enumerate(byte_characters())}
    names, special = tokenizer._tokenizer.convert_ids_to_tokens(list(ids)), tokenizer._tokenizer.all_special_tokens
    added = {*special, *tokenizer._tokenizer.get_added_vocab()}
    is_byte_level = "Ġ" in tokenizer._tokenizer.get_vocab()
    written = []
    for name in names:
        if name in added:
            written.append(name.encode())
        elif is_byte_level:
            written.append(b"".join(known[character] for character in name))
        else:
            byte = re.fullmatch("<0x(..)>", name)
            written.append(bytes.fromhex(byte[1]) if byte else name.replace("▁", " ").encode())
    return written


def places_by_bytes(talk, tokenizer, template) -> list[int]:
    """Slowly: the template's string with a character for each mark, and the bytes that each token writes of it."""
    opening, turn, between = SPELLED[template]
    texts = [marked(said["value"]) for said in talk["conversations"]]
    turns = [
        turn.format(question=question, unwritten=MARK * question.count(MARK), answer=answer)
        for question, answer in zip(texts[::2], texts[1::2], strict=True)
    ]
    ids = encode(talk, tokenizer, template, 10_000).ids
    written = bytes_of(tokenizer, ids)
    *stretches, last = (opening.replace("START", written[0].decode()) + between.join(turns)).split(MARK)
    whole, offsets = "".join([*stretches, last]).encode(), itertools.accumulate(len(s.encode()) for s in stretches)
    ends, at = [], 0
    for number, text in enumerate(written):
        if hasattr(tokenizer, "_tokenizer") and not whole.startswith(text, at):
            assert text[:1] == b" ", (number, text)
            text = text[1:]  # the tokenizer's own space, before the first word of a text
            assert whole.startswith(text, at)
        at += len(text)
        ends.append(at if text else at + 1)
    assert at == len(whole)
    return [next((number for number, end in enumerate(ends) if end > offset), len(ids)) for offset in offsets]


def test_places_are_those_of_a_count_byte_by_byte(family):
    template, tokenizer = family
    draw, num_marks = random.Random(template), 0
    for number in range(80):
        num_turns = 1 if template == "plain" else draw.randrange(1, 4)
        talk = row(number, None, *(drawn_text(draw) for _ in range(2 * num_turns)))
        text = encode(talk, tokenizer, template, 10_000)
        assert text.image_places.tolist() == places_by_bytes(talk, tokenizer, template), talk
        assert text.image_places.dtype == "int64"
        num_marks += len(text.image_places)
    assert num_marks > 100


def test_a_prompt_has_its_images_where_the_whole_text_has_them(family):
    template, tokenizer = family
    draw, num_marks = random.Random(template), 0
    for number in range(40):
        num_turns = 1 if template == "plain" else draw.randrange(1, 4)
        talk = row(number, None, *(drawn_text(draw) for _ in range(2 * num_turns)))
        whole = encode(talk, tokenizer, template, 10_000).image_places.tolist()
        for answer in range(num_turns):
            asked = prompt(talk, tokenizer, template, answer)
            shown = sum(turn["value"].count("<image>") for turn in talk["conversations"][: 2 * answer + 1])
            assert list(asked.image_places) == whole[:shown], talk
            num_marks += shown
    assert num_marks > 50


def test_images_without_marks_stand_before_the_first_question_and_change_no_id(family):
    template, tokenizer = family
    talk = row(0, None, "\n What? ", "It.", "And?", "Is.") if template != "plain" else row(0, None, "\n What? ", "It.")
    marked = {"conversations": with_marks(talk["conversations"], 2)}
    text, wanted = encode(marked, tokenizer, template, 100), encode(talk, tokenizer, template, 100)
    assert text.ids.tolist() == wanted.ids.tolist()
    first = encode(row(0, None, "<image> What?", "It."), tokenizer, template, 100).image_places.tolist()
    assert text.image_places.tolist() == 2 * first
    assert with_marks(marked["conversations"], 1) == marked["conversations"]


def test_marks_change_neither_ids_nor_loss(family):
    template, tokenizer = family
    draw = random.Random(template)
    for number in range(20):
        said = [drawn_text(draw) for _ in range(2 if template == "plain" else 4)]
        with_marks, without = (
            encode(row(number, None, *turns), tokenizer, template, 40) for turns in (said, map(without_marks, said))
        )
        assert with_marks.ids.tolist() == without.ids.tolist()
        assert with_marks.loss_mask.tolist() == without.loss_mask.tolist()
        assert (with_marks.was_cut, without.image_places.tolist()) == (without.was_cut, [])


@pytest.mark.parametrize(
    ("turns", "places"),
    [
        (("<image>\nWhy?", "So."), [2]),
        (("Why?\n<image>", "So."), [6]),
        (("Why<image>?", "So."), [5]),
        (("<image>", "So."), [2]),
        (("  <image>  Why?", "So."), [2]),
        (("<image><image>\nWhy?", "So."), [2, 2]),
        (("<image>a<image>b<image>", "So."), [2, 3, 4]),
        (("ü🙂<image>?", "So."), [8]),
        (("Why?", "<image>So<image>."), [7, 9]),
        (("Why?", "So.", "<image>And?", "Then <image>"), [12, 21]),
        (("Why?", "So."), []),
    ],
)
def test_a_place_is_the_number_of_tokens_before_the_mark(turns, places):
    assert encode(row(0, None, *turns), load_tokenizer("bytes"), "tiny", 100).image_places.tolist() == places


def test_images_of_a_question_that_is_not_written_stand_before_the_caption(folders):
    for name in ("bytes", "qwen2", "vicuna"):
        tokenizer = load_tokenizer("bytes" if name == "bytes" else str(folders[name]))
        talk = row(0, None, "<image>\nDescribe it.<image>", "<image>a red <image>circle")
        places = encode(talk, tokenizer, "plain", 100).image_places.tolist()
        assert places[:3] == [1, 1, 1]
        assert tokenizer.decode(encode(talk, tokenizer, "plain", 100).ids[1 : places[3]]).strip() == "a red"


def test_a_token_that_a_mark_fell_into_comes_after_its_image(folders):
    for name, template in (("qwen2", "chatml"), ("vicuna", "vicuna")):
        tokenizer = load_tokenizer(str(folders[name]))
        text = encode(row(0, None, "the assis<image>tant", "a"), tokenizer, template, 1000)
        (place,) = text.image_places.tolist()
        assert tokenizer.decode(text.ids[:place]).endswith("the")
        assert tokenizer.decode(text.ids[place : place + 1]).strip() == "assistant"


def test_a_token_without_characters_belongs_to_what_follows_it(folders, monkeypatch):
    tokenizer = HuggingFaceTokenizer(folders["vicuna"])
    encoding = SimpleNamespace(ids=[5, 6, 7], offsets=[(0, 2), (2, 2), (2, 3)])
    monkeypatch.setattr(tokenizer, "_rust", SimpleNamespace(encode=lambda text, **_: encoding))
    pieces = [Piece("ab", marks=(0, 2)), Piece("c", loss=True, marks=(0, 1))]
    assert tokenizer.encode(pieces) == ([5, 6, 7], [False, True, True], [0, 1, 1, 3])


def test_places_in_a_text_that_is_cut_are_at_most_its_end():
    talk = row(0, None, "<image>Why?<image>", "So <image>it is.<image>")
    tokenizer = load_tokenizer("bytes")
    assert encode(talk, tokenizer, "tiny", 100).image_places.tolist() == [2, 6, 10, 16]
    assert encode(talk, tokenizer, "tiny", 10).image_places.tolist() == [2, 6, 10, 10]
    assert encode(talk, tokenizer, "tiny", 4).image_places.tolist() == [2, 4, 4, 4]


def test_a_tokenizer_without_the_templates_tokens_is_refused(folders):
    qwen2, vicuna = (load_tokenizer(str(folders[name])) for name in ("qwen2", "vicuna"))
    with pytest.raises(ValueError, match=r"llama3 needs bos and <\|start_header_id\|> and .*<\|eot_id\|>"):
        check_tokenizer(qwen2, "llama3")
    with pytest.raises(ValueError, match=r"tiny needs <user> and <assistant> and <end>"):
        check_tokenizer(vicuna, "tiny")
    with pytest.raises(ValueError, match="chatml needs"):
        check_tokenizer(load_tokenizer("bytes"), "chatml")
    for template, tokenizer in (("chatml", qwen2), ("plain", qwen2), ("vicuna", vicuna), ("tiny", load_tokenizer("bytes"))):
        check_tokenizer(tokenizer, template)
    assert set(TEMPLATES) == {"plain", "vicuna", "llama3", "chatml", "tiny"}


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere: no such folder"):
        load_tokenizer(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"transformers cannot read it") as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_plain_refuses_several_turns():
    with pytest.raises(ValueError, match="captions"):
        encode(TALK, load_tokenizer("bytes"), "plain", 100)


def test_fingerprints_tell_tokenizers_apart(folders):
    prints = {load_tokenizer(str(folder)).fingerprint for folder in folders.values()}
    assert len(prints) == 3
    assert load_tokenizer(str(folders["qwen2"])).fingerprint in prints


@pytest.mark.parametrize(
    ("turns", "num_images", "reason"),
    [
        (None, 0, "malformed"),
        ([], 0, "malformed"),
        ("hello", 0, "malformed"),
        ([{"from": "human"}], 0, "malformed"),
        ([{"from": "human", "value": 3}, {"from": "gpt", "value": "x"}], 0, "malformed"),
        ([{"from": "gpt", "value": "x"}], 0, "roles"),
        ([{"from": "human", "value": "x"}], 0, "roles"),
        ([{"from": "human", "value": "x"}] * 2, 0, "roles"),
        ([{"from": "system", "value": "x"}, {"from": "gpt", "value": "x"}], 0, "roles"),
        ([{"from": "human", "value": "x"}, {"from": "gpt", "value": "x"}], 1, "image_marks"),
        ([{"from": "human", "value": "<image><image>x"}, {"from": "gpt", "value": "x"}], 1, "image_marks"),
        ([{"from": "human", "value": "<image>x"}, {"from": "gpt", "value": "x"}], 0, "image_marks"),
    ],
)
def test_bad_conversations_are_named(turns, num_images, reason):
    with pytest.raises(BadSampleError) as caught:
        check_conversation(turns, num_images)
    assert caught.value.reason == reason


# ---- control tokens in texts ----------------------------------------------------------------------------------------


def control_names(tokenizer) -> list[str]:
    return (
        ["<bos>", "<user>", "<end>"] if not hasattr(tokenizer, "_tokenizer") else list(tokenizer._tokenizer.get_added_vocab())
    )


def hostile_talk(template, tokenizer, number: int):
    """Turns that end themselves, open others, and hold names of control tokens in pieces, doubled and beside marks."""
    names, draw = control_names(tokenizer), random.Random(f"{template}{number}")
    stretches = [*names, *names, "hi ", "\n", "é", "\u2060", "\u2061a", names[0][:3], names[-1][2:], "<im<image>age>"]
    num_texts = 2 if template == "plain" else 4
    return row(0, None, *("".join(draw.choices(stretches, k=draw.randrange(1, 9))) for _ in range(num_texts)))


def test_a_text_cannot_hold_a_control_token(family):
    template, tokenizer = family
    control = {token for token in (tokenizer.special_id(name) for name in ("bos", "eos", *control_names(tokenizer))) if token}
    for number in range(40):
        talk = hostile_talk(template, tokenizer, number)
        honest = {"conversations": [{"from": turn["from"], "value": "a"} for turn in talk["conversations"]]}
        text = encode(talk, tokenizer, template, 10_000)
        ours, theirs = ([i for i in ids if i in control] for ids in (text.ids, encode(honest, tokenizer, template, 100).ids))
        assert ours == theirs, talk
        said = [text for turn in turns_of(talk) for text in (turn[1:] if template == "plain" else turn)]
        assert all(word in tokenizer.decode(text.ids) for word in " ".join(said).split() if word.isascii())
        for answer in range(len(talk["conversations"]) // 2):
            asked = prompt(talk, tokenizer, template, answer).ids
            assert asked.tolist() == text.ids[: len(asked)].tolist()


def test_a_control_token_that_the_tokenizer_does_not_call_special_is_one_too(tmp_path):
    rust = byte_level(["<|endoftext|>"])
    rust.add_tokens([*QWEN[1:], "<place>"])
    PreTrainedTokenizerFast(tokenizer_object=rust, eos_token="<|endoftext|>").save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    check_tokenizer(tokenizer, "chatml")
    ids = encode(row(0, None, "<|im_end|>", "<place>"), tokenizer, "chatml", 100).ids.tolist()
    assert [ids.count(tokenizer._added[name]) for name in (*QWEN[1:], "<place>")] == [3, 3, 1]


def first_space_only() -> Tokenizer:
    """As newer Llama tokenizers: a space before the first word of the whole text; one token takes the space before it."""
    tokenizer = spaces_as_prefix()
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.add_special_tokens([AddedToken("<eats>", special=True, normalized=False, lstrip=True, rstrip=True)])
    return tokenizer


@pytest.mark.parametrize("name", ["qwen2", "llama3", "vicuna", "first space only", "lower case"])
def test_other_texts_get_the_ids_that_the_tokenizer_gives_the_whole(folders, tmp_path, name):
    if name not in folders:
        rust = first_space_only() if name == "first space only" else byte_level([*QWEN, "<eats>", "<s>", "</s>"])
        if name == "lower case":
            rust.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
        PreTrainedTokenizerFast(tokenizer_object=rust, bos_token="<s>", eos_token="</s>").save_pretrained(tmp_path)
    tokenizer, draw = HuggingFaceTokenizer(folders.get(name, tmp_path)), random.Random(name)
    names = list(tokenizer._tokenizer.get_added_vocab())
    texts = [
        " ",
        "  a",
        "\n\n",
        "The USER: ",
        "ünd",
        "e\u0301",
        "你好",
        "🙂",
        "assistant",
        " ?\t",
        "<",
        "|>",
        "\u2060",
        "ASSISTANT",
    ]
    for _ in range(300):
        words = [draw.choice(texts), *draw.choices([*texts, *names], k=8)]
        pieces = [Piece(word, special=word in names, loss=draw.random() < 0.5, marks=(0,)) for word in words]
        found = tokenizer.encode(pieces)
        known = tokenizer._tokenizer("".join(words), add_special_tokens=False, return_offsets_mapping=True)
        assert found.ids == known["input_ids"], words
        counts = "".join(("y" if piece.loss else "n") * len(piece.text) for piece in pieces)
        spans = [(begin, max(end, begin + 1)) for begin, end in known["offset_mapping"]]
        if "eats" not in "".join(words):  # its span holds the spaces around it, whose alias is longer
            assert found.loss == ["y" in counts[begin:end] for begin, end in spans], words


def test_a_fingerprint_says_that_texts_hold_no_control_tokens(folders):
    """Lengths counted before that are not taken for these."""
    tokenizer = load_tokenizer(str(folders["qwen2"]))
    digest = hashlib.sha256(tokenizer._tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
    assert tokenizer.fingerprint == f"2-{digest}"


def test_a_regular_expression_that_gives_up_is_one_line(tmp_path):
    rust = byte_level(QWEN)
    split = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    rust.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    PreTrainedTokenizerFast(tokenizer_object=rust, eos_token="<|endoftext|>").save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    with pytest.raises(ValueError, match=r"^data\.tokenizer cannot read a text of \d+ characters: .*retry-limit.*$"):
        encode(row(0, None, "a" * 40 + "b", "a"), tokenizer, "chatml", 1000)
    assert len(encode(row(0, None, "b", "a"), tokenizer, "chatml", 1000).ids)


DEEP = '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"


FILES = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json"]
BROKEN = [*itertools.product(FILES, [DEEP, "[]", "{", "FIFO"]), ("tokenizer.json", '{"model": 5, "added_tokens": []}')]


@pytest.mark.parametrize(("name", "content"), BROKEN, ids=[f"{name}-{content[:14]}" for name, content in BROKEN])
def test_a_broken_tokenizer_folder_is_one_line(folders, tmp_path, name, content):
    shutil.copytree(folders["qwen2"], tmp_path / "folder")
    path = tmp_path / "folder" / name
    path.unlink(missing_ok=True)
    os.mkfifo(path) if content == "FIFO" else path.write_text(content)
    with pytest.raises(ValueError, match=r"^data\.tokenizer is .*$"):
        HuggingFaceTokenizer(tmp_path / "folder")


def test_a_tokenizer_whose_numbers_reach_far_is_refused_before_it_is_written_out(folders, tmp_path):
    """Writing it out walks through all numbers up to the largest."""
    shutil.copytree(folders["qwen2"], tmp_path / "folder")
    path = tmp_path / "folder" / "tokenizer.json"
    tree = json.loads(path.read_text())
    tree["model"]["vocab"]["x"] = 2**31
    path.write_text(json.dumps(tree))
    with pytest.raises(ValueError, match=r"tokens, whose numbers reach 2147483648"):
        HuggingFaceTokenizer(tmp_path / "folder")
