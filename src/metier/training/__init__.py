"""The run: from a configuration to a run folder with a delta in it, on TRL's SFTTrainer."""
