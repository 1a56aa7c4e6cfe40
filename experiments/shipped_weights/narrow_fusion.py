"""Leave out of fusion's layers at full resolution the channels that matter least, and save what is left.

    python experiments/shipped_weights/narrow_fusion.py WEIGHTS PAIRS.csv CHANNELS -o OUT.safetensors

One channel after the other, layer by layer: that without which the fused image changes least (root mean square, five
training pairs of each task, misaligned by the paper's recipe with a fixed seed). Its mean goes into the bias of the
layer that read it. Train on for a few hundred steps afterwards.
"""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from bsafusion import weights
from bsafusion.datasets import MISALIGNMENTS, PairSet, read_pairs, validation_batch
from bsafusion.image import TASKS

DRAW = 7


def without(layers: nn.Sequential, reader: int, channel: int, mean: Tensor) -> dict[str, Tensor]:
    """The state of ``layers`` in which the convolution ``reader`` sees ``mean`` in place of one of its channels."""
    state = {name: value.clone() for name, value in layers.state_dict().items()}
    weight = state[f"{reader}.weight"]
    state[f"{reader}.bias"] += weight[:, channel].sum((1, 2)) * mean
    weight[:, channel] = 0
    return state


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights")
    parser.add_argument("pairs", type=Path)
    parser.add_argument("channels", type=int)
    parser.add_argument("-o", "--out", type=Path, required=True)
    args = parser.parse_args()
    model, record = weights.load(args.weights)
    layers = model.fusion.last
    assert isinstance(layers, nn.Sequential)
    data = PairSet(read_pairs(args.pairs, split="train"))
    seen: list[Tensor] = []
    sources: list[tuple[Tensor, Tensor]] = []
    hook = layers.register_forward_pre_hook(lambda _, given: seen.append(given[0].clone()))
    for task in TASKS:
        indices = data.indices(task)
        for index in indices[:: max(len(indices) // 5, 1)][:5]:
            b = validation_batch(data, [index], MISALIGNMENTS["paper"], draw=DRAW, device=torch.device("cpu"))
            sources.append((b.fixed[:, :1], model.predict(b.fixed, b.moving, mirrored="never").aligned))
    hook.remove()
    x = torch.cat(seen)
    fixed, aligned = (torch.cat(images) for images in zip(*sources, strict=True))

    def fused() -> Tensor:
        share_fixed, share_moving = torch.sigmoid(layers(x).float()).chunk(2, dim=1)
        return (share_fixed * fixed + share_moving * aligned).clamp(0, 1)

    before = fused()
    readers = range(2, len(layers), 2)
    kept = {reader: list(range(model.cfg.fusion.hidden)) for reader in readers}
    for reader in readers:
        while len(kept[reader]) > args.channels:
            means = layers[:reader](x).mean((0, 2, 3))
            start = {name: value.clone() for name, value in layers.state_dict().items()}
            found = []
            for channel in kept[reader]:
                layers.load_state_dict(without(layers, reader, channel, means[channel]))
                found.append((float((fused() - before).square().mean().sqrt()), channel))
                layers.load_state_dict(start)
            change, channel = min(found)
            layers.load_state_dict(without(layers, reader, channel, means[channel]))
            kept[reader].remove(channel)
            print(f"layer {reader}: without channel {channel} the fused image differs by {change:.4f}", flush=True)
    state = dict(model.state_dict())
    for layer in range(0, len(layers), 2):
        weight, bias = (state[f"fusion.last.{layer}.{name}"] for name in ("weight", "bias"))
        into, out_of = kept.get(layer, list(range(weight.shape[1]))), kept.get(layer + 2, [0, 1])
        state[f"fusion.last.{layer}.weight"], state[f"fusion.last.{layer}.bias"] = weight[out_of][:, into], bias[out_of]
    cfg = replace(model.cfg, fusion=replace(model.cfg.fusion, hidden=args.channels))
    card = {f.name: getattr(record, f.name) for f in fields(record)}
    for name in ("name", "file", "sha256", "config"):
        del card[name]
    weights.save(args.out.parent, args.out.stem, state, config=cfg.to_dict(), **card)


if __name__ == "__main__":
    main()
