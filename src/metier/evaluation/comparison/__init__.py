"""The comparison of methods: which runs it takes, how they are started, and what came out, told honestly."""
