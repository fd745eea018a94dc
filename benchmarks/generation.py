"""Tokens per second of `generate` with its cache, and of the same model computing the whole text for each token.

    python benchmarks/generation.py --rounds 3
    python benchmarks/generation.py --hidden 1024 --layers 24 --batch 1 4 16

Each round times both, one after the other, in turns; medians are printed. The uncached side computes what `generate`
did before it had a cache: a pass over the text so far per token, with the output head at the last position only. Tokens
are taken greedily, and both sides have to agree on them.
"""

from __future__ import annotations

import argparse
import time
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch

from megatron_stable.analysis.generation import Sampling, generate_each
from megatron_stable.analysis.trained import Trained
from megatron_stable.config.schema import Config
from megatron_stable.model.transformer import Transformer, layer_list
from megatron_stable.parallel.topology import TensorParallel


def make(arguments: argparse.Namespace) -> Trained:
    """A model with random weights, and what stands for a tokenizer: a prompt "7 8 9" has these token ids."""
    sizes = {name: getattr(arguments, name) for name in ("hidden", "layers", "heads", "sequence_length", "vocab_size")}
    config = Config.model_validate({"model": {**sizes, "size": None, "positions": arguments.positions}})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Transformer(layer_list(config.model, TensorParallel(), 0, device)).eval()
    with torch.no_grad():
        model.layers["head"].weight[0] = 0  # type: ignore[union-attr,index]  # documents do not end
    tokenizer: Any = SimpleNamespace(
        vocab_size=arguments.vocab_size,
        end_of_document=0,
        encode=lambda text: [int(each) for each in text.split()],
    )
    return Trained(config, model, tokenizer, 0)


def cached(trained: Trained, prompts: list[str], tokens: int) -> list[list[int]]:
    """What `generate` makes of the prompts."""
    ids: list[list[int]] = [[] for _ in prompts]
    for number, token in generate_each(trained, prompts, tokens, [Sampling(temperature=0)] * len(prompts)):
        ids[number].append(token)
    return ids


@torch.no_grad()
def uncached(trained: Trained, prompts: list[str], tokens: int) -> list[list[int]]:
    """The same, each prompt by itself, as it was."""
    *body, head = trained.model.layers.values()
    found = []
    for prompt in prompts:
        ids = [0, *map(int, prompt.split())]
        begun = len(ids)
        for _ in range(tokens):
            x = torch.tensor([ids], device=trained.device)
            for layer in body:
                x = layer(x)
            ids.append(int(head(x[:, -1:])[0, 0].float().cpu()[: trained.config.model.vocab_size].argmax()))
        found.append(ids[begun:])
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("hidden", 256), ("layers", 4), ("heads", 4), ("sequence-length", 1024), ("vocab-size", 4096)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--positions", default="rope")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--prompt", type=int, default=16, help="tokens of each prompt")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    trained = make(arguments)
    parameters = sum(weight.numel() for weight in trained.model.parameters())
    print(f"{parameters / 1e6:.1f}M parameters on {trained.device}, {torch.get_num_threads()} threads, "
          f"{arguments.tokens} tokens after {arguments.prompt}, torch {torch.__version__}")  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(1, arguments.vocab_size, (max(arguments.batch), arguments.prompt), generator=generator)
    prompts = [" ".join(map(str, row)) for row in drawn.tolist()]
    seconds: dict[Any, list[float]] = {}
    for _ in range(arguments.rounds):
        for what in ("uncached", *arguments.batch):
            chosen = prompts[:1] if what == "uncached" else prompts[:what]
            began = time.perf_counter()
            made = (uncached if what == "uncached" else cached)(trained, chosen, arguments.tokens)
            seconds.setdefault(what, []).append(time.perf_counter() - began)
            print(f"{what}: {seconds[what][-1]:.1f} s", flush=True)
            if what == "uncached":
                wanted = made[0]
            agree = sum(a == b for a, b in zip(made[0], wanted, strict=False))
            if agree < arguments.tokens:
                print(f"{what}: {agree} of {arguments.tokens} tokens as without a cache")
    base = arguments.tokens / median(seconds["uncached"])
    print(f"{'':>22} {'tokens/s':>9} {'ratio':>7}\n{'whole text each time':>22} {base:9.1f} {1:7.1f}")
    for size in arguments.batch:
        speed = arguments.tokens * size / median(seconds[size])
        print(f"{f'cache, {size} prompt(s)':>22} {speed:9.1f} {speed / base:7.1f}")


if __name__ == "__main__":
    main()
