"""The recipe's parts for other transformers models: shared keys and values, experts, longer contexts."""
