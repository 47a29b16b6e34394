"""Plain PyTorch modules of exported models, one file a family; each is copied into exports."""
