"""Our templates and tokenizers in Hugging Face's terms: a Jinja chat template, and a tokenizer folder.

Flows in: a template's name and a tokenizer; out: text and files that spell a conversation with the same ids as
`data.text.chat_template` does. transformers alone reads them.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from ...data.text.chat_template import IMAGE_MARK, check_tokenizer, end_of_turn, template_of
from ...data.text.tokenizer import BYTE_SPECIAL, HuggingFaceTokenizer, Piece, Tokenizer, load_tokenizer

_MACROS = r"""
{%- set marked = namespace(any=false) -%}
{%- macro text(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for part in content -%}
            {%- if part.type == 'text' -%}{{- part.text -}}{%- elif PLACE and not marked.any -%}<image>{%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
    {%- for part in ([{'text': message.content}] if message.content is string else message.content) -%}
        {%- if '<image>' in (part.text or '') -%}{%- set marked.any = true -%}{%- endif -%}
    {%- endfor -%}
{%- endfor -%}
{%- macro escaped(text) -%}
    {%- set it = namespace(text=text) -%}
    {%- for name, escaped in ESCAPES -%}{%- set it.text = it.text.replace(name, escaped) -%}{%- endfor -%}
    {{- it.text -}}
{%- endmacro -%}
{%- macro said(content) -%}
    {%- set segments = text(content).split('<image>') -%}
    {%- set said = namespace(all='', last=segments[0], marks=[], begin=0) -%}
    {%- for segment in segments[1:] -%}
        {%- set ends = said.last.endswith('\n') -%}
        {%- set said.all = said.all ~ (said.last[:-1] if ends else said.last) -%}
        {%- set said.marks = said.marks + ([said.all | length] if PLACE else []) -%}
        {%- set said.last = segment[1:] if segment.startswith('\n') and not ends else segment -%}
    {%- endfor -%}
    {%- set said.all = said.all ~ said.last -%}
    {%- set stripped, lead = said.all | trim, (said.all | length) - (said.all.lstrip() | length) -%}
    {%- for mark in said.marks -%}
        {%- set end = [[mark - lead, 0] | max, stripped | length] | min -%}
        {{- escaped(stripped[said.begin:end]) ~ PLACE -}}
        {%- set said.begin = end -%}
    {%- endfor -%}
    {{- escaped(stripped[said.begin:]) -}}
{%- endmacro -%}
"""
"""`<image>` marks are removed as in `chat_template.without_marks`: each with one adjacent newline. For a model that needs the
images' places PLACE stands there instead, and where an image is among a message's parts."""
_ESCAPES = [["\u2061", "\u2061b"], ["\u2060", "\u2061a"]]
"""In a message an invisible U+2060 goes behind each character of a control token's name, so that no tokenizer takes it for one.
`HiMixProcessor.encode` removes it again, and so the texts' own U+2060 and U+2061 get another form."""
_PLACE = "\u2061c"
"""What no message can hold; `modeling_himix.py` has the same."""

_TURNS = r"""
{{- OPENING -}}
{%- for message in messages -%}
    {%- if message.role != ('assistant' if loop.index0 % 2 else 'user') -%}
        {{- raise_exception('user and assistant must take turns, user first; there is no system turn: the model saw none') -}}
    {%- elif message.role == 'user' -%}
        ASK
    {%- else -%}
        {{- BEFORE_ANSWER -}}{{- ANSWER_PREFIX -}}{{- said(message.content) -}}{{- END -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and messages[-1].role == 'user' -%}
    {{- BEFORE_ANSWER -}}
{%- endif -%}
"""
_ASK = "{%- if not loop.first -%}{{- BETWEEN -}}{%- endif -%}{{- BEFORE_QUESTION -}}{{- said(message.content) -}}"
_ASK_CAPTION = (
    "{%- if not loop.first -%}{{- raise_exception('this model captions: one turn only') -}}{%- endif -%}"
    "{%- for _ in text(message.content).split('<image>')[1:] -%}{{- PLACE -}}{%- endfor -%}"
)

_BYTE_NAMES = {256: "<bos>", 257: "<user>", 258: "<assistant>", 259: "<end>"}


def chat_template(template: str, tokenizer: Tokenizer, spelling: dict[str, str], *, with_places: bool = False) -> str:
    """The template in Jinja. `spelling`: how the tokenizer writes `bos` and `eos`; with_places: leave the images' places."""
    form = template_of(template, tokenizer)

    def spelled(*pieces: Piece) -> str:
        # JSON's strings are Jinja's.
        return json.dumps("".join(spelling.get(p.text, p.text) if p.special else p.text for p in pieces))

    values = {
        "ASK": _ASK if form.has_questions else _ASK_CAPTION,
        "OPENING": spelled(*form.opening),
        "BETWEEN": spelled(*form.between),
        "BEFORE_QUESTION": spelled(*form.before_question),
        "BEFORE_ANSWER": spelled(*form.before_answer),
        "ANSWER_PREFIX": spelled(Piece(form.answer_prefix)),
        "END": spelled(form.end),
    }
    text = _TURNS
    for name, value in values.items():
        text = text.replace(name, value)
    names = [IMAGE_MARK, *(spelling.get(name, name) for name in form.needs)]
    escapes = json.dumps([*_ESCAPES, *([name, "".join(f"{letter}\u2060" for letter in name)] for name in names)])
    place = json.dumps(_PLACE if with_places else "")
    return (_MACROS.replace("ESCAPES", escapes).replace("PLACE", place) + text.replace("PLACE", place)).strip()


def write_tokenizer(name: str, template: str, out: Path, *, with_places: bool = False) -> tuple[dict[str, Any], list[str]]:
    """Write a tokenizer (`bytes`, or a folder) and its chat template into the folder.

    Returns: generation's `bos_token_id`, `eos_token_id` (whatever ends an answer) and `pad_token_id`; and the control tokens.
    Raises: ValueError for a tokenizer that is missing, or lacks what the template needs.
    """
    ours = load_tokenizer(name)
    check_tokenizer(ours, template)
    theirs: Any = copy.deepcopy(ours._tokenizer) if isinstance(ours, HuggingFaceTokenizer) else _bytes_tokenizer()
    if theirs.pad_token is None:
        theirs.pad_token = theirs.eos_token or theirs.convert_ids_to_tokens(end_of_turn(ours, template)[0])
    theirs.padding_side = theirs.init_kwargs["padding_side"] = "left"  # the second is what is saved
    spelling = {"bos": str(theirs.bos_token), "eos": str(theirs.eos_token)}
    theirs.chat_template = chat_template(template, ours, spelling, with_places=with_places)
    theirs.save_pretrained(str(out))
    ids = {"bos_token_id": theirs.bos_token_id, "pad_token_id": theirs.pad_token_id}
    control = [spelling.get(name, name) for name in template_of(template, ours).needs]
    return ids | {"eos_token_id": sorted({*end_of_turn(ours, template)})}, control


def _bytes_tokenizer() -> Any:
    """The built-in byte-level tokenizer as a Hugging Face one: 256 bytes in order, no merges, then the special tokens."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Rust
    from transformers import PreTrainedTokenizerFast

    assert sorted(_BYTE_NAMES) == sorted(set(BYTE_SPECIAL.values()))
    characters = byte_characters()
    rust = Rust(models.BPE(vocab={character: byte for byte, character in enumerate(characters)}, merges=[]))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    rust.decoder = decoders.ByteLevel()
    rust.add_special_tokens([AddedToken(name, special=True, normalized=False) for _, name in sorted(_BYTE_NAMES.items())])
    names = {"bos_token": "<bos>", "eos_token": "<end>", "pad_token": "<end>"}
    return PreTrainedTokenizerFast(tokenizer_object=rust, clean_up_tokenization_spaces=False, **names)


def byte_characters() -> list[str]:
    """The character by which byte-level tokenizers write each byte: itself where it is visible Latin-1, else from U+0100 on."""
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    invisible = iter(range(0x100, 0x200))
    return [chr(byte) if byte in visible else chr(next(invisible)) for byte in range(256)]
