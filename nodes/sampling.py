"""The knobs of sampling that core's nodes do not have: the guidance interval, its correction, the official times."""

from __future__ import annotations

from comfy_api.latest import io

from ..lance_core import flow
from ..lance_core.flow import RENORMS, Sampling
from .guidance import set_guidance
from .model import lance_of


class LanceGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LanceGuidance",
            display_name="Lance Guidance",
            category="Lance",
            description="Sets when guidance acts and how it is kept from burning the picture, for every sampler and for"
            " Lance Generate and Lance Edit. Load Lance has the official settings already.",
            search_aliases=["lance cfg", "guidance interval", "cfg renorm", "cfg rescale"],
            inputs=[
                io.Model.Input("model", tooltip="What is guided differently: the MODEL of Load Lance."),
                io.Float.Input(
                    "guidance_start",
                    default=Sampling.interval[0],
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Lower guides longer and slower: below this time (1 is noise, 0 the picture) it is off.",
                ),
                io.Float.Input(
                    "guidance_end",
                    default=Sampling.interval[1],
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Lower leaves the first, noisiest steps unguided: above this time guidance is off.",
                ),
                io.Combo.Input(
                    "renorm",
                    options=list(RENORMS),
                    default=Sampling.renorm,
                    tooltip="Keeps strong guidance from burning the picture: over the whole of it, per token, or not"
                    " at all.",
                ),
                io.Float.Input(
                    "renorm_min",
                    default=Sampling.renorm_min,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Higher lets guidance keep more of its strength; 1 switches the correction off.",
                    advanced=True,
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(
        cls, model, guidance_start: float, guidance_end: float, renorm: str, renorm_min: float
    ) -> io.NodeOutput:
        lance_of(model)
        settings = Sampling(interval=(guidance_start, guidance_end), renorm=renorm, renorm_min=renorm_min)
        model = model.clone()
        set_guidance(model, settings)
        return io.NodeOutput(model)


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
                io.Int.Input(
                    "steps",
                    default=Sampling.steps,
                    min=1,
                    max=200,
                    tooltip="More steps are slower and a little cleaner.",
                ),
                io.Float.Input(
                    "shift",
                    default=Sampling.shift,
                    min=0.1,
                    max=20.0,
                    step=0.1,
                    tooltip="Higher spends more steps on the composition, lower on the detail.",
                ),
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
