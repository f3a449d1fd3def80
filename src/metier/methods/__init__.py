"""One folder a method; every method is a PEFT tuner. What the methods share lies beside the folders."""
