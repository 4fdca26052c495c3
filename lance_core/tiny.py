"""Small random checkpoints in the release's layout: every task runs with them, on any machine, and means nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer as FastTokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn

from .attention import Attention, attention as default_attention
from .checkpoint import Lance
from .checks import check_seed
from .config import LanceConfig, TextConfig, VisionConfig
from .errors import LanceError
from .prompts import TEXT_ONLY, system_prompt
from .saving import save_checkpoint
from .tokenizer import IM_END, Tokenizer
from .transformer import LanceTransformer
from .vae import VAEConfig, WanVAE
from .vit import VisionTower

TINY_TEXT = TextConfig(
    vocab_size=640,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    mrope_section=(4, 6, 6),
)
TINY_VISION = VisionConfig(
    depth=4,
    hidden_size=32,
    intermediate_size=64,
    num_heads=2,
    out_hidden_size=TINY_TEXT.hidden_size,
    fullatt_block_indexes=(1, 3),
)
TINY_VAE = VAEConfig(encoder_width=8, decoder_width=8)

# How Qwen2 cuts a text before byte pairs are merged (tokenizer.json of Qwen2.5).
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = tuple(
    f"<|{name}|>"
    for name in (
        "endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end"
        " vision_start vision_end vision_pad image_pad video_pad"
    ).split()
)


def official_prompts() -> list[str]:
    """The system prompts of all tasks."""
    tasks = ("generate", "edit", "idip", "understand")
    return [TEXT_ONLY, *dict.fromkeys(system_prompt(task, kind) for task in tasks for kind in ("image", "video"))]


def tokenizer_specification(vocab_size: int = 512, texts: Iterable[str] | None = None, words: str = WORDS) -> str:
    """A `tokenizer.json` in the form of Qwen2's: byte pairs merged in texts, then the special tokens.

    vocab_size: the most tokens it may have beside the special ones; at least the 256 bytes. texts: by default the
    system prompts. words: a pattern of the pieces inside which bytes are merged.
    """
    tokenizer = FastTokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    pieces = pre_tokenizers.Split(Regex(words), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pieces, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    texts = official_prompts() if texts is None else texts
    tokenizer.train_from_iterator(["system\nuser\nassistant\n", *texts], trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer.to_str()


def random_lance(
    config: LanceConfig = LanceConfig(TINY_TEXT, TINY_VISION),
    vae: VAEConfig = TINY_VAE,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    attention: Attention = default_attention,
) -> Lance:
    """A model of these sizes with random weights, the same for the same seed on every device.

    Answers are made of readable tokens. Raises LanceError where the vocabulary is too small for the tokenizer.
    """
    tokenizer = Tokenizer(tokenizer_specification())
    if len(tokenizer) > config.text.vocab_size:
        raise LanceError(
            f"A vocabulary of {config.text.vocab_size} is too small for the tokenizer's {len(tokenizer)} tokens;"
            " give a larger one."
        )
    factory = {"dtype": dtype, "device": "meta"}
    transformer = LanceTransformer(config.text, attention=attention, **factory)
    networks = (transformer, VisionTower(config.vision, attention=attention, **factory), WanVAE(vae, **factory))
    generator = torch.Generator().manual_seed(seed)
    transformer, vision, vae = (_randomize(network.to_empty(device=device), generator) for network in networks)
    transformer.language_model.lm_head.weight[_unreadable(tokenizer)] = 0
    return Lance(config, transformer, vision, vae, tokenizer, torch.device(device), dtype)


def make_tiny(
    folder: str | Path,
    *,
    seed: int = 0,
    text: TextConfig = TINY_TEXT,
    vision: VisionConfig = TINY_VISION,
    vae: VAEConfig = TINY_VAE,
    variant: str = "image",
    overwrite: bool = False,
) -> Path:
    """Writes a random checkpoint (with the default sizes below 10 MB) into `folder` and returns it.

    variant: "image" or "video", the release's two. Raises LanceError where the folder holds something already; with
    `overwrite`, only where that is more than a checkpoint.
    """
    check_seed(seed)
    config = LanceConfig(text, replace(vision, out_hidden_size=text.hidden_size))
    lance = replace(random_lance(config, vae, seed=seed), variant=variant)
    return save_checkpoint(folder, lance, tokenizer_specification(), overwrite=overwrite)


def _randomize(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """Fills a module's parameters so that activations keep their size."""
    for name, parameter in module.requires_grad_(False).eval().named_parameters():
        parameter.copy_(_random(name, parameter.shape, generator))
    return module


def _random(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    if name.endswith("gamma") or len(shape) == 1 and name.endswith("weight"):
        return torch.ones(shape)  # norms
    inputs = shape[1:].numel()
    return torch.randn(shape, generator=generator) * (0.02 if name.endswith("bias") else inputs**-0.5)


def _unreadable(tokenizer: Tokenizer) -> list[int]:
    """Ids that would print as anything but text: parts of characters, control characters, markers of the template."""
    end = tokenizer.special(IM_END)
    markers = {tokenizer.special(name) for name in SPECIAL_TOKENS} - {end}
    printable = (tokenizer.decode([token]).replace("\n", " ") for token in range(len(tokenizer)))
    return [i for i, text in enumerate(printable) if i in markers or not text.isprintable() or "\ufffd" in text]
