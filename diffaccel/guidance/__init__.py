"""Guidance: rules on a model's predictions, and how they attach to diffusers pipelines."""
