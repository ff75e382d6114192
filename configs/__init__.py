"""Hydra's YAML files; the package only makes them findable."""
