"""Words and references as CONDITIONING, so that core's samplers paint by them."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ..lance_core.request import Request, Semantic as SemanticEncoding
from .diffusion import COND, lance_of
from .encode import Semantic

TASKS = ["edit", "idip"]


def conditioning(request: Request) -> list:
    """A request on a CONDITIONING wire. Core's nodes look at a tensor there; ones that zeroing can be told by."""
    return [[torch.ones(1, 1, 1), {COND: request}]]


def request_of_nodes(
    task: str, text: str, semantics: list[SemanticEncoding | None], latents: list[dict | None]
) -> Request:
    """The request of a node's sockets; without references something is painted anew, whatever the task."""
    seen = tuple(semantic for semantic in semantics if semantic is not None)
    looks = tuple(latent["samples"] for latent in latents if latent is not None)
    return Request(task if seen or looks else "generate", text, seen, looks)


def task_input() -> io.Combo.Input:
    return io.Combo.Input(
        "task",
        options=TASKS,
        tooltip="Edit changes the picture itself; idip (identity) paints its subject in a new scene.",
        advanced=True,
    )


class LanceConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LanceConditioning",
            display_name="Lance Conditioning",
            category="Lance",
            description="What KSampler and its like paint by: words, and the pictures or clips that they speak of. The"
            " size is that of the LATENT on the sampler.",
            search_aliases=["lance prompt", "lance text encode", "ksampler lance", "negative prompt"],
            inputs=[
                io.Model.Input("model", tooltip="The MODEL of Load Lance. LoRAs may come before or after this node."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    default="",
                    placeholder="A red fox sleeps in the snow",
                    tooltip="What is to be seen; with references, what is to change.",
                ),
                io.String.Input(
                    "negative_prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    default="",
                    tooltip="What guidance leads away from. Leave it empty for the official guidance, which leads away"
                    " from no words at all.",
                ),
                task_input(),
                Semantic.Input(
                    "semantic",
                    optional=True,
                    tooltip="The picture or clip that is changed: what it shows. Connect both encodings, or neither.",
                ),
                io.Latent.Input("latent", optional=True, tooltip="The same picture or clip: what it looks like."),
                Semantic.Input("semantic_2", optional=True, tooltip="A second reference, which the words may mention."),
                io.Latent.Input("latent_2", optional=True, tooltip="What the second reference looks like."),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive"),
                io.Conditioning.Output(display_name="negative"),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        prompt: str,
        negative_prompt: str,
        task: str,
        semantic=None,
        latent=None,
        semantic_2=None,
        latent_2=None,
    ) -> io.NodeOutput:
        host = lance_of(model)
        positive = request_of_nodes(task, prompt, [semantic, semantic_2], [latent, latent_2])
        negative = positive.against(negative_prompt)
        for request in (positive, negative):
            host.context_tokens(request)  # refuses here what does not fit this model, not on the sampler
        return io.NodeOutput(conditioning(positive), conditioning(negative))
