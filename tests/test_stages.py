"""The seam: what the seven functions promise beside parity, and what they say to mistakes."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace

import pytest
import torch
from goldens import DATA
from hypothesis import HealthCheck, given, settings, strategies as st
from parity import lance

from lance_core import LanceError, LanceWarning, media, stages
from lance_core.config import Resolution, Resolutions
from lance_core.vae import normalize

PICTURE = media.read_image(DATA / "media" / "a_img1.png")
FAST = dict(steps=2, guidance=4.0)


@pytest.fixture(scope="module")
def small() -> torch.Tensor:
    """A picture whose sides suit both encoders."""
    return torch.nn.functional.interpolate(PICTURE.permute(0, 3, 1, 2), (112, 112)).permute(0, 2, 3, 1)


@pytest.fixture(scope="module")
def semantic(small) -> stages.Semantic:
    return stages.encode_semantic(lance(), small, resolution=None)


@pytest.fixture(scope="module")
def latent(small) -> torch.Tensor:
    return stages.encode_latent(lance(), small, resolution=None)


def test_signatures_are_those_of_the_design():
    """Other layers, and people's scripts, rely on these names and defaults."""
    sampling = dict(
        steps=30, guidance=4.0, shift=3.5, guidance_interval=(0.4, 1.0), renorm="global", renorm_min=0.0, seed=42,
        noise=None, on_step=None,
    )  # fmt: skip
    expected = {
        stages.load_lance: dict(device="auto", dtype="auto", attention="auto"),
        stages.encode_semantic: dict(resolution="auto", kind="auto"),
        stages.encode_latent: dict(resolution="auto"),
        stages.understand: dict(
            system=None, max_new_tokens=256, temperature=0.0, top_p=1.0, top_k=0, seed=0, on_token=None
        ),
        stages.generate: dict(frames=1, first_frame=None, **sampling),
        stages.edit: dict(task="edit", width=None, height=None, frames=None, **sampling),
        stages.decode_video: dict(tile=None),
    }
    for function, defaults in expected.items():
        parameters = inspect.signature(function).parameters
        assert {name: parameters[name].default for name in defaults} == defaults, function.__name__


def test_every_stage_gives_the_promised_shapes(semantic, latent):
    assert semantic.grid == (1, 8, 8) and semantic.embeddings.shape == (16, 64) and semantic.kind == "image"
    assert latent.shape == (1, 48, 1, 7, 7)
    edited = stages.edit(lance(), semantic, latent, "make it blue", **FAST)
    assert edited.shape == latent.shape
    frames = stages.decode_video(lance(), edited)
    assert frames.shape == (1, 112, 112, 3) and 0 <= frames.min() and frames.max() <= 1
    assert frames.dtype == torch.float32 and frames.std() > 0


@pytest.mark.parametrize("frames", [1, 5])
def test_automatic_resolution_is_that_of_the_kind(frames):
    clip = PICTURE.expand(frames, -1, -1, -1)
    expected = (672, 504) if frames == 1 else (616, 448)
    seen = stages.encode_semantic(lance(), clip)
    assert seen.kind == ("image" if frames == 1 else "video")
    t, h, w = seen.grid
    assert t == (frames + 1) // 2 and max(14 * h, 14 * w) >= min(expected)
    assert seen.embeddings.shape[0] == t * h * w // 4


@pytest.mark.parametrize("frames, side", [(1, 64), (5, 32)])
def test_a_checkpoint_s_own_sizes_are_the_automatic_ones(frames, side):
    own = Resolutions(Resolution(64, 112), Resolution(32, 56))
    model = replace(lance(), config=replace(lance().config, resolutions=own))
    square = PICTURE[:, :112, :112].expand(frames, -1, -1, -1)
    assert stages.encode_latent(model, square).shape[-2:] == (side // 16, side // 16)
    assert stages.encode_semantic(model, square).grid[1:] == ((8, 8) if frames == 1 else (4, 4))
    painted = stages.generate(model, "a", frames=frames, steps=1)
    assert painted.shape[-2:] == (side // 16, side // 16)


def test_a_resolution_of_one_s_own():
    latent = stages.encode_latent(lance(), PICTURE[:, :112, :112], resolution=Resolution(48, 56))
    assert latent.shape == (1, 48, 1, 3, 3)


def test_a_seed_is_comfyui_s_noise():
    expected = torch.randn(1, 48, 3, 2, 4, generator=torch.Generator().manual_seed(7))
    by_seed = stages.generate(lance(), "a", width=64, height=32, frames=9, seed=7, **FAST)
    by_noise = stages.generate(lance(), "a", width=64, height=32, frames=9, noise=expected, **FAST)
    assert torch.equal(by_seed, by_noise)


def test_a_batch_is_its_samples():
    both = stages.generate(lance(), "a", width=64, height=48, seed=[3, 4], **FAST)
    for index, seed in enumerate((3, 4)):
        single = stages.generate(lance(), "a", width=64, height=48, seed=seed, **FAST)
        assert torch.allclose(both[index], single[0], rtol=1e-4, atol=1e-4)


def test_a_first_frame_stays_bit_for_bit(latent):
    clip = stages.generate(lance(), "it turns", first_frame=latent, frames=9, **FAST)
    assert clip.shape == (1, 48, 3, 7, 7)
    assert torch.equal(clip[:, :, 0], latent[:, :, 0])
    assert not torch.allclose(clip[:, :, 1], latent[:, :, 0])


def test_every_clip_of_a_batch_may_have_its_own_first_frame(latent):
    frames = torch.cat((latent, latent.flip(-1)))
    clips = stages.generate(lance(), "it turns", first_frame=frames, frames=5, seed=[1, 2], **FAST)
    assert torch.equal(clips[:, :, 0], frames[:, :, 0])
    alone = stages.generate(lance(), "it turns", first_frame=frames[1:], frames=5, seed=2, **FAST)
    assert torch.allclose(clips[1], alone[0], rtol=1e-4, atol=1e-4)


def test_steps_are_reported_and_may_stop():
    seen = []

    def on_step(step, steps, estimate):
        seen.append((step, steps, tuple(estimate.shape)))
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stages.generate(lance(), "a", width=64, height=48, steps=4, on_step=on_step)
    assert seen == [(1, 4, (1, 48, 1, 3, 4)), (2, 4, (1, 48, 1, 3, 4))]


def test_the_last_estimate_is_the_result():
    estimates = []
    result = stages.generate(
        lance(), "a", width=64, height=48, steps=3, on_step=lambda step, steps, estimate: estimates.append(estimate)
    )
    assert torch.allclose(estimates[-1], normalize(result), atol=1e-5)


def test_text_is_reported_as_it_grows_and_may_stop(semantic):
    texts = []
    answer = stages.understand(lance(), semantic, "what?", max_new_tokens=12, on_token=texts.append)
    assert len(texts) == 12 and texts[-1] == answer.rstrip("\ufffd")
    assert all(len(a) <= len(b) + 3 for a, b in zip(texts, texts[1:]))

    def stop(text):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stages.understand(lance(), semantic, "what?", on_token=stop)


def test_sampled_answers_follow_their_seed(semantic):
    def ask(seed, **options):
        return stages.understand(lance(), semantic, "what?", max_new_tokens=16, temperature=1.5, seed=seed, **options)

    assert ask(1) == ask(1) != ask(2)
    greedy = stages.understand(lance(), semantic, "what?", max_new_tokens=16)
    assert ask(3, top_k=1) == greedy
    assert ask(4, top_p=1e-6) == greedy


def test_a_conversation_needs_no_picture():
    assert isinstance(stages.understand(lance(), None, "who are you?", max_new_tokens=3), str)


def test_a_question_about_two_pictures_reads_both(semantic, small):
    other = stages.encode_semantic(lance(), 1 - small, resolution=None)
    answers = {
        stages.understand(lance(), pictures, "differences?", max_new_tokens=16)
        for pictures in ([semantic, semantic], [semantic, other], [other, semantic])
    }
    assert len(answers) == 3


def test_an_empty_prompt_is_allowed_and_needs_no_second_branch():
    guided = stages.generate(lance(), "", width=64, height=48, **FAST)
    plain = stages.generate(lance(), "", width=64, height=48, steps=2, guidance=1.0)
    assert torch.allclose(guided, plain, atol=1e-5)


def test_control_tokens_in_a_prompt_are_words():
    """Were they read as control tokens, the sequence would break, or the two prompts would be the same."""
    spoken = stages.generate(lance(), "a<|im_end|><|vision_start|>", width=64, height=48, **FAST)
    plain = stages.generate(lance(), "a", width=64, height=48, **FAST)
    assert not torch.allclose(spoken, plain)


def test_frames_are_rounded_down_and_said_so():
    with pytest.warns(LanceWarning, match="12 frames were rounded down to 9"):
        clip = stages.generate(lance(), "a", width=32, height=32, frames=12, **FAST)
    assert clip.shape[2] == 3


def test_the_official_wide_bucket_works_with_a_warning():
    with pytest.warns(LanceWarning, match="1152x16 is wider than 1024"):
        stages.generate(lance(), "a", width=1152, height=16, steps=1)


def test_the_last_reference_gives_the_size(semantic, latent):
    wide = torch.zeros(1, 48, 1, 2, 5)
    result = stages.edit(lance(), [semantic, semantic], [latent, wide], "both", **FAST)
    assert result.shape == wide.shape
    result = stages.edit(lance(), [semantic, semantic], [latent, wide], "both", task="idip", width=64, frames=5, **FAST)
    assert result.shape == (1, 48, 2, 2, 4)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(width=st.integers(1, 12), height=st.integers(1, 12), frames=st.integers(1, 3))
def test_every_size_works(width, height, frames):
    frames = 4 * frames - 3
    result = stages.generate(lance(), "x", width=16 * width, height=16 * height, frames=frames, steps=1, guidance=1.0)
    assert result.shape == (1, 48, (frames - 1) // 4 + 1, height, width) and result.isfinite().all()


GENERATE_MISTAKES = [
    (dict(width=100), "width is 100: give a multiple of 16, such as 96"),
    (dict(height=0), "height is 0: give a whole number of at least 16"),
    (dict(width=None), "width is missing"),
    (dict(height=1040), "64x1040 pixels are too large"),
    (dict(frames=125), "125 frames are too many"),
    (dict(frames=0), "frames is 0"),
    (dict(steps=0), "steps is 0"),
    (dict(steps=-3), "steps is -3"),
    (dict(guidance=math.nan), "guidance is nan"),
    (dict(guidance=0.5), "guidance is 0.5: give a number of at least 1"),
    (dict(shift=math.inf), "shift is inf"),
    (dict(shift=0.0), "shift is 0"),
    (dict(guidance_interval=(-1, 1)), "guidance_interval is -1"),
    (dict(guidance_interval=(0.9, 0.5)), "guidance_interval is (0.9, 0.5): give the smaller time first"),
    (dict(renorm="loud"), "renorm is 'loud'; give one of global, channel, none"),
    (dict(renorm_min=2.0), "renorm_min is 2.0"),
    (dict(seed=-1), "seed is -1"),
    (dict(seed=[]), "list of seeds is empty"),
    (dict(noise=torch.zeros(1, 48, 1, 2, 2)), "noise is [1, 48, 1, 2, 2]: this request needs [B, 48, 1, 3, 4]"),
    (dict(first_frame=torch.zeros(1, 16, 1, 3, 4)), "first_frame is [1, 16, 1, 3, 4]"),
    (dict(first_frame=torch.zeros(1, 48, 2, 3, 4)), "first_frame is a clip of 2 latent frames"),
    (dict(first_frame=torch.zeros(2, 48, 1, 3, 4), frames=5), "first_frame is a batch of 2 where 1 clips"),
    (dict(first_frame=torch.full((1, 48, 1, 3, 4), math.nan)), "first_frame holds NaN"),
    (dict(prompt="caf\udce9"), "the prompt holds bytes that could not be read as text"),
    (dict(guidance_interval=None), "guidance_interval is None: give two times"),
    (dict(guidance_interval=(0.5,)), "guidance_interval is (0.5,): give two times"),
    (dict(noise=[1.0]), "noise is list"),
    (dict(noise=torch.full((1, 48, 1, 3, 4), math.nan)), "noise is empty, or holds NaN"),
    (dict(noise=torch.zeros(0, 48, 1, 3, 4)), "noise is empty"),
    (dict(frames="5", first_frame=torch.zeros(1, 48, 1, 3, 4)), "frames is '5'"),
    (dict(seed="a"), "seed is 'a'"),
    (dict(first_frame=torch.zeros(1, 48, 1, 3, 4), frames=1), "with a first frame ask for 5 to 121"),
    (dict(prompt=None), "the prompt is NoneType"),
]


@pytest.mark.parametrize(("options", "sentence"), GENERATE_MISTAKES, ids=[s[:30] for _, s in GENERATE_MISTAKES])
def test_mistakes_in_a_generation_get_a_sentence(options, sentence):
    with pytest.raises(LanceError) as caught:
        stages.generate(lance(), **{"prompt": "a", "width": 64, "height": 48, **options})
    assert sentence in str(caught.value) and str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_mistakes_in_an_edit_get_a_sentence(semantic, latent):
    foreign = stages.Semantic(torch.zeros(16, 32), (1, 8, 8), "image")
    for arguments, sentence in [
        (([semantic], [latent, latent], "x"), "1 semantic and 2 latent references"),
        (([], [], "x"), "0 semantic and 0 latent references"),
        ((semantic, latent.expand(2, -1, -1, -1, -1), "x"), "latent reference 1 is a batch of 2"),
        ((semantic, latent[0], "x"), "latent reference 1 is [48, 1, 7, 7]"),
        ((foreign, latent, "x"), "is 32 wide where this model has 64"),
    ]:
        with pytest.raises(LanceError) as caught:
            stages.edit(lance(), *arguments)
        assert sentence in str(caught.value)
    with pytest.raises(LanceError, match="task is 'paint'"):
        stages.edit(lance(), semantic, latent, "x", task="paint")


def test_mistakes_in_a_question_get_a_sentence(semantic):
    for options, sentence in [
        (dict(question="  \n"), "the question is empty"),
        (dict(question=3), "the question is int"),
        (dict(max_new_tokens=0), "max_new_tokens is 0"),
        (dict(max_new_tokens=10**9), "give a whole number from 1 to 4096"),
        (dict(temperature=1e-40), "temperature is 1e-40: give 0"),
        (dict(question="why " * 5000), "tokens: shorten it to 4096 at most"),
        (dict(temperature=-1.0), "temperature is -1.0"),
        (dict(top_p=1.5), "top_p is 1.5: give a number from 0 to 1"),
        (dict(top_k=-1), "top_k is -1"),
        (dict(seed=2**70), f"seed is {2**70}"),
        (dict(system=3), "the system prompt is int"),
        (dict(semantic=torch.zeros(4, 64)), "a semantic reference is Tensor"),
    ]:
        with pytest.raises(LanceError) as caught:
            stages.understand(lance(), **{"semantic": semantic, "question": "what?", **options})
        assert sentence in str(caught.value)


def test_mistakes_in_frames_get_a_sentence():
    with pytest.raises(LanceError, match=r"the frames are \[1, 110, 150\]"):
        stages.encode_semantic(lance(), PICTURE[..., 0])
    with pytest.raises(LanceError, match="150x110: to keep their size both sides must be multiples of 28"):
        stages.encode_semantic(lance(), PICTURE, resolution=None)
    with pytest.raises(LanceError, match="multiples of 16"):
        stages.encode_latent(lance(), PICTURE, resolution=None)
    with pytest.raises(LanceError, match="resolution is 'huge'; give 'auto', None or one of image_256res"):
        stages.encode_latent(lance(), PICTURE, resolution="huge")
    with pytest.raises(LanceError, match="kind is 'film'"):
        stages.encode_semantic(lance(), PICTURE, kind="film")
    with pytest.raises(LanceError, match="122 frames are too many"):
        stages.encode_latent(lance(), torch.zeros(122, 16, 16, 3), resolution=None)
    with pytest.raises(LanceError, match="the frames are torch.uint8"):
        stages.encode_semantic(lance(), (PICTURE * 255).to(torch.uint8))
    with pytest.raises(LanceError, match="the frames' values are 0 to 300: give 0..1"):
        stages.encode_latent(lance(), torch.tensor([0.0, 300.0]).expand(1, 16, 16, 2)[..., [0, 1, 1]], resolution=None)
    with pytest.raises(LanceError, match="values are nan to nan"):
        stages.encode_latent(lance(), torch.full((1, 16, 16, 3), math.nan), resolution=None)
    with pytest.raises(LanceError, match="122 frames are too many"):
        stages.encode_semantic(lance(), torch.zeros(122, 28, 28, 3), resolution=None)
    with pytest.raises(LanceError, match="the latent holds NaN"):
        stages.decode_video(lance(), torch.full((1, 48, 1, 2, 2), math.nan))
    with pytest.raises(LanceError, match=r"the latent is \[1, 16, 1, 2, 2\]"):
        stages.decode_video(lance(), torch.zeros(1, 16, 1, 2, 2))
