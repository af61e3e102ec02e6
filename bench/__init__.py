"""Measured speed; see docs/measurements.md."""
