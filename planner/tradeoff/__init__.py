"""Questions beyond one plan: all budgets at once, the smallest budget, the largest batch.

`planner.solving` asks for the smallest budget too, where no plan fits.
"""
