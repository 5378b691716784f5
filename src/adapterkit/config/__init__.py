"""Configs: one frozen pydantic model per method."""
