"""The only room that knows Hugging Face spellings: it loads a model and shows its MoE layers uniformly."""
