"""Understand what was recorded: blocks, branches, roles, and which features are whose."""
