"""Nano-Lance: a Lance of eight million weights that knows the small world, made from nothing by one command.

`python -m lance_core make-nano FOLDER` trains the tokenizer, the VAE, its decoder once more, and then everything else
together.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from random import Random

import torch
from safetensors.torch import load_file
from torch import nn

from ..checkpoint import POSITION_TABLE, Lance, resolve_device
from ..checks import check_seed
from ..config import LanceConfig, Resolution, Resolutions, TextConfig, VisionConfig, read_json
from ..errors import LanceError
from ..layout import LANGUAGE_FOLDERS, VAE_WEIGHTS, VISION_FOLDER, WEIGHTS
from ..media import replacing
from ..rewriting import BESIDE
from ..saving import check_replaceable, recover_folder, replacing_folder
from ..storage import save_tensors
from ..tiny import WORDS, official_prompts, tokenizer_specification
from ..tokenizer import Tokenizer
from ..train.alone import alone_in
from ..train.config import Saving, TrainConfig, Training
from ..train.needed import needed
from ..train.objective import Objective
from ..train.parallel import first, processes, together
from ..train.trainer import finished, train
from ..train.vae import OnStep, VAETraining, freeze_encoder, initialize, standardize, train_vae
from ..transformer import LanceTransformer
from ..vae import VAEConfig, WanVAE
from ..vit import VisionTower
from .edits import random_edit
from .examples import DESCRIBE, Amounts, Shares, SmallWorld, join_scenes
from .pictures import CLIPS_EVERY, vae_batches
from .questions import clip_question, random_question
from .render import SIDE
from .scene import random_clip, random_scene
from .words import Language, caption, clip_caption

VAE = VAEConfig(encoder_width=12, decoder_width=16)
# With the release's theta of a million, neighbouring cells of so small a grid would look the same. Time has the two
# fastest frequencies, rows the next two; most are so slow that words are found wherever they stand.
TEXT = TextConfig(
    vocab_size=1088,
    hidden_size=192,
    intermediate_size=384,
    num_hidden_layers=6,
    num_attention_heads=6,
    num_key_value_heads=2,
    rope_theta=1000.0,
    mrope_section=(2, 2, 12),
)
VISION = VisionConfig(
    depth=4,
    hidden_size=96,
    intermediate_size=256,
    num_heads=4,
    out_hidden_size=TEXT.hidden_size,
    fullatt_block_indexes=(3,),
)
SIDES = Resolution(vae=SIDE, vit=84)  # three by three tokens of both encoders, one for each place
CONFIG = LanceConfig(TEXT, VISION, Resolutions(SIDES, replace(SIDES, frames=9)))

VAE_FILE = "Wan2.2_VAE.safetensors"
LATENTS, WHOLE_VAE, LEARNED, RECIPE = "latents.safetensors", "vae.safetensors", "model", "recipe.json"  # in `work`
SHIPPED = frozenset((VISION_FOLDER, VAE_FILE, WEIGHTS, *BESIDE))  # what nano's folder may hold
TOKENS, TEXTS = 1024, 20000  # of the tokenizer at most, beside the special ones; what it is trained on gives 1,015
EMBEDDING = 0.5  # deviation of words at first: less, and the first layers drown them
OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Recipe:
    """How nano is trained.

    vae: of all its parts; decoder: of this alone, afterwards, for shapes are drawn sharply only late. clips_every: how
    often a batch of the VAE's is of clips; standard_batches: from which the latents' statistics come.
    seeing: examples from which it learns to see before it paints; one that does both from the beginning is slow to
    look. training: of all but the VAE, as one process sees it; processes: on a CPU; a GPU takes their batches in turn.
    """

    vae: VAETraining = VAETraining(steps=9000, learning_rate=1.5e-3)
    decoder: VAETraining = VAETraining(steps=10000, learning_rate=1.5e-3)
    clips_every: int = CLIPS_EVERY
    standard_batches: int = 64
    amounts: Amounts = Amounts(edits=40000)
    shares: Shares = Shares()
    seeing: int = 40000
    training: Training = Training(
        optimizer="muon",
        steps=8000,
        tokens=2000,
        learning_rate=3e-3,
        min_learning_rate=5e-5,
        warmup=200,
        weight_decay=0.01,
        betas=(0.9, 0.98),
        ema=0.999,
        log_every=20,
    )
    objective: Objective = Objective(
        timestep_shift=2.5, timestep_std=1.1, draws=3, text_dropout=0.1, reference_dropout=0.0, ce_weight=0.5
    )
    processes: int = 2
    seed: int = 0

    def __post_init__(self):
        check_seed(self.seed)


def make_nano(
    folder: str | Path,
    work: str | Path,
    recipe: Recipe = Recipe(),
    device: str = "auto",
    on_progress: OnProgress | None = None,
) -> Path:
    """Makes nano-Lance and returns its folder; what is done is kept in `work`, from where it goes on if stopped.

    on_progress(what, step, steps) after some steps; it is pickled, for the model is trained in other processes. Raises
    LanceError, before anything is trained, where accelerate is missing, the folder holds anything but such a model, or
    `work` what another recipe has made.
    """
    with needed():
        import accelerate  # noqa: F401 (before hours of the VAE)
    folder, work, place = Path(folder).expanduser(), Path(work).expanduser(), resolve_device(device)
    check_replaceable(folder, overwrite=True, names=SHIPPED)
    work = work / f"seed_{recipe.seed}"
    check_recipe(work, recipe)
    with alone_in(work):
        recover_folder(folder)  # from a run that was killed while it shipped
        trained_vae(work, recipe, place, on_progress)
        together(recipe.processes if place.type == "cpu" else 1, learn, work, recipe, place, on_progress)
        return ship(work / LEARNED / "model", folder)


def check_recipe(work: Path, recipe: Recipe) -> None:
    """Begins a folder with a recipe; raises LanceError where it was begun with another, or with other sizes."""
    path, own = work / RECIPE, json.loads(json.dumps(asdict(recipe) | {"sizes": asdict(CONFIG), "VAE": asdict(VAE)}))
    begun = read_json(path) if path.is_file() else {}
    if work.is_dir() and begun != own:
        other = ", ".join(sorted(key for key in own.keys() | begun.keys() if own.get(key) != begun.get(key)))
        raise LanceError(f"{work} was begun with another recipe ({other}): name another --work, or remove it.")
    with replacing(path) as part:
        part.write_text(json.dumps(own, indent=1), encoding="utf-8")


def learn(work: Path, recipe: Recipe, device: torch.device, on_progress: OnProgress | None = None) -> None:
    """Trains everything but the VAE, which is there already; of several processes the first tells how far it is."""
    told = on_progress if first() else None
    lance = fresh_lance(trained_vae(work, recipe, device), recipe.seed, device)
    training = replace(recipe.training, accumulate=recipe.processes // processes())
    config = TrainConfig(
        work / LEARNED, recipe.seed, train=training, objective=recipe.objective, save=Saving(every=500)
    )
    examples = SmallWorld(lance, recipe.seed, recipe.amounts, recipe.shares, seeing=recipe.seeing)
    if not finished(config):
        examples.prepare(partial(told, "pictures") if told else None)
    train(config, lance, examples, on_step(told, "model", training.steps))


def on_step(on_progress: OnProgress | None, what: str, steps: int) -> OnStep | None:
    return (lambda step, values: on_progress(what, step, steps)) if on_progress else None


def specification() -> str:
    """The tokenizer: byte pairs merged in the small world's texts, every system prompt a token or a few of its own.

    Chinese characters stay apart, for there a word has no end that one could see.
    """
    prompts = official_prompts()
    letters = r"[\p{L}&&[^\p{Han}]]"
    words = "|".join((*map(re.escape, prompts), r"\p{Han}", WORDS.replace(r"\p{L}+", letters + "+")))
    return tokenizer_specification(TOKENS, [*texts(), *prompts * (TEXTS // 10)], words)


def texts() -> Iterator[str]:
    """What is said in the small world, in both languages alike."""
    random = Random(0)
    for number in range(TEXTS // 10):
        language: Language = ("en", "zh")[number % 2]
        scene, clip = random_scene(random), random_clip(random)
        questions = (random_question(scene, random, language), clip_question(clip, random, language))
        yield from (text for question in questions for text in (question.text, question.answer))
        yield caption(scene, random, language)
        yield clip_caption(clip, random, language)
        yield random_edit(scene, random, language).instruction
        yield join_scenes(random)[2]
        yield from DESCRIBE


def trained_vae(work: Path, recipe: Recipe, device: torch.device, on_progress: OnProgress | None = None) -> WanVAE:
    """The VAE: all of it first, then its decoder alone; what `work` holds is not trained again."""
    vae = WanVAE(VAE)
    initialize(vae, torch.Generator().manual_seed(recipe.seed))
    vae.to(device)

    def teach(what: str, training: VAETraining, seed: int, state: Path) -> None:
        batches = vae_batches(seed, recipe.clips_every)
        train_vae(vae, batches, training, seed, on_step(on_progress, what, training.steps), state)

    def learn_latents(state: Path) -> None:
        teach("VAE", recipe.vae, recipe.seed, state)
        standardize(vae, vae_batches(recipe.seed + 1), recipe.standard_batches)

    def learn_pixels(state: Path) -> None:
        freeze_encoder(vae)
        teach("decoder", recipe.decoder, recipe.seed + 2, state)

    kept(vae, work / LATENTS, learn_latents)
    kept(vae, work / WHOLE_VAE, learn_pixels)
    return vae


def kept(vae: WanVAE, path: Path, learn: Callable[[Path], None]) -> None:
    """What a file holds of the VAE, which is learned if there is none; a state beside it is where that goes on."""
    if path.is_file():
        vae.load_state_dict(load_file(path))
        return
    state = path.with_suffix(".state")
    learn(state)
    with replacing(path) as part:
        save_tensors({name: weight.contiguous() for name, weight in vae.state_dict().items()}, part)
    state.unlink(missing_ok=True)


def fresh_lance(vae: WanVAE, seed: int, device: torch.device) -> Lance:
    """A model of nano's sizes that has learned nothing, around a VAE that has."""
    generator = torch.Generator().manual_seed(seed)
    transformer, vision = LanceTransformer(TEXT), VisionTower(VISION)
    for network in (transformer, vision):
        begin(network, generator)
    tokenizer = Tokenizer(specification())
    parts = (part.to(device) for part in (transformer, vision, vae.requires_grad_(False).eval()))
    return Lance(CONFIG, *parts, tokenizer, device, torch.float32)


@torch.no_grad()
def begin(network: nn.Module, generator: torch.Generator) -> None:
    """Weights to begin with: activations keep their size, residual branches are small, the first velocity is zero."""
    for name, weight in network.named_parameters():
        if weight.ndim == 1:
            weight.fill_(0.0 if name.endswith("bias") else 1.0)
        elif name.startswith("llm2vae"):
            weight.zero_()
        elif "embed_tokens" in name:
            weight.normal_(0, EMBEDDING, generator=generator)
        else:
            small = 0.3 if re.search(r"o_proj|down_proj|attn\.proj", name) else 1.0
            weight.normal_(0, small * weight[0].numel() ** -0.5, generator=generator)


def ship(model: Path, folder: Path) -> Path:
    """The trained checkpoint as it is shipped: one folder, the VAE in half precision, no table of positions.

    Raises LanceError where the folder holds anything but such a checkpoint.
    """
    language = model / LANGUAGE_FOLDERS["image"]
    with replacing_folder(folder, overwrite=True, names=SHIPPED) as fresh:
        shutil.copytree(model, fresh, ignore=shutil.ignore_patterns(language.name, VAE_WEIGHTS))
        shutil.copytree(language, fresh, dirs_exist_ok=True)
        weights = load_file(language / WEIGHTS)
        weights.pop(POSITION_TABLE)
        save_tensors(weights, fresh / WEIGHTS)
        vae = torch.load(model / VAE_WEIGHTS, weights_only=True)
        save_tensors({name: weight.half() for name, weight in vae.items()}, fresh / VAE_FILE)
    return folder
