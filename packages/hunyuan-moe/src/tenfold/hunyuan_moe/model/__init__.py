"""The model as transformers has it, its checkpoints, and its Lightning module."""
