"""Benchmarks: each program measures one thing, and ``page`` makes docs/performance.md of them."""
