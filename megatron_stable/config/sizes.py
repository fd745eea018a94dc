"""Model sizes: named shapes. Block parameters are about 12 x layers x hidden^2."""

from typing import Any

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"layers": 4, "hidden": 256, "heads": 4, "sequence_length": 256},
    "10m": {"layers": 3, "hidden": 512, "heads": 8, "sequence_length": 512},
    "85m": {"layers": 12, "hidden": 768, "heads": 12, "sequence_length": 1024},
    "302m": {"layers": 24, "hidden": 1024, "heads": 16, "sequence_length": 2048},
    # the model of arXiv 2410.16682; 830M only closes with a vocabulary of about 256k, untied (derived)
    "830m": {"layers": 24, "hidden": 1024, "heads": 16, "sequence_length": 4096, "vocab_size": 256000},
    "1b": {"layers": 24, "hidden": 2048, "heads": 16, "sequence_length": 4096},
    "3b": {"layers": 28, "hidden": 3072, "heads": 24, "sequence_length": 4096},
    "7b": {"layers": 32, "hidden": 4096, "heads": 32, "sequence_length": 4096},
    "10b": {"layers": 48, "hidden": 4096, "heads": 32, "sequence_length": 4096},
    "13b": {"layers": 40, "hidden": 5120, "heads": 40, "sequence_length": 4096},
    "30b": {"layers": 48, "hidden": 7168, "heads": 56, "sequence_length": 4096},
}
