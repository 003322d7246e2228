"""Export of a finished run: folders that PEFT loads, whole checkpoints that transformers loads, and their cards."""
