"""How fast initial values are drawn, beside ``torch.Tensor.normal_``: one core, as many elements, the best of some.

Prints millions of elements per second, and the time over that of ``normal_``: a matrix whole, the same by a rank of
TP 8 that holds some of its rows, or of its columns, and a part of a replica under ZeRO-3; then layers of models.
``--full-draw`` adds torch's own truncated normal, which rejects and so can be drawn at full size only.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from megatron_stable.config.schema import ModelConfig
from megatron_stable.config.sizes import SIZES
from megatron_stable.model.transformer import layer_list
from megatron_stable.parallel.drawing import draw_into
from megatron_stable.parallel.parameters import initialize
from megatron_stable.parallel.shards import Init, Place
from megatron_stable.parallel.topology import TensorParallel


def seconds(work: Callable[[], object]) -> float:
    """Of this core that one call takes."""
    began = time.thread_time()
    work()
    return time.thread_time() - began


def drawing(known: Place, start: int, flat: torch.Tensor) -> Callable[[], object]:
    return lambda: draw_into(flat, known, 1, start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=4096, help="of the matrix, and half its rows")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--full-draw", action="store_true", help="also time nn.init.trunc_normal_")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows, columns = 2 * args.width, args.width
    normal, truncated = Init(std=0.02), Init(std=0.02, truncated=True)
    whole = torch.zeros(rows * columns)  # its pages are there
    eighth = whole[: len(whole) // 8]
    cases: dict[str, tuple[Callable[[], object], int]] = {
        "normal, whole": (drawing(Place((rows, columns), init=normal), 0, whole), len(whole)),
        "truncated, whole": (drawing(Place((rows, columns), init=truncated), 0, whole), len(whole)),
        "TP 8, rows": (
            drawing(Place((rows, columns), 0, rows // 4, rows * 3 // 8, truncated), 0, eighth),
            len(eighth),
        ),
        "TP 8, columns": (
            drawing(Place((rows, columns), 1, columns // 4, columns * 3 // 8, truncated), 0, eighth),
            len(eighth),
        ),
        "ZeRO-3, an eighth": (drawing(Place((rows, columns), init=truncated), len(eighth), eighth), len(eighth)),
    }
    if args.full_draw:
        matrix = whole.view(rows, columns)
        cases["nn.init.trunc_normal_"] = (lambda: torch.nn.init.trunc_normal_(matrix, 0, 0.02, -0.04, 0.04), len(whole))
    print(f"{'':24}{'M/s':>8}{'normal_ M/s':>14}{'x normal_':>11}{'of the whole':>14}")
    taken: dict[str, float] = {}
    for name, (work, numel) in cases.items():
        target = whole[:numel]
        pairs = [(seconds(work), seconds(lambda target=target: target.normal_())) for _ in range(args.repeats)]  # type: ignore[misc]
        ours, theirs = (min(times) for times in zip(*pairs, strict=True))
        taken[name] = ours
        ratio, share = ours / theirs, ours / taken.get("truncated, whole", ours)
        print(f"{name:24}{numel / ours / 1e6:8.1f}{numel / theirs / 1e6:14.1f}{ratio:11.2f}{share:14.3f}")
    for size in ("85m", "1b"):
        one, of_eight = (sum(model_seconds(size, tensor)) for tensor in (1, 8))
        print(f"a block and the embedding of {size}: {one:.2f} s, a rank of TP 8 {of_eight / one:.3f} of that")
    embedding, block = model_seconds("30b", 8)
    layers = SIZES["30b"]["layers"]
    print(f"30b, vocabulary 256000, a rank of TP 8: {layers} blocks of {block:.2f} s and two of {embedding:.2f} s")
    print(f"make {layers * block + 2 * embedding:.0f} s on one core")


def model_seconds(size: str, tensor: int) -> tuple[float, float]:
    """To draw the embedding and a block of a size, by the first of so many TP ranks."""
    config = ModelConfig(size=size, vocab_size=256000, sequence_length=128)
    layers = layer_list(config, TensorParallel(None, 0, tensor), seed=1, draw=False)
    embedding, block = (layer.build() for layer in layers if layer.name in ("embedding", "blocks.0"))
    initialize(embedding, 1)  # what is timed has its pages
    initialize(block, 1)
    return seconds(lambda: initialize(embedding, 1)), seconds(lambda: initialize(block, 1))


if __name__ == "__main__":
    main()
