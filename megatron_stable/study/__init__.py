"""Small models that tell what the big one will do: sweeps, LR sensitivity, forecasts, and figures of these."""
