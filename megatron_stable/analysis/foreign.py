"""What to tell other trainers so that they skip the same data, each in the numbers that it counts with.

Read in their sources: NVIDIA/Megatron-LM ``megatron/training/training.py`` and ``megatron/training/arguments.py``,
bigscience-workshop/Megatron-DeepSpeed pull request 177 and issues 175, 189 and 230, argonne-lcf/Megatron-DeepSpeed
``megatron/training.py`` and pull request 56, allenai/OLMo-core ``src/olmo_core/train/trainer.py`` and ``common.py``,
facebookresearch/metaseq ``metaseq/cli/train.py``, EleutherAI/gpt-neox ``megatron/data/data_utils.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from megatron_stable.data.skip import merged

Windows = Sequence[tuple[int, int]]
NONE = "has no flag for it"


class TrainerFlags(NamedTuple):
    """What one trainer understands.

    Attributes:
        trainer: Its name.
        text: Flags or settings, or that it has none.
        note: How it counts, and what to mind.
    """

    trainer: str
    text: str
    note: str


def flags(windows: Windows, rollback_to: int) -> list[TrainerFlags]:
    """The same skip windows for other trainers.

    Args:
        windows: Inclusive, counted from 1, in steps as that trainer logged them.
        rollback_to: The step of the checkpoint that it goes on from; what a window holds up to there is left out.

    Raises:
        ConfigError: A window is none.
    """
    ahead = [(max(a, rollback_to + 1), b) for a, b in merged(windows) if b > rollback_to]
    if not ahead:
        return []
    moved = [f"{a}-{b}" for a, b in _in_updates(ahead)]
    load = f"load the checkpoint of step {rollback_to}"
    return [
        TrainerFlags(
            "Megatron-LM",
            f"--ckpt-step {rollback_to} --iterations-to-skip {' '.join(f'$(seq {a} {b})' for a, b in ahead)}",
            "iterations from 1, each named. Versions whose megatron/training/training.py says `if iteration in "
            "args.iterations_to_skip`, without `+ 1`, count from 0: take 1 from every number",
        ),
        TrainerFlags(
            "Megatron-DeepSpeed (bigscience)",
            f"--skip-train-iteration-range {moved[0]}",
            f"{load}. Inclusive, from 1, in iterations trained, which a skip does not advance. One range to a start: "
            "its issue 230, on several, is open"
            + (f"; at later starts {', then '.join(moved[1:])}" if moved[1:] else ""),
        ),
        TrainerFlags(
            "Megatron-DeepSpeed (argonne-lcf)",
            f"--train-range-to-skip {' '.join(f'{a} {b}' for a, b in ahead)}",
            f"{load}. Pairs of first and last iteration, inclusive, from 1",
        ),
        TrainerFlags(
            "OLMo-core",
            f"steps_to_skip=[{', '.join(f'StepSkipRange(start={a}, stop={b + 1})' for a, b in ahead)}]",
            f"of TrainerConfig; {load} with load_path. Steps from 1, stop exclusive",
        ),
        TrainerFlags(
            "metaseq",
            f'--skip-batches "{",".join(moved)}"',
            f"{load}. Ranges are inclusive, from 1, in updates, which a skip does not advance: a later range is lower "
            "by what the earlier ones skip",
        ),
        TrainerFlags(
            "GPT-NeoX",
            NONE,
            "It finds its place in the data from the iteration alone, where "
            "megatron/data/data_utils.py sets train_dataloader.batch_sampler.start_iter: stop before the window and "
            "add there its length times gradient_accumulation_steps, at this start and all later ones",
        ),
        TrainerFlags("Megatron-DeepSpeed (Microsoft)", NONE, ""),
    ]


def _in_updates(windows: Windows) -> list[tuple[int, int]]:
    """Windows of data steps for a trainer whose counter stands still while it skips."""
    skipped, moved = 0, []
    for first, last in windows:
        moved.append((first - skipped, last - skipped))
        skipped += last - first + 1
    return moved
