"""How often ComfyUI's samplers paint what a caption says, judged by pixels in the small world.

Run by ComfyUI's Python: `python benchmarks/samplers.py PATH_OF_COMFYUI [--checkpoint nano] [--count 100]`. The pictures
are those of `nano.py`: the same captions and the same first noise for every sampler, each through a KSampler. Shares
stand with their 95 % interval; passes are branches computed, which some samplers do more often than once a step.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests/comfyui"))

from inside import begin
from measuring import markdown

SAMPLERS = (
    *("euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_2m_sde"),
    *("res_multistep", "uni_pc", "deis", "lms", "ddim", "lcm"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("comfyui")
    parser.add_argument("--checkpoint", default="nano")
    parser.add_argument("--count", type=int, default=100, help="pictures of each sampler (default: 100)")
    parser.add_argument("--samplers", nargs="+", default=SAMPLERS, metavar="NAME")
    parser.add_argument("--steps", type=int, nargs="+", default=(8, 15, 30))
    parser.add_argument("--cfg", type=float, default=4.0)
    parser.add_argument("--scheduler", default="simple")
    arguments = parser.parse_args()
    begin(arguments.comfyui)

    import comfy.utils
    import torch
    from lance.lance_core import load_lance, stages
    from lance.lance_core.errors import LanceError
    from lance.lance_core.world.accuracy import Cases, paintings
    from lance.lance_core.world.render import SIDE
    from lance.nodes.conditioning import LanceConditioning
    from lance.nodes.model import load_model

    import nodes as core

    comfy.utils.PROGRESS_BAR_ENABLED = False
    try:
        library = load_lance(arguments.checkpoint, device="cpu", dtype="fp32")
        model = load_model(arguments.checkpoint, "fp32")
    except LanceError as error:
        sys.exit(f"Error: {error}")
    empty = torch.zeros(1, 48, 1, SIDE // 16, SIDE // 16)

    def paint(caption: str, seed: int, sampler: str, steps: int) -> torch.Tensor:
        positive, negative = LanceConditioning.execute(model, caption, "", "edit").args
        schedule = (seed, steps, arguments.cfg, sampler, arguments.scheduler)
        (out,) = core.common_ksampler(model, *schedule, positive, negative, {"samples": empty})
        return stages.decode_video(library, out["samples"])

    def judged(sampler: str, steps: int) -> str:
        passes = 0

        def count(module: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
            nonlocal passes
            passes += len(output)  # one row of the batch for each branch

        hook = model.model.diffusion_model.llm2vae.register_forward_hook(count)
        try:
            found = paintings(partial(paint, sampler=sampler, steps=steps), Cases(arguments.count))
        finally:
            hook.remove()
        return f"{found['shape, colour and position']}, {passes / arguments.count:.0f} passes"

    with torch.inference_mode():
        found = {
            sampler: {f"{steps} steps": judged(sampler, steps) for steps in arguments.steps}
            for sampler in arguments.samplers
        }
    print(markdown(f"{arguments.count} pictures each", found))


if __name__ == "__main__":
    main()
