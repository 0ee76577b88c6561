"""Execution of one and the same computation in less time or memory: what pays is found by measuring."""
