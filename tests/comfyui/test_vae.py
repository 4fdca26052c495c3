"""The VAE of Load Lance is core's, and core's nodes and ours read each other's latents."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from .server import ComfyServer, ExecutionFailed, Prompt, Run, run_inside

# ComfyUI's interpreter, with the pack loaded as ComfyUI loads it. `facts` is what a script finds out.
PRELUDE = """
import json
import torch, comfy.latent_formats, comfy.memory_management, comfy.model_management, comfy.sd, comfy.utils, folder_paths
import comfy.ldm.wan.vae2_2
from lance.lance_core.vae import WanVAE, normalize, vae_config
from lance.nodes.vae import decode, encode, load_lance_vae, require_vae

folder, facts = {folder!r}, {{}}
torch.set_grad_enabled(False)

def random(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))

def error(a, b):
    return float((a - b).norm() / b.norm()) if a.shape == b.shape else float("inf")

def ours(weights):
    network = WanVAE(vae_config({{name: tensor.shape for name, tensor in weights.items()}}), device="meta")
    network.load_state_dict({{name: tensor.float() for name, tensor in weights.items()}}, assign=True)
    return network

def compare(name, vae, network, frames, latent):
    pixels = (frames.movedim(-1, 0)[None] * 2 - 1).contiguous()
    facts[name + " encode"] = error(vae.encode(frames), network.encode(pixels)[0])
    expected = (network.decode(latent) / 2 + 0.5).movedim(1, -1)
    facts[name + " decode"] = error(vae.decode(latent), expected)
"""

SMALL = """
weights = comfy.utils.load_torch_file(folder + "/Wan2.2_VAE.pth")
network, vae = ours(weights), load_lance_vae(folder + "/Lance_3B")
facts["classes"] = [isinstance(vae, comfy.sd.VAE), type(vae.first_stage_model) is comfy.ldm.wan.vae2_2.WanVAE]
compare("picture", vae, network, random(1, 48, 64, 3), random(1, 48, 1, 3, 4) * 4 - 2)
compare("clip", vae, network, random(9, 48, 32, 3), random(2, 48, 3, 2, 3, seed=1) * 4 - 2)
latent = random(2, 48, 3, 2, 2) * 4 - 2
facts["tables"] = error(normalize(latent), comfy.latent_formats.Wan22().process_in(latent))
facts["stored"] = [parameter.is_meta for parameter in vae.first_stage_model.parameters()].count(True)
"""

SINGLE_FILE = """
from safetensors.torch import load_file, save_file
weights = comfy.utils.load_torch_file(folder + "/Wan2.2_VAE.pth")
file = folder + "/Lance_3B/model.safetensors"
save_file(load_file(file) | {"vae." + name: tensor.clone() for name, tensor in weights.items()}, file)
import os
os.remove(folder + "/Wan2.2_VAE.pth")
vae = load_lance_vae(folder + "/Lance_3B")
same = [torch.equal(tensor, weights[name]) for name, tensor in vae.first_stage_model.state_dict().items()]
facts["same"] = [len(same) == len(weights), all(same)]
"""

# Values in all places from one block of random numbers, since 705 million take long to draw.
RELEASE = """
import gc, math, os
from safetensors.torch import save_file
block = torch.randn(2**20 + 7, generator=torch.Generator().manual_seed(0))

def values(name, shape):
    if name.endswith(".gamma"):
        return torch.ones(shape, dtype=torch.bfloat16)
    size, fan_in = math.prod(shape), math.prod(shape[1:])
    filled = block.bfloat16().repeat(size // len(block) + 1)[:size]
    return filled.view(shape) * (0.02 if len(shape) == 1 else fan_in**-0.5)

os.remove(folder + "/Wan2.2_VAE.pth")
os.makedirs(folder + "/models_vae")
file = folder + "/models_vae/wan2.2_vae.safetensors"
shapes = {name: tuple(parameter.shape) for name, parameter in WanVAE(device="meta").named_parameters()}
save_file({name: values(name, shape) for name, shape in shapes.items()}, file)
facts["missing"] = load_lance_vae(folder + "/Lance_3B") is None
folder_paths.add_model_folder_path("vae", folder + "/models_vae")

frames, latent = random(1, 32, 32, 3), random(1, 48, 1, 2, 2) * 4 - 2
vae = load_lance_vae(folder + "/Lance_3B")
facts["classes"] = [type(vae) is comfy.sd.VAE, type(vae.first_stage_model) is comfy.ldm.wan.vae2_2.WanVAE]
facts["parameters"] = sum(parameter.numel() for parameter in vae.first_stage_model.parameters())
encoded, decoded = vae.encode(frames), vae.decode(latent)

vae.first_stage_model = vae.patcher = None
comfy.model_management.unload_all_models()
gc.collect()
network = ours(comfy.utils.load_torch_file(file))
facts["encode"] = error(encoded, network.encode(frames.movedim(-1, 0)[None] * 2 - 1)[0])
facts["decode"] = error(decoded, (network.decode(latent) / 2 + 0.5).movedim(1, -1))
"""

# Core's own constructor, given shapes without storage, says what its settings are for the release's VAE.
SETTINGS = """
from lance.lance_core.vae import VAEConfig
shapes = {name: parameter.shape for name, parameter in WanVAE(device="meta").named_parameters()}
with torch.device("meta"):
    release = comfy.sd.VAE(sd={name: torch.empty(shape) for name, shape in shapes.items()})
small = load_lance_vae(folder + "/Lance_3B")

def settings(vae):
    plain = {name: repr(value) for name, value in vars(vae).items() if isinstance(value, (str, int, bool, list))}
    plain.pop("size")
    computed = [
        vae.memory_used_encode((1, 3, 9, 64, 96), torch.bfloat16),
        vae.memory_used_decode((1, 48, 3, 4, 6), torch.float32),
        [vae.upscale_ratio[0](n) for n in (1, 3)], vae.upscale_ratio[1:], vae.upscale_index_formula,
        [vae.downscale_ratio[0](n) for n in (1, 9)], vae.downscale_ratio[1:], vae.downscale_index_formula,
        str((vae.vae_dtype, vae.device, vae.output_device, vae.patcher.offload_device)),
    ]
    return [plain, computed]

facts["same"] = settings(small) == settings(release)
facts["names"] = sorted(set(vars(release)) ^ set(vars(small)))
facts["size"] = small.model_size()
facts["bytes"] = sum(parameter.nbytes for parameter in small.first_stage_model.parameters())
facts["reloaded"] = small.patcher.cached_patcher_init[0](*small.patcher.cached_patcher_init[1]).model is not None
"""

STOPPING = """
vae = load_lance_vae(folder + "/Lance_3B")
network, latent, frames = vae.first_stage_model, random(1, 48, 4, 2, 2), random(13, 32, 32, 3)
before = {"decode": decode(vae, latent), "encode": encode(vae, frames)}
work = {
    "decode": (network.decoder, lambda: vae.decode(latent)),
    "tiles": (network.decoder, lambda: vae.decode_tiled(latent, tile_x=2, tile_y=2, overlap=0)),
    "encode": (network.encoder, lambda: vae.encode(frames)),
    "decode with progress": (network.decoder, lambda: decode(vae, latent)),
    "encode with progress": (network.encoder, lambda: encode(vae, frames)),
}
for name, (part, run) in work.items():
    passes = []

    def stop(*_):
        passes.append(None)
        if len(passes) == 2:
            comfy.model_management.interrupt_current_processing()

    hook = part.register_forward_pre_hook(stop)
    try:
        run()
        passes = "not stopped"
    except comfy.model_management.InterruptProcessingException:
        passes = len(passes)
    hook.remove()
    facts[name] = passes
facts["hooks"] = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.modules())
facts["same"] = [torch.equal(decode(vae, latent), before["decode"]), torch.equal(encode(vae, frames), before["encode"])]

values = []
comfy.utils.set_progress_bar_global_hook(lambda value, total, preview, node_id=None: values.append((value, total)))
comfy.utils.PROGRESS_THROTTLE_MIN_INTERVAL = 0
decode(vae, latent.repeat(2, 1, 1, 1, 1))
facts["decode progress"], values[:] = list(values), []
encode(vae, frames)
facts["encode progress"] = list(values)

network.decoder.compile(backend="eager")
facts["compiled"] = error(decode(vae, latent), before["decode"])
clone = vae.patcher.clone()
facts["clone"] = clone.model is network
"""

WRONG = """
def message(make):
    try:
        make()
    except ValueError as error:
        return str(error)

facts["none"] = message(lambda: require_vae(None))
facts["sd"] = message(lambda: require_vae(comfy.sd.VAE(sd={})))
with open(folder + "/Wan2.2_VAE.pth", "r+b") as file:
    file.truncate(1000)
facts["damaged"] = message(lambda: load_lance_vae(folder + "/Lance_3B"))
"""


def facts(comfyui: Path, script: str, tiny: Path, folder: Path, dynamic: bool = False) -> dict:
    """What a script finds out beside a copy of the small checkpoint."""
    shutil.copytree(tiny, folder / "tiny")
    prelude = PRELUDE.format(folder=str(folder / "tiny"))
    flag = "comfy.memory_management.aimdo_enabled = True\n" if dynamic else ""
    done = run_inside(comfyui, f"{prelude}{flag}{script}\nprint(json.dumps(facts))")
    return json.loads(done.stdout.strip().splitlines()[-1])


# --- the network ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True], ids=["plain", "dynamic-vram"])
def test_the_library_s_vae_computes_what_core_s_does(comfyui, tiny_checkpoint, tmp_path, dynamic):
    found = facts(comfyui, SMALL, tiny_checkpoint, tmp_path, dynamic)
    assert found.pop("classes") == [True, True] and found.pop("stored") == 0
    assert len(found) == 5 and max(found.values()) <= 1e-5, found


def test_the_release_s_widths_are_loaded_by_core_alone(comfyui, tiny_checkpoint, tmp_path):
    """From models/vae, since this checkpoint has no VAE of its own; before that file is there it has none."""
    found = facts(comfyui, RELEASE, tiny_checkpoint, tmp_path)
    assert found["missing"] and found["classes"] == [True, True]
    assert found["parameters"] > 7e8
    assert max(found["encode"], found["decode"]) <= 1e-5, found


def test_other_widths_have_core_s_settings(comfyui, tiny_checkpoint, tmp_path):
    found = facts(comfyui, SETTINGS, tiny_checkpoint, tmp_path)
    assert found["same"] and found["names"] == ["lance_resolutions"] and found["reloaded"]
    assert found["size"] == found["bytes"]


def test_a_single_file_may_bundle_the_vae(comfyui, tiny_checkpoint, tmp_path):
    assert facts(comfyui, SINGLE_FILE, tiny_checkpoint, tmp_path)["same"] == [True, True]


def test_long_work_can_be_watched_and_stopped(comfyui, tiny_checkpoint, tmp_path):
    found = facts(comfyui, STOPPING, tiny_checkpoint, tmp_path)
    for name in ("decode", "tiles", "encode", "decode with progress", "encode with progress"):
        assert found[name] == 2, name  # latent frames of which any was begun: the stop came with the second
    assert found["hooks"] == 0 and found["same"] == [True, True]
    assert found["decode progress"][-1] == [8, 8] and found["encode progress"] == [[n, 4] for n in (1, 2, 3, 4)]
    assert found["compiled"] <= 1e-5 and found["clone"]


def test_a_wrong_vae_gets_a_sentence(comfyui, tiny_checkpoint, tmp_path):
    found = facts(comfyui, WRONG, tiny_checkpoint, tmp_path)
    assert "Wan2.2_VAE.pth" in found["none"] and "wan2.2_vae.safetensors into models/vae" in found["none"]
    assert "4 channels" in found["sd"] and "Wan2.2_VAE.pth" in found["damaged"]
    assert all(sentence.endswith(".") and "\n" not in sentence for sentence in found.values())


# --- in the server -------------------------------------------------------------------------------------------------

WIDTH, HEIGHT, FPS, TONE, RATE = 64, 48, 12, 440, 48000


def node(class_type: str, **inputs: object) -> dict:
    return {"class_type": class_type, "inputs": inputs}


def graph(**nodes: dict) -> Prompt:
    """The nodes beside Load Lance, whose VAE is `["lance", 1]`."""
    return {"lance": node("LoadLance", checkpoint="Lance_3B", weight_dtype="default"), **nodes}


def save_video(source: str) -> dict:
    options = {"format": "auto", "format.codec": "auto", "codec": "auto"}
    return node("SaveVideo", video=[source, 1], filename_prefix=f"vae/{source}", **options)


def pictures(server: ComfyServer, run: Run, node_id: str) -> np.ndarray:
    """What a Save Image saved, `[F, H, W, 3]` in 0..255."""
    paths = [server.folder / "output" / e["subfolder"] / e["filename"] for e in run.outputs(node_id)["images"]]
    return np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths]).astype(int)


def write_clip(path: Path, frames: int, sound: float = 0.0) -> None:
    """A clip of noise at 12 frames per second, with so many seconds of a tone."""
    noise = np.random.default_rng(0).integers(0, 256, (frames, HEIGHT, WIDTH, 3), np.uint8)
    with av.open(str(path), "w") as container:
        video = container.add_stream("h264", rate=FPS, width=WIDTH, height=HEIGHT, pix_fmt="yuv420p")
        audio = container.add_stream("aac", rate=RATE, layout="mono") if sound else None
        for pixels in noise:
            container.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(video.encode(None))
        if audio:
            wave = np.sin(2 * np.pi * TONE * np.arange(round(sound * RATE)) / RATE).astype(np.float32)[None] / 2
            frame = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
            frame.sample_rate = RATE
            container.mux(audio.encode(frame))
            container.mux(audio.encode(None))


def uploaded_clip(server: ComfyServer, folder: Path, frames: int, sound: float = 0.0) -> str:
    path = folder / f"clip_{frames}_{sound}.mp4"
    write_clip(path, frames, sound)
    return server.upload_image(path)


def saved_clips(server: ComfyServer, run: Run) -> list[tuple[int, np.ndarray]]:
    """Of every saved clip the number of frames, and the sound `[samples]`."""
    clips = []
    for path in server.output_files(run):
        if path.suffix == ".mp4":
            with av.open(str(path)) as container:
                frames = sum(1 for _ in container.decode(video=0))
            with av.open(str(path)) as container:
                waves = [f.to_ndarray()[0] for f in container.decode(audio=0)] if container.streams.audio else []
            clips.append((frames, np.concatenate(waves) if waves else np.zeros(0)))
    return clips


@pytest.mark.parametrize("frames", [1, 9], ids=["picture", "clip"])
def test_latents_are_interchangeable(server, tmp_path, frames):
    """Whoever encodes and whoever decodes, the pixels are the same."""
    prompt = graph(
        clip=node("LoadVideo", file=uploaded_clip(server, tmp_path, frames)),
        frames=node("GetVideoComponents", video=["clip", 0]),
        core=node("VAEEncode", pixels=["frames", 0], vae=["lance", 1]),
        ours=node("EncodeLatent", media=["frames", 0], vae=["lance", 1], resolution="native"),
    )
    tiles = {"tile_size": 64, "overlap": 16, "temporal_size": 64, "temporal_overlap": 8}
    for latent in ("core", "ours"):
        wires = {"samples": [latent, 0], "vae": ["lance", 1]}
        prompt[f"{latent} whole"] = node("VAEDecode", **wires)
        prompt[f"{latent} tiled"] = node("VAEDecodeTiled", **wires, **tiles)
        prompt[f"{latent} DecodeVideo"] = node("DecodeVideo", latent=[latent, 0], vae=["lance", 1], fps=12.0)
    decoders = [name for name in prompt if name.startswith(("core ", "ours "))]
    for name in decoders:
        prompt[f"saved {name}"] = node("SaveImage", images=[name, 0], filename_prefix=f"vae/{name}")
    run = server.run(prompt)
    whole, *others = [pictures(server, run, f"saved {name}") for name in decoders]
    assert whole.shape == (frames, HEIGHT, WIDTH, 3) and whole.std() > 1
    worst = {name: int(abs(other - whole).max()) for name, other in zip(decoders[1:], others)}
    assert len(worst) == 5 and all(error <= ("tiled" in name) for name, error in worst.items()), worst


def decoded(encoded: str, source: str | None, fps: float = 12.0) -> Prompt:
    """From a file to a clip, with the sound of another file."""
    prompt = graph(
        clip=node("LoadVideo", file=encoded),
        latent=node("EncodeLatent", media=["clip", 0], vae=["lance", 1], resolution="native"),
        decode=node("DecodeVideo", latent=["latent", 0], vae=["lance", 1], fps=fps),
        save=save_video("decode"),
    )
    if source:
        prompt["source"] = node("LoadVideo", file=source)
        prompt["decode"]["inputs"]["source"] = ["source", 0]
    return prompt


def log_of(server: ComfyServer, prompt: Prompt) -> tuple[Run, str]:
    """A run, and what ComfyUI logged meanwhile."""
    before = len(server.log.read_text(errors="replace"))
    run = server.run(prompt)
    return run, server.log.read_text(errors="replace")[before:]


def test_an_edited_clip_keeps_its_sound(server, tmp_path):
    """19 frames are read as 17, and as much of the sound is kept."""
    name = uploaded_clip(server, tmp_path, frames=19, sound=1.6)
    run, log = log_of(server, decoded(name, name))
    ((frames, wave),) = saved_clips(server, run)
    assert frames == 17 and "silent" not in log
    assert len(wave) / RATE == pytest.approx(17 / FPS, abs=0.05)
    loudest = np.abs(np.fft.rfft(wave)).argmax() * RATE / len(wave)
    assert loudest == pytest.approx(TONE, abs=2) and wave.std() > 0.2


def test_a_video_in_memory_keeps_its_sound(server, tmp_path):
    name = uploaded_clip(server, tmp_path, frames=9, sound=0.75)
    prompt = decoded(name, None)
    prompt["parts"] = node("GetVideoComponents", video=["clip", 0])
    prompt["made"] = node("CreateVideo", images=["parts", 0], audio=["parts", 1], fps=12.0)
    prompt["decode"]["inputs"]["source"] = ["made", 0]
    ((frames, wave),) = saved_clips(server, server.run(prompt))
    assert frames == 9 and len(wave) / RATE == pytest.approx(0.75, abs=0.05) and wave.std() > 0.2


@pytest.mark.parametrize(
    ("frames", "sound", "words"),
    [(13, 1.0, "it has 9 frames and its source is read as 13"), (9, 0.0, "its source has no sound")],
    ids=["another-length", "no-sound"],
)
def test_a_clip_is_silent_where_the_sound_would_not_fit(server, tmp_path, frames, sound, words):
    encoded, source = uploaded_clip(server, tmp_path, 9), uploaded_clip(server, tmp_path, frames, sound)
    run, log = log_of(server, decoded(encoded, source))
    ((count, wave),) = saved_clips(server, run)
    assert count == 9 and not len(wave)
    assert log.count("Lance: the clip is silent") == 1 and words in log


def test_a_clip_is_silent_where_the_sound_would_be_out_of_step(server, tmp_path):
    name = uploaded_clip(server, tmp_path, frames=17, sound=1.4)
    run, log = log_of(server, decoded(name, name, fps=24.0))
    ((frames, wave),) = saved_clips(server, run)
    assert frames == 17 and not len(wave)
    assert log.count("Lance: the clip is silent") == 1 and "its source 1.4" in log


def test_of_a_batch_every_clip_is_a_video(server, tmp_path):
    prompt = decoded(uploaded_clip(server, tmp_path, 9), None)
    prompt["batch"] = node("RepeatLatentBatch", samples=["latent", 0], amount=2)
    prompt["decode"]["inputs"]["latent"] = ["batch", 0]
    prompt["frames"] = node("SaveImage", images=["decode", 0], filename_prefix="vae/batch")
    run = server.run(prompt)
    assert [frames for frames, _ in saved_clips(server, run)] == [9, 9]
    assert pictures(server, run, "frames").shape == (18, HEIGHT, WIDTH, 3)


# --- mistakes ------------------------------------------------------------------------------------------------------

PICTURE = node("EmptyImage", width=WIDTH, height=HEIGHT, batch_size=1, color=0)
LATENT = node("EmptyLatentImage", width=WIDTH, height=HEIGHT, batch_size=1)
CLIP = node("Wan22ImageToVideoLatent", vae=["lance", 1], width=WIDTH, height=HEIGHT, length=5, batch_size=1)
PIXELS = node("VAELoader", vae_name="pixel_space")
MISTAKES = {
    "another vae decodes": (
        graph(vae=PIXELS, latent=CLIP, bad=node("DecodeVideo", vae=["vae", 0], latent=["latent", 0], fps=12.0)),
        "3 channels",
    ),
    "another vae encodes": (
        graph(
            vae=PIXELS,
            media=PICTURE,
            bad=node("EncodeLatent", vae=["vae", 0], media=["media", 0], resolution="auto"),
        ),
        "3 channels",
    ),
    "another latent": (
        graph(latent=LATENT, bad=node("DecodeVideo", vae=["lance", 1], latent=["latent", 0], fps=12.0)),
        "[1, 4, 6, 8]",
    ),
    "two pictures": (
        graph(
            media=node("EmptyImage", width=WIDTH, height=HEIGHT, batch_size=2, color=0),
            bad=node("EncodeLatent", vae=["lance", 1], media=["media", 0], resolution="auto"),
        ),
        "2 images",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gets_a_sentence(server, name):
    prompt, words = MISTAKES[name]
    saved = "SaveVideo" if prompt["bad"]["class_type"] == "DecodeVideo" else "SaveLatent"
    prompt["end"] = save_video("bad") if saved == "SaveVideo" else node(saved, samples=["bad", 0], filename_prefix="x")
    with pytest.raises(ExecutionFailed) as failure:
        server.run(prompt)
    assert failure.value.event["node_id"] == "bad"
    message = failure.value.message
    assert words in message and message.endswith(".") and "\n" not in message and message.count(". ") == 0


def test_a_source_that_is_no_video_gets_a_sentence(server, tmp_path):
    (server.folder / "input/broken_source.mp4").write_bytes(b"no clip at all")
    prompt = decoded(uploaded_clip(server, tmp_path, 9), "broken_source.mp4")
    with pytest.raises(ExecutionFailed, match="broken_source.mp4") as failure:
        server.run(prompt)
    assert failure.value.event["node_id"] == "decode" and failure.value.message.endswith(".")
