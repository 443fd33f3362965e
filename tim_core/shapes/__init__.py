"""Coloured shapes: scenes, renderer, detector, tokenizer, batches."""
