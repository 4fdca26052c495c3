"""Lance: one model that understands, generates and edits images and videos. Pure PyTorch.

>>> lance = load_lance("models/lance/Lance_3B")
>>> latent = generate(lance, "A red fox in the snow.", width=768, height=768)
>>> frames = decode_video(lance, latent)  # [1, 768, 768, 3] in 0..1
"""

from .errors import LanceError, LanceWarning
from .stages import (
    Semantic,
    decode_video,
    edit,
    encode_latent,
    encode_semantic,
    generate,
    load_lance,
    read,
    understand,
)

__all__ = [
    "LanceError",
    "LanceWarning",
    "Semantic",
    "decode_video",
    "edit",
    "encode_latent",
    "encode_semantic",
    "generate",
    "load_lance",
    "read",
    "understand",
]
