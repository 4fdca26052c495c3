"""Asking Lance about pictures and clips, or about nothing but words."""

from __future__ import annotations

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..lance_core import stages
from ..lance_core.checkpoint import Lance
from ..lance_core.errors import LanceError
from .contexts import identities
from .diffusion import lance_of
from .encode import Semantic
from .model import TEMPLATE_TOKENS, with_decoder
from .report import show, token_callback, warnings_logged

KEPT = 2**28  # bytes of a reading that stays: a dozen pictures


class LanceUnderstand(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        sampled = [
            io.Float.Input(
                "temperature",
                default=0.7,
                min=0.01,
                max=2.0,
                step=0.01,
                tooltip="Higher answers are more varied and less reliable.",
            ),
            io.Float.Input(
                "top_p", default=0.9, min=0.01, max=1.0, step=0.01, tooltip="Lower keeps to the likeliest words."
            ),
            io.Int.Input(
                "top_k", default=0, min=0, max=1000, tooltip="Lower keeps to the likeliest words; 0 sets no limit."
            ),
            io.Int.Input(
                "seed",
                default=0,
                min=0,
                max=0xFFFFFFFFFFFFFFFF,
                control_after_generate=True,
                tooltip="Another seed gives another answer.",
            ),
        ]
        return io.Schema(
            node_id="LanceUnderstand",
            display_name="Lance Understand",
            category="Lance",
            description="Answers a question about pictures or clips. The answer is text that other nodes can use, such"
            " as Lance Edit's instruction.",
            search_aliases=["lance ask", "vqa", "caption", "describe image", "image to text", "llm"],
            inputs=[
                io.Model.Input("model", tooltip="The MODEL of Load Lance."),
                io.String.Input(
                    "question",
                    multiline=True,
                    dynamic_prompts=True,
                    default="",
                    placeholder="What is in the picture?",
                    tooltip="What you want to know. Ask for the form you need: 'in one sentence', 'yes or no'.",
                ),
                io.Int.Input(
                    "max_new_tokens",
                    default=256,
                    min=1,
                    max=4096,
                    tooltip="Cuts longer answers off; a token is about three quarters of a word.",
                ),
                io.DynamicCombo.Input(
                    "sampling",
                    options=[io.DynamicCombo.Option("off", []), io.DynamicCombo.Option("on", sampled)],
                    tooltip="Off gives the likeliest answer, the same every time; on varies it with the seed.",
                ),
                Semantic.Input(
                    "semantic",
                    optional=True,
                    tooltip="What the question is about; without a picture or clip Lance answers from words alone.",
                ),
                Semantic.Input(
                    "semantic_2", optional=True, tooltip="A second picture or clip, which stands behind the first."
                ),
                io.String.Input(
                    "system",
                    multiline=True,
                    optional=True,
                    default="",
                    tooltip="Replaces the official system prompt; leave empty unless you know what the model was"
                    " trained with.",
                    advanced=True,
                ),
            ],
            outputs=[io.String.Output(display_name="answer")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model,
        question: str,
        max_new_tokens: int,
        sampling: dict | None = None,
        semantic=None,
        semantic_2=None,
        system: str = "",
    ) -> io.NodeOutput:
        if sampling is None:  # core leaves out what it finds nothing known in
            raise LanceError("sampling is missing or unknown: choose on or off on the node.")
        options = {name: value for name, value in sampling.items() if name != "sampling"}
        semantics = [s for s in (semantic, semantic_2) if s is not None]
        with warnings_logged():
            answer = ask(
                model,
                semantics,
                question,
                system or None,
                max_new_tokens=max_new_tokens,
                on_token=token_callback(cls.hidden.unique_id, max_new_tokens),
                **options,
            )
        show(answer, cls.hidden.unique_id)
        return io.NodeOutput(answer)


def ask(
    model: ModelPatcher, semantics: list[stages.Semantic], question: str, system: str | None = None, **options
) -> str:
    """The answer to a question; options are those of `stages.understand`."""
    read = sum(len(s.embeddings) for s in semantics)
    lance = with_decoder(model, TEMPLATE_TOKENS + options["max_new_tokens"] + read)
    known = reading(model, lance, semantics, system) if semantics else None
    return stages.understand(lance, known, question, system=system, **options)


def reading(model: ModelPatcher, lance: Lance, semantics: list[stages.Semantic], system: str | None) -> stages.Reading:
    """The pictures as the model has read them; kept with it for the next question, until it is unloaded or samples.

    What a long clip leaves would be missed by other models: ComfyUI does not count it.
    """
    host = lance_of(model)
    key = (*identities(s.embeddings for s in semantics), system, model.patches_uuid, lance.dtype)
    if host.reading is None or host.reading[0] != key:
        host.reading = None  # its memory is needed for the next
        fresh = stages.read(lance, semantics, system=system)
        if lance.transformer.context_memory(fresh.context.length, lance.dtype) > KEPT:
            return fresh
        host.reading = key, fresh
    return host.reading[1]
