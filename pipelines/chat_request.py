"""A request in the form of OpenAI's chat completions: its JSON in, a checked question out, or one line for the client."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from himix_megatron.config import Count, VisionConfig
from himix_megatron.data.images.image_file import open_image, scaling
from himix_megatron.data.text.chat_template import IMAGE_MARK
from himix_megatron.inference.sampling import Sampling
from himix_megatron.inference.text_stream import check_stops
from himix_megatron.runtime import typed_json
from himix_megatron.runtime.limits import Limit

MAX_IMAGES, MAX_PIXELS = 16, 13_000_000
"""Of one request: a photograph of 12 million pixels, or a screen of 3840x2160 as PNG (see `num_pixels`)."""
MAX_VALUES, MAX_BYTES_PER_TOKEN = 100_000, 16
"""Of its JSON, where each value takes up to 250 bytes; and of its text, which takes time to tokenize. English has about 4."""
IGNORED = {"model", "user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
"""Fields of OpenAI's that change no answer."""
NEUTRAL = {"tools": [], "logit_bias": {}, "response_format": {"type": "text"}, "stream_options": {"include_usage": False}}
"""Fields that would, and the values with which they do not."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a request says besides its messages."""

    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: str | tuple[str, ...] = ()
    stream: bool = False
    n: Literal[1] = 1
    logprobs: Literal[False] = False
    frequency_penalty: Annotated[float, Limit(0, 0)] = 0.0
    presence_penalty: Annotated[float, Limit(0, 0)] = 0.0

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end the answer."""
        return (self.stop,) if isinstance(self.stop, str) else self.stop

    @property
    def sampling(self) -> Sampling:
        """Raises: ValueError for a number beyond its limits."""
        return Sampling(temperature=self.temperature, top_p=self.top_p, seed=self.seed)


def parse_request(data: bytes, max_text_tokens: int) -> tuple[Request, list[dict[str, str]], list[bytes]]:
    """A request; its turns as in the data, `from` human and gpt; and their images. Raises: ValueError with one line."""
    if sum(map(data.count, (b"{", b"[", b","))) > MAX_VALUES:
        raise ValueError(f"the request has more than {MAX_VALUES} values")
    given = typed_json.parse_object(data, "the request")
    turns, images = read_messages(given.pop("messages", None))
    if len(images) > MAX_IMAGES:
        raise ValueError(f"the request has {len(images)} images: at most {MAX_IMAGES} are read")
    length = len("".join(turn["value"] for turn in turns).encode())
    if length > max_text_tokens * MAX_BYTES_PER_TOKEN:
        raise ValueError(f"the prompt has {length} bytes of text, the model takes {max_text_tokens} tokens")
    given = {name: value for name, value in given.items() if value is not None and name not in IGNORED}
    given = {name: value for name, value in given.items() if name not in NEUTRAL or value != NEUTRAL[name]}
    request = typed_json.build(Request, given, "the request")
    check_stops(request.stops)
    assert request.sampling
    return request, turns, images


def read_messages(messages: Any) -> tuple[list[dict[str, str]], list[bytes]]:
    """All messages' turns and images. Raises: ValueError."""
    if not isinstance(messages, list) or len(messages) % 2 == 0:
        raise ValueError(
            '"messages" is missing, or its last one is not the user\'s: wanted a list of {"role": ..., "content": ...}'
        )
    turns, images = [], list[bytes]()
    for number, message in enumerate(messages):
        wanted = ("user", "assistant")[number % 2]
        if not isinstance(message, dict) or message.get("role") != wanted:
            raise ValueError(f'message {number} has another role than "{wanted}": users and assistants take turns')
        text, own = read_content(message.get("content"))
        turns.append({"from": ("human", "gpt")[number % 2], "value": text})
        images += own
    return turns, images


def read_content(content: Any) -> tuple[str, list[bytes]]:
    """A message's text, with a mark where each image stands, and images. Raises: ValueError."""
    if isinstance(content, str):
        return content, []
    if not isinstance(content, list):
        raise ValueError('"content" is neither a text nor a list')
    texts, images = [], []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image_url" and isinstance(part.get("image_url"), dict):
            images.append(read_data_url(part["image_url"].get("url")))
            texts.append(IMAGE_MARK)
        else:
            raise ValueError(f'content of type {kind!r}: wanted "text" or "image_url"')
    return "\n".join(texts), images


def read_data_url(url: Any) -> bytes:
    """The bytes in a data: URL. Raises: ValueError for any other address, which is not fetched."""
    head, _, data = url.partition(",") if isinstance(url, str) else ("", "", "")
    if not head.startswith("data:image/") or not head.endswith(";base64"):
        raise ValueError("an image must come inside the request, as data:image/...;base64,...: no address is fetched")
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise ValueError(f"an image's base64 is broken: {error}") from None


def num_pixels(images: Iterable[bytes], vision: VisionConfig) -> int:
    """Pixels to decode and to scale to, by the images' headers. Formats other than JPEG take more memory: 3 count for 2.

    Raises: BadSampleError; ValueError for more than a request may have.
    """
    total = 0
    for data in images:
        image = open_image(data)
        *_, width, height = scaling(*image.size, vision, vision.input_size(*image.size))
        total += image.width * image.height * (2 if image.format in ("JPEG", "MPO") else 3) // 2 + width * height
        if total > MAX_PIXELS:
            raise ValueError(f"{total} pixels or more (3 for 2, where not JPEG): at most {MAX_PIXELS} are decoded")
    return total
