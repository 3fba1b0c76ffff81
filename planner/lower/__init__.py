"""Lowering: a plan and a module -> a module that runs exactly that plan."""
