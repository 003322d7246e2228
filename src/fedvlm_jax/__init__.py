"""Federated fine-tuning of vision-language models in JAX/Flax (FedVLM, arXiv 2507.17088)."""
