"""Pictures and clips that the built-in model understands, for graphs that run before anything is uploaded."""

from __future__ import annotations

from fractions import Fraction

from comfy_api.latest import InputImpl, Types, io

from ..lance_core.config import VIDEO_FPS


class LanceExample(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LanceExample",
            display_name="Lance Example",
            category="Lance",
            description="Draws a picture or a clip of coloured shapes, which nano, the built-in model, understands. For"
            " pictures of your own put Load Image or Load Video in its place.",
            search_aliases=["lance test picture", "sample image", "sample video", "shapes"],
            inputs=[
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Another seed gives other shapes. All are combinations that nano was not trained on.",
                ),
                io.Int.Input(
                    "frames",
                    default=1,
                    min=1,
                    max=17,
                    step=4,
                    tooltip="1 draws a picture, more a clip in which one shape moves; nano knows clips of 9 frames.",
                ),
            ],
            outputs=[
                io.Image.Output(tooltip="48 x 48 pixels; of a clip all frames."),
                io.Video.Output(tooltip="The same as a clip of 12 frames per second."),
                io.String.Output(display_name="caption", tooltip="What is to be seen, in one sentence."),
            ],
        )

    @classmethod
    def execute(cls, seed: int, frames: int) -> io.NodeOutput:
        from ..lance_core.world.example import example  # the world is only loaded where it is used

        pixels, caption = example(seed, frames)
        clip = Types.VideoComponents(images=pixels, audio=None, frame_rate=Fraction(VIDEO_FPS))
        return io.NodeOutput(pixels, InputImpl.VideoFromComponents(clip), caption)
