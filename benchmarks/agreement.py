"""How results on a device agree with the official recordings, and those of one way of running with another's."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import torch
from goldens import TINY, golden, relative_error, values
from parity import Request, requests, semantic

from lance_core import LanceError, load_lance, understand
from lance_core.checkpoint import Lance
from lance_core.placement import Placement, model_parts, weight_bytes

STEPS = 4
NAMES = ("t2i", "image_edit", "t2v")
QUESTION = "x2t_image.en.prompt"


def figures(device: torch.device) -> dict[str, dict[str, object]]:
    """Relative errors of samplings, by recorded request, and whether answers are equal."""
    found = {}
    for name in NAMES:
        request, recorded = requests()[name], golden(5)[f"{name}.steps{STEPS}.final_latent"]
        found[name] = against_recordings(request, recorded, device) | between_ways(request, device)
    return found | {"answer": answers(device)}


def answers(device: torch.device) -> dict[str, str]:
    """Whether compiled layers, on CUDA as a graph per token, write what eager ones do."""
    lance = load_lance(TINY, device=device, dtype="fp32")
    expected = answer(lance)
    if not compiles(lance):
        return {}
    return {"compiled, against eager": "equal" if answer(lance) == expected else "different"}


def answer(lance: Lance) -> str:
    seen = semantic(lance, "input.image_edit.en.vit_video0")
    return understand(lance, seen, values()[QUESTION], max_new_tokens=24)


def compiles(lance: Lance) -> bool:
    """Whether the layers of the model are compiled from now on: there is a compiler."""
    try:
        lance.transformer.compile_layers(lance.device)
    except LanceError:
        return False
    return True


def against_recordings(request: Request, recorded: torch.Tensor, device: torch.device) -> dict[str, float]:
    """Ours on the device against the official code in float32 on a CPU, and the official code in bf16 on a CPU."""
    official = golden("bf16")[f"{request.name}.steps{STEPS}.final_latent"]
    ours = {dtype: result(request, load_lance(TINY, device=device, dtype=dtype)) for dtype in ("fp32", "bf16")}
    return {
        "float32 here": relative_error(ours["fp32"], recorded),
        "bf16 here": relative_error(ours["bf16"], recorded),
        "the official code in bf16 on a CPU": relative_error(official, recorded),
    }


def between_ways(request: Request, device: torch.device) -> dict[str, float]:
    """Compiled and streamed against eager with all weights resident, in float32."""
    lance = load_lance(TINY, device=device, dtype="fp32")
    expected = result(request, lance)
    found = {}
    if not request.references:  # a budget that holds the vision tower holds this checkpoint's decoder, too
        found["streamed, against resident"] = relative_error(streamed(request, lance), expected)
    if compiles(lance):
        found["compiled, against eager"] = relative_error(result(request, lance), expected)
    return found


def result(request: Request, lance: Lance, **options: object) -> torch.Tensor:
    return request.run(lance, steps=STEPS, **options)


def streamed(request: Request, lance: Lance) -> torch.Tensor:
    """The result under the smallest of some budgets that the request accepts; the model is whole again behind it."""
    parts, streaming = (lance.transformer, lance.vision, lance.vae), []
    for share in (0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2, 4):
        placement = Placement(model_parts(*parts), lance.device, int(share * weight_bytes(*parts)))
        small = replace(lance, placement=placement)
        try:
            return result(request, small, on_step=lambda *_: streaming.append(placement.streams))
        except LanceError:
            continue
        finally:
            for part in placement.parts.values():
                for piece in part.pieces:
                    if not piece.present:
                        piece.arrive(lance.device)
            if streaming and not all(streaming):
                raise SystemExit(f"{request.name} fits without streaming: give it less.")
    raise SystemExit(f"no budget holds {request.name}")
