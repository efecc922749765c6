"""Espalier inside other people's loops: `integrations.lightning`, `integrations.transformers`, each with its extra."""

__all__: list[str] = []
