"""The preflight of a run: what its machines are, and whether ranks that share a model compute what one would."""
