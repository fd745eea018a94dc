"""Hugging Face's format, in and out: config.json, safetensors, tokenizer, model card; without `transformers`."""
