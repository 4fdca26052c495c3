"""The Qwen2 tokenizer, which never turns a user's text into control tokens."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer as FastTokenizer

from .errors import LanceError

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END, VIDEO_PAD = "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"


class Tokenizer:
    """Text to ids and back.

    Special tokens are reached by name only, through `special`: `encode` knows none, so that a prompt that contains
    `<|im_end|>` is encoded as those ten characters.
    """

    def __init__(self, specification: str):
        """specification: the contents of a `tokenizer.json`."""
        self.specification = specification
        self._full = FastTokenizer.from_str(specification)
        self._text = FastTokenizer.from_str(json.dumps({**json.loads(specification), "added_tokens": []}))

    def __len__(self) -> int:
        """Number of ids, special ones included; the model's logits beyond it mean nothing."""
        return self._full.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Ids of a text in which nothing is special."""
        return self._text.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """The text of ids, special tokens by their names; an incomplete character at the end becomes U+FFFD."""
        return self._full.decode(ids, skip_special_tokens=False)

    def special(self, name: str) -> int:
        """The id of a special token such as `<|im_end|>`; raises LanceError where the vocabulary has none."""
        token = self._full.token_to_id(name)
        if token is None:
            raise LanceError(f"the tokenizer has no {name}; download tokenizer.json of Lance again.")
        return token


def load_tokenizer(folder: Path, cure: str = "download it again") -> Tokenizer:
    """The tokenizer of a checkpoint folder, from its `tokenizer.json`; LanceError, with the cure, without one."""
    path = Path(folder) / "tokenizer.json"
    try:
        return Tokenizer(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LanceError(f"{path} cannot be read ({error.strerror}); {cure}.") from None
    except Exception as error:  # the tokenizers library raises plain Exception for whatever it cannot parse
        raise LanceError(f"{path} is not a tokenizer ({str(error).rstrip('.')}); {cure}.") from None
