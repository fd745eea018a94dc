"""How often a warning was followed by what it warns of, in our back-test. docs/warnings.md says how that was counted.

    python benchmarks/early_warnings.py --write

Of the held-out runs in which a rule spoke: (those in which the loss rose within the run, all), by rule.
"""

TRACK_RECORD: dict[str, tuple[int, int]] = {
    "attention_logits": (30, 30),
    "attention_logits_lost": (20, 20),
    "attention_entropy": (30, 30),
    "output_norm": (27, 27),
}
