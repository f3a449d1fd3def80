"""What a run gained and what the model forgot: task metrics, general ability, the comparison of methods."""
