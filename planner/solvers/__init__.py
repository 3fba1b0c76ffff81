"""Solvers: one algorithm a file, each a frozen dataclass with ``solve(problem) -> Solution``."""
