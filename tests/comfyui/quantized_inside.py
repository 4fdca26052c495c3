# ruff: noqa: E402, I001  (nothing of ComfyUI can be imported before it has begun)
"""Quantised models in ComfyUI's own interpreter; prints nothing, writes measurements as JSON.

What the tests of `test_quantized.py` assert is measured here. Arguments: the folder of ComfyUI, a small checkpoint, a
file for the results, which measurements to take, with commas, and ComfyUI's flags.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

from inside import begin

COMFYUI, CHECKPOINT, RESULTS, NAMES, *FLAGS = sys.argv[1:]
begin(COMFYUI, *FLAGS)

import comfy.model_management
import comfy.sd
import nodes as core
import torch
from comfy.model_patcher import ModelPatcher
from comfy.quant_ops import QuantizedTensor
from comfy_extras.nodes_torch_compile import TorchCompileModel
from torch import Tensor

from lance.lance_core import load_lance, stages
from lance.lance_core.checkpoint import Lance
from lance.lance_core.layout import find_checkpoint
from lance.lance_core.quantized import STORED_FORMATS, quantizable, quantize, quantize_model
from lance.lance_core.quantizing import quantize_checkpoint
from lance.nodes.conditioning import LanceConditioning
from lance.nodes.diffusion import COND
from lance.nodes.encode import EncodeSemantic
from lance.nodes.model import load_model, with_decoder
from lance.nodes import prefetch as prefetching
from lance.nodes.paint import LanceEdit, LanceGenerate
from lance.nodes.prefetch import Prefetch
from lance.nodes.quantized import LAYOUT, LAYOUTS, fp8, offered, weight_bytes

PROMPT, SEED, STEPS = "a red fox on a stone", 7, 4
SMALL = {"size": "custom", "width": 128, "height": 96}
EMPTY = torch.zeros(1, 48, 1, 6, 8)
WIDGETS = {"seed": SEED, "steps": STEPS, "guidance": 4.0, "batch_size": 1, "shift": 3.5}
OFFERED = list(filter(offered, LAYOUTS))
EIGHT_BITS = [name for name in OFFERED if name != "w4a8"]


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def message(action: Callable[[], object]) -> str:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


picture = torch.rand(1, 112, 112, 3, generator=torch.Generator().manual_seed(0))


def generated(patcher: ModelPatcher) -> Tensor:
    return LanceGenerate.execute(patcher, PROMPT, 1, SMALL, None, **WIDGETS).args[0]["samples"]


def library(format: str | None = None) -> Lance:
    lance = load_lance(CHECKPOINT, device="cpu", dtype="fp32")
    if format:
        quantize_model(lance.transformer, format)
    return lance


def library_generated(format: str | None = None) -> Tensor:
    return painted(library(format))


def painted(lance: Lance) -> Tensor:
    return stages.generate(lance, PROMPT, width=128, height=96, seed=SEED, steps=STEPS)


def ksampler(patcher: ModelPatcher, steps: int = STEPS) -> Tensor:
    conds = LanceConditioning.execute(patcher, PROMPT, "", "edit").args
    (out,) = core.common_ksampler(patcher, SEED, steps, 4.0, "euler", "simple", *conds, {"samples": EMPTY})
    return out["samples"]


def edited(patcher: ModelPatcher) -> tuple[Tensor, str]:
    """A picture changed after a look at it, and an answer about it."""
    semantic = EncodeSemantic.execute(patcher, picture, "native").args[0]
    latent = {"samples": stages.encode_latent(library(), picture, resolution=None)}
    out = LanceEdit.execute(patcher, semantic, latent, PROMPT, "edit", **WIDGETS).args[0]["samples"]
    return out, stages.understand(with_decoder(patcher, 512), semantic, "what?", max_new_tokens=8)


def every_way() -> dict[str, dict[str, object]]:
    """Each layout by every node: distances from the dense model and from the library's, and bytes."""
    dense, (edit, _) = library_generated(), edited(load_model(CHECKPOINT, "fp32"))
    library_way = {name: library_generated(name) for name in ("fp8", "int8", "int8-dynamic")}
    shapes = {n: tuple(p.shape) for n, p in library().transformer.named_parameters()}
    result = {}
    for name in OFFERED:
        model = load_model(CHECKPOINT, name)
        out, (changed, answer) = generated(model), edited(model)
        result[name] = {
            "dense": distance(out, dense),
            "KSampler": distance(ksampler(model), out),
            "library": {format: distance(out, other) for format, other in library_way.items()},
            "edit": distance(changed, edit),
            "answer": answer,
            "size": model.model_size() - model.model.model_sampling.sigmas.nbytes,
            "expected size": weight_bytes(shapes, model.model.get_dtype(), name),
            "dense size": weight_bytes(shapes, torch.bfloat16, None),
            "estimate": model.model.memory_required([1, 48, 1, 6, 8]),
            "dense estimate": load_model(CHECKPOINT, "fp32").model.memory_required([1, 48, 1, 6, 8]),
            "largest product": 6 * 8 * library().config.text.intermediate_size,
            "layout": name,
            "quantised": sorted(n for n, p in model.model.diffusion_model.named_parameters() if is_quantised(p)),
        }
    return {"layouts": result, "names": sorted(filter(quantizable, shapes))}


def is_quantised(parameter: Tensor) -> bool:
    return isinstance(parameter.data, QuantizedTensor)


def bits(patcher: ModelPatcher) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in patcher.model.diffusion_model.state_dict().items()}


def raw(tensor: Tensor) -> Tensor:
    return tensor.flatten().view(torch.uint8)


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(raw(a[n]), raw(b[n])) for n in a)


def lora() -> dict[str, dict[str, object]]:
    """A LoRA's effect on each layout against that on dense weights; and that it leaves no trace."""
    modules = ["self_attn.q_proj", "mlp_moe_gen.down_proj", "mlp_moe_gen.up_proj"]
    dense = load_model(CHECKPOINT, "bf16")
    parameters = dict(dense.model.diffusion_model.named_parameters())
    change = {}
    for layer in range(2):
        for module in (f"language_model.model.layers.{layer}.{name}" for name in modules):
            rows, columns = parameters[f"{module}.weight"].shape
            change[f"diffusion_model.{module}.lora_A.weight"] = drawn(4, columns) / columns**0.5
            change[f"diffusion_model.{module}.lora_B.weight"] = drawn(rows, 4) * 0.3

    def effect(model: ModelPatcher) -> tuple[Tensor, Tensor]:
        return generated(model), generated(comfy.sd.load_lora_for_models(model, None, change, 1.0, 0)[0])

    plain, patched = effect(dense)
    result = {}
    for name in OFFERED:
        model = load_model(CHECKPOINT, name)
        before = bits(model)
        base, changed = effect(model)
        comfy.model_management.unload_all_models()
        result[name] = {
            "effect": distance(patched, plain),
            "error": distance(changed - base, patched - plain),
            "unpatched": same_bits(bits(model), before),
            "again": torch.equal(generated(model), base),
        }
    return result


def saved() -> dict[str, dict[str, object]]:
    """Model Save and Load Lance, or the library: the same bits, the same picture."""
    result = {}
    for name in EIGHT_BITS:
        model = load_model(CHECKPOINT, name)
        folder = Path(RESULTS).parent / f"saved_{name}"
        folder.mkdir()
        for file in Path(CHECKPOINT).iterdir():
            if file.suffix == ".json":
                (folder / file.name).write_bytes(file.read_bytes())
        comfy.sd.save_checkpoint(str(folder / "model.safetensors"), model)
        again = load_model(str(folder), "default")
        result[name] = {
            "same": same_bits(bits(model), bits(again)),
            "equal": torch.equal(generated(model), generated(again)),
            "library": distance(painted(load_lance(folder, device="cpu", dtype="fp32")), library_generated(name)),
        }
    return result


def files() -> dict[str, dict[str, object]]:
    """Checkpoints in every format of the library, and what lies beside the results, by themselves and as dense ones."""
    folders = {path.name: path for path in Path(RESULTS).parent.glob("*.gguf")}
    for format in (format for format in STORED_FORMATS if format not in LAYOUTS or offered(format)):
        folder = folders[format] = Path(RESULTS).parent / format
        quantize_checkpoint(CHECKPOINT, folder, format)
    result = {}
    for name, folder in folders.items():
        folder = str(find_checkpoint(folder).folder) if folder.is_dir() else str(folder)
        model, dense = load_model(folder, "default"), load_model(folder, "fp32")
        expected = painted(load_lance(folder, device="cpu", dtype="fp32"))
        result[name] = {
            "layout": model.model.model_config.quant_config[LAYOUT],
            "distance": distance(generated(model), expected),
            "dense": distance(generated(dense), expected),
        }
    return result


def partial_loading() -> dict[str, dict[str, object]]:
    """One forward with a third of the weights loaded, through the patcher."""
    latent, time = drawn(1, 48, 1, 3, 4), torch.tensor([0.7])

    def forward(patcher: ModelPatcher) -> Tensor:
        request = LanceConditioning.execute(patcher, PROMPT, "", "edit").args[0][0][1][COND]
        patcher.pre_run()
        try:
            return patcher.model.apply_model(latent, time, **{COND: (request,)}, transformer_options={})
        finally:
            patcher.cleanup()

    result = {}
    for name in OFFERED:
        model = load_model(CHECKPOINT, name)
        whole = forward(model)
        comfy.model_management.unload_all_models()
        part = model.clone()
        part.load(torch.device("cpu"), lowvram_model_memory=part.model_size() // 3)
        result[name] = {"loaded": part.loaded_size() / part.model_size(), "equal": torch.equal(forward(part), whole)}
        part.detach()
    return result


def compiled() -> dict[str, object]:
    """Distances of compiled from plain sampling, and of both from dense weights; or what is said of it."""
    result, dense = {}, ksampler(load_model(CHECKPOINT, "fp32"), 2)
    for name in EIGHT_BITS:
        model = load_model(CHECKPOINT, name)
        torch._dynamo.reset()
        out, plain = ksampler(TorchCompileModel.execute(model, "inductor").args[0], 2), ksampler(model, 2)
        result[name] = {"plain": distance(out, plain), "dense": distance(out, dense), "both": distance(plain, dense)}
    if offered("w4a8"):
        four = TorchCompileModel.execute(load_model(CHECKPOINT, "w4a8"), "inductor").args[0]
        result["w4a8"] = message(lambda: ksampler(four))
    return result


def layer() -> dict[str, float]:
    """One int8 layer of core's against the library's for as many tokens as it quantises inputs of."""
    if not offered("int8"):
        return {}
    name, x = "language_model.model.layers.0.mlp.down_proj", drawn(1, 32, 256)
    own = load_model(CHECKPOINT, "int8").model.diffusion_model.get_submodule(name)
    dynamic, weights_alone = (library(format).transformer.get_submodule(name) for format in ("int8-dynamic", "int8"))
    return {"int8-dynamic": distance(own(x), dynamic(x)), "int8": distance(own(x), weights_alone(x))}


def prefetch() -> dict[str, object]:
    """Which layers core has prefetched when each begins, where core is told that the CPU has streams."""
    model = load_model(CHECKPOINT, "fp32")
    decoder = model.model.diffusion_model.language_model.model
    base = generated(model)
    fetch, began, fetched = Prefetch(decoder), [], []
    on_cpu = torch.equal(generated(model), base) and fetch.queue is None

    def note(layer: torch.nn.Module, _arguments: tuple) -> None:
        began.append(indices[layer])
        fetched.append(indices[fetch.queue[0][1][0]])

    indices = {layer: index for index, layer in enumerate(decoder.layers)}
    for layer in decoder.layers:
        layer.register_forward_pre_hook(note)
    prefetching.make_prefetch_queue = lambda units, device, options: [None, *units, None]
    equal = torch.equal(generated(model), base)
    return {
        "on a CPU": on_cpu,
        "equal": equal,
        "began": began,
        "fetched": fetched,
        "left": [name for name, part in decoder.named_modules() if hasattr(part, "_prefetch")] + [fetch.queue],
    }


def folding() -> dict[str, object]:
    """Rows of float8 whose scales are far apart under one scale: how many values change, and how much at most."""
    weight = drawn(64, 256) * torch.exp2(torch.linspace(0, -12, 64))[:, None]
    packed = quantize(weight, "fp8")
    tensors = fp8("x", packed)
    scale, rows = tensors["x.weight_scale"], packed.weight.float() * packed.weight_scale
    folded = tensors["x.weight"].float() * scale
    alike = quantize(drawn(64, 256), "fp8")
    same = fp8("x", alike)
    return {
        "changed": int((folded != rows).sum()),
        "of": weight.numel(),
        "error in scales": float((folded - rows).abs().max() / scale),
        "scale's elements": scale.numel(),
        "changed where rows are alike": int(
            (same["x.weight"].float() * same["x.weight_scale"] != alike.weight.float() * alike.weight_scale).sum()
        ),
    }


def flags() -> dict[str, object]:
    """What "default" is under ComfyUI's flags."""
    model = load_model(CHECKPOINT, "default")
    dense = load_model(CHECKPOINT, "fp32")
    return {
        "quantised": sum(map(is_quantised, model.model.diffusion_model.parameters())),
        "dtypes": sorted({str(p.dtype) for p in model.model.diffusion_model.parameters() if not is_quantised(p)}),
        "distance": distance(generated(model), library_generated()),
        "dense": distance(generated(dense), library_generated()),
    }


def refused() -> dict[str, str]:
    return {name: message(lambda: load_model(CHECKPOINT, name)) for name in ("default", *LAYOUTS)}


with torch.inference_mode():
    results = {name: globals()[name]() for name in NAMES.split(",")}
Path(RESULTS).write_text(json.dumps(results, indent=1))
