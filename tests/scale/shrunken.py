"""Examples made narrow: their layout, recipe, precision, schedule and blend, on a model and batches of toys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_stable.config.load import load_config
from megatron_stable.config.schema import Config
from tests.training.runs import write_data

VOCAB, MOST_RANKS = 256, 8


def narrow(path: Path, hidden: int, sequence: int, replicas: int, **parallel: int) -> dict[str, Any]:
    """Values of an example's configuration with two blocks per stage and two micro batches per stage and replica.

    Everything else is the example's, but for what ``parallel`` overrides.
    """
    values = load_config(path).model_dump(mode="json")
    stages = values["parallel"]["pipeline"]  # the example's, whatever the layout
    values["parallel"] |= parallel
    values["model"] |= {"size": None, "layers": max(4, 2 * stages), "hidden": hidden, "heads": 8}
    values["model"] |= {"sequence_length": sequence, "vocab_size": VOCAB}
    values["batch"]["micro_size"] = 1
    values["batch"]["global_size"] = 2 * stages * replicas
    return values


def few_ranks(path: Path) -> tuple[int, dict[str, int]]:
    """(ranks, layout) of an example on at most 8 ranks: its PP, TP as far as that goes, two replicas if they can be."""
    parallel = load_config(path).parallel
    tensor = min(parallel.tensor, MOST_RANKS // parallel.pipeline)
    model = tensor * parallel.pipeline
    return model * min(2, MOST_RANKS // model), {"tensor": tensor, "pipeline": parallel.pipeline}


def toy_run(path: Path, folder: Path, steps: int, world: int, **parallel: int) -> dict[str, Any]:
    """Values of a run of a narrow example in ``folder``, with data for it."""
    split = parallel["tensor"] * parallel["pipeline"]
    values = narrow(path, 64, 32, world // split, **parallel)
    example: Config = load_config(path)
    train = example.data.train
    assert train is not None and example.data.validation is not None
    names = [train] if isinstance(train, str) else list(train)
    prefixes = {name: write_data(folder / Path(name).name, 6000, VOCAB, seed) for seed, name in enumerate(names)}
    validation = write_data(folder / "validation", 3000, VOCAB, seed=9)
    blend = prefixes[train] if isinstance(train, str) else {prefixes[name]: weight for name, weight in train.items()}
    values["data"] = {"train": blend, "validation": validation}
    values["run"] |= {"directory": str(folder / f"run{world}"), "steps": steps}
    values["batch"]["global_size"] = 4  # whatever the layout
    # steep enough for a toy to learn something in a few steps
    values["optimizer"] |= {"learning_rate": 1e-2}
    values["schedule"] |= {"warmup_steps": 2, "warmup_tokens": None, "min_learning_rate": 1e-3}
    values["checkpoint"] |= {"every": steps}
    values["evaluation"] = {"every": steps, "batches": 1}
    return values
