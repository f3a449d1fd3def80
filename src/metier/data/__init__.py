"""Records in the formats people have (messages, prompt/completion, alpaca, ShareGPT), to token batches."""
