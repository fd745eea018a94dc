"""Tests of megatron_stable.data."""
