"""Hugging Face's format, in and out: config.json, safetensors, a tokenizer, a model card; `transformers` is not needed."""
