"""Optimizer groups, gradients and schedules."""
