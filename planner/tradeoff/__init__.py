"""Questions beyond one plan: all budgets at once, the smallest budget, the largest batch."""
