"""What the VAE costs: `python benchmarks/vae.py [--width 32] [--size 256] [--frames 1] [--official CHECKOUT]`.

Seconds are the least of several, in float32 on a CPU, both sides taking turns with the same random weights.
Operations and the peak of the live tensors (weights and input apart) are counted on the meta device; with
`--width 256` they are those of the release.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
from measuring import seconds, table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lance_core.counting import peak
from lance_core.vae import VAEConfig, WanVAE

Call = Callable[[], object]


def config(width: int) -> VAEConfig:
    """Both halves in the release's proportion, 160 to 256."""
    return VAEConfig(encoder_width=width * 5 // 8, decoder_width=width)


def inputs(size: int, frames: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Pixels in -1..1 and a raw latent of the same clip."""
    generator = None if device == "meta" else torch.Generator().manual_seed(0)
    pixels = torch.rand(1, 3, frames, size, size, device=device, generator=generator) * 2 - 1
    latent = torch.randn(1, 48, 1 + (frames - 1) // 4, size // 16, size // 16, device=device, generator=generator)
    return pixels, latent


def official_network(checkout: str) -> type[nn.Module]:
    """The official VAE's class, from its file alone."""
    file = Path(checkout) / "modeling/vae/wan/vae2_2.py"
    spec = importlib.util.spec_from_file_location("official_vae", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.WanVAE_


def official_vae(network: type[nn.Module], ours: WanVAE) -> nn.Module:
    """The official VAE with the sizes and the weights of ours."""
    sizes = ours.config
    official = network(
        dim=sizes.encoder_width,
        dec_dim=sizes.decoder_width,
        z_dim=sizes.latent_channels,
        dim_mult=list(sizes.multipliers),
        num_res_blocks=sizes.blocks,
        temperal_downsample=list(sizes.time_downsample),
    )
    official.load_state_dict(ours.state_dict())
    return official.eval().requires_grad_(False)


def counts(options: argparse.Namespace) -> dict[str, float]:
    vae = WanVAE(config(options.width), device="meta").requires_grad_(False)
    pixels, latent = inputs(options.size, options.frames, "meta")
    figures = {}
    for name, run in (
        ("encode", lambda: vae.encode(pixels)),
        ("decode", lambda: vae.decode(latent, tile=options.tile)),
    ):
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            run()
        figures[f"{name}, GFLOP"] = counter.get_total_flops() / 1e9
        figures[f"{name}, peak MB in float32, result included"] = peak(run) / 1e6
    return figures


def times(options: argparse.Namespace) -> dict[str, float]:
    ours = WanVAE(config(options.width)).requires_grad_(False)
    pixels, latent = inputs(options.size, options.frames)
    calls: dict[str, Call] = {
        "encode, ours, s": lambda: ours.encode(pixels),
        "decode, ours, s": lambda: ours.decode(latent, tile=options.tile),
    }
    if options.official:
        official = official_vae(official_network(options.official), ours)
        calls["encode, official, s"] = lambda: official.encode(pixels, [0, 1])
        calls["decode, official, s"] = lambda: official.decode(latent, [0, 1])
    with torch.inference_mode():
        runs = [{name: seconds(call) for name, call in calls.items()} for _ in range(1 + options.repeats)]
        figures = {name: min(run[name] for run in runs) for name in calls}
        if options.official:
            theirs = official.decode(latent, [0, 1]).clamp(-1, 1)
            for part in ("encode", "decode"):
                figures[f"{part}, ours / official"] = figures[f"{part}, ours, s"] / figures[f"{part}, official, s"]
            figures["decode, relative distance"] = float((ours.decode(latent) - theirs).norm() / theirs.norm())
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--width", type=int, default=32, help="of the decoder's last stage (default: 32; release: 256)")
    parser.add_argument("--size", type=int, default=256, help="of a side in pixels (default: 256)")
    parser.add_argument("--frames", type=int, default=1, help="of the clip (default: 1)")
    parser.add_argument("--tile", type=int, help="decode in tiles of so many latent rows")
    parser.add_argument("--repeats", type=int, default=5, help="how often every time is taken (default: 5)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default: 2)")
    parser.add_argument("--official", help="a clone of github.com/bytedance/Lance, to compare with")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    title = f"width {options.width}, {options.frames} x {options.size}x{options.size}"
    print(table({title: counts(options) | times(options)}))


if __name__ == "__main__":
    main()
