"""Instruction data: conversations about clips, as files, as token sequences and as batches."""
