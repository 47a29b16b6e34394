"""`iv2 plan`: compiles a training step ahead of time for TPUs that are not here, and adds it up."""
