"""Benchmarks: methods x domains x seeds under one protocol, resumable, with a report."""
