"""A checkpoint operated upon: norms, caps, factors, vocabulary, depth, with optimizer state."""
