"""Tokens per second of whole training steps, side by side with what others train a small GPT with on a CPU.

    pip install --no-deps --target build/peers transformers==5.23.0 accelerate==1.15.0 litgpt==0.5.12 \\
        lightning==2.6.6 lightning-utilities torchmetrics jsonargparse huggingface-hub hf-xet httpx2 httpcore2 \\
        truststore tokenizers regex
    PYTHONPATH=build/peers python benchmarks/peers.py

Ours is ``pretrain`` as users get it: DeepSpeed's engine, the guard, probes, metrics, TensorBoard. Beside it are a loop
written after nanoGPT's README (learned positions, no biases, fused AdamW, batches from a memory map, not compiled),
litgpt's model in a loop like that of its ``pretrain`` under Lightning Fabric, and Hugging Face's Trainer with GPT-2.
All have the same shape, vocabulary, data, AdamW and clipping, fp32, and as many parameters within two per cent. Each
has a process of its own with as many threads; they take turns, a few steps each, so that the machine's drift falls on
all alike. Processor time is that of all threads of the process; it tells what the clock cannot on a machine that is
busy otherwise. A peer that is not installed is skipped, and named. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from itertools import chain, repeat
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

RATE, BETAS, DECAY, CLIP = 3e-4, (0.9, 0.95), 0.1, 1.0
TOKENS = 500_000  # of the data


class Shape(NamedTuple):
    """What is trained; by default nanoGPT's small character-level model."""

    layers: int
    width: int
    heads: int
    sequence: int
    batch: int
    vocabulary: int


class Turn:
    """A contender's side: it calls this after each step, and is held there while others have their turn."""

    def __init__(self, pipe: Connection, warmup: int) -> None:
        self.pipe, self.left, self.began = pipe, warmup, (0.0, 0.0)

    def __call__(self) -> None:
        self.left -= 1
        if self.left:
            return
        wall, processor = self._now()
        self.pipe.send((wall - self.began[0], processor - self.began[1]))
        try:
            self.left = self.pipe.recv()
        except EOFError:  # the benchmark was interrupted
            self.left = 0
        if not self.left:
            os._exit(0)  # in the midst of training: no last checkpoint, no farewell
        self.began = self._now()

    def _now(self) -> tuple[float, float]:
        return time.perf_counter(), time.process_time()


def ours(shape: Shape, folder: Path, ready: Callable[[int], None], turn: Turn, **model: Any) -> None:
    """``pretrain``, with one callback more."""
    from megatron_stable.config.schema import Config
    from megatron_stable.records.callbacks import Callback
    from megatron_stable.training import writers
    from megatron_stable.training.pretrain import train

    config = Config.model_validate(
        {
            "run": {"directory": str(folder / "run"), "steps": 10**6},
            "model": {
                "size": None,
                "layers": shape.layers,
                "hidden": shape.width,
                "heads": shape.heads,
                "sequence_length": shape.sequence,
                "vocab_size": shape.vocabulary,
                **model,
            },
            "precision": {"dtype": "fp32"},
            "batch": {"global_size": shape.batch, "micro_size": shape.batch},
            "data": {"train": str(folder / "data")},
            "optimizer": {"learning_rate": RATE, "betas": BETAS, "weight_decay": DECAY, "clip_grad": CLIP},
            "loss": {"z_loss": 0.0},
            "checkpoint": {"every": 10**6},
            "logging": {"verbosity": "quiet"},
        }
    )

    class Turns(Callback):
        def record(self, record: Any) -> None:
            if record["step"] == 1:
                from megatron_stable.model.transformer import parameter_count

                ready(parameter_count(config.model)[0])
            turn()

    usual = writers.writers
    writers.writers = lambda *args: [*usual(*args), Turns()]
    train(config)


def nanogpt(shape: Shape, folder: Path, ready: Callable[[int], None], turn: Turn) -> None:
    """A GPT and its loop in plain PyTorch, as nanoGPT's README describes them."""
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            h = shape.width
            self.norm_1, self.norm_2 = nn.LayerNorm(h, bias=False), nn.LayerNorm(h, bias=False)
            self.qkv, self.proj = nn.Linear(h, 3 * h, bias=False), nn.Linear(h, h, bias=False)
            self.fc1, self.fc2 = nn.Linear(h, 4 * h, bias=False), nn.Linear(4 * h, h, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (
                part.unflatten(-1, (shape.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm_1(x)).chunk(3, -1)
            )
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.proj(y.transpose(1, 2).flatten(2))
            return x + self.fc2(F.gelu(self.fc1(self.norm_2(x))))

    class GPT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(shape.vocabulary, shape.width)
            self.positions = nn.Embedding(shape.sequence, shape.width)
            self.blocks = nn.Sequential(*(Block() for _ in range(shape.layers)))
            self.norm = nn.LayerNorm(shape.width, bias=False)

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
            return F.linear(self.norm(self.blocks(x)), self.tokens.weight)

    model = GPT()
    for weight in model.parameters():
        if weight.dim() == 2:
            nn.init.normal_(weight, std=0.02)
    optimizer = torch.optim.AdamW(_groups(model), lr=RATE, betas=BETAS, fused=True)
    ready(sum(weight.numel() for weight in model.parameters()))
    data = np.memmap(folder / "data.bin", dtype=np.uint16, mode="r")
    while True:
        starts = torch.randint(len(data) - shape.sequence, (shape.batch,)).tolist()
        rows = np.stack([data[i : i + shape.sequence + 1] for i in starts]).astype(np.int64)
        tokens = torch.from_numpy(rows)
        logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        turn()


def litgpt(shape: Shape, folder: Path, ready: Callable[[int], None], turn: Turn) -> None:
    """litgpt's model under Fabric, in the order of its own pretraining: GPT-NeoX's architecture without biases."""
    import torch
    from lightning.fabric import Fabric
    from litgpt import GPT, Config
    from litgpt.utils import chunked_cross_entropy

    config = Config(
        n_layer=shape.layers,
        n_embd=shape.width,
        n_head=shape.heads,
        block_size=shape.sequence,
        vocab_size=shape.vocabulary,
        padding_multiple=64,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        gelu_approximate="tanh",
    )
    fabric = Fabric(accelerator="cpu", devices=1)
    model = GPT(config)
    optimizer = torch.optim.AdamW(_groups(model), lr=RATE, betas=BETAS, fused=True)
    ready(sum(weight.numel() for weight in model.parameters()))
    model, optimizer = fabric.setup(model), fabric.setup_optimizers(optimizer)
    model.train()
    data = fabric.setup_dataloaders(torch.utils.data.DataLoader(_samples(shape, folder), shape.batch))
    for tokens in chain.from_iterable(repeat(data)):
        logits = model(tokens[:, :-1].contiguous())
        fabric.backward(chunked_cross_entropy(logits, tokens[:, 1:].contiguous(), chunk_size=0))
        fabric.clip_gradients(model, optimizer, max_norm=CLIP)
        optimizer.step()
        optimizer.zero_grad()
        turn()


def trainer(shape: Shape, folder: Path, ready: Callable[[int], None], turn: Turn) -> None:
    """Hugging Face's Trainer with GPT2LMHeadModel, without dropout."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

    class Turns(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            turn()

    config = GPT2Config(
        n_layer=shape.layers,
        n_embd=shape.width,
        n_head=shape.heads,
        n_positions=shape.sequence,
        vocab_size=shape.vocabulary,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config)
    ready(sum(weight.numel() for weight in model.parameters()))
    settings = TrainingArguments(
        output_dir=str(folder / "trainer"),
        use_cpu=True,
        per_device_train_batch_size=shape.batch,
        learning_rate=RATE,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        weight_decay=DECAY,
        max_grad_norm=CLIP,
        optim="adamw_torch_fused",
        lr_scheduler_type="constant",
        max_steps=10**6,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    # the model shifts the labels itself, so it gets no token more than it has positions
    rows = [{"input_ids": row[:-1], "labels": row[:-1]} for row in _samples(shape, folder)]
    Trainer(model, settings, train_dataset=rows, callbacks=[Turns()]).train()


def _groups(model: Any) -> list[dict[str, Any]]:
    weights = list(model.parameters())
    return [
        {"params": [weight for weight in weights if weight.dim() >= 2], "weight_decay": DECAY},
        {"params": [weight for weight in weights if weight.dim() < 2], "weight_decay": 0.0},
    ]


def _samples(shape: Shape, folder: Path) -> list[Any]:
    """Samples of one token more than the sequence, each as a tensor."""
    import torch

    data = torch.from_numpy(np.fromfile(folder / "data.bin", dtype=np.uint16).astype(np.int64))
    rows = data[: len(data) // (shape.sequence + 1) * (shape.sequence + 1)].view(-1, shape.sequence + 1)
    return [*rows]


class Contender(NamedTuple):
    """Who takes part: how it trains, and the packages whose versions are told."""

    train: Callable[..., None]
    packages: tuple[str, ...]
    options: dict[str, Any] = {}  # noqa: RUF012


AS_GPT = {"positions": "learned", "activation": "gelu_erf", "tied_embeddings": True, "init": "fixed"}
CONTENDERS = {
    "ours": Contender(ours, ("megatron-stable", "deepspeed"), AS_GPT),
    "ours, rotary": Contender(ours, ("megatron-stable", "deepspeed")),
    "nanoGPT's README": Contender(nanogpt, ("torch",)),
    "litgpt, Fabric": Contender(litgpt, ("litgpt", "lightning")),
    "Trainer, GPT-2": Contender(trainer, ("transformers", "accelerate")),
}


def contend(name: str, shape: Shape, folder: Path, threads: int, warmup: int, pipe: Connection) -> None:
    """A contender's process: says how many parameters it has, then trains whenever it has its turn."""
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    contender, own = CONTENDERS[name], folder / name.replace(" ", "_")
    own.mkdir()
    for path in folder.glob("data.*"):
        (own / path.name).symlink_to(path)
    try:
        contender.train(shape, own, pipe.send, Turn(pipe, warmup), **contender.options)
    except BaseException as error:
        pipe.send(error)
        raise


class Peer:
    """A contender as the benchmark sees it."""

    def __init__(self, name: str, shape: Shape, folder: Path, args: argparse.Namespace) -> None:
        self.name = name
        self.pipe, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        arguments = (name, shape, folder, args.threads, args.warmup, theirs)
        self.process = context.Process(target=contend, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        self.parameters = self._heard()
        self._heard()  # it is warm

    def steps(self, count: int) -> tuple[float, float]:
        """Let it make steps: seconds, and seconds of processor time, of one."""
        self.pipe.send(count)
        wall, processor = self._heard()
        return wall / count, processor / count

    def end(self) -> None:
        """Let go of it."""
        self.pipe.send(0)
        self.process.join()

    def _heard(self) -> Any:
        said = self.pipe.recv()
        if isinstance(said, BaseException):
            raise SystemExit(f"{self.name} failed: {said!r}")
        return said


def available(names: list[str]) -> Iterator[str]:
    """Those whose packages are installed; the others are named."""
    for name in names:
        try:
            versions = [f"{package} {version(package)}" for package in CONTENDERS[name].packages]
        except PackageNotFoundError as missing:
            print(f"{name}: skipped, as {missing.name} is not installed: see python {sys.argv[0]} --help")
            continue
        print(f"{name}: {', '.join(versions)}")
        yield name


def write_data(folder: Path, vocabulary: int) -> None:
    """Random tokens, as all contenders read them."""
    from megatron_stable.data import IndexedWriter

    with IndexedWriter(folder / "data", np.uint16) as writer:
        writer.add(np.random.default_rng(0).integers(vocabulary, size=TOKENS, dtype=np.uint16))


def table(times: dict[str, list[tuple[float, float]]], tokens: int) -> Iterator[str]:
    """A line each: rate, and the first's rate over it, by the clock and by processor time."""
    first = next(iter(times.values()))
    for name, own in times.items():
        wall = statistics.fmean(seconds for seconds, _ in own)
        rounds = sorted(b[0] / a[0] for a, b in zip(first, own, strict=True))
        low, high = rounds[len(rounds) // 10], rounds[-1 - len(rounds) // 10]
        ratios = [statistics.fmean(b[i] for b in own) / statistics.fmean(a[i] for a in first) for i in (0, 1)]
        yield (
            f"{name:18} {tokens / wall:8,.0f} tokens/s   {next(iter(times))} / it: {ratios[0]:.3f} "
            f"({low:.3f} to {high:.3f}), processor time {ratios[1]:.3f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field, default in Shape(6, 384, 6, 256, 16, 65)._asdict().items():
        parser.add_argument(f"--{field}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=2, help="of each process")
    parser.add_argument("--rounds", type=int, default=10, help="turns of each contender")
    parser.add_argument("--steps", type=int, default=2, help="of a turn")
    parser.add_argument("--warmup", type=int, default=3, help="steps before the first turn")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--json", type=Path, help="write the times of all turns here")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # the contenders inherit it
    shape = Shape(*(getattr(args, field) for field in Shape._fields))
    print(f"{os.cpu_count()} cores; torch {version('torch')}, Python {platform.python_version()}; {shape}")
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder), shape.vocabulary)
        peers = [Peer(name, shape, Path(folder), args) for name in available(args.only)]
        times: dict[str, list[tuple[float, float]]] = {peer.name: [] for peer in peers}
        for peer in peers:
            print(f"{peer.name}: {peer.parameters:,} parameters")
        for turn in range(args.rounds):
            for peer in peers[turn % len(peers) :] + peers[: turn % len(peers)]:  # each is first in turn
                times[peer.name].append(peer.steps(args.steps))
        for line in table(times, shape.batch * shape.sequence):
            print(line)
        for peer in peers:
            peer.end()
    if args.json is not None:
        args.json.write_text(json.dumps({"shape": shape._asdict(), "seconds": times}))


if __name__ == "__main__":
    main()
