"""A plain single-process Transformer and AdamW, written from the formulas: what the trainer is compared with."""
