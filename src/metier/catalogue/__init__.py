"""Every method there is, as the survey orders them. Torch-free, so that the command line stays quick."""
