"""The official times of sampling."""

from __future__ import annotations

from comfy_api.latest import io

from ..lance_core import flow
from ..lance_core.flow import Sampling


def steps_input() -> io.Int.Input:
    return io.Int.Input(
        "steps", default=Sampling.steps, min=1, max=200, tooltip="More steps are slower and a little cleaner."
    )


def shift_input(advanced: bool | None = None) -> io.Float.Input:
    return io.Float.Input(
        "shift",
        default=Sampling.shift,
        min=0.1,
        max=20.0,
        step=0.1,
        tooltip="Higher spends more steps on the composition, lower on the detail.",
        advanced=advanced,
    )


class LanceSigmas(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LanceSigmas",
            display_name="Lance Sigmas",
            category="Lance",
            description="The official times of sampling, exactly, for Sampler Custom. KSampler comes as near as its"
            " table allows with scheduler simple.",
            search_aliases=["lance scheduler", "flow schedule", "shifted sigmas"],
            inputs=[
                steps_input(),
                shift_input(),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Lower keeps more of the latent that is given to the sampler; 1 paints anew.",
                ),
            ],
            outputs=[io.Sigmas.Output()],
        )

    @classmethod
    def execute(cls, steps: int, shift: float, denoise: float) -> io.NodeOutput:
        if denoise == 0:
            return io.NodeOutput(flow.schedule(1, shift)[:0])
        return io.NodeOutput(flow.schedule(int(steps / denoise), shift)[-(steps + 1) :])
