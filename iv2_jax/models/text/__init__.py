"""Text towers: BERT, the LLaMA-style CLIP tower and MobileCLIP's."""
