"""The engine: local training, the compiled round, cohorts, personal states, checkpoints."""
